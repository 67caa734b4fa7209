import json
import math
import sys
from importlib.resources import files
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError, MissingExtraError
from xloom.suite import mechanics, pulling
from xloom.suite.items import Item, clean, split_of
from xloom.suite.mechanics import DOMAIN, TABLE, TASKS, check_sequence, items_of, read
from xloom.suite.reserved import is_reserved
from xloom.suite.sequences import RESIDUES, similarity_groups

chains = st.text("".join(sorted(RESIDUES)), min_size=8, max_size=30)
HELIX, HAIRPIN = "AEALAKELAMLA", "TVYVTVGNVTVY"


# --- the table and its items ---


def shipped() -> list[list]:
    return json.loads(files("xloom.suite").joinpath(TABLE).read_text(encoding="utf-8"))["rows"]


def test_the_shipped_table_holds_nothing_reserved_and_is_small() -> None:
    table = files("xloom.suite").joinpath(TABLE).read_bytes()
    assert len(table) < 250_000
    assert b"not measured" in table[:200]
    rows = shipped()
    assert len(rows) == len({sequence for sequence, _, _ in rows}) > 1500
    assert not any(is_reserved(sequence) for sequence, _, _ in rows)
    assert all(12 <= len(sequence) <= 18 and set(sequence) <= RESIDUES for sequence, _, _ in rows)
    assert all(min(force, energy) > 0 for _, force, energy in rows)


def strangers(count: int) -> dict[str, list[str]]:
    """By split, `count` free sequences that resemble no other."""
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for first in "ACDEFGHIKLMNPQRSTVWY":
        for second in "ACDEFGHIKLMNPQRSTVWY":
            sequence = f"{first * 2}{second * 4}{first}{second}{first * 4}"
            if first != second and not is_reserved(sequence) and len(found[split_of(sequence)]) < count:
                found[split_of(sequence)].append(sequence)
    return found


def answers(items: list[Item], task: str) -> dict[str, str]:
    return {item.key: item.answer for item in items if item.task == task}


def test_one_is_the_largest_training_row() -> None:
    """Test rows beyond it stand at 1, and set no scale."""
    (one, two), (beyond,) = strangers(2)["train"], strangers(1)["test"]
    items = list(items_of([(one, 80.0, 200.0), (two, 20.0, 50.0), (beyond, 160.0, 100.0)]))
    assert answers(items, "CalculateForce") == {one: "[1.000]", two: "[0.250]", beyond: "[1.000]"}
    assert answers(items, "CalculateEnergy") == {one: "[1.000]", two: "[0.250]", beyond: "[0.500]"}
    assert answers(items, "CalculateForceEnergy")[beyond] == "[1.000,0.500]"
    assert answers(items, "unfolding force")[two] == "0.25"
    assert answers(items, "unfolding energy")[beyond] == "0.50"


def test_reserved_rows_are_left_out_and_set_no_scale() -> None:
    (one,) = strangers(1)["train"]
    reserved = next(f"GLFKWAAK{n * 'K'}" for n in range(300) if is_reserved(f"GLFKWAAK{n * 'K'}"))
    items = list(items_of([(one, 80.0, 200.0), (reserved, 999.0, 999.0)]))
    assert {item.key for item in items} == {one}
    assert answers(items, "CalculateForce") == {one: "[1.000]"}


def test_task_strings_are_the_papers() -> None:
    (one, two) = strangers(2)["train"]
    items = {item.task: item for item in items_of([(one, 40.0, 44.0), (two, 152.6, 200.0)]) if item.key == one}
    asked = {task: TASKS[task].wordings[0].replace("{}", item.text) for task, item in items.items()}
    chain = " ".join(one)
    assert asked["CalculateForce"] == f"CalculateForce<{chain}>"
    assert asked["GenerateForce"] == "GenerateForce<0.262>"
    assert asked["GenerateEnergy"] == "GenerateEnergy<0.220>"
    assert asked["GenerateForceEnergy"] == "GenerateForceEnergy<0.262,0.220>"
    assert items["CalculateForceEnergy"].answer == "[0.262,0.220]"
    assert items["GenerateForceEnergy"].answer == f"[{chain}]"


def test_relatives_share_a_group() -> None:
    relatives = ["GLFDIVKKVVGALG", "GLFDIVKKVVGALC"]
    groups = {item.group for item in items_of((one, 1.0, 1.0) for one in relatives)}
    assert groups == set(similarity_groups(relatives).values())
    assert len(groups) == 1


def test_labels_of_others_are_not_judged_by_our_model() -> None:
    items = items_of([(HELIX, 1.0, 1.0)], inverse=False)
    assert not [item for item in items if item.task.startswith("Generate")]


def test_the_domain_reads_without_any_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmm", None)
    assert DOMAIN.packages == ()
    items = list(DOMAIN.read(lambda package, member: pytest.fail("nothing is to be fetched")))
    assert {item.task for item in items} == set(DOMAIN.tasks)
    assert clean(items)[1] == {"reserved": 0, "contradicting": 0, "repeated": 0}
    for item in items:
        json.dumps(item.facts)
        assert len(item.key) <= mechanics.GENERATED or not item.task.startswith("Generate")


def test_plain_words_say_the_range_and_are_a_third() -> None:
    plain = {name: task for name, task in TASKS.items() if task.scorer == "number"}
    assert all(len(task.wordings) >= 5 for task in plain.values())
    assert all("0" in words and "1" in words for task in plain.values() for words in task.wordings)
    assert 0.3 < sum(task.share for task in plain.values()) / sum(task.share for task in TASKS.values()) < 0.36
    inverse = sum(task.share for task in TASKS.values() if task.scorer == "sequence")
    assert inverse == pytest.approx(0.15)


# --- the model ---


def test_contact_strengths_are_the_published_ones() -> None:
    """-e_ij of Miyazawa and Jernigan (1996), table 3: some of them, the sum of all 210, symmetry."""
    some = {"LL": 7.37, "FF": 7.26, "KK": 0.12, "KE": 1.68, "CC": 5.44, "IV": 6.05, "WP": 3.73, "GD": 1.22, "PP": 1.75}
    assert {pair: pulling.STRENGTH[pair[0], pair[1]] for pair in some} == some
    assert len(pulling.STRENGTH) == 400
    assert sum(value for (a, b), value in pulling.STRENGTH.items() if a <= b) == pytest.approx(666.89)
    assert all(pulling.STRENGTH[a, b] == pulling.STRENGTH[b, a] for a in RESIDUES for b in RESIDUES)


@given(chains)
def test_neighbours_are_a_bond_apart_in_every_fold(sequence: str) -> None:
    points = pulling.fold(sequence)
    assert len(points) == len(sequence)
    assert all(abs(math.dist(a, b) - pulling.BOND) < 0.01 for a, b in pairwise(points))
    assert all(math.dist(points[i], points[j]) > 0.4 for i in range(len(points)) for j in range(i + 2, len(points)))


@given(chains)
def test_contacts_are_those_of_the_fold(sequence: str) -> None:
    last = len(sequence) - 1
    found = {(i, j) for i, j, _, _ in pulling.contacts(sequence)}
    if pulling.is_helix(sequence):
        assert found == {(i, j) for i in range(last + 1) for j in (i + 3, i + 4) if j <= last}
    else:
        assert {(i, last - i) for i in range((last - 2) // 2)} <= found
        assert all(abs(i + j - last) <= 2 for i, j in found)
    assert all(
        strength == 2.479 * pulling.STRENGTH[sequence[i], sequence[j]]
        for i, j, _, strength in pulling.contacts(sequence)
    )


def test_propensities_decide_the_fold() -> None:
    assert pulling.is_helix(HELIX)
    assert not pulling.is_helix(HAIRPIN)


@pytest.mark.parametrize("sequence", ["AAAAAAA", "A" * 31, "AAAAXAAAA", "aaaaaaaaa", ""])
def test_what_is_no_chain_is_refused(sequence: str) -> None:
    with pytest.raises(DataError, match="is no sequence of 8 to 30 standard residues"):
        pulling.pull(sequence)


@pytest.fixture
def openmm() -> None:
    pytest.importorskip("openmm", reason="OpenMM is not installed")


@pytest.mark.usefixtures("openmm")
@pytest.mark.parametrize("sequence", [HELIX, HAIRPIN])
def test_work_is_what_the_broken_contacts_cost(sequence: str) -> None:
    """All contacts are broken at the end: the work is at least their energy, and not many times more."""
    total = sum(strength for _, _, _, strength in pulling.contacts(sequence))
    assert 0.9 * total < pulling.pull(sequence).energy < 2 * total


@pytest.mark.usefixtures("openmm")
def test_no_force_at_the_start_and_a_peak_on_the_way() -> None:
    curve = pulling.force_curve(HAIRPIN)
    assert 0 < curve[0] < pulling.SPRING * pulling.STEP
    smooth = [sum(curve[n : n + 3]) / 3 for n in range(len(curve) - 2)]
    pull = pulling.pull(HAIRPIN)
    assert pull.force == pytest.approx(1.66054 * max(smooth))
    assert pull.energy == pytest.approx(0.05 * sum(curve))


@pytest.mark.usefixtures("openmm")
def test_strong_contacts_resist_more() -> None:
    weak, strong = pulling.pull("KEKAKEKAKEKA"), pulling.pull("LELALELALELA")
    assert strong.force > 1.5 * weak.force
    assert strong.energy > 1.5 * weak.energy


@pytest.mark.usefixtures("openmm")
def test_the_table_comes_from_the_model() -> None:
    for sequence, force, energy in shipped()[::600]:
        found = pulling.pull(sequence)
        assert found.force == pytest.approx(force, rel=0.05)
        assert found.energy == pytest.approx(energy, rel=0.05)


def test_a_missing_openmm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xloom\[suite\]"'):
        pulling.pull(HELIX)


# --- judging generated chains ---


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that makes force 10 pN and energy 20 kJ/mol per leucine."""
    monkeypatch.setattr(mechanics, "pull", lambda s: pulling.Pull(10.0 * s.count("L"), 20.0 * s.count("L")))


def options(**targets: float) -> dict:
    return {"tolerance": 0.1, "targets": targets, "scales": {"force": 100.0, "energy": 400.0}}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("answer", "asked", "score"),
    [
        ("[L L L L A A A A]", {"force": 0.4}, 1.0),
        ("LLLLAAAA", {"force": 0.5}, 1.0),  # just within the tolerance
        ("l l l l a a a a", {"force": 0.3}, 1.0),
        ("[L L L L A A A A]", {"force": 0.51}, 0.0),
        ("[L L L L A A A A]", {"force": 0.4, "energy": 0.2}, 1.0),
        ("[L L L L A A A A]", {"force": 0.4, "energy": 0.5}, 0.0),
        ("[L L L L L L L L L L L L L L]", {"force": 1.0}, 1.0),  # beyond the scale stands at 1
        ("[L L L L X X X X]", {"force": 0.4}, 0.0),
        ("[L L L L]", {"force": 0.4}, 0.0),
        ("[0.400]", {"force": 0.4}, 0.0),
        ("", {"force": 0.0}, 0.0),
    ],
)
def test_generated_chains_are_judged_by_the_model(answer: str, asked: dict[str, float], score: float) -> None:
    assert check_sequence(answer, options(**asked)) == score


@pytest.mark.usefixtures("openmm")
def test_the_right_answers_of_the_generate_tasks_are_right() -> None:
    items = [item for item in read(lambda package, member: b"") if item.task == "GenerateForceEnergy"]
    for item in items[::300]:
        facts = json.loads(json.dumps(item.facts))
        assert check_sequence(item.answer, {"tolerance": 0.01, **facts}) == 1.0
        shifted = {name: value + (0.2 if value < 0.5 else -0.2) for name, value in facts["targets"].items()}
        assert check_sequence(item.answer, {"tolerance": 0.1, **facts, "targets": shifted}) == 0.0

import sys

import pytest

from xloom.errors import MissingExtraError
from xloom.hub.fetch import MODLAMP, Package
from xloom.suite.items import Item, Read, clean
from xloom.suite.peptides import DOMAIN, charge_word, read
from xloom.suite.reserved import is_reserved


def reader(*rows: str) -> Read:
    def read(package: Package, member: str) -> bytes:
        assert (package, member) == (MODLAMP, "modlamp/data/AMPvsUniProt.csv")
        return "\n".join(["5,1,UniProt,AMP", *rows, ""]).encode()

    return read


def answers(items: list[Item], task: str) -> dict[str, str]:
    return {item.key: item.answer for item in items if item.task == task and not item.reserved}


@pytest.fixture(autouse=True)
def biopython() -> None:
    pytest.importorskip("Bio", reason="Biopython is not installed")


def test_antimicrobial_rows_are_short_and_standard() -> None:
    items = read(reader(f"{'K' * 30}, 1", f"{'K' * 31}, 1", "GLX, 1", "GL, 1", "GLF, 0"))
    found = [(item.text, item.key, item.answer) for item in items if item.task == "antimicrobial"]
    assert found == [(" ".join("K" * 30), "K" * 30, "yes"), ("G L F", "GLF", "no")]


def test_properties_are_those_of_the_first_twenty_residues() -> None:
    items = read(reader("KKKKKLLLLLLLLLLLLLLLDDDDDDDDDDDDDDDDDD, 0", "DDDGGG, 1", "GGSGGS, 1"))
    piece = "KKKKKLLLLLLLLLLLLLLL"
    assert answers(items, "charge") == {piece: "positive", "DDDGGG": "negative", "GGSGGS": "neutral"}
    assert answers(items, "gravy") == {piece: "hydrophobic", "DDDGGG": "hydrophilic", "GGSGGS": "hydrophilic"}
    assert answers(items, "isoelectric") == {piece: "11", "DDDGGG": "4", "GGSGGS": "6"}
    assert not [item for item in items if item.task == "antimicrobial" and item.key == piece]


def test_properties_by_hand() -> None:
    """Kyte-Doolittle: I 4.5, R -4.5, A 1.8; another R and a G turn the sign."""
    items = read(reader("IRA, 1", "IRARG, 1"))
    assert answers(items, "gravy") == {"IRA": "hydrophobic", "IRARG": "hydrophilic"}


@pytest.mark.parametrize(
    ("charge", "word"),
    [(-3.0, "negative"), (-0.5, "negative"), (-0.49, "neutral"), (0.3, "neutral"), (0.5, "positive")],
)
def test_words_for_charge(charge: float, word: str) -> None:
    assert charge_word(charge) == word


def test_nothing_of_reserved_sequences_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from Bio.SeqUtils import ProtParam

    seen = []
    real = ProtParam.ProteinAnalysis
    monkeypatch.setattr(ProtParam, "ProteinAnalysis", lambda sequence: seen.append(sequence) or real(sequence))
    reserved = next(f"{'GLFKW' * 6}{n * 'K'}" for n in range(99) if is_reserved(f"{'GLFKW' * 6}{n * 'K'}"))
    whole = next(f"GLFKW{n * 'K'}" for n in range(14) if is_reserved(f"GLFKW{n * 'K'}"))
    cut = next(f"{'AILMV' * 4}{n * 'K'}" for n in range(99) if not is_reserved(f"{'AILMV' * 4}{n * 'K'}"))
    items = read(reader(f"{reserved}, 1", f"{whole}, 1", "DDDGGG, 0", f"{cut}, 0"))
    assert seen == [key for key in (cut[:20], "DDDGGG") if not is_reserved(key)]
    assert [(item.key, item.text, item.answer) for item in items if item.reserved] == [(whole, "", "")]
    assert whole not in {item.key for item in clean(items)[0]}


def test_relatives_share_a_group_over_all_tasks() -> None:
    items = read(reader("GLFDIVKKVVGALGSLGLFDIVKKAAWW, 1", "GLFDIVKKVVGALGSLGLFD, 0", "RRWWRRWWYY, 1"))
    groups = {item.group for item in items if item.key.startswith("GLF")}
    assert len(groups) == 1
    assert {item.group for item in items} == groups | {"RRWWRRWWYY"}


def test_every_answer_is_one_that_its_task_offers() -> None:
    items = read(reader("KKKLLLLWW, 1", "DDDGGG, 0", "GGSGGS, 0"))
    assert {item.task for item in items} == set(DOMAIN.tasks)
    for item in items:
        task = DOMAIN.tasks[item.task]
        assert item.answer in (task.answers or {str(number) for number in range(15)})
        assert all(answer in wording.casefold() for wording in task.wordings for answer in task.answers)
        assert len(task.wordings) >= 5
        assert all(wording.count("{}") == 1 for wording in task.wordings)


def test_a_missing_biopython_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Bio.SeqUtils.ProtParam", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xloom\[suite\]"'):
        read(reader("DDDGGG, 0"))

import pytest

from xloom.hub.fetch import QM9PACK, Package
from xloom.suite import quantum
from xloom.suite.items import Item, split_of
from xloom.suite.molecules import scaffold
from xloom.suite.reserved import is_reserved

pytest.importorskip("rdkit", reason="needs rdkit, of the extra suite")

COLUMNS = "XYZ_file,Index,SMILES,XYZ_Ang,Dipole_debye,LUMO_au,HOMO_LUMO_gap_au"
ROWS = [  # spelling, dipole, LUMO, gap
    ("C(C)O", "1.5", "0.07", "0.3"),
    ("CCCO", "1.4", "0.08", "0.3"),
    ("CCC#N", "3.8", "0.03", "0.33"),
    ("C(=O)N", "3.7", "0.02", "0.25"),
    ("C=O", "2.2", "-0.04", "0.2"),
    ("CC", "0.", "0.1", "0.43"),
]


def table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = [
        f'"f{n}.xyz",{n},"{smiles}","[[0.1,0.2],[0.3,0.4]]",{dipole},{lumo},{gap}'
        for n, (smiles, dipole, lumo, gap) in enumerate(rows)
    ]
    return "\n".join([COLUMNS, *lines]) + "\n"


def reader(rows: list[tuple[str, str, str, str]]) -> quantum.Read:
    parts = dict(zip(quantum.PARTS, (rows[:2], rows[2:4], rows[4:]), strict=True))

    def read(package: Package, member: str) -> bytes:
        assert package == QM9PACK
        return table(parts[member]).encode()

    return read


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantum, "SAMPLE", 1.0)


def items_of(task: str, rows: list[tuple[str, str, str, str]] = ROWS) -> dict[str, Item]:
    return {item.key: item for item in quantum.read_quantum(reader(rows)) if item.task == task}


def test_gaps_are_in_electronvolts_to_one_decimal_by_canonical_smiles() -> None:
    gaps = items_of("gap")
    assert {key: item.answer for key, item in gaps.items()} == {
        "CCO": "8.2", "CCCO": "8.2", "CCC#N": "9.0", "NC=O": "6.8", "C=O": "5.4", "CC": "11.7"
    }  # fmt: skip
    assert gaps["CCO"].text == "CCO" and gaps["CCO"].other_keys == ("C(C)O",)
    assert gaps["CCO"].group == scaffold("CCO")


def test_the_sign_of_the_lumo() -> None:
    assert {key for key, item in items_of("lumo").items() if item.answer == "negative"} == {"C=O"}


def test_dipoles_are_of_the_outer_thirds() -> None:
    dipoles = {key: item.answer for key, item in items_of("dipole").items()}
    assert dipoles == {"CC": "low", "CCCO": "low", "NC=O": "high", "CCC#N": "high"}


def test_the_values_of_reserved_molecules_are_never_read() -> None:
    reserved = next(key for key in ("C" * n for n in range(3, 99)) if is_reserved(key))
    rows = [*ROWS, (reserved, "not", "a", "number")]
    read = reader(rows)
    items = list(quantum.read_quantum(read))
    assert [item.key for item in items if item.reserved] == [reserved]
    assert all(item.reserved for item in items if item.key == reserved)
    assert [item for item in items if not item.reserved] == list(quantum.read_quantum(reader(ROWS)))
    assert quantum.lookup(read) == quantum.lookup(reader(ROWS))


def test_the_lookup_holds_every_molecule_that_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantum, "split_of", lambda group: "train")
    lookup = quantum.DOMAIN.extra(reader(ROWS))[quantum.LOOKUP]
    designs = items_of("design")
    assert set(designs) == set(lookup) == {"CCO", "CCCO", "CCC#N", "NC=O", "C=O", "CC"}
    for key, item in designs.items():
        assert item.answer == key and item.facts == {"target": lookup[key]} and float(item.text) == lookup[key]
    assert quantum.DOMAIN.tasks["design"].options["table"] == quantum.LOOKUP


def test_a_molecule_listed_twice_counts_with_its_mean() -> None:
    assert quantum.lookup(reader([*ROWS, ("OCC", "1", "0", "0.2")]))["CCO"] == pytest.approx(6.8)


def test_no_target_is_asked_for_in_two_splits() -> None:
    rows = [("C" * (n % 9 + 1) + "O" * (n % 3), "1", "0.1", str(0.15 + n / 1000)) for n in range(200)]
    splits: dict[str, set[str]] = {}
    for item in quantum.read_quantum(reader(rows)):
        if item.task == "design":
            splits.setdefault(item.text, set()).add(split_of(item.group))
    assert len(splits) > 3
    assert all(len(found) == 1 for found in splits.values())


def test_long_molecules_are_not_designed() -> None:
    rows = [("C" * 13, "1", "0.1", "0.3"), ("C" * 12, "1", "0.1", "0.3")]
    assert set(items_of("design", rows)) <= {"C" * 12}


def test_only_a_sample_of_the_table_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantum, "SAMPLE", 0.5)
    rows = [("C" * n, "1", "0.1", "0.3") for n in range(1, 60)]
    expected = {smiles for smiles, *_ in rows if quantum.place(smiles) < 0.5}
    assert 10 < len(expected) < 50
    assert {item.key for item in quantum.read_quantum(reader(rows))} == expected

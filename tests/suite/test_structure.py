import gzip

import pytest

from xloom.hub.fetch import CHEMICALS, QM9PACK, Package
from xloom.suite import physical, quantum, structure
from xloom.suite.items import Item
from xloom.suite.reserved import is_reserved

pytest.importorskip("rdkit", reason="needs rdkit, of the extra suite")

RESERVED = next(key for key in ("C" * n for n in range(3, 22)) if is_reserved(key))
CHEMICAL = {
    "1-1-1": "C1=CC=C2C=CC=CC2=C1",
    "2-2-2": "C(=O)(O)CN",
    "3-3-3": "CCC(=O)CC",
    "4-4-4": RESERVED,
    "5-5-5": "[Na+].[Cl-]",
    "6-6-6": "CCCCO",  # measured
}


def reader(qm9: tuple[str, ...] = ("C1CC1", "CCC#N")) -> structure.Read:
    def read(package: Package, member: str) -> bytes:
        if package == QM9PACK:
            return ("Index,SMILES\n" + "".join(f"1,{smiles}\n" for smiles in qm9)).encode()
        assert package == CHEMICALS
        if member == physical.IDENTIFIERS:
            return "".join(f"1\t{cas}\tX\t1\t{smiles}\tInChI\n" for cas, smiles in CHEMICAL.items()).encode()
        data = b"CAS\n6-6-6\n"
        return gzip.compress(data) if member.endswith(".gz") else data

    return read


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "FROM_CHEMICALS", 1.0)
    monkeypatch.setattr(structure, "SAMPLE", 0.0)
    monkeypatch.setattr(structure, "FROM_QM9", 1.0)


def answers_of(task: str) -> dict[str, str]:
    items = [item for item in structure.read_structure(reader()) if item.task == task and not item.reserved]
    return {item.key: item.answer for item in items}


def test_answers_about_the_molecules_of_both_tables() -> None:
    assert answers_of("rings") == {
        "c1ccc2ccccc2c1": "2", "NCC(=O)O": "0", "CCC(=O)CC": "0", "C1CC1": "1", "CCC#N": "0"
    }  # fmt: skip
    assert answers_of("aromatic")["c1ccc2ccccc2c1"] == "2" and answers_of("aromatic")["C1CC1"] == "0"
    assert answers_of("group") == {"CCC(=O)CC": "ketone", "CCC#N": "nitrile"}
    assert answers_of("elements") == {
        "c1ccc2ccccc2c1": "neither", "NCC(=O)O": "both", "CCC(=O)CC": "oxygen", "C1CC1": "neither", "CCC#N": "nitrogen"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("smiles", "group"),
    [
        ("CC(=O)O", "acid"),
        ("OC(=O)CC(=O)O", "acid"),
        ("CCO", "alcohol"),
        ("OCCO", "alcohol"),
        ("CC=O", "aldehyde"),
        ("CC(=O)NC", "amide"),
        ("O=CN", "amide"),
        ("CCN(C)C", "amine"),
        ("Nc1ccccc1", "amine"),
        ("CC(=O)OC", "ester"),
        ("COC", "ether"),
        ("C1CO1", "ether"),
        ("COc1ccccc1", "ether"),
        ("ClC(Cl)Br", "halide"),
        ("CC(C)=O", "ketone"),
        ("CC#N", "nitrile"),
        # none, or not the only one
        ("CC", ""),
        ("Oc1ccccc1", ""),
        ("NCCO", ""),
        ("CC(=O)Cl", ""),
        ("CC(=O)OC(C)=O", ""),
        ("COC(=O)OC", ""),
        ("NC(=O)OC", ""),
        ("C[N+](=O)[O-]", ""),
        ("c1ccoc1", ""),
        ("c1ccncc1", ""),
        ("CSC", ""),
        ("NC(N)=N", ""),
        ("CC(=O)CC=O", ""),
    ],
)
def test_functional_groups(smiles: str, group: str) -> None:
    assert structure.functional_group(structure.parse(smiles)) == group


@pytest.mark.parametrize(
    ("smiles", "rings", "aromatic"),
    [("CCC", "0", "0"), ("C1CC2CC12", "2", "0"), ("c1ccc(-c2ccccn2)cc1", "2", "2"), ("C1CCc2ccccc2C1", "2", "1")],
)
def test_rings(smiles: str, rings: str, aromatic: str) -> None:
    molecule = structure.parse(smiles)
    assert (structure.rings(molecule), structure.aromatic(molecule)) == (rings, aromatic)


def test_answers_are_among_those_of_the_task() -> None:
    many = reader(("C1C2C3C4C5C1C2C3C45", "c1ccc(-c2ccc(-c3ccccc3)cc2)cc1"))  # too many rings, too many aromatic ones
    items = [item for item in structure.read_structure(many) if not item.reserved]
    assert {item.key for item in items if item.task == "elements"} > {
        item.key for item in items if item.task == "rings"
    }
    assert all(item.answer in structure.TASKS[item.task].answers for item in items)


def test_reserved_molecules_are_marked_once() -> None:
    items: list[Item] = [item for item in structure.read_structure(reader()) if item.key == RESERVED]
    assert [(item.reserved, item.answer) for item in items] == [(True, "")]


def test_molecules_of_the_other_domains_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "SAMPLE", 0.3)
    monkeypatch.setattr(structure, "FROM_QM9", 0.3)
    smiles = tuple("C" * n + "N" for n in range(1, 20))
    keys = {item.key for item in structure.read_structure(reader(smiles))}
    places = {key: quantum.place(key) for key in smiles}
    assert keys & set(smiles) == {key for key, place in places.items() if 0.3 <= place < 0.6} != set()
    assert "CCCCO" not in keys


def test_only_a_share_of_the_chemicals_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "FROM_CHEMICALS", 0.0)
    assert set(answers_of("rings")) == {"C1CC1", "CCC#N"}

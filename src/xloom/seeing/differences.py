"""Do two prompts, domains or heads mix differently? Differences of mean shares, with bootstrap intervals.

Neighbouring tokens are alike, so what is drawn again is texts, or blocks of tokens where there is one text only.
Knows nothing of models. Letters: U units  C columns: the experts, then the base  R resamples
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from xloom.errors import TraceError, TraceMismatchError
from xloom.seeing.intervals import RESAMPLES, Floats, Interval, counts, interval
from xloom.seeing.segments import curve
from xloom.seeing.summary import ALL, BASE, Classes, token_classes
from xloom.trace import Trace

BLOCK = 16  # tokens drawn together
_FEWEST = 8  # blocks of one text, where it has so many tokens


class Differences(NamedTuple):
    """By expert, and for "base": how much larger its mean share is in the others than in the first.

    Attributes:
        paired: whether both are of the same tokens, which were then drawn together.
        units: texts, or blocks of one text, of each side.
    """

    shares: dict[str, Interval]
    paired: bool
    units: tuple[int, int]


def difference(
    first: Trace | Sequence[Trace],
    others: Trace | Sequence[Trace],
    *,
    of: str = ALL,
    classes: Classes = token_classes,
    block: int = BLOCK,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Differences:
    """Mean shares of the others less those of the first, over tokens and sites, with intervals.

    Two heads on the same texts are compared text by text; two prompts, or those of two domains, as they are.

    Args:
        of, classes: the tokens that count, as in `summarise`.
        block: tokens that are drawn together where a side has one text; fewer where it is short.

    Raises:
        TraceMismatchError: other experts. Sites may differ.
        TraceError: a side has no tokens, or one token only.
    """
    sides = [[one] if isinstance(one, Trace) else list(one) for one in (first, others)]
    for trace in sides[0] + sides[1]:
        if trace.experts != sides[0][0].experts:
            raise TraceMismatchError("expected traces of the same experts, found others")
    labels = [[_chosen(trace, of, classes) for trace in side] for side in sides]
    paired = _alike(sides, labels)
    units = [
        _units(side, chosen, block if len(side) == 1 else None) for side, chosen in zip(sides, labels, strict=True)
    ]
    for sums_UC, _ in units:
        if len(sums_UC) < 2:
            raise TraceError(
                f"expected at least two tokens or texts of class {of!r} on each side, found {len(sums_UC)}"
            )
    rng = np.random.default_rng(seed)
    drawn = [counts(len(sums_UC), resamples, rng) for sums_UC, _ in units]
    if paired:
        drawn[1] = drawn[0]
    pairs = list(zip(drawn, units, strict=True))
    means_C = [sums_UC.sum(axis=0) / count_U.sum() for sums_UC, count_U in units]
    means_RC = [(n_RU @ sums_UC) / (n_RU @ count_U)[:, None] for n_RU, (sums_UC, count_U) in pairs]
    value_C, samples_RC = means_C[1] - means_C[0], means_RC[1] - means_RC[0]
    names = (*sides[0][0].experts, BASE)
    found = {name: interval(value_C[at], samples_RC[:, at]) for at, name in enumerate(names)}
    return Differences(found, paired, (len(units[0][0]), len(units[1][0])))


def _chosen(trace: Trace, of: str, classes: Classes) -> torch.Tensor:
    known_T = trace.known
    return known_T if of == ALL else known_T & torch.tensor([label == of for label in classes(trace)])


def _alike(sides: Sequence[Sequence[Trace]], labels: Sequence[Sequence[torch.Tensor]]) -> bool:
    if len(sides[0]) != len(sides[1]):
        return False
    texts = zip(*sides, *labels, strict=True)
    return all(torch.equal(a.tokens.ids, b.tokens.ids) and torch.equal(x, y) for a, b, x, y in texts)


def _units(traces: Sequence[Trace], chosen: Sequence[torch.Tensor], block: int | None) -> tuple[Floats, Floats]:
    """Sums of shares [U, C] and numbers of tokens [U] of the units: texts, or blocks of a text."""
    pieces = [curve(trace)[known_T].numpy() for trace, known_T in zip(traces, chosen, strict=True)]
    if block is not None:
        (piece,) = pieces
        size = max(1, min(block, len(piece) // _FEWEST))
        pieces = [piece[at : at + size] for at in range(0, len(piece), size)]
    pieces = [piece for piece in pieces if len(piece)]
    sums = [piece.sum(axis=0) for piece in pieces]
    return np.array(sums), np.array([len(piece) for piece in pieces], dtype=float)

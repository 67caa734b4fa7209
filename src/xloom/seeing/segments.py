"""How the experts take turns along a text: its curve of shares, cut where it changes.

    minimise  sum over segments of |x_t - mean of its segment|^2  +  penalty for every segment

exactly, by dynamic programming with the pruning of PELT (Killick, Fearnhead and Eckley, arXiv 1101.1438).
Knows nothing of models. Letters: T tokens  C columns: the experts, then the base
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xloom.errors import TraceError
from xloom.seeing.statistics import leaders, shares
from xloom.seeing.summary import BASE
from xloom.trace import Trace

MINIMUM = 4  # tokens of a segment
SMALLEST = 0.1  # change of shares that is worth a segment of `MINIMUM` tokens
_MEDIAN_CHI2 = 0.4549  # of one degree of freedom


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens from `start` to `stop` whose mixing is about the same.

    Attributes:
        leader: the expert with the largest mean share, or "base".
        share_C: mean shares.
    """

    start: int
    stop: int
    leader: str
    share_C: Tensor


def curve(trace: Trace) -> Tensor:
    """Shares of every token, the mean over its sites [T, C] in float64; NaN for tokens without scalings."""
    parts = [shares(block.scalings).mean(dim=1) for block in trace.blocks()]
    return torch.cat(parts) if parts else torch.zeros(0, len(trace.experts) + 1, dtype=torch.float64)


def trajectory(trace: Trace, *, penalty: float | None = None, minimum: int = MINIMUM) -> list[Segment]:
    """The segments of a text, in order: where the mixing changes and who leads in between.

    Neighbours can have the same leader, with more or less of it.

    Args:
        penalty, minimum: as in `change_points`; `default_penalty` without one.

    Raises:
        TraceError: no token with scalings, or a setting out of range.
    """
    curve_TC = curve(trace)
    places = (~curve_TC.isnan().any(dim=1)).nonzero()[:, 0].tolist()
    if not places:
        raise TraceError("expected a trace with scalings, found none")
    known_TC = curve_TC[places]
    if penalty is None:
        penalty = default_penalty(known_TC, minimum)
    bounds = [0, *change_points(known_TC, penalty, minimum), len(places)]
    names = (*trace.experts, BASE)
    found = []
    for start, stop in pairwise(bounds):
        share_C = known_TC[start:stop].mean(dim=0)
        found.append(Segment(places[start], places[stop - 1] + 1, names[int(leaders(share_C))], share_C))
    return found


def change_points(curve_TC: Tensor, penalty: float, minimum: int = 1) -> list[int]:
    """Where segments after the first begin, so that the sum of squares and penalties is the smallest.

    Args:
        curve_TC: without NaN.
        penalty: what a segment costs, in squared shares; 0 cuts wherever something changes.
        minimum: tokens of a segment. A shorter text is one segment.

    Raises:
        TraceError: a setting out of range.
    """
    if not penalty >= 0 or minimum < 1:
        raise TraceError(f"expected a penalty of at least 0 and a minimum of at least 1, found {penalty} and {minimum}")
    T = len(curve_TC)
    sums_TC, squares_T = _cumulative(curve_TC)

    def cost(starts: NDArray[np.int64], stop: int) -> NDArray[np.float64]:
        within = (sums_TC[stop] - sums_TC[starts]) ** 2
        return np.asarray(squares_T[stop] - squares_T[starts] - within.sum(axis=1) / (stop - starts))

    best = np.full(T + 1, np.inf)  # of the first t tokens
    best[0] = -penalty
    last = np.zeros(T + 1, dtype=np.int64)  # where the last segment of the first t tokens begins
    starts = np.zeros(1, dtype=np.int64)
    until = np.full(1, T + 1)  # a start that has lost can still win with segments too short to be cut
    for stop in range(minimum, T + 1):
        ripe = starts <= stop - minimum
        found = best[starts[ripe]] + cost(starts[ripe], stop)
        chosen = int(found.argmin())
        best[stop], last[stop] = found[chosen] + penalty, starts[ripe][chosen]
        lost = np.flatnonzero(ripe)[found > best[stop]]
        until[lost] = np.minimum(until[lost], stop + minimum)
        stays = until > stop + 1
        starts, until = np.append(starts[stays], stop), np.append(until[stays], T + 1)
    points = []
    at = int(last[T])
    while at > 0:
        points.append(at)
        at = int(last[at])
    return points[::-1]


def default_penalty(curve_TC: Tensor, minimum: int = MINIMUM) -> float:
    """Twice the noise times log T, as BIC has it; no less than a change by `SMALLEST` over `minimum` tokens is worth.

    The noise is the variance of what changes from token to token, robustly, so that the changes sought do not count.
    """
    steps = np.diff(curve_TC.double().numpy(), axis=0)
    noise = float((np.median(steps**2, axis=0) / (2 * _MEDIAN_CHI2)).sum()) if len(steps) else 0.0
    return max(2 * noise * math.log(max(len(curve_TC), 2)), minimum * SMALLEST**2)


def _cumulative(curve_TC: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums [T + 1, C] and sums of squares [T + 1] of the first t tokens, about the mean: less rounding."""
    x_TC = curve_TC.double().numpy()
    x_TC = x_TC - x_TC.mean(axis=0) if len(x_TC) else x_TC
    sums_TC = np.concatenate([np.zeros((1, x_TC.shape[1])), x_TC.cumsum(axis=0)])
    squares_T = np.concatenate([[0.0], (x_TC**2).sum(axis=1).cumsum()])
    return sums_TC, squares_T

"""Change points are the best there are, and those that were planted."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from random_traces import EXPERTS, SITES, random_tokens, random_trace
from xloom.errors import TraceError
from xloom.seeing import change_points, curve, default_penalty, statistics, trajectory
from xloom.trace import About, Trace, merge

F64 = torch.float64


def cost(curve_TC: torch.Tensor, points: list[int], penalty: float) -> float:
    bounds = [0, *points, len(curve_TC)]
    parts = [curve_TC[a:b] for a, b in pairwise(bounds)]
    return sum(float(((part - part.mean(dim=0)) ** 2).sum()) + penalty for part in parts)


def slow_best(curve_TC: torch.Tensor, penalty: float, minimum: int) -> float:
    """All ways to cut it, one token after the other."""
    T = len(curve_TC)
    if 2 * minimum > T:
        return cost(curve_TC, [], penalty)
    best = [float("inf")] * (T + 1)
    best[0] = 0.0
    for stop in range(minimum, T + 1):
        for start in [0, *range(minimum, stop - minimum + 1)]:
            if stop - start >= minimum:
                best[stop] = min(best[stop], best[start] + cost(curve_TC[start:stop], [], penalty))
    return best[T]


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(1, 4), st.floats(0, 0.5), st.integers(0, 1000))
def test_no_other_cuts_are_better(T: int, minimum: int, penalty: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(T, 2, generator=generator, dtype=F64) * (torch.rand(T, 1, generator=generator) < 0.4)
    curve_TC = steps.cumsum(dim=0) % 1
    points = change_points(curve_TC, penalty, minimum)
    assert cost(curve_TC, points, penalty) == pytest.approx(slow_best(curve_TC, penalty, minimum))
    bounds = [0, *points, T]
    assert bounds == sorted(set(bounds))
    assert not points or min(b - a for a, b in pairwise(bounds)) >= minimum


def planted(noise: float, seed: int = 0) -> torch.Tensor:
    """400 tokens that change at 60, 64, 200 and 333."""
    generator = torch.Generator().manual_seed(seed)
    levels = [[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]
    lengths = [60, 4, 136, 133, 67]
    whole = torch.cat([torch.tensor(level, dtype=F64).expand(n, -1) for level, n in zip(levels, lengths, strict=True)])
    return whole + noise * torch.randn(whole.shape, generator=generator, dtype=F64)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_planted_changes_are_found(noise: float):
    curve_TC = planted(noise)
    points = change_points(curve_TC, default_penalty(curve_TC), 4)
    assert points == [60, 64, 200, 333]


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_has_no_changes(seed: int):
    generator = torch.Generator().manual_seed(seed)
    curve_TC = 0.5 + 0.1 * torch.randn(500, 3, generator=generator, dtype=F64)
    assert change_points(curve_TC, default_penalty(curve_TC), 4) == []


def test_a_trace_in_segments():
    """Tokens without scalings belong to no segment; places are those of the trace."""
    about = About(SITES, EXPERTS)
    parts = [torch.tensor([0.9, 0.1, 0.0]).expand(10, 6, 3), torch.tensor([0.0, 0.2, 0.2]).expand(12, 6, 3)]
    scalings = torch.cat([torch.full((1, 6, 3), torch.nan), *parts])
    trace = Trace(random_tokens(23), scalings, about)
    found = trajectory(trace)
    assert [(one.start, one.stop, one.leader) for one in found] == [(1, 11, "chem"), (11, 23, "base")]
    torch.testing.assert_close(found[1].share_C, torch.tensor([0, 0.2, 0.2, 0.6], dtype=F64), rtol=0, atol=1e-3)
    twice = trajectory(merge([trace, trace]))
    assert [(one.start, one.stop) for one in twice] == [(1, 11), (11, 23), (24, 34), (34, 46)]
    torch.testing.assert_close(curve(trace)[1:], statistics.shares(trace.scalings[1:]).mean(dim=1))
    assert curve(trace)[0].isnan().all()


def test_what_cannot_be_cut():
    with pytest.raises(TraceError, match="scalings, found none"):
        trajectory(random_trace(1))
    for penalty, minimum in [(-1.0, 1), (float("nan"), 1), (1.0, 0)]:
        with pytest.raises(TraceError, match="penalty of at least 0"):
            change_points(torch.zeros(3, 2), penalty, minimum)
    assert change_points(torch.zeros(0, 2), 0.1, 4) == []
    assert len(trajectory(random_trace(3), minimum=10)) == 1

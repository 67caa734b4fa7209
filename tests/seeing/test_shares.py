"""Statistics against slow direct formulas on random scalings, and on mixtures whose answer is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xloom.seeing import statistics

F64 = torch.float64


@st.composite
def scalings(draw) -> torch.Tensor:
    """[T, S, N]: of a softmax, with a null expert, cut to the largest, of any size, or negative."""
    T, S, N = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    raw = 3 * torch.randn(T, S, N + 1, generator=generator, dtype=F64)
    kind = draw(st.sampled_from(["softmax", "null", "top1", "any", "zero"]))
    if kind == "softmax":
        return raw[..., :N].softmax(dim=-1)
    if kind == "null":
        return raw.softmax(dim=-1)[..., :N]
    if kind == "top1":
        soft = raw[..., :N].softmax(dim=-1)
        return torch.where(soft == soft.max(dim=-1, keepdim=True).values, soft, 0.0)
    return raw[..., :N] if kind == "any" else torch.zeros(T, S, N, dtype=F64)


def slow_shares(weights: list[float]) -> list[float]:
    sizes = [abs(weight) for weight in weights]
    total = sum(sizes)
    left = 1 - total if 1 - total >= statistics.ROUNDING else 0.0
    whole = total + left
    return [size / whole for size in sizes] + [left / whole]


def slow_entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


@settings(max_examples=60)
@given(scalings())
def test_means_are_what_they_say(scalings_TSN):
    T, S, N = scalings_TSN.shape
    found = statistics.means(scalings_TSN)
    cells = [[slow_shares(scalings_TSN[t, s].tolist()) for s in range(S)] for t in range(T)]
    for s in range(S):
        for c in range(N + 1):
            assert found.share_SC[s, c].item() == pytest.approx(sum(cells[t][s][c] for t in range(T)) / T)
            leads = [cells[t][s].index(max(cells[t][s])) == c for t in range(T)]
            assert found.led_SC[s, c].item() == pytest.approx(sum(leads) / T)
        for n in range(N):
            assert found.weight_SN[s, n].item() == pytest.approx(scalings_TSN[:, s, n].mean().item())
        entropies = [slow_entropy(cells[t][s]) for t in range(T)]
        assert found.entropy_S[s].item() == pytest.approx(sum(entropies) / T)
        assert found.effective_S[s].item() == pytest.approx(sum(map(math.exp, entropies)) / T)
    for i in range(N + 1):
        for j in range(N + 1):
            together = sum(cells[t][s][i] * cells[t][s][j] for t in range(T) for s in range(S)) / (T * S)
            assert found.co_use_CC[i, j].item() == pytest.approx(together)
            by_token = [[sum(cells[t][s][c] for s in range(S)) / S for c in range(N + 1)] for t in range(T)]
            within = sum(by_token[t][i] * by_token[t][j] for t in range(T)) / T
            assert found.co_use_tokens_CC[i, j].item() == pytest.approx(within)


@settings(max_examples=60)
@given(scalings(), st.integers(0, 5))
def test_what_always_holds(scalings_TSN, cut: int):
    shares = statistics.shares(scalings_TSN)
    N = scalings_TSN.shape[-1]
    assert torch.all(shares >= 0)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(shares.shape[:-1], dtype=F64))
    number = statistics.effective_number(shares)
    assert torch.all(number >= 1 - 1e-9)
    assert torch.all(number <= N + 1 + 1e-9)
    assert statistics.co_use(shares).sum().item() == pytest.approx(1)
    assert statistics.dominance(shares).sum().item() == pytest.approx(1)
    parts = statistics.together([statistics.means(scalings_TSN[:cut]), statistics.means(scalings_TSN[cut:])])
    for one, other in zip(parts, statistics.means(scalings_TSN), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_what_the_base_has():
    """A softmax leaves nothing; a null expert, or what top-k cut off, is the base's; more than 1 counts as 1."""
    cases = {
        (0.25, 0.75): [0.25, 0.75, 0],
        (0.1, 0.3): [0.1, 0.3, 0.6],
        (0.0, 0.0): [0, 0, 1],
        (1.0, 3.0): [0.25, 0.75, 0],
        (-0.5, 0.25): [0.5, 0.25, 0.25],
    }
    for weights, shares in cases.items():
        torch.testing.assert_close(statistics.shares(torch.tensor(weights)), torch.tensor(shares, dtype=F64))
    soft = torch.randn(500, 7).softmax(dim=-1).half()
    assert (soft.double().sum(dim=-1) != 1).any(), "a test of the test: float16 rounds"
    assert torch.equal(statistics.shares(soft)[:, -1], torch.zeros(500, dtype=F64))


def test_ties_are_not_the_base_s():
    assert statistics.leaders(torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.4, 0.4], [0.2, 0.2, 0.6]])).tolist() == [0, 1, 2]


def test_lift():
    """Two experts that are always mixed with each other, and one that always acts alone."""
    shares = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=F64)
    found = statistics.lift(statistics.co_use(shares))
    assert found[0, 1].item() == pytest.approx(2)
    assert found[2, 2].item() == pytest.approx(2)
    assert found[0, 2].item() == 0
    assert found[3].isnan().all()


def test_groups():
    values = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    found = statistics.mean_by_group(values, torch.tensor([1, 0, 1]), 3)
    assert torch.equal(found[:2], torch.tensor([[2.0, 20], [2.5, 25]]))
    assert found[2].isnan().all()

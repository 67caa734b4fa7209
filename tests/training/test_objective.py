"""The terms of the head's loss against slow, direct formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from xloom.training.objective import (
    IGNORED,
    cross_entropy,
    entropy,
    entropy_per_row,
    imbalance,
    mean_over_tokens,
    posterior,
    routing_losses,
    token_losses,
)

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))


def shares_and_mask(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    mask = torch.randint(0, 2, shape[:2])
    mask[:, -1] = 1  # left padding leaves the last token real
    return torch.softmax(2 * torch.randn(shape, dtype=torch.float64), dim=-1), mask


@given(sizes, st.integers(0, 99))
def test_means_entropies_and_imbalance_leave_padding_out(shape: tuple[int, ...], seed: int) -> None:
    shares, mask = shares_and_mask(shape, seed)
    B, T, S, C = shape
    for b in range(B):
        real = [shares[b, t, s] for t in range(T) if mask[b, t] for s in range(S)]
        torch.testing.assert_close(mean_over_tokens(shares, mask)[b], sum(real) / len(real))
        by_hand = sum(-sum(p * math.log(p) for p in one.tolist()) for one in real) / len(real)
        assert math.isclose(entropy_per_row(shares, mask)[b].item(), by_hand, abs_tol=1e-9)
    everything = [shares[b, t, s] for b in range(B) for t in range(T) if mask[b, t] for s in range(S)]
    mean = (sum(everything) / len(everything)).tolist()
    expected = math.log(C) + sum(p * math.log(p) for p in mean)
    assert math.isclose(imbalance(shares, mask).item(), expected, abs_tol=1e-9)


@given(sizes, st.integers(0, 99))
def test_the_routing_term_counts_rows_and_the_tokens_before_each_answer(shape: tuple[int, ...], seed: int) -> None:
    B, T, S, C = shape
    shares, mask = shares_and_mask((B, T + 1, S, C), seed)
    rows, tokens = torch.rand(B, C, dtype=torch.float64), torch.rand(B, T, C, dtype=torch.float64)
    expected = 0.0
    for b in range(B):
        mean = sum(shares[b, t].mean(dim=0) for t in range(T + 1) if mask[b, t]) / mask[b].sum()
        expected -= (rows[b] * mean.log()).sum()
        for k in range(T):
            expected -= (tokens[b, k] * shares[b, k].mean(dim=0).log()).sum()
    torch.testing.assert_close(routing_losses(shares, mask, rows, tokens), expected)


def test_entropy_of_the_extremes() -> None:
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0.0
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4))
    one_sided = torch.tensor([1.0, 0.0]).expand(2, 3, 1, 2)
    assert imbalance(one_sided, torch.ones(2, 3)).item() == pytest.approx(math.log(2))
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None, None].expand(2, 3, 1, 2)
    assert imbalance(turns, torch.ones(2, 3)).item() == pytest.approx(0.0, abs=1e-6)


@given(sizes, st.integers(0, 99))
def test_cross_entropy_with_soft_targets(shape: tuple[int, ...], seed: int) -> None:
    shares, _ = shares_and_mask(shape, seed)
    targets, _ = shares_and_mask(shape, seed + 1)
    expected = F.cross_entropy(shares.log().flatten(0, 2), targets.flatten(0, 2), reduction="none")
    torch.testing.assert_close(cross_entropy(shares, targets).flatten(), expected)
    no_target = cross_entropy(shares, torch.zeros_like(targets))
    assert not no_target.any()


def test_cross_entropy_of_a_share_of_zero_is_finite_and_teaches() -> None:
    shares = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = cross_entropy(shares, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.isfinite()
    assert shares.grad is not None
    assert shares.grad[0] < -1e3
    assert shares.grad[1] == 0
    smaller = torch.tensor([[1e-6, 1e-7], [1e-9, 1e-12]]).unsqueeze(-1)
    losses = cross_entropy(smaller, torch.ones_like(smaller)).flatten()
    assert losses.isfinite().all()
    assert (losses.diff() > 0).all(), "less is worse, however little there is"


@given(st.floats(1e-5, 1.0))
def test_cross_entropy_is_exact_above_the_smallest_share(share: float) -> None:
    shares = torch.tensor([share], requires_grad=True)
    loss = cross_entropy(shares, torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(shares.item()), rel=1e-6, abs=1e-7)
    assert shares.grad is not None
    assert shares.grad.item() == pytest.approx(-1 / shares.item(), rel=1e-6)


def test_a_head_that_is_sure_and_wrong_turns_round() -> None:
    logits = torch.tensor([0.0, 18.0], requires_grad=True)  # a share of 1.5e-8
    target = torch.tensor([1.0, 0.0])
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(torch.softmax(logits, dim=-1), target).backward()
        optimizer.step()
    assert torch.softmax(logits, dim=-1)[0] > 0.5


def test_posterior_is_bayes() -> None:
    likelihood = torch.tensor([0.5, 0.3, 0.1])
    torch.testing.assert_close(posterior(-likelihood.log()), likelihood / likelihood.sum())
    torch.testing.assert_close(posterior(-likelihood.log(), 0.5), likelihood**2 / (likelihood**2).sum())


def test_token_losses_are_those_of_single_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[IGNORED, 1, 2, 3], [IGNORED, IGNORED, IGNORED, 0]])
    losses = token_losses(logits, labels)
    for b in range(2):
        for k in range(3):
            label = labels[b, k + 1].item()
            expected = 0.0 if label == IGNORED else -torch.log_softmax(logits[b, k], dim=-1)[label].item()
            assert losses[b, k].item() == pytest.approx(expected, abs=1e-6)

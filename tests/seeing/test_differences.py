"""Differences are what was planted; intervals hold them, and are paired where the tokens are the same."""

import pytest
import torch

from random_traces import EXPERTS, SITES, random_tokens, random_trace
from xloom.errors import TraceError, TraceMismatchError
from xloom.seeing import difference, statistics
from xloom.seeing.intervals import bootstrap
from xloom.trace import About, Trace


def drawn(count: int, chem: float, seed: int, *, tokens: int | None = None, spread: float = 0.2) -> Trace:
    """Chem has about so much, mech the rest; what each token has is the same for the same seed, but for `chem`."""
    generator = torch.Generator().manual_seed(seed)
    weight_T = chem + spread * (torch.rand(count, generator=generator) - 0.5)
    scalings_TN = torch.stack([weight_T, 1 - weight_T, torch.zeros(count)], dim=-1)
    scalings_TN[0] = torch.nan
    scalings = scalings_TN[:, None].expand(-1, len(SITES), -1)
    return Trace(random_tokens(count, seed if tokens is None else tokens), scalings, About(SITES, EXPERTS))


def test_two_prompts():
    found = difference(drawn(80, 0.3, seed=1), drawn(120, 0.5, seed=2))
    assert not found.paired
    assert found.units == (9, 9)  # 79 and 119 tokens in blocks of 9 and 14
    value, low, high = found.shares["chem"]
    assert low < 0.2 < high
    assert 0 < high - low < 0.1
    assert found.shares["mech"].value == pytest.approx(-value, abs=1e-3)
    assert found.shares["prot"] == found.shares["base"] == (0, 0, 0)


def test_two_heads_on_the_same_text_are_paired():
    """What a text's tokens have in common is no noise of the difference."""
    first, other = drawn(100, 0.3, seed=1), drawn(100, 0.35, seed=1)
    found = difference(first, other)
    assert found.paired
    assert found.shares["chem"].value == pytest.approx(0.05, abs=1e-3)
    assert found.shares["chem"].high - found.shares["chem"].low < 1e-3
    elsewhere = drawn(100, 0.35, seed=1, tokens=5)
    unpaired = difference(first, elsewhere)
    assert not unpaired.paired
    assert unpaired.shares["chem"].high - unpaired.shares["chem"].low > 1e-2
    same = difference(first, first)
    assert same.shares["chem"] == (0, 0, 0)


def test_texts_are_drawn_where_there_are_several():
    """Texts that differ among themselves make wide intervals, however many tokens they have."""
    near = [drawn(200, 0.4, seed=seed) for seed in range(6)]
    far = [drawn(200, 0.1 + 0.1 * seed, seed=10 + seed) for seed in range(6)]
    wide, narrow = difference(near, far), difference(near, [drawn(200, 0.35, seed=20 + seed) for seed in range(6)])
    assert wide.units == narrow.units == (6, 6)
    assert wide.shares["chem"].high - wide.shares["chem"].low > 0.15
    assert narrow.shares["chem"].high - narrow.shares["chem"].low < 0.02
    means = [statistics.shares(torch.cat([t.scalings[1:] for t in side])).mean(dim=(0, 1)) for side in (near, far)]
    assert wide.shares["chem"].value == pytest.approx(float((means[1] - means[0])[0]))


def test_classes_of_tokens():
    first, other = random_trace(60, seed=1, answer=25), random_trace(60, seed=2, answer=25)
    found = difference(first, other, of="answer")
    chosen = [~trace.tokens.special & trace.tokens.answer for trace in (first, other)]
    means = [statistics.shares(t.scalings[mask]).mean(dim=(0, 1)) for t, mask in zip((first, other), chosen)]
    assert found.shares["mech"].value == pytest.approx(float((means[1] - means[0])[1]))


def test_what_cannot_be_compared():
    with pytest.raises(TraceError, match="class 'all' on each side, found 1"):
        difference(drawn(2, 0.3, seed=1), drawn(9, 0.3, seed=1))
    with pytest.raises(TraceError, match="class 'nonsense'.*found 0"):
        difference(drawn(9, 0.3, seed=1), drawn(9, 0.3, seed=2), of="nonsense")
    other = Trace(random_tokens(4), torch.zeros(4, 6, 2), About(SITES, ("a", "b")))
    with pytest.raises(TraceMismatchError):
        difference(drawn(9, 0.3, seed=1), other)


def test_bootstrap_of_a_mean():
    """The interval of a mean of many is that of the normal distribution."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().numpy()
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap(values) == found, "the same seed"

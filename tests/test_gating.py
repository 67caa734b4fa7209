"""Pooling, head and gate against slow references written here, one token at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from xloom.config import XLoraConfig
from xloom.errors import ConfigError
from xloom.gating import PoolState, ScalingHead, gate, pool, pool_reference, scaling_pass_scalings, top_k_mask

D = 3


def hidden(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- pooling ---


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 300),
    decay=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-3, 0.0]) | st.floats(1e-6, 1.0),
    seed=st.integers(0, 99),
    padding=st.sampled_from(["none", "left", "right", "holes", "all of one row"]),
    cuts=st.lists(st.integers(0, 300), max_size=3),
)
def test_pool_means_its_reference(batch, tokens, decay, seed, padding, cuts):
    """For any shape, decay and padding, at once (also past the 128 tokens done at a time) and cut into pieces."""
    x = hidden(batch, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(batch, tokens, dtype=torch.bool)
    if padding == "left":
        keep = torch.arange(tokens) >= torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    elif padding == "right":
        keep = torch.arange(tokens) < torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    elif padding == "holes":
        keep = torch.rand(batch, tokens, generator=generator) > 0.4
    elif padding == "all of one row":
        keep[-1] = False
    expected = pool_reference(x, keep, decay)
    dirty = x.masked_fill(~keep[..., None], math.nan)  # what a model leaves at padding must not matter

    for edges in ([0, tokens], sorted({0, tokens, *(min(cut, tokens) for cut in cuts)})):
        state, sums, counts = None, [], []
        for start, stop in itertools.pairwise(edges):
            state = pool(dirty[:, start:stop], keep[:, start:stop], decay, state)
            sums.append(state.sums_BTD)
            counts.append(state.counts_BT1)
        torch.testing.assert_close(torch.cat(sums, 1), expected.sums_BTD, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat(counts, 1), expected.counts_BT1, rtol=1e-9, atol=1e-12)


def test_the_reference_by_hand():
    x = torch.tensor([[[1.0], [2.0], [50.0], [4.0]]])
    keep = torch.tensor([[True, True, False, True]])
    state = pool_reference(x, keep, 0.5)
    assert state.sums_BTD.flatten().tolist() == [1.0, 2.5, 2.5, 5.25]
    assert state.counts_BT1.flatten().tolist() == [1.0, 1.5, 1.5, 1.75]


def test_a_running_mean_is_the_mean():
    x = hidden(2, 200, 1)
    mean = pool(x, torch.ones(2, 200, dtype=torch.bool), 1.0).mean_BTD
    torch.testing.assert_close(mean[:, 149], x[:, :150].mean(dim=1))


def test_before_the_first_token_the_mean_is_zero():
    keep = torch.tensor([[False, False, True]])
    mean = pool(hidden(1, 3, 2), keep, 0.9).mean_BTD
    assert torch.equal(mean[:, :2], torch.zeros(1, 2, D, dtype=torch.float64))
    assert mean[:, 2].abs().min() > 0


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_long_texts_in_float32(decay):
    """No drift over 4,096 tokens: the mean stays that of float64."""
    x = hidden(1, 4096, 3) + 5.0
    keep = torch.ones(1, 4096, dtype=torch.bool)
    exact = pool(x, keep, decay).mean_BTD
    torch.testing.assert_close(pool(x.float(), keep, decay).mean_BTD, exact.float(), rtol=1e-5, atol=1e-4)


def test_only_the_last_position_of_the_past_counts():
    x, keep = hidden(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    past = pool(hidden(2, 7, 5), torch.ones(2, 7, dtype=torch.bool), 0.8)
    last = PoolState(past.sums_BTD[:, -1:], past.counts_BT1[:, -1:])
    for whole, short in zip(pool(x, keep, 0.8, past), pool(x, keep, 0.8, last), strict=True):
        assert torch.equal(whole, short)


# --- the head ---


def head(depth: int, *, layerwise: bool, sites: int = 2, experts: int = 3, **fields) -> ScalingHead:
    config = XLoraConfig(
        experts=[f"e{i}" for i in range(experts)], sites=[f"s{i}" for i in range(sites)], xlora_depth=depth,
        xlora_size=5, layerwise_scalings=layerwise, **fields,
    )  # fmt: skip
    torch.manual_seed(depth)
    return ScalingHead(config, D, torch.float64).eval()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_head_in_closed_form(depth, layerwise, relu, use_bias):
    made = head(depth, layerwise=layerwise, enable_relu_and_dropout=relu, use_bias=use_bias)
    x = hidden(2, 4, 9)
    state = made.state_dict()
    assert set(state) == {f"layers.{i}.{part}" for i in range(depth) for part in ("weight", "bias")[: 1 + use_bias]}
    widths = [D, 5, 5][:depth] + [6 if layerwise else 3]
    assert [tuple(state[f"layers.{i}.weight"].shape) for i in range(depth)] == [
        (o, i) for i, o in itertools.pairwise(widths)
    ]
    expected = torch.empty(2, 4, 2, 3, dtype=torch.float64)
    for b, t in itertools.product(range(2), range(4)):
        z = x[b, t]
        for i in range(depth):
            z = state[f"layers.{i}.weight"] @ z + (state[f"layers.{i}.bias"] if use_bias else 0)
            if relu and i < depth - 1:
                z = torch.where(z > 0, z, torch.zeros_like(z))
        for site, expert in itertools.product(range(2), range(3)):
            expected[b, t, site, expert] = z[site * 3 + expert] if layerwise else z[expert]
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_only_in_training_and_only_between():
    made = head(2, layerwise=False, xlora_dropout_p=0.5)
    x = hidden(1, 50, 1)
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))
    one = head(1, layerwise=False, xlora_dropout_p=0.5).train()
    assert torch.equal(one(x), one(x))


def test_null_expert_is_one_more_column():
    made = head(1, layerwise=True, null_expert=True)
    assert made(hidden(1, 2, 0)).shape == (1, 2, 2, 4)


def test_standardisation():
    made = head(1, layerwise=False, head_input=["token", "running_mean"])
    x, keep = hidden(1, 6, 2), torch.ones(1, 6, dtype=torch.bool)
    assert {"input_mean", "input_std"} <= set(made.state_dict())
    plain, _ = made.features(x, keep, [None])
    torch.testing.assert_close(plain[..., :D], x)
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, 4.0])
    made.set_statistics(mean, std)
    features, states = made.features(x, keep, [None])
    z = (x - mean) / std.clamp(min=1e-6)
    torch.testing.assert_close(features[..., :D], z)
    torch.testing.assert_close(features[:, 3, D:], z[:, :4].mean(dim=1))
    assert len(states) == 1
    assert features.isfinite().all(), "a channel that never moves has std 0"


def test_the_paper_does_not_standardise():
    made = head(1, layerwise=False)
    assert set(made.state_dict()) == {"layers.0.weight", "layers.0.bias"}
    with pytest.raises(ConfigError, match="nothing to standardise"):
        made.set_statistics(torch.zeros(D), torch.ones(D))


def test_pooled_features_keep_their_order_and_their_pasts():
    made = head(1, layerwise=False, head_input=["ema:2", "token", "running_mean"])
    x, keep = hidden(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    whole, states = made.features(x, keep, [None, None])
    assert whole.shape == (2, 7, 3 * D)
    torch.testing.assert_close(whole[..., :D], pool_reference(x, keep, 2**-0.5).mean_BTD)
    torch.testing.assert_close(whole[..., D : 2 * D], x)
    torch.testing.assert_close(whole[..., 2 * D :], pool_reference(x, keep, 1.0).mean_BTD)
    first, past = made.features(x[:, :3], keep[:, :3], [None, None])
    second, _ = made.features(x[:, 3:], keep[:, 3:], list(past))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert len(states) == 2


# --- the gate ---


def gate_reference(
    logits: list[float], config: XLoraConfig, allowed: list[bool] | None, bias: list[float] | None
) -> list[float]:
    """One token, in plain Python: the words of the docstring, one after the other."""
    count = len(logits) - config.null_expert
    values = [v + (bias[i] if bias and i < count else 0.0) for i, v in enumerate(logits)]
    kept = [i for i in range(len(values)) if i >= count or allowed is None or allowed[i]]

    def softmax(weights: dict[int, float], temperature: float) -> dict[int, float]:
        top = max(weights.values())
        powers = {i: math.exp((w - top) / temperature) for i, w in weights.items()}
        return {i: p / sum(powers.values()) for i, p in powers.items()}

    weights = {i: values[i] for i in kept}
    if config.enable_softmax:
        weights = softmax(weights, config.softmax_temperature)
    if config.top_k_lora is not None:
        best = sorted(weights, key=lambda i: -weights[i])[: config.top_k_lora]
        weights = {i: weights[i] for i in best}
    if config.enable_softmax_topk:
        weights = softmax(weights, 1.0)
    return [weights.get(i, 0.0) for i in range(count)]


def combinations() -> list[dict]:
    found = []
    for softmax, k, topk, null, temperature in itertools.product(
        (True, False), (None, 1, 2, 3), (True, False), (True, False), (1.0, 0.3)
    ):
        fields = {
            "enable_softmax": softmax, "top_k_lora": k, "enable_softmax_topk": topk, "null_expert": null,
            "softmax_temperature": temperature,
        }  # fmt: skip
        try:
            XLoraConfig(experts=["a", "b", "c"], **fields)
        except ConfigError:
            continue
        found.append(fields)
    return found


MASKS = [None, [True, False, True], [False, False, True], [True, True, True]]


@pytest.mark.parametrize("fields", combinations(), ids=str)
def test_gate_means_its_reference(fields):
    config = XLoraConfig(experts=["a", "b", "c"], **fields)
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2, 3, 2, 3 + config.null_expert, dtype=torch.float64, generator=generator)
    for allowed, bias in itertools.product(MASKS, (None, [0.5, -1.0, 4.0])):
        found = gate(
            logits, config,
            allowed_N=None if allowed is None else torch.tensor(allowed),
            bias_N=None if bias is None else torch.tensor(bias, dtype=torch.float64),
        )  # fmt: skip
        assert found.shape == (2, 3, 2, 3)
        for index in itertools.product(range(2), range(3), range(2)):
            expected = gate_reference(logits[index].tolist(), config, allowed, bias)
            assert found[index].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_there_are_combinations_to_try():
    assert len(combinations()) > 30


@given(
    logits=st.lists(st.floats(-50, 50), min_size=3, max_size=3),
    fields=st.sampled_from([f for f in combinations() if not f["null_expert"]]),
    mask=st.sampled_from([m for m in itertools.product([True, False], repeat=3) if any(m)]),
)
def test_masks_renormalise_and_leave_no_nan(logits, fields, mask):
    config = XLoraConfig(experts=["a", "b", "c"], **fields)
    scalings = gate(torch.tensor([logits], dtype=torch.float64), config, allowed_N=torch.tensor(mask))
    assert scalings.isfinite().all()
    assert (scalings[0][~torch.tensor(mask)] == 0).all()
    if config.enable_softmax_topk or (config.enable_softmax and config.top_k_lora is None):
        assert scalings.sum().item() == pytest.approx(1.0)


@given(k=st.integers(1, 4), values=st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4))
def test_ties_let_no_more_than_k_through(k, values):
    weights = torch.tensor(values)
    mask = top_k_mask(weights, k)
    assert mask.sum() == k
    assert sorted(weights[mask].tolist()) == sorted(values)[-k:]


def test_equal_logits_with_top_k():
    config = XLoraConfig(experts=["a", "b", "c", "d"], top_k_lora=2)
    scalings = gate(torch.zeros(3, 4), config)
    assert (scalings > 0).sum(dim=-1).tolist() == [2, 2, 2]
    assert scalings.sum(dim=-1).tolist() == [0.5] * 3, "top-k does not renormalise"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_zero_init_with_a_softmax_of_the_kept(k):
    """PEFT drops a kept weight that is exactly 0, and so gives nothing at all here; the selection goes by index."""
    made = head(2, layerwise=True, enable_softmax=False, enable_softmax_topk=True, top_k_lora=k)
    made.zero_init_()
    config = XLoraConfig(experts=["e0", "e1", "e2"], enable_softmax=False, enable_softmax_topk=True, top_k_lora=k)
    scalings = gate(made(hidden(1, 4, 0)), config)
    values = torch.sort(scalings, dim=-1, descending=True).values
    torch.testing.assert_close(values[..., :k], torch.full_like(values[..., :k], 1 / k))
    assert (values[..., k:] == 0).all()


def test_zero_init_gives_equal_scalings():
    made = head(3, layerwise=True, null_expert=True)
    made.zero_init_()
    config = XLoraConfig(experts=["e0", "e1", "e2"], null_expert=True)
    torch.testing.assert_close(gate(made(hidden(1, 4, 0)), config), torch.full((1, 4, 2, 3), 0.25, dtype=torch.float64))


def test_the_temperature_acts_on_the_first_softmax_only():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    hot = XLoraConfig(experts=["a", "b", "c"], softmax_temperature=0.5)
    torch.testing.assert_close(gate(logits, hot), F.softmax(2 * logits, dim=-1))
    off = XLoraConfig(experts=["a", "b", "c"], softmax_temperature=0.5, enable_softmax=False)
    assert torch.equal(gate(logits, off), logits)


def test_gradients_reach_the_logits():
    config = XLoraConfig(experts=["a", "b", "c"], top_k_lora=2, enable_softmax_topk=True, null_expert=True)
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda z: gate(z, config, allowed_N=allowed), logits)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"scaling_pass_value": 0}, None),
        ({"scaling_pass_value": 0.5}, [0.5, 0.5, 0.5]),
        ({"scaling_pass_value": None}, [1 / 3] * 3),
        ({"scaling_pass_value": 0.5, "top_k_lora": 2}, [0.5, 0.5, 0.0]),
        ({"scaling_pass_value": 0.5, "top_k_lora": 2, "enable_softmax_topk": True}, [0.5, 0.5, 0.0]),
        ({"scaling_pass_value": -2.0, "top_k_lora": 1, "enable_softmax_topk": True}, [1.0, 0.0, 0.0]),
    ],
)
def test_scaling_pass(fields, expected):
    """PEFT's top-k acts on the constant of the scaling pass too; which of the equal ones it keeps is torch's choice."""
    found = scaling_pass_scalings(XLoraConfig(experts=["a", "b", "c"], **fields), torch.zeros(1, dtype=torch.float64))
    if expected is None:
        assert found is None
    else:
        assert sorted(found.tolist()) == pytest.approx(sorted(expected))

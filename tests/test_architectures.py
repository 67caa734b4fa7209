"""Every architecture: cached, batched, cropped and drafted decoding give what the uncached model gives."""

import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from tiny import ARCHITECTURES, make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.architecture import VERIFIED

# Eager attention there fills masks with the smallest float64 and then takes a softmax in float32: NaN at padding.
FLOAT32 = {"bloom", "gemma2"}
NEW = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind in FLOAT32 else torch.float64


def tolerance(kind: str) -> float:
    # rotary angles are computed in float32 everywhere
    return 2e-4 if kind in FLOAT32 else 1e-5


def mixed(kind: str, tmp_path, **fields) -> XLoraForCausalLM:
    base = tiny_base(kind, dtype_of(kind))
    # PEFT adapts the fused experts of a mixture-of-experts model as bare parameters, which xloom refuses.
    targets = ATTENTION if kind in {"mixtral", "qwen3_moe"} else "all-linear"
    experts = {
        "a": make_expert(base, tmp_path / "a", 0, r=3, target_modules=targets),
        "b": make_expert(base, tmp_path / "b", 1, r=2, target_modules=targets),
    }
    torch.manual_seed(5)
    model = XLoraForCausalLM.from_experts(base, experts, **({"layerwise_scalings": True} | fields))
    with torch.no_grad():  # decided opinions, so that a wrong hidden state shows
        for parameter in model.head.parameters():
            parameter.mul_(3)
    return model


def greedy_uncached(model: XLoraForCausalLM, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    for _ in range(new):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def test_the_list_is_what_the_model_trusts():
    assert set(ARCHITECTURES) == VERIFIED


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_two_stacks(kind: str, tmp_path):
    model = mixed(kind, tmp_path, head_input=["token", "ema:4"])
    ids = prompt(2, 9)
    whole = model(ids, use_cache=False)

    pieces, cache, start = [], None, 0
    for stop in (4, 5, 9):  # windows are 6 tokens long: the last piece reaches past one
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        pieces.append(out)
        cache, start = out.past_key_values, stop
    torch.testing.assert_close(torch.cat([p.logits for p in pieces], 1), whole.logits, rtol=0, atol=tolerance(kind))
    torch.testing.assert_close(torch.cat([p.scalings for p in pieces], 1), whole.scalings, rtol=0, atol=tolerance(kind))

    with model.routing(routers.BaseOnly()):
        assert torch.equal(model(ids).logits, tiny_base(kind, dtype_of(kind))(ids).logits)
    assert (whole.logits - tiny_base(kind, dtype_of(kind))(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_generate(kind: str, tmp_path):
    model = mixed(kind, tmp_path, head_input=["token", "running_mean"])
    one = prompt(1, 9)
    expected = greedy_uncached(model, one)
    plain = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(one, **plain), expected)
    assert torch.equal(model.generate(one, use_cache=False, **plain), expected)
    assert torch.equal(model.generate(one, cache_implementation="static", **plain), expected)
    assert torch.equal(model.generate(one, prompt_lookup_num_tokens=3, **plain), expected)
    embeds = model.get_input_embeddings()(one)
    if kind not in {"gemma3_text"}:  # its embedding module multiplies; generate then feeds ids
        assert torch.equal(model.generate(inputs_embeds=embeds, **plain), expected[:, 9:])

    batch = prompt(3, 7, seed=4)
    rows = torch.cat([greedy_uncached(model, row[None, start:])[:, -NEW:] for row, start in zip(batch, (0, 2, 4))])
    padded, mask = batch.clone(), torch.ones_like(batch)
    for row, start in enumerate((0, 2, 4)):
        padded[row, :start] = 0
        mask[row, :start] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **plain)[:, -NEW:], rows)

    for options in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 10},
    ):
        answers = []
        for use_cache in (True, False):
            torch.manual_seed(11)
            answers.append(model.generate(one, max_new_tokens=NEW, use_cache=use_cache, **options))
        assert torch.equal(*answers)
        assert len({tuple(row.tolist()) for row in answers[0]}) > 1


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_cropping_leaves_no_trace(kind: str, tmp_path):
    model = mixed(kind, tmp_path, head_input="ema:3")
    ids = prompt(1, 12)
    straight = model(ids[:, :9], use_cache=True)
    expected = model(ids[:, 9:], past_key_values=straight.past_key_values, use_cache=True)

    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    cache.crop(0)
    model(prompt(1, 4, seed=9), past_key_values=cache, use_cache=True)
    cache.crop(-4)
    again = model(ids[:, 9:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again.logits, expected.logits, rtol=0, atol=tolerance(kind))
    torch.testing.assert_close(again.scalings, expected.scalings, rtol=0, atol=tolerance(kind))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_early_gate_is_one_pass(kind: str, tmp_path):
    model = mixed(kind, tmp_path, gate_at_layer=1, head_input="running_mean", drop_sites_below_gate=True)
    ids = prompt(1, 9)
    expected = greedy_uncached(model, ids)
    for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **options), expected)
    with model.routing(routers.BaseOnly()):
        assert torch.equal(model(ids).logits, tiny_base(kind, dtype_of(kind))(ids).logits)


@torch.no_grad()
def test_early_gate_reads_what_enters_its_layer(tmp_path):
    model = mixed("llama", tmp_path, gate_at_layer=2, drop_sites_below_gate=True)
    ids = prompt(2, 6)
    base: PreTrainedModel = tiny_base("llama", torch.float64)
    entering = base(ids, output_hidden_states=True).hidden_states[2]
    expected = torch.softmax(model.head(entering), dim=-1)
    torch.testing.assert_close(model(ids).scalings, expected, rtol=0, atol=1e-12)
    assert all(".layers.2." in site for site in model.sites)


def test_streaming(tmp_path):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"<{int(i)}>" for i in ids)

    model = mixed("llama", tmp_path)
    ids = prompt(1, 5)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=30)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer) == Words().decode(out[0, 5:])

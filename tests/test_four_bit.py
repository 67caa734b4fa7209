"""Bases in bitsandbytes' 4 bits: the same on processors with and without AVX512-BF16, where it would repack weights."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from tiny import make_experts, prompt, tiny_base
from xloom import XLoraForCausalLM, routers

modules = pytest.importorskip("bitsandbytes.nn.modules", reason="needs bitsandbytes: pip install 'xloom[quantised]'")

SIZES = {"narrower than a block": {}, "of whole blocks": {"hidden_size": 64, "intermediate_size": 128}}


@pytest.fixture(params=[True, False], ids=["avx512_bf16", "without"])
def processor(request, monkeypatch) -> bool:
    """The repacking itself is plain torch: it can be asked for anywhere."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: request.param)
    return request.param


@pytest.fixture(params=SIZES)
def folders(request, tmp_path):
    base = tiny_base("llama", **SIZES[request.param])
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base", make_experts(base, tmp_path)


def loaded(folders) -> XLoraForCausalLM:
    base, experts = folders
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    torch.manual_seed(0)
    return XLoraForCausalLM.from_experts(base, experts, layerwise_scalings=True, quantization_config=four)


def test_a_forward_leaves_weights_as_they_are_stored(processor, folders):
    model = loaded(folders)
    quantised = [site.base for site in model.mixture.sites if isinstance(site.base, modules.Linear4bit)]
    assert len(quantised) > 10
    before = [(module.weight.data.clone(), module.weight.quant_state.dtype) for module in quantised]
    with torch.no_grad():
        model(prompt(2, 5))
        model.generate(prompt(1, 5), max_new_tokens=3, do_sample=False)
    for module, (weight, dtype) in zip(quantised, before, strict=True):
        assert torch.equal(module.weight.data, weight)
        assert module.weight.quant_state.dtype == dtype


def test_it_is_what_its_weights_say(processor, folders):
    """Against a base that holds the very numbers that 4 bits stand for."""
    model = loaded(folders)
    plain = tiny_base("llama", **{k: getattr(model.base.config, k) for k in ("hidden_size", "intermediate_size")})
    dense = dict(plain.named_modules())
    for name, module in model.plain_base().named_modules():
        if isinstance(module, modules.Linear4bit):
            with torch.no_grad():
                dense[name].weight.copy_(module(torch.eye(module.in_features)).T)
    expected = XLoraForCausalLM.from_experts(plain, folders[1], layerwise_scalings=True)
    expected.head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        found = model(prompt(2, 6))
        torch.testing.assert_close(found.logits, expected(prompt(2, 6)).logits, rtol=1e-3, atol=1e-3)


def test_gradients_come_through_after_a_forward_without(processor, folders):
    model, ids = loaded(folders), prompt(1, 6)
    with torch.no_grad():
        model(ids)
    model(ids, labels=ids, use_cache=False).loss.backward()
    gradient = model.head.linears[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_router_reads_the_base_beside(processor, folders):
    """DoRA and centroids ask for the dense weight and for hidden states; the weights stay all the same."""
    model = loaded(folders)
    prompts = {name: [prompt(1, 5, i)[0]] for i, name in enumerate(model.experts)}
    ids = prompt(1, 6)
    centroid = routers.Centroid.fit(model, prompts)
    with torch.no_grad():
        before = model(ids).logits
        weights = centroid.weights(model, ids)
        assert weights.sum().item() == pytest.approx(1.0)
        assert torch.equal(model(ids).logits, before)

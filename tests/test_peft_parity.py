"""Ours equals PEFT's X-LoRA in memory: same base, same experts, head copied, float32."""

import copy
import warnings

import pytest
import torch
from peft import XLoraConfig as PeftXLoraConfig
from peft import get_peft_model

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM

OPTIONS = {
    "as it comes": {},
    "layerwise": {"layerwise_scalings": True},
    "depth 2": {"xlora_depth": 2, "xlora_size": 24, "layerwise_scalings": True},
    "depth 3": {"xlora_depth": 3, "xlora_size": 24},
    "depth 3, no dropout": {"xlora_depth": 3, "xlora_size": 24, "xlora_dropout_p": 0.0, "layerwise_scalings": True},
    "top-1": {"top_k_lora": 1, "layerwise_scalings": True},
    "top-2": {"top_k_lora": 2, "layerwise_scalings": True},
    "softmax of the top 2": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "both softmaxes": {"top_k_lora": 2, "enable_softmax_topk": True, "layerwise_scalings": True},
    "no softmax": {"enable_softmax": False, "layerwise_scalings": True},
    "temperature": {"softmax_temperature": 0.3, "layerwise_scalings": True},
    # a value that float32 holds exactly: PEFT rounds it to float32 on the way
    "scaling pass 0.375": {"scaling_pass_value": 0.375, "layerwise_scalings": True},
    "scaling pass 0.375, top-2": {"scaling_pass_value": 0.375, "top_k_lora": 2},
    "scaling pass 0.375, softmax of the top 2": {
        "scaling_pass_value": 0.375, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
    },
    "global weight": {"global_scaling_weight": 1.7, "layerwise_scalings": True},
    "global weight in the scaling pass": {"global_scaling_weight": 0.6, "scaling_pass_value": 0.5},
}  # fmt: skip
EXPERTS = {
    "equal": [{"r": 4, "target_modules": ["q_proj", "v_proj"]}] * 3,
    "mixed ranks and targets": [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
        {"r": 3, "target_modules": r".*layers\.[02]\..*down_proj", "use_rslora": True},
    ],
    "patterns": [
        {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}},
        {"r": 2, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 7}, "layers_to_transform": [1]},
        {"r": 2, "target_modules": ["k_proj"], "use_rslora": True, "rank_pattern": {r".*\.2\..*": 6}},
    ],
    "embeddings": [
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 2, "target_modules": ["embed_tokens"]},
        {"r": 3, "target_modules": ["v_proj"]},
    ],
}


def pair(
    kind: str, experts: list[dict], tmp_path, dtype=torch.float32, **options
) -> tuple[torch.nn.Module, XLoraForCausalLM]:
    """PEFT's model and ours, with the same weights."""
    base = tiny_base(kind, dtype, spread=0.15)
    tmp_path = tmp_path / str(dtype)
    paths = [make_expert(base, tmp_path / str(i), i, scale=0.2, **lora) for i, lora in enumerate(experts)]
    config = PeftXLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={str(i): p for i, p in enumerate(paths)}, **options
    )
    theirs_base = copy.deepcopy(base)
    theirs_base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(theirs_base, config).eval().to(dtype)
    ours = XLoraForCausalLM.from_experts(base, {f"expert{i}": p for i, p in enumerate(paths)}, **options)
    classifier = theirs.base_model.internal_xlora_classifier
    linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for mine, layer in zip(ours.head.linears, linears, strict=True):
            layer.weight.mul_(4)  # opinions that differ from token to token
            mine.weight.copy_(layer.weight)
            mine.bias.copy_(layer.bias)
    return theirs, ours


@torch.no_grad()
def assert_same(kind: str, experts: list[dict], tmp_path, **options) -> None:
    """To 1e-5 in float32, and to 1e-10 in float64, where rounding hides nothing."""
    ids = prompt(2, 9)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        theirs, ours = pair(kind, experts, tmp_path, dtype, **options)
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=atol)
        # a test of the test: the mixture changes what the base says
        assert (ours.base(ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, tmp_path):
    assert_same("llama", EXPERTS["mixed ranks and targets"], tmp_path, **OPTIONS[name])


@pytest.mark.parametrize("name", EXPERTS)
def test_every_kind_of_expert(name: str, tmp_path):
    assert_same("llama", EXPERTS[name], tmp_path, layerwise_scalings=True)


def test_scaled_embeddings(tmp_path):
    assert_same("gemma3_text", EXPERTS["embeddings"], tmp_path, layerwise_scalings=True)


def test_order_of_registration(tmp_path):
    """OPT registers k, v, q but runs q first: sites are numbered as registered."""
    experts = [{"r": 2, "target_modules": ["q_proj", "k_proj"]}, {"r": 3, "target_modules": ["v_proj"]}]
    assert_same("opt", experts, tmp_path, layerwise_scalings=True)
    _, ours = pair("opt", experts, tmp_path, layerwise_scalings=True)
    assert [site.rpartition(".")[2] for site in ours.sites[:3]] == ["k_proj", "v_proj", "q_proj"]


@torch.no_grad()
def test_scalings_and_greedy_text(tmp_path):
    theirs, ours = pair("llama", EXPERTS["mixed ranks and targets"], tmp_path, layerwise_scalings=True)
    ids = prompt(1, 6)
    theirs(input_ids=ids)
    latest = theirs.base_model.get_latest_scalings()
    torch.testing.assert_close(ours(ids).scalings, latest, rtol=0, atol=1e-6)
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_gradients_of_the_head(tmp_path):
    theirs, ours = pair("llama", EXPERTS["mixed ranks and targets"], tmp_path, torch.float64, layerwise_scalings=True)
    ids = prompt(2, 9)
    theirs(input_ids=ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    linears = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    for mine, layer in zip(ours.head.linears, linears, strict=True):
        assert layer.weight.grad.abs().max() > 1e-6
        torch.testing.assert_close(mine.weight.grad, layer.weight.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(mine.bias.grad, layer.bias.grad, rtol=1e-8, atol=1e-12)

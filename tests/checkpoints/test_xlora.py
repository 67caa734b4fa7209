"""The original xlora package's folders, key for key as reference.md D1 has them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import assert_same, made, refused

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM
from xloom.errors import (
    CheckpointError,
    ConfigError,
    MissingTensorsError,
    NotExportableError,
    NotFoundError,
    PickleError,
    TruncatedFileError,
    XLoomError,
)

# hidden_size, base_model_id, adapters, and the dataclass fields of xLoRAConfig less `device`
JSON_KEYS = {
    "hidden_size", "base_model_id", "adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings",
    "xlora_depth", "xlora_size", "enable_relu_and_dropout", "use_bias", "xlora_dropout_p", "use_trainable_adapters",
    "softmax_temperature", "top_k_lora", "scaling_pass_value", "global_scaling_weight",
}  # fmt: skip


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_keys_and_json(tmp_path, depth, relu, use_bias):
    model = made(tmp_path, xlora_depth=depth, enable_relu_and_dropout=relu, use_bias=use_bias)
    model.save_pretrained(tmp_path / "one", format="xlora")
    parts = ("weight", "bias") if use_bias else ("weight",)
    places = [f"inner.{i * (3 if relu else 1)}" for i in range(depth - 1)] + ["last"]
    head = load_file(tmp_path / "one" / "xlora_classifier.safetensors")
    assert sorted(head) == sorted(f"{place}.{part}" for place in places for part in parts)
    for place, linear in zip(places, model.head.linears, strict=True):
        assert torch.equal(head[f"{place}.weight"], linear.weight)
    raw = json.loads((tmp_path / "one" / "xlora_config.json").read_text())
    assert set(raw) == JSON_KEYS
    assert raw["adapters"] == ["chem", "mech", "prot"]
    assert raw["hidden_size"] == 32
    assert raw["base_model_id"] == str(tmp_path / "base")
    assert raw["xlora_depth"] == depth
    assert raw["use_bias"] is use_bias
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "chem", "mech", "prot", "xlora_classifier.safetensors", "xlora_config.json",
    ]  # fmt: skip
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


@pytest.mark.parametrize(
    "fields",
    [{"layerwise_scalings": False, "xlora_depth": 2}, {"top_k_lora": 2}, {"scaling_pass_value": None},
     {"softmax_temperature": 0.3, "global_scaling_weight": 0.7, "scaling_pass_value": 0.25}, {"enable_softmax": False}],
    ids=str,
)  # fmt: skip
def test_round_trip(tmp_path, fields):
    model = made(tmp_path, **fields)
    model.save_pretrained(tmp_path / "one", format="xlora")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


def test_round_trip_of_trained_experts(tmp_path):
    model = made(tmp_path, use_trainable_adapters=True, xlora_depth=2)
    with torch.no_grad():
        for site in model.mixture.sites:
            site.A_RI *= 1.5
    model.save_pretrained(tmp_path / "one", format="xlora")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


# --- as it was released ---


@pytest.fixture
def saved(tmp_path) -> Path:
    made(tmp_path, xlora_depth=2).save_pretrained(tmp_path / "one", format="xlora")
    return tmp_path / "one"


def edit(folder: Path, **changes) -> None:
    path = folder / "xlora_config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"}))


def test_a_released_config(saved):
    """The published checkpoints hold the mapping name -> path of training time, and a device."""
    expected = XLoraForCausalLM.from_pretrained(saved)
    edit(saved, adapters={name: f"/home/someone/{name}/" for name in ("chem", "mech", "prot")}, device="cuda:0")
    assert_same(expected, XLoraForCausalLM.from_pretrained(saved))


def test_defaults_are_those_of_xlora(saved, tmp_path):
    """An older file may lack fields: their defaults are xlora's, not ours."""
    model = XLoraForCausalLM.from_pretrained(saved)
    for field in ("enable_relu_and_dropout", "use_bias", "xlora_dropout_p", "enable_softmax", "softmax_temperature"):
        edit(saved, **{field: "gone"})
    assert_same(model, XLoraForCausalLM.from_pretrained(saved))
    edit(saved, xlora_depth="gone", xlora_size="gone")
    refused(saved, CheckpointError, "inner.0.weight")


def test_an_adapter_called_default(saved):
    """PEFT saves that one into the folder itself."""
    expected = XLoraForCausalLM.from_pretrained(saved)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(saved / "chem" / name, saved / name)
    (saved / "chem").rmdir()
    edit(saved, adapters=["default", "mech", "prot"])
    found = XLoraForCausalLM.from_pretrained(saved)
    assert found.experts == ("default", "mech", "prot")
    with torch.no_grad():
        assert torch.equal(found(prompt(1, 5)).logits, expected(prompt(1, 5)).logits)


# --- what the format cannot hold ---


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"null_expert": True}, "null_expert"),
        ({"head_input": ["token", "ema"]}, "head_input"),
        ({"gate_at_layer": 1, "drop_sites_below_gate": True}, "gate_at_layer=1"),
        ({"top_k_lora": 2, "enable_softmax_topk": True}, "enable_softmax_topk"),
    ],
)
def test_fields_that_xlora_does_not_have(tmp_path, fields, word):
    model = made(tmp_path, **fields)
    with pytest.raises(NotExportableError, match="'xlora'") as caught:
        model.save_pretrained(tmp_path / "one", format="xlora")
    assert word in str(caught.value)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("kind", "lora", "word"),
    [
        ("llama", {"use_dora": True, "target_modules": ["q_proj"]}, "DoRA"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
        # the scalings multiply the input there, so the bias of lora_B is added in full
        ("opt", {"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
    ],
)
def test_experts_that_xlora_computes_differently(tmp_path, kind, lora, word):
    path = make_expert(tiny_base(kind), tmp_path / "e", r=2, **lora)
    model = made(tmp_path, kind=kind, experts={"a": path})
    with pytest.raises(NotExportableError, match=word):
        model.save_pretrained(tmp_path / "one", format="xlora")


@pytest.mark.parametrize("name", ["xlora_config.json", "xlora_classifier.safetensors"])
def test_an_expert_named_like_a_file(tmp_path, name):
    """Experts are folders beside these files here."""
    path = make_expert(tiny_base("llama"), tmp_path / "e", r=2, target_modules=["q_proj"])
    model = made(tmp_path, experts={name: path})
    with pytest.raises(NotExportableError, match=name):
        model.save_pretrained(tmp_path / "one", format="xlora")


# --- damage ---


def test_a_truncated_head(saved):
    path = saved / "xlora_classifier.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(saved, TruncatedFileError, str(path), "bytes")


def test_a_head_that_lacks_a_layer(saved):
    path = saved / "xlora_classifier.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("inner")}, path)
    refused(saved, MissingTensorsError, "inner.0.weight", "inner.0.bias", str(path))


def test_a_head_of_another_shape(saved):
    path = saved / "xlora_classifier.safetensors"
    save_file(load_file(path) | {"inner.0.weight": torch.ones(12, 16)}, path)
    refused(saved, CheckpointError, "inner.0.weight", "(12, 16)", "(12, 32)")


def test_a_head_numbered_for_another_setting(saved):
    """Without ReLU and dropout the Linears sit at 0, 1, 2; with them at 0, 3, 6."""
    path = saved / "xlora_classifier.safetensors"
    save_file({k.replace("inner.0", "inner.1"): v for k, v in load_file(path).items()}, path)
    refused(saved, MissingTensorsError, "inner.0.weight")


def test_only_a_pickle(saved):
    (saved / "xlora_classifier.safetensors").rename(saved / "xlora_classifier.pt")
    refused(saved, PickleError, "xlora_classifier.pt", str(saved))


def test_a_missing_expert(saved):
    shutil.rmtree(saved / "mech")
    refused(saved, NotFoundError, "'mech'", str(saved))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"adapters": "gone"}, "adapters"), ({"adapters": []}, "adapters"), ({"base_model_id": "gone"}, "base_model_id")],
)
def test_fields_that_are_required(saved, changes, word):
    edit(saved, **changes)
    refused(saved, TruncatedFileError, word, str(saved / "xlora_config.json"))


@pytest.mark.parametrize("changes", [{"adapters": 3}, {"adapters": "chem"}, {"base_model_id": 3}], ids=str)
def test_fields_of_another_kind(saved, changes):
    edit(saved, **changes)
    with pytest.raises(XLoomError, match=r"adapters|base_model") as caught:
        XLoraForCausalLM.from_pretrained(saved)
    assert "xlora_config.json" in str(caught.value)


@pytest.mark.parametrize("field", ["stop_token_id", "experts", "base_model_name_or_path", "sites"])
def test_unknown_fields(saved, field):
    """Also those of our own config, which this format does not have."""
    edit(saved, **{field: ["x"]})
    with pytest.raises(ConfigError, match=field):
        XLoraForCausalLM.from_pretrained(saved)


def test_a_contradiction(saved):
    edit(saved, enable_softmax_topk=True)
    refused(saved, ConfigError, "top_k_lora", str(saved / "xlora_config.json"))

"""PEFT's X-LoRA folders: what real PEFT wrote, what it lost, and ours read by PEFT."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_native import assert_same, made, refused
from torch import nn

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM
from xloom.checkpoints import read
from xloom.errors import (
    CheckpointError,
    ConfigError,
    DuplicateExpertError,
    MissingTensorsError,
    NotExportableError,
    NotFoundError,
    PickleError,
    TruncatedFileError,
)

DATA = Path(__file__).resolve().parent.parent / "data"
OLD, NEW = DATA / "peft_0_19_1", DATA / "peft_0_21_2"
PREFIX = "base_model.internal_xlora_classifier.layers."


def there(root: Path = OLD) -> dict[str, Path]:
    return {str(i): OLD / "experts" / str(i) for i in range(2)}


# --- what PEFT wrote ---


@pytest.mark.parametrize("name", ["xlora", "xlora_depth1"])
@torch.no_grad()
def test_a_checkpoint_of_peft_0_19_1(name):
    expected = load_file(OLD / "expected.safetensors")
    model = XLoraForCausalLM.from_pretrained(OLD / name, base=OLD / "base", experts=there())
    out = model(expected["input_ids"])
    torch.testing.assert_close(out.logits, expected[f"{name}.logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.scalings, expected[f"{name}.scalings"].expand_as(out.scalings), rtol=0, atol=1e-6)
    assert model.experts == ("0", "1")
    assert (out.logits - expected["base.logits"]).abs().max() > 0.1


@torch.no_grad()
def test_paths_of_training_time(tmp_path, monkeypatch):
    """Where training ran, the paths in the file are enough; elsewhere the message says what to pass."""
    shutil.copytree(OLD, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    expected = load_file("expected.safetensors")
    out = XLoraForCausalLM.from_pretrained("xlora")(expected["input_ids"])
    torch.testing.assert_close(out.logits, expected["xlora.logits"], rtol=0, atol=1e-5)
    monkeypatch.chdir("/")
    with pytest.raises(NotFoundError) as caught:
        XLoraForCausalLM.from_pretrained(tmp_path / "data" / "xlora", base=OLD / "base")
    text = str(caught.value)
    assert all(word in text for word in ("expert '0'", "experts/0", "experts={'0'", "adapter_config.json")), text


def test_one_expert_moved(tmp_path):
    """Those not named are looked for where the file says."""
    shutil.copytree(OLD / "xlora", tmp_path / "xlora")
    shutil.copytree(OLD / "experts" / "1", tmp_path / "xlora" / "experts" / "1")
    saved = read(tmp_path / "xlora", experts={"0": OLD / "experts" / "0"})
    assert list(saved.experts) == ["0", "1"]
    with pytest.raises(NotFoundError, match=r"\['7'\].*\['0', '1'\]"):
        read(tmp_path / "xlora", experts={"7": OLD})


def test_a_head_that_peft_0_21_2_lost():
    with pytest.raises(MissingTensorsError) as caught:
        XLoraForCausalLM.from_pretrained(NEW / "xlora", base=OLD / "base", experts=there())
    text = str(caught.value)
    assert f"{PREFIX}0.weight" in text
    assert f"{PREFIX}0.bias" in text
    assert "peft 0.21.2" in text
    assert str(NEW / "xlora" / "adapter_model.safetensors") in text
    assert f"{PREFIX}3.weight" not in text, "that one is there"


def test_the_fixture_is_what_the_test_says():
    assert f"{PREFIX}0.weight" not in load_file(NEW / "xlora" / "adapter_model.safetensors")
    assert f"{PREFIX}0.weight" in load_file(OLD / "xlora" / "adapter_model.safetensors")


def test_a_head_without_dropout(tmp_path):
    """With dropout 0 PEFT has no Dropout module, and numbers every second place."""
    shutil.copytree(OLD / "xlora", tmp_path / "xlora")
    path = tmp_path / "xlora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"xlora_dropout_p": 0.0}))
    weights = tmp_path / "xlora" / "adapter_model.safetensors"
    head = load_file(weights)
    save_file({k.replace("layers.3.", "layers.2."): v for k, v in head.items()}, weights)
    saved = read(tmp_path / "xlora", experts=there())
    assert torch.equal(saved.head["layers.1.weight"], head[f"{PREFIX}3.weight"])


# --- there and back ---

FIELDS = {
    "depth 1": {"xlora_depth": 1},
    "depth 2": {"xlora_depth": 2},
    "depth 3": {"xlora_depth": 3},
    "depth 3, shared": {"xlora_depth": 3, "layerwise_scalings": False},
    "no dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.0},
    "top-k": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    "temperature": {"softmax_temperature": 0.3, "global_scaling_weight": 0.7, "scaling_pass_value": 0.25},
    "scaling pass 1/N": {"scaling_pass_value": None},
    "depth 1 without relu": {"enable_relu_and_dropout": False},
}


@pytest.mark.parametrize("name", FIELDS)
def test_round_trip(tmp_path, name):
    model = made(tmp_path, **FIELDS[name])
    model.save_pretrained(tmp_path / "one", format="peft")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))
    again = XLoraForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", format="peft")
    files = [p for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert all(p.read_bytes() == (tmp_path / "two" / p.relative_to(tmp_path / "one")).read_bytes() for p in files)


def test_round_trip_of_trained_experts(tmp_path):
    model = made(tmp_path, use_trainable_adapters=True, xlora_depth=2)
    with torch.no_grad():
        for site in model.mixture.sites:
            site.B_OR *= 1.5
    model.save_pretrained(tmp_path / "one", format="peft")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_keys_and_json(tmp_path, depth):
    """As reference.md D2 has them."""
    model = made(tmp_path, xlora_depth=depth)
    model.save_pretrained(tmp_path / "one", format="peft")
    head = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert sorted(head) == sorted(f"{PREFIX}{3 * i}.{part}" for i in range(depth) for part in ("weight", "bias"))
    raw = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "XLORA"
    assert raw["hidden_size"] == 32
    assert list(raw["adapters"]) == ["0", "1", "2"]
    theirs = set(json.loads((OLD / "xlora" / "adapter_config.json").read_text()))
    assert theirs - set(raw) <= {"peft_version"}
    assert set(raw) - theirs == {"xloom"}


@pytest.mark.parametrize(
    "fields",
    [{}, {"xlora_depth": 2}, {"xlora_depth": 3, "layerwise_scalings": False},
     {"xlora_depth": 3, "xlora_dropout_p": 0.0},
     {"top_k_lora": 2, "softmax_temperature": 0.5, "global_scaling_weight": 1.3}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_peft_reads_ours(tmp_path, monkeypatch, fields):
    model = made(tmp_path, **fields)
    model.save_pretrained(tmp_path / "one", format="peft")
    monkeypatch.chdir(tmp_path / "one")
    base = tiny_base("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, ".").eval()
    head = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(head, model.head.linears, strict=True))
    ids = prompt(2, 7)
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)


# --- what the format cannot hold ---


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"null_expert": True}, "null_expert"),
        ({"head_input": "ema:4"}, "head_input='ema:4'"),
        ({"gate_at_layer": 1, "drop_sites_below_gate": True}, "gate_at_layer=1"),
        ({"use_bias": False}, "use_bias"),
        ({"xlora_depth": 2, "enable_relu_and_dropout": False}, "enable_relu_and_dropout"),
    ],
)
def test_fields_that_peft_does_not_have(tmp_path, fields, word):
    model = made(tmp_path, **fields)
    with pytest.raises(NotExportableError, match="'peft'") as caught:
        model.save_pretrained(tmp_path / "one", format="peft")
    assert word in str(caught.value)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        # PEFT multiplies the input by the scalings, and so adds lora_B's bias in full whatever they are
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_experts_that_peft_computes_differently(tmp_path, lora, word):
    path = make_expert(tiny_base("opt"), tmp_path / "e", r=2, target_modules=["q_proj"], **lora)
    model = made(tmp_path, kind="opt", experts={"a": path})
    with pytest.raises(NotExportableError, match=word):
        model.save_pretrained(tmp_path / "one", format="peft")


# --- damage ---


@pytest.fixture
def saved(tmp_path) -> Path:
    made(tmp_path, xlora_depth=2).save_pretrained(tmp_path / "one", format="peft")
    return tmp_path / "one"


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_head(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(saved, TruncatedFileError, str(path), "bytes")


def test_a_head_of_another_shape(saved):
    path = saved / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{PREFIX}3.weight": torch.ones(7, 12)}, path)
    refused(saved, CheckpointError, f"{PREFIX}3.weight", "(7, 12)", str(path))


def test_only_a_pickle(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    refused(saved, PickleError, "adapter_model.bin", str(saved))


def test_no_head(saved):
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, NotFoundError, "adapter_model.safetensors", str(saved))


def test_a_missing_expert(saved):
    shutil.rmtree(saved / "experts" / "mech")
    refused(saved, NotFoundError, "expert '1'", "mech", "experts=")


@pytest.mark.parametrize("adapters", [None, {}, [], ["0"]])
def test_no_experts(saved, adapters):
    edit(saved, adapters=adapters)
    refused(saved, TruncatedFileError, "names no adapters", str(saved))


@pytest.mark.parametrize(
    ("changes", "word"), [({"xlora_depth": 0}, "xlora_depth"), ({"enable_softmax_topk": True}, "top_k_lora")]
)
def test_a_config_that_is_refused(saved, changes, word):
    edit(saved, **changes)
    refused(saved, ConfigError, word, str(saved / "adapter_config.json"))


@pytest.mark.parametrize("ours", [{"experts": ["a"]}, {"experts": 5}, 5, {"experts": ["a", "b", "a"]}])
def test_our_own_note_in_the_file_is_damaged(saved, ours):
    edit(saved, xloom=ours)
    with pytest.raises((CheckpointError, ConfigError, DuplicateExpertError), match="adapter_config.json"):
        XLoraForCausalLM.from_pretrained(saved)


def test_copies_are_independent(saved):
    """The head belongs to the model: reading twice gives two."""
    one = XLoraForCausalLM.from_pretrained(saved)
    two = XLoraForCausalLM.from_pretrained(saved)
    before = copy.deepcopy(two.head.state_dict())
    one.head.zero_init_()
    assert all(torch.equal(v, before[k]) for k, v in two.head.state_dict().items())

"""What mistral.rs 0.6.0 loads: file names, JSON, tensors and order (docs/mistralrs.md), and what it cannot hold."""

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_native import made

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM
from xloom.checkpoints.mistralrs import _labels
from xloom.config import check_expert_names
from xloom.errors import ForeignCheckpointError, NotExportableError, XLoomError
from xloom.experts import Expert

FIXED = ("xlora_config.json", "xlora_classifier.safetensors", "ordering.json")


_KEPT = tempfile.TemporaryDirectory()
SETTINGS = {
    "patterns, rslora, missing sites": {},
    "some layers": {"layers_to_transform": [1]},
    "different ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 1}},
    "all linear": {"target_modules": "all-linear"},
}


@cache
def experts(name: str = "patterns, rslora, missing sites") -> dict[str, str]:
    base, folder = tiny_base("llama"), Path(_KEPT.name) / name
    loras = {
        "chem": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "mech": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "use_rslora": True},
        "prot": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["v_proj"],
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
        },
    }
    return {n: make_expert(base, folder / n, i, **(lora | SETTINGS[name])) for i, (n, lora) in enumerate(loras.items())}


def exported(tmp_path: Path, **fields) -> tuple[XLoraForCausalLM, Path]:
    model = made(tmp_path, experts=experts(), **fields)
    model.save_pretrained(tmp_path / "one", format="mistralrs")
    return model, tmp_path / "one"


# --- the files ---


def test_files(tmp_path):
    model, folder = exported(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*FIXED, *(f"{name}.{kind}" for name in model.experts for kind in ("json", "safetensors"))]
    )
    assert all(p.is_file() for p in folder.iterdir()), "flat: sub-folders are not read"


def test_ordering_is_the_walk_of_modules(tmp_path):
    model, folder = exported(tmp_path)
    ordering = json.loads((folder / "ordering.json").read_text())
    assert ordering["order"] == ["chem", "mech", "prot"]
    walk = [n for n, _ in tiny_base("llama").named_modules() if n.endswith(("q_proj", "v_proj"))]
    assert ordering["layers"] == {name: index for index, name in enumerate(walk)}
    assert list(model.sites) == walk
    config = json.loads((folder / "xlora_config.json").read_text())
    assert ordering["base_model_id"] == config["base_model_id"] == str(tmp_path / "base")
    assert config["adapters"] == ordering["order"]
    assert config["xlora_dropout_p"] == 0.0, "mistral.rs would apply it at inference"
    assert config["hidden_size"] == 32


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [12, 32])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_head(tmp_path, depth, size, relu):
    """Linears numbered 0, 1, ... whatever lies between, and padded to the hidden size."""
    model, folder = exported(tmp_path, xlora_depth=depth, xlora_size=size, enable_relu_and_dropout=relu)
    head = load_file(folder / "xlora_classifier.safetensors")
    keys = [f"inner.{i}" for i in range(depth - 1)] + ["last"]
    assert sorted(head) == sorted(f"{key}.{part}" for key in keys for part in ("weight", "bias"))
    for key, linear in zip(keys, model.head.linears, strict=True):
        rows, columns = linear.weight.shape
        weight, bias = head[f"{key}.weight"], head[f"{key}.bias"]
        assert weight.shape[1] == 32
        assert weight.shape[0] == bias.shape[0] == (3 * len(model.sites) if key == "last" else 32)
        assert torch.equal(weight[:rows, :columns], linear.weight)
        assert torch.equal(bias[:rows], linear.bias)
        assert weight.abs().sum() == pytest.approx(linear.weight.abs().sum().item(), rel=1e-5), "the rest is zero"
    assert json.loads((folder / "xlora_config.json").read_text())["xlora_size"] == 32


def as_mistralrs_reads(folder: Path, fields: dict) -> XLoraForCausalLM:
    """The export as its reader sees it: one r and one alpha per expert, every module of the names in every layer."""
    ordering = json.loads((folder / "ordering.json").read_text())
    read, targets = {}, set()
    for label in ordering["order"]:
        raw = json.loads((folder / f"{label}.json").read_text())
        targets.add(tuple(raw["target_modules"]))
        tensors = load_file(folder / f"{label}.safetensors")
        assert all(t.shape[0 if "lora_A" in k else 1] == raw["r"] for k, t in tensors.items())
        plain = {"peft_type": "LORA", "r": raw["r"], "lora_alpha": raw["lora_alpha"]}
        read[label] = Expert.from_tensors(plain, tensors, source=label)
    (names,) = targets
    sites = [n for n, _ in tiny_base("llama").named_modules() if n.rpartition(".")[2] in names]
    assert sorted(ordering["layers"]) == sorted(sites)
    assert sorted(ordering["layers"].values()) == list(range(len(sites)))
    assert all(sorted(expert.modules) == sorted(sites) for expert in read.values())

    config = json.loads((folder / "xlora_config.json").read_text())
    model = XLoraForCausalLM.from_experts(tiny_base("llama"), read, **(fields | {"xlora_size": config["xlora_size"]}))
    head = load_file(folder / "xlora_classifier.safetensors")
    places = [f"inner.{i}" for i in range(config["xlora_depth"] - 1)] + ["last"]
    with torch.no_grad():
        for place, linear in zip(places, model.head.linears, strict=True):
            weight, bias = head[f"{place}.weight"], head[f"{place}.bias"]
            if place == "last" and config["layerwise_scalings"]:  # row index * N + expert, index from the ordering file
                rows = torch.tensor([ordering["layers"][site] for site in model.sites])
                weight = weight.unflatten(0, (len(sites), -1))[rows].flatten(0, 1)
                bias = bias.unflatten(0, (len(sites), -1))[rows].flatten(0, 1)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return model


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"layerwise_scalings": True},
        {"layerwise_scalings": False, "xlora_depth": 3},
        {"xlora_depth": 2, "layerwise_scalings": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_export_means_the_model(tmp_path, name, fields):
    model = made(tmp_path, experts=experts(name), **fields)
    model.save_pretrained(tmp_path / "one", format="mistralrs")
    again = as_mistralrs_reads(tmp_path / "one", fields)
    ids = prompt(2, 6)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
    assert (model(ids).logits - tiny_base("llama")(ids).logits).abs().max() > 0.05


# --- names ---


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,7}", fullmatch=True) | st.sampled_from(
    ["a", "ab", "json", "safetensors", "expert1", "expert1_a", "expert2_a", "ordering", "xlora", "1", "10", "_"]
)


@given(st.lists(NAMES, min_size=1, max_size=12, unique=True))
def test_no_name_is_part_of_another_file(experts):
    check_expert_names(experts)
    labels = _labels(experts)
    assert len(labels) == len(experts)
    files = {label: [f"{label}.json", f"{label}.safetensors"] for label in labels}
    assert len(files) == len(experts)
    for label in labels:
        others = [f for other, names in files.items() if other != label for f in names] + list(FIXED)
        assert not [f for f in others if label in f]


@pytest.mark.parametrize(
    "experts", [["adapter_1", "adapter_10"], ["a", "b"], ["x", "expert1_x"], [f"adapter_{i}" for i in range(12)]]
)
def test_names_known_to_clash(experts):
    labels = _labels(experts)
    for label in labels:
        assert not [f for f in FIXED if label in f]
        assert not [other for other in labels if other != label and label in other]


def test_good_names_stay():
    assert _labels(["chem", "mech"]) == ["chem", "mech"]


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"null_expert": True}, "null_expert"),
        ({"head_input": "running_mean"}, "head_input"),
        ({"gate_at_layer": 1, "drop_sites_below_gate": True}, "gate_at_layer"),
        ({"top_k_lora": 2, "enable_softmax_topk": True}, "enable_softmax_topk"),
        ({"xlora_depth": 2, "xlora_size": 33}, "xlora_size=33"),
    ],
)
def test_fields_that_are_refused(tmp_path, fields, word):
    model = made(tmp_path, experts=experts(), **fields)
    with pytest.raises(NotExportableError, match="'mistralrs'") as caught:
        model.save_pretrained(tmp_path / "one", format="mistralrs")
    assert word in str(caught.value)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("kind", "lora", "word"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "Embedding"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ("opt", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    ],
)
def test_experts_that_are_refused(tmp_path, kind, lora, word):
    path = make_expert(tiny_base(kind), tmp_path / "e", r=2, **lora)
    model = made(tmp_path, kind=kind, experts={"a1": path})
    with pytest.raises(NotExportableError, match=word):
        model.save_pretrained(tmp_path / "one", format="mistralrs")


def test_more_than_one_reason_at_once(tmp_path):
    model = made(tmp_path, experts=experts(), null_expert=True, top_k_lora=2, enable_softmax_topk=True)
    with pytest.raises(NotExportableError, match=r"null_expert.*enable_softmax_topk"):
        model.save_pretrained(tmp_path / "one", format="mistralrs")


def test_a_base_without_a_name(tmp_path, llama):
    """mistral.rs compares the base's id in both files with the one it is given."""
    llama.config._name_or_path = ""
    model = XLoraForCausalLM.from_experts(llama, experts())
    with pytest.raises(NotExportableError, match="base"):
        model.save_pretrained(tmp_path / "one", format="mistralrs")


def test_it_is_not_read(tmp_path):
    """Experts are not where xlora has them; the message must not be about something else."""
    _, folder = exported(tmp_path)
    with pytest.raises(XLoomError, match=r"mistral\.rs|mistralrs") as caught:
        XLoraForCausalLM.from_pretrained(folder)
    assert isinstance(caught.value, ForeignCheckpointError)

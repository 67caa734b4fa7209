"""Reading what PEFT writes, bit for bit, and refusing by name what cannot be mixed."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import make_expert, tiny_base
from xloom import XLoraForCausalLM
from xloom.errors import (
    ActivatedLoraError,
    BaseMismatchError,
    ConvolutionError,
    ExpertError,
    ModulesToSaveError,
    NoMatchingSiteError,
    NonFiniteError,
    NotFoundError,
    NotLoraError,
    PickleError,
    TargetParametersError,
    TruncatedFileError,
    UnsupportedLoraError,
)
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE, Expert, check_lora_config
from xloom.mixture import Mixture

KINDS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "use_rslora": True}),
    "rank pattern": (
        "llama",
        # in the order of the alphabet: PEFT sorts the file, and the first that matches counts
        {"r": 4, "target_modules": "all-linear", "rank_pattern": {r".*\.2\..*": 3, "layers.1.mlp.up_proj": 5,
         "q_proj": 2}},
    ),
    "alpha pattern": (
        "llama",
        {"r": 4, "target_modules": "all-linear", "use_rslora": True,
         "alpha_pattern": {r"layers\.0\..*": 3, "q_proj": 7}},
    ),
    "anchored patterns": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2},
         "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 5}},
    ),
    "regex targets": ("llama", {"r": 2, "target_modules": r".*layers\.[02]\..*(q|down)_proj"}),
    "some layers": ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 2]}),
    "lora_bias": ("opt", {"r": 2, "target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA": ("llama", {"r": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "DoRA embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "lm_head": ("llama", {"r": 3, "target_modules": ["lm_head", "q_proj"]}),
    "exclude": ("llama", {"r": 3, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.fixture
def plain(tmp_path, _llama) -> Path:
    """A good adapter folder, to be damaged."""
    return Path(make_expert(_llama, tmp_path / "plain", r=2, target_modules=["q_proj", "v_proj"]))


def edit(folder: Path, **changes) -> Path:
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return folder


def retensor(folder: Path, change) -> Path:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def message(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


# --- reading ---


@pytest.mark.parametrize("name", KINDS)
def test_what_peft_writes(name, tmp_path):
    """The same tensors, and at every module the scale that PEFT itself has in memory."""
    kind, lora = KINDS[name]
    base = tiny_base(kind)
    path = make_expert(base, tmp_path / "e", **lora)
    expert = Expert.from_pretrained(path)
    written = {k: v for k, v in load_file(Path(path) / WEIGHTS_FILE).items() if "base_layer" not in k}
    ours = expert.tensors()
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[key], written[key]) and ours[key].dtype == written[key].dtype for key in written)

    theirs = PeftModel.from_pretrained(copy.deepcopy(base), path).base_model.model
    adapted = {n: m for n, m in theirs.named_modules() if isinstance(m, LoraLayer)}
    assert adapted.keys() == expert.modules.keys()
    for module, low in expert.modules.items():
        assert low.scale == pytest.approx(adapted[module].scaling["default"], rel=1e-12)
        assert low.rank == adapted[module].r["default"]
        assert low.is_embedding == isinstance(adapted[module].get_base_layer(), nn.Embedding)
        assert (low.magnitude_O is not None) == bool(lora.get("use_dora"))
        assert (low.bias_O is not None) == bool(lora.get("lora_bias"))

    again = Expert.from_tensors(expert.config, ours, source="again")
    assert all(torch.equal(again.tensors()[key], ours[key]) for key in ours)
    assert [low.scale for low in again.modules.values()] == [low.scale for low in expert.modules.values()]


def test_every_default_of_this_peft_is_accepted():
    """PEFT writes all its options: none may look like one we do not know."""
    check_lora_config(json.loads(json.dumps(LoraConfig(r=4).to_dict(), default=list)), "here")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone(init, plain):
    Expert.from_pretrained(edit(plain, init_lora_weights=init))


def test_subfolder_and_path_forms(plain, monkeypatch):
    expected = Expert.from_pretrained(plain).tensors()
    for read in (
        Expert.from_pretrained(str(plain)),
        Expert.from_pretrained(plain.parent, subfolder="plain"),
    ):
        assert all(torch.equal(read.tensors()[key], value) for key, value in expected.items())
    monkeypatch.chdir(plain.parent)
    assert Expert.from_pretrained("plain").tensors().keys() == expected.keys()


def test_prefix_is_put_right(plain, _llama):
    """An adapter made on the bare decoder fits the causal model, and the other way round."""
    expert = Expert.from_pretrained(plain)
    bare = {k.replace("base_model.model.model.", "base_model.model."): v for k, v in expert.tensors().items()}
    bare = Expert.from_tensors(expert.config, bare, source="bare")
    assert all(not module.startswith("model.") for module in bare.modules)
    present = {name for name, _ in _llama.named_modules()}
    assert bare.match_modules(present, "model").modules.keys() == expert.modules.keys()
    inside = {name for name, _ in _llama.model.named_modules()}
    assert expert.match_modules(inside, "model").modules.keys() == bare.modules.keys()
    assert expert.match_modules(present, "model").modules.keys() == expert.modules.keys()


# --- refusals: the config ---


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, ModulesToSaveError, ["modules_to_save", "lm_head"]),
        ({"target_parameters": ["experts.gate"]}, TargetParametersError, ["target_parameters", "experts.gate"]),
        ({"alora_invocation_tokens": [1, 2]}, ActivatedLoraError, ["alora_invocation_tokens"]),
        ({"bias": "all"}, UnsupportedLoraError, ["bias='all'", "'none'"]),
        ({"bias": "lora_only"}, UnsupportedLoraError, ["bias='lora_only'", "'none'"]),
        ({"init_lora_weights": "pissa"}, UnsupportedLoraError, ["pissa", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedLoraError, ["pissa_niter_4"]),
        ({"init_lora_weights": "olora"}, UnsupportedLoraError, ["olora"]),
        ({"init_lora_weights": "loftq"}, UnsupportedLoraError, ["loftq"]),
        ({"use_telepathy": True}, UnsupportedLoraError, ["use_telepathy", "True"]),
        ({"layer_replication": [[0, 2]]}, UnsupportedLoraError, ["layer_replication"]),
        ({"trainable_token_indices": [5]}, UnsupportedLoraError, ["trainable_token_indices"]),
        ({"use_qalora": True}, UnsupportedLoraError, ["use_qalora"]),
        ({"peft_type": "IA3"}, NotLoraError, ["LORA", "IA3"]),
        ({"peft_type": "XLORA"}, NotLoraError, ["LORA", "XLORA"]),
        ({"peft_type": "gone"}, NotLoraError, ["LORA", "None"]),
        ({"r": 5}, ExpertError, ["rank 5", "(2, 32)", "q_proj"]),
        ({"rank_pattern": {"v_proj": 7}}, ExpertError, ["rank 7", "v_proj"]),
        ({"use_dora": True}, ExpertError, ["use_dora", "lora_magnitude_vector"]),
    ],
)  # fmt: skip
def test_configs_that_are_refused(plain, changes, error, words):
    with pytest.raises(error) as caught:
        Expert.from_pretrained(edit(plain, **changes))
    text = message(caught)
    assert type(caught.value) is error
    assert all(word in text for word in [*words, str(plain)]), text


def test_an_option_set_to_nothing_is_no_option(plain):
    Expert.from_pretrained(edit(plain, use_telepathy=False, other=None, third=[]))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": "gone"}, "r"),
        ({"lora_alpha": "gone"}, "lora_alpha"),
        ({"r": 0}, "r"),
        ({"r": "2"}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ],
)
def test_a_config_without_sense(plain, changes, word):
    """Cut by hand or by another tool: still an error of ours, which names the file and the field."""
    with pytest.raises(ExpertError) as caught:
        Expert.from_pretrained(edit(plain, **changes))
    assert word in message(caught)
    assert str(plain) in message(caught)


# --- refusals: the files ---


def test_only_a_pickle(plain):
    (plain / WEIGHTS_FILE).unlink()
    (plain / "adapter_model.bin").touch()
    with pytest.raises(PickleError) as caught:
        Expert.from_pretrained(plain)
    assert "adapter_model.bin" in message(caught)
    assert WEIGHTS_FILE in message(caught)


def test_a_pickle_beside_is_left_alone(plain):
    (plain / "training_args.bin").touch()
    assert Expert.from_pretrained(plain).modules


def test_no_weights(plain):
    (plain / WEIGHTS_FILE).unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS_FILE):
        Expert.from_pretrained(plain)


def test_no_adapter_here(tmp_path):
    with pytest.raises(NotLoraError, match=CONFIG_FILE) as caught:
        Expert.from_pretrained(tmp_path)
    assert str(tmp_path) in message(caught)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "nowhere", "../nowhere/x"])
def test_missing_folder(source):
    with pytest.raises(NotFoundError, match="no such folder") as caught:
        Expert.from_pretrained(source)
    assert source in message(caught)


def test_hub_id_out_of_reach():
    with pytest.raises(NotFoundError, match="within reach") as caught:
        Expert.from_pretrained("xloom-tests/there-is-no-such-thing")
    assert "xloom-tests/there-is-no-such-thing" in message(caught)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(plain, keep):
    path = plain / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TruncatedFileError, match="bytes") as caught:
        Expert.from_pretrained(plain)
    assert str(path) in message(caught)


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "LO', "[1]", '"LORA"', "null", "\xff"])
def test_damaged_config(plain, text):
    (plain / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(TruncatedFileError, match="JSON") as caught:
        Expert.from_pretrained(plain)
    assert str(plain / CONFIG_FILE) in message(caught)


# --- refusals: the tensors ---

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(plain, part, value):
    key = f"{Q}.lora_{part}.weight"
    with pytest.raises(NonFiniteError) as caught:
        Expert.from_pretrained(retensor(plain, lambda t: t[key].view(-1)[-1:].fill_(value)))
    assert key in message(caught)


@pytest.mark.parametrize("part", ["A", "B"])
def test_one_factor_without_the_other(plain, part):
    with pytest.raises(ExpertError, match=f"no lora_{part}") as caught:
        Expert.from_pretrained(retensor(plain, lambda t: t.pop(f"{Q}.lora_{part}.weight")))
    assert "layers.0.self_attn.q_proj" in message(caught)


def test_no_tensors_at_all(plain):
    with pytest.raises(NoMatchingSiteError, match="no LoRA tensors"):
        Expert.from_pretrained(retensor(plain, lambda t: t.clear()))


@pytest.mark.parametrize(
    ("key", "shape", "error"),
    [
        (f"{Q}.lora_A.weight", (2, 32, 3, 3), ConvolutionError),
        (f"{Q}.lora_A.weight", (2, 32, 3), TargetParametersError),
        ("base_model.model.lm_head.weight", (64, 32), ModulesToSaveError),
        ("base_model.model.model.embed_tokens.weight", (64, 32), ModulesToSaveError),
        (f"{Q}.lora_A.bias", (2,), UnsupportedLoraError),
        (f"{Q}.lora_magnitude_vector", (32,), ExpertError),
    ],
)
def test_tensors_that_are_refused(plain, key, shape, error):
    with pytest.raises(error) as caught:
        Expert.from_pretrained(retensor(plain, lambda t: t.update({key: torch.zeros(shape)})))
    assert type(caught.value) is error
    assert key.removeprefix("base_model.model.").partition(".lora")[0] in message(caught)
    assert str(plain) in message(caught)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{Q}.lora_B.weight", (32,)),
        (f"{Q}.lora_A.weight", ()),
        (f"{Q}.lora_B.bias", (5,)),
        (f"{Q}.lora_B.weight", (2, 32)),
    ],
)
def test_tensors_of_a_shape_that_no_expert_has(plain, key, shape, _llama):
    retensor(plain, lambda t: t.update({key: torch.zeros(shape)}))
    with pytest.raises(ExpertError) as caught:
        XLoraForCausalLM.from_experts(copy.deepcopy(_llama), {"a": plain})
    assert "q_proj" in message(caught)


def test_a_magnitude_of_another_size(tmp_path, llama):
    path = Path(make_expert(llama, tmp_path / "e", r=2, target_modules=["q_proj"], use_dora=True))
    retensor(path, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(31)}))
    with pytest.raises(ExpertError, match="q_proj"):
        XLoraForCausalLM.from_experts(llama, {"a": path})


# --- refusals: the base ---


def test_another_base_by_shape(tmp_path, llama):
    path = make_expert(tiny_base("llama", hidden_size=16), tmp_path / "e", r=2, target_modules=["q_proj"])
    with pytest.raises(BaseMismatchError) as caught:
        XLoraForCausalLM.from_experts(llama, {"mine": path})
    text = message(caught)
    assert all(word in text for word in ("'mine'", "q_proj", "16 to 16", "32 to 32")), text


def test_another_base_by_module(tmp_path, llama):
    path = make_expert(tiny_base("llama", num_hidden_layers=5), tmp_path / "e", r=2, target_modules=["q_proj"])
    with pytest.raises(BaseMismatchError, match=r"layers\.3\.self_attn\.q_proj") as caught:
        XLoraForCausalLM.from_experts(llama, {"mine": path})
    assert str(path) in message(caught)


def test_no_site_in_common(tmp_path, llama):
    path = make_expert(tiny_base("gpt2"), tmp_path / "e", r=2, target_modules=["c_attn"])
    with pytest.raises(NoMatchingSiteError, match="none of its 3 modules.*c_attn"):
        XLoraForCausalLM.from_experts(llama, {"mine": path})


def test_an_embedding_expert_on_a_linear_module(plain, llama):
    tensors = {
        k.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"): v
        for k, v in load_file(plain / WEIGHTS_FILE).items()
    }
    expert = Expert.from_tensors(json.loads((plain / CONFIG_FILE).read_text()), tensors, source="here")
    with pytest.raises(BaseMismatchError, match="expected an Embedding, found Linear"):
        XLoraForCausalLM.from_experts(llama, {"mine": expert})


def test_an_expert_on_a_convolution():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.ones(1, 4),
        "base_model.model.conv.lora_B.weight": torch.ones(4, 1),
    }
    expert = Expert.from_tensors({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors, source="here")
    with pytest.raises(ConvolutionError, match="conv"):
        Mixture(model, {"mine": expert})


def test_an_expert_on_something_else():
    model = nn.Sequential()
    model.add_module("norm", nn.LayerNorm(4))
    tensors = {
        "base_model.model.norm.lora_A.weight": torch.ones(1, 4),
        "base_model.model.norm.lora_B.weight": torch.ones(4, 1),
    }
    expert = Expert.from_tensors({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors, source="here")
    with pytest.raises(BaseMismatchError, match="LayerNorm") as caught:
        Mixture(model, {"mine": expert})
    assert "norm" in message(caught).replace("LayerNorm", "")
    assert "mine" in message(caught)
    assert type(model.norm) is nn.LayerNorm, "a refused expert leaves the base as it was"


def test_a_refusal_leaves_the_base_as_it_was(tmp_path, llama):
    """The second expert does not fit: no site of the first may stay behind."""
    good = make_expert(llama, tmp_path / "good", r=2, target_modules=["q_proj"])
    bad = make_expert(tiny_base("llama", hidden_size=16), tmp_path / "bad", r=2, target_modules=["q_proj"])
    before = {name: type(module) for name, module in llama.named_modules()}
    with pytest.raises(BaseMismatchError):
        XLoraForCausalLM.from_experts(llama, {"good": good, "bad": bad})
    assert {name: type(module) for name, module in llama.named_modules()} == before

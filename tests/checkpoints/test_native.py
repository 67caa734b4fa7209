"""Our own format: bit for bit there and back, self-contained, and damaged folders named for what is wrong with them."""

import errno
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tiny import make_expert, make_experts, prompt, tiny_base
from xloom import XLoraConfig, XLoraForCausalLM, routers
from xloom.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    ForeignCheckpointError,
    MissingTensorsError,
    NotFoundError,
    PickleError,
    TruncatedFileError,
)


def base_folder(tmp_path: Path, kind: str = "llama", **changes) -> Path:
    tiny_base(kind, **changes).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


_KEPT = tempfile.TemporaryDirectory()


@cache
def adapters(kind: str) -> dict[str, str]:
    """Three experts of a kind of base, made once."""
    return make_experts(tiny_base(kind), Path(_KEPT.name) / kind)


def made(tmp_path: Path, *, kind: str = "llama", experts: dict | None = None, **fields) -> XLoraForCausalLM:
    base = base_folder(tmp_path, kind)
    torch.manual_seed(3)
    model = XLoraForCausalLM.from_experts(
        base, experts or adapters(kind), **({"layerwise_scalings": True, "xlora_size": 12} | fields)
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(3)
    return model


@torch.no_grad()
def assert_same(one: XLoraForCausalLM, two: XLoraForCausalLM) -> None:
    ids = prompt(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    first, second = one(ids, attention_mask=mask), two(ids, attention_mask=mask)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.scalings, second.scalings)
    assert first.logits.isfinite().all()
    with one.routing(routers.BaseOnly()):
        assert (one(ids, attention_mask=mask).logits - first.logits)[1].abs().max() > 0.01
    assert (one.experts, one.sites) == (two.experts, two.sites)
    assert torch.equal(one.generate(ids, max_new_tokens=3), two.generate(ids, max_new_tokens=3))


def there_and_back(model: XLoraForCausalLM, tmp_path: Path, **save) -> XLoraForCausalLM:
    """Saved, loaded, and saved again: the second folder holds the same bytes."""
    model.save_pretrained(tmp_path / "one", **save)
    again = XLoraForCausalLM.from_pretrained(tmp_path / "one")
    assert_same(model, again)
    if not save:
        again.save_pretrained(tmp_path / "two")
        for path in (tmp_path / "one").rglob("*"):
            if path.is_file():
                other = tmp_path / "two" / path.relative_to(tmp_path / "one")
                assert path.read_bytes() == other.read_bytes(), path
    return again


# --- round trips ---


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layerwise", [True, False])
def test_round_trip(tmp_path, depth, layerwise):
    there_and_back(made(tmp_path, xlora_depth=depth, layerwise_scalings=layerwise), tmp_path)


FIELDS = {
    "null expert": {"null_expert": True, "xlora_depth": 2},
    "pooled": {"head_input": ["token", "ema:3", "running_mean"]},
    "early gate": {"gate_at_layer": 1, "drop_sites_below_gate": True},
    "early gate, pooled": {"gate_at_layer": 2, "drop_sites_below_gate": True, "head_input": "ema:2"},
    "no bias, no relu": {"use_bias": False, "enable_relu_and_dropout": False, "xlora_depth": 3},
    "top-k": {"top_k_lora": 2, "enable_softmax_topk": True, "softmax_temperature": 0.3},
    "scaling pass": {"scaling_pass_value": None, "global_scaling_weight": 0.7},
}


@pytest.mark.parametrize("name", FIELDS)
def test_round_trip_of_every_field(tmp_path, name):
    model = made(tmp_path, **FIELDS[name])
    if model.head.standardises:
        model.head.set_statistics(torch.randn(32), torch.rand(32) + 0.5)
    again = there_and_back(model, tmp_path)
    for field, value in FIELDS[name].items():
        if field != "drop_sites_below_gate":
            assert getattr(again.config, field) == value
    if model.head.standardises:
        assert torch.equal(again.head.input_mean, model.head.input_mean)
        assert again.head.input_std.std() > 0.1


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma3_text", "opt", "qwen3_moe"])
def test_round_trip_of_other_bases(tmp_path, kind):
    targets = ["q_proj", "v_proj"] if kind == "qwen3_moe" else "all-linear"
    base = tiny_base(kind)
    paths = {
        name: make_expert(base, tmp_path / name, i, r=2 + i, target_modules=targets) for i, name in enumerate("ab")
    }
    there_and_back(made(tmp_path, kind=kind, experts=paths), tmp_path)


ADAPTERS = {
    "DoRA": ("llama", [{"target_modules": ["q_proj"], "use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}]),
    "embeddings": ("llama", [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ]),
    "lora_bias": ("opt", [{"target_modules": ["q_proj"], "lora_bias": True}, {"target_modules": ["q_proj", "fc1"]}]),
    "rslora and patterns": ("llama", [
        {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 5}},
        {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 9}},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip_of_every_kind_of_expert(tmp_path, name):
    kind, loras = ADAPTERS[name]
    base = tiny_base(kind)
    paths = {f"e{i}": make_expert(base, tmp_path / f"e{i}", i, r=3, **lora) for i, lora in enumerate(loras)}
    there_and_back(made(tmp_path, kind=kind, experts=paths), tmp_path)
    for label, path in paths.items():
        written = load_file(tmp_path / "one" / "experts" / label / "adapter_model.safetensors")
        source = {k: v for k, v in load_file(Path(path) / "adapter_model.safetensors").items() if "base_layer" not in k}
        assert written.keys() == source.keys(), "an ordinary PEFT folder, with the tensors that the expert came with"
        assert all(torch.equal(written[key], source[key]) for key in source)


def test_round_trip_of_trained_experts(tmp_path):
    model = made(tmp_path, use_trainable_adapters=True)
    ids = prompt(1, 5)
    before = model(ids).logits.detach()
    with torch.no_grad():
        for site in model.mixture.sites:
            site.A_RI += 0.1 * torch.randn_like(site.A_RI)
            site.B_OR *= 1.5
    assert (model(ids).logits - before).abs().max() > 0.05
    again = there_and_back(model, tmp_path)
    with torch.no_grad():
        assert not torch.equal(again(ids).logits, before)


@pytest.mark.parametrize("dora", [False, True])
def test_round_trip_in_half_precision(tmp_path, dora):
    """The experts come in float32 and live in the base's bfloat16; what was saved computes the same again."""
    base = tiny_base("llama", torch.bfloat16)
    paths = {
        name: make_expert(
            tiny_base("llama"), tmp_path / name, i, r=3, target_modules=["q_proj", "down_proj"], use_dora=dora
        )
        for i, name in enumerate("ab")
    }
    base.save_pretrained(tmp_path / "base")
    model = XLoraForCausalLM.from_experts(tmp_path / "base", paths, layerwise_scalings=True)
    assert model.base.dtype == torch.bfloat16
    assert model.head.dtype == torch.float32
    there_and_back(model, tmp_path)


def test_auto_classes(tmp_path):
    model = made(tmp_path)
    model.save_pretrained(tmp_path / "one")
    config = AutoConfig.from_pretrained(tmp_path / "one")
    assert isinstance(config, XLoraConfig)
    assert config.experts == ["chem", "mech", "prot"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(again, XLoraForCausalLM)
    assert_same(model, again)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float64)
    assert wide.base.dtype == torch.float64


def test_training_mode_is_off_after_loading(tmp_path):
    model = made(tmp_path, xlora_depth=2, xlora_dropout_p=0.5)
    model.save_pretrained(tmp_path / "one")
    again = XLoraForCausalLM.from_pretrained(tmp_path / "one")
    assert not again.training
    assert not again.head.training


# --- where the base is ---


def test_with_the_base_inside(tmp_path):
    model = made(tmp_path / "before", gate_at_layer=1, drop_sites_below_gate=True)
    ids = prompt(1, 4)
    before = model(ids).logits
    model.save_pretrained(tmp_path / "before" / "one", include_base=True)
    assert torch.equal(model(ids).logits, before), "the sites and the gate are back in their places"
    shutil.move(tmp_path / "before" / "one", tmp_path / "after")
    shutil.rmtree(tmp_path / "before")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "after"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after" / "base")
    assert torch.equal(plain(ids).logits, tiny_base("llama")(ids).logits), "the plain base, without sites"


@pytest.mark.parametrize("inside", [False, True])
def test_a_local_base_moves_along(tmp_path, inside, monkeypatch):
    """Its path is kept relative, from the checkpoint and not from the working folder."""
    model = made(tmp_path / "home")
    target = tmp_path / "home" / ("deep/er/one" if inside else "one")
    model.save_pretrained(target)
    stored = json.loads((target / "config.json").read_text())["base_model_name_or_path"]
    assert not Path(stored).is_absolute()
    shutil.move(tmp_path / "home", tmp_path / "moved")
    monkeypatch.chdir("/")
    again = XLoraForCausalLM.from_pretrained(tmp_path / "moved" / target.relative_to(tmp_path / "home"))
    assert_same(model, again)


def test_a_base_given_by_a_relative_path(tmp_path, monkeypatch):
    paths = adapters("llama")
    base_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = XLoraForCausalLM.from_experts("base", paths, layerwise_scalings=True)
    model.save_pretrained("one")
    monkeypatch.chdir("/")
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


def test_a_hub_id_stays_as_it_is(tmp_path, llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    model.config.base_model_name_or_path = "org/name"
    model.save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["base_model_name_or_path"] == "org/name"
    with pytest.raises(NotFoundError, match="org/name"):
        XLoraForCausalLM.from_pretrained(tmp_path / "one")


def test_a_checkpoint_that_names_no_base(tmp_path, llama, expert_paths):
    llama.config._name_or_path = ""
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(CheckpointError, match="pass base="):
        XLoraForCausalLM.from_pretrained(tmp_path / "one")
    again = XLoraForCausalLM.from_pretrained(tmp_path / "one", base=tiny_base("llama"))
    assert_same(model, again)


@pytest.mark.parametrize(
    ("changes", "word"), [({"num_hidden_layers": 2}, "num_hidden_layers"), ({"vocab_size": 80}, "vocab_size")]
)
def test_another_base(tmp_path, changes, word):
    made(tmp_path).save_pretrained(tmp_path / "one")
    with pytest.raises(BaseMismatchError, match=word):
        XLoraForCausalLM.from_pretrained(tmp_path / "one", base=tiny_base("llama", **changes))
    with pytest.raises(BaseMismatchError, match="model_type"):
        XLoraForCausalLM.from_pretrained(tmp_path / "one", base=tiny_base("qwen2"))


# --- over an older checkpoint ---


def test_over_an_older_one(tmp_path):
    first = made(tmp_path, xlora_depth=3)
    first.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("mine")
    second = made(
        tmp_path,
        xlora_depth=1,
        experts={"only": make_expert(tiny_base("llama"), tmp_path / "x", 9, target_modules=["q_proj"])},
    )
    second.save_pretrained(tmp_path / "one")
    assert_same(second, XLoraForCausalLM.from_pretrained(tmp_path / "one"))
    assert (tmp_path / "one" / "README.md").read_text() == "mine"


def test_over_one_that_carries_another_base(tmp_path):
    """The base of the older model must not answer for the newer one."""
    made(tmp_path / "a").save_pretrained(tmp_path / "one", include_base=True)
    paths = adapters("llama")
    torch.manual_seed(1)
    other = tiny_base("llama", spread=0.4)
    other.save_pretrained(tmp_path / "other")
    second = XLoraForCausalLM.from_experts(tmp_path / "other", paths)
    second.save_pretrained(tmp_path / "one")
    assert_same(second, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


@pytest.mark.parametrize(
    "formats",
    [("xlora", "xloom"), ("xloom", "xlora"), ("xlora", "peft"), ("peft", "xloom"), ("xloom", "peft")],
    ids=str,
)
def test_over_one_of_another_format(tmp_path, formats):
    """Two checkpoints in one folder: loading gives the newer, or saving refuses."""
    first = made(tmp_path, xlora_depth=1)
    first.save_pretrained(tmp_path / "one", format=formats[0])
    second = made(tmp_path, xlora_depth=2)
    try:
        second.save_pretrained(tmp_path / "one", format=formats[1])
    except CheckpointError:
        return
    found = XLoraForCausalLM.from_pretrained(tmp_path / "one")
    assert found.config.xlora_depth == 2
    assert_same(second, found)


# --- damage ---


@pytest.fixture
def saved(tmp_path) -> Path:
    made(tmp_path, xlora_depth=2).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        XLoraForCausalLM.from_pretrained(folder)
    text = str(caught.value)
    assert type(caught.value) is error
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("keep", [0, 30, -8])
def test_a_truncated_head(saved, keep):
    path = saved / "head.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, TruncatedFileError, str(path), "bytes")


def test_no_head(saved):
    (saved / "head.safetensors").unlink()
    refused(saved, NotFoundError, str(saved / "head.safetensors"))


def test_a_head_that_lacks_a_layer(saved):
    path = saved / "head.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("layers.0")}, path)
    refused(saved, MissingTensorsError, str(path), "layers.0.weight", "layers.0.bias")


def test_a_head_with_a_layer_more(saved):
    path = saved / "head.safetensors"
    save_file(load_file(path) | {"layers.2.weight": torch.ones(2, 2)}, path)
    refused(saved, CheckpointError, str(path), "layers.2.weight")


def test_a_head_of_another_shape(saved):
    path = saved / "head.safetensors"
    head = load_file(path)
    save_file(head | {"layers.0.weight": torch.ones(12, 16)}, path)
    refused(saved, CheckpointError, str(path), "layers.0.weight", "(12, 16)", "(12, 32)")


def test_a_head_that_is_not_finite(saved):
    path = saved / "head.safetensors"
    head = load_file(path)
    head["layers.1.bias"][0] = torch.nan
    save_file(head, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.bias"):
        XLoraForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("relative", [False, True])
def test_a_missing_expert(saved, relative, monkeypatch):
    """An expert of ours is looked for in the folder, never on the hub."""
    shutil.rmtree(saved / "experts" / "mech")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **_: pytest.fail(f"the hub was asked for {a}"))
    monkeypatch.chdir(saved.parent)
    with pytest.raises(NotFoundError, match="mech"):
        XLoraForCausalLM.from_pretrained(saved.name if relative else saved)


def test_an_expert_with_a_pickle(saved):
    (saved / "experts" / "mech" / "adapter_model.safetensors").rename(saved / "experts" / "mech" / "adapter_model.bin")
    refused(saved, PickleError, "mech")


@pytest.mark.parametrize("text", ["", '{"model_type": "xlora"', "[]"])
def test_a_damaged_config(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, TruncatedFileError, str(saved / "config.json"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"xlora_dept": 3}, ConfigError, ["xlora_dept", "xlora_depth"]),
        ({"xlora_depth": 0}, ConfigError, ["xlora_depth"]),
        ({"enable_softmax_topk": True}, ConfigError, ["enable_softmax_topk", "top_k_lora"]),
        ({"gate_at_layer": 7}, ConfigError, ["gate_at_layer=7"]),
        ({"experts": ["../../etc"]}, ConfigError, ["../../etc"]),
        ({"base_config": 5}, ConfigError, ["base_config"]),
    ],
)
def test_a_config_that_is_refused(saved, changes, error, words):
    """The message says which file the field stands in."""
    edit(saved, **changes)
    refused(saved, error, *words, str(saved / "config.json"))


@pytest.mark.parametrize("experts", [None, []])
def test_no_experts(saved, experts):
    edit(saved, experts=experts)
    refused(saved, TruncatedFileError, "names no experts", str(saved / "config.json"))


def test_experts_that_are_no_list(saved):
    edit(saved, experts="chem")
    with pytest.raises((ConfigError, TruncatedFileError), match="experts"):  # not a search for experts c, h, e, m
        XLoraForCausalLM.from_pretrained(saved)


def test_sites_in_another_order(saved):
    sites = json.loads((saved / "config.json").read_text())["sites"]
    edit(saved, sites=sites[::-1])
    refused(saved, BaseMismatchError, "another order")
    edit(saved, sites=[*sites[:-1], "model.layers.9.q_proj"])
    refused(saved, BaseMismatchError, "model.layers.9.q_proj")
    edit(saved, sites=sites[:-1])
    refused(saved, BaseMismatchError, f"{len(sites) - 1} sites", f"have {len(sites)}", sites[-1])


def test_a_foreign_folder(tmp_path, llama, expert_paths):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ForeignCheckpointError, "an empty folder")
    llama.save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", ForeignCheckpointError, "model.safetensors", str(tmp_path / "plain"))
    refused(Path(expert_paths["chem"]), ForeignCheckpointError, "LORA", "from_experts")
    refused(tmp_path / "nowhere", NotFoundError, "no such folder")


def test_options_that_belong_elsewhere(saved):
    with pytest.raises(ConfigError, match="xlora_depth"):
        XLoraForCausalLM.from_pretrained(saved, xlora_depth=2)


# --- nothing half-written ---


@pytest.mark.parametrize("format", ["xloom", "peft", "xlora", "mistralrs"])
@pytest.mark.parametrize("older", [False, True])
def test_the_disk_fills(tmp_path, monkeypatch, format, older):
    model = made(tmp_path, xlora_depth=1)
    target = tmp_path / "parent" / "one"
    if older:
        model.save_pretrained(target)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    written = []

    def fails_at_the_third(path, tensors):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)

    for module in ("native", "saved", "peft", "xlora", "mistralrs"):
        monkeypatch.setattr(f"xloom.checkpoints.{module}.write_tensors", fails_at_the_third, raising=False)
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        model.save_pretrained(target, format=format)
    assert str(target) in str(caught.value)
    assert len(written) == 3
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in target.parent.iterdir()] == (["one"] if older else [])


def test_arguments_of_saving(tmp_path, llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    with pytest.raises(ConfigError, match="unknown format 'gguf'.*xloom, peft, xlora, mistralrs"):
        model.save_pretrained(tmp_path / "one", format="gguf")
    with pytest.raises(ConfigError, match="include_base"):
        model.save_pretrained(tmp_path / "one", format="peft", include_base=True)
    model.save_pretrained(tmp_path / "one", is_main_process=False)
    assert not (tmp_path / "one").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="found a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(str(tmp_path / "one"), safe_serialization=True, state_dict={}, max_shard_size="1GB")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "experts", "head.safetensors"]


@pytest.mark.parametrize("field", ["base_model_name_or_path", "base_config", "sites"])
def test_fields_that_the_model_fills_in(llama, expert_paths, field):
    """They follow from the base and the experts: given by hand they are refused, not lost or a TypeError."""
    with pytest.raises(ConfigError, match=field):
        XLoraForCausalLM.from_experts(llama, expert_paths, **{field: ["x"]})


# --- experts that stay where they are ---


def copied_adapters(folder: Path) -> dict[str, str]:
    return {name: str(shutil.copytree(path, folder / name)) for name, path in adapters("llama").items()}


def test_experts_can_stay_in_their_own_folders(tmp_path: Path):
    model = made(tmp_path)
    model.save_pretrained(tmp_path / "one", include_experts=False)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "experts.json",
        "head.safetensors",
    ]
    assert AutoConfig.from_pretrained(tmp_path / "one").experts == list(model.experts)
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "one"))


def test_model_and_experts_move_together(tmp_path: Path):
    model = made(tmp_path, experts=copied_adapters(tmp_path / "here" / "experts"))
    model.save_pretrained(tmp_path / "here" / "models" / "one", include_experts=False)
    (tmp_path / "here").rename(tmp_path / "there")
    there = XLoraForCausalLM.from_pretrained(tmp_path / "there" / "models" / "one", base=tmp_path / "base")
    assert_same(model, there)
    there.save_pretrained(tmp_path / "two", include_experts=False)
    assert_same(model, XLoraForCausalLM.from_pretrained(tmp_path / "two", base=tmp_path / "base"))


def test_a_model_says_which_expert_is_gone(tmp_path: Path):
    names = copied_adapters(tmp_path / "experts")
    made(tmp_path, experts=names).save_pretrained(tmp_path / "one", include_experts=False)
    gone = list(names)[1]
    shutil.rmtree(names[gone])
    with pytest.raises(NotFoundError, match=rf"experts.json: expected the LoRA folder of expert '{gone}'"):
        XLoraForCausalLM.from_pretrained(tmp_path / "one")


def test_only_our_format_and_unchanged_experts_can_stay_outside(tmp_path: Path):
    model = made(tmp_path)
    with pytest.raises(ConfigError, match="include_experts=False belongs to format='xloom'"):
        model.save_pretrained(tmp_path / "one", format="peft", include_experts=False)
    model.save_pretrained(tmp_path / "two", include_experts=False)
    model.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two" / "experts.json").exists()
    trained = made(tmp_path, use_trainable_adapters=True)
    with pytest.raises(ConfigError, match="trained experts are no longer those"):
        trained.save_pretrained(tmp_path / "one", include_experts=False)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("way", [3, None, "", ["up"]])
def test_a_way_to_an_expert_that_is_no_text_is_refused(tmp_path, way):
    model = made(tmp_path)
    model.save_pretrained(tmp_path / "one", include_experts=False)
    (tmp_path / "one" / "experts.json").write_text(json.dumps(dict.fromkeys(model.experts, way)))
    with pytest.raises(
        CheckpointError, match=r"experts.json: expected the way to a LoRA folder for expert '\w+', found"
    ):
        XLoraForCausalLM.from_pretrained(tmp_path / "one")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from toy import toy_rows, write_rows
from xloom import XLoraForCausalLM
from xloom.errors import DataError, RecipeError
from xloom.hub.files import read_tensors
from xloom.training.expert import train_expert
from xloom.training.recipe import ExpertRecipe, load_expert_recipe

RECIPE = """
base: base
output: experts/up
train: up.jsonl
valid: up-valid.jsonl
max_steps: 12
batch_size: 4
learning_rate: 1e-2
save_every: 4
lora: {r: 4, dropout: 0.1}
"""


def recipe_in(project: Path, text: str = RECIPE) -> ExpertRecipe:
    path = project / "up.yaml"
    path.write_text(text)
    return load_expert_recipe(path)


def test_an_expert_is_a_plain_peft_folder_that_learned(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(project)
    capsys.readouterr()
    folder = train_expert(recipe, progress=False)
    assert capsys.readouterr() == ("", "")
    assert folder == project / "experts" / "up"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "report.html", "report.md", "training.json",
    ]  # fmt: skip
    assert not (project / "experts" / "up.work").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    record = json.loads((folder / "training.json").read_text())
    losses = [loss for _, loss in record["losses"]]
    assert len(losses) == record["steps"] == 12
    assert losses[-1] < 0.5 * losses[0]
    assert record["references"]["base"]["loss"] > record["validation"]["loss"]
    assert not [p.name for p in folder.glob("*.*") if p.suffix != ".safetensors" and str(project) in p.read_text()]
    assert f"validation loss per token: {record['validation']['loss']:.4f}" in (folder / "README.md").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "base"), folder)
    assert XLoraForCausalLM.from_experts(project / "base", {"up": folder}).experts == ("up",)


def test_a_finished_expert_comes_back_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(project)
    folder = train_expert(recipe, progress=False)
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("xloom.training.expert.train", lambda *_: pytest.fail("trained again"))
        assert train_expert(recipe, progress=True) == folder
    assert "trained already" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written
    write_rows(project / "up.jsonl", toy_rows("up", 20))  # other data: another run
    train_expert(recipe, progress=False)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns != written


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_run_that_was_broken_off_ends_as_an_unbroken_one(
    project: Path, breaking: Any, interrupt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_expert(recipe_in(project, RECIPE.replace("experts/up", "whole")), progress=False)
    recipe = recipe_in(project)
    breaking(7, interrupt)
    with pytest.raises(KeyboardInterrupt if interrupt else RuntimeError):
        train_expert(recipe, progress=False)
    work = project / "experts" / "up.work"
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-7" if interrupt else "checkpoint-4"]
    assert not (project / "experts" / "up").exists()
    breaking(None)
    capsys.readouterr()
    folder = train_expert(recipe)
    assert f"going on from step {7 if interrupt else 4}" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    losses = [json.loads((f / "training.json").read_text())["losses"] for f in (folder, whole)]
    assert losses[0] == losses[1]
    assert not work.exists()


def test_another_recipe_starts_afresh(project: Path, breaking: Any) -> None:
    breaking(7)
    with pytest.raises(RuntimeError):
        train_expert(recipe_in(project), progress=False)
    breaking(None)
    changed = recipe_in(project, RECIPE.replace("max_steps: 12", "max_steps: 3"))
    record = json.loads((train_expert(changed, progress=False) / "training.json").read_text())
    assert record["steps"] == 3


def test_adapters_from_a_layer_on_in_bfloat16(project: Path) -> None:
    text = RECIPE.replace("{r: 4, dropout: 0.1}", "{r: 4, use_rslora: true, layers_to_transform: [1, 2]}")
    folder = train_expert(recipe_in(project, text + "dtype: bfloat16\ngradient_checkpointing: true\n"), progress=False)
    model = XLoraForCausalLM.from_experts(project / "base", {"up": folder}, gate_at_layer=1)
    assert len(model.sites) == 2 * 7
    assert model.mixture.sites[0].A_RI.dtype == torch.float32


def test_refusals(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"up.yaml: lora: expected targets and layers of the base, found: .*wq"):
        train_expert(recipe_in(project, RECIPE.replace("r: 4", "targets: [wq]")), progress=False)
    (project / "experts" / "up").mkdir(parents=True)
    (project / "experts" / "up" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"output: expected a new folder, or one with training.json, found other"):
        train_expert(recipe_in(project), progress=False)
    write_rows(project / "up.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match=r"up.jsonl:1: messages: expected a list of messages"):
        train_expert(recipe_in(project, RECIPE.replace("experts/up", "new")), progress=False)


def test_with_its_bar(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_expert(recipe_in(project, RECIPE + "eval_every: 6\n"), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "up: 24 rows; validation: 6 rows" in shown.err
    assert "12/12" in shown.err


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("targets: [q_proj, vproj]", r"lora.targets: expected modules of the base, found 'vproj'"),
        ("layers_to_transform: [1, 99]", r"lora.layers_to_transform: expected layers of the base, found 99"),
    ],
)
def test_targets_that_the_base_has_not_are_named(project: Path, lora: str, message: str) -> None:
    recipe = recipe_in(project, RECIPE.replace("lora: {r: 4, dropout: 0.1}", f"lora: {{{lora}}}"))
    with pytest.raises(RecipeError, match=message):
        train_expert(recipe, progress=False)


@pytest.mark.parametrize(
    ("base", "lora"), [("4bit", {}), ("8bit", {}), ("4bit", {"use_dora": True}), (None, {"use_dora": True})], ids=str
)
def test_an_expert_learns_on_a_quantised_base_and_with_dora(
    project: Path, base: str | None, lora: dict[str, bool]
) -> None:
    if base is not None:
        pytest.importorskip("bitsandbytes", reason="quantised bases need the extra 'quantised'")
    recipe = recipe_in(project)
    recipe = recipe.model_copy(update={"quantisation": base, "lora": recipe.lora.model_copy(update=lora)})
    folder = train_expert(recipe, progress=False)
    losses = [loss for _, loss in json.loads((folder / "training.json").read_text())["losses"]]
    assert losses[-1] < 0.6 * losses[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "base"), folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_adapter_can_be_saved_in_16_bits(recipe_file: Callable[..., Path], dtype: str):
    whole = train_expert(load_expert_recipe(recipe_file("expert", "whole")), progress=False)
    half = train_expert(load_expert_recipe(recipe_file("expert", "half", save_dtype=dtype)), progress=False)
    name = "adapter_model.safetensors"
    expected = {key: tensor.to(getattr(torch, dtype)) for key, tensor in read_tensors(whole / name).items()}
    torch.testing.assert_close(read_tensors(half / name), expected, rtol=0, atol=0)

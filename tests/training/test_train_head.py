import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from toy import toy_rows, write_rows
from xloom import XLoraForCausalLM
from xloom.architecture import decoder_layers
from xloom.errors import ConfigError
from xloom.files import read_tensors
from xloom.training import head as training_head
from xloom.training.data import Example, read_examples
from xloom.training.expert import train_expert
from xloom.training.head import hidden_statistics, train_head
from xloom.training.recipe import ExpertRecipe, HeadRecipe


@pytest.fixture(scope="session")
def experts(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two experts, each trained on its own toy domain; in the upper layers alone, so that a gate can sit below."""
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for name in ("up", "down"):
        recipe = ExpertRecipe(
            base=str(base_folder),
            output=str(folder / name),
            train=str(write_rows(folder / f"{name}.jsonl", toy_rows(name, 24))),
            max_steps=15,
            batch_size=4,
            learning_rate=1e-2,
            lora={"layers_to_transform": [1, 2]},
        )
        made[name] = str(train_expert(recipe, progress=False))
    return made


def head_recipe(project: Path, experts: dict[str, str], **changes: Any) -> HeadRecipe:
    settings: dict[str, Any] = {
        "base": str(project / "base"),
        "output": str(project / "model"),
        "experts": experts,
        "data": {name: [str(project / f"{name}.jsonl")] for name in ("up", "down")},
        "valid": {name: [str(project / f"{name}-valid.jsonl")] for name in ("up", "down")},
        "max_steps": 40,
        "batch_size": 4,
        "save_every": 20,
        "learning_rate": 3e-2,
    }
    return HeadRecipe(**(settings | changes))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def test_a_head_learns_to_route_and_nothing_else_changes(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[XLoraForCausalLM, dict[str, torch.Tensor]]] = []
    made = XLoraForCausalLM.from_experts

    def watch(*args: Any, **kwargs: Any) -> XLoraForCausalLM:
        model = made(*args, **kwargs)
        seen.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    monkeypatch.setattr(XLoraForCausalLM, "from_experts", watch)
    folder = train_head(head_recipe(project, experts, eval_every=20), progress=False)
    model, before = seen[0]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.layers.0.weight", "head.layers.0.bias"}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.layers.0.weight", "head.layers.0.bias"}

    record = record_of(folder)
    losses = [loss for _, loss in record["losses"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert record["validation"]["routing_accuracy"] == 1.0
    assert set(record["validation"]) == {"loss", "loss_up", "loss_down", "routing_accuracy"}
    assert [log["step"] for log in record["validations"]] == [20, 40]
    assert record["validations"][0]["eval_loss"] > record["validation"]["loss"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    loaded = XLoraForCausalLM.from_pretrained(folder)
    ids = torch.arange(4, 12)[None]
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_dict().keys() == made(project / "base", experts).config.to_dict().keys()
    assert not (project / "model.work").exists()


def accuracy(project: Path, experts: dict[str, str], **changes: Any) -> float:
    folder = train_head(head_recipe(project, experts, **changes), progress=False)
    return record_of(folder)["validation"]["routing_accuracy"]


@pytest.mark.parametrize(
    "head",
    [
        {"top_k_lora": 1},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
        {"head_input": ["token", "running_mean"], "scaling_pass_value": None},
        {"head_input": "ema:4", "gate_at_layer": 1, "null_expert": True},
    ],
)
def test_the_routing_term_works_with_every_kind_of_head(
    project: Path, experts: dict[str, str], head: dict[str, Any]
) -> None:
    assert accuracy(project, experts, head=head, zero_init="top_k_lora" in head) >= 0.9


def right_share(folder: Path, project: Path) -> float:
    """Mean scaling of the right expert over the validation rows of both domains."""
    model = XLoraForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    shares = []
    for index, name in enumerate(model.experts):
        for example in read_examples({name: [project / f"{name}-valid.jsonl"]}, tokenizer, 512).items:
            with torch.no_grad():
                shares.append(model(torch.tensor([example.input_ids])).scalings[..., index].mean().item())
    return sum(shares) / len(shares)


def test_the_routing_term_moves_the_share_of_the_right_expert_up(project: Path, experts: dict[str, str]) -> None:
    shares = {}
    for weight in (0.0, 10.0):
        recipe = head_recipe(project, experts, routing_weight=weight, output=str(project / f"w{weight}"))
        shares[weight] = right_share(train_head(recipe, progress=False), project)
    assert shares[10.0] > shares[0.0] + 0.03, shares


def test_experts_change_when_asked(project: Path, experts: dict[str, str]) -> None:
    folder = train_head(head_recipe(project, experts, head={"use_trainable_adapters": True}), progress=False)
    for name, path in experts.items():
        before = read_tensors(Path(path) / "adapter_model.safetensors")
        after = read_tensors(folder / "experts" / name / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("head", [{}, {"head_input": "running_mean", "xlora_depth": 2, "use_trainable_adapters": True}])
def test_a_run_that_was_broken_off_ends_as_an_unbroken_one(
    project: Path, experts: dict[str, str], head: dict[str, Any], breaking: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "head": head,
        "max_steps": 10,
        "save_every": 4,
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
    }
    whole = train_head(head_recipe(project, experts, **changes, output=str(project / "whole")), progress=False)
    recipe = head_recipe(project, experts, **changes)
    breaking(6)
    with pytest.raises(RuntimeError, match="power cut"):
        train_head(recipe, progress=False)
    breaking(None)
    kept = read_tensors(project / "model.work" / "checkpoint-4" / "trained.safetensors")
    assert all(name.startswith("head.") or name.endswith(("A_RI", "B_OR")) for name in kept)
    capsys.readouterr()
    folder = train_head(recipe)
    assert "going on from step 4" in capsys.readouterr().err
    files = ["head.safetensors", "experts/up/adapter_model.safetensors", "experts/down/adapter_model.safetensors"]
    for file in files:
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert record_of(folder)["validation"] == record_of(whole)["validation"]


def test_a_finished_head_comes_back_at_once(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = head_recipe(project, experts, max_steps=2)
    folder = train_head(recipe, progress=False)
    monkeypatch.setattr(training_head, "train", lambda *_: pytest.fail("trained again"))
    assert train_head(recipe) == folder
    assert "trained already" in capsys.readouterr().err


@pytest.mark.parametrize("gate_at_layer", [None, 1])
def test_statistics_are_those_of_what_the_head_reads(
    project: Path, experts: dict[str, str], gate_at_layer: int | None
) -> None:
    model = XLoraForCausalLM.from_experts(
        project / "base", experts, head_input="running_mean", gate_at_layer=gate_at_layer
    )
    rows = [Example(tuple(range(4, 4 + n)), 1) for n in (5, 9, 3)]
    seen: list[torch.Tensor] = []
    features = model.head.features
    model.head.features = lambda hidden, keep, past: (seen.append(hidden[keep]), features(hidden, keep, past))[1]
    for row in rows:
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
    states_ND = torch.cat(seen).double()
    mean_D, std_D = hidden_statistics(model, rows, pad_id=0, batch_size=2)
    torch.testing.assert_close(mean_D.double(), states_ND.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std_D.double(), states_ND.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)
    assert len(decoder_layers(model.base)[1]) == 3


def test_what_does_not_fit_is_named_before_training(project: Path, experts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="adapts 7 modules below gate_at_layer=2"):
        train_head(head_recipe(project, experts, head={"gate_at_layer": 2}), progress=False)

"""Twenty steps of an expert and of a head give the losses that they always gave: a change that should not alter
results must not alter these. One that should writes them anew, with XLOOM_WRITE_GOLDEN=1 in the environment.

Weights come from a formula, not from random numbers, so that the figures hold on other machines too.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom.hub.files import read_json, read_tensors, write_json, write_tensors
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.recipe import ExpertRecipe, HeadRecipe

GOLDEN = Path(__file__).parent / "data" / "golden.json"
DOMAINS = ("up", "down")


def fill(tensor: torch.Tensor, phase: float, size: float) -> torch.Tensor:
    """Numbers without a pattern that a model would notice."""
    steps = torch.arange(tensor.numel(), dtype=torch.float64)
    return (size * torch.sin(steps * steps * 0.37 + steps * 1.7 + phase)).reshape(tensor.shape).to(tensor.dtype)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    base = tiny_base("llama")
    with torch.no_grad():
        for number, parameter in enumerate(base.parameters()):
            parameter.copy_(fill(parameter, number, 0.3) if parameter.ndim > 1 else torch.ones_like(parameter))
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for domain in DOMAINS:
        write_rows(folder / f"{domain}.jsonl", toy_rows(domain, 24))
    return folder


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in json.loads((folder / "training.json").read_text())["losses"]]


def run(project: Path) -> dict[str, list[float]]:
    common: dict[str, Any] = {"base": str(project / "base"), "max_steps": 20, "batch_size": 4}
    found, experts = {}, {}
    for domain in DOMAINS:
        recipe = ExpertRecipe(
            output=str(project / domain), train=str(project / f"{domain}.jsonl"), learning_rate=1e-2, **common
        )
        experts[domain] = train_expert(recipe, progress=False)
        found[f"expert {domain}"] = losses(experts[domain])
        # LoRA's first A is random, and ends so; the head gets experts from the formula
        weights = read_tensors(experts[domain] / "adapter_model.safetensors")
        fixed = {name: fill(tensor, len(domain), 0.15) for name, tensor in weights.items()}
        write_tensors(experts[domain] / "adapter_model.safetensors", fixed)
    recipe = HeadRecipe(
        output=str(project / "head"),
        experts={name: str(path) for name, path in experts.items()},
        data={name: str(project / f"{name}.jsonl") for name in DOMAINS},
        head={"layerwise_scalings": True, "head_input": ["token", "running_mean"], "null_expert": True},
        learning_rate=1e-2,
        entropy_weight=0.1,
        balance_weight=0.1,
        start_temperature=2.0,
        **common,
    )
    found["head"] = losses(train_head(recipe, progress=False))
    return found


def test_twenty_steps_give_the_losses_of_old(project: Path) -> None:
    found = run(project)
    if os.environ.get("XLOOM_WRITE_GOLDEN"):
        write_json(GOLDEN, {name: [round(loss, 6) for loss in values] for name, values in found.items()})
        pytest.skip(f"written anew: {GOLDEN.name}")
    golden = read_json(GOLDEN)
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert len(values) == 20
        assert found[name] == pytest.approx(values, rel=2e-4), name

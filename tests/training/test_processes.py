"""Two processes train as one does, and end together. A launch costs many seconds, so that one tries several runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xloom.errors import RecipeError
from xloom.hub.files import read_tensors
from xloom.training import processes
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.recipe import load_expert_recipe, load_head_recipe

pytestmark = pytest.mark.slow
RUNS = """
import sys
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.recipe import load_expert_recipe, load_head_recipe
for path in sys.argv[1:]:
    if path.endswith("head.yaml"):
        train_head(load_head_recipe(path), progress=True)
    else:
        train_expert(load_expert_recipe(path), progress=True)
"""


def launch(folder: Path, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in two processes with gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def launch_runs(folder: Path, *recipes: Path) -> subprocess.CompletedProcess[str]:
    (folder / "runs.py").write_text(RUNS)
    return launch(folder, "runs.py", *map(str, recipes))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def assert_close(a: Path, b: Path, file: str) -> None:
    """The same losses and the same weights, but for rounding."""
    for key in ("losses", "validations", "validation", "parts", "tokens", "best_step"):
        assert numbers(record_of(a)[key]) == pytest.approx(numbers(record_of(b)[key]), rel=1e-5, abs=1e-7), key
    mine, other = read_tensors(a / file), read_tensors(b / file)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


def numbers(value: Any) -> list[float]:
    """All numbers inside, in the order of sorted keys."""
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if value is not None else []


def test_two_processes_train_as_one(
    project: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 6, "eval_every": 3, "early_stopping": 5}
    kinds: dict[str, dict[str, Any]] = {
        "expert": {"gradient_accumulation": 2, "gradient_checkpointing": True},
        "head": {"gradient_accumulation": 2},
        "soft-head": {
            "data": {name: {"files": f"{name}.jsonl", "expert": None} for name in ("up", "down")},
            "soft_labels": "token",
            "entropy_weight": 0.1,
            "head": {"null_expert": True, "head_input": "running_mean"},
        },
        "all-head": {"gradient_checkpointing": True, "head": {"top_k_lora": 1}, "experts_learning_rate": 1e-2},
    }
    alone, together = [], []
    for name, more in kinds.items():
        kind = "expert" if name == "expert" else "head"
        alone.append(recipe_file(kind, f"one-{name}", **changes, **more))
        together.append(recipe_file(kind, f"two-{name}", **changes, **more))
    done = launch_runs(project, *together)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("two-head: ") == 1, "one process speaks"
    monkeypatch.setenv("XLOOM_CACHE", str(project / "own-cache"))  # nothing that the two have computed
    train_expert(load_expert_recipe(alone[0]), progress=False)
    for path in alone[1:]:
        train_head(load_head_recipe(path), progress=False)
    assert_close(project / "two-expert", project / "one-expert", "adapter_model.safetensors")
    for name in ("head", "soft-head", "all-head"):
        assert_close(project / f"two-{name}", project / f"one-{name}", "head.safetensors")
    experts = "experts/up/adapter_model.safetensors"
    assert_close(project / "two-all-head", project / "one-all-head", experts)
    assert not list(project.glob("*.work"))


def test_another_number_of_processes_goes_on(
    project: Path, recipe_file: Callable[..., Path], breaking: Callable[..., None]
) -> None:
    """Two begun by one, as by the command; the rows come in the same order."""
    breaking(5)
    with pytest.raises(RuntimeError, match="power cut"):
        train_head(load_head_recipe(recipe_file("head", "two")), progress=False)
    breaking(None)
    whole = train_head(load_head_recipe(recipe_file("head", "one")), progress=False)
    done = launch(project, "-m", "xloom", "train", str(recipe_file("head", "two")))
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stderr
    assert_close(project / "two", whole, "head.safetensors")


def test_what_the_first_process_finds_wrong_ends_both(project: Path, recipe_file: Callable[..., Path]) -> None:
    (project / "two.work").write_text("a file where the work folder should be")
    done = launch(project, "-m", "xloom", "train", str(recipe_file("head", "two")), timeout=90)
    assert done.returncode != 0
    assert "two.work: cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_rows_that_cannot_be_shared_are_refused(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "first", lambda act: act())
    with pytest.raises(RecipeError, match="batch_size: expected a multiple of the 3 processes, found 4"):
        train_expert(load_expert_recipe(recipe_file("expert")), progress=False)

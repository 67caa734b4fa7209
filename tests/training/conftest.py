"""A tiny Llama with a tokenizer on disk, and a folder to write recipes in."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tiny import make_expert, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom.training.run import Run


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "base"
    tiny_base("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def project(base_folder: Path, tmp_path: Path) -> Path:
    """A folder with the base and the rows of both domains, for recipes with relative paths."""
    (tmp_path / "base").symlink_to(base_folder)
    for domain in ("up", "down"):
        write_rows(tmp_path / f"{domain}.jsonl", toy_rows(domain, 24))
        write_rows(tmp_path / f"{domain}-valid.jsonl", toy_rows(domain, 6, start=50))
    return tmp_path


@pytest.fixture(scope="session")
def random_experts(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two untrained experts: enough where it does not matter what is learned."""
    folder, base = tmp_path_factory.mktemp("experts"), tiny_base("llama")
    targets = ["q_proj", "down_proj"]
    return {
        name: make_expert(base, folder / name, i, r=2, target_modules=targets) for i, name in enumerate(("up", "down"))
    }


@pytest.fixture
def recipe_file(project: Path, random_experts: dict[str, str]) -> Callable[..., Path]:
    """Writes a recipe for a head, or for the expert `up`, and gives its path: `recipe_file("head", max_steps=4)`."""

    def write(kind: str, output: str = "out", **changes: Any) -> Path:
        common = {"base": "base", "output": output, "max_steps": 8, "batch_size": 4, "save_every": 4}
        mine: dict[str, Any] = {
            "expert": {"train": "up.jsonl", "valid": "up-valid.jsonl", "lora": {"r": 2}, "learning_rate": 1e-2},
            "head": {
                "experts": random_experts,
                "data": {name: f"{name}.jsonl" for name in ("up", "down")},
                "valid": {name: f"{name}-valid.jsonl" for name in ("up", "down")},
                "learning_rate": 3e-2,
            },
        }[kind]
        path = project / f"{output}-{kind}.yaml"
        path.write_text(yaml.safe_dump(common | mine | changes))
        return path

    return write


class Breaks(TrainerCallback):
    """Fails, or sends a signal (Ctrl-C), when a step has ended."""

    def __init__(self, step: int, interrupt: bool = False, number: int = signal.SIGINT) -> None:
        self.step, self.interrupt, self.number = step, interrupt, number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if not self.interrupt:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), self.number)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes runs break at a step: `breaking(step)`; `breaking(None)` lets them run again."""

    def break_at(step: int | None, interrupt: bool = False, number: int = signal.SIGINT) -> None:
        callbacks = [] if step is None else [Breaks(step, interrupt, number)]
        monkeypatch.setattr(Run, "bar", lambda self: nullcontext(callbacks))

    return break_at

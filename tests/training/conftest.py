"""A tiny Llama with a tokenizer on disk, and a folder to write recipes in."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tiny import tiny_base
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


class Breaks(TrainerCallback):
    """Fails, or sends Ctrl-C, when a step has ended."""

    def __init__(self, step: int, interrupt: bool = False) -> None:
        self.step, self.interrupt = step, interrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if not self.interrupt:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes runs break at a step: `breaking(step)`; `breaking(None)` lets them run again."""

    def break_at(step: int | None, interrupt: bool = False) -> None:
        callbacks = [] if step is None else [Breaks(step, interrupt)]
        monkeypatch.setattr(Run, "bar", lambda self: nullcontext(callbacks))

    return break_at

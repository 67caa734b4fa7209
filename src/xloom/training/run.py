"""The frame of a run: what it starts from, where it works, where its result goes, and how it is shown.

    <output>.work/   recipe.json, checkpoints and logs; removed at the end
    <output>/        the result, with training.json and the report; appears whole or not at all

A run is the same as an earlier one if recipe and input files are. Of several processes, the first alone decides,
writes and speaks. Knows nothing of what is trained.
"""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import is_tensorboard_available

from xloom import __version__
from xloom.errors import CheckpointError, NotFoundError, TruncatedFileError, names
from xloom.hub.files import new_folder, read_json, write_json
from xloom.training import processes
from xloom.training.base import base_identity
from xloom.training.checkpoint import clear_leftovers, disk_errors, last_checkpoint, step_of, sync_folder, why
from xloom.training.loop import Settings
from xloom.training.progress import Curves, ProgressBar
from xloom.training.recipe import Recipe
from xloom.training.report import write_report
from xloom.training.rows import Source, find_source, fingerprint

RECORD = "training.json"
LOGS = "logs"


class Run:
    """One run of a recipe. `inputs`: files beside the data whose content decides the result."""

    def __init__(self, recipe: Recipe, *, inputs: Mapping[str, Path], progress: bool) -> None:
        processes.start()
        self.recipe = recipe
        self.output = recipe.output_folder
        self.work = self.output.with_name(self.output.name + ".work")
        self.console = Console(stderr=True, quiet=not progress or processes.index() > 0)
        words = [(f"{key}:{word}", word) for key, words in recipe.data_files().items() for word in words]
        sources = {name: find_source(word, recipe.folder) for name, word in words}
        sources |= {name: Source(path) for name, path in inputs.items()}
        self.identity: dict[str, Any] = {
            "recipe": recipe.as_record(),
            "meaning": recipe.meaning(),
            "sha256": {"base": base_identity(recipe)} | {name: fingerprint(s) for name, s in sources.items()},
        }
        if self.output.exists() and not self.output.is_dir():
            recipe.refuse("output", "a folder", f"the file {self.output}")
        if self._old_kind() not in (None, recipe.kind):
            recipe.refuse("output", f"a new folder, or one of an earlier {recipe.kind}", f"an {self._old_kind()}")
        if self.output.is_dir() and any(self.output.iterdir()) and not (self.output / RECORD).is_file():
            recipe.refuse("output", f"a new folder, or one with {RECORD}", f"other files in {self.output}")

    def _old_kind(self) -> str | None:
        """What an earlier run made in the output folder."""
        try:
            return str(read_json(self.output / RECORD).get("kind") or "") or None
        except (NotFoundError, TruncatedFileError, OSError):
            return None

    def finished(self) -> bool:
        """True, and said so, if the output is there and of the very same run."""
        return processes.first(self._finished)

    def _finished(self) -> bool:
        changed = self._changed(self.output / RECORD)
        if changed and self._changed(self.work / "recipe.json") != []:  # else it goes on, and says so
            self.say(f"{self.output}: training again, for what changed: {names(changed)}")
        if changed == []:
            self.say(f"{self.output}: trained already with this recipe and these files")
            shutil.rmtree(self.work, ignore_errors=True)
        return changed == []

    def open(self) -> Path | None:
        """Makes the work folder; the checkpoint of the same run to go on from, if there is one."""
        return processes.first(self._open)

    def _open(self) -> Path | None:
        record = self.work / "recipe.json"
        changed = self._changed(record)
        if changed and last_checkpoint(self.work):
            self.say(f"{self.work}: starting afresh, for what changed: {names(changed)}")
        if changed != []:
            shutil.rmtree(self.work, ignore_errors=True)
        for left in self.output.parent.glob(f".{self.output.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed while it published
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(record, self.identity)
        except OSError as error:
            raise CheckpointError(f"{self.work}: cannot be written: {why(error)}") from error
        checkpoint = last_checkpoint(self.work)
        clear_leftovers(self.work, checkpoint)
        if checkpoint:
            self.say(f"{self.output}: going on from step {step_of(checkpoint)}")
        return checkpoint

    def publish(self, write: Callable[[Path], None], results: Mapping[str, Any]) -> Path:
        """Writes the result, its record and logs, and removes the work folder.

        Raises:
            CheckpointError: it cannot be written; an older result is as it was, and the work folder too.
        """
        try:
            return processes.first(lambda: self._publish(write, results))
        except CheckpointError as error:
            last = last_checkpoint(self.work)
            raise CheckpointError(f"{error}; step {step_of(last)} is kept" if last else str(error)) from error

    def _publish(self, write: Callable[[Path], None], results: Mapping[str, Any]) -> Path:
        old = [item.name for item in self.output.iterdir()] if self.output.is_dir() else []
        with new_folder(self.output, replaces=old) as folder:
            with disk_errors():
                write(folder)
            if (self.work / LOGS).is_dir():
                shutil.copytree(self.work / LOGS, folder / LOGS)
            record = {"kind": self.recipe.kind, **self.identity, **results, **self._circumstances()}
            write_json(folder / RECORD, record)
            write_report(record, folder)
            sync_folder(folder)
        shutil.rmtree(self.work, ignore_errors=True)
        return self.output

    def _circumstances(self) -> dict[str, Any]:
        packages = {name: version(name) for name in ("torch", "transformers", "peft")}
        device = str(torch.accelerator.current_accelerator() or "cpu")
        return {
            "versions": {"xloom": __version__, **packages},
            "machine": {"device": device, "processes": processes.count()},
        }

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def _changed(self, record: Path) -> list[str] | None:
        """What of this run a record says otherwise; None if there is no record."""
        try:
            found = read_json(record)
        except (NotFoundError, TruncatedFileError, OSError):
            return None
        return differences(found, json.loads(json.dumps(self.identity)))

    def settings(self) -> Settings:
        """The recipe as transformers' TrainingArguments: AdamW, cosine, gradients clipped to norm 1.

        Raises:
            RecipeError: the rows of a batch cannot be shared equally by the processes.
        """
        recipe, number = self.recipe, processes.count()
        if recipe.batch_size % number:
            recipe.refuse("batch_size", f"a multiple of the {number} processes", str(recipe.batch_size))
        made = Settings(
            output_dir=str(self.work),
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.batch_size // number,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            gradient_checkpointing=recipe.gradient_checkpointing,
            learning_rate=recipe.learning_rate,
            warmup_steps=round(recipe.warmup_ratio * recipe.max_steps),
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            max_grad_norm=1.0,
            seed=recipe.seed,
            eval_strategy="steps" if recipe.eval_every else "no",
            eval_steps=recipe.eval_every,
            save_strategy="steps",
            save_steps=recipe.save_every,
            patience=recipe.early_stopping,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            train_sampling_strategy="sequential",  # the order is planned beforehand, see data.plan_batches
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,  # whatever is trained takes part in every forward
            ddp_broadcast_buffers=False,  # the experts are buffers, and nobody changes them
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            use_cpu=not torch.accelerator.is_available(),
        )
        if made.n_gpu > 1:
            made._n_gpu = 1  # batches are planned for one device
        return made

    @contextmanager
    def bar(self) -> Iterator[list[TrainerCallback]]:
        """The callbacks that show the run; whatever happens, the terminal is left in order. SIGTERM is as Ctrl-C."""
        with _terminated_as_interrupted():
            if self.console.quiet:
                yield []
                return
            bar = ProgressBar(self.console)
            try:
                yield [bar, *([Curves(self.work / LOGS)] if is_tensorboard_available() else [])]
            except KeyboardInterrupt:
                bar.close()
                last = last_checkpoint(self.work)
                kept = f"step {step_of(last)} is kept" if last else "no step is kept yet"
                self.say(f"stopped, {kept}: run the same command again to go on from there")
                raise
            finally:
                bar.close()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys of the recipe, and files, that differ between two records; None is as if the key were not there."""
    found: dict[str, None] = {}
    for part in new:
        a, b = _flat(old.get(part) or {}), _flat(new[part])
        found |= dict.fromkeys(key for key in [*b, *a] if a.get(key) != b.get(key))
    return list(found)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        inner = {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {key: value}
        out |= inner
    return out


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

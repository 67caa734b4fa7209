"""The frame of a run: what it starts from, where it works, where its result goes, and how it is shown.

    <output>.work/   recipe.json and checkpoints; removed at the end
    <output>/        the result, with training.json; appears whole or not at all

A run is the same as an earlier one if recipe and input files are. Knows nothing of what is trained.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from xloom.errors import NotFoundError, TruncatedFileError
from xloom.files import new_folder, read_json, write_json
from xloom.suite.base_model import resolve_base
from xloom.training.loop import last_checkpoint
from xloom.training.recipe import Recipe

RECORD = "training.json"


class Run:
    """One run of a recipe. `inputs`: files beside the data whose content decides the result."""

    def __init__(self, recipe: Recipe, *, inputs: Mapping[str, Path], progress: bool) -> None:
        self.recipe = recipe
        self.output = recipe.output_folder
        self.work = self.output.with_name(self.output.name + ".work")
        self.console = Console(stderr=True, quiet=not progress)
        data = {f"{key}:{word}": recipe.path(word) for key, words in recipe.data_files().items() for word in words}
        self.identity: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "sha256": {name: _sha256(path) for name, path in {**data, **inputs}.items()},
        }
        if self.output.is_dir() and any(self.output.iterdir()) and not (self.output / RECORD).is_file():
            recipe.refuse("output", f"a new folder, or one with {RECORD}", f"other files in {self.output}")

    def finished(self) -> bool:
        """True, and said so, if the output is there and of the very same run."""
        done = self._is_same(self.output / RECORD)
        if done:
            self.say(f"{self.output}: trained already with this recipe and these files")
            shutil.rmtree(self.work, ignore_errors=True)
        return done

    def open(self) -> Path | None:
        """Makes the work folder; the checkpoint of the same run to go on from, if there is one."""
        record = self.work / "recipe.json"
        if not self._is_same(record):
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(record, self.identity)
        checkpoint = last_checkpoint(self.work)
        if checkpoint:
            self.say(f"{self.output}: going on from step {checkpoint.name.removeprefix('checkpoint-')}")
        return checkpoint

    def publish(self, write: Callable[[Path], None], results: Mapping[str, Any]) -> Path:
        """Writes the result and its record, and removes the work folder."""
        old = [item.name for item in self.output.iterdir()] if self.output.is_dir() else []
        with new_folder(self.output, replaces=old) as folder:
            write(folder)
            write_json(folder / RECORD, {**self.identity, **results})
        shutil.rmtree(self.work, ignore_errors=True)
        return self.output

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def _is_same(self, record: Path) -> bool:
        try:
            found = read_json(record)
        except (NotFoundError, TruncatedFileError):
            return False
        here = json.loads(json.dumps(self.identity))
        return bool({key: found.get(key) for key in here} == here)

    def settings(self) -> TrainingArguments:
        """The recipe as transformers' TrainingArguments: AdamW, cosine, gradients clipped to norm 1."""
        recipe = self.recipe
        made = TrainingArguments(
            output_dir=str(self.work),
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.batch_size,
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
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            train_sampling_strategy="sequential",  # the order is planned beforehand, see data.plan_batches
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to=["tensorboard"] if is_tensorboard_available() and not self.console.quiet else [],
            disable_tqdm=True,
            log_level="error",
            use_cpu=not torch.accelerator.is_available(),
        )
        if made.world_size > 1:
            recipe.refuse("launch", "one process", f"{made.world_size}")
        if made.n_gpu > 1:
            made._n_gpu = 1  # batches are planned for one device
        return made

    @contextmanager
    def bar(self) -> Iterator[list[TrainerCallback]]:
        """The callbacks that show the run; whatever happens, the terminal is left in order."""
        if self.console.quiet:
            yield []
            return
        bar = ProgressBar(self.console)
        try:
            yield [bar]
        except KeyboardInterrupt:
            bar.close()
            self.say("stopped, and the last step is kept: run the same command again to go on from there")
            raise
        finally:
            bar.close()


class ProgressBar(TrainerCallback):
    """One rich bar: steps, loss, tokens per second, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=None, note="")
        self._tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens_before = state.num_input_tokens_seen
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        seconds = self._bar.tasks[0].elapsed
        if logs and "loss" in logs and seconds:
            speed = (state.num_input_tokens_seen - self._tokens_before) / seconds
            self._bar.update(
                self._task, completed=state.global_step, note=f"loss {logs['loss']:.3f}  {speed:,.0f} tokens/s"
            )

    def close(self) -> None:
        self._bar.stop()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        NotFoundError: the base has none within reach.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_base(source))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise NotFoundError(f"base model {source}: no tokenizer within reach ({reason})") from None


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: what is padded is masked and has no labels."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing and shows no bars of its own inside the block."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""How a run is shown: bars on the terminal, curves for TensorBoard. Knows nothing of what is trained."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SPEED_OVER = 20  # steps


@contextmanager
def counting(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that goes when the block ends; the function given counts one more as done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


class ProgressBar(TrainerCallback):
    """One rich bar on one line: steps, loss, tokens per second over the last steps, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task("training", total=None, note="")
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SPEED_OVER + 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.append((time.monotonic(), state.num_input_tokens_seen))
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
        if logs and "loss" in logs:
            self._seen.append((time.monotonic(), state.num_input_tokens_seen))
            note = f"loss {logs['loss']:.3f}  {speed(self._seen):,.0f} tokens/s"
            self._bar.update(self._task, completed=state.global_step, note=note)

    def close(self) -> None:
        self._bar.stop()


class Curves(TrainerCallback):
    """Everything that is logged, for TensorBoard. A resumed run goes on where its checkpoint stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            resumed = state.global_step > 0
            self._writer = SummaryWriter(self.folder, purge_step=state.global_step + 1 if resumed else None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, value in (logs or {}).items() if self._writer else ():
            name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
            self._writer.add_scalar(name, value, state.global_step)
        if self._writer:
            self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def speed(seen: Sequence[tuple[float, int]]) -> float:
    """Tokens per second between the first and the last of (seconds, tokens so far)."""
    (start, before), (now, after) = seen[0], seen[-1]
    return (after - before) / (now - start) if now > start else 0.0

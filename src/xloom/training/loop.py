"""One training loop for experts and heads: transformers' Trainer with a loss at completion tokens only.

Knows nothing of recipes, files of results, or of what is trained: whatever has `requires_grad` is. Checkpoints hold
that alone, and nothing of the base. Several processes share the rows of every batch and see the same losses as one.
Letters: B batch  K kept positions at the end  V vocabulary
"""

import dataclasses
import inspect
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from xloom.errors import CheckpointError, ConfigError, DivergedError
from xloom.hub.files import read_json, read_tensors
from xloom.training import checkpoint as files
from xloom.training import history, processes
from xloom.training.checkpoint import last_checkpoint
from xloom.training.data import Example, collate, plan_batches
from xloom.training.objective import IGNORED, token_losses
from xloom.training.sharing import can_share, common_beginning, shared_outputs

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass
class Settings(TrainingArguments):
    """TrainingArguments, and when to stop early: after `patience` validations without a lower loss (None: never)."""

    patience: int | None = None


class Planned(Dataset[Example]):
    """Examples in the order of a whole run."""

    def __init__(self, examples: Sequence[Example], order: Sequence[int]) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.order[index]]


def row_losses(logits_BKV: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of next-token cross-entropies, and number of tokens, of every row [B]."""
    return token_losses(logits_BKV, labels_BK).sum(dim=1), (labels_BK[:, 1:] != IGNORED).sum(dim=1)


def loss_names(row: Example) -> set[str]:
    """Under which names a row's loss counts: that of all rows, and that of its domain."""
    return {"loss", f"loss_{row.domain}" if row.domain else "loss"}


class CompletionTrainer(Trainer):
    """Trains what has `requires_grad` on the completions of examples.

    Args:
        model: a causal model, a PEFT model or an `XLoraForCausalLM`.
        settings: `max_steps` and the batch size, over all processes, give the order of rows.
        train, valid: examples; `valid` may be empty.

    Raises:
        ConfigError: the launcher asks for FSDP or DeepSpeed.
    """

    control: Any
    state: Any

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        train: Sequence[Example],
        valid: Sequence[Example],
        *,
        pad_id: int,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.pad_id = pad_id
        self.patience = settings.patience
        self.step_totals: dict[str, float] = {}
        self.asked = self.stopping = False  # by a signal here; agreed on by all processes
        self._sums: dict[str, Tensor] = {}
        self._parts: dict[str, float] = {}
        self._best: dict[str, Tensor] | None = None
        self._seconds, self._since = 0.0, time.monotonic()
        super().__init__(
            model=model,
            args=settings,
            data_collator=self.collate,
            train_dataset=Planned(train, self.plan(train, settings)),
            eval_dataset=sorted(valid, key=lambda e: len(e.input_ids)),
            callbacks=[*callbacks, _Watch(self)],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError("training: expected processes that each hold the whole model, found FSDP or DeepSpeed")
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is one over all tokens of a step
        self._takes_positions = "position_ids" in inspect.signature(_unwrapped(model).forward).parameters
        self.shares = self._takes_positions and not settings.gradient_checkpointing and processes.count() == 1
        self.shares &= can_share(_unwrapped(model).config)

    def plan(self, train: Sequence[Example], settings: Settings) -> list[int]:
        """Row numbers of the whole run. Processes take turns at each batch's parts, so their number changes nothing."""
        size = settings.per_device_train_batch_size * processes.count()
        batches = settings.max_steps * settings.gradient_accumulation_steps
        return plan_batches([len(e.input_ids) for e in train], size, batches, settings.seed)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return collate(examples, self.pad_id) | {"shared": common_beginning(examples) if self.shares else 0}

    # --- the loss ---

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """One forward (two, where the rows begin alike), with logits at the last `keep` positions."""
        if batch["shared"]:
            return shared_outputs(lambda _, inputs: model(**inputs, use_cache=True), batch, _unwrapped(model).config)
        wanted = ["input_ids", "attention_mask", *(["position_ids"] if self._takes_positions else [])]
        return model(**{key: batch[key] for key in wanted}, logits_to_keep=batch["keep"], use_cache=False)

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        """What the terms are means over, in one batch; `step_totals` has their sums over a whole step."""
        return {"tokens": float((batch["labels"][:, 1:] != IGNORED).sum())}

    def terms(self, out: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The parts of the loss by name, each divided by a total of the step: batches of a step add up."""
        losses_B, _ = row_losses(out.logits, batch["labels"])
        return {"cross_entropy": losses_B.sum() / self.step_totals["tokens"]}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        totals: Counter[str] = Counter()
        for batch in batches:
            totals.update(self.counts(batch))
        self.step_totals = {name: max(total, 1.0) for name, total in processes.totals(totals).items()}
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        out = self.outputs(model, inputs)
        terms = self.terms(out, inputs)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term.detach()
        # gradients (and logged losses) are averaged over processes, but the terms of all processes add up
        loss = torch.stack(list(terms.values())).sum() * processes.count()
        return (loss, out) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before the weights are changed: the place to refuse a step, alike on all processes."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._parts = processes.totals({name: term.item() for name, term in self._sums.items()})
        self._sums = {}
        loss = sum(self._parts.values())
        if not math.isfinite(loss):
            self._refuse(f"the loss is {loss}")
        if not math.isfinite(norm):
            self._refuse(f"the gradient's norm is {float(norm)}")
        return norm

    def _refuse(self, what: str) -> None:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"step {files.step_of(last)} is kept in {last.parent}" if last else "no step is kept yet"
        raise DivergedError(f"step {self.state.global_step + 1}: {what}; lower learning_rate ({kept})")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {f"{history.PART}{name}": value for name, value in self._parts.items()}
        logs["seconds"] = self._seconds + time.monotonic() - self._since
        super().log(logs)

    # --- validation ---

    def forwards(self, examples: Sequence[Example]) -> Iterator[tuple[dict[str, Any], list[Example], Any]]:
        """This process's share of batches of examples with the model's outputs, without gradients or dropout."""
        assert self.model is not None
        self.model.eval()
        size = self.args.per_device_train_batch_size
        for start in range(size * processes.index(), len(examples), size * processes.count()):
            rows = list(examples[start : start + size])
            batch = self._prepare_inputs(self.collate(rows))
            with torch.no_grad():
                out = self.outputs(self.model, batch)
            yield batch, rows, out

    def measure(self) -> dict[str, Any]:
        """Loss per completion token on the validation rows, in all and by domain, and the means of `observe`."""
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for batch, rows, out in self.forwards(self.validation):
            losses_B, tokens_B = row_losses(out.logits, batch["labels"])
            for name, (total, count) in (self.observe(batch, out) or {}).items():
                sums[name] += total  # type: ignore[assignment]
                counts[name] += count  # type: ignore[assignment]
            for row, loss, tokens in zip(rows, losses_B.tolist(), tokens_B.tolist(), strict=True):
                for key in loss_names(row):
                    sums[key] += loss
                    counts[key] += tokens
        all_sums, all_counts = processes.totals(sums), processes.totals(counts)
        return {key: all_sums[key] / all_counts[key] for key in sorted(all_sums) if all_counts[key]}

    def observe(self, batch: dict[str, Any], out: Any) -> Mapping[str, tuple[float, float]] | None:
        """Told of every validation batch of this process; sums and counts by name, whose quotients `measure` adds."""

    @property
    def validation(self) -> list[Example]:
        found = self.eval_dataset
        assert isinstance(found, list)
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {f"{history.EVAL}{key}": value for key, value in self.measure().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.patience is not None:
            if history.best_step(self.state.log_history) == self.state.global_step:
                self._best = self._copy()
            if history.stopped_early(self.state.log_history, self.patience):
                self.control.should_training_stop = self.control.should_save = True
        self.heed()
        return metrics

    # --- stopping ---

    @property
    def ended(self) -> bool:
        """True when there is no further step to make."""
        early = history.stopped_early(self.state.log_history, self.patience)
        return early or self.state.global_step >= self.args.max_steps

    def heed(self, save: bool = True) -> None:
        """Stops, and saves, if a process was asked to; all of them take part."""
        if processes.any_of(self.asked) and not self.ended:
            self.stopping = True
            self.control.should_training_stop = True
            self.control.should_save |= save

    def summary(self) -> dict[str, Any]:
        """What training.json tells of the run, see `history.record`, and `validation` of what is published."""
        return history.record(self.state.log_history, self.patience) | {"validation": self.measure()}

    # --- checkpoints ---

    def trained(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""
        assert self.model is not None
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.trained().items()}

    def _put(self, saved: Mapping[str, Tensor], where: str) -> None:
        here = self.trained()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in here.items()}:
            raise CheckpointError(f"{where}: its tensors are not those of this run; delete the folder")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer would write the base and a pickle of its settings."""
        raise RuntimeError("checkpoints are written by _save_checkpoint")

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.store_flos()
        optimizer, values = files.optimizer_state(self.optimizer)
        random, random_values = files.random_states(processes.gather(files.random_state()))
        tensors = {files.WEIGHTS: self._copy(), files.OPTIMIZER: optimizer, files.RANDOM: random}
        if self._best is not None:
            tensors[files.BEST] = self._best
        texts = {
            files.OPTIMIZER_VALUES: values | {"schedule": self.lr_scheduler.state_dict()},
            files.RANDOM_VALUES: random_values,
            files.STATE: dataclasses.asdict(self.state),
        }
        work, step = Path(self.args.output_dir), self.state.global_step
        processes.first(lambda: files.write_checkpoint(work, step, tensors, texts))
        self.heed(save=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._put(read_tensors(folder / files.WEIGHTS), resume_from_checkpoint)
        if (folder / files.BEST).is_file():
            self._best = read_tensors(folder / files.BEST)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            values = read_json(Path(checkpoint) / files.OPTIMIZER_VALUES)
            files.set_optimizer_state(self.optimizer, read_tensors(Path(checkpoint) / files.OPTIMIZER), values)
            self.lr_scheduler.load_state_dict(values["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        found = files.read_random_state(Path(checkpoint), processes.index()) if checkpoint else None
        if found is not None:
            files.set_random_state(*found)

    def _resume_ended(self, checkpoint: Path) -> bool:
        """Takes over a checkpoint after which there is nothing to train, as it is; False if there is."""
        before, self.state = self.state, TrainerState.load_from_json(str(checkpoint / files.STATE))
        if self.ended:
            self._load_from_checkpoint(str(checkpoint))
            return True
        self.state = before
        return False


def train(trainer: CompletionTrainer, checkpoint: Path | None) -> None:
    """Runs to the end; with early stopping, the model then has the weights of the best validation.

    Ctrl-C or SIGTERM finishes the step (and a validation or checkpoint that is under way), writes a checkpoint and
    raises KeyboardInterrupt; a second one interrupts at once.

    Raises:
        DivergedError: a loss, a gradient or a trained weight is not finite.
        CheckpointError: a checkpoint cannot be written.
    """
    with _asking(trainer):
        if checkpoint is None or not trainer._resume_ended(checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopping:
        raise KeyboardInterrupt
    if trainer._best is not None:
        trainer._put(trainer._best, "best weights")
    for name, tensor in trainer.trained().items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(f"step {trainer.state.global_step}: weight {name} holds NaN or infinity")


class _Watch(TrainerCallback):
    """Tells the trainer of what Trainer has no methods for."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = state.log_history
        self.trainer._seconds = logs[-1].get("seconds", 0.0) if logs else 0.0
        self.trainer._since = time.monotonic()
        if processes.count() > 1:  # or all processes would drop out the same
            set_seed(args.seed + state.global_step * processes.count() + processes.index())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.heed()


@contextmanager
def _asking(trainer: CompletionTrainer) -> Iterator[None]:
    """Inside the block the first signal asks to stop; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if trainer.asked:
            raise KeyboardInterrupt
        trainer.asked = True

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwrapped(model: nn.Module) -> nn.Module:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model

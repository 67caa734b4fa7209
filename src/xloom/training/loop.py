"""One training loop for experts and heads: transformers' Trainer with a loss at completion tokens only.

Knows nothing of recipes, files of results, or of what is trained: whatever has `requires_grad` is. Checkpoints hold
that alone, as safetensors, and nothing of the base. The optimizer, scheduler and random states beside it are
Trainer's own `.pt` and `.pth` files: pickles, read with `weights_only`, private to the work folder that they resume.
Letters: B batch  K kept positions at the end  V vocabulary
"""

import inspect
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xloom.errors import CheckpointError, DivergedError
from xloom.files import read_tensors, write_tensors
from xloom.training.data import IGNORED, Example, collate, plan_batches

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"


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
    logits_BKV = logits_BKV[:, :-1]
    if logits_BKV.dtype != torch.float64:
        logits_BKV = logits_BKV.float()
    wanted_BK = labels_BK[:, 1:]
    losses_BK = F.cross_entropy(logits_BKV.transpose(1, 2), wanted_BK, ignore_index=IGNORED, reduction="none")
    return losses_BK.sum(dim=1), (wanted_BK != IGNORED).sum(dim=1)


class CompletionTrainer(Trainer):
    """Trains what has `requires_grad` on the completions of examples.

    Args:
        model: a causal model, a PEFT model or an `XLoraForCausalLM`.
        settings: from `training_arguments`; `max_steps` and the batch size give the order of rows.
        train, valid: examples; `valid` may be empty.
        experts: names that a row's domain may be.
    """

    control: Any

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingArguments,
        train: Sequence[Example],
        valid: Sequence[Example],
        *,
        pad_id: int,
        experts: Sequence[str] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.pad_id, self.experts = pad_id, tuple(experts)
        self.step_totals: dict[str, float] = {}
        batches = settings.max_steps * settings.gradient_accumulation_steps
        size = settings.per_device_train_batch_size
        order = plan_batches([len(e.input_ids) for e in train], size, batches, settings.seed)
        super().__init__(
            model=model,
            args=settings,
            data_collator=self.collate,
            train_dataset=Planned(train, order),
            eval_dataset=sorted(valid, key=lambda e: len(e.input_ids)),
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is one over all tokens of a step
        self._takes_positions = "position_ids" in inspect.signature(_unwrapped(model).forward).parameters

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return collate(examples, self.pad_id, self.experts)

    # --- the loss ---

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """One forward, with logits at the last `keep` positions."""
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
        self.step_totals = {name: max(total, 1.0) for name, total in totals.items()}
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        out = self.outputs(model, inputs)
        loss = torch.stack(list(self.terms(out, inputs).values())).sum()
        if not torch.isfinite(loss):
            raise DivergedError(f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower learning_rate")
        return (loss, out) if return_outputs else loss

    # --- validation ---

    def forwards(self, examples: Sequence[Example]) -> Iterator[tuple[dict[str, Any], list[Example], Any]]:
        """Batches of examples with the model's outputs, without gradients or dropout."""
        assert self.model is not None
        self.model.eval()
        size = self.args.per_device_train_batch_size
        for start in range(0, len(examples), size):
            rows = list(examples[start : start + size])
            batch = self._prepare_inputs(self.collate(rows))
            with torch.no_grad():
                out = self.outputs(self.model, batch)
            yield batch, rows, out

    def measure(self) -> dict[str, Any]:
        """Loss per completion token on the validation rows, in all and by domain."""
        sums: dict[str, list[float]] = {}
        for batch, rows, out in self.forwards(self.validation):
            losses_B, tokens_B = row_losses(out.logits, batch["labels"])
            self.observe(batch, out)
            for row, loss, tokens in zip(rows, losses_B.tolist(), tokens_B.tolist(), strict=True):
                for key in {"loss", f"loss_{row.domain}" if row.domain else "loss"}:
                    total = sums.setdefault(key, [0.0, 0.0])
                    total[0] += loss
                    total[1] += tokens
        return {key: loss / tokens for key, (loss, tokens) in sorted(sums.items())}

    def observe(self, batch: dict[str, Any], out: Any) -> None:
        """Told of every validation batch."""

    @property
    def validation(self) -> list[Example]:
        found = self.eval_dataset
        assert isinstance(found, list)
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {f"eval_{key}": value for key, value in self.measure().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints ---

    def trained(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""
        assert self.model is not None
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.trained())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved, here = read_tensors(Path(resume_from_checkpoint) / WEIGHTS), self.trained()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in here.items()}:
            raise CheckpointError(f"{resume_from_checkpoint}: its tensors are not those of this run; delete the folder")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name])


def train(trainer: CompletionTrainer, checkpoint: Path | None) -> None:
    """Runs to the end. Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.

    Raises:
        DivergedError: the loss or a trained weight is not finite.
    """
    stop = _StopAfterStep()
    trainer.add_callback(stop)
    with stop.on_interrupt():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked and trainer.state.global_step < trainer.args.max_steps:
        raise KeyboardInterrupt
    for name, tensor in trainer.trained().items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(f"step {trainer.state.global_step}: weight {name} holds NaN or infinity")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its state file, which is written last, can be read."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


class _StopAfterStep(TrainerCallback):
    """Turns the first Ctrl-C into "save and stop after this step"; the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.asked:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        return control


def _unwrapped(model: nn.Module) -> nn.Module:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model

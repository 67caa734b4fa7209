"""The systems whose training is compared: one base, the same experts and the same head in each.

    peft                         PEFT's X-LoRA: both passes at every step
    xloom                        both passes at every step
    xloom-cached                 what the head reads was computed beforehand: one pass
    xloom-cached-checkpointing   the same, with gradient checkpointing
    xloom-early-gate             another model: the head reads what enters layer L//3, experts act from there on;
                                 computed beforehand too, so that a step starts at that layer

Only the head is trained. Knows nothing of clocks or of memory.
Letters: B batch  T tokens  K kept positions at the end  V vocabulary  D hidden size
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xloom.benchmark import systems
from xloom.benchmark.parts import SEED, Parts
from xloom.errors import ConfigError, names
from xloom.model import XLoraForCausalLM
from xloom.training.loop import row_losses

LEARNING_RATE = 1e-3
LARGEST_NORM = 1.0


class Batch(NamedTuple):
    """Rows without padding, of which the last `labels_BK.shape[1] - 1` tokens are to be predicted."""

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    labels_BK: Tensor


def random_batch(vocab: int, *, rows: int, tokens: int, completion: int, device: str) -> Batch:
    """Random tokens; the same for the same numbers. Raises ConfigError: the completion leaves no token before it."""
    if completion >= tokens:
        raise ConfigError(f"completion must be below tokens ({tokens}), found {completion}")
    generator = torch.Generator().manual_seed(SEED)
    ids_BT = torch.randint(0, vocab, (rows, tokens), generator=generator).to(device)
    positions_BT = torch.arange(tokens, device=device).expand(rows, -1)
    return Batch(ids_BT, torch.ones_like(ids_BT), positions_BT, ids_BT[:, -completion - 1 :])


@dataclass(frozen=True)
class Kind:
    """Which model a system is, and how it is trained.

    Args:
        model: name in `systems.BUILDERS`.
        cached: what the head reads is computed beforehand.
        exact: its loss and gradients must be those of PEFT's X-LoRA.
    """

    model: str
    cached: bool = False
    checkpointing: bool = False
    exact: bool = True


KINDS = {
    "peft": Kind("peft"),
    "xloom": Kind("xloom"),
    "xloom-cached": Kind("xloom", cached=True),
    "xloom-cached-checkpointing": Kind("xloom", cached=True, checkpointing=True),
    "xloom-early-gate": Kind("xloom-early-gate", cached=True, exact=False),
}


@dataclass(frozen=True)
class Learner:
    """A model, its head, and the optimizer of that head."""

    name: str
    kind: Kind
    model: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer

    def fill(self, batch: Batch) -> Tensor | None:
        """What the head reads [B, T, D], where this system computes it beforehand."""
        if not self.kind.cached:
            return None
        assert isinstance(self.model, XLoraForCausalLM)
        return self.model.compute_head_states(batch.ids_BT, batch.mask_BT)

    def backward(self, batch: Batch, states_BTD: Tensor | None) -> Tensor:
        """Loss per completion token; the head has its gradients afterwards."""
        self.optimizer.zero_grad(set_to_none=True)
        given = {} if states_BTD is None else {"head_states": states_BTD}
        logits_BKV = self.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            position_ids=batch.positions_BT,
            logits_to_keep=batch.labels_BK.shape[1],
            use_cache=False,
            **given,
        ).logits
        losses_B, tokens_B = row_losses(logits_BKV, batch.labels_BK)
        loss = losses_B.sum() / tokens_B.sum()
        torch.autograd.backward(loss)
        return loss.detach()

    def gradient(self) -> Tensor:
        """The head's gradients as one vector."""
        return torch.cat([p.grad.flatten() for p in self.head.parameters() if p.grad is not None])

    def step(self, batch: Batch, states_BTD: Tensor | None) -> Tensor:
        """One optimizer step: forward, loss, backward, clipping, AdamW. Returns the loss before it."""
        loss = self.backward(batch, states_BTD)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), LARGEST_NORM)
        self.optimizer.step()
        return loss


def build(name: str, parts: Parts) -> Learner:
    """Everything but the head is frozen; the base's dropout is off, except where checkpointing needs training mode."""
    check_names([name])
    kind = KINDS[name]
    model = systems.build(kind.model, parts).model.requires_grad_(False)
    head = model.head if isinstance(model, XLoraForCausalLM) else model.get_submodule(_PEFT_HEAD)
    head.requires_grad_(True)
    if kind.checkpointing:
        assert isinstance(model, XLoraForCausalLM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is to be renamed in transformers 6
            model.gradient_checkpointing_enable()
        model.train()
    return Learner(name, kind, model, head, torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE))


def check_names(wanted: Sequence[str]) -> None:
    """Raises ConfigError for names of systems that do not exist."""
    unknown = [name for name in wanted if name not in KINDS]
    if unknown:
        raise ConfigError(f"unknown system {names(map(repr, unknown))}; known are {names(KINDS, 20)}")


_PEFT_HEAD = "base_model.internal_xlora_classifier"

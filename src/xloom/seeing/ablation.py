"""What the mixing is worth: an expert is turned off, and what the model then says is compared.

    mixed       the head as it is
    without X   X masked out of the head: its share goes to the others, and to the null expert where there is one
    only X      all others masked out
    base        no expert at all

Of each row, the loss of the given answer; and whether the model's own greedy answer would change, which it does where
a token of it is no longer the likeliest. One forward per row and variant tells both; what the head reads is computed
once for all of them. Knows nothing of traces' files.
Letters: B batch  K kept positions at the end  Q variants  R rows  V vocabulary  X texts
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloom.decoding.batch import end_tokens, in_batches, write
from xloom.decoding.request import Request
from xloom.errors import DataError
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Router, XLora
from xloom.seeing.intervals import RESAMPLES, bootstrap
from xloom.seeing.tracing import MAX_NEW_TOKENS, room_after
from xloom.training.data import Example, collate, tokenise_all
from xloom.training.objective import IGNORED, token_losses
from xloom.training.rows import Row

MIXED, BASE, WITHOUT, ONLY = "mixed", "base", "without", "only"
BATCH_TOKENS = 2048  # rows times tokens of a forward


@dataclass(frozen=True)
class Variant:
    """One way to run the model. `kind` is "mixed", "base", "without" or "only"; the last two have an `expert`."""

    kind: str
    expert: str | None = None

    def __str__(self) -> str:
        return self.kind if self.expert is None else f"{self.kind} {self.expert}"

    def router(self) -> Router:
        if self.kind == BASE:
            return BaseOnly()
        chosen = [self.expert] if self.expert is not None else []
        return XLora(only=chosen) if self.kind == ONLY else XLora(without=chosen)


@dataclass(frozen=True, eq=False)
class Worth:
    """What each variant does on each row.

    Attributes:
        variants: "mixed" is the first.
        rows: where each row comes from.
        losses_QR: [Q, R] mean loss of the given answer in nats per token, float64.
        changed_QR: [Q, R] bool, whether the mixed model's greedy answer would be another.
        answers: the mixed model's greedy answer to each row.
        changed_answers: by variant and row, what is written instead; only where it was asked for, and changed.
    """

    variants: tuple[Variant, ...]
    rows: tuple[str, ...]
    losses_QR: Tensor
    changed_QR: Tensor
    answers: tuple[str, ...]
    changed_answers: dict[tuple[Variant, int], str]

    def table(self, *, resamples: int = RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
        """One flat row for each variant, each row of the data counting alike.

        `loss` in nats per token; `change` of the loss against "mixed" with its 95 % interval `low`, `high` over rows
        (paired): above 0 the variant is worse. `changed` is the part of greedy answers that change.
        """
        out = []
        for variant, losses_R, changed_R in zip(self.variants, self.losses_QR, self.changed_QR, strict=True):
            found = bootstrap((losses_R - self.losses_QR[0]).numpy(), resamples=resamples, seed=seed)
            out.append(
                {
                    "variant": str(variant),
                    "kind": variant.kind,
                    "expert": variant.expert,
                    "rows": len(self.rows),
                    "loss": float(losses_R.mean()),
                    "change": found.value,
                    "low": found.low,
                    "high": found.high,
                    "changed": float(changed_R.double().mean()),
                }
            )
        return out

    def by_row(self) -> list[dict[str, Any]]:
        """One flat row for each variant and row of the data: `row`, `variant`, `loss`, `change`, `changed`, `answer`.

        `answer` is the greedy one, or None where it changes and was not written.
        """
        out = []
        for q, variant in enumerate(self.variants):
            for r, where in enumerate(self.rows):
                changed = bool(self.changed_QR[q, r])
                loss, mixed = float(self.losses_QR[q, r]), float(self.losses_QR[0, r])
                answer = self.changed_answers.get((variant, r)) if changed else self.answers[r]
                flat = {"row": where, "variant": str(variant), "kind": variant.kind, "expert": variant.expert}
                out.append({**flat, "loss": loss, "change": loss - mixed, "changed": changed, "answer": answer})
        return out


@torch.no_grad()
def worth(
    model: XLoraForCausalLM,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    write_changed: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> Worth:
    """What every expert is worth to the model's own head, on rows with a right answer.

    Args:
        max_new_tokens: of the greedy answers.
        write_changed: write also the answers of the variants that change them, which takes longer.
        batch_tokens: bound on rows times tokens of a forward.

    Raises:
        DataError: no rows, or a wrong one.
        PromptError: the tokenizer lacks what they need, or the model's window has no room for an answer.
    """
    if not rows:
        raise DataError("expected rows with a prompt and its right answer, found none")
    given = [Example(ids, start) for ids, start in tokenise_all(rows, tokenizer)]
    variants = tuple(_variants(model.experts))
    room = room_after(model, max(example.completion_start for example in given), max_new_tokens)
    writer = _Greedy(model, tokenizer, room, batch_tokens)
    written = writer.answers(given, variants[0])
    texts = list(dict.fromkeys([*given, *written]))  # a right answer that the model gives is read once
    losses_QX = torch.zeros(len(variants), len(texts), dtype=torch.float64)
    changed_QX = torch.zeros(len(variants), len(texts), dtype=torch.bool)
    for q, places, logits_BKV, labels_BK in _forwards(model, texts, variants, batch_tokens):
        is_answer_BK = labels_BK[:, 1:] != IGNORED
        losses_QX[q, places] = (token_losses(logits_BKV, labels_BK).double().sum(1) / is_answer_BK.sum(1)).cpu()
        same_BK = logits_BKV[:, :-1].argmax(dim=-1) == labels_BK[:, 1:]
        if q == 0:  # where two tokens are nearly as likely, reading may see another one than writing did
            sure_BK = same_BK
        changed_QX[q, places] = (sure_BK & ~same_BK & is_answer_BK).any(dim=1).cpu()
    losses_QR = losses_QX[:, [texts.index(example) for example in given]]
    changed_QR = changed_QX[:, [texts.index(example) for example in written]]
    changed: dict[tuple[Variant, int], str] = {}
    for q, variant in enumerate(variants if write_changed else ()):
        odd = changed_QR[q].nonzero()[:, 0].tolist()
        others = writer.texts(writer.answers([given[i] for i in odd], variant))
        changed |= {(variant, i): text for i, text in zip(odd, others, strict=True)}
    where = tuple(row.where for row in rows)
    return Worth(variants, where, losses_QR, changed_QR, tuple(writer.texts(written)), changed)


def _variants(experts: Sequence[str]) -> Iterator[Variant]:
    yield Variant(MIXED)
    yield Variant(BASE)
    if len(experts) > 1:  # one expert without itself is the base
        yield from (Variant(WITHOUT, expert) for expert in experts)
    yield from (Variant(ONLY, expert) for expert in experts)


def _forwards(
    model: XLoraForCausalLM, examples: Sequence[Example], variants: Sequence[Variant], batch_tokens: int
) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
    """Every variant on every batch: its place, those of the rows, logits [B, K, V] and labels [B, K] of the answers."""
    lengths = [len(example.input_ids) for example in examples]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for places in in_batches(order, lengths, batch_tokens):
        batch = collate([examples[i] for i in places], pad_id=0)
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "position_ids")}
        states_BTD = model.compute_head_states(inputs["input_ids"], inputs["attention_mask"])
        for q, variant in enumerate(variants):
            asked = {"head_states": states_BTD, "logits_to_keep": batch["keep"], "use_cache": False}
            out = model(**inputs, **asked, routing=variant.router())
            yield q, places, out.logits, batch["labels"].to(model.device)


class _Greedy:
    """Writes greedy answers, several at a time."""

    def __init__(self, model: XLoraForCausalLM, tokenizer: Any, max_new_tokens: int, batch_tokens: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._new, self._batch_tokens = max_new_tokens, batch_tokens
        self._ends = end_tokens(model, tokenizer)

    def answers(self, examples: Sequence[Example], variant: Variant) -> list[Example]:
        """The examples' prompts with what the variant writes after them, an end token among it."""
        prompts = [example.input_ids[: example.completion_start] for example in examples]
        routing, options = self._model.routing_of(variant.router()), {"eos_token_id": self._ends or None}
        requests = [Request(ids, self._new, routing, options=options) for ids in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        for place, step, _ in write(self._model, None, requests, batch_tokens=self._batch_tokens):
            written[place].append(step.token_id)
        return [Example((*ids, *more), len(ids)) for ids, more in zip(prompts, written, strict=True)]

    def texts(self, examples: Sequence[Example]) -> list[str]:
        answers = [example.input_ids[example.completion_start :] for example in examples]
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

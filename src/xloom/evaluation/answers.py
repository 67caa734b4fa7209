"""Greedy answers to many short prompts, and the loss of the right ones.

Takes token ids, each with a routing of its own, to `xloom.decoding.batch`; gives texts and what each expert weighed.
Knows nothing of tasks or scorers.
Letters: B batch  T tokens  S sites  N experts  V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloom.decoding.batch import BATCH_TOKENS, end_tokens, in_batches, padded, write
from xloom.decoding.request import Request
from xloom.model import XLoraForCausalLM
from xloom.routers import Routed, Routing


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, and how many new tokens at most.

    An answer is over at the text `stop`, which is no part of it; blanks before the answer aside.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    stop: str | None = None

    def is_over(self, text: str) -> bool:
        return self.stop is not None and self.stop in text.lstrip()

    def answer(self, text: str) -> str:
        text = text.strip()
        return text if self.stop is None else text.partition(self.stop)[0].rstrip()


@dataclass(frozen=True)
class Answer:
    """What was written. `weights` is every expert's mean scaling over the written tokens (the end token among them,
    where there is one) and all sites. `cut` says that the answer did not end by itself: there were no more tokens."""

    text: str
    tokens: int
    weights: tuple[float, ...] = ()
    cut: bool = False


def answers(
    model: XLoraForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    routing: Routed | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    share_prefix: bool = True,
) -> Iterator[dict[int, Answer]]:
    """Answers, batch by batch, by the prompts' places in the list.

    Args:
        routing: who decides: a router for all prompts, or a list with one for each; None: as in the
            `with model.routing(...)` around, or the head.
        batch_tokens, share_prefix: as in `decoding.write`.
    """
    options = {"eos_token_id": end_tokens(model, tokenizer) or None}
    requests = [
        Request(prompt.ids, prompt.max_new_tokens, routing, prompt.is_over if prompt.stop else None, options)
        for prompt, routing in zip(prompts, _each(model, routing, len(prompts)), strict=True)
    ]
    ids: dict[int, list[int]] = {}  # of answers that are being written
    totals: dict[int, Tensor] = {}
    done: dict[int, Answer] = {}
    for place, step, end in write(model, tokenizer, requests, batch_tokens=batch_tokens, share_prefix=share_prefix):
        weights_N = step.scalings.float().mean(dim=0)
        ids.setdefault(place, []).append(step.token_id)
        totals[place] = totals[place] + weights_N if place in totals else weights_N
        if end is None:
            continue
        written = ids.pop(place)
        text = prompts[place].answer(tokenizer.decode(written, skip_special_tokens=True))
        done[place] = Answer(text, len(written), tuple((totals.pop(place) / len(written)).tolist()), end == "length")
        if not ids:
            yield done
            done = {}


def losses(
    model: XLoraForCausalLM,
    rows: Sequence[tuple[tuple[int, ...], int]],
    routing: Routed | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """Mean next-token loss of each right answer, in nats per token, given the prompt.

    Args:
        rows: token ids of prompt and answer, and where the answer starts (`training.data.tokenise`).
        routing: as in `answers`.
        batch_tokens: bound on rows times tokens of one forward.
    """
    routings = _each(model, routing, len(rows))
    out = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for batch in in_batches(order, [len(ids) for ids, _ in rows], batch_tokens):
        some = [rows[i] for i in batch]
        ids_BT, mask_BT = padded([ids for ids, _ in some], model.device)
        keep = max(len(ids) - start for ids, start in some) + 1
        with torch.no_grad():
            logits_BTV = model(
                ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=keep,
                routing=Routing.cat(routings[i] for i in batch), **model.positions(mask_BT),
            ).logits  # fmt: skip
        logs_BTV = logits_BTV[:, :-1].float().log_softmax(dim=-1)
        for row, (i, (ids, start)) in enumerate(zip(batch, some, strict=True)):
            answer = torch.tensor(ids[start:], device=logs_BTV.device)
            out[i] = -logs_BTV[row, -len(answer) :].gather(-1, answer[:, None]).mean().item()
    return out


def _each(model: XLoraForCausalLM, routing: Routed | None, count: int) -> list[Routing]:
    """The routing of each prompt."""
    lines = model.routing_of(routing).for_rows(count)
    return [lines] * count if len(lines) < count else [lines[[row]] for row in range(count)]

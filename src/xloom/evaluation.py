"""How often a model's greedy answer is the right one, per domain and router.

Knows nothing of where rows come from, or of how tables are printed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xloom.model import XLoraForCausalLM
from xloom.routers import Router
from xloom.training.base import pad_id
from xloom.training.data import tokenise_all
from xloom.training.rows import Row


@dataclass(frozen=True)
class Score:
    """Right answers of one router on one domain."""

    router: str
    domain: str
    right: int
    items: int

    @property
    def accuracy(self) -> float:
        return self.right / self.items

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items)

    def as_row(self) -> dict[str, Any]:
        return {
            "router": self.router,
            "domain": self.domain,
            "metric": "exact_match",
            "score": self.accuracy,
            "standard_error": self.standard_error,
            "items": self.items,
        }


@torch.no_grad()
def answers(
    model: XLoraForCausalLM,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, of at most as many tokens as the longest right one needs, in the order of the rows."""
    if not rows:
        return []
    encoded = list(tokenise_all(rows, tokenizer))
    prompts = [ids[:start] for ids, start in encoded]
    longest = max(len(ids) - start for ids, start in encoded)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    pad = pad_id(tokenizer)
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    out = [""] * len(rows)
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        done = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
        )
        for i, text in zip(batch, tokenizer.batch_decode(done[:, width:], skip_special_tokens=True), strict=True):
            out[i] = text.strip()
        on_batch(len(batch))
    return out


def score(
    model: XLoraForCausalLM,
    tokenizer: Any,
    domains: Mapping[str, Sequence[Row]],
    routers: Mapping[str, Router],
    *,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Exact match of every router on every domain."""
    scores = []
    for name, router in routers.items():
        with model.routing(router):
            for domain, rows in domains.items():
                found = answers(model, tokenizer, rows, on_batch=on_batch)
                right = sum(answer == expected(row) for answer, row in zip(found, rows, strict=True))
                scores.append(Score(name, domain, right, len(rows)))
    return scores


def expected(row: Row) -> str:
    """The right answer's text."""
    text = row.completion if isinstance(row.completion, str) else row.completion[-1]["content"]
    return str(text).strip()

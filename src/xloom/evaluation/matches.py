"""Exact match of a few routers on a few domains: what the demo shows. `run.evaluate` compares more, in more ways.

Knows nothing of where rows come from, or of how tables are printed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xloom.evaluation.decoding import BATCH_TOKENS, Prompt, decode
from xloom.model import XLoraForCausalLM
from xloom.routers import Router
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


def answers(
    model: XLoraForCausalLM,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, of at most as many tokens as the longest right one needs, in the order of the rows."""
    encoded = list(tokenise_all(rows, tokenizer))
    longest = max((len(ids) - start for ids, start in encoded), default=0)
    prompts = [Prompt(ids[:start], longest) for ids, start in encoded]
    out = [""] * len(rows)
    for batch in decode(model, tokenizer, prompts, batch_tokens=batch_tokens):
        for place, answer in batch.items():
            out[place] = answer.text
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

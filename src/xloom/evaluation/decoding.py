"""Greedy answers to many short prompts at once, and the loss of the right ones.

    [ prefix | padding | rest of the prompt ]   the prefix that all prompts begin with is computed once, then shared

Takes token ids and a router per batch; gives texts and what each expert weighed. Knows nothing of tasks or scorers.
Letters: B batch  T tokens  S sites  N experts  V vocabulary
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from xloom.cache import new_cache
from xloom.model import XLoraForCausalLM
from xloom.routers import Router
from xloom.training.base import pad_id

BATCH_TOKENS = 1024  # on a CPU more is no faster; a GPU wants more
_SHORTEST_PREFIX = 4  # tokens that are worth a forward of their own

RouterOf = Callable[[Sequence[int]], Router]


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, and how many new tokens at most.

    Prompts of different `group` never share a batch or a prefix: their routers may differ. An answer is over at the
    text `stop`, which is no part of it; blanks before the answer aside.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    group: Hashable = None
    stop: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was written. `weights` is every expert's mean scaling over the written tokens (the end token among them,
    where there is one) and all sites. `cut` says that the answer did not end by itself: there were no more tokens."""

    text: str
    tokens: int
    weights: tuple[float, ...] = ()
    cut: bool = False


@torch.no_grad()
def decode(
    model: XLoraForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    router_of: RouterOf | None = None,
    batch_tokens: int = BATCH_TOKENS,
    share_prefix: bool = True,
) -> Iterator[dict[int, Answer]]:
    """Greedy answers, batch by batch, by the prompts' places in the list.

    Args:
        router_of: the router for the prompts at these places, all of one group; without it, the model's own.
        batch_tokens: bound on rows times tokens that one forward reads.
        share_prefix: compute what the prompts of a group have in common once, where the model allows it.
    """
    router_of = router_of or (lambda rows: model.router)
    ends = end_tokens(model, tokenizer)
    share_prefix = share_prefix and can_share_prefix(model)
    for places in _by_group([prompt.group for prompt in prompts]):
        ids = [prompts[i].ids for i in places]
        size = common_prefix([row[:-1] for row in ids]) if share_prefix else 0
        shared = _Shared(model, ids[0][:size], router_of(places)) if size >= _SHORTEST_PREFIX else None
        size = size if shared else 0
        # rows that may write equally long first, then those of equal length: little padding, and batches end together
        order = sorted(places, key=lambda i: (prompts[i].max_new_tokens, len(prompts[i].ids), i))
        for batch in _batches(order, [len(prompt.ids) - size for prompt in prompts], batch_tokens):
            rows = [prompts[i] for i in batch]
            yield dict(zip(batch, _answer(model, tokenizer, rows, batch, router_of, shared, ends), strict=True))


@torch.no_grad()
def losses(
    model: XLoraForCausalLM,
    tokenizer: Any,
    rows: Sequence[tuple[tuple[int, ...], int]],
    *,
    router_of: RouterOf | None = None,
    groups: Sequence[Hashable] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """Mean next-token loss of each right answer, in nats per token, given the prompt.

    Args:
        rows: token ids of prompt and answer, and where the answer starts (`training.data.tokenise`).
        router_of, groups, batch_tokens: as in `decode`.
    """
    router_of = router_of or (lambda rows: model.router)
    out = [0.0] * len(rows)
    for places in _by_group(groups or [None] * len(rows)):
        order = sorted(places, key=lambda i: len(rows[i][0]))
        for batch in _batches(order, [len(ids) for ids, _ in rows], batch_tokens):
            some = [rows[i] for i in batch]
            keep = max(len(ids) - start for ids, start in some) + 1
            with model.routing(router_of(batch)):
                read = _read(model, [ids for ids, _ in some], None, pad_id(tokenizer), keep)
            logs_BTV = read.logits_BTV[:, :-1].float().log_softmax(dim=-1)
            for row, (i, (ids, start)) in enumerate(zip(batch, some, strict=True)):
                answer = torch.tensor(ids[start:], device=logs_BTV.device)
                out[i] = -logs_BTV[row, -len(answer) :].gather(-1, answer[:, None]).mean().item()
    return out


def end_tokens(model: XLoraForCausalLM, tokenizer: Any) -> frozenset[int]:
    """Ids after which an answer is over: the tokenizer's end token, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def can_share_prefix(model: XLoraForCausalLM) -> bool:
    """Whether every layer of the model's cache keeps all tokens: a sliding window would forget the prefix."""
    return all(type(layer) is DynamicLayer for layer in new_cache(model.config).layers)


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all rows begin."""
    low, high = min(rows), max(rows)  # in the order of sequences, these two differ first
    size = 0
    while size < min(len(low), len(high)) and low[size] == high[size]:
        size += 1
    return size


class _Shared:
    """The cache of a prefix, computed once and handed out in as many rows as asked for."""

    def __init__(self, model: XLoraForCausalLM, ids: tuple[int, ...], router: Router) -> None:
        self.size = len(ids)
        self._cache = new_cache(model.config)
        with model.routing(router):
            model(torch.tensor([ids], device=model.device), past_key_values=self._cache, logits_to_keep=1)

    def rows(self, count: int) -> Cache:
        cache = copy.deepcopy(self._cache)
        cache.batch_select_indices(torch.zeros(count, dtype=torch.long))
        return cache


@dataclass
class _Read:
    """Rows that a forward has read: their mask [B, T], cache, and the forward's last logits and scalings."""

    mask_BT: Tensor
    cache: Cache
    logits_BTV: Tensor
    scalings_BTSN: Tensor

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.mask_BT.device)
        self.mask_BT = self.mask_BT[index]
        self.cache.batch_select_indices(index)


def _read(
    model: XLoraForCausalLM, rows: Sequence[tuple[int, ...]], shared: _Shared | None, pad: int, keep: int = 1
) -> _Read:
    """Reads whole prompts, which all begin with the shared prefix if there is one; logits at the last `keep`."""
    size = shared.size if shared else 0
    width = max(map(len, rows)) - size
    ids = torch.full((len(rows), width), pad)
    mask = torch.ones(len(rows), size + width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        rest = tokens[size:]
        ids[row, width - len(rest) :] = torch.tensor(rest)
        mask[row, size : size + width - len(rest)] = 0
    cache = shared.rows(len(rows)) if shared else new_cache(model.config)
    return _forward(model, ids.to(model.device), mask.to(model.device), cache, keep)


def _forward(model: XLoraForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: Cache, keep: int = 1) -> _Read:
    positions = {name: value[:, -ids_BT.shape[1] :] for name, value in model.positions(mask_BT).items()}
    out = model(ids_BT, attention_mask=mask_BT, past_key_values=cache, logits_to_keep=keep, **positions)
    return _Read(mask_BT, cache, out.logits, out.scalings)


def _answer(
    model: XLoraForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    router_of: RouterOf,
    shared: _Shared | None,
    ends: frozenset[int],
) -> list[Answer]:
    """One batch. Rows leave it as they end, so that a single long answer does not hold up the others."""
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    weights = torch.zeros(len(prompts), len(model.experts))
    alive = list(range(len(prompts)))
    read: _Read | None = None
    while alive:
        with model.routing(router_of([places[row] for row in alive])):
            if read is None:
                read = _read(model, [prompt.ids for prompt in prompts], shared, pad_id(tokenizer))
            else:
                last = torch.tensor([written[row][-1:] for row in alive], device=model.device)
                mask = torch.nn.functional.pad(read.mask_BT, (0, 1), value=1)
                read = _forward(model, last, mask, read.cache)
        weights[alive] += read.scalings_BTSN[:, -1].float().mean(dim=1).cpu()
        for row, token in zip(alive, read.logits_BTV[:, -1].argmax(dim=-1).tolist(), strict=True):
            written[row].append(token)
            ended[row] = token in ends or _stopped(tokenizer, written[row], prompts[row].stop)
        on = [at for at, row in enumerate(alive) if not ended[row] and len(written[row]) < prompts[row].max_new_tokens]
        if on and len(on) < len(alive):
            read.keep(on)
        alive = [alive[at] for at in on]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Answer(_until(text, prompt.stop), len(tokens), tuple((total / len(tokens)).tolist()), not end)
        for text, prompt, tokens, total, end in zip(texts, prompts, written, weights, ended, strict=True)
    ]


def _stopped(tokenizer: Any, tokens: list[int], stop: str | None) -> bool:
    return stop is not None and stop in tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


def _until(text: str, stop: str | None) -> str:
    text = text.strip()
    return text if stop is None else text.partition(stop)[0].rstrip()


def _by_group(groups: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return list(found.values())


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cuts the rows, in their order, so that rows times the longest of them stay within `batch_tokens`."""
    batch: list[int] = []
    longest = 0
    for i in order:
        if batch and max(longest, lengths[i]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, lengths[i])
    if batch:
        yield batch

"""Many texts at once: rows that join and leave a batch at any token, each written as it would be alone.

    batch = Batch(model, tokenizer)
    batch.join(Request(ids, max_new_tokens=64, routing=Single("chem")))
    while batch: for row, step, end in batch.step(): ...

`write` does that for a list of requests. Drafts are for a row that is alone: see `stream`. Knows nothing of tasks or
servers. A batch is one thread's; several batches of one model may run at once.
Letters: B rows  T tokens  S sites  N experts  V vocabulary
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from xloom.cache import for_one_pass, for_two_passes, joined, new_cache, picked, trim
from xloom.decoding.loop import Chooser, Written
from xloom.decoding.stream import Detokenizer, Step, prepared, told
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel
from xloom.routers import Routed, Routing
from xloom.routers.routing import Line

BATCH_TOKENS = 1024  # rows times tokens of one forward; on a CPU more is no faster, a GPU wants more
_SHORTEST_PREFIX = 4  # tokens that are worth a forward of their own

End = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """A text to be gone on with.

    Args:
        ids: tokens of the prompt.
        max_new_tokens: at most so many are written.
        routing: who decides, for this row; None: as in the `with model.routing(...)` around when it joins.
        stop: whether the text so far, without the prompt, is over.
        options: as `generate` takes them (`do_sample`, `top_p`, `repetition_penalty`, `eos_token_id`, ...); greedy by
            default.
        generator: draws the tokens, where `do_sample` is on; by default the global one.
    """

    ids: Sequence[int]
    max_new_tokens: int
    routing: Routed | None = None
    stop: Callable[[str], bool] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None


class RowStep(NamedTuple):
    """One token of one row.

    Args:
        row: the number that `join` gave; in `write`, the request's place.
        end: why it is the row's last: an end token, the request's `stop`, no more tokens; None if more follow.
    """

    row: int
    step: Step
    end: End | None


class Prefix:
    """The beginning of some prompts, read once for each kind of routing among them."""

    def __init__(self, model: TwoPassModel, ids: Sequence[int], lines: Sequence[Line]) -> None:
        self.ids, self._cache = tuple(ids), new_cache(model.config)
        self._place = {line: place for place, line in enumerate(lines)}
        self.in_two_passes = Routing(tuple(lines)).reads_head
        ids_BT = torch.tensor([self.ids], device=model.device).expand(len(lines), -1)
        with torch.no_grad():
            model(ids_BT, past_key_values=self._cache, logits_to_keep=1, routing=Routing(tuple(lines)))

    def goes_with(self, ids: Sequence[int], line: Line) -> bool:
        """Whether a prompt begins so, and has tokens after it."""
        return line in self._place and len(ids) > len(self.ids) and tuple(ids[: len(self.ids)]) == self.ids

    def rows(self, lines: Sequence[Line], device: torch.device) -> Cache:
        """A cache with a row for each of these lines."""
        return picked(self._cache, torch.tensor([self._place[line] for line in lines], device=device))


class _Row:
    """A request while it is written."""

    def __init__(self, number: int, model: TwoPassModel, tokenizer: Any, request: Request) -> None:
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, found {request.max_new_tokens}")
        if request.stop is not None and tokenizer is None:
            raise ConfigError("stop: expected a tokenizer that makes text of tokens, found none")
        routing = model.routing_of(request.routing)
        if len(routing) != 1:
            raise ConfigError(f"routing: expected one line for one request, found {len(routing)}")
        ids_1T = torch.tensor([list(request.ids)], dtype=torch.long, device=model.device)
        if not ids_1T.numel():
            raise ConfigError("ids: expected at least one token, found none")
        options = {"attention_mask": torch.ones_like(ids_1T), "pad_token_id": 0, "do_sample": False, **request.options}
        text = prepared(model, ids_1T, routing, options | {"max_new_tokens": request.max_new_tokens})
        text.check()
        self.number, self.request, self.line = number, request, routing.lines[0]
        self.ids, self.read, self.text = list(request.ids), len(request.ids), ""
        self._detokenizer = Detokenizer(tokenizer)
        ends = text.settings._eos_token_tensor
        self._ends = frozenset() if ends is None else frozenset(ends.view(-1).tolist())
        own = [one for one in text.stop if not isinstance(one, (EosTokenCriteria, MaxLengthCriteria))]
        self._stop = StoppingCriteriaList(own)
        self.chooser = Chooser(text.process, bool(text.settings.do_sample), request.generator)
        self.is_plain = not text.process and not self.chooser.samples

    def goes_on(self, token: int, logits_V: Tensor, scalings_SN: Tensor, experts: tuple[str, ...]) -> RowStep:
        step = told(Written(token, logits_V, logits_V, scalings_SN, False), self._detokenizer, experts)
        self.ids.append(token)
        self.text += step.text
        return RowStep(self.number, step, self._end(token, logits_V))

    def _end(self, token: int, logits_V: Tensor) -> End | None:
        if token in self._ends:
            return "end"
        if self.request.stop is not None and self.request.stop(self.text):
            return "stop"
        if self._stop and bool(self._stop(torch.tensor([self.ids], device=logits_V.device), logits_V[None])[0]):
            return "stop"
        return "length" if len(self.ids) - self.read >= self.request.max_new_tokens else None


class Batch:
    """Rows that are written together, each with its own prompt, routing, sampling and end.

    Args:
        tokenizer: gives steps their text; without one it is empty.
        batch_tokens: bound on rows times tokens of a forward that reads prompts.
        prefix: the beginning of the prompts to come, which has been read.
    """

    def __init__(
        self,
        model: TwoPassModel,
        tokenizer: Any = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
        prefix: Prefix | None = None,
    ) -> None:
        self._model, self._tokenizer, self._batch_tokens, self._prefix = model, tokenizer, batch_tokens, prefix
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._joined = 0
        self._mask_BT: Tensor
        self._cache: Cache
        self._routing: Routing

    def __len__(self) -> int:
        """Rows that are written or wait to be."""
        return len(self._rows) + len(self._waiting)

    def join(self, request: Request) -> int:
        """Takes a request in, to be read at the next step; returns the row's number.

        Raises:
            ConfigError, UnknownExpertError: something is wrong with it.
        """
        row = _Row(self._joined, self._model, self._tokenizer, request)
        self._waiting.append(row)
        self._joined += 1
        return row.number

    def leave(self, number: int) -> None:
        """Takes a row out, whatever it lacks; nothing happens if it has ended before."""
        self._waiting = [row for row in self._waiting if row.number != number]
        self._keep([place for place, row in enumerate(self._rows) if row.number != number])

    @torch.no_grad()
    def step(self) -> list[RowStep]:
        """The next token of every row; those that have ended are no longer there."""
        found = self._go_on() if self._rows else []
        while self._waiting:
            found += self._admit()
        return found

    def _go_on(self) -> list[RowStep]:
        last = torch.tensor([row.ids[-1:] for row in self._rows], device=self._model.device)
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        out = _forward(self._model, last, self._mask_BT, self._cache, self._routing)
        steps = self._choose(self._rows, out)
        self._keep([place for place, step in enumerate(steps) if step.end is None])
        return steps

    def _admit(self) -> list[RowStep]:
        """Reads prompts that wait, as many as one forward takes, and chooses their first tokens."""
        prefix = self._prefix
        with_prefix = prefix is not None and prefix.goes_with(self._waiting[0].request.ids, self._waiting[0].line)
        skipped = len(prefix.ids) if prefix is not None and with_prefix else 0
        rows: list[_Row] = []
        for row in self._waiting:
            longest = max(one.read for one in [*rows, row]) - skipped
            if rows and longest * (len(rows) + 1) > self._batch_tokens:
                break
            if prefix is None or prefix.goes_with(row.request.ids, row.line) == with_prefix:
                rows.append(row)
        self._waiting = [row for row in self._waiting if row not in rows]
        routing, device = Routing(tuple(row.line for row in rows)), self._model.device
        ids_BT, mask_BT = padded([row.ids[skipped:] for row in rows], device)
        cache = new_cache(self._model.config)
        if prefix is not None and with_prefix:
            mask_BT = torch.nn.functional.pad(mask_BT, (skipped, 0), value=1)
            cache = prefix.rows([row.line for row in rows], device)
            cache = self._with_passes(cache, prefix.in_two_passes, routing.reads_head)
        out = _forward(self._model, ids_BT, mask_BT, cache, routing)
        steps = self._choose(rows, out)
        self._merge(rows, mask_BT, cache, routing)
        ended = {step.row for step in steps if step.end is not None}
        self._keep([place for place, row in enumerate(self._rows) if row.number not in ended])
        return steps

    def _choose(self, rows: Sequence[_Row], out: Any) -> list[RowStep]:
        logits_BV, scalings_BSN = out.logits[:, -1], out.scalings[:, -1].clone()
        likeliest = logits_BV.argmax(dim=-1).tolist()
        steps = []
        for row, logits_V, scalings_SN, token in zip(rows, logits_BV, scalings_BSN, likeliest, strict=True):
            if not row.is_plain:
                ids_1T = torch.tensor([row.ids], device=logits_V.device)
                token, _ = row.chooser.choose(ids_1T, logits_V, None)
            steps.append(row.goes_on(token, logits_V, scalings_SN, self._model.experts))
        return steps

    # --- rows of the cache ---

    def _merge(self, rows: list[_Row], mask_BT: Tensor, cache: Cache, routing: Routing) -> None:
        if not self._rows:
            self._rows, self._mask_BT, self._cache, self._routing = rows, mask_BT, cache, routing
            return
        both = Routing.cat([self._routing, routing])
        caches = [
            self._with_passes(part, its.reads_head, both.reads_head)
            for part, its in ((self._cache, self._routing), (cache, routing))
        ]
        width = max(self._mask_BT.shape[1], mask_BT.shape[1])
        masks = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in (self._mask_BT, mask_BT)]
        self._rows, self._mask_BT = [*self._rows, *rows], torch.cat(masks)
        self._cache, self._routing = joined(caches), both

    def _keep(self, places: Sequence[int]) -> None:
        """Rows at these places stay; padding that only the others needed goes with them."""
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in places]
        if not self._rows:
            del self._cache, self._mask_BT, self._routing
            return
        index = torch.tensor(places, device=self._mask_BT.device)
        mask_BT, before = self._mask_BT[index], self._routing.reads_head
        self._routing = self._routing[places]
        self._cache = self._with_passes(picked(self._cache, index), before, self._routing.reads_head)
        if spare := int(mask_BT.any(dim=0).int().argmax()):
            trim(self._cache, spare)
        self._mask_BT = mask_BT[:, spare:]

    def _with_passes(self, cache: Cache, has: bool, wants: bool) -> Cache:
        """A cache as the head's passes leave it, or as a single one does."""
        config = self._model.config
        if has == wants:
            return cache
        return for_two_passes(cache, config, self._model.head.pool_like) if wants else for_one_pass(cache, config)


@torch.no_grad()
def write(
    model: TwoPassModel,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    batch_tokens: int = BATCH_TOKENS,
    share_prefix: bool = True,
) -> Iterator[RowStep]:
    """All requests, batch by batch: rows that may write equally long first, then those of equal length.

    Args:
        batch_tokens: bound on rows times tokens that one forward reads.
        share_prefix: read what all prompts have in common once for each kind of routing, where the model allows it.

    Raises:
        ConfigError, UnknownExpertError: something is wrong with a request.
    """
    requests = [replace(request, routing=model.routing_of(request.routing)) for request in requests]
    prefix = _shared(model, requests) if share_prefix and can_share_prefix(model) else None
    skipped = 0 if prefix is None else len(prefix.ids)
    order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, len(requests[i].ids), i))
    for places in in_batches(order, [len(request.ids) - skipped for request in requests], batch_tokens):
        batch = Batch(model, tokenizer, batch_tokens=batch_tokens, prefix=prefix)
        for place in places:
            batch.join(requests[place])
        while batch:
            for row, step, end in batch.step():
                yield RowStep(places[row], step, end)


def _shared(model: TwoPassModel, requests: Sequence[Request]) -> Prefix | None:
    """What all prompts begin with, where reading it beforehand is worth it."""
    if len(requests) < 2:
        return None
    size = common_prefix([tuple(request.ids[:-1]) for request in requests])
    lines = list(dict.fromkeys(line for request in requests for line in model.routing_of(request.routing).lines))
    if size < _SHORTEST_PREFIX or 2 * len(lines) > len(requests):
        return None
    return Prefix(model, requests[0].ids[:size], lines)


def can_share_prefix(model: TwoPassModel) -> bool:
    """Whether every layer of the model's cache keeps all tokens: a sliding window would forget the prefix."""
    return all(type(layer) is DynamicLayer for layer in new_cache(model.config).layers)


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all rows begin."""
    low, high = min(rows), max(rows)  # in the order of sequences, these two differ first
    size = 0
    while size < min(len(low), len(high)) and low[size] == high[size]:
        size += 1
    return size


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of rows padded on the left, and their mask [B, T]."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BT, mask_BT


def in_batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
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


def _forward(model: TwoPassModel, ids_BT: Tensor, mask_BT: Tensor, cache: Cache, routing: Routing) -> Any:
    positions = {name: value[:, -ids_BT.shape[1] :] for name, value in model.positions(mask_BT).items()}
    return model(ids_BT, attention_mask=mask_BT, past_key_values=cache, logits_to_keep=1, routing=routing, **positions)

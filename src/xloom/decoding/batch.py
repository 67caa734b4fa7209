"""Many texts at once: rows that join and leave a batch at any token, each written as it would be alone.

    batch = Batch(model, tokenizer)
    batch.join(Request(ids, max_new_tokens=64, routing=Single("chem")))
    while batch: for row, step, end in batch.step(): ...

`write` does that for a list of requests. Drafts are for a row that is alone: see `stream`. A batch is one thread's;
several batches of one model may run at once. Knows nothing of tasks or servers.
Letters: B rows  T tokens  S sites  N experts  V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from xloom.cache import for_one_pass, for_two_passes, joined, new_cache, picked, trim
from xloom.decoding.loop import Written
from xloom.decoding.request import Request, Row, RowStep
from xloom.errors import ConfigError, RowError
from xloom.passes import TwoPassModel
from xloom.routers import Routing
from xloom.routers.routing import Line

BATCH_TOKENS = 1024  # rows times tokens of one forward; on a CPU more is no faster, a GPU wants more
_SHORTEST_PREFIX = 4  # tokens that are worth a forward of their own


@dataclass(frozen=True)
class _Rows:
    """Rows that have been read: their attention mask [B, T], their cache, who decides for each."""

    model: TwoPassModel
    rows: tuple[Row, ...]
    mask_BT: Tensor
    cache: Cache
    routing: Routing

    def with_passes(self, head: bool) -> Cache:
        """The cache as rows that read the head want it, or as those that do not."""
        if head == self.routing.reads_head:
            return self.cache
        if head:
            return for_two_passes(self.cache, self.model.config, self.model.head.pool_like)
        return for_one_pass(self.cache, self.model.config)

    def and_others(self, others: "_Rows") -> "_Rows":
        """All of them, those with fewer tokens padded on the left."""
        routing = Routing.cat([self.routing, others.routing])
        width = max(self.mask_BT.shape[1], others.mask_BT.shape[1])
        masks = [pad(part.mask_BT, (width - part.mask_BT.shape[1], 0)) for part in (self, others)]
        cache = joined([part.with_passes(routing.reads_head) for part in (self, others)])
        return _Rows(self.model, (*self.rows, *others.rows), torch.cat(masks), cache, routing)

    def at(self, places: Sequence[int]) -> "_Rows | None":
        """The rows at these places, without the padding that only others needed; None for no row."""
        if not places or len(places) == len(self.rows):
            return self if places else None
        index, routing = torch.tensor(places, device=self.mask_BT.device), self.routing[places]
        mask_BT, cache = self.mask_BT[index], picked(self.with_passes(routing.reads_head), index)
        spare = int(mask_BT.any(dim=0).int().argmax())
        trim(cache, spare)
        return _Rows(self.model, tuple(self.rows[place] for place in places), mask_BT[:, spare:], cache, routing)


class Prefix:
    """The beginning of some prompts, read once for each kind of routing among them."""

    def __init__(self, model: TwoPassModel, ids: Sequence[int], lines: Sequence[Line]) -> None:
        self.ids, self._model = tuple(ids), model
        self._place = {line: place for place, line in enumerate(lines)}
        routing, cache = Routing(tuple(lines)), new_cache(model.config)
        ids_BT = torch.tensor([self.ids], device=model.device).expand(len(lines), -1)
        with torch.no_grad():
            model(ids_BT, past_key_values=cache, logits_to_keep=1, routing=routing)
        self._read = _Rows(model, (), torch.ones_like(ids_BT), cache, routing)

    def goes_with(self, row: "Row") -> bool:
        """Whether a row's prompt begins so, and has tokens after it."""
        size = len(self.ids)
        return row.line in self._place and len(row.ids) > size and tuple(row.ids[:size]) == self.ids

    def cache_of(self, rows: Sequence["Row"], routing: Routing) -> Cache:
        """A cache with what each of these rows begins with."""
        places = torch.tensor([self._place[row.line] for row in rows], device=self._model.device)
        return picked(self._read.with_passes(routing.reads_head), places)


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
        self._waiting: list[Row] = []
        self._written: _Rows | None = None
        self._joined, self._busy = 0, False
        self._failed: list[RowError] = []
        self._kept: list[RowStep] = []  # of the step in which a row failed

    def __len__(self) -> int:
        """Rows that are written or wait to be; 0 when there is nothing more to come."""
        written = 0 if self._written is None else len(self._written.rows)
        return len(self._waiting) + written + len(self._failed) + len(self._kept)

    def join(self, request: Request) -> int:
        """Takes a request in, to be read at the next step; returns the row's number.

        Raises:
            ConfigError, UnknownExpertError: something is wrong with it.
        """
        return self._take(Row(self._joined, self._model, self._tokenizer, request))

    def _take(self, row: Row) -> int:
        self._waiting.append(row)
        self._joined += 1
        return row.number

    def leave(self, number: int) -> None:
        """Takes a row out, whatever it lacks; nothing happens if it has ended before.

        Raises:
            ConfigError: in the middle of a step.
        """
        self._check_idle()
        self._waiting = [row for row in self._waiting if row.number != number]
        self._keep(lambda row: row.number != number)

    @torch.no_grad()
    def step(self) -> list[RowStep]:
        """The next token of every row; those that have ended are no longer there.

        Raises:
            RowError: a row's own stop or logits processor has failed. The row is out; what the others got comes with
                the next call, and the batch goes on.
            ConfigError: in the middle of a step, or after one that was broken off (an error of the model, Ctrl-C).
        """
        self._check_idle()
        steps, self._kept = self._kept, []
        if not steps and not self._failed:
            self._busy = True  # and so it stays, if this is broken off
            if self._written is not None:
                steps += self._go_on(self._written)
            while self._waiting:
                steps += self._admit()
            self._busy = False
        if self._failed:
            self._kept = steps
            raise self._failed.pop(0)
        return steps

    def _check_idle(self) -> None:
        if self._busy:
            raise ConfigError(
                "a step of this batch is running or was broken off: expected its end; else make a new one"
            )

    def _go_on(self, written: _Rows) -> list[RowStep]:
        last = torch.tensor([row.ids[-1:] for row in written.rows], device=self._model.device)
        written = replace(written, mask_BT=pad(written.mask_BT, (0, 1), value=1))
        return self._next(written, _forward(self._model, last, written.mask_BT, written.cache, written.routing))

    def _admit(self) -> list[RowStep]:
        """Reads prompts that wait, as many as one forward takes, and chooses their first tokens."""
        prefix, first = self._prefix, self._waiting[0]
        if prefix is not None and not prefix.goes_with(first):
            prefix = None
        skipped = 0 if prefix is None else len(prefix.ids)
        rows: list[Row] = []
        for row in self._waiting:
            longest = max(one.read for one in [*rows, row]) - skipped
            if rows and longest * (len(rows) + 1) > self._batch_tokens:
                break
            if self._prefix is None or self._prefix.goes_with(row) == (prefix is not None):
                rows.append(row)
        self._waiting = [row for row in self._waiting if row not in rows]
        routing, device = Routing(tuple(row.line for row in rows)), self._model.device
        ids_BT, mask_BT = padded([row.ids[skipped:] for row in rows], device)
        cache = new_cache(self._model.config)
        if prefix is not None:
            mask_BT, cache = pad(mask_BT, (skipped, 0), value=1), prefix.cache_of(rows, routing)
        out = _forward(self._model, ids_BT, mask_BT, cache, routing)
        return self._next(_Rows(self._model, tuple(rows), mask_BT, cache, routing), out)

    def _next(self, read: _Rows, out: Any) -> list[RowStep]:
        """The tokens that a forward gives its rows, which then are those that are written, beside the others."""
        logits_BV, scalings_BSN = out.logits[:, -1], out.scalings[:, -1].clone()
        steps, going = [], set()
        for place, (row, token) in enumerate(zip(read.rows, logits_BV.argmax(dim=-1).tolist(), strict=True)):
            logits_V = logits_BV[place]
            try:
                token = row.next_token(logits_V, token)
                written = Written(token, logits_V, logits_V, scalings_BSN[place], False)
                steps.append(row.goes_on(written, self._model.experts))
            except Exception as error:  # of what the request brought; other rows know nothing of it
                self._failed.append(RowError(row.number, error))
                continue
            if steps[-1].end is None:
                going.add(row.number)
        others = self._written if self._written is not None and read.rows[0] not in self._written.rows else None
        self._written = read if others is None else others.and_others(read)
        mine = {row.number for row in read.rows}
        self._keep(lambda row: row.number in going or row.number not in mine)
        return steps

    def _keep(self, stays: Callable[[Row], bool]) -> None:
        if self._written is not None:
            self._written = self._written.at([i for i, row in enumerate(self._written.rows) if stays(row)])


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
        ConfigError, UnknownExpertError: at once, something is wrong with a request. RowError: as `Batch.step`.
    """
    return _written(
        [Row(i, model, tokenizer, one) for i, one in enumerate(requests)], model, batch_tokens, share_prefix
    )


def _written(rows: Sequence[Row], model: TwoPassModel, batch_tokens: int, share_prefix: bool) -> Iterator[RowStep]:
    prefix = _shared(model, rows) if share_prefix and can_share_prefix(model) else None
    skipped = 0 if prefix is None else len(prefix.ids)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].request.max_new_tokens, rows[i].read, i))
    for places in in_batches(order, [row.read - skipped for row in rows], batch_tokens):
        batch = Batch(model, batch_tokens=batch_tokens, prefix=prefix)
        for place in places:
            batch._take(rows[place])
        while batch:
            yield from batch.step()


def _shared(model: TwoPassModel, rows: Sequence[Row]) -> Prefix | None:
    """What all prompts begin with, where reading it beforehand is worth it."""
    if len(rows) < 2:
        return None
    size = common_prefix([tuple(row.ids[:-1]) for row in rows])
    lines = list(dict.fromkeys(row.line for row in rows))
    if size < _SHORTEST_PREFIX or 2 * len(lines) > len(rows):
        return None
    return Prefix(model, rows[0].ids[:size], lines)


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids after which an answer is over: the tokenizer's end token, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})

"""`Trace`: one text, and how its experts were mixed token by token. In memory, or lazily from its folder.

A token stands with what it was *written* with: its logprob and its scalings are those at the place before it, as in
`model.stream`. So the first token of a text has neither (NaN), and the last token's own place is not in the trace: it
wrote nothing.

Knows nothing of models. Letters: T tokens  S sites  N experts
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from xloom.errors import TraceError, TraceMismatchError, UnknownExpertError, names
from xloom.trace.folder import PART_TOKENS, TraceWriter, read_folder
from xloom.trace.html import trace_html
from xloom.trace.rows import Held, Rows
from xloom.trace.tokens import About, Tokens, start_of


class Turn(NamedTuple):
    """One message of a conversation: the tokens from `start` to `stop`, with what the template puts around it."""

    number: int
    role: str
    start: int
    stop: int


class Trace:
    """A text's tokens, and the scalings [T, S, N] with which each was written; kept in float16.

    Args:
        tokens: the columns of the tokens.
        scalings_TSN: NaN where a token was not predicted, as the first of a text.
        about: names of sites and experts, the model, free metadata.

    Raises:
        TraceError: the shapes do not go together.
    """

    def __init__(self, tokens: Tokens, scalings_TSN: Tensor | Rows, about: About) -> None:
        if isinstance(scalings_TSN, Tensor):
            shape = tuple(scalings_TSN.shape)
            rows: Rows | None = Held(scalings_TSN.detach().to("cpu", torch.float16)) if len(shape) == 3 else None
        else:
            shape, rows = scalings_TSN.shape, scalings_TSN
        expected = (len(tokens), len(about.sites), len(about.experts))
        if rows is None or shape != expected:
            raise TraceError(f"expected scalings [tokens, sites, experts] of shape {expected}, found {shape}")
        self.tokens, self.about, self._rows = tokens, about, rows

    # --- what it is of ---

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        sizes = f"{len(self)} tokens ({int(self.tokens.answer.sum())} of the answer), "
        return f"Trace({start_of(self.text)!r}, {sizes}{len(self.sites)} sites, {len(self.experts)} experts)"

    def _repr_html_(self) -> str:
        return trace_html(self)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.about.sites

    @property
    def experts(self) -> tuple[str, ...]:
        return self.about.experts

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.about.metadata

    @property
    def text(self) -> str:
        """All of it, special tokens spelt out."""
        return "".join(self.tokens.texts)

    @property
    def answer(self) -> str:
        """What was written, or given as the answer, without special tokens; all answers of a conversation, joined."""
        columns = (self.tokens.texts, self.tokens.answer.tolist(), self.tokens.special.tolist())
        return "".join(text for text, answer, special in zip(*columns, strict=True) if answer and not special)

    @property
    def turns(self) -> list[Turn]:
        """The messages, in order; plain text has two, the prompt and the answer."""
        found: list[Turn] = []
        for at, (number, role) in enumerate(zip(self.tokens.turns.tolist(), self.tokens.role_names, strict=True)):
            if found and found[-1].number == number and found[-1].role == role:
                found[-1] = found[-1]._replace(stop=at + 1)
            else:
                found.append(Turn(number, role, at, at + 1))
        return found

    # --- its scalings ---

    @property
    def scalings(self) -> Tensor:
        """[T, S, N] in float32, read at each call: hold on to it, or go through `blocks`."""
        return self._rows.read().float()

    @property
    def known(self) -> Tensor:
        """[T] bool: whether a token has scalings."""
        return ~self._rows.read(slice(0, 1), slice(0, 1)).isnan().any(dim=-1).any(dim=-1)

    def site(self, name: str) -> Tensor:
        """The weights of all experts at one site, [T, N] in float32."""
        at = _place(name, self.sites, "site")
        return self._rows.read(sites=slice(at, at + 1))[:, 0].float()

    def expert(self, name: str) -> Tensor:
        """One expert's weight at all sites, [T, S] in float32."""
        at = _place(name, self.experts, "expert")
        return self._rows.read(experts=slice(at, at + 1))[:, :, 0].float()

    def __getitem__(self, place: slice) -> "Trace":
        """The tokens of a slice without a step; nothing is read or copied."""
        if not isinstance(place, slice) or place.step not in (None, 1):
            raise TraceError(f"trace[...]: expected a slice like trace[10:20], found {place!r}")
        start, stop, _ = place.indices(len(self))
        stop = max(start, stop)
        return Trace(self.tokens[start:stop], self._rows.narrow(start, stop), self.about)

    def blocks(self, tokens: int = 1024) -> Iterator["Trace"]:
        """The whole trace in slices of so many tokens, so that a long one is never in memory at once."""
        for start in range(0, len(self), tokens):
            yield self[start : start + tokens]

    # --- more ---

    def with_metadata(self, **more: Any) -> "Trace":
        """The same trace with more metadata: `trace.with_metadata(domain="quantum")`."""
        return Trace(self.tokens, self._rows, replace(self.about, metadata={**self.metadata, **more}))

    def save(self, folder: Path | str, *, part_tokens: int = PART_TOKENS) -> None:
        """Writes it into a new folder. Raises TraceError as `TraceWriter`."""
        with TraceWriter(folder, self.about, part_tokens=part_tokens) as writer:
            for block in self.blocks(part_tokens):
                writer.add(block.tokens, block.scalings)

    @classmethod
    def load(cls, folder: Path | str, *, unfinished: bool = False) -> Self:
        """Reads a folder; the scalings stay on disk until they are asked for. Raises as `read_folder`."""
        return cls(*read_folder(folder, unfinished=unfinished))


def merge(traces: Sequence[Trace]) -> Trace:
    """One trace of all tokens, one after the other, in memory. Metadata that differ go.

    Raises:
        TraceMismatchError: other sites or experts.
        TraceError: no trace at all.
    """
    if not traces:
        raise TraceError("expected traces to merge, found none")
    first, *others = traces
    for other in others:
        _check_axes(first, other)
    same = {
        key: value
        for key, value in first.metadata.items()
        if all(key in other.metadata and other.metadata[key] == value for other in others)
    }
    tokens = Tokens.cat([trace.tokens for trace in traces])
    rows = Held(torch.cat([trace._rows.read() for trace in traces]))
    return Trace(tokens, rows, replace(first.about, metadata=same))


class Difference(NamedTuple):
    """What another trace of the same tokens has more than the first: its values less those of the first."""

    scalings_TSN: Tensor
    logprobs_T: Tensor


def compare(first: Trace, other: Trace) -> Difference:
    """`other` less `first`, token by token, in float32; NaN where one of them has nothing.

    Raises:
        TraceMismatchError: other tokens, sites or experts.
    """
    _check_axes(first, other)
    mine, theirs = first.tokens.ids, other.tokens.ids
    if not torch.equal(mine, theirs):
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        raise TraceMismatchError(
            f"expected the same tokens, found {len(mine)} and {len(theirs)} which differ from token {at} on"
        )
    return Difference(other.scalings - first.scalings, other.tokens.logprobs - first.tokens.logprobs)


def _check_axes(first: Trace, other: Trace) -> None:
    for kind, mine, theirs in (("sites", first.sites, other.sites), ("experts", first.experts, other.experts)):
        if mine == theirs:
            continue
        odd = sorted(set(mine) ^ set(theirs))
        found = f"only one has {names(odd, 3)}" if odd else "they are in another order"
        raise TraceMismatchError(f"expected the same {kind}, found {len(mine)} and {len(theirs)}: {found}")


def _place(name: str, known: Sequence[str], kind: str) -> int:
    if name not in known:
        raise UnknownExpertError(f"no {kind} named {name!r}; the trace has {names(known, 3)}")
    return known.index(name)

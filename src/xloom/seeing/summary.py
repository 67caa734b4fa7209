"""`Summary`: the statistics of some traces, by any grouping of their sites and any class of their tokens.

Reads traces block by block, so that long ones need little memory. Knows nothing of models or plots.
Letters: S sites  N experts  C columns: the experts, then the base  G groups
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xloom.errors import TraceError, TraceMismatchError, names
from xloom.seeing import statistics
from xloom.seeing.sites import Groups, by_kind, by_layer, by_site
from xloom.seeing.statistics import Means
from xloom.trace import Trace
from xloom.trace.shares import BASE as BASE

ALL, PROMPT, ANSWER, SPECIAL = "all", "prompt", "answer", "special"
By = Literal["layer", "kind", "site"]
Classes = Callable[[Trace], Sequence[str | None]]
_GROUPINGS: Mapping[str, Callable[[Sequence[str]], Groups]] = {"layer": by_layer, "kind": by_kind, "site": by_site}


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers with names for both axes: `values` [rows, columns] in float64."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor

    def __getitem__(self, key: tuple[str, str]) -> float:
        row, column = key
        return float(self.values[self.rows.index(row), self.columns.index(column)])

    def as_json(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "columns": list(self.columns), "values": self.values.tolist()}


def token_classes(trace: Trace) -> list[str]:
    """The class of each token: special tokens, and of the others those of the prompt and of the answer."""
    special, answer = trace.tokens.special.tolist(), trace.tokens.answer.tolist()
    return [SPECIAL if s else ANSWER if a else PROMPT for s, a in zip(special, answer, strict=True)]


@dataclass(frozen=True, eq=False)
class Summary:
    """Statistics of tokens and sites; every token and every site counts alike.

    Args of all methods:
        by: None for all sites together, or "layer", "kind" or "site": rows of a table.
        of: a class of tokens, one of `classes`.

    Attributes:
        sites, experts: names of the axes.
        classes: what was found, by class of tokens; "all" is all of them.
    """

    sites: tuple[str, ...]
    experts: tuple[str, ...]
    classes: Mapping[str, Means]

    @property
    def columns(self) -> tuple[str, ...]:
        """The experts, and "base" for what is left of 1 (see `xloom.trace.shares`)."""
        return (*self.experts, BASE)

    def tokens(self, of: str = ALL) -> int:
        return self._means(of).tokens

    def share(self, by: By | None = None, of: str = ALL) -> Table:
        """Mean share of every expert and of the base; rows sum to 1."""
        return self._table(self._means(of).share_SC, self.columns, by)

    def dominance(self, by: By | None = None, of: str = ALL) -> Table:
        """Part of tokens and sites that every expert, or the base, leads; rows sum to 1."""
        return self._table(self._means(of).led_SC, self.columns, by)

    def weight(self, by: By | None = None, of: str = ALL) -> Table:
        """Mean scaling of every expert as it is, neither made positive nor brought to a sum of 1."""
        return self._table(self._means(of).weight_SN, self.experts, by)

    def mixedness(self, by: By | None = None, of: str = ALL) -> Table:
        """How mixed the experts are at one token and site: columns "entropy" in nats, and "effective number".

        The effective number is the mean of exp(entropy). Compare `diversity`.
        """
        means = self._means(of)
        return self._table(torch.stack([means.entropy_S, means.effective_S], dim=1), ("entropy", "effective"), by)

    def diversity(self, by: By | None = None, of: str = ALL) -> Table:
        """Column "effective": effective number of the mean shares, so how many experts are used over all tokens.

        Where it is large and that of `mixedness` small, experts are many but each acts alone.
        """
        share = self.share(by, of)
        return Table(share.rows, ("effective",), statistics.effective_number(share.values)[:, None])

    def co_use(self, of: str = ALL, *, within: Literal["site", "token"] = "site") -> Table:
        """Mean of share_i * share_j at the same token and site, or over all sites of a token; sums to 1."""
        means = self._means(of)
        return Table(self.columns, self.columns, means.co_use_CC if within == "site" else means.co_use_tokens_CC)

    def by_class(self) -> Table:
        """Mean shares by class of tokens, those without any token left out."""
        found = [name for name, means in self.classes.items() if means.tokens]
        values = torch.zeros(len(found), len(self.columns), dtype=torch.float64)
        for at, name in enumerate(found):
            values[at] = self.share(of=name).values[0]
        return Table(tuple(found), self.columns, values)

    def as_json(self) -> dict[str, Any]:
        """Everything, by class of tokens."""
        out: dict[str, Any] = {"sites": list(self.sites), "experts": list(self.experts), "classes": {}}
        for name, means in self.classes.items():
            tables: dict[str, Any] = {"tokens": means.tokens}
            for by in (None, "layer", "kind", "site"):
                tables[by or "overall"] = {
                    "share": self.share(by, name).as_json(),
                    "dominance": self.dominance(by, name).as_json(),
                    "weight": self.weight(by, name).as_json(),
                    "mixedness": self.mixedness(by, name).as_json(),
                    "diversity": self.diversity(by, name).as_json(),
                }
            tables["co_use"] = {w: self.co_use(name, within=w).as_json() for w in ("site", "token")}
            out["classes"][name] = tables
        return out

    def _means(self, of: str) -> Means:
        if of not in self.classes:
            raise TraceError(f"no class of tokens named {of!r}; there are {names(self.classes)}")
        return self.classes[of]

    def _table(self, values_SK: Tensor, columns: tuple[str, ...], by: By | None) -> Table:
        if by is None:
            return Table((ALL,), columns, values_SK.mean(dim=0, keepdim=True))
        if by not in _GROUPINGS:
            raise TraceError(f"by: expected one of {names(_GROUPINGS)}, or None, found {by!r}")
        groups = _GROUPINGS[by](self.sites)
        return Table(groups.labels, columns, statistics.mean_by_group(values_SK, groups.of_S, len(groups.labels)))


def summarise(traces: Trace | Iterable[Trace], classes: Classes = token_classes) -> Summary:
    """The statistics of one trace, or of all tokens of several.

    Args:
        classes: gives the class of every token of a trace, or None for a token that is in no class but "all".

    Raises:
        TraceMismatchError: traces of other sites or experts.
        TraceError: no trace, or another number of classes than of tokens.
    """
    parts: dict[str, list[Means]] = {ALL: []}
    first: Trace | None = None
    for trace in [traces] if isinstance(traces, Trace) else traces:
        first = first or trace
        if (trace.sites, trace.experts) != (first.sites, first.experts):
            raise TraceMismatchError("expected traces of the same sites and experts, found others")
        labels = list(classes(trace))
        if len(labels) != len(trace):
            raise TraceError(f"expected a class for each of {len(trace)} tokens, found {len(labels)}")
        at = 0
        for block in trace.blocks():
            scalings_TSN, known_T = block.scalings, block.known
            here = labels[at : at + len(block)]
            at += len(block)
            for name in [ALL, *(one for one in dict.fromkeys(here) if one not in (None, ALL))]:
                chosen_T = known_T if name == ALL else known_T & torch.tensor([label == name for label in here])
                parts.setdefault(str(name), []).append(statistics.means(scalings_TSN[chosen_T]))
    if first is None:
        raise TraceError("expected traces, found none")
    empty = statistics.means(torch.zeros(0, len(first.sites), len(first.experts)))
    return Summary(
        first.sites, first.experts, {name: statistics.together(some or [empty]) for name, some in parts.items()}
    )


def summarise_by(traces: Iterable[Trace], key: str, classes: Classes = token_classes) -> dict[str, Summary]:
    """One summary for every value that the traces' metadata have under a key, e.g. "domain".

    Raises:
        TraceError: a trace has no such metadata. Others as `summarise`.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        if key not in trace.metadata:
            raise TraceError(f"expected metadata {key!r} of every trace, found {names(trace.metadata) or 'none'}")
        groups.setdefault(str(trace.metadata[key]), []).append(trace)
    return {value: summarise(some, classes) for value, some in groups.items()}

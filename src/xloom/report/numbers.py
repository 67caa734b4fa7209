"""Every number of the page, as JSON knows them, and the maps of single tokens as bytes.

    tables       {"rows": [...], "columns": [...], "values": [[...]]}, as `seeing.Table` writes itself
    texts        one for each trace: its tokens, turns, segments, and where its map begins
    differences  by "left-right" places of texts: value, low and high for every column

Knows nothing of HTML. Letters: S sites  N experts  T tokens  K bands  C columns: the experts, then the base
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xloom.errors import TraceError
from xloom.report.asks import GROUP, NAME
from xloom.report.findings import Findings
from xloom.report.maps import ALL_SITES, PRECISION, as_bytes, bands, share_map, slim
from xloom.seeing import Summary, Table, by_layer, difference, mean_by_group, summarise, trajectory
from xloom.seeing.plots import COLOURS, GREY
from xloom.seeing.summary import ALL, BASE
from xloom.trace import Trace

COMPARED = 50  # texts of which every pair has intervals
RESAMPLES = 1000
_PATTERNS = ("", "/", ".", "x")  # of experts beyond the colours, as `seeing.plots` hatches them
_TITLE = 60  # characters


def page_data(findings: Findings) -> tuple[dict[str, Any], bytes]:
    """What the page's scripts read, and all texts' maps [T, K, C] one after the other."""
    traces = findings.traces
    first, everything = traces[0], [*traces, *findings.against]
    maps = [share_map(trace) for trace in everything]
    packed = [as_bytes(one) for one in maps]
    base_acts = any(bool(one[..., -1].any()) for one in packed)
    columns = (*first.experts, *([BASE] if base_acts else []))
    summary = summarise(traces)
    slims = [slim(one, trace) for one, trace in zip(maps, everything, strict=True)]
    data = {
        "columns": list(columns),
        "bands": list(bands(first.sites)),
        "precision": PRECISION,
        "looks": [_look(name, first.experts) for name in columns],
        "classes": {name: _tables(summary, name, columns) for name, one in summary.classes.items() if one.tokens},
        "groups": _groups(traces, columns),
        "contributions": _contributions(findings),
        "worth": None if findings.worth is None else findings.worth.table(),
        "worthGiven": sum(findings.given),
        "texts": list(_texts(findings, everything, len(columns), len(bands(first.sites)))),
        "differences": dict(_differences(slims, len(traces), len(columns))),
        "models": list(findings.models),
    }
    return data, b"".join(one[..., : len(columns)].contiguous().numpy().tobytes() for one in packed)


def title_of(trace: Trace, number: int) -> str:
    """Its own name, or how what is asked begins."""
    name = str(trace.metadata.get(NAME, "")) or _asked(trace)
    line = " ".join(name.split())
    return f"{number}. {line if len(line) <= _TITLE else line[: _TITLE - 1] + '…'}"


def _asked(trace: Trace) -> str:
    """The first message of a user, or the text's beginning, without what a template puts around it."""
    turn = next((turn for turn in trace.turns if turn.role == "user"), trace.turns[0])
    part = trace[turn.start : turn.stop].tokens
    said = "".join(text for text, odd in zip(part.texts, part.special.tolist(), strict=True) if not odd)
    return said.strip().removeprefix("user").strip() if turn.role == "user" else said.strip()


def _look(name: str, experts: Sequence[str]) -> dict[str, str]:
    if name == BASE:
        return {"colour": GREY, "pattern": ""}
    place = list(experts).index(name)
    return {"colour": COLOURS[place % len(COLOURS)], "pattern": _PATTERNS[place // len(COLOURS) % len(_PATTERNS)]}


# --- of all texts ---


def _tables(summary: Summary, of: str, columns: Sequence[str]) -> dict[str, Any]:
    """The statistics of one class of tokens."""
    mixed, used = summary.mixedness("layer", of), summary.diversity("layer", of)
    depth = torch.cat([mixed.values, used.values], dim=1)
    share, led = summary.share(of=of).values, summary.dominance(of=of).values
    return {
        "tokens": summary.tokens(of),
        "share": _cut(Table(("share", "leads"), summary.columns, torch.cat([share, led])), columns),
        "layer": _cut(summary.share("layer", of), columns),
        "kind": _cut(summary.share("kind", of), columns),
        "depth": _rounded(Table(mixed.rows, ("entropy", "at one token and site", "over all tokens"), depth)),
        "couse": _cut(_square(summary.co_use(of, within="token"), len(columns)), columns),
        "acting": round(summary.mixedness(of=of)[ALL, "effective"], 3),
        "used": round(summary.diversity(of=of)[ALL, "effective"], 3),
    }


def _groups(traces: Sequence[Trace], columns: Sequence[str]) -> dict[str, Any] | None:
    """Mean shares by group, where there are several."""
    found: dict[str, list[Trace]] = {}
    for trace in traces:
        found.setdefault(str(trace.metadata.get(GROUP, trace.metadata.get("domain", "other"))), []).append(trace)
    if len(found) < 2:
        return None
    values = torch.cat([summarise(some).share().values for some in found.values()])
    return _cut(Table(tuple(found), (*traces[0].experts, BASE), values), columns)


def _contributions(findings: Findings) -> dict[str, Any] | None:
    """Relative norms by layer, and of all sites."""
    if findings.relative_SN is None:
        return None
    first = findings.traces[0]
    groups = by_layer(first.sites)
    layers = mean_by_group(findings.relative_SN, groups.of_S, len(groups.labels))
    whole = findings.relative_SN.mean(dim=0, keepdim=True)
    return {
        "layer": _rounded(Table(groups.labels, first.experts, layers)),
        "all": _rounded(Table((ALL_SITES,), first.experts, whole)),
    }


def _differences(slims: Sequence[Trace], count: int, columns: int) -> Iterator[tuple[str, list[list[float]]]]:
    """Of all pairs of the first texts, and of every text under two models."""
    some = min(count, COMPARED)
    pairs = [(i, j) for j in range(some) for i in range(j)]
    pairs += [(i, count + i) for i in range(len(slims) - count)]
    for i, j in pairs:
        try:
            found = difference(slims[i], slims[j], resamples=RESAMPLES)
        except TraceError:  # of one token there is no interval
            continue
        yield f"{i}-{j}", [[round(x, 4) for x in one] for one in list(found.shares.values())[:columns]]


# --- of one text ---


def _texts(findings: Findings, everything: Sequence[Trace], columns: int, bands: int) -> Iterator[dict[str, Any]]:
    at = 0
    worth = _worth_by_text(findings)
    for place, trace in enumerate(everything):
        number = place % len(findings.traces)
        columns_of = trace.tokens
        yield {
            "title": title_of(trace, number + 1),
            "group": str(trace.metadata.get(GROUP, trace.metadata.get("domain", ""))),
            "model": place // len(findings.traces),
            "at": at,
            "tokens": list(columns_of.texts),
            "logprobs": [round(x, 3) if math.isfinite(x) else None for x in columns_of.logprobs.tolist()],
            "flags": [2 * s + a for s, a in zip(columns_of.special.tolist(), columns_of.answer.tolist(), strict=True)],
            "unknown": (~trace.known).nonzero()[:, 0].tolist(),
            "turns": [[turn.role, turn.start, turn.stop] for turn in trace.turns],
            "segments": list(_segments(trace, columns)),
            "worth": worth.get(place, []),
        }
        at += len(trace) * bands * columns


def _segments(trace: Trace, columns: int) -> Iterator[dict[str, Any]]:
    if not bool(trace.known.any()):
        return
    for one in trajectory(trace):
        shares = [round(x, 4) for x in one.share_C.tolist()[:columns]]
        yield {"start": one.start, "stop": one.stop, "leader": one.leader, "shares": shares}


def _worth_by_text(findings: Findings) -> dict[int, list[dict[str, Any]]]:
    """Of each text, every variant but the first: the change of its loss, and whether the answer changes."""
    found = findings.worth
    if found is None:
        return {}
    out: dict[int, list[dict[str, Any]]] = {}
    for r, place in enumerate(findings.worth_of):
        change_Q = (found.losses_QR[:, r] - found.losses_QR[0, r]).tolist()
        changed_Q: list[bool] = found.changed_QR[:, r].tolist()
        rows = zip(found.variants, change_Q, changed_Q, strict=True)
        out[place] = [
            {"variant": str(variant), "change": round(change, 4), "changed": changed}
            for variant, change, changed in list(rows)[1:]
        ]
    return out


# --- parts ---


def _cut(table: Table, columns: Sequence[str]) -> dict[str, Any]:
    """Without the base where it never acts."""
    return _rounded(Table(table.rows, tuple(columns), table.values[:, : len(columns)]))


def _square(table: Table, count: int) -> Table:
    return Table(table.rows[:count], table.columns, table.values[:count])


def _rounded(table: Table) -> dict[str, Any]:
    values: Tensor = table.values.double()
    rounded = [[None if x != x else round(x, 5) for x in row] for row in values.tolist()]
    plain: Mapping[str, Any] = table.as_json()
    return {**plain, "values": rounded}

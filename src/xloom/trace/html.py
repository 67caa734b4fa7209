"""Traces and steps as a few lines of HTML, as notebooks show them.

One `div` with nothing from elsewhere: no scripts, no style sheets. Text has the notebook's own colour, and experts are
underlines and faint backgrounds of theirs, so that it reads in dark and in light. All that comes from a model, a
tokenizer or a file is escaped. Knows nothing of models.
Letters: T tokens  S sites  N experts  C columns: the experts, then the base  K bands of sites
"""

import html
import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xloom.trace.shares import BASE, bands, bars, leaders, shares
from xloom.trace.tokens import About, Tokens

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")  # Okabe and Ito
GREY = "#9A9A9A"
SHOWN = 150  # tokens at the start of a text, and as many at its end
_LINES = ("solid", "dashed", "dotted", "double")  # of experts beyond the colours
_MOST_BANDS = 32
_MONO = "font-family:ui-monospace,Menlo,Consolas,monospace"
# formulas are typeset in notebooks' output; a token "$" should not begin one
_OUTER = f'<div class="tex2jax_ignore mathjax_ignore" style="{_MONO};font-size:13px;line-height:1.7;max-width:72em">'


class Block(Protocol):
    """Tokens one after the other: their scalings [T, S, N], and whether they are known [T]."""

    @property
    def scalings(self) -> Tensor: ...

    @property
    def known(self) -> Tensor: ...


class Shown(Protocol):
    """What is shown of a trace."""

    tokens: Tokens
    about: About

    @property
    def sites(self) -> tuple[str, ...]: ...

    @property
    def experts(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def blocks(self, size: int) -> Iterator[Block]: ...


def trace_html(trace: Shown) -> str:
    """The text, each token in the colour of the expert that leads it, and a line for every expert.

    A token's title has its shares, mean over sites. Of long texts the start and the end are shown; the lines are of all
    tokens with scalings. Goes through the scalings block by block.
    """
    columns = (*trace.experts, BASE)
    share_SC = torch.zeros(len(trace.sites), len(columns), dtype=torch.float64)
    led_C, count = torch.zeros(len(columns), dtype=torch.int64), 0
    shown: list[str] = []
    for start, block in zip(range(0, len(trace), 1024), trace.blocks(1024)):
        shares_TSC = shares(block.scalings)
        mean_TC, known_T = shares_TSC.mean(dim=1), block.known
        share_SC += shares_TSC[known_T].sum(dim=0)
        led_C += torch.bincount(leaders(mean_TC[known_T]), minlength=len(columns))
        count += int(known_T.sum())
        for at, share_C in enumerate(mean_TC, start):
            if at < SHOWN or at >= len(trace) - SHOWN:
                shown.append(_span(trace.tokens.texts[at], float(trace.tokens.logprobs[at]), share_C, columns))
            elif at == SHOWN:
                shown.append(f'<span style="opacity:.65"> … {len(trace) - 2 * SHOWN:,} tokens … </span>')
    sizes = f"{len(trace):,} tokens ({int(trace.tokens.answer.sum()):,} of the answer), {len(trace.sites)} sites"
    named = [word for word in (sizes, trace.about.model, trace.about.router) if word]
    text = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;margin:.4em 0">{"".join(shown)}</div>'
    lines = _lines(share_SC / count, columns, led_C / count) if count else ""
    return f"{_OUTER}<div><b>Trace</b> {_escaped(' · '.join(named))}</div>{text}{lines}</div>"


def step_html(
    text: str, token_id: int, logprob: float, scalings_SN: Tensor, drafted: bool, names: Sequence[str]
) -> str:
    """One token, and a line for every expert that has a share. Args: `names` of the experts."""
    columns = (*names, BASE)
    share_SC = shares(scalings_SN.detach().cpu())
    words = f"id {token_id} · probability {_percent(math.exp(logprob))}{' · from a draft' if drafted else ''}"
    token = _span(text, logprob, share_SC.mean(dim=0), columns)
    return f"{_OUTER}<div><b>Step</b> {token} {words}</div>{_lines(share_SC, columns)}</div>"


def look(place: int, names: Sequence[str]) -> str:
    """CSS of an expert, or of the base, which comes last."""
    if place == len(names) - 1:
        colour, line = GREY, _LINES[0]
    else:
        colour, line = COLOURS[place % len(COLOURS)], _LINES[place // len(COLOURS) % len(_LINES)]
    return f"background:{colour}2e;border-bottom:2px {line} {colour}"


def _span(text: str, logprob: float, share_C: Tensor, names: Sequence[str]) -> str:
    """A token; one that was not predicted has no colour."""
    if bool(share_C.isnan().any()):
        return f"<span>{_escaped(text)}</span>"
    most = share_C.argsort(descending=True, stable=True)[:3].tolist()
    said = [f"{names[place]} {_percent(float(share_C[place]))}" for place in most if share_C[place] >= 0.005]
    title = ", ".join([*said, f"probability {_percent(math.exp(logprob))}"] if not math.isnan(logprob) else said)
    return f'<span title="{_escaped(title)}" style="{look(int(leaders(share_C)), names)}">{_escaped(text)}</span>'


def _lines(share_SC: Tensor, names: Sequence[str], led_C: Tensor | None = None) -> str:
    """A table: every expert, its share from the first site to the last, in all, and the part of tokens it leads."""
    bands_KC, share_C = bands(share_SC, _MOST_BANDS), share_SC.mean(dim=0)
    highest = float(bands_KC.max())
    cell = '<td style="text-align:left;padding:0 1em 0 0;white-space:pre">'
    rows = []
    for place, name in enumerate(names):
        if place == len(names) - 1 and share_C[place] < 0.0005 and (led_C is None or led_C[place] == 0):
            continue  # a softmax leaves nothing to the base
        words = [
            f'<span style="{look(place, names)}">{_escaped(name)}</span>',
            bars(bands_KC[:, place].tolist(), highest),
            _percent(float(share_C[place])) + ("" if led_C is None else f", leads {_percent(float(led_C[place]))}"),
        ]
        rows.append(f'<tr style="background:none">{"".join(f"{cell}{word}</td>" for word in words)}</tr>')
    said = f"share from the first site to the last; a full block is {_percent(highest)}"
    style = "border-collapse:collapse;margin:0;color:inherit;font:inherit"  # tables inherit neither in old modes
    return f'<table style="{style}">{"".join(rows)}</table><div style="opacity:.75">{said}</div>'


def _escaped(text: str) -> str:
    """As HTML that shows it: control characters and halves of characters as the sign for what cannot be shown."""
    plain = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
    return html.escape(plain, quote=True)


def _percent(value: float) -> str:
    return f"{value:.0%}"

"""Pictures of the mixing for papers: every function gives a matplotlib figure, `save` writes it.

    layers(summary)      layer x expert            ribbon(trace)      the text in colours
    kinds(summary)       kind of module x expert   timeline(trace)    shares along the text
    depth(summary)       how mixed, by layer       co_use(summary)    who acts with whom
    groups(summaries)    a bar of shares for each

Experts have the colours of Okabe and Ito, which people with any colour vision tell apart, then the same ones
hatched; the base is grey. Text stays text in SVG and PDF. Knows nothing of models. matplotlib is imported when
something is drawn.
Letters: T tokens  C columns: the experts, then the base
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch

from xloom.errors import ConfigError, TraceError
from xloom.seeing.segments import Segment, curve, trajectory
from xloom.seeing.statistics import leaders
from xloom.seeing.summary import ALL, BASE, Summary, Table
from xloom.trace import Trace
from xloom.trace.html import COLOURS as COLOURS
from xloom.trace.html import GREY as GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_HATCHES = ("", "///", "...", "xxx")
_STYLE: Mapping[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "xloom",
    "pdf.fonttype": 42,
    "hatch.linewidth": 0.6,
    "lines.solid_capstyle": "butt",
}
_WIDTH = 6.9  # inches: two columns of a paper
_LINE = 92  # letters of a line of the ribbon
_SPACE = "\u00a0"  # as SVG leaves out spaces at the ends of a text
_LETTER = 0.97 * _WIDTH * 72 / _LINE / 0.602  # points, so that they fill it: DejaVu Sans Mono is 0.602 em wide


P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """matplotlib's own settings and ours, whatever the caller has set."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style

        with style.context(["default", dict(_STYLE)]):
            return draw(*args, **kwargs)

    return drawn


def look(name: str, experts: Sequence[str]) -> dict[str, Any]:
    """Colour and hatch of an expert, or of the base, as matplotlib's patches take them."""
    if name == BASE:
        return {"facecolor": GREY, "hatch": ""}
    place = list(experts).index(name)
    hatch = _HATCHES[place // len(COLOURS) % len(_HATCHES)]
    return {"facecolor": COLOURS[place % len(COLOURS)], "hatch": hatch, "edgecolor": "white" if hatch else "none"}


@styled
def save(figure: "Figure", path: Path | str) -> None:
    """Writes PNG (300 dots per inch), SVG or PDF; the same figure gives the same bytes.

    Raises:
        ConfigError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: expected a picture ending in {', '.join(FORMATS)}")
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=300, metadata=undated)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


# --- of summaries ---


@styled
def layers(summary: Summary, *, of: str = ALL) -> "Figure":
    """Mean share of every expert in every layer, as a map. `of` is a class of tokens."""
    return _map(summary.share("layer", of), f"mean share by layer, {_tokens(summary, of)}", "layer")


@styled
def kinds(summary: Summary, *, of: str = ALL) -> "Figure":
    """Mean share of every expert at every kind of module, as a map."""
    return _map(summary.share("kind", of), f"mean share by kind of module, {_tokens(summary, of)}", "")


@styled
def groups(summaries: Mapping[str, Summary], *, of: str = ALL) -> "Figure":
    """Mean shares of several summaries, a bar for each: one for every domain, say.

    Raises:
        TraceError: no summary.
    """
    if not summaries:
        raise TraceError("expected summaries to draw, found none")
    first = next(iter(summaries.values()))
    figure, axes = _figure(0.9 + 0.27 * len(summaries))
    for place, summary in enumerate(summaries.values()):
        left = 0.0
        for name, share in zip(summary.columns, summary.share(of=of).values[0].tolist(), strict=True):
            axes.barh(place, share, left=left, height=0.78, **look(name, first.experts))
            left += share
    axes.set_yticks(range(len(summaries)), list(summaries))
    axes.invert_yaxis()
    _percent(axes.xaxis)
    axes.set_xlim(0, 1)
    axes.set_title("mean share of every expert")
    _legend(figure, first.columns, first.experts)
    return figure


@styled
def depth(summary: Summary, *, of: str = ALL) -> "Figure":
    """How many experts act at one token and site, and how many over all tokens, by layer (effective numbers)."""
    figure, axes = _figure(2.4)
    mixed, used = summary.mixedness("layer", of), summary.diversity("layer", of)
    across = range(len(mixed.rows))
    axes.plot(across, mixed.values[:, 1].tolist(), color=COLOURS[0], marker="o", ms=3, label="at one token and site")
    axes.plot(across, used.values[:, 0].tolist(), color=COLOURS[1], marker="s", ms=3, ls="--", label="over all tokens")
    _thin_ticks(axes, mixed.rows)
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("effective number of experts")
    axes.set_title(f"how mixed, by depth, {_tokens(summary, of)}")
    axes.legend(frameon=False)
    return figure


@styled
def co_use(summary: Summary, *, of: str = ALL, within: Literal["site", "token"] = "token") -> "Figure":
    """Experts as discs on a circle, as large as their share; a line between two is as wide as they act together.

    Args:
        within: together at the same token and site, or anywhere in the same token.
    """
    from matplotlib.patches import Circle

    figure, axes = _figure(4.2, width=5.4)
    table = summary.co_use(of, within=within)
    names, values = table.columns, table.values
    at = [(math.sin(2 * math.pi * i / len(names)), math.cos(2 * math.pi * i / len(names))) for i in range(len(names))]
    for i in range(len(names)):
        for j in range(i):
            if (both := 2 * float(values[i, j])) > 1e-3:
                axes.plot(*zip(at[i], at[j], strict=True), color="#555555", lw=40 * both, alpha=0.55, zorder=1)
                if both >= 0.02:
                    middle = ((at[i][0] + at[j][0]) / 2, (at[i][1] + at[j][1]) / 2)
                    axes.annotate(f"{both:.0%}", middle, ha="center", fontsize=7)
    for name, (x, y), share in zip(names, at, values.sum(dim=1).tolist(), strict=True):
        style = look(name, summary.experts)
        radius = 0.05 + 0.28 * math.sqrt(share)
        axes.add_patch(Circle((x, y), radius, zorder=2, **style))
        beside = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
        away = 1 + radius + (0.2 if beside == "center" else 0.08)
        axes.annotate(f"{name}\n{share:.0%}", (away * x, away * y), ha=beside, va="center", fontsize=8, zorder=3)
    axes.set(xlim=(-2.1, 2.1), ylim=(-1.6, 1.6), aspect="equal")
    axes.axis("off")
    axes.set_title(f"who acts with whom at the same {within}")
    return figure


# --- of one text ---


@styled
def timeline(trace: Trace, segments: Sequence[Segment] | None = None) -> "Figure":
    """Shares along the text, stacked; lines where the mixing changes, and the turns of a conversation below.

    Args:
        segments: from `trajectory`, which is asked without them.
    """
    from matplotlib.transforms import blended_transform_factory

    segments = trajectory(trace) if segments is None else segments
    figure, axes = _figure(2.5)
    columns = (*trace.experts, BASE)
    shares_TC = curve(trace).nan_to_num(0.0)
    edges = [place - 0.5 for place in range(len(trace) + 1)]
    low = torch.zeros(len(trace), dtype=torch.float64)
    for at, name in enumerate(columns):
        high = low + shares_TC[:, at]
        axes.stairs(high.tolist(), edges, baseline=low.tolist(), fill=True, lw=0, **look(name, trace.experts))
        low = high
    for segment in segments[1:]:
        axes.axvline(segment.start - 0.5, color="black", lw=0.9, ls=":")
    below = blended_transform_factory(axes.transData, axes.transAxes)
    for turn in trace.turns:
        axes.plot(
            [turn.start - 0.3, turn.stop - 0.7], [-0.04, -0.04], color="#555555", lw=1.5, transform=below, clip_on=False
        )
        middle = (turn.start + turn.stop - 1) / 2
        axes.text(middle, -0.1, turn.role, ha="center", va="top", fontsize=7, color="#555555", transform=below)
    axes.tick_params(axis="x", pad=14)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="token")
    _percent(axes.yaxis)
    axes.set_title("share of every expert, mean over sites")
    _legend(figure, columns, trace.experts)
    return figure


@styled
def ribbon(trace: Trace) -> "Figure":
    """The text itself: each token on the colour of the expert that leads it, fainter where it leads by less."""
    from matplotlib.patches import Rectangle

    shares_TC = curve(trace)
    columns = (*trace.experts, BASE)
    lines = _lines(trace)
    figure, axes = _figure(0.6 + 0.2 * len(lines))
    for row, line in enumerate(lines):
        for place, start, piece in line:
            share_C = shares_TC[place]
            if not bool(share_C.isnan().any()):
                name = columns[int(leaders(share_C))]
                style = look(name, trace.experts) | {"alpha": 0.15 + 0.6 * float(share_C.max()), "lw": 0}
                axes.add_patch(Rectangle((start, row - 0.42), len(piece), 0.84, **style))
            shown = piece.replace(" ", _SPACE)
            axes.text(start, row, shown, family="monospace", fontsize=_LETTER, va="center", parse_math=False)
    axes.set(xlim=(0, _LINE), ylim=(len(lines) - 0.4, -0.6))
    axes.axis("off")
    _legend(figure, columns, trace.experts)
    return figure


def _lines(trace: Trace) -> list[list[tuple[int, int, str]]]:
    """Pieces of text in lines: which token, at which letter of the line, what."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    at = 0
    for place, text in enumerate(trace.tokens.texts):
        for number, part in enumerate(text.split("\n")):
            if number:
                lines.append([])
                at = 0
            while part:
                if at >= _LINE:
                    lines.append([])
                    at = 0
                piece, part = part[: _LINE - at], part[_LINE - at :]
                lines[-1].append((place, at, piece))
                at += len(piece)
    return [line for line in lines if line] or [[]]


# --- parts ---


def _figure(height: float, width: float = _WIDTH) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _map(table: Table, title: str, label: str) -> "Figure":
    """Rows across, columns down: layers run as the text of the model does."""
    figure, axes = _figure(0.9 + 0.24 * len(table.columns))
    most = math.ceil(10 * float(table.values.max())) / 10  # up to the next 10 %
    image = axes.imshow(
        table.values.T.tolist(), aspect="auto", cmap="cividis", vmin=0, vmax=max(most, 0.1), interpolation="nearest"
    )
    axes.set_yticks(range(len(table.columns)), list(table.columns))
    _thin_ticks(axes, table.rows)
    axes.set_xlabel(label)
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    _percent(bar.ax.yaxis)
    return figure


def _thin_ticks(axes: "Axes", labels: Sequence[str]) -> None:
    step = max(1, math.ceil(len(labels) / 16))
    axes.set_xticks(range(0, len(labels), step), list(labels[::step]))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _legend(figure: "Figure", names: Sequence[str], experts: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(label=name, **look(name, experts)) for name in names]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(names), 8),
        frameon=False,
        fontsize=7.5,
        handlelength=1.1,
        handletextpad=0.4,
        columnspacing=1.1,
    )


def _tokens(summary: Summary, of: str) -> str:
    which = "tokens" if of == ALL else f"{of} tokens"
    return f"{summary.tokens(of):,} {which}"

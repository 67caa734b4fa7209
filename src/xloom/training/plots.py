"""Curves as inline SVG that reads on light and dark paper.

The SVG holds no words of the caller but its description: names of lines stand in a legend of the page, which `key`
gives colour and dash. Text stays text, axes are mid-grey, the ground is transparent, and the same points give the same
bytes. Knows nothing of runs, records or pages. matplotlib is imported when something is drawn.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from xml.etree import ElementTree

Points = Sequence[tuple[float, float]]

# Okabe and Ito's colours that stand out from white and from black alike (their yellow and black do not).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dashed", "dotted")
GREY = "#808080"

_SIZE = (4.4, 2.5)  # inches
_MOST_POINTS = 500
_TREND_FROM, _TREND_POINTS = 50, 20
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@dataclass(frozen=True)
class Chart:
    """Lines over optimizer steps, each [(step, value), ...].

    `unit` "share" is drawn from 0 to 1 in percent; `noisy` lines get their trend drawn over them.
    """

    title: str
    lines: Mapping[str, Points]
    unit: Literal["number", "share"] = "number"
    noisy: bool = False

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Name, colour and dash of every line."""
        return [(name, *key(i)) for i, name in enumerate(self.lines)]


def key(index: int) -> tuple[str, str]:
    """Colour and dash (a word of CSS and of matplotlib) of a line; they repeat after 18."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours, so that no step is left out."""
    if len(points) <= most:
        return list(points)
    edges = [len(points) * i // most for i in range(most + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element for a page of HTML 5."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", {**_STYLE, "svg.hashsalt": chart.title}]):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)  # savefig then writes with it
        axes = figure.add_subplot()
        for i, points in enumerate(chart.lines.values()):
            _line(axes, points, *key(i), noisy=chart.noisy)
        _scales(axes, chart.unit)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return _inline(file.getvalue(), chart)


def describe(chart: Chart) -> str:
    """The chart in words, for whoever does not see it."""
    parts = [
        f"{name} from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"
        for name, points in chart.lines.items()
        if points
    ]
    return f"{chart.title}: {'; '.join(parts)}"


def _line(axes: Any, points: Points, colour: str, dash: str, *, noisy: bool) -> None:
    shown = thin(points, _MOST_POINTS)
    if noisy and len(points) > _TREND_FROM:
        axes.plot(*zip(*shown), color=colour, linewidth=0.6, alpha=0.4)
        shown = thin(points, _TREND_POINTS)
    marker = "o" if len(shown) <= 12 else None
    axes.plot(*zip(*shown), color=colour, linestyle=dash, linewidth=1.4, marker=marker, markersize=2.5)


def _scales(axes: Any, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes.set_xlabel("step")
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if unit == "share":
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _inline(svg: str, chart: Chart) -> str:
    """matplotlib's file as one element of a page: no namespaces, no date, no style for all of it, ids of its own."""
    root = ElementTree.fromstring(svg)
    prefix = "-".join(chart.title.lower().split())
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == "href" and value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(name, f"url(#{prefix}-{value[5:]}")
    words = describe(chart)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img", "aria-label": words}
    title = ElementTree.Element("title")
    title.text = words
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")

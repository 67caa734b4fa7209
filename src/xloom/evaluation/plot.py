"""One picture of an evaluation: the Oracle-normalised mean of every system, and its score in every column."""

from pathlib import Path
from typing import Any

import numpy as np

from xloom.errors import ConfigError
from xloom.evaluation.registry import HEAD, ORACLE
from xloom.evaluation.results import Evaluation
from xloom.evaluation.statistics import Interval

FORMATS = (".png", ".svg", ".pdf")
_BLUE, _ORANGE, _GREY = "#2a6fbb", "#e07b00", "#9aa0a6"


def check_plot(path: Path) -> None:
    """Raises ConfigError, before any time is spent, for a file that could not be written."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: expected a picture ending in {', '.join(FORMATS)}")


def plot(found: Evaluation, path: Path) -> None:
    """Writes the picture. Left: bars with 95 % intervals, the Oracle's line. Right: a map, per cent.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_plot(path)
    systems = [outcome.system for outcome in found.outcomes]
    whole = [found.normalised(system) or found.score(system) for system in systems]
    relative = any(found.normalised(system) for system in systems)
    height = 1.6 + 0.27 * len(systems)
    figure = Figure(figsize=(7.5 + 0.62 * len(found.columns), height), layout="constrained")
    bars, cells = figure.subplots(1, 2, sharey=True, width_ratios=[4.2, 0.72 * len(found.columns) + 0.6])
    _bars(bars, systems, whole, relative)
    _cells(figure, cells, found, systems)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=_without_date(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _bars(axes: Any, systems: list[str], values: list[Interval | None], relative: bool) -> None:
    for place, (system, value) in enumerate(zip(systems, values, strict=True)):
        if value is None:
            continue
        colour = _ORANGE if system == ORACLE else _BLUE if system.partition(":")[0] == HEAD else _GREY
        errors = [[100 * max(value.value - value.low, 0)], [100 * max(value.high - value.value, 0)]]
        axes.barh(place, 100 * value.value, xerr=errors, color=colour, height=0.72, error_kw={"lw": 1, "capsize": 2})
        axes.text(100 * value.high + 1.5, place, f"{100 * value.value:.1f}", va="center", fontsize=7.5, color="#333333")
    if relative:
        axes.axvline(100, color=_ORANGE, lw=1, ls="--", zorder=0)
    highest = max((100 * value.high for value in values if value is not None), default=100)
    axes.set_xlim(0, highest * 1.12 + 2)
    axes.set_yticks(range(len(systems)), systems, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("% of the Oracle, mean over domains" if relative else "mean score, %", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _cells(figure: Any, axes: Any, found: Evaluation, systems: list[str]) -> None:
    scores = [[found.score(system, column) for column in found.columns] for system in systems]
    values = np.array([[np.nan if s is None else 100 * s.value for s in row] for row in scores])
    axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = value > 55
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="white" if light else "black"
            )
    axes.set_xticks(range(len(found.columns)), found.columns, fontsize=8, rotation=40, ha="right")
    axes.tick_params(axis="y", length=0)
    axes.set_title("score, %", fontsize=9, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


def _without_date(path: Path) -> dict[str, Any]:
    """The same evaluation gives the same bytes."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})

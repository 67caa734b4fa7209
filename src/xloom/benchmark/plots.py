"""Pictures of what benchmarks found: every function gives a matplotlib figure, `xloom.seeing.plots.save` writes it.

    speed(report)      times the base, a panel for each length      (decode, prefill)
    drafts(report)     times the base, a panel for each column
    experts(report)    times four experts by their number, decode and prefill
    memory(report)     peak of the process by system, a panel for each task
    training(report)   steps against PEFT's, a panel for each number of experts

Bars and points are medians, lines and bands quartiles. Where one value dwarfs another all panels are logarithmic, with
points, as a bar has no length there. Knows nothing of models. matplotlib is imported when something is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xloom.benchmark.bench_drafts import DraftReport
from xloom.benchmark.bench_experts import COMPARED, ExpertsReport
from xloom.benchmark.bench_memory import MemoryReport
from xloom.benchmark.settings import PEFT
from xloom.benchmark.tables import BASE, Report, SpeedReport
from xloom.benchmark.train_tables import TrainReport
from xloom.seeing.plots import COLOURS, GREY, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _THEIRS = COLOURS[0], COLOURS[4]  # blue and vermilion
_LINES = (_OURS, _THEIRS, *COLOURS[2:4], COLOURS[1])
_LOGARITHMIC_FROM = 8.0  # times the shortest bar
_MOST_IN_A_ROW = 4


class Bar(NamedTuple):
    """One system: its value, how far it spreads, and whether it was estimated."""

    name: str
    value: float
    low: float
    high: float
    estimated: bool = False


def draw(report: Report[Any]) -> "Figure":
    """The picture of a report, by its kind."""
    drawings: dict[type, Callable[[Any], Figure]] = {
        SpeedReport: speed,
        DraftReport: drafts,
        ExpertsReport: experts,
        MemoryReport: memory,
        TrainReport: training,
    }
    return drawings[type(report)](report)


def speed(report: SpeedReport) -> "Figure":
    """Time per token, times the base's."""
    panels: dict[str, list[Bar]] = {}
    for row in report.rows:
        where = f"{row.new_tokens} new tokens" if row.new_tokens else f"prompt of {row.prompt_tokens} tokens"
        bar = Bar(row.system, row.ratio_to_base, row.ratio_low, row.ratio_high, row.estimated)
        panels.setdefault(where, []).append(bar)
    return _bars(panels, f"{report.what}: time per token, times the base's", report, mark=1.0)


def drafts(report: DraftReport) -> "Figure":
    """Time per token, times the base's."""
    panels: dict[str, list[Bar]] = {}
    for row in report.rows:
        bar = Bar(row.system, row.ratio_to_base, row.ratio_low, row.ratio_high)
        panels.setdefault(row.column, []).append(bar)
    return _bars(panels, "time per token, times the base's", report, mark=1.0)


def memory(report: MemoryReport) -> "Figure":
    """Peak memory of a process, and what tensors of a call hold."""
    panels: dict[str, list[Bar]] = {}
    for row in report.rows:
        what = f"{row.new_tokens} new tokens" if row.new_tokens else f"prompt of {row.prompt_tokens} tokens"
        for kind, value in (("peak", row.peak_mb), ("in call", row.call_mb)):
            panels.setdefault(f"{what}: {kind}, MB", []).append(Bar(row.system, value, value, value))
    return _bars(panels, "memory", report, most_in_a_row=2, form="{:.0f}")


def training(report: TrainReport) -> "Figure":
    """How many times faster than PEFT's a step is."""
    panels: dict[str, list[Bar]] = {}
    for row in report.rows:
        bar = Bar(row.system, row.ratio_to_peft, row.ratio_low, row.ratio_high)
        panels.setdefault(f"{row.experts} experts", []).append(bar)
    return _bars(panels, "training step, times faster than PEFT", report, mark=1.0)


@styled
def experts(report: ExpertsReport) -> "Figure":
    """Time per token by the number of experts, times that of four experts, or of the base where four were left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.9, 3.1), layout="constrained")
    tasks = list(dict.fromkeys(row.task for row in report.rows))
    mixed = [row for row in report.rows if row.experts]
    relative = all(row.ratio_to_4 is not None for row in mixed)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        for row in mixed:
            values = row.ratio_to_base, row.ratio_low, row.ratio_high
            if relative:
                values = row.ratio_to_4 or 0.0, row.ratio_to_4_low or 0.0, row.ratio_to_4_high or 0.0
            if row.task == task:
                lines.setdefault(row.system, []).append((row.experts, *values))
        for colour, (name, points) in zip(_LINES, lines.items(), strict=False):
            counts, middle, low, high = zip(*points, strict=True)
            axes.plot(counts, middle, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
            axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
        _number_axis(axes, sorted({row.experts for row in mixed}))
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_title(task)
    figure.axes[0].set_ylabel(f"time per token, times {f'{COMPARED} experts' if relative else 'the base'}")
    figure.axes[0].legend(frameon=False)
    _about(figure, "more experts", report)
    return figure


def _number_axis(axes: "Axes", counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("experts")
    axes.set_ylim(bottom=0)


@styled
def _bars(
    panels: Mapping[str, Sequence[Bar]],
    title: str,
    report: Report[Any],
    *,
    mark: float | None = None,
    most_in_a_row: int = _MOST_IN_A_ROW,
    form: str = "{:.2f}",
) -> "Figure":
    """A panel for each key, all on the scale of the `mark` where there is one."""
    from matplotlib.figure import Figure

    columns = min(len(panels), most_in_a_row)
    rows = -(-len(panels) // columns)
    tallest = max(len(bars) for bars in panels.values())
    values = [bar.value for bars in panels.values() for bar in bars]
    logarithmic = mark is not None and max(values) > _LOGARITHMIC_FROM * min(values)
    figure = Figure(figsize=(1.9 + 2.5 * columns, 0.9 + rows * (0.5 + 0.2 * tallest)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=mark is not None).flatten()
    before: list[str] = []
    for place, (axes, (where, bars)) in enumerate(zip(grid, panels.items(), strict=False)):
        _panel(axes, bars, mark, form, logarithmic)
        axes.set_title(where)
        names = [bar.name for bar in bars]
        axes.tick_params(labelleft=not place % columns or names != before, labelbottom=True)
        before = names
    highest = max(max(bar.value, bar.high) for bars in panels.values() for bar in bars)
    if mark is not None:
        lowest = min(min(bar.value, bar.low) for bars in panels.values() for bar in bars)
        limits = (min(lowest, mark) / 1.3, highest * 2.2) if logarithmic else (0, highest * 1.25)
        grid[0].set_xlim(*limits)
    for axes in grid[len(panels) :]:
        axes.remove()
    _about(figure, title, report)
    return figure


def _panel(axes: "Axes", bars: Sequence[Bar], mark: float | None, form: str, logarithmic: bool) -> None:
    for place, bar in enumerate(bars):
        reach = [[max(bar.value - bar.low, 0)], [max(bar.high - bar.value, 0)]]
        if logarithmic:
            axes.errorbar(bar.value, place, xerr=reach, color=_colour(bar.name), fmt="o", markersize=4.5, lw=0.9)
        else:
            axes.barh(place, bar.value, xerr=reach, color=_colour(bar.name), height=0.7, error_kw={"lw": 0.9})
        label = f"{'~' if bar.estimated else ''}{form.format(bar.value)}"
        side = (max(bar.value, bar.high), place)
        axes.annotate(label, side, (5, 0), textcoords="offset points", va="center", fontsize=7)
    if logarithmic:
        axes.set_xscale("log")
        axes.grid(axis="x", which="major", alpha=0.3)
        ticks = [digit * 10.0**power for power in range(-2, 5) for digit in (1, 2, 5)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    elif mark is None:
        axes.set_xlim(0, 1.25 * max(max(bar.value, bar.high) for bar in bars))
    if mark is not None:
        axes.axvline(mark, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)


def _colour(name: str) -> str:
    if name == BASE or name.startswith(f"{BASE}-"):
        return GREY
    return _THEIRS if name.startswith(PEFT) else _OURS


def _about(figure: "Figure", title: str, report: Report[Any]) -> None:
    m = report.machine
    where = f"{m['accelerator'] or m['cpu']}, {m['threads']} threads, load {m['load_before']} to {m['load_after']}"
    figure.suptitle(f"{title}\n{where}", fontsize=9, x=0.01, ha="left")

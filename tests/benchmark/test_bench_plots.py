"""Pictures of benchmarks show the report's own numbers, whatever its kind, and are written in every format."""

import dataclasses
from pathlib import Path

import pytest

from xloom.benchmark import plots
from xloom.benchmark.bench_drafts import DraftReport, DraftRow
from xloom.benchmark.bench_experts import ExpertsReport, ExpertsRow
from xloom.benchmark.bench_memory import MemoryReport, MemoryRow
from xloom.benchmark.tables import Row, SpeedReport
from xloom.benchmark.train_tables import TrainReport, timed_row
from xloom.seeing.plots import save

MACHINE = {"accelerator": None, "cpu": "a processor", "threads": 2, "load_before": 0.5, "load_after": 0.7, "torch": "2"}


def row(system: str, new: int, ratio: float, **more) -> Row:
    return Row(system, 32, new, 3, 100.0, 2.0, 1.0, 3.0, 1.0, ratio, 0.9 * ratio, 1.2 * ratio, **more)


def speed(what: str = "decode", new: int = 64) -> SpeedReport:
    rows = [row("base", new, 1.0), row("peft", new, 20.0, estimated=True), row("xloom", new, 2.0)]
    return SpeedReport(what, MACHINE, {}, rows)


def drafts() -> DraftReport:
    rows = [DraftRow(s, c, 1, 9, 5.0, r, r, r) for c in ("a", "b", "all") for s, r in (("base", 1.0), ("m", 2.5))]
    return DraftReport("drafts", MACHINE, {}, rows)


def experts(relative: bool = True) -> ExpertsReport:
    rows = [ExpertsRow(task, 0, 0, 9, 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0) for task in ("decode", "prefill")]
    for task in ("decode", "prefill"):
        for count in (4, 8, 64):
            for top in (0, 2):
                four = count / 4 if relative else None
                rows.append(ExpertsRow(task, count, top, 9, 3, 1.0, 1.0, 1.0, count / 2, 1.0, 99.0, four, four, four))
    return ExpertsReport("experts", MACHINE, {}, rows)


def memory() -> MemoryReport:
    rows = [
        MemoryRow(task, 32, new, system, peak, 300.0, 20.0, 1.0, 1.0)
        for task, new in (("prefill", 0), ("decode", 256))
        for system, peak in (("base", 700.0), ("xloom", 812.0))
    ]
    return MemoryReport("memory", MACHINE, {}, rows)


def training() -> TrainReport:
    rows = [timed_row(name, 4, [1.0], [n], 1.0, None, 1) for name, n in (("peft", 1.0), ("xloom", 3.25))]
    return TrainReport("train", MACHINE, {}, rows)


def words(axes) -> set[str]:
    return {text.get_text() for text in [*axes.texts, *axes.get_yticklabels(), axes.title]} | {axes.get_title("left")}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("made", [speed, drafts, experts, memory, training])
def test_every_report_has_a_picture(made, suffix: str, tmp_path: Path):
    figure = plots.draw(made())
    assert "a processor, 2 threads, load 0.5 to 0.7" in figure.get_suptitle()
    save(figure, tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").stat().st_size > 1000


def test_points_of_speed():
    """One value dwarfs the others: points on a logarithmic scale, with quartiles, and what is estimated says so."""
    (axes,) = plots.speed(speed()).axes
    assert [float(points.lines[0].get_xdata()[0]) for points in axes.containers] == [1.0, 20.0, 2.0]
    assert words(axes) >= {"base", "peft", "xloom", "~20.00", "2.00", "64 new tokens"}
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 0.9 < 24.0 < high
    (line,) = axes.containers[1].lines[2]
    assert list(line.get_segments()[0][:, 0]) == pytest.approx([18.0, 24.0])
    assert "prompt of 32 tokens" in words(plots.speed(speed("prefill", 0)).axes[0])


def test_panels_of_speed_have_one_scale():
    both = dataclasses.replace(speed(), rows=[*speed().rows, *speed(new=256).rows[::2]])
    first, second = plots.speed(both).axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_xscale() == second.get_xscale() == "log"


def test_a_panel_for_each_column_of_drafts():
    axes = plots.drafts(drafts()).axes
    assert [panel.get_title("left") for panel in axes] == ["a", "b", "all"]
    assert [[bar.get_width() for bar in panel.patches] for panel in axes] == [[1.0, 2.5]] * 3
    assert axes[0].get_xscale() == "linear"


@pytest.mark.parametrize(("relative", "expected"), [(True, [1, 2, 16]), (False, [2, 4, 32])])
def test_lines_of_experts(relative: bool, expected: list[float]):
    figure = plots.experts(experts(relative))
    assert [axes.get_title("left") for axes in figure.axes] == ["decode", "prefill"]
    for axes in figure.axes:
        for line in axes.lines[:2]:
            assert list(line.get_xdata()) == [4, 8, 64]
            assert list(line.get_ydata()) == expected
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["all mixed", "top-2"]
    assert ("4 experts" if relative else "the base") in figure.axes[0].get_ylabel()


def test_bars_of_memory_and_training():
    titles = [axes.get_title("left") for axes in plots.memory(memory()).axes]
    assert titles == [
        f"{what}: {kind}, MB"
        for what in ("prompt of 32 tokens", "256 new tokens")
        for kind in ("peak", "in call")
    ]  # fmt: skip
    assert [bar.get_width() for bar in plots.memory(memory()).axes[0].patches] == [700, 812]
    (axes,) = plots.training(training()).axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 3.25]

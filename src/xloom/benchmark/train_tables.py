"""What `bench_train` found: rows and the table on the terminal. Knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from rich.table import Table

from xloom.benchmark.tables import Report, filled, shown
from xloom.benchmark.timing import ratios, spread

EPOCHS = 3  # over which the time to fill a cache of head states is spread


@dataclass(frozen=True)
class TrainRow:
    """One system at one number of experts. Low and high are quartiles over the rounds.

    `ratio_to_peft` says how many times faster than PEFT a step is: the median of the per-round ratios. `peak_mb` and
    `floor_mb` (torch and the base loaded, nothing trained) are those of a process of its own, in 10^6 bytes, and
    `memory_to_peft` the peaks' quotient; `step_mb` is the most that tensors made during a step hold at once, whatever
    malloc makes of them, with its quotient `step_to_peft`. None where memory was not measured.

    `fill_s_per_row` is the time to compute what the head reads once, and `s_per_step_with_fill` the time of a step with
    that spread over 3 epochs; None where nothing is computed beforehand. `loss_equal` is None for another model and in
    16-bit dtypes; else it says whether the first step's loss and the head's gradients are PEFT's to a relative 1e-3 (of
    their norm), and `gradient_error` gives the relative distance.
    """

    system: str
    experts: int
    rounds: int
    s_per_step: float
    s_per_step_low: float
    s_per_step_high: float
    s_per_step_min: float
    ratio_to_peft: float
    ratio_low: float
    ratio_high: float
    loss: float
    loss_equal: bool | None = None
    gradient_error: float | None = None
    fill_s_per_row: float | None = None
    s_per_step_with_fill: float | None = None
    peak_mb: float | None = None
    floor_mb: float | None = None
    memory_to_peft: float | None = None
    step_mb: float | None = None
    step_to_peft: float | None = None


def timed_row(
    system: str,
    experts: int,
    seconds: Sequence[float],
    peft: Sequence[float],
    loss: float,
    fill_s: float | None,
    batch: int,
) -> TrainRow:
    """A row without memory or comparison, from seconds per step by round; `fill_s` is that of a batch."""
    mine, faster = spread(seconds), ratios(peft, seconds)
    return TrainRow(
        system=system,
        experts=experts,
        rounds=len(seconds),
        s_per_step=mine.median,
        s_per_step_low=mine.low,
        s_per_step_high=mine.high,
        s_per_step_min=min(seconds),
        ratio_to_peft=faster.median,
        ratio_low=faster.low,
        ratio_high=faster.high,
        loss=loss,
        fill_s_per_row=None if fill_s is None else fill_s / batch,
        s_per_step_with_fill=None if fill_s is None else mine.median + fill_s / EPOCHS,
    )


@final
@dataclass(frozen=True)
class TrainReport(Report[TrainRow]):
    """What `bench_train` found."""

    def table(self) -> Table:
        s = self.settings
        title = (
            f"{self.what}: {s['base']}, experts of rank {s['rank']}, {s['dtype']}, {s['batch']} rows of {s['tokens']} "
            f"tokens, loss on the last {s['completion']}"
        )
        columns = {
            "system": [row.system for row in self.rows],
            "experts": [str(row.experts) for row in self.rows],
            "s/step": [f"{row.s_per_step:.2f}" for row in self.rows],
            "x faster": [f"{row.ratio_to_peft:.2f}" for row in self.rows],
            "quartiles": [f"{row.ratio_low:.2f}-{row.ratio_high:.2f}" for row in self.rows],
            "peak MB": [shown(row.peak_mb, ".0f") for row in self.rows],
            "of PEFT": [shown(row.memory_to_peft, ".2f") for row in self.rows],
            "in step": [shown(row.step_mb, ".0f") for row in self.rows],
            "= PEFT": ["" if row.loss_equal is None else "yes" if row.loss_equal else "NO" for row in self.rows],
        }
        table = Table(title=title, caption=self.caption(), box=None)
        return filled(table, columns, sections=[0] * len(self.rows))

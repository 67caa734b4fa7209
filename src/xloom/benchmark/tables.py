"""What a benchmark found: rows, the table on the terminal, and the JSON file.

Knows nothing of models or of how times were taken.
"""

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from rich.table import Table

from xloom.benchmark.timing import Timed, ratios, spread
from xloom.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True)
class Row:
    """One system at one length. Times are in milliseconds; low and high are quartiles over the rounds.

    `ms` is the whole call: for decode the prompt and all new tokens, for prefill one forward over the prompt and its
    next token. `ms_per_token` divides it by the new tokens (decode) or by the prompt's (prefill). `ratio_to_base` is
    the median of the per-round ratios. `tokens_equal_to_peft` is None where nothing need be equal, or PEFT was not run;
    else `tokens_equal` counts the tokens before the first difference, of `tokens_compared`.
    """

    system: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    ms: float
    ms_per_token: float
    ms_per_token_low: float
    ms_per_token_high: float
    ms_per_token_min: float
    ratio_to_base: float
    ratio_low: float
    ratio_high: float
    tokens_equal_to_peft: bool | None = None
    tokens_equal: int | None = None
    tokens_compared: int | None = None


@dataclass(frozen=True)
class Report(ABC, Generic[R]):
    """Rows of one benchmark, where and with what settings they were taken, and what was left out."""

    what: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[R]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def caption(self) -> str:
        """Machine, load and notes, a line each."""
        m = self.machine
        about = (
            f"{m['accelerator'] or m['cpu']}, {m['threads']} threads, load {m['load_before']} before and "
            f"{m['load_after']} after, torch {m['torch']}"
        )
        return "\n".join([about, *self.notes])

    @abstractmethod
    def table(self) -> Table:
        """For `rich.console.Console().print`."""


@final
@dataclass(frozen=True)
class SpeedReport(Report[Row]):
    """What `bench_decode` and `bench_prefill` found."""

    def table(self) -> Table:
        s = self.settings
        title = f"{self.what}: {s['base']}, {s['experts']} experts of rank {s['rank']}, {s['dtype']}"
        table = Table(title=title, caption=self.caption(), caption_justify="left")
        table.add_column("system")
        for column in ("prompt", "new", "rounds", "ms/token", "quartiles", "x base", "quartiles", "= PEFT"):
            table.add_column(column, justify="right")
        before = None
        for row in self.rows:
            length = (row.prompt_tokens, row.new_tokens)
            if before not in (None, length):
                table.add_section()
            before = length
            table.add_row(
                row.system,
                str(row.prompt_tokens),
                str(row.new_tokens),
                str(row.rounds),
                f"{row.ms_per_token:.2f}",
                f"{row.ms_per_token_low:.2f}-{row.ms_per_token_high:.2f}",
                f"{row.ratio_to_base:.2f}",
                f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
                "" if row.tokens_compared is None else f"{row.tokens_equal}/{row.tokens_compared}",
            )
        return table


def rows_of(
    timed: Mapping[str, Timed["Tensor"]],
    *,
    prompt_tokens: int,
    new_tokens: int,
    reference: "Tensor | None",
    exact: Collection[str],
) -> list[Row]:
    """One row per system, from its seconds and the tokens [1, T] it gave.

    Args:
        timed: by system; "base" among them.
        new_tokens: 0 for prefill, whose times are per prompt token.
        reference: PEFT's tokens, as far as it went; the systems named in `exact` must have given the same.
    """
    ms = 1e3 / (new_tokens or prompt_tokens)
    rows = []
    for name, times in timed.items():
        seconds, ratio = spread(times.seconds), ratios(times.seconds, timed["base"].seconds)
        row = Row(
            system=name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=len(times.seconds),
            ms=1e3 * seconds.median,
            ms_per_token=ms * seconds.median,
            ms_per_token_low=ms * seconds.low,
            ms_per_token_high=ms * seconds.high,
            ms_per_token_min=ms * min(times.seconds),
            ratio_to_base=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
        )
        if reference is not None and name in exact:
            compared = min(reference.shape[1], times.result.shape[1])
            same = (reference[0, :compared] == times.result[0, :compared]).long()
            equal = int(same.cumprod(0).sum())
            row = replace(row, tokens_equal_to_peft=equal == compared, tokens_equal=equal, tokens_compared=compared)
        rows.append(row)
    return rows


def check_target(path: Path) -> None:
    """Raises ConfigError, before any time is spent, where `write_report` could not write."""
    if path.is_dir():
        raise ConfigError(f"{path}: expected a file to write, found a folder")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.resolve().parent} to write into")


def write_report(report: Report[Any], path: Path) -> None:
    """Writes the JSON file; a reader sees the old one or the new one, never half. Raises ConfigError."""
    check_target(path)
    text = json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.resolve().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            fresh = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                fresh.chmod(0o644)
                os.replace(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error

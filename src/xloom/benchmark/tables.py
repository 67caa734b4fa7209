"""What a benchmark found: rows, the table on the terminal, and the JSON file.

Knows nothing of models or of how times were taken.
"""

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from rich.table import Table

from xloom.benchmark.settings import PEFT
from xloom.benchmark.timing import ratios, spread
from xloom.errors import ConfigError

if TYPE_CHECKING:
    from xloom.benchmark.systems import Decoded
    from xloom.decoding import Tally

R = TypeVar("R")
BASE = "base"


@dataclass(frozen=True)
class Row:
    """One system at one length. Times are in milliseconds; low and high are quartiles over the rounds.

    `ms` is the whole call: for decode the prompt and all new tokens, for prefill one forward over the prompt and its
    next token. `ms_per_token` is what a token takes once the first is there (decode), or `ms` by the prompt's tokens
    (prefill). `ratio_to_base` is the median of the per-round ratios of that, and `times_faster_than_peft` that of the
    whole calls'. `estimated` times are those of a sample of the steps.

    `tokens_per_forward` and `acceptance` count forwards after the prompt and drafts that were judged. `same_as` names
    the system whose tokens must be given, if any was run: `tokens_equal` counts those before the first difference, of
    `tokens_compared`, over all rounds.
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
    times_faster_than_peft: float | None = None
    estimated: bool = False
    tokens_per_forward: float | None = None
    acceptance: float | None = None
    same_as: str | None = None
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

    def title(self) -> str:
        s = self.settings
        whose = s["models"] if "models" in s else f"{s['experts']} experts of rank {s['rank']}, {s['dtype']}"
        return f"{self.what}: {s['base']}, {whose}"

    def table(self) -> Table:
        cells = {
            "system": [row.system for row in self.rows],
            "prompt": [str(row.prompt_tokens) for row in self.rows],
            "new": [str(row.new_tokens or "") for row in self.rows],
            "rounds": [str(row.rounds) for row in self.rows],
            "ms/token": [f"{'~' if row.estimated else ''}{row.ms_per_token:.2f}" for row in self.rows],
            "x base": [f"{row.ratio_to_base:.2f}" for row in self.rows],
            "quartiles": [f"{row.ratio_low:.2f}-{row.ratio_high:.2f}" for row in self.rows],
            "x PEFT": [shown(row.times_faster_than_peft, ".1f") for row in self.rows],
            "tokens/forward": [shown(row.tokens_per_forward, ".2f") for row in self.rows],
            "right": [shown(row.acceptance, ".0%") for row in self.rows],
            "same tokens": [_same(row) for row in self.rows],
        }
        lengths = [(row.prompt_tokens, row.new_tokens) for row in self.rows]
        return filled(Table(title=self.title(), caption=self.caption()), cells, sections=lengths)


def filled(table: Table, cells: Mapping[str, Sequence[str]], sections: Sequence[Any]) -> Table:
    """A table of columns, without those that are empty; a line where `sections` changes from row to row."""
    table.title_justify = table.caption_justify = "left"
    kept = {name: column for name, column in cells.items() if any(column)}
    for place, name in enumerate(kept):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for place, row in enumerate(zip(*kept.values(), strict=True)):
        if place and sections[place] != sections[place - 1]:
            table.add_section()
        table.add_row(*row)
    return table


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _same(row: Row) -> str:
    return "" if row.tokens_compared is None else f"{row.tokens_equal}/{row.tokens_compared}"


def rows_of(
    found: Mapping[str, Sequence["Decoded"]],
    *,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    same_as: Mapping[str, str | None],
    known: Mapping[str, Sequence["Decoded"]] | None = None,
) -> list[Row]:
    """One row per system, from what it gave in every round.

    Args:
        found: by system; "base" among them.
        prompt_tokens: of every round.
        new_tokens: 0 for prefill, whose times are per prompt token.
        same_as: by system, the one whose tokens it must give.
        known: what systems gave before on the same prompts, where that can be compared too, as far as it goes.
    """
    texts = {**(known or {}), **{name: gave for name, gave in found.items() if gave[0].tokens}}
    rows = []
    for name, gave in found.items():
        pace, base = (_paces(found[which], prompt_tokens, new_tokens) for which in (name, BASE))
        ms, ratio = spread([1e3 * seconds for seconds in pace]), ratios(pace, base)
        row = Row(
            system=name,
            prompt_tokens=round(median(prompt_tokens)),
            new_tokens=new_tokens,
            rounds=len(gave),
            ms=1e3 * median(one.seconds for one in gave),
            ms_per_token=ms.median,
            ms_per_token_low=ms.low,
            ms_per_token_high=ms.high,
            ms_per_token_min=1e3 * min(pace),
            ratio_to_base=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            estimated=not gave[0].tokens,
        )
        row = replace(row, **drafting([one.tally for one in gave if one.tally is not None]))
        if PEFT in found and name != PEFT:
            faster = ratios([one.seconds for one in found[PEFT]], [one.seconds for one in gave])
            row = replace(row, times_faster_than_peft=faster.median)
        if (reference := same_as.get(name)) in texts:
            assert reference is not None
            pairs = zip(gave, texts[reference], strict=False)
            counts = [agreement(mine.tokens, theirs.tokens) for mine, theirs in pairs]
            equal, compared = (sum(part) for part in zip(*counts, strict=True))
            row = replace(row, same_as=reference, tokens_equal=equal, tokens_compared=compared)
        rows.append(row)
    return rows


def _paces(gave: Sequence["Decoded"], prompt_tokens: Sequence[int], new_tokens: int) -> list[float]:
    if new_tokens:
        return [one.s_per_token for one in gave]
    return [one.seconds / length for one, length in zip(gave, prompt_tokens, strict=False)]


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, int]:
    """Tokens before the first difference, and tokens compared."""
    compared = min(len(mine), len(theirs))
    return next((i for i in range(compared) if mine[i] != theirs[i]), compared), compared


def drafting(tallies: Sequence["Tally"]) -> dict[str, Any]:
    """`tokens_per_forward` and `acceptance` of several texts together; None without drafts."""
    forwards, tokens = sum(t.forwards for t in tallies), sum(t.tokens for t in tallies)
    drafted, accepted = sum(t.drafted for t in tallies), sum(t.accepted for t in tallies)
    return {
        "tokens_per_forward": tokens / forwards if forwards else None,
        "acceptance": accepted / drafted if drafted else None,
    }


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

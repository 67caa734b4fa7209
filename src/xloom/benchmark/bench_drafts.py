"""`bench_drafts`: what drafting does for a model on texts of its own, column by column.

The systems are those of `systems.of_models`: the first model's base and every model, without and with drafts.
Time is what a token takes once the first is there. Cheap to import; torch and the models come in when something runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, final

from rich.table import Table

from xloom.benchmark.settings import Say, at_least
from xloom.benchmark.tables import BASE, Report, drafting, filled, shown
from xloom.benchmark.timing import in_turn, load, machine, spread
from xloom.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from xloom.benchmark.systems import Decoded, System
    from xloom.model import XLoraForCausalLM

ALL = "all"


@dataclass(frozen=True)
class DraftRow:
    """One system on the prompts of one column, or on `all`.

    `ratio_to_base` is the median over prompts of the time per token relative to the base's, with quartiles.
    `tokens_per_forward` and `acceptance` count forwards after the prompt and drafts that were judged; None where nobody
    counts. `same_text` tells for how many prompts the text is that of the same model without drafts.
    """

    system: str
    column: str
    prompts: int
    new_tokens: int
    ms_per_token: float
    ratio_to_base: float
    ratio_low: float
    ratio_high: float
    tokens_per_forward: float | None = None
    acceptance: float | None = None
    same_text: int | None = None


@final
@dataclass(frozen=True)
class DraftReport(Report[DraftRow]):
    """What `bench_drafts` found."""

    def table(self) -> Table:
        cells = {
            "system": [row.system for row in self.rows],
            "column": [row.column for row in self.rows],
            "prompts": [str(row.prompts) for row in self.rows],
            "tokens": [str(row.new_tokens) for row in self.rows],
            "ms/token": [f"{row.ms_per_token:.1f}" for row in self.rows],
            "x base": [f"{row.ratio_to_base:.2f}" for row in self.rows],
            "quartiles": [f"{row.ratio_low:.2f}-{row.ratio_high:.2f}" for row in self.rows],
            "tokens/forward": [shown(row.tokens_per_forward, ".2f") for row in self.rows],
            "right": [shown(row.acceptance, ".0%") for row in self.rows],
            "same text": ["" if row.same_text is None else f"{row.same_text}/{row.prompts}" for row in self.rows],
        }
        columns = [row.column for row in self.rows]
        return filled(Table(title=self.what, caption=self.caption()), cells, sections=columns)


def bench_drafts(
    models: Mapping[str, "XLoraForCausalLM"],
    prompts: Mapping[str, Sequence["Tensor"]],
    *,
    new_tokens: int = 48,
    until_end: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Say = lambda text: None,
) -> DraftReport:
    """All systems on all prompts, in turn prompt by prompt, greedily.

    Args:
        models: by name, on the same base; the first one's base is the one to compare with.
        prompts: token ids [1, T] by column.
        new_tokens: of each text.
        until_end: all texts are as long as the first model's, which ends where it wants to.

    Raises:
        ConfigError: nothing to measure.
    """
    at_least(2, new_tokens=[new_tokens])
    if not models or not any(prompts.values()):
        raise ConfigError("expected at least one model and one prompt, found none")
    from xloom.benchmark.systems import of_models

    systems = of_models(models)
    runs: dict[str, list[dict[str, Decoded]]] = {}
    for column, some in prompts.items():
        runs[column] = []
        for number, ids in enumerate(some):
            length = new_tokens
            if until_end:
                length = max(2, len(systems[next(iter(models))].decode(ids, new_tokens, stop=True).tokens))
            order = [*systems][number % len(systems) :] + [*systems][: number % len(systems)]  # nobody is always first
            calls = {name: partial(systems[name].decode, ids, length) for name in order}
            tick = partial(_say, progress, f"{column}, prompt {number + 1}")
            timed = in_turn(calls, dict.fromkeys(calls, 1), tick=tick)
            runs[column].append({name: timed[name].result for name in systems})
    every = [run for found in runs.values() for run in found]
    rows = [row for column, found in [*runs.items(), (ALL, every)] for row in _rows(column, found, systems)]
    about = machine(str(next(iter(models.values())).device))
    about["load_after"] = load()
    return DraftReport("drafts", about, dict(settings or {}), rows)


def _say(progress: Say, where: str, name: str) -> None:
    progress(f"{where}: {name}")


def _rows(column: str, runs: Sequence[Mapping[str, "Decoded"]], systems: Mapping[str, "System"]) -> list[DraftRow]:
    rows = []
    for name, system in systems.items():
        own = [run[name] for run in runs]
        ratio = spread([run[name].s_per_token / run[BASE].s_per_token for run in runs])
        plain = system.same_as
        rows.append(
            DraftRow(
                system=name,
                column=column,
                prompts=len(own),
                new_tokens=sum(len(run.tokens) for run in own),
                ms_per_token=1e3 * median(run.s_per_token for run in own),
                ratio_to_base=ratio.median,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                same_text=None if plain is None else sum(run[name].tokens == run[plain].tokens for run in runs),
                **drafting([run.tally for run in own if run.tally is not None]),
            )
        )
    return rows

"""`bench_drafts`: what drafting does for a model on texts of its own, column by column.

    base              the base model with its cache        base-lookup    the same, with prompt lookup
    NAME              a model, token by token              NAME-lagged    drafts of the joint pass alone
    NAME-speculative  all drafts

Time is what a token takes once the first is there. Cheap to import; torch and the models come in when something runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, final

from rich.table import Table

from xloom.benchmark.settings import Say, at_least_one
from xloom.benchmark.tables import Report
from xloom.benchmark.timing import in_turn, load, machine, spread
from xloom.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from xloom.decoding import Tally
    from xloom.model import XLoraForCausalLM

LOOKED_UP = 8
ALL = "all"


@dataclass(frozen=True)
class DraftRow:
    """One system on the prompts of one column, or on `all`.

    `ratio_to_base` is the median over prompts of the time per token relative to the base's, with quartiles.
    `tokens_per_forward` and `acceptance` count forwards after the prompt and drafts that were judged; None without
    drafts. `same_text` tells for how many prompts the text is that of the model without drafts.
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
        table = Table(title="drafts", caption=self.caption(), caption_justify="left")
        table.add_column("system")
        table.add_column("column")
        for column in ("prompts", "tokens", "ms/token", "x base", "quartiles", "tokens/forward", "right", "same text"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.system,
                row.column,
                str(row.prompts),
                str(row.new_tokens),
                f"{row.ms_per_token:.1f}",
                f"{row.ratio_to_base:.2f}",
                f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
                "" if row.tokens_per_forward is None else f"{row.tokens_per_forward:.2f}",
                "" if row.acceptance is None else f"{row.acceptance:.0%}",
                "" if row.same_text is None else f"{row.same_text}/{row.prompts}",
            )
        return table


@dataclass(frozen=True)
class _Run:
    """One text of one system: its tokens, seconds per token after the first, and what drafting did."""

    tokens: list[int]
    seconds: float
    tally: "Tally | None" = None


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: "Tensor") -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


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
        until_end: texts end where the model ends them; the base then writes as many tokens as the first model.

    Raises:
        ConfigError: nothing to measure.
    """
    at_least_one(new_tokens=[new_tokens])
    if not models or not any(prompts.values()):
        raise ConfigError("expected at least one model and one prompt, found none")
    runs: dict[str, list[dict[str, _Run]]] = {}
    for column, some in prompts.items():
        runs[column] = []
        for number, ids in enumerate(some):
            length = new_tokens
            if until_end:
                length = max(2, len(_text(next(iter(models.values())), ids, new_tokens, None, stop=True).tokens))
            calls = _systems(models, ids, length)
            order = [*calls][number % len(calls) :] + [*calls][: number % len(calls)]  # nobody is always first
            tick = partial(_say, progress, f"{column}, prompt {number + 1}")
            timed = in_turn({name: calls[name] for name in order}, dict.fromkeys(calls, 1), tick=tick)
            runs[column].append({name: timed[name].result for name in calls})
    every = [run for found in runs.values() for run in found]
    rows = [row for column, found in [*runs.items(), (ALL, every)] for row in _rows(column, found)]
    about = machine(str(next(iter(models.values())).device))
    about["load_after"] = load()
    return DraftReport("drafts", about, dict(settings or {}), rows)


def _say(progress: Say, where: str, name: str) -> None:
    progress(f"{where}: {name}")


def _systems(models: Mapping[str, "XLoraForCausalLM"], ids: "Tensor", length: int) -> dict[str, Callable[[], _Run]]:
    first = next(iter(models.values()))
    calls: dict[str, Callable[[], _Run]] = {
        "base": partial(_base, first, ids, length),
        "base-lookup": partial(_base, first, ids, length, LOOKED_UP),
    }
    for name, model in models.items():
        calls[name] = partial(_text, model, ids, length, None)
        if model.config.gate_at_layer is None:
            calls[f"{name}-lagged"] = partial(_text, model, ids, length, 0)
        calls[f"{name}-speculative"] = partial(_text, model, ids, length, LOOKED_UP)
    return calls


def _base(model: "XLoraForCausalLM", ids: "Tensor", length: int, looked_up: int | None = None) -> _Run:
    options = {} if looked_up is None else {"prompt_lookup_num_tokens": looked_up}
    clock = _Clock()
    with model.plain_base() as base:
        generate: Any = base.generate
        whole = generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None, streamer=clock, **options)
    tokens = whole[0, ids.shape[1] :].tolist()
    times = clock.times[1:]  # the prompt comes first
    return _Run(tokens, (times[-1] - times[0]) / max(1, len(tokens) - 1))


def _text(model: "XLoraForCausalLM", ids: "Tensor", length: int, looked_up: int | None, *, stop: bool = False) -> _Run:
    from xloom.decoding import speculative

    how = None if looked_up is None else speculative(looked_up)
    options: dict[str, Any] = {} if stop else {"eos_token_id": None}
    times, tokens = [], []
    for step in model.stream(ids, speculative=how or False, max_new_tokens=length, do_sample=False, **options):
        times.append(time.perf_counter())
        tokens.append(step.token_id)
    return _Run(tokens, (times[-1] - times[0]) / max(1, len(tokens) - 1), how.tally if how else None)


def _rows(column: str, runs: Sequence[Mapping[str, _Run]]) -> list[DraftRow]:
    rows = []
    for name in runs[0]:
        own = [run[name] for run in runs]
        ratio = spread([run[name].seconds / run["base"].seconds for run in runs])
        tallies = [run.tally for run in own if run.tally is not None]
        plain = name.removesuffix("-lagged").removesuffix("-speculative")
        rows.append(
            DraftRow(
                system=name,
                column=column,
                prompts=len(own),
                new_tokens=sum(len(run.tokens) for run in own),
                ms_per_token=1e3 * median(run.seconds for run in own),
                ratio_to_base=ratio.median,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                tokens_per_forward=_share(tallies, "tokens", "forwards"),
                acceptance=_share(tallies, "accepted", "drafted"),
                same_text=sum(run[name].tokens == run[plain].tokens for run in runs) if tallies else None,
            )
        )
    return rows


def _share(tallies: Sequence["Tally"], part: str, whole: str) -> float | None:
    total = sum(getattr(tally, whole) for tally in tallies)
    return sum(getattr(tally, part) for tally in tallies) / total if total else None

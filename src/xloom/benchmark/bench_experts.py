"""`bench_experts`: what more experts cost, all of them mixed or the top few of every token alone.

Two passes, random factors, the first n of the same experts each time. Cheap to import; torch and the models come in
when something runs.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, final

from rich.table import Table

from xloom.benchmark.run import wait_for
from xloom.benchmark.settings import RANDOM, Say, at_least, at_least_one, check_dtype
from xloom.benchmark.tables import BASE, Report, filled, shown
from xloom.benchmark.timing import in_turn, load, machine, ratios, spread

if TYPE_CHECKING:
    from torch import Tensor

    from xloom.benchmark.parts import Parts
    from xloom.benchmark.systems import Decoded, System

DENSE = 0
COMPARED = 4  # experts, all mixed: what the others are measured against, beside the base
WARM_UP_TOKENS = 2
Task = Literal["decode", "prefill"]


class Mixed(NamedTuple):
    """How many experts, and how many of them every token keeps (0: all). Without experts: the base."""

    experts: int
    top: int = DENSE

    def __str__(self) -> str:
        if not self.experts:
            return BASE
        return f"{self.experts} experts, {'all mixed' if self.top == DENSE else f'top-{self.top}'}"


@dataclass(frozen=True)
class ExpertsRow:
    """One number of experts at one task. Times in milliseconds per token; low and high are quartiles over the rounds.

    `top` is how many experts every token keeps, 0 for all; the base has no experts. A decoded token is one after the
    first. `ratio_to_4` is to four experts, all mixed, in the same round; None where they were not measured.
    """

    task: Task
    experts: int
    top: int
    tokens: int
    rounds: int
    ms_per_token: float
    ms_per_token_low: float
    ms_per_token_high: float
    ratio_to_base: float
    ratio_low: float
    ratio_high: float
    ratio_to_4: float | None = None
    ratio_to_4_low: float | None = None
    ratio_to_4_high: float | None = None

    @property
    def system(self) -> str:
        """The base, "all mixed" or "top-k"."""
        return BASE if not self.experts else "all mixed" if self.top == DENSE else f"top-{self.top}"


@final
@dataclass(frozen=True)
class ExpertsReport(Report[ExpertsRow]):
    """What `bench_experts` found."""

    def table(self) -> Table:
        s = self.settings
        title = f"{self.what}: {s['base']}, experts of rank {s['rank']}, {s['dtype']}, two passes"
        cells = {
            "task": [str(row.task) for row in self.rows],
            "experts": [str(row.experts or "") for row in self.rows],
            "mixed": [row.system for row in self.rows],
            "rounds": [str(row.rounds) for row in self.rows],
            "ms/token": [f"{row.ms_per_token:.2f}" for row in self.rows],
            "x base": [f"{row.ratio_to_base:.2f}" for row in self.rows],
            "quartiles": [f"{row.ratio_low:.2f}-{row.ratio_high:.2f}" for row in self.rows],
            "x 4 experts": [shown(row.ratio_to_4, ".2f") for row in self.rows],
            "quartiles ": [
                "" if row.ratio_to_4 is None else f"{row.ratio_to_4_low:.2f}-{row.ratio_to_4_high:.2f}"
                for row in self.rows
            ],
        }
        return filled(Table(title=title, caption=self.caption()), cells, sections=[row.task for row in self.rows])


def bench_experts(
    base: str | Path = RANDOM,
    *,
    experts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    top: Sequence[int] = (1, 2),
    rank: int = 8,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    rounds: int = 5,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> ExpertsReport:
    """Time per token of decoding and of reading a prompt, by the number of experts.

    Args:
        base: path, hub id, name of the built-in base, or "random", which `layers`, `hidden` and `vocab` change.
        experts: each measured with all mixed, and with the top `top` of every token where there are more.
        prompt_tokens: what is read, and what decoding starts from.
        progress: told what is being done.

    Raises:
        ConfigError: a number that is too small, or an unknown dtype.
        XLoomError: the base cannot be loaded or mixed.
    """
    at_least(2, new_tokens=[new_tokens])
    at_least_one(experts=experts, rank=[rank], prompt_tokens=[prompt_tokens], rounds=[rounds])
    if top:
        at_least_one(top=top)
    check_dtype(dtype)
    progress("loading torch and transformers")
    import torch

    from xloom.benchmark import parts as made

    model, name = made.open_base(base, getattr(torch, dtype), device, (layers, hidden, vocab))
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids_1T = torch.randint(0, vocab, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    about, counts = machine(device), sorted(set(experts))
    with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
        progress(f"making {counts[-1]} experts")
        parts = made.make_parts(model, Path(folder), experts=counts[-1], rank=rank)
        systems = _systems(parts, counts, progress)
        calls = _calls(systems, ids_1T, new_tokens, sorted(set(top)))
        rows = []
        tasks: tuple[Task, ...] = ("decode", "prefill")
        for task in tasks:
            _warm_up(_calls(systems, ids_1T, WARM_UP_TOKENS, sorted(set(top)))[task], progress)
            tick = partial(_say, progress, task)
            timed = in_turn(calls[task], dict.fromkeys(calls[task], rounds), wait=partial(wait_for, device), tick=tick)
            length = new_tokens if task == "decode" else prompt_tokens
            rows += _rows(task, length, {mixed: of.results for mixed, of in timed.items()})
    settings = {"base": name, "rank": rank, "dtype": dtype, "rounds": rounds, "prompt_tokens": prompt_tokens}
    return ExpertsReport("experts", about | {"load_after": load()}, settings, rows)


def _systems(parts: "Parts", counts: Sequence[int], progress: Say) -> dict[int, "System"]:
    """By the number of experts; the base with none."""
    from xloom.benchmark.systems import build

    found = {0: build(BASE, parts)}
    for count in counts:
        progress(f"building {count} experts")
        found[count] = build("xloom", parts.first(count))
    return found


def _calls(
    systems: Mapping[int, "System"], ids_1T: "Tensor", new_tokens: int, top: Sequence[int]
) -> dict[Task, dict[Mixed, Callable[[], "Decoded"]]]:
    """What takes turns, by task. The top few of a model are the model with another setting."""
    calls: dict[Task, dict[Mixed, Callable[[], Decoded]]] = {"decode": {}, "prefill": {}}
    for count, system in systems.items():
        for k in [DENSE, *(k for k in top if k < count)]:
            calls["decode"][Mixed(count, k)] = partial(_kept, system, k, partial(system.decode, ids_1T, new_tokens))
            calls["prefill"][Mixed(count, k)] = partial(_kept, system, k, partial(system.prefill, ids_1T))
    return calls


def _kept(system: "System", top: int, call: Callable[[], "Decoded"]) -> "Decoded":
    """A call while every token keeps the `top` experts alone."""
    if top == DENSE:
        return call()
    from xloom.model import XLoraForCausalLM
    from xloom.routers import XLora

    assert isinstance(system.model, XLoraForCausalLM)
    with system.model.routing(XLora(top_k=top)):
        return call()


def _warm_up(calls: Mapping[Mixed, Callable[[], "Decoded"]], progress: Say) -> None:
    for mixed, call in calls.items():
        progress(f"warming up: {mixed}")
        call()


def _say(progress: Say, task: str, mixed: Mixed) -> None:
    progress(f"{task}: {mixed}")


def _rows(task: Task, tokens: int, found: Mapping[Mixed, Sequence["Decoded"]]) -> list[ExpertsRow]:
    pace = {
        mixed: [one.s_per_token if task == "decode" else one.seconds / tokens for one in gave]
        for mixed, gave in found.items()
    }
    four = pace.get(Mixed(COMPARED))
    rows = []
    for (experts, top), mine in pace.items():
        ms, to_base = spread([1e3 * seconds for seconds in mine]), ratios(mine, pace[Mixed(0)])
        to_four = ratios(mine, four) if four and experts else None
        rows.append(
            ExpertsRow(
                task=task,
                experts=experts,
                top=top,
                tokens=tokens,
                rounds=len(mine),
                ms_per_token=ms.median,
                ms_per_token_low=ms.low,
                ms_per_token_high=ms.high,
                ratio_to_base=to_base.median,
                ratio_low=to_base.low,
                ratio_high=to_base.high,
                ratio_to_4=to_four and to_four.median,
                ratio_to_4_low=to_four and to_four.low,
                ratio_to_4_high=to_four and to_four.high,
            )
        )
    return rows

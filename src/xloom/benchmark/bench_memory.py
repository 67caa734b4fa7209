"""`bench_memory`: what reading a prompt and writing a text take at most, each system in a process of its own.

Cheap to import; torch and the models come in when something runs.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from rich.table import Table

from xloom.benchmark.peak_memory import NotMeasuredError, Order, Peak, measure_apart
from xloom.benchmark.run import PLAIN
from xloom.benchmark.settings import RANDOM, Say, at_least_one, check_dtype
from xloom.benchmark.tables import BASE, Report, filled, shown
from xloom.benchmark.timing import load, machine

Task = Literal["prefill", "decode"]


@dataclass(frozen=True)
class MemoryRow:
    """One system at one task and length, in 10^6 bytes.

    `peak_mb` is the most that its process held, `floor_mb` the same before the system was built (torch and the base,
    loaded), `call_mb` the most that tensors made during one call held at once, cache included. Ratios are those to the
    base at the same task and length; None where that could not be measured.
    """

    task: Task
    prompt_tokens: int
    new_tokens: int
    system: str
    peak_mb: float
    floor_mb: float
    call_mb: float
    peak_to_base: float | None
    call_to_base: float | None


@final
@dataclass(frozen=True)
class MemoryReport(Report[MemoryRow]):
    """What `bench_memory` found."""

    def table(self) -> Table:
        s = self.settings
        title = f"{self.what}: {s['base']}, {s['experts']} experts of rank {s['rank']}, {s['dtype']}"
        cells = {
            "system": [row.system for row in self.rows],
            "task": [str(row.task) for row in self.rows],
            "prompt": [str(row.prompt_tokens) for row in self.rows],
            "new": [str(row.new_tokens or "") for row in self.rows],
            "peak MB": [f"{row.peak_mb:.0f}" for row in self.rows],
            "x base": [shown(row.peak_to_base, ".2f") for row in self.rows],
            "in call MB": [f"{row.call_mb:.1f}" for row in self.rows],
            "x base ": [shown(row.call_to_base, ".2f") for row in self.rows],
        }
        lengths = [(row.task, row.prompt_tokens, row.new_tokens) for row in self.rows]
        return filled(Table(title=title, caption=self.caption()), cells, sections=lengths)


def bench_memory(
    base: str | Path = RANDOM,
    *,
    experts: int = 4,
    rank: int = 8,
    prefill_tokens: Sequence[int] = (512, 2048),
    prompt_tokens: int = 32,
    new_tokens: Sequence[int] = (256,),
    systems: Sequence[str] = PLAIN,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> MemoryReport:
    """Peak memory of reading prompts of `prefill_tokens`, and of writing `new_tokens` after `prompt_tokens`.

    Args:
        base: path, hub id, name of the built-in base, or "random", which `layers`, `hidden` and `vocab` change.
        systems: `base` always runs, as the others are measured against it.
        progress: told what is being done.

    Raises:
        ConfigError: a number below 1, or an unknown system or dtype.
        XLoomError: the base cannot be loaded or mixed.
    """
    at_least_one(
        experts=[experts], rank=[rank], prefill_tokens=prefill_tokens, prompt_tokens=[prompt_tokens],
        new_tokens=new_tokens,
    )  # fmt: skip
    check_dtype(dtype)
    progress("loading torch and transformers")
    import torch

    from xloom.benchmark import parts as made
    from xloom.benchmark.systems import check_names

    check_names(systems)
    names = list(dict.fromkeys([BASE, *systems]))
    shape = (layers, hidden, vocab)
    tasks: list[tuple[Task, int, int]] = [
        *(("prefill", length, 0) for length in sorted(set(prefill_tokens))),
        *(("decode", prompt_tokens, length) for length in sorted(set(new_tokens))),
    ]
    model, name = made.open_base(base, getattr(torch, dtype), device, shape)
    about, rows, notes = (
        machine(device),
        list[MemoryRow](),
        ["peak: of a process of its own, with torch and the base in it; in call: tensors made during one call alone"],
    )
    with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
        parts = made.make_parts(model, Path(folder), experts=experts, rank=rank)
        made.write_parts(parts, Path(folder))
        del model
        for task, tokens, new in tasks:
            peaks: dict[str, Peak] = {}
            for system in names:
                progress(f"{task} of {new or tokens} tokens: {system}")
                order = Order(
                    task, system, str(base), shape, dtype, device, folder, parts.expert_folders,
                    torch.get_num_threads(), tokens, new,
                )  # fmt: skip
                try:
                    peaks[system] = measure_apart(order)
                except NotMeasuredError as error:
                    notes.append(f"{task} of {new or tokens} tokens: {error}")
            rows += _rows(task, tokens, new, peaks)
    settings = {"base": name, "experts": experts, "rank": rank, "dtype": dtype}
    return MemoryReport("memory", about | {"load_after": load()}, settings, rows, notes)


def _rows(task: Task, tokens: int, new: int, peaks: Mapping[str, Peak]) -> list[MemoryRow]:
    base = peaks.get(BASE)
    return [
        MemoryRow(
            task=task,
            prompt_tokens=tokens,
            new_tokens=new,
            system=system,
            peak_mb=peak.peak_mb,
            floor_mb=peak.floor_mb,
            call_mb=peak.step_mb,
            peak_to_base=None if base is None else peak.peak_mb / base.peak_mb,
            call_to_base=None if base is None else peak.step_mb / base.step_mb,
        )
        for system, peak in peaks.items()
    ]

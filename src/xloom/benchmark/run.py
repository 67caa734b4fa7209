"""`bench_decode` and `bench_prefill`: the systems side by side, in turn, on one machine.

Cheap to import; torch and the models come in when something runs.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.benchmark.settings import RANDOM, Say, at_least_one, check_dtype
from xloom.benchmark.tables import Row, SpeedReport, rows_of
from xloom.benchmark.timing import Timed, in_turn, load, machine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from xloom.benchmark.systems import System

SYSTEMS = ("base", "peft", "xloom", "xloom-early-gate")
WARM_UP_TOKENS = 4
PEFT_IS_SLOW_FROM = 64  # new tokens beyond which PEFT's decode is timed once, unless the caller says otherwise


@dataclass(frozen=True)
class _Bench:
    """Systems that are built and warm, and the form of a report about them."""

    systems: Mapping[str, "System"]
    report: SpeedReport
    device: str
    vocab: int
    progress: Say

    def prompt(self, tokens: int) -> "Tensor":
        import torch

        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(0, self.vocab, (1, tokens), generator=generator).to(self.device)

    def wait(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def times(
        self, calls: Mapping[str, Callable[[], "Tensor"]], rounds: Mapping[str, int], what: str
    ) -> dict[str, Timed["Tensor"]]:
        tick = lambda name: self.progress(f"{what}: {name}")  # noqa: E731
        return in_turn(calls, rounds, wait=self.wait, tick=tick)

    def rows(
        self, timed: Mapping[str, Timed["Tensor"]], prompt_tokens: int, new_tokens: int, peft: "Tensor | None"
    ) -> list[Row]:
        exact = [name for name, system in self.systems.items() if system.exact and name != "peft"]
        return rows_of(timed, prompt_tokens=prompt_tokens, new_tokens=new_tokens, reference=peft, exact=exact)

    def finish(self, rows: Sequence[Row], notes: Sequence[str]) -> SpeedReport:
        about = self.report.machine | {"load_after": load()}
        return replace(self.report, rows=list(rows), notes=list(notes), machine=about)


def bench_decode(
    base: "str | Path | PreTrainedModel" = RANDOM,
    *,
    experts: int = 4,
    rank: int = 8,
    prompt_tokens: int = 32,
    new_tokens: Sequence[int] = (64, 256),
    rounds: int = 3,
    systems: Sequence[str] = SYSTEMS,
    peft_rounds: int | None = None,
    peft_new_tokens: int | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> SpeedReport:
    """Greedy decoding of fixed length at batch 1: each system's `generate` from a random prompt on, prompt included.

    Args:
        base: path, hub id, name of the built-in base, a loaded model, or "random": SmolLM2-135M's shape, which
            `layers`, `hidden` and `vocab` change.
        systems: `base` always runs, as the others are measured against it.
        peft_rounds: by default `rounds` up to 64 new tokens and one beyond, where PEFT takes minutes.
        peft_new_tokens: PEFT is left out of longer decodes; tokens are then compared as far as it went.
        progress: told what is being done.

    Raises:
        ConfigError: a number below 1, or an unknown system or dtype.
        XLoomError: the base cannot be loaded or mixed.
    """
    at_least_one(prompt_tokens=[prompt_tokens], new_tokens=new_tokens, rounds=[rounds])
    caps = {"peft_rounds": peft_rounds, "peft_new_tokens": peft_new_tokens}
    at_least_one(**{name: [cap] for name, cap in caps.items() if cap is not None})
    settings = {"experts": experts, "rank": rank, "rounds": rounds, "dtype": dtype}
    with _ready("decode", base, systems, settings, (layers, hidden, vocab), device, progress) as bench:
        ids = bench.prompt(prompt_tokens)
        for system in bench.systems.values():
            progress(f"warming up {system.name}")
            system.decode(ids, min(WARM_UP_TOKENS, *new_tokens))
        rows: list[Row] = []
        notes: list[str] = []
        reference: Tensor | None = None
        for length in sorted(set(new_tokens)):
            running = dict(bench.systems)
            if "peft" in running and peft_new_tokens is not None and length > peft_new_tokens:
                del running["peft"]
                notes.append(f"peft was not run for {length} new tokens (peft_new_tokens={peft_new_tokens})")
            turns = dict.fromkeys(running, rounds)
            if "peft" in running:
                turns["peft"] = min(rounds, peft_rounds or (rounds if length <= PEFT_IS_SLOW_FROM else 1))
                if turns["peft"] < rounds:
                    notes.append(f"peft ran {turns['peft']} of {rounds} rounds for {length} new tokens")
            calls = {name: partial(system.decode, ids, length) for name, system in running.items()}
            timed = bench.times(calls, turns, f"{length} new tokens")
            reference = timed["peft"].result if "peft" in timed else reference
            rows += bench.rows(timed, prompt_tokens, length, reference)
        return bench.finish(rows, notes)


def bench_prefill(
    base: "str | Path | PreTrainedModel" = RANDOM,
    *,
    experts: int = 4,
    rank: int = 8,
    prompt_tokens: Sequence[int] = (32, 128, 512),
    rounds: int = 5,
    systems: Sequence[str] = SYSTEMS,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> SpeedReport:
    """One forward over a random prompt up to its next token, at batch 1. Arguments and errors as `bench_decode`."""
    at_least_one(prompt_tokens=prompt_tokens, rounds=[rounds])
    settings = {"experts": experts, "rank": rank, "rounds": rounds, "dtype": dtype}
    with _ready("prefill", base, systems, settings, (layers, hidden, vocab), device, progress) as bench:
        rows: list[Row] = []
        for length in sorted(set(prompt_tokens)):
            ids = bench.prompt(length)
            calls = {name: partial(system.prefill, ids) for name, system in bench.systems.items()}
            progress(f"warming up with {length} tokens")
            for call in calls.values():
                call()
            timed = bench.times(calls, dict.fromkeys(calls, rounds), f"prompt of {length} tokens")
            reference = timed["peft"].result if "peft" in timed else None
            rows += bench.rows(timed, length, 0, reference)
        return bench.finish(rows, [])


@contextlib.contextmanager
def _ready(
    what: str,
    base: "str | Path | PreTrainedModel",
    names: Sequence[str],
    settings: dict[str, Any],
    shape: tuple[int | None, int | None, int | None],
    device: str,
    progress: Say,
) -> Iterator[_Bench]:
    """The systems, built, for as long as the block runs: their experts lie in a temporary folder."""
    check_dtype(settings["dtype"])
    progress("loading torch and transformers")
    import torch

    from xloom.benchmark import parts as made
    from xloom.benchmark.systems import build, check_names

    check_names(names)
    dtype = getattr(torch, settings["dtype"])
    progress("making the base")
    model, name = made.open_base(base, dtype, device, shape)
    with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
        parts = made.make_parts(model, Path(folder), experts=settings["experts"], rank=settings["rank"])
        built = {}
        for system in dict.fromkeys(["base", *names]):
            progress(f"building {system}")
            built[system] = build(system, parts)
        report = SpeedReport(what, machine(device), {"base": name, **settings}, [])
        yield _Bench(built, report, device, model.config.get_text_config(decoder=True).vocab_size, progress)

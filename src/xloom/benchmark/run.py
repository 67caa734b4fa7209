"""`bench_decode` and `bench_prefill`: the systems side by side, in turn, on one machine.

Cheap to import; torch and the models come in when something runs.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.benchmark.settings import PEFT, RANDOM, Say, at_least, at_least_one, check_dtype
from xloom.benchmark.tables import BASE, Row, SpeedReport, rows_of
from xloom.benchmark.timing import in_turn, load, machine
from xloom.errors import ConfigError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from xloom.benchmark.parts import Shape
    from xloom.benchmark.systems import Decoded, System
    from xloom.model import XLoraForCausalLM

PLAIN = (BASE, PEFT, "xloom", "xloom-early-gate")  # systems without drafts
WARM_UP_TOKENS = 4
PEFT_WHOLE = 64  # new tokens up to which PEFT writes its text; beyond, a sample of its steps is timed


@dataclass(frozen=True)
class Bench:
    """Systems that are built and warm, and the form of a report about them."""

    systems: Mapping[str, "System"]
    report: SpeedReport
    device: str
    vocab: int
    progress: Say
    notes: list[str] = field(default_factory=list)

    def prompt(self, tokens: int) -> "Tensor":
        """Random token ids [1, tokens], always the same."""
        import torch

        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(0, self.vocab, (1, tokens), generator=generator).to(self.device)

    def times(
        self, calls: Mapping[str, Callable[[], "Decoded"]], rounds: int, what: str
    ) -> dict[str, Sequence["Decoded"]]:
        """What every call gave in every round, by system."""
        tick = lambda name: self.progress(f"{what}: {name}")  # noqa: E731
        timed = in_turn(calls, dict.fromkeys(calls, rounds), wait=partial(wait_for, self.device), tick=tick)
        return {name: times.results for name, times in timed.items()}

    @property
    def same_as(self) -> dict[str, str | None]:
        return {name: system.same_as for name, system in self.systems.items()}

    def finish(self, rows: Sequence[Row]) -> SpeedReport:
        about = self.report.machine | {"load_after": load()}
        return replace(self.report, rows=list(rows), notes=self.notes, machine=about)


def wait_for(device: str) -> None:
    """Returns when an accelerator has done all its work."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def bench_decode(
    base: "str | Path | PreTrainedModel" = RANDOM,
    *,
    models: "Mapping[str, XLoraForCausalLM] | None" = None,
    prompts: "Sequence[Tensor] | None" = None,
    experts: int = 4,
    rank: int = 8,
    prompt_tokens: int = 32,
    new_tokens: Sequence[int] = (64, 256),
    rounds: int = 3,
    systems: Sequence[str] | None = None,
    peft_whole: int = PEFT_WHOLE,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> SpeedReport:
    """Greedy decoding of fixed length at batch 1: each system's `generate` from a prompt on.

    Args:
        base: path, hub id, name of the built-in base, a loaded model, or "random": SmolLM2-135M's shape, which
            `layers`, `hidden` and `vocab` change.
        models: X-LoRA models by name, all on the same base, in place of random ones; `base`, `experts`, `rank`,
            `dtype`, `device` and the shape are then theirs, and systems are called after them.
        prompts: token ids [1, T], one for each round; default: the same random one of `prompt_tokens` in `rounds`.
        systems: default: all. `base` always runs, as the others are measured against it.
        peft_whole: PEFT writes texts up to this length; of longer ones a sample of its steps is timed.
        progress: told what is being done.

    Raises:
        ConfigError: a number that is too small, or an unknown system or dtype.
        XLoomError: the base cannot be loaded or mixed.
    """
    at_least(2, new_tokens=new_tokens)
    at_least_one(prompt_tokens=[prompt_tokens], rounds=[rounds], peft_whole=[peft_whole])
    if prompts is not None and not prompts:
        raise ConfigError("prompts: expected at least one, found none")
    with contextlib.ExitStack() as stack:
        if models:
            ready = _ready_models("decode", models, systems, progress)
        else:
            settings = {"experts": experts, "rank": rank, "dtype": dtype}
            ready = _ready("decode", base, systems, settings, (layers, hidden, vocab), device, progress)
        bench = stack.enter_context(ready)
        asked = list(prompts) if prompts is not None else [bench.prompt(prompt_tokens)] * rounds
        bench.report.settings.update(rounds=len(asked), prompts=len({id(ids) for ids in asked}))
        for system in bench.systems.values():
            progress(f"warming up {system.name}")
            system.decode(asked[0], min(WARM_UP_TOKENS, *new_tokens))
        rows: list[Row] = []
        known: dict[str, Sequence[Decoded]] = {}
        for length in sorted(set(new_tokens)):
            calls = {name: _decoding(system, asked, length, peft_whole) for name, system in bench.systems.items()}
            found = bench.times(calls, len(asked), f"{length} new tokens")
            sizes = [ids.shape[1] for ids in asked]
            rows += rows_of(found, prompt_tokens=sizes, new_tokens=length, same_as=bench.same_as, known=known)
            known |= {name: gave for name, gave in found.items() if gave[0].tokens}
        if any(row.estimated for row in rows):
            bench.notes.append(_sampled_note(peft_whole))
        return bench.finish(rows)


def _decoding(system: "System", prompts: "Sequence[Tensor]", length: int, peft_whole: int) -> "Callable[[], Decoded]":
    """A call for every round, which takes the next prompt."""
    from xloom.benchmark.systems import decode_sampled

    coming = iter(prompts)
    whole = system.cached or length <= peft_whole
    return lambda: system.decode(next(coming), length) if whole else decode_sampled(system, next(coming), length)


def _sampled_note(peft_whole: int) -> str:
    from xloom.benchmark.systems import SAMPLES

    return (
        f"~ beyond {peft_whole} new tokens peft's time is that of {SAMPLES} of its steps, evenly spaced from the first "
        "to the last and summed by Simpson's rule: it recomputes the whole text twice for every token"
    )


def bench_prefill(
    base: "str | Path | PreTrainedModel" = RANDOM,
    *,
    experts: int = 4,
    rank: int = 8,
    prompt_tokens: Sequence[int] = (32, 128, 512),
    rounds: int = 5,
    systems: Sequence[str] | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> SpeedReport:
    """One forward over a random prompt up to its next token, at batch 1. Arguments and errors as `bench_decode`.

    Systems that draft are no others here, and refused.
    """
    at_least_one(prompt_tokens=prompt_tokens, rounds=[rounds])
    settings = {"experts": experts, "rank": rank, "rounds": rounds, "dtype": dtype}
    shape = (layers, hidden, vocab)
    with _ready("prefill", base, systems, settings, shape, device, progress, known=PLAIN) as bench:
        rows: list[Row] = []
        for length in sorted(set(prompt_tokens)):
            ids = bench.prompt(length)
            calls = {name: partial(system.prefill, ids) for name, system in bench.systems.items()}
            progress(f"warming up with {length} tokens")
            for call in calls.values():
                call()
            found = bench.times(calls, rounds, f"prompt of {length} tokens")
            rows += rows_of(found, prompt_tokens=[length] * rounds, new_tokens=0, same_as=bench.same_as)
        return bench.finish(rows)


@contextlib.contextmanager
def _ready(
    what: str,
    base: "str | Path | PreTrainedModel",
    names: Sequence[str] | None,
    settings: dict[str, Any],
    shape: "Shape",
    device: str,
    progress: Say,
    known: Sequence[str] | None = None,
) -> Iterator[Bench]:
    """The systems, built, for as long as the block runs: their experts lie in a temporary folder."""
    check_dtype(settings["dtype"])
    progress("loading torch and transformers")
    import torch

    from xloom.benchmark import parts as made
    from xloom.benchmark import systems

    known = list(systems.NAMES) if known is None else known
    systems.check_names(names or (), known)
    dtype = getattr(torch, settings["dtype"])
    progress("making the base")
    model, name = made.open_base(base, dtype, device, shape)
    with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
        parts = made.make_parts(model, Path(folder), experts=settings["experts"], rank=settings["rank"])
        progress("building the systems")
        built = systems.build_all(list(dict.fromkeys([BASE, *(names if names is not None else known)])), parts)
        report = SpeedReport(what, machine(device), {"base": name, **settings}, [])
        yield Bench(built, report, device, _vocab(model), progress)


@contextlib.contextmanager
def _ready_models(
    what: str, models: "Mapping[str, XLoraForCausalLM]", names: Sequence[str] | None, progress: Say
) -> Iterator[Bench]:
    """The same for models that are there; PEFT's has the first one's experts, and a head of its own."""
    from xloom.benchmark import systems
    from xloom.benchmark.parts import parts_of

    first = next(iter(models.values()))
    found = systems.of_models(models)
    wanted = list(dict.fromkeys([BASE, *([*found, PEFT] if names is None else names)]))
    systems.check_names(wanted, [*found, PEFT])
    notes: list[str] = []
    device = str(first.device)
    with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
        if PEFT in wanted:
            progress("building peft")
            try:
                found[PEFT] = systems.peft(parts_of(first, Path(folder)))
                notes.append("peft has a random head of one layer, the only form it knows: its text is another")
            except UnsupportedArchitectureError as error:
                notes.append(str(error))
        settings: dict[str, Any] = {"base": str(first.config.base_model_name_or_path), "models": ", ".join(models)}
        settings["dtype"] = str(first.base.dtype).removeprefix("torch.")
        report = SpeedReport(what, machine(device), settings, [])
        built = {name: found[name] for name in wanted if name in found}
        yield Bench(built, report, device, _vocab(first.base), progress, notes)


def _vocab(base: "PreTrainedModel") -> int:
    size: int = base.config.get_text_config(decoder=True).vocab_size
    return size

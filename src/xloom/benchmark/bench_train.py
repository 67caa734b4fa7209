"""`bench_train`: training the head with every system in turn, on one machine; memory in a process of its own each.

Cheap to import; torch and the models come in when something runs.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.benchmark.peak_memory import NotMeasuredError, Order, measure_apart
from xloom.benchmark.run import wait_for
from xloom.benchmark.settings import RANDOM, Say, at_least_one, check_dtype
from xloom.benchmark.timing import in_turn, load, machine, spread
from xloom.benchmark.train_tables import EPOCHS, TrainReport, TrainRow, timed_row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from xloom.benchmark.parts import Parts
    from xloom.benchmark.train_systems import Batch

SYSTEMS = ("peft", "xloom", "xloom-cached", "xloom-cached-checkpointing", "xloom-early-gate")
EQUAL = 1e-3  # relative difference of losses, and of gradients as vectors, that counts as equal
EXACT_DTYPES = ("float32", "float64")


def bench_train(
    base: str | Path = RANDOM,
    *,
    experts: Sequence[int] = (4, 9),
    rank: int = 8,
    batch: int = 4,
    tokens: int = 128,
    completion: int = 16,
    rounds: int = 5,
    systems: Sequence[str] = SYSTEMS,
    memory: bool = True,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Say = lambda text: None,
) -> TrainReport:
    """Seconds per optimizer step of the head, and the peak memory of a process that trains it.

    A step is forward, loss, backward, clipping and AdamW on the same random rows. Before anything is timed, the loss
    and the head's gradients of every exact system are compared with PEFT's.

    Args:
        base: path, hub id, name of the built-in base, or "random": SmolLM2-135M's shape, which `layers`, `hidden` and
            `vocab` change.
        experts: numbers of experts, each measured with every system.
        completion: tokens at the end of every row that the loss is on.
        systems: `peft` always runs, as the others are measured against it.
        memory: also measure memory, each system in a fresh process.
        progress: told what is being done.

    Raises:
        ConfigError: a number below 1, a completion as long as its row, or an unknown system or dtype.
        XLoomError: the base cannot be loaded or mixed, by PEFT or by us.
    """
    at_least_one(experts=experts, rank=[rank], batch=[batch], tokens=[tokens], completion=[completion], rounds=[rounds])
    check_dtype(dtype)
    progress("loading torch and transformers")
    import torch

    from xloom.benchmark import parts as made
    from xloom.benchmark import train_systems

    train_systems.check_names(systems)
    names = tuple(dict.fromkeys(["peft", *systems]))
    shape = (layers, hidden, vocab)
    progress("making the base")
    model, name = made.open_base(base, getattr(torch, dtype), device, shape)
    size = model.config.get_text_config(decoder=True).vocab_size
    rows_BT = train_systems.random_batch(size, rows=batch, tokens=tokens, completion=completion, device=device)
    about = machine(device)
    notes = _notes(model, tokens, names)
    found: list[TrainRow] = []
    for count in sorted(set(experts)):
        with tempfile.TemporaryDirectory(prefix="xloom-bench-") as folder:
            parts = made.make_parts(model, Path(folder), experts=count, rank=rank)
            rows = _timed(parts, names, rows_BT, rounds, dtype in EXACT_DTYPES, progress)
            if memory:
                made.write_parts(parts, Path(folder))
                order = Order(
                    task="train",
                    system="",
                    base=str(base),
                    shape=shape,
                    dtype=dtype,
                    device=device,
                    folder=folder,
                    expert_folders=parts.expert_folders,
                    threads=torch.get_num_threads(),
                    tokens=tokens,
                    new=completion,
                    batch=batch,
                )
                rows = _with_memory(rows, order, notes, progress)
            found += rows
    settings = {"base": name, "experts": sorted(set(experts)), "rank": rank, "batch": batch, "tokens": tokens}
    settings |= {"completion": completion, "rounds": rounds, "dtype": dtype, "epochs": EPOCHS}
    return TrainReport("train", about | {"load_after": load()}, settings, found, notes)


def _timed(
    parts: "Parts", names: Sequence[str], batch: "Batch", rounds: int, exact: bool, progress: Say
) -> list[TrainRow]:
    """A row per system, PEFT first, without memory."""
    from xloom.benchmark import train_systems

    experts, wait = len(parts.expert_folders), partial(wait_for, str(batch.ids_BT.device))

    def tick(name: str) -> None:
        progress(f"{experts} experts: {name}")

    learners, states, first = {}, {}, {}
    for name in names:
        progress(f"{experts} experts: building {name}")
        learners[name] = learner = train_systems.build(name, parts)
        states[name] = learner.fill(batch)
        first[name] = (float(learner.backward(batch, states[name])), learner.gradient())
        learner.step(batch, states[name])  # makes the optimizer's state
    steps = {name: partial(learner.step, batch, states[name]) for name, learner in learners.items()}
    fills = {name: partial(learner.fill, batch) for name, learner in learners.items() if learner.kind.cached}
    stepped = in_turn(steps, dict.fromkeys(steps, rounds), wait=wait, tick=tick)
    filled = in_turn(fills, dict.fromkeys(fills, rounds), wait=wait, tick=tick) if fills else {}
    rows = []
    for name, learner in learners.items():
        fill_s = spread(filled[name].seconds).median if name in filled else None
        times = stepped[name].seconds, stepped["peft"].seconds
        row = timed_row(name, experts, *times, loss=first[name][0], fill_s=fill_s, batch=len(batch.ids_BT))
        if learner.kind.exact and name != "peft":
            row = replace(row, **compared(first[name], first["peft"], exact=exact))
        rows.append(row)
    return rows


def compared(mine: tuple[float, "Tensor"], theirs: tuple[float, "Tensor"], *, exact: bool) -> dict[str, Any]:
    """`loss_equal` and `gradient_error` of a row, from loss and gradient of the first step.

    Args:
        exact: the dtype is one in which they must be equal; else only the distance is told.
    """
    (loss, gradient), (wanted, wanted_gradient) = mine, theirs
    wanted_gradient = wanted_gradient.to(gradient)
    error = float((gradient - wanted_gradient).norm() / wanted_gradient.norm())
    equal = abs(loss - wanted) <= EQUAL * abs(wanted) and error <= EQUAL
    return {"loss_equal": equal if exact else None, "gradient_error": error}


def _with_memory(rows: Sequence[TrainRow], order: Order, notes: list[str], progress: Say) -> list[TrainRow]:
    """The rows with memory, as far as it could be measured; what could not goes to the notes."""
    peaks = {}
    for row in rows:
        progress(f"{row.experts} experts: memory of {row.system}")
        try:
            peaks[row.system] = measure_apart(replace(order, system=row.system))
        except NotMeasuredError as error:
            notes.append(f"memory with {row.experts} experts: {error}")
    peft = peaks.get("peft")
    out = []
    for row in rows:
        if (peak := peaks.get(row.system)) is not None:
            row = replace(row, **peak._asdict())
            if peft is not None:
                whole, step = peak.peak_mb / peft.peak_mb, peak.step_mb / peft.step_mb
                row = replace(row, memory_to_peft=whole, step_to_peft=step)
        out.append(row)
    return out


def _notes(model: "PreTrainedModel", tokens: int, systems: Sequence[str]) -> list[str]:
    from xloom import architecture

    notes = [
        "peft: only the head has gradients, logits_to_keep is passed on to the base in both passes, and PEFT itself "
        "runs the first without gradients; with gradient checkpointing its X-LoRA cannot be trained",
        "peak MB: of a process of its own, with torch and the base in it; step MB: tensors made during a step alone",
    ]
    if "xloom-early-gate" in systems:
        notes.append("xloom-early-gate is another model: the gate at a third of the layers, experts from there on")
    if any("cached" in name or "early" in name for name in systems):
        kb = tokens * architecture.hidden_size(model, gated=False) * model.dtype.itemsize / 1e3
        notes.append(
            f"with fill: the time to compute what the head reads ({kb:.0f} kB a row) spread over {EPOCHS} epochs"
        )
    return notes

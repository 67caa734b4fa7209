"""Checkpoints of a training run: a folder of safetensors and JSON that appears whole or not at all.

    checkpoint-<step>/   trained.safetensors   what is trained
                         best.safetensors      the same at the best validation so far, with early stopping
                         optimizer.safetensors, optimizer.json     optimizer and schedule
                         random.safetensors, random.json           random states, one of every process
                         trainer_state.json    step and log history
    unfinished-*/        one that is being written

A folder is written beside, brought to the disk, and renamed; older ones go when the new one stands.
Knows nothing of loops or models.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xloom.errors import CheckpointError
from xloom.hub.files import read_json, read_tensors

WEIGHTS, BEST, OPTIMIZER, RANDOM = (f"{name}.safetensors" for name in ("trained", "best", "optimizer", "random"))
OPTIMIZER_VALUES, RANDOM_VALUES, STATE = "optimizer.json", "random.json", "trainer_state.json"
_NAME, _UNFINISHED = "checkpoint-", "unfinished-"

Tensors = dict[str, Tensor]


# --- folders ---


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_NAME))


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint whose state file can be read."""
    for path in sorted(_checkpoints(work), key=step_of, reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def write_checkpoint(work: Path, step: int, tensors: Mapping[str, Tensors], values: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of a step from its files' contents, and then removes older ones.

    Raises:
        CheckpointError: it cannot be written; the last good one is as it was, and the message says which it is.
    """
    target, staged = work / f"{_NAME}{step}", work / f"{_UNFINISHED}{step}"
    if target.exists():  # the run goes on from it and has not moved
        return target
    last = last_checkpoint(work)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name, part in tensors.items():
            write_file(staged / name, _safetensors(part))
        for name, value in values.items():
            write_file(staged / name, (json.dumps(value, indent=1) + "\n").encode())
        _sync(staged)
        os.replace(staged, target)
        _sync(work)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        kept = f"step {step_of(last)} is kept" if last else "there is no earlier one"
        raise CheckpointError(
            f"{work}: the checkpoint of step {step} cannot be written: {why(error)}; {kept}"
        ) from error
    for old in _checkpoints(work):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def clear_leftovers(work: Path, keep: Path | None) -> None:
    """Removes what a killed run left half-written, and every checkpoint but `keep`."""
    for path in _checkpoints(work):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in work.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(work: Path) -> list[Path]:
    return [p for p in work.glob(f"{_NAME}*") if p.name.removeprefix(_NAME).isdigit()]


# --- files ---


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and brings it to the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings every file and folder inside to the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


@contextmanager
def disk_errors() -> Iterator[None]:
    """What safetensors raises for a disk that refuses, as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def why(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors(tensors: Tensors) -> bytes:
    from safetensors.torch import save

    content: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})
    return content


# --- the optimizer ---


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The state as tensors by `<parameter's number>.<name>`, and as JSON the rest of it and the groups."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.cpu()
            else:
                values[f"{number}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "values": values}


def set_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Tensors, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the state is of other parameters."""
    now = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in values["groups"]] != [group["params"] for group in now]:
        raise CheckpointError("the optimizer's groups are not those of this run")
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values["values"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [  # JSON has lists where the optimizer had tuples
        {k: tuple(v) if isinstance(here.get(k), tuple) else v for k, v in group.items()}
        for group, here in zip(values["groups"], now, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- random states ---


def random_state() -> tuple[Tensors, dict[str, Any]]:
    """States of Python, NumPy, torch and this process's CUDA device."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    words: Any
    kind, words, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, words.tolist(), *rest]}


def set_random_state(tensors: Tensors, values: Mapping[str, Any]) -> None:
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = values["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def random_states(of_processes: list[tuple[Tensors, dict[str, Any]]]) -> tuple[Tensors, dict[str, Any]]:
    """The states of all processes as one pair of files' contents."""
    tensors = {f"{i}.{name}": t for i, (part, _) in enumerate(of_processes) for name, t in part.items()}
    return tensors, {str(i): values for i, (_, values) in enumerate(of_processes)}


def read_random_state(checkpoint: Path, process: int) -> tuple[Tensors, dict[str, Any]] | None:
    """The state of one process; None if the checkpoint was written by fewer."""
    values = read_json(checkpoint / RANDOM_VALUES)
    if str(process) not in values:
        return None
    prefix = f"{process}."
    tensors = read_tensors(checkpoint / RANDOM)
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, values[str(process)]

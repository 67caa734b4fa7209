"""Wall-clock times of calls that take turns, and what machine they were taken on.

Knows nothing of models: it is handed functions. Imports torch only to describe the machine.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, NamedTuple, TypeVar

from xloom import __version__

K = TypeVar("K")
T = TypeVar("T")


class Spread(NamedTuple):
    """Median and quartiles; all three are the value itself when there is but one."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timed(Generic[T]):
    """Seconds of every round that a call took part in, the first rounds first, and what it returned each time."""

    seconds: list[float]
    results: list[T]

    @property
    def result(self) -> T:
        """What it returned last."""
        return self.results[-1]


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    """Time relative to the base's in the same round, over the rounds that both have."""
    return spread([mine / theirs for mine, theirs in zip(seconds, base, strict=False)])


def in_turn(
    calls: Mapping[K, Callable[[], T]],
    rounds: Mapping[K, int],
    *,
    wait: Callable[[], None] = lambda: None,
    tick: Callable[[K], None] = lambda name: None,
) -> dict[K, Timed[T]]:
    """Times every call once per round, one after the other, the order turning by one from round to round.

    So a machine that slows down for a while slows all of them. Warming up is the caller's.

    Args:
        rounds: how many each call takes part in, from the first round on.
        wait: returns when all work is done (an accelerator runs behind); it is called before the clock is read.
        tick: told the name of a call before it starts.
    """
    order = list(calls)
    seconds: dict[K, list[float]] = {name: [] for name in order}
    results: dict[K, list[T]] = {name: [] for name in order}
    for turn in range(max(rounds.values())):
        start = turn % len(order)
        gc.collect()  # no round pays for another's garbage
        for name in [*order[start:], *order[:start]]:
            if turn >= rounds[name]:
                continue
            tick(name)
            wait()
            began = time.perf_counter()
            result = calls[name]()
            wait()
            seconds[name].append(time.perf_counter() - began)
            results[name].append(result)
    return {name: Timed(seconds[name], results[name]) for name in order}


def machine(device: str) -> dict[str, Any]:
    """Processor, threads, versions and the load average of the last minute, as flat JSON."""
    import torch

    from xloom.evaluation.bench import device_name

    packages = {name: _version(name) for name in ("torch", "transformers", "peft")}
    accelerator = device_name(torch.device(device)) if device.startswith("cuda") else None
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "accelerator": accelerator,
        "python": platform.python_version(),
        "xloom": __version__,
        **packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_before": load(),
    }


def load() -> float | None:
    """Processes waiting or running, averaged over a minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

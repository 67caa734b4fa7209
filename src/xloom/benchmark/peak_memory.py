"""Peak memory of training with one system, in a process that does nothing else.

`python -m xloom.benchmark.peak_memory` reads an order as JSON from standard input, builds that one system, takes two
steps (a third under the profiler) and prints what it used as JSON. Knows nothing of clocks.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 2  # the optimizer's state is there from the second on


@dataclass(frozen=True)
class Order:
    """What to build and train; the experts and the head's weights lie in `folder`."""

    system: str
    base: str
    shape: tuple[int | None, int | None, int | None]
    dtype: str
    device: str
    folder: str
    expert_folders: Mapping[str, str]
    batch: int
    tokens: int
    completion: int
    threads: int


class Peak(NamedTuple):
    """Megabytes (10^6 bytes).

    Args:
        peak_mb: the most that the process held; on CUDA, that torch's tensors held on the device.
        floor_mb: the same before the system was built: torch and the base, loaded.
        step_mb: the most that tensors made during a step held at once. On the CPU a process can hold far more, where
            malloc keeps what was freed in pieces that nothing fits into.
    """

    peak_mb: float
    floor_mb: float
    step_mb: float


class NotMeasuredError(RuntimeError):
    """The process ended without an answer: out of memory, most often."""


def measure_apart(order: Order) -> Peak:
    """`measure` in a fresh process. Raises NotMeasuredError, with the last line that the process said."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(asdict(order)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise NotMeasuredError(f"{order.system}: exit code {done.returncode} ({said[-1]})")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure(order: Order) -> Peak:
    """Builds and trains. The figure is that of the process so far: call it in one that has done nothing else."""
    import torch

    from xloom.benchmark import train_systems
    from xloom.benchmark.parts import open_base, read_parts

    torch.set_num_threads(order.threads)
    base, _ = open_base(order.base, getattr(torch, order.dtype), order.device, order.shape)
    floor = used_mb(order.device)
    parts = read_parts(base, Path(order.folder), order.expert_folders)
    learner = train_systems.build(order.system, parts)
    vocab = base.config.get_text_config(decoder=True).vocab_size
    batch = train_systems.random_batch(
        vocab, rows=order.batch, tokens=order.tokens, completion=order.completion, device=order.device
    )
    states = learner.fill(batch)
    for _ in range(STEPS):
        learner.step(batch, states)
    peak = used_mb(order.device)  # before the profiler takes its own
    return Peak(peak, floor, live_mb(lambda: learner.step(batch, states), order.device))


def live_mb(call: Callable[[], Any], device: str) -> float:
    """The most that tensors made during a call hold at once, in 10^6 bytes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    most: int = max(accumulate(sizes, initial=0))
    return most / 1e6


def used_mb(device: str) -> float:
    """The most that this process has held so far, in 10^6 bytes."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        # not ru_maxrss: on Linux a process starts with the peak of the one that started it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    order = Order(**given | {"shape": tuple(given["shape"])})
    print(json.dumps(measure(order)._asdict()))


if __name__ == "__main__":
    main()

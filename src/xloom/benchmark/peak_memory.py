"""Peak memory of one task with one system, in a process that does nothing else.

`python -m xloom.benchmark.peak_memory` reads an order as JSON from standard input, builds that one system, does the
task twice (a third time under the profiler) and prints what it used as JSON. Knows nothing of clocks.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from xloom.benchmark.parts import Parts

STEPS = 2  # the optimizer's state is there from the second on


@dataclass(frozen=True)
class Order:
    """What to build and do; the experts and the head's weights lie in `folder`.

    Args:
        task: a training step of `batch` rows of `tokens`, with the loss on the last `new`; one forward over a prompt of
            `tokens`; or a text of `new` tokens after such a prompt.
    """

    task: Literal["train", "prefill", "decode"]
    system: str
    base: str
    shape: tuple[int | None, int | None, int | None]
    dtype: str
    device: str
    folder: str
    expert_folders: Mapping[str, str]
    threads: int
    tokens: int
    new: int = 0
    batch: int = 1


class Peak(NamedTuple):
    """Megabytes (10^6 bytes).

    Args:
        peak_mb: the most that the process held; on CUDA, that torch's tensors held on the device.
        floor_mb: the same before the system was built: torch and the base, loaded.
        step_mb: the most that tensors made in one go at the task held at once. On the CPU a process can hold far more,
            where malloc keeps what was freed in pieces that nothing fits into.
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
    """Builds and works. The figure is that of the process so far: call it in one that has done nothing else."""
    import torch

    from xloom.benchmark.parts import open_base, read_parts

    torch.set_num_threads(order.threads)
    base, _ = open_base(order.base, getattr(torch, order.dtype), order.device, order.shape)
    floor = used_mb(order.device)
    parts = read_parts(base, Path(order.folder), order.expert_folders)
    work = _training(order, parts) if order.task == "train" else _inference(order, parts)
    for _ in range(STEPS):
        work()
    peak = used_mb(order.device)  # before the profiler takes its own
    return Peak(peak, floor, live_mb(work, order.device))


def _training(order: Order, parts: "Parts") -> Callable[[], Any]:
    from xloom.benchmark import train_systems

    learner = train_systems.build(order.system, parts)
    vocab = parts.base.config.get_text_config(decoder=True).vocab_size
    batch = train_systems.random_batch(
        vocab, rows=order.batch, tokens=order.tokens, completion=order.new, device=order.device
    )
    states = learner.fill(batch)
    return lambda: learner.step(batch, states)


def _inference(order: Order, parts: "Parts") -> Callable[[], Any]:
    """A system without a cache does the last step alone: those before it hold less."""
    import torch

    from xloom.benchmark import systems

    system = systems.build(order.system, parts)
    last_alone = order.task == "decode" and not system.cached
    length = order.tokens + (order.new - 1 if last_alone else 0)
    vocab = parts.base.config.get_text_config(decoder=True).vocab_size
    ids_1T = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(length)).to(order.device)
    if order.task == "prefill":
        return lambda: system.prefill(ids_1T)
    return lambda: system.decode(ids_1T, 1 if last_alone else order.new)


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

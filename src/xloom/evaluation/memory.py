"""The most memory that this process, or its CUDA device, held while a block ran."""

import sys
from pathlib import Path
from typing import Self

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory(device) as memory: ...`, then `memory.mb` in 10^6 bytes.

    On CUDA, torch's tensors on the device. Elsewhere the resident memory of the whole process: libraries and all models
    that are loaded count. None where the system does not say what the peak of a block was.
    """

    def __init__(self, device: torch.device) -> None:
        self.mb: float | None = None
        self._device = device

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._was_reset = _reset()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self._device) / 1e6
        elif self._was_reset:
            self.mb = _peak()


def _reset() -> bool:
    """Lets the kernel's high-water mark begin anew; Linux alone can."""
    if sys.platform != "linux":
        return False
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return None

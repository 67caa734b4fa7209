"""Where a trace's scalings are: in memory, or in safetensors files of which only what is asked for is read.

Knows nothing of tokens.
Letters: T tokens  S sites  N experts
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from xloom.errors import TruncatedFileError

SCALINGS = "scalings"  # the tensor's name in a file
ALL = slice(None)


class Rows(ABC):
    """Scalings [T, S, N] in float16.

    Attributes:
        shape: T, S and N.
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def read(self, sites: slice = ALL, experts: slice = ALL) -> Tensor:
        """[T, sites, experts] in float16."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> "Rows":
        """The tokens from `start` to `stop`, 0 <= start <= stop <= T. Nothing is read or copied."""


@final
class Held(Rows):
    """In memory."""

    def __init__(self, scalings_TSN: Tensor) -> None:
        self._scalings_TSN = scalings_TSN
        tokens, sites, experts = scalings_TSN.shape
        self.shape = (tokens, sites, experts)

    def read(self, sites: slice = ALL, experts: slice = ALL) -> Tensor:
        return self._scalings_TSN[:, sites, experts]

    def narrow(self, start: int, stop: int) -> Rows:
        return Held(self._scalings_TSN[start:stop])


@final
class Stored(Rows):
    """In files, one after the other; each read maps the files and takes its part of them.

    Args:
        ends: where the tokens of each file end.
        start, stop: tokens of all files that count.
    """

    def __init__(
        self,
        files: Sequence[Path],
        ends: Sequence[int],
        sites: int,
        experts: int,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._files, self._ends = tuple(files), tuple(ends)
        self._start, self._stop = start, (self._ends[-1] if self._ends else 0) if stop is None else stop
        self.shape = (self._stop - self._start, sites, experts)

    def read(self, sites: slice = ALL, experts: slice = ALL) -> Tensor:
        _, S, N = self.shape
        inner = tuple(slice(*one.indices(size)) for one, size in ((sites, S), (experts, N)))
        parts = [torch.empty(0, S, N, dtype=torch.float16)[:, *inner]]
        at = self._start
        while at < self._stop:
            place = bisect_right(self._ends, at)
            first = self._ends[place - 1] if place else 0
            stop = min(self._ends[place], self._stop)
            parts.append(_slice(self._files[place], (slice(at - first, stop - first), *inner)))
            at = stop
        return torch.cat(parts)

    def narrow(self, start: int, stop: int) -> Rows:
        _, sites, experts = self.shape
        return Stored(self._files, self._ends, sites, experts, self._start + start, self._start + stop)


def _slice(path: Path, places: tuple[slice, ...]) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_slice(SCALINGS)[places]
            return found
    except (SafetensorError, OSError) as error:
        raise TruncatedFileError(f"{path}: not a whole part of a trace ({error})") from None

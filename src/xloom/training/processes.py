"""What the processes of one run (torchrun, accelerate launch) agree on; with a single process, plain calls.

Values travel between the processes of one run only, never through files. Knows nothing of models or recipes.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from xloom.errors import XLoomError

_T = TypeVar("_T")


def start() -> None:
    """Joins the processes of a launcher, if there is one; a second call does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=not torch.accelerator.is_available())


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    return dist.get_rank() if count() > 1 else 0


def first(act: Callable[[], _T]) -> _T:
    """What process 0 answers, on every process.

    Raises:
        BaseException: what `act` raised, on every process, so that none of them waits for ever.
    """
    if count() == 1:
        return act()
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if index() == 0:
        try:
            told[0] = act()
        except BaseException as error:
            failure = error
            known = isinstance(error, (XLoomError, KeyboardInterrupt))
            told[1] = error if known else RuntimeError(f"process 0: {type(error).__name__}: {error}")
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise told[1]
    answer: _T = told[0]
    return answer


def gather(value: _T) -> list[_T]:
    """The values of all processes, in their order, on every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def totals(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sums over processes, by name; a name may be missing on some of them."""
    sums: dict[str, float] = {}
    for part in gather(dict(numbers)):
        for name, number in part.items():
            sums[name] = sums.get(name, 0.0) + number
    return sums


def any_of(flag: bool) -> bool:
    """True on every process if it is on one of them."""
    return any(gather(flag))

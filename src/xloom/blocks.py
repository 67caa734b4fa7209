"""What a `with` block of a model says to the calls that are made inside it: who decides, where scalings are logged.

A block holds for its thread and task alone (a context variable), and changes nothing of the model. Knows nothing of
passes.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from xloom.call import Observer
from xloom.errors import ConfigError
from xloom.routers import Routed, Router, Routing, XLora, as_routing
from xloom.trace import ScalingsLog

Value = TypeVar("Value")


class Ambient(Generic[Value]):
    """A value for the calls that are made inside a `with` block, in its thread and task alone.

    Args:
        instead: what to do where no block can be seen, for the error.
    """

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._value: ContextVar[Value | None] = ContextVar("xloom", default=None)
        self._lock, self._count = threading.Lock(), 0
        self._open = False  # whether there is a block in any thread: all that a compiled forward can see

    def get(self) -> Value | None:
        """Raises ConfigError inside `torch.compile`, which cannot see whose block it is, if there is one."""
        if not torch.compiler.is_compiling():
            return self._value.get()
        if self._open:
            raise ConfigError(f"a compiled forward cannot see a `with` block of the model: {self._instead}")
        return None

    @contextmanager
    def holding(self, value: Value | None) -> Iterator[None]:
        before = self._value.set(value)
        self._count_blocks(1)
        try:
            yield
        finally:
            self._count_blocks(-1)
            with suppress(ValueError):  # a generator that ends in another context than it began in: nothing holds there
                self._value.reset(before)

    def _count_blocks(self, more: int) -> None:
        with self._lock:
            self._count += more
            self._open = self._count > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self._instead)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self._instead,)


class WithBlocks(ABC):
    """The blocks of an X-LoRA model."""

    @property
    @abstractmethod
    def experts(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]: ...

    def _open_blocks(self) -> None:
        self._head_router = XLora()
        self._by_head = as_routing(self._head_router, self.experts, self.sites)
        self._routed: Ambient[Routed] = Ambient("pass routing=... to the call")
        self._logged: Ambient[ScalingsLog] = Ambient("read the scalings of its output")
        self._observed: Ambient[Observer] = Ambient("observe one that is not compiled")

    @property
    def router(self) -> Routed:
        """Who decides in calls that do not say: that of the innermost `routing` block, or the head."""
        found = self._routed.get()
        return self._head_router if found is None else found

    @contextmanager
    def routing(self, router: Routed) -> Iterator[None]:
        """For calls made inside the block, in this thread and task: `with model.routing(routers.Uniform()): ...`.

        A call's own `routing=` comes first; a stream keeps what held when it was made. Not for around a `yield`, where
        it holds for whoever reads: pass `routing=` there.

        Raises:
            ConfigError: no router.
        """
        if not isinstance(router, (Router, Routing, list, tuple)):
            raise ConfigError(f"routing: expected a router, a Routing, or a list of them, found {router!r}")
        with self._routed.holding(router):
            yield

    def routing_of(self, router: Routed | None) -> Routing:
        """A router, or a list with one for each row, as a value for this model; None: as in the block around.

        Raises:
            UnknownExpertError, ConfigError, ScalingsShapeError: as the router says of itself.
        """
        if router is None:
            router = self._routed.get()
            if router is None:
                return self._by_head
        return as_routing(router, self.experts, self.sites)

    @contextmanager
    def logging_scalings(self, max_tokens: int = 65_536) -> Iterator[ScalingsLog]:
        """Collects the scalings of every call made in the block, in this thread and task, detached and bounded.

        `with model.logging_scalings() as log: model.generate(...)`, then `log[site, expert]`, `log.shares()`.
        """
        log = ScalingsLog(self.sites, self.experts, max_tokens)
        with self._logged.holding(log):
            yield log

    @property
    def current_log(self) -> ScalingsLog | None:
        """Where calls made here are logged, if anywhere."""
        return self._logged.get()

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Calls made in the block are not logged: drafts that may be thrown away."""
        with self._logged.holding(None):
            yield

    def log(self, scalings_BTSN: Tensor) -> None:
        """Of a forward that has ended."""
        log = self._logged.get()
        if log is not None:
            log.append(scalings_BTSN)

    @contextmanager
    def observing_sites(self, observer: Observer | None) -> Iterator[None]:
        """Of calls made in the block, in this thread and task, every site of a mixed pass is shown to the observer.

        With drafts, that is every pass that is tried; where gradient checkpointing runs a layer twice, its sites twice.
        """
        with self._observed.holding(observer):
            yield

    @property
    def current_observer(self) -> Observer | None:
        """Who is shown the sites of calls made here, if anybody."""
        return self._observed.get()

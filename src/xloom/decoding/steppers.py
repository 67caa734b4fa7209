"""One step of decoding: a window of tokens through the model, for one sequence.

`OnePass` asks the model as it is: every logit is exact.
Letters: W tokens of the window  V vocabulary  S sites  N experts
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from transformers import Cache

from xloom.call import Observer
from xloom.decoding import working
from xloom.passes import TwoPassModel
from xloom.routers import Routing
from xloom.trace import ScalingsLog


class Stepped(NamedTuple):
    """What a window gave: logits [W, V], the scalings [W, S, N] they were computed with, and how many are exact.

    With `ahead=False` there may be no more than the exact ones.
    """

    logits_WV: Tensor
    scalings_WSN: Tensor
    exact: int


@dataclass(frozen=True)
class Begun:
    """A text whose prompt has been read.

    Args:
        cache: holds `length` tokens.
        mask: attention mask [1, T] of what the cache holds, where some of it is padding.
        last_SN: scalings of the last token in the cache.
        routing: who decides, for the one row, for as long as the text is written.
        log: where the scalings of tokens that are kept go.
        observer: is shown every site of a mixed pass.
    """

    model: TwoPassModel
    cache: Cache
    length: int
    mask: Tensor | None
    last_SN: Tensor
    routing: Routing
    log: ScalingsLog | None = None
    observer: Observer | None = None


class Stepper(ABC):
    """A sequence that is being written.

    Args:
        begun: what is in the cache, and who decides.

    Attributes:
        length: tokens that are kept.
    """

    def __init__(self, begun: Begun) -> None:
        self.model, self.length, self.routing = begun.model, begun.length, begun.routing
        self.observer, self._log = begun.observer, begun.log
        self._started = begun.length

    def log(self, scalings_TSN: Tensor) -> None:
        """Of tokens that are kept."""
        if self._log is not None:
            self._log.append(scalings_TSN[None])

    @abstractmethod
    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        """The window's tokens follow those that are kept.

        Args:
            ahead: whether logits that are not exact are of use.
        """

    @abstractmethod
    def keep(self, window: int, count: int) -> None:
        """Of the last window's tokens the first `count` stay, which must be exact and right."""

    @abstractmethod
    def close(self) -> None:
        """Everything kept goes into the cache that the stepper was made from."""


@final
class OnePass(Stepper):
    """The model as it is, whoever decides: exact at once, in one or two passes."""

    def __init__(self, begun: Begun) -> None:
        super().__init__(begun)
        self._mask, self._given = begun.mask, begun.cache
        self._cache = Cache(layers=working.copied(begun.cache.layers))
        self._scalings_WSN: Tensor

    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        inputs = {"input_ids": torch.tensor([window], device=self.model.device)}
        if self._mask is not None:
            more = self._mask.new_ones(1, self.length + len(window) - self._mask.shape[1])
            inputs["attention_mask"] = torch.cat([self._mask, more], dim=1)
            positions = self.model.positions(inputs["attention_mask"])
            inputs |= {name: of[:, -len(window) :] for name, of in positions.items()}
        with self.model.unlogged(), self.model.observing_sites(self.observer):
            out = self.model(**inputs, past_key_values=self._cache, use_cache=True, routing=self.routing)
        self._scalings_WSN = out.scalings[0]
        return Stepped(out.logits[0], out.scalings[0], len(window))

    def keep(self, window: int, count: int) -> None:
        if count:
            self.log(self._scalings_WSN[:count])
        working.cut(self._cache.layers, window - count)
        self.length += count

    def close(self) -> None:
        working.cut_to(self._cache.layers, self.length)
        working.write_back(self._given.layers, self._cache.layers, self.length - self._started)

"""One step of decoding: a window of tokens through the model, for one sequence.

`OnePass` asks the model as it is: every logit is exact.
Letters: W tokens of the window  V vocabulary  S sites  N experts
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from transformers import Cache

from xloom.decoding import working
from xloom.passes import TwoPassModel


class Stepped(NamedTuple):
    """What a window gave: logits [W, V], the scalings [W, S, N] they were computed with, and how many are exact.

    With `ahead=False` there may be no more than the exact ones.
    """

    logits_WV: Tensor
    scalings_WSN: Tensor
    exact: int


class Stepper(ABC):
    """A sequence that is being written.

    Args:
        length: tokens that the cache holds.
    """

    def __init__(self, model: TwoPassModel, length: int) -> None:
        self.model, self.length = model, length
        self._started = length

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
    """The model as it is, whatever its router: exact at once, in one or two passes.

    Args:
        mask: attention mask [1, T] of what the cache holds, where some of it is padding.
    """

    def __init__(self, model: TwoPassModel, cache: Cache, length: int, mask: Tensor | None) -> None:
        super().__init__(model, length)
        self._mask, self._given = mask, cache
        self._cache = Cache(layers=working.copied(cache.layers))
        self._scalings_WSN: Tensor

    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        inputs = {"input_ids": torch.tensor([window], device=self.model.device)}
        if self._mask is not None:
            more = self._mask.new_ones(1, self.length + len(window) - self._mask.shape[1])
            inputs["attention_mask"] = torch.cat([self._mask, more], dim=1)
            positions = self.model.positions(inputs["attention_mask"])
            inputs |= {name: of[:, -len(window) :] for name, of in positions.items()}
        with self.model.unlogged():
            out = self.model(**inputs, past_key_values=self._cache, use_cache=True)
        self._scalings_WSN = out.scalings[0]
        return Stepped(out.logits[0], out.scalings[0], len(window))

    def keep(self, window: int, count: int) -> None:
        self.model.log(self._scalings_WSN[None, :count])
        working.cut(self._cache.layers, window - count)
        self.length += count

    def close(self) -> None:
        working.cut_to(self._cache.layers, self.length)
        working.write_back(self._given.layers, self._cache.layers, self.length - self._started)

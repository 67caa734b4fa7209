"""What decoding works in instead of the cache that `generate` was given, until it is written back.

    copied(layers)   buffers layer by layer
    Slots            both passes' keys and values side by side, with a mask that keeps them apart

Whatever kind of cache was given gets what was written to it, and nothing of what was drafted.
Letters: Q tokens of a forward  K slots
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from xloom.cache import BufferLayer, CacheViews
from xloom.errors import CacheError

SCALING, MIXED = 0, 1
_DEAD = -1
_MOST_DEAD = 64  # slots that may be wasted before the others move together


def copied(layers: Sequence[CacheLayerMixin]) -> list[CacheLayerMixin]:
    """Raises CacheError for a kind of layer that cannot be cut back."""
    return [_copy(layer) if layer.is_initialized else DynamicLayer() for layer in layers]


def holds_all(layer: CacheLayerMixin, length: int) -> bool:
    """Whether a layer still has everything of `length` tokens: sliding ones let go what leaves their window."""
    return type(layer) in (DynamicLayer, BufferLayer, StaticLayer) or (
        isinstance(layer, DynamicSlidingWindowLayer) and layer.keys.shape[-2] == length
    )


def cut(layers: Sequence[CacheLayerMixin], count: int) -> None:
    """The last `count` tokens go. With 0 a sliding layer still drops what its window has left behind."""
    for layer in layers:
        if layer.is_initialized:
            layer.crop(-count)


def cut_to(layers: Sequence[CacheLayerMixin], length: int) -> None:
    """What is beyond `length` tokens goes, in each layer by itself: an interrupted forward has reached some of them."""
    for layer in layers:
        if layer.is_initialized and (surplus := int(layer.get_seq_length()) - length) > 0:
            layer.crop(-surplus)


def write_back(layers: Sequence[CacheLayerMixin], working: Sequence[CacheLayerMixin], count: int) -> None:
    """Appends the last `count` tokens of copied layers to those they were made from."""
    for layer, copy in zip(layers, working, strict=True):
        if not count or not copy.is_initialized:
            continue
        if isinstance(layer, DynamicSlidingWindowLayer):  # may hold fewer tokens than were written
            layer.keys, layer.values = copy.keys, copy.values
            layer.cumulative_length = copy.cumulative_length
        else:
            layer.update(copy.keys[..., -count:, :], copy.values[..., -count:, :])


class Slots:
    """Keys and values of both passes as one row: every slot belongs to one pass and one position of the text.

    A scaling pass can so run ahead of the mixed pass, and tokens of both go through the model in one forward.

    Args:
        cache: filled by the two passes alike, with layers that hold all of it.
        length: tokens it holds.
        mask: [1, length], 0 at padding.
    """

    def __init__(self, cache: CacheViews, length: int, mask: Tensor | None) -> None:
        self._given, self._length = cache, length
        pairs = [(_held(a), _held(b)) for a, b in zip(cache.scaling.layers, cache.mixed.layers, strict=True)]
        self._layers = [
            BufferLayer(torch.cat([keys, mixed_keys], -2), torch.cat([values, mixed_values], -2))
            for (keys, values), (mixed_keys, mixed_values) in pairs
        ]
        self.cache = Cache(layers=self._layers)
        device = self._layers[0].device
        one = torch.arange(length, device=device)
        self._positions_K = torch.cat([one, one])
        self._passes_K = torch.cat([torch.full_like(one, SCALING), torch.full_like(one, MIXED)])
        if mask is not None:
            self._passes_K[(mask[0, :length] == 0).repeat(2)] = _DEAD

    def mask(self, positions_Q: Tensor, passes_Q: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        """What new tokens may attend to, themselves included: [1, 1, Q, K + Q], to be added to attention scores.

        Args:
            window: of sliding attention, in tokens.
        """
        positions_K = torch.cat([self._positions_K, positions_Q])
        seen_QK = torch.cat([self._passes_K, passes_Q])[None] == passes_Q[:, None]
        seen_QK &= positions_K[None] <= positions_Q[:, None]
        if window is not None:
            seen_QK &= positions_K[None] > positions_Q[:, None] - window
        mask = torch.full(seen_QK.shape, torch.finfo(dtype).min, dtype=dtype, device=seen_QK.device)
        return mask.masked_fill_(seen_QK, 0.0)[None, None]

    def added(self, positions_Q: Tensor, passes_Q: Tensor) -> None:
        """The model has put these tokens behind the others."""
        self._positions_K = torch.cat([self._positions_K, positions_Q])
        self._passes_K = torch.cat([self._passes_K, passes_Q])

    def drop(self, scaling: int, mixed: int) -> None:
        """Tokens of the scaling pass from position `scaling` on go, and those of the mixed pass from `mixed` on."""
        ends_K = torch.where(self._passes_K == SCALING, scaling, mixed)
        self._passes_K[self._positions_K >= ends_K] = _DEAD
        alive_K = (self._passes_K != _DEAD).nonzero()[:, 0]
        tail = len(self._passes_K) - 1 - int(alive_K[-1])
        if tail:
            for layer in self._layers:
                layer.crop(-tail)
            self._positions_K, self._passes_K = self._positions_K[:-tail], self._passes_K[:-tail]
        if len(self._passes_K) - len(alive_K) > _MOST_DEAD + 2 * self._length:
            self._compact(alive_K)

    def write_back(self, length: int) -> None:
        """The tokens up to `length` go into the cache that was given; all of both passes must be there."""
        if length == self._length:
            return
        for which, views in ((SCALING, self._given.scaling), (MIXED, self._given.mixed)):
            new_K = (self._passes_K == which) & (self._positions_K >= self._length) & (self._positions_K < length)
            places = new_K.nonzero()[:, 0]
            places = places[self._positions_K[places].argsort()]
            for layer, both in zip(views.layers, self._layers, strict=True):
                layer.update(both.keys.index_select(-2, places), both.values.index_select(-2, places))

    def _compact(self, alive_K: Tensor) -> None:
        for layer in self._layers:
            layer.select(alive_K)
        self._positions_K, self._passes_K = self._positions_K[alive_K], self._passes_K[alive_K]


def _held(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """What a layer holds: keys and values [B, H, T, D]."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, BufferLayer):
        return cast(Tensor, layer.keys), cast(Tensor, layer.values)
    if type(layer) is StaticLayer:
        length = int(layer.cumulative_length)
        return layer.keys[..., :length, :], layer.values[..., :length, :]
    raise CacheError(
        f"this decoding needs a cache of dynamic or static layers, found {type(layer).__name__}; leave "
        "cache_implementation at its default, or custom_generate out"
    )


def _copy(layer: CacheLayerMixin) -> CacheLayerMixin:
    keys, values = _held(layer)
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return BufferLayer(keys, values)
    sliding = DynamicSlidingWindowLayer(layer.sliding_window)
    sliding.lazy_initialization(keys, values)
    sliding.keys, sliding.values, sliding.cumulative_length = keys, values, layer.cumulative_length
    sliding.activate_past_recording()
    return sliding

"""One transformers cache for both passes: views on its layers, and the pooled head's states beside them.

    cache.layers = [scaling pass 0..L-1][mixed pass 0..L-1][one layer per pooled head input]

The views share the layer objects, so crop, reorder, batch and reset act on everything at once. A pooled state is kept
per position (keys: sums [B, 1, T, D], values: counts [B, 1, T, 1]), so cutting the cache back cuts it back as well.
Knows nothing of models or routers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from xloom.config import XLoraConfig
from xloom.errors import CacheError
from xloom.gating import PoolState

_ROOM = 64  # tokens a fresh buffer has room for beyond what it holds
_WHY = "it was filled under another router; start a new cache when the router changes"


class BufferLayer(DynamicLayer):
    """A `DynamicLayer` whose `update` copies the new tokens alone, and whose `crop` moves no data."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._length = keys.shape[-2]
        self._keys, self._values = _grown(keys, self._length), _grown(values, self._length)
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._keys.shape[-2]:
            self._keys = _grown(self._keys[..., :start, :], self._length)
            self._values = _grown(self._values[..., :start, :], self._length)
        self._keys[..., start : self._length, :] = key_states
        self._values[..., start : self._length, :] = value_states
        self._show()
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        self._length -= abs(tokens_to_remove)
        self._show()

    def select(self, places: Tensor) -> None:
        """Only these tokens stay, in this order."""
        self._keys, self._values = self.keys.index_select(-2, places), self.values.index_select(-2, places)
        self._length = len(places)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[..., : self._length, :], self._values[..., : self._length, :]


def _grown(part: Tensor, length: int) -> Tensor:
    whole = part.new_empty(*part.shape[:-2], 2 * length + _ROOM, part.shape[-1])
    whole[..., : part.shape[-2], :] = part
    return whole


@dataclass(frozen=True)
class CacheViews:
    """What each part of a forward may see of one cache."""

    scaling: Cache
    mixed: Cache
    pools: list[CacheLayerMixin]

    def past_pools(self) -> list[PoolState | None]:
        return [_last_state(layer) for layer in self.pools]

    def append_pools(self, states: list[PoolState]) -> None:
        for layer, state in zip(self.pools, states, strict=True):
            layer.update(state.sums_BTD.unsqueeze(1).detach(), state.counts_BT1.unsqueeze(1).detach())


def new_cache(config: XLoraConfig) -> DynamicCache:
    """An empty cache with the layers that `config` calls for."""
    return DynamicCache(config=config)


def views(cache: Cache, config: XLoraConfig, *, two_passes: bool) -> CacheViews:
    """Splits a cache. With one pass only, that pass lives in the first stack, which tells the cache's length.

    Raises:
        CacheError: not made for this model, or filled by a router that needs another number of passes.
    """
    if not cache.layers and cache.layer_class_to_replicate is not None:  # DynamicCache() without a config
        cache.layers.extend(new_cache(config).layers)
        cache.layer_class_to_replicate = None
    depth = config.base_text_config.num_hidden_layers
    expected = depth * config.num_stacks + len(config.pools)
    if len(cache.layers) != expected:
        raise CacheError(
            f"expected a cache of {expected} layers ({config.num_stacks} stacks of {depth} and {len(config.pools)} for "
            f"pooled head inputs), found {len(cache.layers)}; build it with DynamicCache(config=model.config)"
        )
    if cache.offloading:
        raise CacheError("an offloaded cache cannot be split into two stacks; use a dynamic or static one")
    stacks = depth * config.num_stacks
    first, pools = cache.layers[:depth], cache.layers[stacks:]
    if two_passes:
        for layer in pools:
            _check_lengths(first[0], layer, "the pooled head input")
    if any(type(layer) not in (DynamicLayer, BufferLayer, StaticLayer) for layer in pools):
        raise CacheError(f"a pooled head input needs a dynamic or static cache, found {type(cache).__name__}")
    if config.num_stacks == 1:
        return CacheViews(Cache(layers=first), Cache(layers=first), pools)
    second = cache.layers[depth:stacks]
    if two_passes:
        _check_lengths(first[0], second[0], "the second")
    elif isinstance(count := second[0].get_seq_length(), int) and count:
        raise CacheError(f"the cache holds {count} tokens of two passes, and this router needs one: {_WHY}")
    return CacheViews(Cache(layers=first), Cache(layers=second if two_passes else first), pools)


def _check_lengths(first: CacheLayerMixin, other: CacheLayerMixin, name: str) -> None:
    lengths = first.get_seq_length(), other.get_seq_length()
    if any(isinstance(length, torch.Tensor) for length in lengths):
        return  # a static cache keeps its length on the device; reading it would stall every step
    if lengths[0] != lengths[1]:
        raise CacheError(f"the cache holds {lengths[0]} tokens of the first pass and {lengths[1]} of {name}: {_WHY}")


def _last_state(layer: CacheLayerMixin) -> PoolState | None:
    if not layer.is_initialized:
        return None
    if isinstance(layer, StaticLayer):
        last = (layer.cumulative_length - 1).clamp(min=0).view(1)
        empty = layer.cumulative_length == 0
        sums = layer.keys.index_select(2, last).masked_fill(empty, 0.0)
        counts = layer.values.index_select(2, last).masked_fill(empty, 0.0)
    elif layer.get_seq_length() == 0:
        return None
    else:
        sums, counts = layer.keys[:, :, -1:], layer.values[:, :, -1:]
    return PoolState(sums.squeeze(1), counts.squeeze(1))


# --- batches whose rows come and go: caches of dynamic layers ---


def joined(caches: Sequence[Cache]) -> Cache:
    """The rows of several caches as one, those with fewer tokens padded on the left; filled by as many passes each."""
    return Cache(layers=[_joined(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])


def picked(cache: Cache, rows: Tensor) -> Cache:
    """A cache of its own with these rows [R], in this order and as often as they are named."""
    layers = []
    for layer in cache.layers:
        one = copy.copy(layer)
        if layer.is_initialized:
            one.keys, one.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        layers.append(one)
    return Cache(layers=layers)


def trim(cache: Cache, count: int) -> None:
    """The first `count` tokens of all rows go, which must be padding."""
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        kept = layer.get_seq_length() - count
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = kept
            kept = min(kept, layer.keys.shape[-2])
        start = layer.keys.shape[-2] - kept
        layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]


def _joined(layers: Sequence[CacheLayerMixin]) -> CacheLayerMixin:
    one = copy.copy(layers[0])
    if not one.is_initialized:
        return one
    tokens = max(layer.get_seq_length() for layer in layers)
    held = tokens
    if isinstance(one, DynamicSlidingWindowLayer):
        one.cumulative_length = tokens
        held = min(tokens, one.sliding_window - 1)
    one.keys = torch.cat([_padded(layer.keys, held) for layer in layers])
    one.values = torch.cat([_padded(layer.values, held) for layer in layers])
    return one


def _padded(part: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, 0, tokens - part.shape[-2], 0))


def for_two_passes(cache: Cache, config: XLoraConfig, pool_like: Tensor | None) -> Cache:
    """Makes a cache of one pass fit a batch of two passes.

    The head's part is filled with zeros; nothing that decides for these rows reads it.

    Args:
        pool_like: [D] of the dtype and device of pooled states, where there are any.
    """
    depth, layers = config.base_text_config.num_hidden_layers, list(cache.layers)
    if config.num_stacks == 2:
        layers[:depth], layers[depth : 2 * depth] = [_emptied(layer) for layer in layers[:depth]], layers[:depth]
    rows, tokens = layers[0].keys.shape[0], layers[0].get_seq_length()
    for place in range(depth * config.num_stacks, len(layers)):
        assert pool_like is not None
        sums = pool_like.new_zeros(rows, 1, tokens, len(pool_like))
        layers[place] = DynamicLayer()
        layers[place].update(sums, sums[..., :1])
    return Cache(layers=layers)


def for_one_pass(cache: Cache, config: XLoraConfig) -> Cache:
    """A cache that was filled by two passes, for rows that need the mixed pass alone."""
    depth, fresh = config.base_text_config.num_hidden_layers, new_cache(config).layers
    fresh[:depth] = cache.layers[depth * (config.num_stacks - 1) : depth * config.num_stacks]
    return Cache(layers=fresh)


def _emptied(layer: CacheLayerMixin) -> CacheLayerMixin:
    one = copy.copy(layer)
    one.keys, one.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
    return one

"""`Joint`: both passes of a two-pass model in one forward.

    mixed pass     tokens that the last step has seen, with their true scalings: exact
    scaling pass   tokens that are new: their hidden states give their true scalings
    mixed pass     the same new tokens, with the newest true scalings: nearly right, and left out where of no use

so that a token is exact one step after it was first seen, and what comes next is known nearly at once.
Letters: T tokens of both passes  W tokens of the window  V vocabulary  S sites  N experts
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import Cache

from xloom import architecture
from xloom.cache import CacheViews, views
from xloom.decoding import working
from xloom.decoding.attention import grouped
from xloom.decoding.steppers import Stepped, Stepper
from xloom.gating import scaling_pass_scalings
from xloom.passes import TwoPassModel
from xloom.routers import HiddenStateRouter, Precomputed


def suits(model: TwoPassModel, cache: Cache, length: int) -> bool:
    """Whether this model, its router in charge, and this cache of `length` tokens can do with `Joint`."""
    if not model.runs_two_passes or not architecture.takes_own_masks(model.base):
        return False
    depth = model.config.base_text_config.num_hidden_layers
    return all(working.holds_all(layer, length) for layer in cache.layers[: 2 * depth])


@final
class Joint(Stepper):
    """Both passes of a two-pass model in one forward.

    Args:
        mask: as for `OnePass`.
        last_SN: scalings of the last token in the cache.
    """

    def __init__(self, model: TwoPassModel, cache: Cache, length: int, mask: Tensor | None, last_SN: Tensor) -> None:
        super().__init__(model, length)
        given = views(cache, model.config, two_passes=True)
        self._slots = working.Slots(given, length, mask)
        self._given_pools, self._pools = given.pools, working.copied(given.pools)
        self._padding = 0 if mask is None else int((mask[0, :length] == 0).sum())
        self._last_SN = last_SN
        self._seen: list[int] = []  # tokens after the kept ones whose true scalings are known
        self._known_WSN = last_SN[None][:0]

    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        exact = _same(window, self._seen)
        new = len(window) - exact
        self._forget(exact)
        known_WSN = self._known_WSN
        newest_SN = known_WSN[-1] if exact else self._last_SN
        used_WSN = torch.cat([known_WSN, newest_SN.expand(new, -1, -1)])
        logits_WV, decided_WSN = self._forward(window, exact, used_WSN, ahead)
        self._seen, self._known_WSN = list(window), torch.cat([known_WSN, decided_WSN])
        return Stepped(logits_WV, used_WSN[: len(logits_WV)], exact)

    def _forward(self, window: Sequence[int], exact: int, used_WSN: Tensor, ahead: bool) -> tuple[Tensor, Tensor]:
        device, again = self.model.device, exact if ahead else len(window)
        places = torch.arange(self.length, self.length + len(window), device=device)
        positions = torch.cat([places, places[again:]])
        passes = torch.full_like(positions, working.MIXED)
        scaling = slice(exact, len(window))
        passes[scaling] = working.SCALING
        ids = torch.tensor([[*window, *window[again:]]], device=device)
        scalings = torch.cat([used_WSN, used_WSN[again:]])
        split = CacheViews(self._slots.cache, self._slots.cache, self._pools)
        with grouped(self.model.base):
            out = _joint_pass(
                self.model,
                scalings,
                scaling,
                split,
                input_ids=ids,
                position_ids=(positions - self._padding)[None],
                attention_mask=self._masks(positions, passes),
            )
        self._slots.added(positions, passes)
        return out

    def keep(self, window: int, count: int) -> None:
        if count:
            self._last_SN = self._known_WSN[count - 1]
            self.model.log(self._known_WSN[None, :count])
        self._seen, self._known_WSN = self._seen[count:], self._known_WSN[count:]
        self.length += count

    def close(self) -> None:
        self._forget(0)
        self._slots.write_back(self.length)
        working.write_back(self._given_pools, self._pools, self.length - self._started)

    def _forget(self, exact: int) -> None:
        """All but the kept tokens, and the first `exact` that were seen in the scaling pass after them."""
        self._slots.drop(self.length + exact, self.length)
        working.cut(self._pools, len(self._seen) - exact)
        self._seen, self._known_WSN = self._seen[:exact], self._known_WSN[:exact]

    def _masks(self, positions: Tensor, passes: Tensor) -> Any:
        """As the base's decoder takes them: one, or one for every kind of its layers."""
        windows = architecture.attention_windows(self.model.base)
        made = {
            kind: self._slots.mask(positions, passes, self.model.base.dtype, size) for kind, size in windows.items()
        }
        return made if len(made) > 1 else next(iter(made.values()))


def _joint_pass(
    model: TwoPassModel, scalings_TSN: Tensor, scaling: slice, split: CacheViews, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Tokens of both passes as one row, which `attention_mask` [1, 1, T, past + T] keeps apart.

    Args:
        scalings_TSN: of the tokens of the mixed pass; those of the scaling pass get their own.
        scaling: the tokens of the scaling pass. The router in charge decides on their scalings.
        split: one stack for both passes, and the pools.
        inputs: `input_ids` [1, T], `position_ids`, `attention_mask`.

    Returns:
        Logits of the other tokens, and the scalings that were decided on.
    """
    weights = scaling_pass_scalings(model.config, model.head.linears[0].weight)
    scalings_TSN[scaling] = 0.0 if weights is None else weights
    mixed = torch.ones(len(scalings_TSN), dtype=torch.bool, device=scalings_TSN.device)
    mixed[scaling] = False
    model.mixture.global_weight = model.config.global_scaling_weight
    hidden: list[Tensor] = []

    def take(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(given[0][:, scaling])
        # experts on the language-model head have scalings of all tokens
        return given if model.adapts_lm_head else (given[0][:, mixed], *given[1:])

    assert isinstance(model.router, HiddenStateRouter)
    router = Precomputed(scalings_TSN[None], once=True, most=model.router.most(model.config))
    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        with torch.no_grad(), model.mixture.routed_by(router):
            logits_TV = model.base(**inputs, past_key_values=split.mixed, use_cache=True, return_dict=True).logits[0]
    finally:
        hook.remove()
    decided = model.decide(hidden[0], hidden[0].new_ones(hidden[0].shape[:2]), split)[0]
    return logits_TV[mixed] if model.adapts_lm_head else logits_TV, decided


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

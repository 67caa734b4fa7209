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

from xloom import architecture, wrapping
from xloom.cache import CacheViews, views
from xloom.call import Call, times
from xloom.decoding import working
from xloom.decoding.attention import GROUPED
from xloom.decoding.steppers import Begun, Stepped, Stepper
from xloom.gating import scaling_pass_scalings


def suits(begun: Begun) -> bool:
    """Whether this model, who decides, and this cache can do with `Joint`."""
    model = begun.model
    if not model.in_two_passes(begun.routing) or not architecture.takes_own_masks(model.base):
        return False
    depth = model.config.base_text_config.num_hidden_layers
    return all(working.holds_all(layer, begun.length) for layer in begun.cache.layers[: 2 * depth])


class _Parted(nn.Module):
    """In the place of the language-model head, for one text: keeps the hidden states of the scaling pass.

    Attributes:
        scaling, mixed: which tokens [T] of the forward belong to the scaling pass, and which to the mixed pass.
        hidden_BTD: those of the last forward's scaling pass.
    """

    scaling: slice
    mixed: Tensor
    hidden_BTD: Tensor

    def __init__(self, head: nn.Module, takes_all: bool) -> None:
        super().__init__()
        self.head, self._takes_all = head, takes_all

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        self.hidden_BTD = hidden_BTD[:, self.scaling]
        # experts on the language-model head have scalings of all tokens
        logits: Tensor = self.head(hidden_BTD if self._takes_all else hidden_BTD[:, self.mixed])
        return logits[:, self.mixed] if self._takes_all else logits


@final
class Joint(Stepper):
    """Both passes of a two-pass model in one forward, through modules of the base that belong to this text alone."""

    def __init__(self, begun: Begun) -> None:
        super().__init__(begun)
        model = begun.model
        given = views(begun.cache, model.config, two_passes=True)
        self._slots = working.Slots(given, begun.length, begun.mask)
        self._given_pools, self._pools = given.pools, working.copied(given.pools)
        self._padding = 0 if begun.mask is None else int((begun.mask[0, : begun.length] == 0).sum())
        self._last_SN = begun.last_SN
        self._seen: list[int] = []  # tokens after the kept ones whose true scalings are known
        self._known_WSN = begun.last_SN[None][:0]
        head = model.get_output_embeddings()
        self._parted = _Parted(head, model.adapts_lm_head)
        attends = model.base.config.get_text_config(decoder=True)._attn_implementation
        self._base = wrapping.with_modules(
            model.base, {head: self._parted}, attention=GROUPED if attends == "sdpa" else None
        )

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
        config, model = self.model.config, self.model
        # tokens of the scaling pass have its scalings, whatever the routing says of the others
        weights_N = scaling_pass_scalings(config, model.head.linears[0].weight)
        used = times(scalings[None], self.routing.global_B(config)).clone()
        used[:, scaling] = 0.0 if weights_N is None else weights_N * config.global_scaling_weight
        most = self.routing.most(config) if weights_N is None else None
        self._parted.scaling = scaling
        self._parted.mixed = passes == working.MIXED
        call = model.weigh(Call(observer=self.observer), used, most)
        with torch.no_grad(), model.mixture.current.running(call):
            out = self._base(
                input_ids=ids,
                position_ids=(positions - self._padding)[None],
                attention_mask=self._masks(positions, passes),
                past_key_values=self._slots.cache,
                use_cache=True,
                return_dict=True,
            )
        hidden_BTD = self._parted.hidden_BTD
        split = CacheViews(self._slots.cache, self._slots.cache, self._pools)
        decided = self.model.decide(hidden_BTD, hidden_BTD.new_ones(hidden_BTD.shape[:2]), split, self.routing)
        self._slots.added(positions, passes)
        return out.logits[0], decided.scalings_BTSN[0]

    def keep(self, window: int, count: int) -> None:
        if count:
            self._last_SN = self._known_WSN[count - 1]
            self.log(self._known_WSN[:count])
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


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

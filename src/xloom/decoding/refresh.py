"""Scalings that are decided now and then, not for every token: nearly the price of one pass, and another model's text.

model.generate(ids, custom_generate=xloom.refreshing(every=8), max_new_tokens=200)

The mixed pass runs for every token, with the scalings of the last decision; the scaling pass for all tokens since then
at once, when the next one is due. Never deciding again is what mistral.rs calls non-granular scalings.
Letters: W tokens of the window  S sites  N experts
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from transformers import Cache

from xloom.cache import CacheViews, views
from xloom.call import Call
from xloom.decoding import working
from xloom.decoding.generating import Decoding
from xloom.decoding.steppers import Begun, Stepped, Stepper
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel
from xloom.routers import Routing


@final
class Refreshing(Decoding):
    """Text of a two-pass model whose scalings stay for a while: another text, unless `every` is 1.

    Args:
        every: tokens from one decision to the next; None: never again, scalings are frozen.
        after: of the new tokens, the first that are decided on one by one.
        generator: draws the tokens; the global one by default.

    Raises:
        ConfigError: a count that is none; when it writes, a model or router that decides without a scaling pass.
    """

    def __init__(self, every: int | None = None, after: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if every is not None and every < 1:
            raise ConfigError(f"every: expected 1 token or more, or None, found {every}")
        if after < 0:
            raise ConfigError(f"after: expected 0 tokens or more, found {after}")
        self.every, self.after = every, after

    def is_due(self, written: int) -> bool:
        """Whether the new token that comes after `written` others gets scalings of its own."""
        beyond = written - self.after
        return beyond < 0 or (self.every is not None and beyond % self.every == 0)

    def check(self, model: TwoPassModel, routing: Routing) -> None:
        if not model.in_two_passes(routing):
            raise ConfigError(
                "refreshing spares scaling passes: expected a model and a router with two passes, found one; leave "
                "custom_generate out"
            )

    def stepper(self, begun: Begun) -> Stepper:
        return _Held(begun, self)


class _Held(Stepper):
    """A token at a time through the mixed pass, and all tokens since the last decision through the scaling pass."""

    def __init__(self, begun: Begun, how: Refreshing) -> None:
        super().__init__(begun)
        self._given = views(begun.cache, begun.model.config, two_passes=True)
        self._mask, self._how = begun.mask, how
        copies = [working.copied(part) for part in (self._given.scaling.layers, self._given.mixed.layers)]
        scaling, mixed = (Cache(layers=layers) for layers in copies)
        self._split = CacheViews(scaling, mixed, working.copied(self._given.pools))
        self._decided = begun.length  # tokens that the scaling pass has seen
        self._undecided: list[int] = []  # those after them
        self._newest_SN = begun.last_SN

    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        self._undecided += window
        if self._how.is_due(self.length - self._started):
            self._decide(self.length + len(window))
        scalings_WSN = self._newest_SN.expand(len(window), -1, -1)
        model = self.model
        call = model.mix(Call(observer=self.observer), self.routing, scalings_WSN[None])
        with model.mixture.current.running(call):
            inputs = self._inputs(window, self.length + len(window))
            out = model.base(**inputs, past_key_values=self._split.mixed, return_dict=True)
        return Stepped(out.logits[0], scalings_WSN, len(window))

    def keep(self, window: int, count: int) -> None:
        assert window == count == 1, "without drafts a window is the text's next token"
        self.log(self._newest_SN[None])
        working.cut([*self._split.scaling.layers, *self._split.mixed.layers], 0)
        self.length += 1

    def close(self) -> None:
        working.cut_to(self._split.mixed.layers, self.length)
        self._decided = min(self._decided, self.length)  # the last window may not have been kept
        working.cut_to([*self._split.scaling.layers, *self._split.pools], self._decided)
        del self._undecided[self.length - self._decided :]
        if self._undecided:
            self._decide(self.length)
            working.cut(self._split.scaling.layers, 0)
        count = self.length - self._started
        for given, copy in ((self._given.scaling, self._split.scaling), (self._given.mixed, self._split.mixed)):
            working.write_back(given.layers, copy.layers, count)
        working.write_back(self._given.pools, self._split.pools, count)

    def _decide(self, stop: int) -> None:
        """The undecided tokens, up to place `stop`, go through the scaling pass; the last one's scalings hold now."""
        ids = self._undecided
        hidden_BTD = self.model.scaling_pass(self._inputs(ids, stop), self._split)
        self._decided, self._undecided = stop, []
        mask_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2])
        self._newest_SN = self.model.decide(hidden_BTD, mask_BT, self._split, self.routing).scalings_BTSN[0, -1]

    def _inputs(self, ids: Sequence[int], stop: int) -> dict[str, Any]:
        """Of the tokens before place `stop` of the text."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self.model.device), "use_cache": True}
        if self._mask is not None:
            mask = torch.cat([self._mask, self._mask.new_ones(1, max(0, stop - self._mask.shape[1]))], dim=1)[:, :stop]
            inputs["attention_mask"] = mask
            inputs |= {name: of[:, -len(ids) :] for name, of in self.model.positions(mask).items()}
        return inputs


def refreshing(every: int | None = None, after: int = 0, generator: torch.Generator | None = None) -> Refreshing:
    """`Refreshing`, for `model.generate(..., custom_generate=xloom.refreshing(every=8))`."""
    return Refreshing(every, after, generator)

"""The router of X-LoRA itself: a head reads the hidden states of the scaling pass and decides for all sites at once.

Knows nothing of how the head comes to its logits.
"""

from collections.abc import Mapping, Sequence
from typing import final

from xloom.errors import ConfigError, names
from xloom.routers.routing import Head, Line, Router, Routing, check_known, finite


@final
class XLora(Router):
    """The X-LoRA head (arXiv 2402.07148), with experts masked out or favoured at run time.

    Args:
        only: these experts alone may be used (all, if None).
        without: these may not.
        bias: added to the logits of the named experts at every token and site.
        top_k: experts kept for each token and site, in place of the config's `top_k_lora`.
        renormalise: whether the kept get a softmax of their own, in place of `enable_softmax_topk`.
        temperature: divides the logits, in place of `softmax_temperature`.
        global_weight: multiplies all scalings, in place of `global_scaling_weight`.

    Settings are those of the mixed pass: the scaling pass, where experts take part in it, goes by the config.

    Raises:
        ConfigError: a setting out of range; with a model, no expert is left.
        UnknownExpertError: with a model, for a name that it does not have.
    """

    def __init__(
        self,
        *,
        only: Sequence[str] | None = None,
        without: Sequence[str] = (),
        bias: Mapping[str, float] | None = None,
        top_k: int | None = None,
        renormalise: bool | None = None,
        temperature: float | None = None,
        global_weight: float | None = None,
    ) -> None:
        for given in (only, without):
            if isinstance(given, str):
                raise ConfigError(f"XLora: expected a list of experts' names, found {given!r}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ConfigError(f"top_k: expected a whole number of at least 1, or None, found {top_k!r}")
        if temperature is not None and not finite(temperature, "temperature") > 0:
            raise ConfigError(f"temperature: expected a number above 0, found {temperature}")
        if global_weight is not None:
            finite(global_weight, "global_weight")
        self.only = None if only is None else tuple(only)
        self.without = tuple(without)
        self.bias = {name: finite(value, f"bias of {name!r}") for name, value in (bias or {}).items()}
        self.top_k, self.renormalise, self.temperature = top_k, renormalise, temperature
        self.global_weight = global_weight

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        check_known([*(self.only or ()), *self.without, *self.bias], experts)
        allowed = bias = None
        if self.only is not None or self.without:
            allowed = tuple((self.only is None or e in self.only) and e not in self.without for e in experts)
            if not any(allowed):
                raise ConfigError(
                    f"only={self.only} without={self.without} leaves none of the experts {names(experts)}"
                )
        if self.bias:
            bias = tuple(self.bias.get(e, 0.0) for e in experts)
        head = Head(allowed, bias, self.top_k, self.renormalise, self.temperature)
        return Routing((Line(head, self.global_weight),))

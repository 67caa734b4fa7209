"""The router of X-LoRA itself: a head reads the hidden states of the scaling pass and decides for all sites at once.

Knows nothing of how the head came to its logits.
Letters: B batch  T tokens  S sites  N experts  C columns of the head
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from xloom.config import XLoraConfig
from xloom.errors import ConfigError, names
from xloom.gating import gate
from xloom.routers.given import check_known
from xloom.site import Router, Site


class HiddenStateRouter(Router):
    """A router that decides for all sites at once from logits [B, T, S, C] that the model's head gives."""

    @abstractmethod
    def decide(self, logits_BTSC: Tensor, config: XLoraConfig, experts: Sequence[str]) -> Tensor:
        """Scalings [B, T, S, N]."""

    def most(self, config: XLoraConfig) -> int | None:
        """How many experts of a token can have a scaling other than 0 at a site; None: any number."""
        return None

    @final
    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        raise RuntimeError("the model asks `decide` before the sites ask")


@final
class XLora(HiddenStateRouter):
    """The X-LoRA head (arXiv 2402.07148), with experts masked out or favoured at run time.

    Args:
        only: these experts alone may be used (all, if None).
        without: these may not.
        bias: added to the logits of the named experts at every token and site.

    Raises:
        UnknownExpertError: at the first forward, for a name the model does not have.
        ConfigError: no expert is left.
    """

    def __init__(
        self,
        *,
        only: Sequence[str] | None = None,
        without: Sequence[str] = (),
        bias: Mapping[str, float] | None = None,
    ) -> None:
        self.only = None if only is None else tuple(only)
        self.without = tuple(without)
        self.bias = dict(bias or {})

    def decide(self, logits_BTSC: Tensor, config: XLoraConfig, experts: Sequence[str]) -> Tensor:
        check_known([*(self.only or ()), *self.without, *self.bias], experts)
        allowed_N = bias_N = None
        if self.only is not None or self.without:
            allowed = [(self.only is None or e in self.only) and e not in self.without for e in experts]
            if not any(allowed):
                raise ConfigError(
                    f"only={self.only} without={self.without} leaves none of the experts {names(experts)}"
                )
            allowed_N = torch.tensor(allowed, device=logits_BTSC.device)
        if self.bias:
            bias_N = logits_BTSC.new_tensor([self.bias.get(e, 0.0) for e in experts])
        return gate(logits_BTSC, config, allowed_N=allowed_N, bias_N=bias_N)

    def most(self, config: XLoraConfig) -> int | None:
        return config.top_k_lora

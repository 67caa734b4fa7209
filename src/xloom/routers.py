"""Routers: who gives every site its scalings.

`XLora` is the paper's: a head reads the hidden states of the scaling pass. The others need no head and no second pass.
Use one for a while with `with model.routing(router): ...`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from xloom.config import XLoraConfig
from xloom.errors import ConfigError, ScalingsShapeError, UnknownExpertError, names
from xloom.experts import LowRank
from xloom.gating import gate, top_k_mask
from xloom.mixture import Router, Site

__all__ = ["Arrow", "BaseOnly", "Fixed", "HiddenStateRouter", "Precomputed", "Router", "Single", "Uniform", "XLora"]


@final
class BaseOnly(Router):
    """No expert at all: the base model, bit for bit."""

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        return None


class _SameEverywhere(Router):
    """The same weights for every token and site."""

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        leading = x.shape if site.is_embedding else x.shape[:-1]
        weights = self.weights(site.mixture.expert_names)
        return torch.tensor(weights, dtype=site.A_RI.dtype, device=x.device).expand(*leading, -1)

    @abstractmethod
    def weights(self, experts: Sequence[str]) -> list[float]: ...


@final
class Uniform(_SameEverywhere):
    """1/N for every expert."""

    def weights(self, experts: Sequence[str]) -> list[float]:
        return [1.0 / len(experts)] * len(experts)


@final
class Fixed(_SameEverywhere):
    """Weights by expert name, the same for every token; experts not named get 0.

    Raises:
        UnknownExpertError: at the first forward, for a name the model does not have.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)

    def weights(self, experts: Sequence[str]) -> list[float]:
        check_known(self._weights, experts)
        return [float(self._weights.get(name, 0.0)) for name in experts]


@final
class Single(_SameEverywhere):
    """One expert with weight 1, as if its adapter alone were on the base."""

    def __init__(self, expert: str) -> None:
        self.expert = expert

    def weights(self, experts: Sequence[str]) -> list[float]:
        check_known([self.expert], experts)
        return [1.0 if name == self.expert else 0.0 for name in experts]


@final
class Precomputed(Router):
    """Scalings [B, T, S, N] known beforehand: those of the head, or a replay."""

    def __init__(self, scalings_BTSN: Tensor) -> None:
        if scalings_BTSN.ndim != 4:
            raise ScalingsShapeError(f"expected scalings [B, T, S, N], found shape {tuple(scalings_BTSN.shape)}")
        self.scalings_BTSN = scalings_BTSN
        self._by_site = scalings_BTSN.unbind(2)  # one stack in the backward pass, not a zero-filled tensor per site

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        if self.scalings_BTSN.shape[2] != len(site.mixture.sites):
            raise ScalingsShapeError(
                f"scalings for {self.scalings_BTSN.shape[2]} sites, the model has {len(site.mixture.sites)}"
            )
        return self._by_site[site.index]


@final
class Arrow(Router):
    """Per token and site by likeness: softmax over |v_n x|, v_n the direction that B_n A_n amplifies most.

    As PEFT's `create_arrow_model` (arXiv 2405.11157), for experts of any rank; those that lack a site get 0 there. At
    an embedding, whose input are token ids, the experts share alike.

    Args:
        temperature: divides the likenesses.
        top_k: experts kept per token and site before the softmax; all, if None.
    """

    def __init__(self, *, temperature: float = 1.0, top_k: int | None = None) -> None:
        self.temperature, self.top_k = temperature, top_k
        self._prototypes: WeakKeyDictionary[Site, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        there_N = torch.tensor([rank > 0 for rank in site.ranks], device=x.device)
        if site.is_embedding:
            return (there_N / there_N.sum()).to(site.A_RI.dtype).expand(*x.shape, -1)
        prototypes_NI = self._of(site)
        likeness = (x.to(prototypes_NI.dtype) @ prototypes_NI.T).abs() / self.temperature
        likeness = likeness.masked_fill(~there_N, -torch.inf)
        if self.top_k is not None:
            kept = top_k_mask(likeness, min(self.top_k, int(there_N.sum())))
            likeness = likeness.masked_fill(~kept, -torch.inf)
        return torch.softmax(likeness, dim=-1)

    def _of(self, site: Site) -> Tensor:
        version = (site.A_RI._version, site.B_OR._version)
        kept = self._prototypes.get(site)
        if kept is None or kept[0] != version:
            rows = [site.A_RI.new_zeros(site.A_RI.shape[1]) if low is None else arrow(low) for low in site.experts()]
            kept = self._prototypes[site] = (version, torch.stack(rows).to(site.A_RI))
        return kept[1]


def arrow(low: LowRank) -> Tensor:
    """The right singular vector [I] of B A with the largest singular value; its sign is arbitrary."""
    with torch.no_grad():
        A_RI, B_OR = (t.detach().double() for t in (low.A_RI, low.B_OR))
        Q_IR, R_RR = torch.linalg.qr(A_RI.T)
        M_OR = B_OR @ R_RR.T
        top_R: Tensor = torch.linalg.eigh(M_OR.T @ M_OR).eigenvectors[:, -1]
        direction_I: Tensor = Q_IR @ top_R
        return direction_I


class HiddenStateRouter(Router):
    """A router that decides for all sites at once from logits [B, T, S, C] that the model's head gives."""

    @abstractmethod
    def decide(self, logits_BTSC: Tensor, config: XLoraConfig, experts: Sequence[str]) -> Tensor:
        """Scalings [B, T, S, N]."""

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


def check_known(wanted: Sequence[str] | Mapping[str, float], experts: Sequence[str]) -> None:
    """Raises UnknownExpertError for names that are not among the experts."""
    unknown = [name for name in wanted if name not in experts]
    if unknown:
        raise UnknownExpertError(f"no expert named {names(map(repr, unknown))}; the model has {names(experts)}")

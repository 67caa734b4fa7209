"""Routers whose weights are known beforehand: alike everywhere, row by row, or a replay.

Knows nothing of hidden states or of what the experts hold.
Letters: B batch  T tokens  S sites  N experts
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from xloom.errors import ScalingsShapeError, UnknownExpertError, names
from xloom.fused import RankWeights
from xloom.site import Router, Site

if TYPE_CHECKING:
    from xloom.mixture import Mixture


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
    """Scalings [B, T, S, N] known beforehand: those of the head, or a replay.

    Args:
        once: for one forward of one model, which may then work for all sites at once.
        most: with `once`: at most so many experts of a token have a scaling other than 0 at a site; None: any number.
    """

    def __init__(self, scalings_BTSN: Tensor, *, once: bool = False, most: int | None = None) -> None:
        if scalings_BTSN.ndim != 4:
            raise ScalingsShapeError(f"expected scalings [B, T, S, N], found shape {tuple(scalings_BTSN.shape)}")
        self.scalings_BTSN = scalings_BTSN
        self._by_site = scalings_BTSN.unbind(2)  # one stack in the backward pass, not a zero-filled tensor per site
        self._most = most
        self._wanted = once
        self._rank_weights: RankWeights | None = None

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        if self.scalings_BTSN.shape[2] != len(site.mixture.sites):
            raise ScalingsShapeError(
                f"scalings for {self.scalings_BTSN.shape[2]} sites, the model has {len(site.mixture.sites)}"
            )
        return self._by_site[site.index]

    def rank_weights(self, mixture: "Mixture") -> RankWeights | None:
        if self._wanted:
            self._wanted = False
            self._rank_weights = mixture.spread_over_ranks(self.scalings_BTSN, self._most)
        return self._rank_weights


class _ByRow(Router):
    """Each row of the batch has weights of its own, the same for all its tokens and at every site.

    A batch of k times as many rows has k copies of each, side by side, as `generate` makes them for beams and for
    several answers to one prompt.
    """

    @final
    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        weights_BN = self.weights(site.mixture.expert_names).to(x.device, site.A_RI.dtype)
        leading = x.shape if site.is_embedding else x.shape[:-1]
        # A base that flattens [B, T] keeps the tokens of a row together, so that k is then copies times tokens.
        if not leading[0] or leading[0] % len(weights_BN):
            raise ScalingsShapeError(
                f"site {site.name}: weights for {len(weights_BN)} rows, found a batch of {leading[0]}; expected the "
                "same rows, or each of them as often as the others"
            )
        repeated = weights_BN.repeat_interleave(leading[0] // len(weights_BN), dim=0)
        return repeated if len(leading) == 1 else repeated[:, None].expand(*leading, -1)

    @abstractmethod
    def weights(self, experts: Sequence[str]) -> Tensor:
        """[B, N]."""


@final
class PerRow(_ByRow):
    """Weights [B, N], one line for each row of the batch: a decision per sequence, made beforehand.

    Nothing is kept from token to token, so any cache and any way of decoding goes with it.

    Raises:
        ScalingsShapeError: at once, if the weights are no such table; at the first forward, if the batch is not made
            of these rows.
    """

    def __init__(self, weights_BN: Tensor) -> None:
        if weights_BN.ndim != 2 or not len(weights_BN):
            raise ScalingsShapeError(f"expected weights [B, N], found shape {tuple(weights_BN.shape)}")
        self.weights_BN = weights_BN

    def weights(self, experts: Sequence[str]) -> Tensor:
        return self.weights_BN


@final
class Oracle(_ByRow):
    """The right expert of each row with weight 1, by name.

    Raises:
        UnknownExpertError: at the first forward, for a name the model does not have.
        ScalingsShapeError: as `PerRow`.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        if isinstance(experts, str) or not experts:
            raise ScalingsShapeError(f"expected the name of an expert for each row, found {experts!r}")
        self.experts = tuple(experts)

    def weights(self, experts: Sequence[str]) -> Tensor:
        check_known(self.experts, experts)
        chosen_B = torch.tensor([list(experts).index(name) for name in self.experts])
        return torch.nn.functional.one_hot(chosen_B, len(experts)).float()


def check_known(wanted: Sequence[str] | Mapping[str, float], experts: Sequence[str]) -> None:
    """Raises UnknownExpertError for names that are not among the experts."""
    unknown = [name for name in wanted if name not in experts]
    if unknown:
        raise UnknownExpertError(f"no expert named {names(map(repr, unknown))}; the model has {names(experts)}")

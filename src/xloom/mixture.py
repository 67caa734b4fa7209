"""All sites of one base model: put into it, taken out again, and the router that they ask.

Knows nothing of what a site computes, of where scalings come from, of caches, or of files.
Letters: M tokens, flattened  S sites  N experts
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xloom.errors import NoMatchingSiteError, ScalingsShapeError, names
from xloom.experts import Expert, LowRank
from xloom.fused import RankWeights, spread_over_ranks
from xloom.modules import check_fit
from xloom.site import Router, Site

_FEW_TOKENS = 64  # with more of them, weights of all ranks at all sites would take more memory than time is saved


class Mixture:
    """All sites of one base model, and the router that they ask.

    Args:
        base: any model; its modules are replaced in place by sites until `remove`.
        experts: by name, in the order of the N axis, with module paths as in the base.
        trainable: the experts' factors become parameters.
        dtype: of the factors; by default that of the base.

    Raises:
        BaseMismatchError, ConvolutionError, NoMatchingSiteError: an expert does not fit the base.
        ConfigError: a DoRA expert is to be trained.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: Mapping[str, Expert],
        *,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base = base
        self.expert_names = tuple(experts)
        self.global_weight = 1.0
        self.router: Router | None = None
        self._record: dict[int, Tensor] | None = None
        self.sites: list[Site] = []
        self.dtype = dtype or _float_dtype(base)
        self._install(experts, trainable)

    def _install(self, experts: Mapping[str, Expert], trainable: bool) -> None:
        adapted = {name for expert in experts.values() for name in expert.modules}
        # The order in which the base registers its modules, not that of execution: it numbers the scalings' S axis.
        homes = [(name, module) for name, module in self.base.named_modules() if name in adapted]
        for name, module in homes:
            for label, expert in experts.items():
                if name in expert.modules:
                    check_fit(module, name, expert.modules[name], f"expert {label!r} ({expert.source})")
        if not homes:
            raise NoMatchingSiteError(f"no module of the base is adapted by any of the experts {names(experts)}")
        made = []  # all of them before any is put in: a refusal leaves the base as it was
        for index, (name, module) in enumerate(homes):
            here = [expert.modules.get(name) for expert in experts.values()]
            made.append(Site(module, name, index, here, self, dtype=self.dtype, trainable=trainable))
        self.put_back(made)

    def remove(self) -> None:
        """Puts the base's own modules back, the very objects that were there."""
        for site in self.sites:
            self._put(site.name, site.base)
        self.sites = []

    def put_back(self, sites: Sequence[Site]) -> None:
        """Puts sites in: those just made, or those that `remove` took out."""
        self.sites = list(sites)
        for site in self.sites:
            self._put(site.name, site)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.base.get_submodule(parent), child, module)

    # --- while a forward runs ---

    def scalings(self, site: Site, x: Tensor) -> Tensor | None:
        if self.router is None:
            return None
        scalings = self.router.scalings(site, x)
        if scalings is None:
            return None
        if scalings.shape[-1] != len(self.expert_names):
            raise ScalingsShapeError(
                f"site {site.name}: {scalings.shape[-1]} scalings per token for {len(self.expert_names)} experts"
            )
        if self._record is not None:
            self._record[site.index] = scalings.detach()
        return scalings if self.global_weight == 1.0 else scalings * self.global_weight

    def rank_weights(self) -> RankWeights | None:
        """Of all sites, where the router can say them at once and nobody asks what it answered each."""
        return None if self.router is None or self._record is not None else self.router.rank_weights(self)

    def spread_over_ranks(self, scalings_BTSN: Tensor, most: int | None) -> RankWeights | None:
        """That of `fused` for few tokens and experts of the same ranks and scales everywhere; else nothing."""
        first = self.sites[0]
        if (
            scalings_BTSN.device != first.spread_NR.device
            or scalings_BTSN.shape[:2].numel() > _FEW_TOKENS
            or scalings_BTSN.shape[2:] != (len(self.sites), len(self.expert_names))
            or torch.is_autocast_enabled(scalings_BTSN.device.type)
            or any(site.ranks != first.ranks or site.scales != first.scales for site in self.sites)
        ):
            return None
        scalings_BTSN = scalings_BTSN if self.global_weight == 1.0 else scalings_BTSN * self.global_weight
        return spread_over_ranks(scalings_BTSN, first.spread_NR, first.ranks, most)

    @contextmanager
    def routed_by(self, router: Router | None) -> Iterator[None]:
        """The sites ask `router` inside the block, and afterwards whom they asked before."""
        before = self.router
        self.router = router
        try:
            yield
        finally:
            self.router = before

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Collects by site index what the router answers inside the block, detached."""
        before = self._record
        record: dict[int, Tensor] = {}
        self._record = record
        try:
            yield record
        finally:
            self._record = before

    def experts_of_sites(self) -> list[dict[str, LowRank]]:
        """For every expert, its factors by site name."""
        out: list[dict[str, LowRank]] = [{} for _ in self.expert_names]
        for site in self.sites:
            for n, low in enumerate(site.experts()):
                if low is not None:
                    out[n][site.name] = low
        return out


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

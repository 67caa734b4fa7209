"""All sites of one base model: put into it, and taken out again; and which call runs through them.

Knows nothing of what a site computes, of where scalings come from, of caches, or of files.
Letters: M tokens, flattened  S sites  N experts
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xloom.call import Current
from xloom.errors import NoMatchingSiteError, names
from xloom.experts import Expert, LowRank
from xloom.fused import RankWeights, spread_over_ranks
from xloom.modules import check_fit
from xloom.site import Site

_FEW_TOKENS = 64  # with more of them, weights of all ranks at all sites would take more memory than time is saved


class Mixture:
    """All sites of one base model, and which call runs through them.

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
        self.current = Current()
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
            made.append(Site(module, name, index, here, self.current, dtype=self.dtype, trainable=trainable))
        self.sites = made
        for site in made:
            self._put(site.name, site)

    def remove(self) -> None:
        """Puts the base's own modules back, the very objects that were there."""
        for site in self.sites:
            self._put(site.name, site.base)
        self.sites = []

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.base.get_submodule(parent), child, module)

    def spread_over_ranks(self, scalings_BTSN: Tensor, most: int | None) -> RankWeights | None:
        """What `fused` makes of scalings of few tokens, of experts with the same ranks and scales everywhere; or None.

        Args:
            scalings_BTSN: times the global weight.
            most: see `fused.spread_over_ranks`.
        """
        first = self.sites[0]
        if (
            scalings_BTSN.device != first.spread_NR.device
            or scalings_BTSN.shape[:2].numel() > _FEW_TOKENS
            or scalings_BTSN.shape[2:] != (len(self.sites), len(self.expert_names))
            or torch.is_autocast_enabled(scalings_BTSN.device.type)
            or any(site.ranks != first.ranks or site.scales != first.scales for site in self.sites)
        ):
            return None
        return spread_over_ranks(scalings_BTSN, first.spread_NR, first.ranks, most)

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

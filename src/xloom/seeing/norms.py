"""How much each expert does to what passes through a site, and not only how it is weighed there:

    relative_n = |s_n * scale_n * B_n A_n x| / |W x|        W x: all that the base module gives, its bias too

A large scaling of a small delta means little. Recorded by an observer that travels with the call.
Knows nothing of traces' files or statistics.
Letters: T tokens of a text  M tokens of a batch, row after row  S sites  N experts
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from xloom.cache import new_cache
from xloom.call import SiteView
from xloom.model import XLoraForCausalLM
from xloom.routers import Routed

READ_AT_ONCE = 256  # tokens of a forward


class Contributions(NamedTuple):
    """Norms of what experts add, relative to the norm of what the base module gives; float32, on the CPU.

    Attributes:
        relative_TSN: of each expert alone; 0 where it has no factors or no weight. NaN for the first token.
        total_TS: of all together: less than their sum where they cancel.
    """

    relative_TSN: Tensor
    total_TS: Tensor


@torch.no_grad()
def contributions(
    model: XLoraForCausalLM, token_ids: Sequence[int] | Tensor, *, routing: Routed | None = None
) -> Contributions:
    """Of a text, token by token.

    As in a trace, a token stands with what it was written with: that of the place before it.
    `contributions(model, trace.tokens.ids)` goes with `trace.scalings`.

    Args:
        token_ids: [T], at least one.
        routing: who decides; None: as in the `with model.routing(...)` around, or the head.
    """
    ids_1T = torch.as_tensor(token_ids, device=model.device)[None]
    cache = new_cache(model.config)
    nothing = torch.full((1, len(model.sites), len(model.experts)), torch.nan)
    relative, total = [nothing], [nothing[..., 0]]
    for start in range(0, ids_1T.shape[1] - 1, READ_AT_ONCE):
        stop = min(start + READ_AT_ONCE, ids_1T.shape[1] - 1)
        with recording_contributions(model) as record:
            model(ids_1T[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1, routing=routing)
        relative.append(record.relative_MSN)
        total.append(record.total_MS)
    return Contributions(torch.cat(relative), torch.cat(total))


class Record:
    """What the last forward in a block did: at places, as the model's own output, and not at tokens written."""

    def __init__(self, sites: int) -> None:
        self._by_site: list[tuple[Tensor, Tensor] | None] = [None] * sites

    def put(self, site: SiteView, relative_MN: Tensor, total_M: Tensor) -> None:
        self._by_site[site.index] = (relative_MN.float().cpu(), total_M.float().cpu())

    @property
    def relative_MSN(self) -> Tensor:
        """Of each expert alone."""
        return self._stacked(0)

    @property
    def total_MS(self) -> Tensor:
        """Of all together."""
        return self._stacked(1)

    def _stacked(self, which: int) -> Tensor:
        """Sites that were not asked have 0. Raises RuntimeError if no forward has run."""
        like = next((found[which] for found in self._by_site if found is not None), None)
        if like is None:
            raise RuntimeError("no forward has run in the block")
        return torch.stack([torch.zeros_like(like) if one is None else one[which] for one in self._by_site], dim=1)


@contextmanager
def recording_contributions(model: XLoraForCausalLM) -> Iterator[Record]:
    """Records what every site adds, in the last forward of the block: `relative_MSN` and `total_MS`.

    Calls each site's parts N + 2 times more; the forward's own result is as without.
    """
    record = Record(len(model.sites))

    def observe(site: SiteView, x: Tensor, y: Tensor, scalings: Tensor | None) -> None:
        record.put(site, *_norms(site, x, y, scalings))

    with model.observing_sites(observe):
        yield record


@torch.no_grad()
def _norms(site: SiteView, x: Tensor, y: Tensor, scalings: Tensor | None) -> tuple[Tensor, Tensor]:
    """Relative norms of what each expert adds [M, N], and all together [M]."""
    base_M: Tensor = y.flatten(0, -2).norm(dim=-1).clamp(min=torch.finfo(y.dtype).tiny)
    if scalings is None:
        return base_M.new_zeros(len(base_M), site.num_experts), base_M.new_zeros(len(base_M))

    def relative(scalings: Tensor) -> Tensor:
        norm_M: Tensor = site.delta(x, scalings, y).flatten(0, -2).norm(dim=-1)
        return norm_M / base_M

    alone = torch.eye(site.num_experts, dtype=scalings.dtype, device=scalings.device)
    parts = [relative(scalings * one) if rank else torch.zeros_like(base_M) for one, rank in zip(alone, site.ranks)]
    return torch.stack(parts, dim=-1), relative(scalings)

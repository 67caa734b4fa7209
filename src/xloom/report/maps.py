"""A trace's shares in one byte each, as small as a page needs them.

    map_TKC    shares of token t in band k: the mean over all sites, then over those of every layer; right to 1/510

Knows nothing of pages. Letters: T tokens  S sites  K bands  C columns: the experts, then the base
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xloom.seeing import by_layer, mean_by_group, shares
from xloom.trace import About, Trace

STEPS = 255
PRECISION = 0.5 / STEPS
ALL_SITES = "all"


def bands(sites: Sequence[str]) -> tuple[str, ...]:
    """What the bands of a map are called: all sites, the layers, and sites outside of them by kind."""
    return (ALL_SITES, *by_layer(sites).labels)


def share_map(trace: Trace) -> Tensor:
    """[T, K, C] shares in float32; NaN for a token that was not predicted."""
    groups = by_layer(trace.sites)
    parts = [torch.zeros(0, len(groups.labels) + 1, len(trace.experts) + 1)]
    for block in trace.blocks(256):
        share_STC = shares(block.scalings).transpose(0, 1)
        layers_KTC = mean_by_group(share_STC, groups.of_S, len(groups.labels))
        parts.append(torch.cat([share_STC.mean(dim=0)[None], layers_KTC]).transpose(0, 1).float())
    return torch.cat(parts)


def as_bytes(map_TKC: Tensor) -> Tensor:
    """The same in uint8, 255 for a share of 1; 0 where there is none."""
    return (map_TKC.nan_to_num(0.0) * STEPS).round().to(torch.uint8)


def slim(map_TKC: Tensor, trace: Trace) -> Trace:
    """The trace with one site that stands for all: its mean shares, which are all that `difference` looks at."""
    about = About((ALL_SITES,), trace.experts, metadata=trace.metadata)
    return Trace(trace.tokens, map_TKC[:, :1, :-1], about)

"""Attention of a few queries that share key-value heads, under a mask of their own.

transformers repeats keys and values for every query head as soon as there is a mask, which for a few new tokens costs
more than attending. Here the queries of a group become rows of their key-value head instead.
Letters: B batch  H heads  G query heads for each key-value head  Q tokens  K tokens attended to  D head size
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

GROUPED = "xloom_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, Q, H, D] of query [B, H, Q, D] and key [B, H/G, K, D], as transformers' `sdpa_attention_forward`."""
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * queries, size)
    # all layers are given the same mask: it remembers what was made of it
    made: dict[int, Tensor] = attention_mask.__dict__.setdefault("for_groups", {})
    mask = made.get(groups)
    if mask is None:
        mask = made[groups] = attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)

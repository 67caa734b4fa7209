"""What scalings say, as pure functions of tensors. All but `weight` are of shares: see `xloom.trace.shares`.

Knows nothing of traces or names. Letters: T tokens  S sites  N experts  C columns: the experts, then the base  G groups
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xloom.trace.shares import ROUNDING, leaders, shares
from xloom.training.objective import entropy

__all__ = [
    "ROUNDING", "Means", "co_use", "dominance", "effective_number", "entropy", "leaders", "lift", "mean_by_group",
    "means", "shares", "together",
]  # fmt: skip


def dominance(shares: Tensor) -> Tensor:
    """The part [C] of all tokens and sites of shares [..., C] that each column leads."""
    count = shares.shape[-1]
    led = torch.bincount(leaders(shares).flatten(), minlength=count).double()
    return led / led.sum()


def effective_number(shares: Tensor) -> Tensor:
    """exp of the entropy [...] (in nats): how many columns of equal share would be as mixed, between 1 and C."""
    return entropy(shares).exp()


def co_use(shares: Tensor) -> Tensor:
    """How experts act together [C, C], of shares [..., C]: the mean of share_i * share_j.

    It is the probability that two draws from the mixture of one token and site are i and j, so it sums to 1. Experts
    that are never mixed have 0 beside the diagonal. Of shares that are means over sites, [T, C], it tells which experts
    act on the same token, be it at different sites.
    """
    flat = shares.reshape(-1, shares.shape[-1])
    return flat.T @ flat / len(flat)


def lift(co_use_CC: Tensor) -> Tensor:
    """Co-use relative to what it would be by chance [C, C]: 1 for independent, more for together; NaN if not used."""
    share_C = co_use_CC.sum(dim=1)
    expected = share_C[:, None] * share_C
    return torch.where(expected > 0, co_use_CC / expected, torch.nan)


def mean_by_group(values_S: Tensor, of_S: Tensor, groups: int) -> Tensor:
    """Means [G, ...] over the sites of each group, of values [S, ...]; NaN for a group without sites."""
    total = values_S.new_zeros(groups, *values_S.shape[1:]).index_add_(0, of_S, values_S)
    return total / torch.bincount(of_S, minlength=groups).view(-1, *[1] * (values_S.ndim - 1))


class Means(NamedTuple):
    """Means over tokens, of everything that is a mean over tokens.

    Attributes:
        tokens: how many.
        weight_SN: the scalings themselves.
        share_SC: shares.
        led_SC: part of the tokens that each column leads.
        entropy_S: of the shares at one token and site, in nats.
        effective_S: their effective number.
        co_use_CC: within a token and site.
        co_use_tokens_CC: within a token, over all its sites.
    """

    tokens: int
    weight_SN: Tensor
    share_SC: Tensor
    led_SC: Tensor
    entropy_S: Tensor
    effective_S: Tensor
    co_use_CC: Tensor
    co_use_tokens_CC: Tensor


def means(scalings_TSN: Tensor) -> Means:
    """Of scalings without NaN; all 0 for no tokens."""
    T, _, N = scalings_TSN.shape
    shares_TSC = shares(scalings_TSN)
    led_TSC = torch.nn.functional.one_hot(leaders(shares_TSC), N + 1).double()
    entropy_TS = entropy(shares_TSC) + 0.0  # no negative zeros
    found = (scalings_TSN.double(), shares_TSC, led_TSC, entropy_TS, entropy_TS.exp())
    whole = (co_use(shares_TSC), co_use(shares_TSC.mean(dim=1)))
    return Means(T, *(one.sum(dim=0) / max(T, 1) for one in found), *(one.nan_to_num(0.0) for one in whole))


def together(parts: Sequence[Means]) -> Means:
    """The means over all tokens of several parts, at least one."""
    tokens = sum(part.tokens for part in parts)
    columns = zip(*(part[1:] for part in parts), strict=True)
    sums = [sum(part.tokens * one for part, one in zip(parts, column, strict=True)) for column in columns]
    return Means(tokens, *(one / max(tokens, 1) for one in sums))

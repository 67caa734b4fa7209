"""Shares: what scalings say once they sum to 1.

Scalings need not: a null expert, top-k or a head without softmax leave less or more, and a head without softmax may
give negative weights. So everything that is shown or counted is of shares:

    share_n = |s_n| / max(1, sum |s|)       what is missing to 1 is the base's share, the last column

A null expert's weight, and what top-k has cut off, is the base's; a sum above 1 counts as 1; and an expert with a
negative weight acts as strongly as with a positive one. Scalings of a plain softmax are their own shares.

Knows nothing of traces. Letters: N experts  C columns: the experts, then the base  L rows  K bands
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BASE = "base"  # the last column
ROUNDING = 2.0**-10  # what float16 may take from a sum of 1

BLOCKS = "·▁▂▃▄▅▆▇█"
DIGITS = ".123456789"  # where there are no blocks


def shares(scalings: Tensor) -> Tensor:
    """Shares [..., C] of scalings [..., N], in float64: of every expert, then of the base. They sum to 1.

    What float16 may have rounded away is not the base's.
    """
    weights = scalings.double().abs()
    total = weights.sum(dim=-1, keepdim=True)
    left = 1 - total
    left = torch.where(left < ROUNDING, 0.0, left)
    whole = torch.cat([weights, left], dim=-1)
    return whole / whole.sum(dim=-1, keepdim=True)


def leaders(shares: Tensor) -> Tensor:
    """The column with the largest share [...] of shares [..., C]; of equal ones the first, so the base comes last."""
    return shares.argmax(dim=-1)


# --- as characters ---


def bands(values_LC: Tensor, most: int) -> Tensor:
    """At most so many rows [K, C]: means of as many neighbours each, but for the last. As it is where that fits."""
    size = math.ceil(len(values_LC) / max(most, 1))
    if size <= 1:
        return values_LC
    return torch.stack([values_LC[at : at + size].mean(dim=0) for at in range(0, len(values_LC), size)])


def bars(values: Sequence[float], highest: float, marks: str = BLOCKS) -> str:
    """One mark for each value, from the first mark for 0 to the last for `highest`; the first for NaN."""
    last = len(marks) - 1
    parts = [0.0 if math.isnan(value) else value / highest if highest > 0 else 0.0 for value in values]
    return "".join(marks[min(last, max(0, round(last * part)))] for part in parts)

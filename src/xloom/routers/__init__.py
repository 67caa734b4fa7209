"""Routers: who gives every site its scalings.

`XLora` is the paper's: a head reads the hidden states of the scaling pass. The others need no head and no second pass.
Use one for a while with `with model.routing(router): ...`.

    given      weights known beforehand: BaseOnly, Uniform, Fixed, Single, PerRow, Oracle, Precomputed
    head       XLora
    factors    from the experts' own factors, training-free: Arrow, SpectR (and SEQR)
    centroid   from a few prompts of each expert: Centroid, whose decision is a PerRow
    words      routers by word: `read_router`
"""

from xloom.routers.centroid import Centroid
from xloom.routers.factors import Arrow, NormStatistics, SpectR, arrow, norms_reference
from xloom.routers.given import BaseOnly, Fixed, Oracle, PerRow, Precomputed, Single, Uniform, check_known
from xloom.routers.head import HiddenStateRouter, XLora
from xloom.site import Router

__all__ = [
    "Arrow", "BaseOnly", "Centroid", "Fixed", "HiddenStateRouter", "NormStatistics", "Oracle", "PerRow", "Precomputed",
    "Router", "Single", "SpectR", "Uniform", "XLora", "arrow", "check_known", "norms_reference",
]  # fmt: skip

"""Routers: who decides what every expert weighs, for each row of a batch.

`XLora` is the paper's: a head reads the hidden states of the scaling pass. The others need no head and no second pass.
They travel with a call: `model.generate(ids, routing=router)`, or a list with a router for each row.

    routing    `Routing`, what the model makes of them: a value with a line for each row
    given      weights known beforehand: BaseOnly, Uniform, Fixed, Single, PerRow, Oracle, Precomputed
    head       XLora
    factors    from the experts' own factors, at every site, training-free: Arrow, SpectR (and SEQR)
    centroid   from a few prompts of each expert: Centroid, whose decision is a PerRow
    words      routers by word: `read_router`
"""

from xloom.routers.centroid import Centroid
from xloom.routers.factors import Arrow, NormStatistics, SpectR, arrow, norms_reference
from xloom.routers.given import BaseOnly, Fixed, Oracle, PerRow, Precomputed, Single, Uniform
from xloom.routers.head import XLora
from xloom.routers.routing import Routed, Router, Routing, SiteRouter, as_routing, check_known

__all__ = [
    "Arrow", "BaseOnly", "Centroid", "Fixed", "NormStatistics", "Oracle", "PerRow", "Precomputed", "Routed", "Router",
    "Routing", "Single", "SiteRouter", "SpectR", "Uniform", "XLora", "arrow", "as_routing", "check_known",
    "norms_reference",
]  # fmt: skip

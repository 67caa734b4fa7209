"""Routers that read the experts' own factors, per token and site, and need no training.

    Arrow    |v_n x|             v_n: the direction that B_n A_n amplifies most            arXiv 2405.11157
    SpectR   scale_n |B_n A_n x|                                                          arXiv 2504.03454
    SEQR     the same norm by QR, standardised per expert and site, the largest wins      arXiv 2509.18093

Knows nothing of heads, caches or files.
Letters: I in-features  O out-features  S sites  N experts  R rank (of one expert; of all in A_RI and B_OR of a site)
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from xloom.call import SiteView
from xloom.errors import ConfigError, ScalingsShapeError, names
from xloom.experts import LowRank
from xloom.gating import top_k_mask
from xloom.routers.routing import Fitted, Routing, SiteRouter, check_known

Made = TypeVar("Made")
TokenIds = Tensor | Sequence[int]  # of one text: [T]


class _PerSite(Generic[Made]):
    """What is made of a site's factors once, and again when they have changed or moved."""

    def __init__(self, make: Callable[[SiteView], Made]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[SiteView, tuple[Any, Made]] = WeakKeyDictionary()

    def __call__(self, site: SiteView) -> Made:
        state = [(t.data_ptr(), t._version, t.device, t.dtype) for t in (site.A_RI, site.B_OR)]
        kept = self._kept.get(site)
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = self._kept[site] = (state, self._make(site))
        return kept[1]


class _ByScore(SiteRouter):
    """softmax(scores / temperature) over the experts that adapt the site, the others 0.

    Args:
        temperature: divides the scores; above 0.
        top_k: experts kept per token and site before the softmax; all, if None.

    Raises:
        ConfigError: one of the two is out of range.
    """

    def __init__(self, *, temperature: float = 1.0, top_k: int | None = None) -> None:
        check_softmax(temperature, top_k)
        self.temperature, self.top_k = temperature, top_k
        self._there = _PerSite(lambda site: torch.tensor([r > 0 for r in site.ranks], device=site.A_RI.device))

    @final
    def scalings(self, site: SiteView, x: Tensor) -> Tensor | None:
        there_N = self._there(site)
        scores = self.scores(site, x)
        if scores is None:
            return (there_N / there_N.sum()).to(site.A_RI.dtype).expand(*x.shape, -1)
        experts = sum(rank > 0 for rank in site.ranks)
        top_k = None if self.top_k is None else min(self.top_k, experts)
        return softmax_of_top(scores.masked_fill(~there_N, -torch.inf), self.temperature, top_k)

    @abstractmethod
    def scores(self, site: SiteView, x: Tensor) -> Tensor | None:
        """How well each expert goes with `x` (see `Router.scalings`): [*leading, N], or None for "all alike"."""


def check_softmax(temperature: float, top_k: int | None) -> None:
    """Raises ConfigError unless temperature > 0 and top_k >= 1 (or None)."""
    if not temperature > 0:
        raise ConfigError(f"temperature: expected a number above 0, found {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: expected at least 1 or None, found {top_k}")


def softmax_of_top(scores: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """softmax(scores / temperature) over the last axis, of its `top_k` largest alone; the others 0."""
    scores = scores / temperature
    if top_k is not None:
        scores = scores.masked_fill(~top_k_mask(scores, min(top_k, scores.shape[-1])), -torch.inf)
    return torch.softmax(scores, dim=-1)


@final
class Arrow(_ByScore):
    """By likeness: the score is |v_n x|, v_n [I] the right singular vector of B_n A_n with the largest singular value.

    As PEFT's `create_arrow_model` (arXiv 2405.11157), for experts of any rank; those that lack a site get 0 there. At
    an embedding, whose input are token ids, the experts share alike.
    """

    def __init__(self, *, temperature: float = 1.0, top_k: int | None = None) -> None:
        super().__init__(temperature=temperature, top_k=top_k)
        self._prototypes = _PerSite(_prototypes)

    def scores(self, site: SiteView, x: Tensor) -> Tensor | None:
        if site.is_embedding:
            return None
        prototypes_NI = self._prototypes(site)
        return (x.to(prototypes_NI.dtype) @ prototypes_NI.T).abs()


def _prototypes(site: SiteView) -> Tensor:
    rows = [site.A_RI.new_zeros(site.A_RI.shape[1]) if low is None else arrow(low) for low in site.experts()]
    return torch.stack([row.to(site.A_RI) for row in rows])


def arrow(low: LowRank) -> Tensor:
    """The right singular vector [I] of B A with the largest singular value; its sign is arbitrary."""
    with torch.no_grad():
        A_RI, B_OR = (t.detach().double() for t in (low.A_RI, low.B_OR))
        Q_IR, R_RR = torch.linalg.qr(A_RI.T)
        M_OR = B_OR @ R_RR.T
        top_R: Tensor = torch.linalg.eigh(M_OR.T @ M_OR).eigenvectors[:, -1]
        direction_I: Tensor = Q_IR @ top_R
        return direction_I


# --- norms ---


def norms_reference(site: SiteView, x: Tensor) -> Tensor:
    """scale_n |B_n A_n x| for every expert [*leading, N], as it is written; 0 for those that lack the site."""
    leading = x.shape if site.is_embedding else x.shape[:-1]
    out = torch.zeros(*leading, site.num_experts, dtype=site.A_RI.dtype, device=site.A_RI.device)
    for n, low in enumerate(site.experts()):
        if low is not None:
            down = F.embedding(x, low.A_RI.T) if site.is_embedding else F.linear(x.to(low.A_RI.dtype), low.A_RI)
            out[..., n] = abs(low.scale) * torch.linalg.vector_norm(F.linear(down, low.B_OR), dim=-1)
    return out


@final
class ExpertNorms:
    """`norms_reference` by B_n = Q_n R_n: |B_n A_n x| = |R_n (A_n x)|, with R_n as small as the rank, in float32."""

    def __init__(self) -> None:
        self._triangles = _PerSite(_triangles)

    def __call__(self, site: SiteView, x: Tensor) -> Tensor:
        index_NR, scaled_NRR = self._triangles(site)
        A_RI = site.A_RI
        down = F.embedding(x, A_RI.T) if site.is_embedding else F.linear(x.to(A_RI.dtype), A_RI)
        each_NR = down.to(scaled_NRR.dtype)[..., index_NR]
        norms: Tensor = torch.linalg.vector_norm(torch.einsum("...nr,nqr->...nq", each_NR, scaled_NRR), dim=-1)
        return norms


def _triangles(site: SiteView) -> tuple[Tensor, Tensor]:
    """Where each expert's ranks are among the site's [N, R], and scale_n R_n [N, R, R], zero beyond its own rank."""
    largest = max(site.ranks)
    dtype = torch.promote_types(site.A_RI.dtype, torch.float32)
    index_NR = torch.zeros(site.num_experts, largest, dtype=torch.long)
    scaled_NRR = torch.zeros(site.num_experts, largest, largest, dtype=dtype)
    start = 0
    for n, low in enumerate(site.experts()):
        if low is not None:
            triangle = torch.linalg.qr(low.B_OR.detach().double(), mode="r").R
            scaled_NRR[n, : triangle.shape[0], : low.rank] = low.scale * triangle
            index_NR[n, : low.rank] = torch.arange(start, start + low.rank)
            start += low.rank
    return index_NR.to(site.A_RI.device), scaled_NRR.to(site.A_RI.device)


@dataclass(frozen=True)
class NormStatistics:
    """Mean and standard deviation [S, N] of the experts' norms over sample tokens."""

    mean_SN: Tensor
    std_SN: Tensor

    @classmethod
    def of(cls, model: Fitted, texts: Mapping[str, Iterable[TokenIds]] | Iterable[TokenIds]) -> Self:
        """Measures in the base alone, one text at a time.

        Args:
            model: in evaluation mode.
            texts: token ids [T] of sample texts: the same for every expert, or by name those that each one is measured
                on (so that nobody's texts need leave their owner).

        Raises:
            UnknownExpertError: a name that the model does not have.
            ConfigError: fewer than two tokens for an expert.
        """
        meter = _NormMeter(len(model.sites), len(model.experts), model.device)
        if isinstance(texts, Mapping):
            check_known(list(texts), model.experts)
            groups = [([float(n == name) for n in model.experts], some) for name, some in texts.items()]
        else:
            groups = [([1.0] * len(model.experts), texts)]
        with torch.no_grad():
            for weights, some in groups:
                meter.whose_N = torch.tensor(weights, dtype=torch.float64, device=model.device)
                for ids in some:
                    model(torch.as_tensor(ids, device=model.device).view(1, -1), use_cache=False, routing=meter)
        return cls(*meter.statistics(model.experts))


@final
class _NormMeter(SiteRouter):
    """Adds nothing; counts what the norms are. `whose_N` is 1 for the experts that the texts belong to."""

    def __init__(self, sites: int, experts: int, device: torch.device) -> None:
        self.whose_N = torch.ones(experts, dtype=torch.float64, device=device)
        self.sums_3SN = torch.zeros(3, sites, experts, dtype=torch.float64, device=device)  # of 1, norm, norm^2
        self._norms = ExpertNorms()

    def scalings(self, site: SiteView, x: Tensor) -> Tensor | None:
        norms = self._norms(site, x).flatten(0, -2).double()
        powers = torch.stack([(norms**power).sum(dim=0) for power in range(3)])
        self.sums_3SN[:, site.index] += (powers * self.whose_N).to(self.sums_3SN.device)
        return None

    def statistics(self, experts: Sequence[str]) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums_3SN
        if few := [name for name, seen in zip(experts, count.amax(dim=0).tolist(), strict=True) if seen < 2]:
            raise ConfigError(f"texts: expected at least two tokens for every expert, found fewer for {names(few)}")
        count = count.clamp(min=1)  # a site that no token reached
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        std = variance.sqrt()
        # An expert that lacks the site, or does the same to every token, has nothing to be standardised by.
        return mean, std.where(std > 1e-9 * mean, torch.ones_like(std))


@final
class SpectR(_ByScore):
    """By how much each expert would add: the score is scale_n |B_n A_n x|, over the whole spectrum of B_n A_n.

    SpectR (arXiv 2504.03454) takes an SVD, B A = U S V^T, and scores by |S V^T x|, which is the same norm. Here it is
    |R (A x)| with B = Q R, SEQR's form (arXiv 2509.18093): exact, and what is kept beside the experts is as small as
    their ranks. `top_k=1` is SEQR's choice, with weight 1. The scale, alpha/r, counts: how an adapter shares its size
    between alpha and B is arbitrary. A LoRA bias or DoRA's magnitude does not count.

    Args:
        statistics: standardises each expert's norms at each site before the softmax (SEQR's offline calibration, as
            z-scores), so that a large adapter does not win everywhere.
        Others: see `Arrow`.
    """

    def __init__(
        self, *, temperature: float = 1.0, top_k: int | None = None, statistics: NormStatistics | None = None
    ) -> None:
        super().__init__(temperature=temperature, top_k=top_k)
        self.statistics = statistics
        self._norms = ExpertNorms()

    @classmethod
    def calibrated(
        cls,
        model: Fitted,
        texts: Mapping[str, Iterable[TokenIds]] | Iterable[TokenIds],
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Self:
        """With statistics measured on sample texts; arguments and errors as `NormStatistics.of`."""
        return cls(temperature=temperature, top_k=top_k, statistics=NormStatistics.of(model, texts))

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        if self.statistics is not None:
            expected, found = (len(sites), len(experts)), tuple(self.statistics.mean_SN.shape)
            if found != expected:
                raise ScalingsShapeError(f"statistics of {found} sites and experts, the model has {expected}")
        return super().routing(experts, sites)

    def scores(self, site: SiteView, x: Tensor) -> Tensor | None:
        norms = self._norms(site, x)
        if self.statistics is None:
            return norms
        mean_N, std_N = (t[site.index].to(norms) for t in (self.statistics.mean_SN, self.statistics.std_SN))
        return (norms - mean_N) / std_N

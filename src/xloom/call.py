"""`Call`: what one pass through the base needs beside its inputs, read by the sites and gate layers it goes through.

A pass is one thread's from its beginning to its end, so the call that runs is a matter of the thread: passes of several
threads through one model know nothing of each other, and nothing of a model changes while one of them runs.

    with mixture.current.running(Call().with_scalings(scalings_BTSN)): base(input_ids)

Knows nothing of where scalings come from, of caches, or of files.
Letters: B batch  T tokens  D hidden size  S sites  N experts
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from xloom.errors import ScalingsShapeError
from xloom.experts import LowRank
from xloom.fused import RankWeights


class SiteView(Protocol):
    """What others may know of a site: the experts' factors at one module of the base.

    Attributes:
        name: module path in the base.
        index: position on the scalings' S axis.
        is_embedding: whether token ids enter it.
        ranks: of the experts; 0 for those that lack the site.
        A_RI, B_OR: the experts' factors, side by side.
    """

    name: str
    index: int
    is_embedding: bool
    ranks: list[int]
    A_RI: Tensor
    B_OR: Tensor

    @property
    def num_experts(self) -> int: ...

    def experts(self) -> list[LowRank | None]:
        """Each expert's own factors (views), or None where it lacks the site."""

    def delta(self, x: Tensor, scalings: Tensor, y: Tensor) -> Tensor:
        """What all experts together add to the base's output `y` for input `x`."""


# of a site: what enters it, what its base module makes of that, and its scalings
Observer = Callable[[SiteView, Tensor, Tensor, Tensor | None], None]


class Asked(NamedTuple):
    """Whom the sites ask for scalings that are not known beforehand: of these rows, or of all."""

    scalings: Callable[[SiteView, Tensor], Tensor | None]
    rows: list[int] | None


class Call:
    """One pass through the base.

    Attributes:
        weights: the scalings of all sites, spread over their ranks, where that could be done at once.
        asked: routers that each site asks while the pass runs, with their rows; all other rows use the scalings given
            beforehand.
        answers: what was answered, by site index, before the global weight; detached.
        observer: is told of every site that the pass goes through.
        at_gate: is told of the hidden state [B, T, D] that enters the gate layer; what it gives back goes on instead.
        first, stop: the decoder layers that run; the others hand on what they get. Gated models only.
        in_tuples: whether they hand it on in a tuple, as the layers of this architecture do.
        layer_outputs: where it is a list, gate layers add what kind of thing their layer gave.
    """

    def __init__(
        self,
        *,
        observer: Observer | None = None,
        at_gate: Callable[[Tensor], Tensor | None] | None = None,
        first: int = 0,
        stop: int | None = None,
        in_tuples: bool = False,
        layer_outputs: list[type] | None = None,
    ) -> None:
        self.observer, self.at_gate = observer, at_gate
        self.first, self.stop, self.in_tuples, self.layer_outputs = first, stop, in_tuples, layer_outputs
        self.weights: RankWeights | None = None
        self.asked: Sequence[Asked] = ()
        self.answers: dict[int, Tensor] = {}
        self._by_site: Sequence[Tensor] | None = None
        self._global_B: Sequence[float] = ()

    def with_scalings(self, scalings_BTSN: Tensor, weights: RankWeights | None = None) -> Self:
        """Sets the scalings that sites use from now on, times the global weight; returns the call.

        Args:
            weights: the same, spread over ranks.
        """
        # one stack in the backward pass, not a zero-filled tensor per site
        self._by_site, self.weights = scalings_BTSN.unbind(2), weights
        return self

    def with_asked(self, scalings_BTSN: Tensor, asked: Sequence[Asked], global_B: Sequence[float] = ()) -> Self:
        """Sets whom sites ask from now on, and what the rows use that nobody is asked about; returns the call.

        Args:
            scalings_BTSN: before the global weight; of rows that are asked about they count for nothing.
            global_B: what all scalings of a row are multiplied by; one number for all rows; none for 1.
        """
        self._by_site, self._shape = scalings_BTSN.unbind(2), scalings_BTSN.shape
        self.asked, self._global_B = asked, global_B
        return self

    def scalings(self, site: SiteView, x: Tensor) -> Tensor | None:
        """Of one site [*leading, N], times the global weight; None for "add nothing".

        Args:
            x: what enters it: [*leading, I] with leading = B, T (or B*T where the base flattens its tokens); token ids
                [B, T] at an embedding.

        Raises:
            ScalingsShapeError: a router's answer has another number of experts, or rows have routers of their own and
                the base has rearranged its tokens.
        """
        if self._by_site is None:
            return None
        if not self.asked:
            return self._by_site[site.index]
        if self.asked[0].rows is None and len(self._global_B) < 2:
            return self._asked_alike(self.asked[0], site, x)
        return self._asked_by_row(self._by_site[site.index], site, x)

    def _asked_alike(self, one: Asked, site: SiteView, x: Tensor) -> Tensor | None:
        answer = one.scalings(site, x)
        if answer is None:
            return None
        self._check(site, answer)
        leading = x.shape if site.is_embedding else x.shape[:-1]
        if answer.shape[:-1].numel() != leading.numel():
            raise _misfit(site, answer, leading)
        self.answers[site.index] = answer.detach()
        return times(answer, self._global_B)

    def _asked_by_row(self, decided_BTN: Tensor, site: SiteView, x: Tensor) -> Tensor:
        tokens = self._shape[:2]
        leading = x.shape if site.is_embedding else x.shape[:-1]
        flat = leading == (tokens.numel(),)
        if not flat and leading != tokens:
            raise ScalingsShapeError(
                f"site {site.name}: expected {tuple(tokens)} tokens, whose rows have routers of their own, found "
                f"{tuple(leading)}"
            )
        x_BT = x.reshape(*tokens, *x.shape[1:]) if flat else x
        answer_BTN = decided_BTN.to(site.A_RI, copy=True)
        for one in self.asked:
            rows = slice(None) if one.rows is None else one.rows
            answer = one.scalings(site, x_BT[rows])
            if answer is not None:
                self._check(site, answer)
                given = torch.Size((tokens[0] if one.rows is None else len(one.rows), tokens[1]))
                if answer.shape[:-1] != given:
                    raise _misfit(site, answer, given)
                answer_BTN[rows] = answer.to(answer_BTN.dtype)
        self.answers[site.index] = answer_BTN.detach()
        answer_BTN = times(answer_BTN, self._global_B)
        return answer_BTN.flatten(0, 1) if flat else answer_BTN

    def _check(self, site: SiteView, answer: Tensor) -> None:
        if not isinstance(answer, Tensor) or not answer.ndim:
            raise ScalingsShapeError(f"site {site.name}: expected scalings as a tensor [..., N], found {answer!r}")
        if answer.shape[-1] != self._shape[-1]:
            raise ScalingsShapeError(
                f"site {site.name}: {answer.shape[-1]} scalings per token for {self._shape[-1]} experts"
            )


def _misfit(site: SiteView, answer: Tensor, given: torch.Size) -> ScalingsShapeError:
    found = tuple(answer.shape[:-1])
    return ScalingsShapeError(f"site {site.name}: scalings for {found} tokens, but the router was given {tuple(given)}")


def times(scalings: Tensor, global_B: Sequence[float]) -> Tensor:
    """Scalings [B, ...] times a number for each row, or one for all; none counts as 1."""
    if all(weight == 1.0 for weight in global_B):
        return scalings
    if len(global_B) == 1:
        return scalings * global_B[0]
    return scalings * scalings.new_tensor(global_B).view(-1, *[1] * (scalings.ndim - 1))


class Current(threading.local):
    """The call that runs in this thread, or None: then a base with sites is the base alone."""

    def __init__(self) -> None:  # of each thread; torch.compile guards the instance, and does not see a class attribute
        self.call: Call | None = None

    @contextmanager
    def running(self, call: Call | None) -> Iterator[None]:
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()  # no pass runs through a copy

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

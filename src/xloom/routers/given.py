"""Routers whose weights are known beforehand: alike everywhere, row by row, or a replay.

Knows nothing of hidden states or of what the experts hold.
Letters: B batch  T tokens  S sites  N experts
"""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from xloom.errors import ConfigError, ScalingsShapeError
from xloom.routers.routing import Given, Line, Replay, Router, Routing, check_known, finite


@final
class BaseOnly(Router):
    """No expert at all: the base model, bit for bit."""

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        return Routing((Line(Given()),))


@final
class Uniform(Router):
    """1/N for every expert."""

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        return Routing((Line(Given((1.0 / len(experts),) * len(experts))),))


@final
class Fixed(Router):
    """Weights by expert name, the same for every token; experts not named get 0.

    Raises:
        ConfigError: a weight that is no finite number.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping):
            raise ConfigError(f"Fixed: expected weights by expert name, found {weights!r}")
        self._weights = {name: finite(weight, f"Fixed: weight of {name!r}") for name, weight in weights.items()}

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        check_known(self._weights, experts)
        return Routing((Line(Given(tuple(self._weights.get(name, 0.0) for name in experts))),))


@final
class Single(Router):
    """One expert with weight 1, as if its adapter alone were on the base."""

    def __init__(self, expert: str) -> None:
        self.expert = expert

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        return Routing((Line(_one(self.expert, experts)),))


@final
class Precomputed(Router):
    """Scalings [B, T, S, N] known beforehand, for one forward of exactly these tokens: a replay.

    Raises:
        ScalingsShapeError: at once, if they are no such table; at the first forward, if they are of other tokens, sites
            or experts.
    """

    def __init__(self, scalings_BTSN: Tensor) -> None:
        if scalings_BTSN.ndim != 4 or not len(scalings_BTSN):
            raise ScalingsShapeError(f"expected scalings [B, T, S, N], found shape {tuple(scalings_BTSN.shape)}")
        self.scalings_BTSN = scalings_BTSN

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        return Routing(tuple(Line(Replay(scalings_TSN)) for scalings_TSN in self.scalings_BTSN.unbind(0)))


@final
class PerRow(Router):
    """Weights [B, N], one line for each row of the batch: a decision per sequence, made beforehand.

    Nothing is kept from token to token, so any cache and any way of decoding goes with it. No gradient reaches the
    weights; `Precomputed` passes them on.

    Raises:
        ScalingsShapeError: at once, if the weights are no such table; at the first forward, if the model has another
            number of experts, or the batch is not made of these rows.
    """

    def __init__(self, weights_BN: Tensor) -> None:
        if not isinstance(weights_BN, Tensor):
            raise ConfigError(f"PerRow: expected weights as a tensor [B, N], found {weights_BN!r}")
        if weights_BN.ndim != 2 or not len(weights_BN):
            raise ScalingsShapeError(f"expected weights [B, N], found shape {tuple(weights_BN.shape)}")
        if not weights_BN.isfinite().all():
            raise ConfigError("PerRow: expected finite weights, found NaN or infinity")
        self.weights_BN = weights_BN

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        if self.weights_BN.shape[1] != len(experts):
            raise ScalingsShapeError(
                f"PerRow: expected {len(experts)} weights per row, one an expert, found {self.weights_BN.shape[1]}"
            )
        return Routing(tuple(Line(Given(tuple(map(float, weights)))) for weights in self.weights_BN.tolist()))


@final
class Oracle(Router):
    """The right expert of each row with weight 1, by name.

    Raises:
        ScalingsShapeError: no name. At the first forward as `PerRow`.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        if isinstance(experts, str) or not experts:
            raise ScalingsShapeError(f"expected the name of an expert for each row, found {experts!r}")
        self.experts = tuple(experts)

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> Routing:
        return Routing(tuple(Line(_one(name, experts)) for name in self.experts))


def _one(expert: str, experts: Sequence[str]) -> Given:
    check_known([expert], experts)
    return Given(tuple(1.0 if name == expert else 0.0 for name in experts))

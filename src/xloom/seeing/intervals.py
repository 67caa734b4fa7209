"""Bootstrap intervals. Knows nothing of what is measured. Letters: U units  R resamples"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value and its 95 % bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float


def counts(units: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each unit is in each resample [R, U]."""
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples)


def interval(value: float, samples_R: Floats) -> Interval:
    """Percentiles of resamples."""
    low, high = np.quantile(samples_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap(values_U: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of some values, at least one."""
    drawn_RU = counts(len(values_U), resamples, np.random.default_rng(seed))
    return interval(float(values_U.mean()), drawn_RU @ values_U / len(values_U))

"""Means with bootstrap intervals, over questions: per column, Oracle-normalised, and as differences of pairs.

    samples_RM = counts_RQ @ scores_QM / Q      a resample of Q questions is a row of counts; all systems share it

Everything is paired: in each resample all systems answered the same questions. Knows nothing of models or tasks.
Letters: Q questions  M systems  R resamples  C columns
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 2**20  # counts in memory


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def resampled_counts(
    questions: int, *, name: str = "", resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[NDArray[np.int64]]:
    """How often each question is in each resample [R, Q], some resamples at a time; fixed by the name and the seed."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    even = np.full(questions, 1 / questions)
    some = max(_AT_ONCE // questions, 1)
    for start in range(0, resamples, some):
        yield rng.multinomial(questions, even, size=min(some, resamples - start))


def resampled_means(scores_QM: Floats, *, name: str = "", resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """The systems' mean scores in each resample [R, M]; NaN for a system with a score missing."""
    parts = resampled_counts(len(scores_QM), name=name, resamples=resamples, seed=seed)
    return np.concatenate([counts_RQ @ scores_QM / len(scores_QM) for counts_RQ in parts])


def interval(value: float, samples_R: Floats) -> Interval:
    """Percentiles of the resamples; those without a value (a ratio to 0) do not count."""
    known = samples_R[np.isfinite(samples_R)]
    if not len(known):
        return Interval(value, value, value)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def mean_interval(scores_Q: Floats, *, name: str = "", resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of some scores."""
    return interval(
        float(scores_Q.mean()), resampled_means(scores_Q[:, None], name=name, resamples=resamples, seed=seed)[:, 0]
    )


class Comparison:
    """Scores of all systems in all columns, and what follows from them.

    Args:
        scores: by column, then by system: one score per question, in the same order for all systems of a column. A
            system may lack a column.
    """

    def __init__(
        self, scores: Mapping[str, Mapping[str, Floats]], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.columns = tuple(scores)
        self.systems = tuple(dict.fromkeys(system for by_system in scores.values() for system in by_system))
        self._means: dict[tuple[str, str], float] = {}
        self._samples: dict[tuple[str, str], Floats] = {}
        for column, by_system in scores.items():
            table_QM = np.stack(list(by_system.values()), axis=1).astype(float)
            samples_RM = resampled_means(table_QM, name=column, resamples=resamples, seed=seed)
            for place, system in enumerate(by_system):
                self._means[column, system] = float(table_QM[:, place].mean())
                self._samples[column, system] = samples_RM[:, place]

    def has(self, columns: Sequence[str], system: str) -> bool:
        """Whether the system answered in every one of the columns."""
        return bool(columns) and all((column, system) in self._means for column in columns)

    def cell(self, column: str, system: str) -> Interval:
        """Mean score in one column."""
        return interval(self._means[column, system], self._samples[column, system])

    def mean(self, columns: Sequence[str], system: str) -> Interval:
        """Mean over columns, each counting alike."""
        value = np.mean([self._means[column, system] for column in columns])
        return interval(float(value), self._mean_samples(columns, system))

    def normalised(self, columns: Sequence[str], system: str, oracle: str) -> Interval:
        """Mean over columns of the system's score divided by the oracle's, 1 for as good as the oracle.

        Columns where the oracle has nothing right do not count.
        """
        columns = [column for column in columns if self._means[column, oracle] > 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = [self._means[column, system] / self._means[column, oracle] for column in columns]
            samples = [self._samples[column, system] / self._samples[column, oracle] for column in columns]
        if not columns:
            return Interval(float("nan"), float("nan"), float("nan"))
        return interval(float(np.mean(ratios)), np.mean(samples, axis=0))

    def difference(self, columns: Sequence[str], system: str, other: str) -> Interval:
        """The system's mean over columns less the other's, paired: 0 outside of the interval means they differ."""
        value = np.mean([self._means[c, system] - self._means[c, other] for c in columns])
        return interval(float(value), self._mean_samples(columns, system) - self._mean_samples(columns, other))

    def _mean_samples(self, columns: Sequence[str], system: str) -> Floats:
        return np.asarray(np.mean([self._samples[column, system] for column in columns], axis=0))


@dataclass(frozen=True)
class Errors:
    """How far predicted numbers are from the right ones.

    Answers without a number count as the mean of the right ones; `unreadable` is how many.
    """

    mae: float
    r2: float
    numbers: int
    unreadable: int


def errors(pairs: Sequence[tuple[float | None, float]]) -> Errors:
    """Of (predicted, true) pairs, at least one; R2 is NaN where all right numbers are the same."""
    true = np.array([value for _, value in pairs])
    said = np.array([true.mean() if predicted is None else predicted for predicted, _ in pairs])
    spread = float(((true - true.mean()) ** 2).sum())
    r2 = 1 - float(((said - true) ** 2).sum()) / spread if spread > 0 else float("nan")
    return Errors(float(np.abs(said - true).mean()), r2, len(pairs), sum(p is None for p, _ in pairs))

"""What an evaluation found: answers and grades of every system, as flat rows with intervals.

Knows nothing of models or of how tables are printed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from xloom.evaluation.bench import right_experts
from xloom.evaluation.registry import ORACLE
from xloom.evaluation.scorers import Grade
from xloom.evaluation.statistics import Comparison, Interval, errors, mean_interval
from xloom.evaluation.store import Kept
from xloom.evaluation.tasks import Question, Task

MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """One system's answers to one task's questions, in their order; `losses` is empty where none were asked for."""

    kept: tuple[Kept, ...]
    grades: tuple[Grade, ...]
    losses: tuple[float, ...] = ()

    @property
    def scores(self) -> Any:
        """[Q], float64."""
        return np.array([grade.score for grade in self.grades], dtype=float)


@dataclass(frozen=True)
class Outcome:
    """One system: its answers by column, and the most memory in 10^6 bytes that was held meanwhile."""

    system: str
    about: str
    columns: Mapping[str, Column]
    peak_mb: float | None
    routes: bool

    @property
    def _kept(self) -> list[Kept]:
        return [kept for column in self.columns.values() for kept in column.kept]

    @property
    def rows_per_second(self) -> float | None:
        seconds = sum(kept.seconds for kept in self._kept)
        return len(self._kept) / seconds if seconds and self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Written tokens, the reading of the prompts included in the time."""
        seconds = sum(kept.seconds for kept in self._kept)
        return self.tokens / seconds if seconds and self.tokens else None

    @property
    def tokens(self) -> int:
        return sum(kept.tokens for kept in self._kept)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found.

    Args:
        experts: of the model.
        against: the system that the others are compared with in pairs, if any.
        notes: what was left out or answered anew.
    """

    tasks: tuple[Task, ...]
    outcomes: tuple[Outcome, ...]
    experts: tuple[str, ...]
    against: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Columns whose every question has exactly one right expert, of the column's name: those that means are of."""
        return tuple(
            task.name
            for task in self.tasks
            if all(right_experts(question, self.experts) == (task.name,) for question in task.questions)
        )

    @cached_property
    def means(self) -> tuple[str, ...]:
        """Columns that the mean is of: the domains, or all columns where there are no domains."""
        return self.domains or self.columns

    @cached_property
    def comparison(self) -> Comparison:
        scores = {
            task.name: {o.system: o.columns[task.name].scores for o in self.outcomes if task.name in o.columns}
            for task in self.tasks
        }
        return Comparison({column: by_system for column, by_system in scores.items() if by_system})

    def normalised(self, system: str, column: str | None = None) -> Interval | None:
        """The score as a share of the Oracle's: in one column, or as the mean over the domains."""
        columns = self.domains if column is None else (column,)
        if not all(self.comparison.has(columns, name) for name in (system, ORACLE)):
            return None
        found = self.comparison.normalised(columns, system, ORACLE)
        return found if np.isfinite(found.value) else None

    def score(self, system: str, column: str | None = None) -> Interval | None:
        """Mean score in a column, or the mean over `means`."""
        columns = self.means if column is None else (column,)
        return self.comparison.mean(columns, system) if self.comparison.has(columns, system) else None

    # --- flat rows ---

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for every figure: router, domain, task, metric, score, low, high, oracle_normalised, items."""
        return list(self._rows)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for outcome in self.outcomes:
            for task in self.tasks:
                if task.name in outcome.columns:
                    found += self._column_rows(outcome, task)
            found += self._mean_rows(outcome)
        return found

    def _column_rows(self, outcome: Outcome, task: Task) -> Iterator[dict[str, Any]]:
        column, name = outcome.columns[task.name], outcome.system
        whole = self.comparison.cell(task.name, name)
        of_oracle = self.normalised(name, task.name) if task.name in self.domains else None
        yield _row(name, task.name, None, "score", whole, len(column.grades), of_oracle)
        for part in task.parts:
            at = [i for i, question in enumerate(task.questions) if question.task == part]
            yield _row(name, task.name, part, "score", _mean(column.scores[at], f"{task.name}/{part}"), len(at))
        if self.against is not None and self.comparison.has((task.name,), self.against):
            difference = self.comparison.difference((task.name,), name, self.against)
            yield {**_row(name, task.name, None, "difference", difference, len(column.grades)), "against": self.against}
        yield from self._error_rows(outcome, task)
        if column.losses:
            losses = np.array(column.losses)
            yield _row(name, task.name, None, "loss", _mean(losses, task.name), len(losses))
        if outcome.routes and (hits := _hits(task.questions, column.kept, self.experts)):
            yield _row(name, task.name, None, "routing_accuracy", _mean(np.array(hits), task.name), len(hits))

    def _error_rows(self, outcome: Outcome, task: Task) -> Iterator[dict[str, Any]]:
        """MAE and R2 of the kinds of questions that ask for numbers; not of joined ones, whose units differ."""
        pairs: dict[str, list[tuple[float | None, float]]] = {}
        for question, grade in zip(task.questions, outcome.columns[task.name].grades, strict=True):
            if question.scorer.name in {"number", "numbers"}:
                pairs.setdefault(question.task, []).extend(grade.numbers)
        for part, some in pairs.items():
            found = errors(some)
            for metric, value in (("mae", found.mae), ("r2", found.r2)):
                point = Interval(value, value, value)
                row = _row(outcome.system, task.name, part, metric, point, found.numbers)
                yield {**row, "low": None, "high": None, "unreadable": found.unreadable}

    def _mean_rows(self, outcome: Outcome) -> Iterator[dict[str, Any]]:
        name = outcome.system
        items = sum(len(task.questions) for task in self.tasks if task.name in self.means)
        if (mean := self.score(name)) is not None:
            yield _row(name, MEAN, None, "score", mean, items, self.normalised(name))
            if self.against is not None and self.comparison.has(self.means, self.against):
                difference = self.comparison.difference(self.means, name, self.against)
                yield {**_row(name, MEAN, None, "difference", difference, items), "against": self.against}
        if outcome.routes:
            hits = [
                hit
                for task in self.tasks
                if task.name in outcome.columns
                for hit in _hits(task.questions, outcome.columns[task.name].kept, self.experts)
            ]
            if hits:
                yield _row(name, MEAN, None, "routing_accuracy", _mean(np.array(hits), MEAN), len(hits))

    def as_json(self) -> dict[str, Any]:
        """`rows`, and beside them the systems with what they cost, and notes."""
        return {
            "what": "eval",
            "domains": list(self.domains),
            "columns": {task.name: len(task.questions) for task in self.tasks},
            "systems": [
                {
                    "router": outcome.system,
                    "about": outcome.about,
                    "rows_per_second": _rounded(outcome.rows_per_second),
                    "tokens_per_second": _rounded(outcome.tokens_per_second),
                    "peak_mb": _rounded(outcome.peak_mb),
                }
                for outcome in self.outcomes
            ],
            "rows": self.rows(),
            "notes": list(self.notes),
        }


def lead(weights: Mapping[str, float]) -> str | None:
    """The expert with the largest mean scaling; None where there is none above 0."""
    best = max(weights, key=lambda name: weights[name], default=None)
    return best if best is not None and weights[best] > 0 else None


def _hits(questions: Sequence[Question], kept: Sequence[Kept], experts: Sequence[str]) -> list[float]:
    """1.0 where the largest scaling is the right expert's, of questions that have exactly one."""
    return [
        float(lead(answer.weights) == right[0])
        for question, answer in zip(questions, kept, strict=True)
        if len(right := right_experts(question, experts)) == 1
    ]


def _mean(scores_Q: Any, name: str) -> Interval:
    return mean_interval(scores_Q, name=name)


def _row(
    system: str,
    domain: str,
    task: str | None,
    metric: str,
    found: Interval,
    items: int,
    of_oracle: Interval | None = None,
) -> dict[str, Any]:
    return {
        "router": system,
        "domain": domain,
        "task": task,
        "metric": metric,
        "score": _rounded(found.value),
        "low": _rounded(found.low),
        "high": _rounded(found.high),
        "oracle_normalised": _rounded(of_oracle.value) if of_oracle else None,
        "oracle_normalised_low": _rounded(of_oracle.low) if of_oracle else None,
        "oracle_normalised_high": _rounded(of_oracle.high) if of_oracle else None,
        "items": items,
    }


def _rounded(value: float | None) -> float | None:
    """Six digits after the point; None for what JSON cannot say."""
    return None if value is None or not np.isfinite(value) else round(float(value), 6)

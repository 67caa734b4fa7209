"""What an evaluation found: answers and grades of every system, as flat rows with intervals.

Knows nothing of models or of how tables are printed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from xloom.evaluation.bench import right_experts
from xloom.evaluation.registry import ORACLE
from xloom.evaluation.scorers import Grade, by_place
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
    """One system: its answers by column, and the most memory in 10^6 bytes that was held meanwhile.

    Speed and memory are those of this setting (device, threads, batches, dtype); None where nothing was written in it.

    Args:
        borrowed: columns whose answers were chosen by the right ones; no fair rival to the others there.
    """

    system: str
    about: str
    columns: Mapping[str, Column]
    peak_mb: float | None
    routes: bool
    borrowed: tuple[str, ...] = ()

    @property
    def _kept(self) -> list[Kept]:
        return [kept for column in self.columns.values() for kept in column.kept]

    @property
    def rows_per_second(self) -> float | None:
        return self._per_second(lambda kept: 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Written tokens, the reading of the prompts included in the time."""
        return self._per_second(lambda kept: kept.tokens)

    @property
    def cut(self) -> float | None:
        """Share of the written answers that ended for want of tokens, not by themselves; of those that tell."""
        known = [kept.cut for kept in self._kept if kept.tokens and kept.cut is not None]
        return sum(known) / len(known) if known else None

    def _per_second(self, count: Callable[[Kept], int]) -> float | None:
        """Of the answers that a model wrote, in this setting."""
        timed = [(count(kept), kept.seconds) for kept in self._kept if kept.tokens and kept.seconds is not None]
        seconds = sum(seconds for _, seconds in timed)
        return sum(number for number, _ in timed) / seconds if seconds else None


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

    def best(self, values: Mapping[str, Interval | None], columns: Sequence[str]) -> set[str]:
        """The systems with the highest value, which is taken over these columns: of those that guess.

        The Oracle is told which expert is right, and a system may have borrowed from the right answers of a column.
        """
        fair = {o.system for o in self.outcomes if o.system != ORACLE and not set(o.borrowed) & set(columns)}
        known = {name: value.value for name, value in values.items() if value is not None and name in fair}
        return {name for name, value in known.items() if value == max(known.values())}

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
        """MAE and R2 of the kinds of questions that ask for numbers; not of joined ones, whose units differ.

        Of several numbers in an answer, each place has its own, and their mean is given.
        """
        grades: dict[str, list[Grade]] = {}
        for question, grade in zip(task.questions, outcome.columns[task.name].grades, strict=True):
            if question.scorer.name in {"number", "numbers"}:
                grades.setdefault(question.task, []).append(grade)
        for part, some in grades.items():
            places = [errors(pairs) for pairs in by_place(some)]
            numbers, unreadable = (sum(found) for found in zip(*((p.numbers, p.unreadable) for p in places)))
            for metric in ("mae", "r2"):
                value = float(np.mean([getattr(place, metric) for place in places]))
                row = _row(outcome.system, task.name, part, metric, Interval(value, value, value), numbers)
                yield {**row, "low": None, "high": None, "unreadable": unreadable}

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
                    "cut": _rounded(outcome.cut),
                    "borrowed": list(outcome.borrowed),
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

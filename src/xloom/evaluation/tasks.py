"""What is asked: rows with their right answers and scorers, in columns of the table that comes out.

    {"prompt": ..., "completion": ..., "domain": "quantum", "task": "gap", "scorer": "number", "options": {...}}

A row is one of training data (`training.rows`); what stands beside prompt and completion is optional. A column is one
file, or a folder with test.jsonl and, if there is one, train.jsonl. Knows nothing of models or tokenizers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.errors import ConfigError, DataError, MissingExtraError, NotFoundError, XLoomError, names
from xloom.evaluation.scorers import Custom, Grade, Scorer, find_scorer
from xloom.training.rows import Row, read_rows

MOST_TASKS = 12  # of a column that has a figure for each of them
QUICK = frozenset({"exact", "contains", "number", "numbers"})  # scorers that may grade every row beforehand
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Question:
    """One row to be answered.

    Args:
        column: the part of the table it counts for.
        task: what kind of question it is, within its column.
        experts: names of the domains whose experts it needs; the right experts, where a model has them.
        raw: the row as it stands in its file.
    """

    row: Row
    column: str
    task: str
    experts: tuple[str, ...]
    scorer: Scorer = field(default_factory=Scorer)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> str:
        """The right answer's text."""
        completion = self.row.completion
        return (completion if isinstance(completion, str) else str(completion[-1]["content"])).strip()

    @property
    def key(self) -> str:
        """What the row says it asks about; where it says nothing, its place in the file."""
        return str(self.raw.get("key") or self.row.where)

    def grade(self, answer: str) -> Grade:
        """Raises as `Scorer.grade`, with the row's place in front."""
        try:
            return self.scorer.grade(answer, self.right, self.raw)
        except DataError as error:
            raise DataError(f"{self.row.where}: {error}") from None


@dataclass(frozen=True)
class Task:
    """One column: the questions, and training rows of the same kind for those systems that look at some.

    Args:
        beyond: rows of the file that are not asked, as there is a limit. They count where lengths are measured, so that
            an answer does not depend on how many questions there are.
    """

    name: str
    questions: tuple[Question, ...]
    train: tuple[Question, ...] = ()
    beyond: tuple[Question, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the kinds of questions, if there are several and not too many; not of joined ones."""
        found = tuple(dict.fromkeys(question.task for question in self.questions))
        return found if 1 < len(found) <= MOST_TASKS and not any("+" in kind for kind in found) else ()


def load_tasks(
    sources: Mapping[str, str | Path],
    *,
    scorer: str | Custom | None = None,
    limit: int | None = None,
) -> list[Task]:
    """The tasks of files or folders, by name.

    Args:
        scorer: for rows that do not bring one of their own; a name, "module:function" or a function. Default: exact.
        limit: only so many questions of each are asked, the first ones of its file.

    Raises:
        NotFoundError: no such file.
        DataError: a row is wrong, named by file and line, or there is none.
        ConfigError: no such scorer.
        MissingExtraError: a scorer needs a package that is not installed.
    """
    default = find_scorer(scorer if scorer is not None else "exact")
    return [_load(name, Path(place), default, limit) for name, place in sources.items()]


def read_questions(path: Path, column: str, default: Scorer) -> list[Question]:
    """The rows of one JSONL file. Raises as `load_tasks`."""
    if path.suffix != ".jsonl" or not path.is_file():
        problem = "found nothing" if not path.exists() else f"found {path.name!r}"
        kind = DataError if path.exists() else NotFoundError
        raise kind(f"{path}: expected a file of rows that ends in .jsonl, {problem}")
    found: list[Question] = []
    # `read_rows` is the judge of what a row is; the rest of the row is read beside it
    with path.open(encoding="utf-8-sig") as lines:
        filled = (line for line in lines if line.strip())
        for row in read_rows(path):
            raw = json.loads(next(filled))
            if not row.empty:
                found.append(_question(row, raw, column, default, path.parent))
    return found


def _load(name: str, place: Path, default: Scorer, limit: int | None) -> Task:
    test, train = (place / "test.jsonl", place / "train.jsonl") if place.is_dir() else (place, None)
    rows = read_questions(test, name, default)
    questions, beyond = rows[:limit], rows[len(rows[:limit]) :]
    if not questions:
        raise DataError(f"{test}: expected rows with a right answer, found none")
    checked: set[tuple[str, str]] = set()
    for question in questions:
        kind = (question.task, question.scorer.name)
        if question.scorer.name in QUICK or kind not in checked:
            _check(question)
            checked.add(kind)
    known = read_questions(train, name, default) if train is not None and train.is_file() else []
    return Task(name, tuple(questions), tuple(known), tuple(beyond))


def _question(row: Row, raw: Mapping[str, Any], column: str, default: Scorer, folder: Path) -> Question:
    scorer = default
    try:
        options = raw.get("options") or {}
        if not isinstance(options, Mapping):
            raise DataError(f"options: expected an object, found {type(options).__name__}")
        if "scorer" in raw:
            if not isinstance(raw["scorer"], str) or ":" in raw["scorer"]:
                # a file of data does not say which code runs
                raise DataError(f"scorer: expected a scorer's name, found {raw['scorer']!r}")
            scorer = find_scorer(raw["scorer"], options, folder)
        elif options:
            scorer = Scorer(default.name, options, default.custom, folder)
        return Question(row, column, str(raw.get("task", column)), _experts(raw, column), scorer, raw)
    except (ConfigError, DataError) as error:
        raise DataError(f"{row.where}: {error}") from None


def _experts(raw: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The domains of a row: "a+b" is one that needs two."""
    domain = raw.get("domain", column)
    if not isinstance(domain, str) or not domain:
        raise DataError(f"domain: expected a name, found {domain!r}")
    return tuple(dict.fromkeys(domain.split("+")))


def _check(question: Question) -> None:
    """Grades the right answer itself: finds options and rows that make no sense before any model runs."""
    scorer, right = question.scorer, question.right
    if scorer.custom is not None:  # of the user's own, which may be slow
        return
    try:
        score = scorer.grade(right, right, question.raw).score
    except MissingExtraError:
        raise
    except XLoomError as error:
        raise DataError(f"{question.row.where}: {error}") from None
    if score < 1 - _ROUNDING:
        problem = f"expected a right answer of score 1, found {right!r:.60}, of score {score:g}"
        raise DataError(f"{question.row.where}: scorer {scorer.name}: {problem}")


def describe(tasks: Sequence[Task]) -> str:
    """`600 questions: quantum 300, materials 300`."""
    total = sum(len(task.questions) for task in tasks)
    return f"{total} questions: " + names((f"{task.name} {len(task.questions)}" for task in tasks), 20)

"""What two simple systems take from training rows: the best constant answer, and solved questions to go first.

Knows nothing of models or tokenizers.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from xloom.errors import DataError
from xloom.evaluation.tasks import QUICK, Question
from xloom.training.rows import Row

CANDIDATES = 50  # the commonest answers, of which the best is the constant one
SEPARATOR = "\n\n"  # between solved questions of plain text
_GRADED = 300  # rows that candidates are tried on
_JOINT = "; "


def best_constant(questions: Sequence[Question]) -> str:
    """Of the `CANDIDATES` commonest answers the one that scores best on these; the commonest, where that is costly.

    Raises:
        DataError: there are no questions.
    """
    counts = Counter(question.right for question in questions)
    if not counts:
        raise DataError("a constant answer: expected questions with right answers, found none")
    common = counts.most_common(CANDIDATES)
    if questions[0].scorer.name not in QUICK or len(common) == 1:
        return common[0][0]
    some = questions[:_GRADED]
    # of equally good ones the commonest
    return max((answer for answer, _ in common), key=lambda answer: sum(q.grade(answer).score for q in some))


class Constants:
    """The constant answer to every kind of question.

    Args:
        train: of all columns.
        asked: the questions themselves, which stand in where a kind has no training rows. What is chosen on the very
            questions that it answers is no fair rival: `borrowed` tells.
    """

    def __init__(self, train: Iterable[Question], asked: Iterable[Question]) -> None:
        self._known = _by_kind(train)
        self._asked = _by_kind(asked)
        self._found: dict[tuple[str, str], str] = {}

    def answer(self, question: Question) -> str:
        return _JOINT.join(self._of(kind) for kind in self._kinds(question))

    def borrowed(self, question: Question) -> bool:
        """Whether its answer is chosen on the questions themselves, for want of training rows."""
        return any(kind not in self._known for kind in self._kinds(question))

    def _kinds(self, question: Question) -> list[tuple[str, str]]:
        """Of the answers that, joined, are the one to this question: its parts' where there are rows for them all."""
        parts = _kinds_of_parts(question) if question.scorer.name == "parts" else []
        return parts if parts and all(kind in self._known for kind in parts) else [_kind(question)]

    def _of(self, kind: tuple[str, str]) -> str:
        if kind not in self._found:
            self._found[kind] = best_constant(self._known.get(kind) or self._asked[kind])
        return self._found[kind]


def solved(question: Question, train: Sequence[Question], count: int) -> list[Question]:
    """`count` training rows of the question's kind, chosen by a hash; fewer where there are fewer.

    All questions of a kind get the same ones, so that their prompts begin alike. With no row of the kind, rows of the
    column.
    """
    alike = [other for other in train if _kind(other) == _kind(question)] or list(train)
    return sorted(alike, key=_place)[:count]


def with_shots(row: Row, shots: Sequence[Question]) -> Row:
    """The row with solved questions before its own: earlier turns of the chat, or paragraphs of a plain text."""
    if isinstance(row.prompt, str):
        plain = [shot.row for shot in shots if isinstance(shot.row.prompt, str)]
        parts = [f"{shot.prompt}{shot.completion}{SEPARATOR}" for shot in plain]
        return Row("".join(parts) + row.prompt, row.completion, row.where)
    turns = [
        message
        for shot in shots
        if not isinstance(shot.row.prompt, str) and not isinstance(shot.row.completion, str)
        for message in (*shot.row.prompt, *shot.row.completion)
        if message["role"] != "system"
    ]
    first = int(row.prompt[0]["role"] == "system")
    return Row([*row.prompt[:first], *turns, *row.prompt[first:]], row.completion, row.where)


def _kind(question: Question) -> tuple[str, str]:
    return "+".join(question.experts), question.task


def _kinds_of_parts(question: Question) -> list[tuple[str, str]]:
    """Of a joined question: the kind of each part, in their order."""
    tasks = question.task.split("+")
    domains = question.raw.get("parts_domains") or list(question.experts) * (len(tasks) if _one(question) else 1)
    return list(zip(domains, tasks, strict=True)) if len(domains) == len(tasks) else []


def _one(question: Question) -> bool:
    return len(question.experts) == 1


def _by_kind(questions: Iterable[Question]) -> dict[tuple[str, str], list[Question]]:
    found: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        found.setdefault(_kind(question), []).append(question)
    return found


def _place(question: Question) -> str:
    return hashlib.sha256(f"shot {question.task} {question.key}".encode()).hexdigest()

"""Items, tasks and domains of the suite, and the pure steps that turn a table's items into rows of a file.

Takes items as they are in a table; gives them clean, assigned to splits, chosen and worded. Every choice hangs on a
hash of what is chosen, so that it is the same everywhere. Knows nothing of packages' contents, files or models.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xloom.errors import DataError
from xloom.hub.fetch import Package
from xloom.suite.reserved import drop_reserved

Read = Callable[[Package, str], bytes]  # package, member -> the bytes of a file inside its wheel
Row = dict[str, Any]

SPLITS = ("train", "valid", "test")
TEST_SHARE = VALID_SHARE = 0.15  # of the groups
BETWEEN_ANSWERS = "; "


@dataclass(frozen=True)
class Item:
    """One question of a table or a generator, with its right answer.

    `text` stands for {} in the task's wordings; `key` says what it asks about (canonical SMILES, reduced formula,
    sequence, "name:seed" of a generated item); a `group` is never split over splits (Murcko scaffold, chemical system,
    sequence cluster). `split` is set where a table brings its own. An item is reserved under its key or any of
    `other_keys`, or because it is known to be (`reserved`). `facts` are JSON values that the scorer needs beside the
    answer; they go into the row's options.
    """

    task: str
    text: str
    answer: str
    key: str
    group: str
    split: str | None = None
    other_keys: tuple[str, ...] = ()
    reserved: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """How a domain asks one kind of question, and how an answer is judged.

    `wordings` say which answers are expected, but carry no tag of their domain. `answers` of a choice between few:
    splits hold equally many of each. `share` is that of the domain's rows, relative to its other tasks.
    """

    wordings: tuple[str, ...]
    scorer: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Domain:
    """Where a domain's items come from and the tasks they belong to.

    `about` is one line for cards and tables. `extra` gives, by file name, JSON objects written beside the rows.
    """

    about: str
    packages: tuple[Package, ...]
    read: Callable[[Read], Iterable[Item]]
    tasks: Mapping[str, Task]
    extra: Callable[[Read], Mapping[str, Any]] = lambda read: {}


def clean(items: Iterable[Item]) -> tuple[list[Item], dict[str, int]]:
    """The items without reserved ones, contradicting answers and repetitions; and how many each cost.

    Answers contradict within a task and key: the same key may be asked about in several tasks. Items of one task repeat
    each other where their key, or their text and answer, are the same: generators meet a question again at another
    seed.
    """
    items = list(items)
    free = drop_reserved((item for item in items if not item.reserved), lambda item: (item.key, *item.other_keys))
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for item in free:
        answers[item.task, item.key].add(item.answer)
    agreed = [item for item in free if len(answers[item.task, item.key]) == 1]
    # the later of two equal items stays: a table's test split comes after its training split
    by_key = {(item.task, item.key): item for item in agreed}
    unique = list({(item.task, item.text, item.answer): item for item in by_key.values()}.values())
    dropped = {
        "reserved": len(items) - len(free),
        "contradicting": len(free) - len(agreed),
        "repeated": len(agreed) - len(unique),
    }
    return unique, dropped


def assign(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by split, each group whole: in the split that a table gives to one of its items, else by its hash.

    Where tables disagree about a group, test goes before valid and valid before train.
    """
    items = list(items)
    own: dict[str, str] = {}
    for item in items:
        if item.split is not None:
            own[item.group] = max(item.split, own.get(item.group, item.split), key=SPLITS.index)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        splits[own.get(item.group) or split_of(item.group)].append(item)
    return splits


def split_of(group: str) -> str:
    """The split that a group falls into; depends on nothing but the group, so that it never moves."""
    place = fraction("split", group)
    if place < TEST_SHARE:
        return "test"
    return "valid" if place < TEST_SHARE + VALID_SHARE else "train"


def choose(items: Iterable[Item], task: Task, size: int) -> list[Item]:
    """At most `size` items of one task, chosen and ordered by a hash of the key.

    Of a choice between few answers: equally many of each. Raises DataError for an answer that is none of these.
    """
    ordered = by_hash(items, "choice")
    if not task.answers:
        return ordered[:size]
    by_answer: dict[str, list[Item]] = {answer: [] for answer in task.answers}
    for item in ordered:
        if item.answer not in by_answer:
            raise DataError(
                f"{item.task}: {item.key} has the answer {item.answer!r}, expected one of {', '.join(task.answers)}"
            )
        by_answer[item.answer].append(item)
    each = min(size // len(by_answer), *map(len, by_answer.values()))
    chosen = [item for kind in by_answer.values() for item in kind[:each]]
    # another hash than the one that chose: by that, the answer with more candidates would come first
    return by_hash(chosen, "place")


def by_hash(items: Iterable[Item], purpose: str) -> list[Item]:
    """The items in an order fixed by the purpose and their tasks and keys."""
    return sorted(items, key=lambda item: (fraction(purpose, f"{item.task}:{item.key}"), item.task, item.key))


def to_row(domain: str, task: Task, item: Item) -> Row:
    """A chat row in TRL's prompt/completion shape, with what its scorer needs; a hash chooses the wording."""
    wording = _picked(task.wordings, "wording", f"{item.task}:{item.key}")
    return {
        "prompt": [{"role": "user", "content": wording.replace("{}", item.text)}],
        "completion": [{"role": "assistant", "content": item.answer}],
        "domain": domain,
        "task": item.task,
        "key": item.key,
        "scorer": task.scorer,
        "options": {**task.options, **item.facts},
    }


# opening, the marks of the questions, what is between them, ending; {all} is "both" or "all three"
_JOININGS: tuple[tuple[str, tuple[str, str, str], str, str], ...] = (
    ("Answer {all}, separated by a semicolon. ", ("1) ", "2) ", "3) "), " ", ""),
    ("{number} questions; give {all} answers with a semicolon between. ", ("A: ", "B: ", "C: "), " ", ""),
    ("", ("First: ", "Second: ", "Third: "), "\n", "\nPut a semicolon between the answers."),
    ("Reply to {all} in order, with ; between the replies.\n", ("- ", "- ", "- "), "\n", ""),
    ("", ("", "And also: ", "And last: "), "\n", "\nGive {all} answers, split by a semicolon."),
    ("I have {number} questions. ", ("(a) ", "(b) ", "(c) "), " ", "\nAnswers, with semicolons:"),
    ("", ("1. ", "2. ", "3. "), "\n", "\nAnswer {all} in one line, a semicolon after each but the last."),
    ("Semicolons between the answers, please: ", ("", "", ""), " / ", ""),
)
_AMOUNTS = {2: ("both", "two"), 3: ("all three", "three")}


def join_questions(rows: Sequence[Row], seed_text: str) -> Row:
    """Two or three single questions, of whatever domains, as one prompt with the answers joined by "; ".

    A hash of `seed_text` chooses the wording. Domains, tasks and keys are joined by "+" (one domain stays as it is);
    the scorer is "parts". Raises DataError for another number of rows, a conversation, or an answer with a semicolon.
    """
    if len(rows) not in _AMOUNTS:
        raise DataError(f"{seed_text}: {len(rows)} questions to join, expected 2 or 3")
    for row in rows:
        if len(row["prompt"]) != 1 or ";" in _answer(row):
            raise DataError(
                f"{row['domain']}, {row['key']}: only single questions with no semicolon in the answer join"
            )
    opening, marks, between, ending = _picked(_JOININGS, "joining", seed_text)
    together, number = _AMOUNTS[len(rows)]
    questions = between.join(mark + row["prompt"][0]["content"] for mark, row in zip(marks, rows, strict=False))
    start, end = (text.replace("{all}", together).replace("{number}", number) for text in (opening, ending))
    prompt = start[:1].upper() + start[1:] + questions + end
    parts = [{"answer": _answer(row), "scorer": row["scorer"], "options": row["options"]} for row in rows]
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": BETWEEN_ANSWERS.join(map(_answer, rows))}],
        "domain": "+".join(dict.fromkeys(row["domain"] for row in rows)),
        "task": "+".join(row["task"] for row in rows),
        "key": "+".join(row["key"] for row in rows),
        "scorer": "parts",
        "options": {"parts": parts},
    }


def fraction(purpose: str, text: str) -> float:
    """A number in [0, 1) fixed by purpose and text, unrelated to the digest that marks reserved rows."""
    digest = hashlib.sha256(f"{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _picked(choices: Sequence[Any], purpose: str, text: str) -> Any:
    return choices[int(fraction(purpose, text) * len(choices))]


def _answer(row: Row) -> str:
    answer: str = row["completion"][0]["content"]
    return answer

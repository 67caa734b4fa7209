"""Reasoning: small puzzles of reasoning-gym, made and judged by that package, told in fewer words.

Every item comes from a seed of its own, below the reserved ones; the three splits take theirs from ranges that do not
meet, and no text is in two of them. Left out are what a small model did not learn in minutes (greatest common
divisors, letter counting, syllogisms). Knows nothing of files or models.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xloom.errors import MissingExtraError
from xloom.suite.items import Domain, Item, Read, Task
from xloom.suite.reserved import check_seed

Entry = Mapping[str, Any]  # what a generator gives: question, answer, metadata

# first seed and number of seeds; a text that more than one split has stays in the last of these
RANGES = {"train": (0, 2000), "valid": (1_000_000, 300), "test": (2_000_000, 400)}


@dataclass(frozen=True)
class Puzzle:
    """One generator: its name and settings in reasoning-gym, and the text made of what it gives, "" to leave it out.

    `kept` are the names in an entry's metadata that the generator's own scorer reads; None where that is equality.
    """

    dataset: str
    settings: Mapping[str, Any]
    text: Callable[[Entry], str]
    kept: tuple[str, ...] | None = None


def sum_text(entry: Entry) -> str:
    """`12 - 5 + 40`."""
    return str(entry["metadata"]["expression"])


def family_text(entry: Entry) -> str:
    """The story, and whose relation to whom is asked. In-laws are left out: the generator names the other person's."""
    if "in-law" in entry["answer"]:
        return ""
    story, facts = entry["question"].split("\n")[0], entry["metadata"]
    return f"{story} What is {facts['person1']} to {facts['person2']}?"


def who_text(entry: Entry) -> str:
    """Three statements and a question about one of them; left out where two statements answer it."""
    statements, _, question = entry["question"].partition("\n")
    question = question.removesuffix(" Reply only with a name.")
    asked = question.removeprefix("Who ").removesuffix("?")
    return f"{statements.strip()} {question}" if statements.count(f" {asked}.") == 1 else ""


def weekday_text(entry: Entry) -> str:
    """`2 days after Friday, October 28`."""
    days = entry["metadata"]["offset_days"]
    found = re.search(r"[A-Z][a-z]+day, [A-Z][a-z]+ \d+", entry["question"])
    assert found is not None
    return f"{abs(days)} day{'s' * (abs(days) > 1)} {'after' if days > 0 else 'before'} {found[0]}"


def siblings_text(entry: Entry) -> str:
    """`Mary has 2 brothers and 6 sisters. How many sisters does Mary's brother have?`."""
    text = entry["question"].replace(" and she also has ", " and ")
    name = text.partition(" ")[0]
    return re.sub(r"\b1 (brother|sister)s", r"1 \1", re.sub(r"does \w+'s", f"does {name}'s", text))


def reverse_text(entry: Entry) -> str:
    """`hundred, go, acute`; left out where two words are the same, or one is long or a letter."""
    words = entry["metadata"]["words"]
    short = all(2 <= len(word) <= 9 and word.isascii() for word in words)
    return ", ".join(words) if short and len({word.lower() for word in words}) == len(words) else ""


PUZZLES: dict[str, Puzzle] = {
    "sum": Puzzle("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, sum_text),
    "family": Puzzle("family_relationships", {"min_family_size": 3, "max_family_size": 5}, family_text),
    "who": Puzzle("needle_haystack", {"min_num_statements": 3, "max_num_statements": 3}, who_text),
    "weekday": Puzzle(
        "calendar_arithmetic", {"tasks": ["weekday_offset"], "offset_upper_bound": 4}, weekday_text, ("task",)
    ),
    "siblings": Puzzle("aiw", {"task_type_weights": [1.0, 0.0, 0.0], "max_entities": 9}, siblings_text),
    "reverse": Puzzle("word_sequence_reversal", {"min_words": 3, "max_words": 3}, reverse_text),
}


def read_reasoning(read: Read) -> Iterator[Item]:
    """The items of every puzzle, with their split set. Key and group: the name of the generator and the seed.

    Raises MissingExtraError without reasoning-gym.
    """
    for task in PUZZLES:
        yield from puzzle_items(task)


def puzzle_items(task: str) -> list[Item]:
    """The items of one puzzle, no text twice: of equal ones the test split's stays, then the validation split's."""
    puzzle, found = PUZZLES[task], dict[str, Item]()
    for split, (first, count) in RANGES.items():
        for seed, entry in enumerate(make_entries(puzzle, first, count), first):
            text = puzzle.text(entry)
            if text:
                key = f"{puzzle.dataset}:{seed}"
                found[text] = Item(task, text, str(entry["answer"]), key, key, split, facts=scored_by(puzzle, entry))
    return list(found.values())


def make_entries(puzzle: Puzzle, first: int, count: int) -> Iterator[Entry]:
    """What the generator gives for `count` seeds from `first` on.

    Raises DataError if one of them is reserved, MissingExtraError without reasoning-gym.
    """
    try:
        from reasoning_gym.factory import create_dataset
    except ImportError:
        raise MissingExtraError('reasoning puzzles need reasoning-gym: pip install "xloom[suite]"') from None
    check_seed(first + count - 1)
    # an entry depends on seed + index alone
    return iter(create_dataset(puzzle.dataset, seed=first, size=count, **puzzle.settings))


def scored_by(puzzle: Puzzle, entry: Entry) -> dict[str, Any]:
    """The options of the scorer "reasoning": the generator's name, and of its entry what its scorer reads."""
    if puzzle.kept is None:
        return {}
    metadata = {name: entry["metadata"][name] for name in puzzle.kept}
    return {"dataset": puzzle.dataset, "entry": {"answer": entry["answer"], "metadata": metadata}}


DOMAIN = Domain(
    about="small puzzles of reasoning-gym: sums, family relations, who does what, weekdays, siblings, reversed lists",
    packages=(),
    read=read_reasoning,
    tasks={
        "sum": Task(
            (
                "What is {}?",
                "Calculate {} and give the number.",
                "{} =",
                "Work out {}. Answer with the number only.",
                "Give the result of {} as a number.",
                "Which number is {}?",
            )
        ),
        "family": Task(
            (
                "{} Answer in one word.",
                "{} Name the relation.",
                "{} Give only the relation, in one word.",
                "A family: {} One word, please.",
                "Read and answer with one word. {}",
            )
        ),
        "who": Task(
            (
                "{} Name only.",
                "{} Give the name.",
                "{} Answer with a name only.",
                "Read and answer with a name. {}",
                "Here is what three people do. {} Just the name, please.",
            )
        ),
        "weekday": Task(
            (
                "Which day of the week is {}?",
                "What weekday is {}?",
                "Name the weekday {}.",
                "Weekday {}:",
                "Which weekday do we have {}?",
            ),
            scorer="reasoning",
        ),
        "siblings": Task(
            (
                "{} Just the number.",
                "{} Answer with a number.",
                "A riddle to answer with a number: {}",
                "{} Give only the number.",
                "Solve this riddle with one number. {}",
            )
        ),
        "reverse": Task(
            (
                "Reverse this list: {}",
                "Write these words in reverse order, with commas: {}",
                "{}: give this list backwards.",
                "Turn the list around, last word first: {}",
                "What is the list {} from end to start?",
            )
        ),
    },
)

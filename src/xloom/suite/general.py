"""The base's own manners: what it knows and how it talks, to see whether mixing experts into it does harm.

Two tasks out of a file that comes with the package (`scripts/make_general.py` makes it). `facts`: short questions, of
which the base answers some three in four. `talk`: everyday prompts whose right answer is what the base itself says, so
that a head can learn to leave it alone. Knows nothing of models.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from xloom.errors import DataError
from xloom.suite.composite import write_family
from xloom.suite.domains import DomainFiles
from xloom.suite.items import SPLITS, Row, fraction

NAME = "general"


def build_general(folder: str | Path) -> DomainFiles:
    """Write the rows and a card: 250 train (talk), 90 valid (50 talk, 40 facts), 210 test (100 talk, 110 facts)."""
    known = read_general()
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for fact in known["facts"]:
        rows[fact["split"]].append(fact_row(fact))
    for turn in known["talk"]:
        rows[turn["split"]].append(talk_row(turn))
    for found in rows.values():
        found.sort(key=lambda row: fraction("place", row["key"]))
    facts = [fact for fact in known["facts"] if fact["split"] == "test"]
    card = {
        "family": NAME,
        "about": "what the base knows and how it talks by itself; the answers of `talk` are its own",
        "answers_of": known["about"],
        "tasks": {
            task: {split: sum(row["task"] == task for row in found) for split, found in rows.items()}
            for task in ("facts", "talk")
        },
        "facts_test_base": sum(fact["right"] for fact in facts) / len(facts),
        "facts_test_constant": best_word(facts),
    }
    return write_family(NAME, Path(folder), rows, card)


def read_general() -> dict[str, Any]:
    """The package's own file: "about", "facts" and "talk". Raises DataError if it is damaged."""
    source = resources.files("xloom.suite").joinpath("data", "general.json")
    try:
        known: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read as JSON ({error}); install xloom again") from None
    return known


def fact_row(fact: Mapping[str, Any]) -> Row:
    """A question with known answers; right is a text that contains one of them."""
    return _row("facts", fact["prompt"], fact["any"][0], "contains", {"any": fact["any"]})


def talk_row(turn: Mapping[str, Any]) -> Row:
    """A prompt and the base's own whole answer."""
    return _row("talk", turn["prompt"], turn["answer"], "agreement", {})


def best_word(facts: Sequence[Mapping[str, Any]]) -> float:
    """Share of the facts that one and the same short answer gets right."""
    words = Counter(word.lower() for fact in facts for word in set(fact["any"]))
    return max(words.values()) / len(facts)


def _row(task: str, prompt: str, answer: str, scorer: str, options: Mapping[str, Any]) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "domain": NAME,
        "task": task,
        "key": f"{task}:{prompt}",
        "scorer": scorer,
        "options": dict(options),
    }

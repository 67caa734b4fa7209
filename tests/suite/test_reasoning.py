import re
import sys
from datetime import date, timedelta
from itertools import pairwise

import pytest

from xloom.errors import DataError, MissingExtraError
from xloom.suite import reasoning
from xloom.suite.items import Item, assign, clean
from xloom.suite.reasoning import DOMAIN, PUZZLES, RANGES, Puzzle, puzzle_items
from xloom.suite.reserved import FIRST_RESERVED_SEED

SMALL = {"train": (0, 120), "valid": (1_000_000, 30), "test": (2_000_000, 40)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Item]]:
    """A few items of every puzzle."""
    pytest.importorskip("reasoning_gym", reason="makes the puzzles")
    monkeypatch.setattr(reasoning, "RANGES", SMALL)
    return {task: puzzle_items(task) for task in PUZZLES}


def value(expression: str) -> int:
    terms = re.findall(r"([+-]?) ?(\d+)", expression)
    return sum(int(number) * (-1 if sign == "-" else 1) for sign, number in terms)


def test_sums_are_right(made: dict[str, list[Item]]) -> None:
    assert value("12 - 5 + 40") == 47, "a test of the test"
    assert all(value(item.text) == int(item.answer) for item in made["sum"])


def test_the_right_person_is_named(made: dict[str, list[Item]]) -> None:
    for item in made["who"]:
        asked = re.search(r"Who (.*)\?$", item.text)
        assert asked is not None
        assert item.text.count(f"{asked[1]}.") == 1
        assert f"{item.answer} {asked[1]}." in item.text


def test_weekdays_are_right(made: dict[str, list[Item]]) -> None:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for item in made["weekday"]:
        found = re.fullmatch(r"(\d) days? (after|before) (\w+), (\w+) (\d+)", item.text)
        assert found is not None, item.text
        ahead = int(found[1]) * (1 if found[2] == "after" else -1)
        assert days[(days.index(found[3]) + ahead) % 7] == item.answer
        month = [date(2022, month, 1).strftime("%B") for month in range(1, 13)].index(found[4]) + 1
        assert (date(2022, month, int(found[5])) + timedelta(ahead)).strftime("%A") == item.answer


def test_a_brother_has_one_sister_more(made: dict[str, list[Item]]) -> None:
    for item in made["siblings"]:
        sisters = re.search(r"(\d+) sister", item.text)
        assert sisters is not None
        assert int(item.answer) == int(sisters[1]) + 1
        name = item.text.split()[0]
        assert item.text.endswith(f"How many sisters does {name}'s brother have?")
        assert not re.search(r"\b1 (sisters|brothers)", item.text)


def test_lists_are_reversed(made: dict[str, list[Item]]) -> None:
    for item in made["reverse"]:
        words = item.text.split(", ")
        assert item.answer == ", ".join(words[::-1])
        assert item.answer != item.text


def test_family_relations_name_the_first_person(made: dict[str, list[Item]]) -> None:
    known = set()
    for item in made["family"]:
        asked = re.search(r"What is (\w+) to (\w+)\?$", item.text)
        assert asked is not None
        first, second = asked.groups()
        known.add(item.answer)
        couple = re.search(rf"\b({first} is married to {second}|{second} is married to {first})\.", item.text)
        assert bool(couple) == (item.answer in {"husband", "wife"}), item.text
        assert "in-law" not in item.answer
    assert {"husband", "wife", "father", "mother", "son"} <= known


def test_no_text_and_no_seed_is_in_two_splits(made: dict[str, list[Item]]) -> None:
    for items in made.values():
        assert len({item.text for item in items}) == len(items)
        assert len({item.key for item in items}) == len(items)
        assert {item.split for item in items} == {"train", "valid", "test"}
    splits = assign(clean(item for items in made.values() for item in items)[0])
    assert all(item.split == split for split, items in splits.items() for item in items)


def test_an_equal_text_stays_in_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(puzzle: Puzzle, first: int, count: int) -> list[dict[str, object]]:
        texts = {0: ["1 + 1", "1 + 2", "1 + 3"], 1_000_000: ["1 + 3", "1 + 2"], 2_000_000: ["1 + 2"]}[first]
        return [{"answer": "?", "metadata": {"expression": text}} for text in texts]

    monkeypatch.setattr(reasoning, "make_entries", made_up)
    found = {item.text: (item.split, item.key) for item in puzzle_items("sum")}
    assert found == {
        "1 + 1": ("train", "chain_sum:0"),
        "1 + 3": ("valid", "chain_sum:1000000"),
        "1 + 2": ("test", "chain_sum:2000000"),
    }


def test_items_are_the_same_every_time_and_hang_on_their_seed_alone(made: dict[str, list[Item]]) -> None:
    assert puzzle_items("family") == made["family"]
    puzzle = PUZZLES["family"]
    whole = [dict(entry) for entry in reasoning.make_entries(puzzle, 5, 4)]
    alone = [dict(next(iter(reasoning.make_entries(puzzle, seed, 1)))) for seed in range(5, 9)]
    assert [(one["question"], one["answer"]) for one in whole] == [(one["question"], one["answer"]) for one in alone]


def test_reserved_seeds_are_refused() -> None:
    pytest.importorskip("reasoning_gym", reason="makes the puzzles")
    with pytest.raises(DataError, match="9000000 is reserved"):
        reasoning.make_entries(PUZZLES["sum"], FIRST_RESERVED_SEED - 5, 6)
    assert len(list(reasoning.make_entries(PUZZLES["sum"], FIRST_RESERVED_SEED - 5, 5))) == 5
    ends = [(first, first + count) for first, count in RANGES.values()]
    assert sorted(ends) == ends
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= FIRST_RESERVED_SEED


def test_the_generators_scorer_works_on_what_is_kept(made: dict[str, list[Item]]) -> None:
    from reasoning_gym.factory import get_score_answer_fn

    for task, items in made.items():
        scored = DOMAIN.tasks[task].scorer == "reasoning"
        assert scored == (PUZZLES[task].kept is not None)
        for item in items:
            assert bool(item.facts) == scored
            if scored:
                score = get_score_answer_fn(item.facts["dataset"])
                assert score(item.answer, item.facts["entry"]) == 1.0
                assert score("Someday", item.facts["entry"]) == 0.0


def test_rows_are_short(made: dict[str, list[Item]]) -> None:
    for items in made.values():
        assert max(len(item.text) for item in items) <= 230
        assert max(len(item.answer) for item in items) <= 40


@pytest.mark.parametrize("task", PUZZLES)
def test_wordings(task: str) -> None:
    wordings = DOMAIN.tasks[task].wordings
    assert len(set(wordings)) == len(wordings) >= 5
    assert all(wording.count("{}") == 1 for wording in wordings)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingExtraError, match=r"xloom\[suite\]"):
        puzzle_items("sum")


def test_a_question_that_two_statements_answer_is_left_out() -> None:
    question = "\nWho likes tea? Reply only with a name."
    assert reasoning.who_text({"question": f"Ann likes tea. Bob hates tea. {question}"}).endswith("Who likes tea?")
    assert reasoning.who_text({"question": f"Ann likes tea. Bob likes tea. {question}"}) == ""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError
from xloom.suite.items import (
    SPLITS,
    Item,
    Row,
    Task,
    assign,
    choose,
    clean,
    fraction,
    join_questions,
    split_of,
    to_row,
)
from xloom.suite.reserved import is_reserved

CHOICE = Task(("Is {} a or b?",), answers=("a", "b"))
OPEN = Task(("How much is {}?",), scorer="number", options={"tolerance": 0.5})


def item(key: str, answer: str = "yes", task: str = "t", **more: Any) -> Item:
    return Item(task, key, answer, key, more.pop("group", key), **more)


items = st.builds(
    item,
    st.integers(0, 60).map(str),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["one", "two"]),
    group=st.integers(0, 9).map("g{}".format),
    split=st.sampled_from([None, None, *SPLITS]),
    other_keys=st.lists(st.integers(0, 60).map(str), max_size=2).map(tuple),
    reserved=st.booleans(),
)


def test_cleaning_drops_and_counts() -> None:
    assert is_reserved("9")
    kept, dropped = clean(
        [
            item("9"),
            item("a", other_keys=("9",)),
            item("a", reserved=True),
            item("b"),
            item("b", "no"),
            item("b", "no", task="other"),
            item("x", "no"),
            item("x", "no", split="test"),
        ]
    )
    assert kept == [item("b", "no", task="other"), item("x", "no", split="test")]
    assert dropped == {"reserved": 3, "contradicting": 2, "repeated": 1}


def test_a_question_met_again_under_another_key_is_a_repetition() -> None:
    again = [Item("t", "1 + 1", "2", key, key) for key in ("sum:1", "sum:2")]
    other_answer = Item("t", "1 + 1", "two", "sum:3", "sum:3")
    assert clean([*again, other_answer]) == (
        [again[1], other_answer],
        {"reserved": 0, "contradicting": 0, "repeated": 1},
    )


@given(st.lists(items, max_size=40))
def test_what_cleaning_leaves(found: list[Item]) -> None:
    kept, dropped = clean(iter(found))
    assert len(found) == len(kept) + sum(dropped.values())
    for one in kept:
        assert not one.reserved
        assert not any(map(is_reserved, (one.key, *one.other_keys)))
    assert len({(one.task, one.key) for one in kept}) == len(kept)
    hidden = {one.reserved or any(map(is_reserved, (one.key, *one.other_keys))) for one in found}
    if hidden == {False} and len({(one.task, one.key) for one in found}) == len(found):
        assert kept == found


@given(st.lists(items, max_size=40))
def test_no_group_is_in_two_splits_and_nothing_is_lost(found: list[Item]) -> None:
    splits = assign(iter(found))
    homes: dict[str, set[str]] = {}
    for split, here in splits.items():
        for one in here:
            homes.setdefault(one.group, set()).add(split)
    assert all(len(split) == 1 for split in homes.values())
    assert Counter(one.key for here in splits.values() for one in here) == Counter(one.key for one in found)


def test_without_a_split_of_the_table_nothing_but_the_group_decides() -> None:
    few, many = [item("k", group="g1")], [item(f"k{n}", group=f"g{n % 7}") for n in range(40)]
    for found in (few, many):
        for split, here in assign(found).items():
            assert all(split_of(one.group) == split for one in here)


def test_a_split_of_the_table_is_kept_for_the_whole_group() -> None:
    train = next(f"g{n}" for n in range(99) if split_of(f"g{n}") == "train")
    test = next(f"g{n}" for n in range(99) if split_of(f"g{n}") == "test")
    found = assign(
        [
            item("a", group=train, split="test"),
            item("b", group=train),
            item("c", group=test, split="train"),
            item("d", group="x", split="valid"),
            item("e", group="x", split="test"),
            item("f", group="x", split="train"),
        ]
    )
    assert {split: [one.key for one in here] for split, here in found.items()} == {
        "train": ["c"],
        "valid": [],
        "test": ["a", "b", "d", "e", "f"],
    }


def test_shares_of_the_splits() -> None:
    shares = Counter(split_of(str(number)) for number in range(10_000))
    assert abs(shares["test"] - 1500) < 110  # three standard errors
    assert abs(shares["valid"] - 1500) < 110


@given(st.lists(st.sampled_from("aab"), max_size=60), st.integers(2, 40), st.randoms(use_true_random=False))
def test_answers_are_balanced_whatever_the_order(answers: list[str], size: int, order: Any) -> None:
    found = [item(str(number), answer) for number, answer in enumerate(answers)]
    chosen = choose(found, CHOICE, size)
    each = min(size // 2, answers.count("a"), answers.count("b"))
    assert Counter(one.answer for one in chosen) == Counter({"a": each, "b": each})
    keys = {one.key for one in chosen}
    assert len(keys) == len(chosen) and keys <= {one.key for one in found}
    order.shuffle(found)
    assert choose(found, CHOICE, size) == chosen


@given(st.integers(0, 50), st.integers(1, 40))
def test_open_answers_are_chosen_by_hash(count: int, size: int) -> None:
    found = [item(str(number), str(number)) for number in range(count)]
    chosen = choose(found, OPEN, size)
    assert len({one.key for one in chosen}) == min(count, size)
    assert chosen == choose(found[::-1], OPEN, size)
    assert choose(found, OPEN, size - 1) == chosen[: size - 1], "more rows keep the earlier ones"


def test_every_prefix_is_about_balanced_when_one_answer_is_rare() -> None:
    found = [item(str(number), "a" if number % 10 else "b") for number in range(4000)]
    half = choose(found, CHOICE, 800)[:400]
    assert abs(Counter(one.answer for one in half)["a"] - 200) < 45


def test_an_answer_that_is_none_of_the_tasks_is_refused() -> None:
    with pytest.raises(DataError, match="t: k has the answer 'c', expected one of a, b"):
        choose([item("k", "c")], CHOICE, 2)


def test_a_row() -> None:
    task = Task(("Is {} ok? {1}",), "number", {"tolerance": 0.5, "table": "x.json"})
    assert to_row("things", task, item("[C@H]{}", "7.1", facts={"target": 7.1})) == {
        "prompt": [{"role": "user", "content": "Is [C@H]{} ok? {1}"}],
        "completion": [{"role": "assistant", "content": "7.1"}],
        "domain": "things",
        "task": "t",
        "key": "[C@H]{}",
        "scorer": "number",
        "options": {"tolerance": 0.5, "table": "x.json", "target": 7.1},
    }


def test_wordings_are_used_alike_and_fixed_by_the_key() -> None:
    task = Task(tuple(f"{number}: {{}}" for number in range(5)))
    texts = [to_row("d", task, item(f"k{n}"))["prompt"][0]["content"] for n in range(1000)]
    assert min(Counter(text[0] for text in texts).values()) > 150
    assert texts == [to_row("d", task, item(f"k{n}", "no"))["prompt"][0]["content"] for n in range(1000)]


def row(number: int, domain: str = "d") -> Row:
    return to_row(domain, OPEN, item(f"k{number}", f"{number}.5", task=f"t{number}"))


@given(st.lists(st.integers(1, 99), min_size=2, max_size=3, unique=True), st.text())
def test_joined_questions_keep_every_word_and_answer_in_order(numbers: list[int], seed: str) -> None:
    rows = [row(number) for number in numbers]
    joined = join_questions(rows, seed)
    (message,) = joined["prompt"]
    text, places = message["content"], [-1]
    for one in rows:
        question = one["prompt"][0]["content"]
        places.append(text.index(question, places[-1] + 1))
    rest = text
    for one in rows:
        rest = rest.replace(one["prompt"][0]["content"], "", 1)
    words = set(re.findall(r"\w+|;", rest.lower()))
    assert words & {"semicolon", "semicolons", ";"}
    assert not words & ({"both", "two"} if len(rows) == 3 else {"all", "three"})
    assert "{" not in rest
    assert joined["completion"] == [{"role": "assistant", "content": "; ".join(f"{n}.5" for n in numbers)}]
    assert joined["scorer"] == "parts"
    assert joined["options"]["parts"] == [
        {"answer": f"{n}.5", "scorer": "number", "options": {"tolerance": 0.5}} for n in numbers
    ]


def test_joined_questions_name_where_they_come_from() -> None:
    joined = join_questions([row(1, "a"), row(2, "b"), row(3, "a")], "x")
    assert (joined["domain"], joined["task"], joined["key"]) == ("a+b", "t1+t2+t3", "k1+k2+k3")
    assert join_questions([row(1), row(2)], "x")["domain"] == "d"
    assert set(joined) == set(row(1))


def test_many_forms_of_joining() -> None:
    texts = {join_questions([row(1), row(2)], str(seed))["prompt"][0]["content"] for seed in range(200)}
    assert len(texts) >= 6


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(DataError, match="x: 1 questions to join, expected 2 or 3"):
        join_questions([row(1)], "x")
    with pytest.raises(DataError, match="x: 4 questions"):
        join_questions([row(n) for n in range(4)], "x")
    listed = to_row("d", OPEN, item("k", "1; 2"))
    with pytest.raises(DataError, match="d, k: only single questions"):
        join_questions([row(1), listed], "x")
    talk = row(2) | {"prompt": row(2)["prompt"] * 3}
    with pytest.raises(DataError, match="d, k2: only single questions"):
        join_questions([row(1), talk], "x")


def test_fractions_spread_and_do_not_follow_the_reserved_digest() -> None:
    places = [fraction("split", str(number)) for number in range(4000)]
    assert min(places) >= 0 and max(places) < 1
    free = [place for number, place in enumerate(places) if not is_reserved(str(number))]
    assert abs(sum(free) / len(free) - 0.5) < 0.015
    assert fraction("split", "a") != fraction("choice", "a")

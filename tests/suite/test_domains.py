import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError, NotFoundError
from xloom.suite.domains import (
    DOMAINS,
    DomainFiles,
    assign,
    balance,
    build_domain,
    clean,
    find_domain,
    split_of,
    to_row,
)
from xloom.suite.fetch import CRABNET
from xloom.suite.reserved import is_reserved
from xloom.suite.tables import Item, parse_formula, reduce_formula

MEMBER = "crabnet/data/benchmark_data/mp_bulk_modulus/{}.csv"
SIZES = {"train": 60, "valid": 10, "test": 10}
ELEMENTS = ["Ag", "Al", "B", "C", "Ca", "Cl", "Fe", "Ge", "K", "Mg", "Na", "O", "S", "Si", "Zn"]


def formulas() -> list[str]:
    """Four compounds in each system of two elements."""
    pairs = [(one, other) for one in ELEMENTS for other in ELEMENTS if one < other]
    return [f"{one}{count}{other}7" for one, other in pairs for count in (2, 3, 5, 11)]


class Store:
    """Serves one wheel of made-up materials and counts how often it is asked."""

    def __init__(self, folder: Path, lines: list[str]) -> None:
        self.calls, self.wheel = 0, folder / "table.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for part, found in (("train", lines[::2]), ("val", lines[1::4]), ("test", lines[3::4])):
                archive.writestr(MEMBER.format(part), "\n".join(["formula,target", *found, ""]))

    def __call__(self, package: object, progress: object) -> Path:
        assert package is CRABNET
        self.calls += 1
        return self.wheel


@pytest.fixture
def store(tmp_path: Path) -> Store:
    lines = [f"{formula},{index % 2}" for index, formula in enumerate(formulas())]
    return Store(tmp_path, lines)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def formula_in(row: dict[str, Any]) -> str:
    words = row["prompt"][0]["content"].replace(":", " ").replace("?", " ").split()
    (formula,) = [word for word in words if word in set(formulas())]
    return formula


def splits(files: DomainFiles) -> dict[str, list[dict[str, Any]]]:
    return {"train": rows(files.train), "valid": rows(files.valid), "test": rows(files.test)}


def test_rows_are_chats_with_short_answers(store: Store, tmp_path: Path) -> None:
    files = build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    wordings = Counter()
    for split, size in SIZES.items():
        found = splits(files)[split]
        assert len(found) == size
        for row in found:
            formula = formula_in(row)
            answer = "stiff" if formulas().index(formula) % 2 else "soft"
            assert row == {
                "prompt": [{"role": "user", "content": row["prompt"][0]["content"]}],
                "completion": [{"role": "assistant", "content": answer}],
                "domain": "materials",
            }
            wordings[row["prompt"][0]["content"].replace(formula, "{}")] += 1
    assert set(wordings) == set(find_domain("materials").wordings)


def test_no_reserved_row_and_no_shared_group(store: Store, tmp_path: Path) -> None:
    files = build_domain("materials", tmp_path / "out", train=400, valid=400, test=400, fetcher=store)
    written = [(split, formula_in(row)) for split, found in splits(files).items() for row in found]
    assert len({formula for _, formula in written}) == len(written) > 200
    assert not any(is_reserved(formula) or is_reserved(reduce_formula(formula)) for _, formula in written)
    homes: dict[str, set[str]] = {}
    for split, formula in written:
        homes.setdefault("-".join(parse_formula(formula)), set()).add(split)
    assert {len(found) for found in homes.values()} == {1}


def test_the_card(store: Store, tmp_path: Path) -> None:
    files = build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    card = json.loads(files.card.read_text())
    hidden = sum(is_reserved(formula) or is_reserved(reduce_formula(formula)) for formula in formulas())
    assert hidden > 0
    assert card["dropped"] == {"reserved": hidden, "contradicting": 0, "repeated": 0}
    assert card["rows"] == SIZES
    assert card["test_majority"] == 0.5
    assert (card["package"], card["version"], card["licence"]) == ("crabnet", "2.0.8", "MIT")
    assert {"train", "valid", "test"} < set(card["settings"])


def test_row_order_of_the_table_changes_nothing(store: Store, tmp_path: Path) -> None:
    lines = [f"{formula},{index % 2}" for index, formula in enumerate(formulas())]
    random.Random(0).shuffle(lines)
    (tmp_path / "other").mkdir()
    one = build_domain("materials", tmp_path / "one", **SIZES, fetcher=store)
    two = build_domain("materials", tmp_path / "two", **SIZES, fetcher=Store(tmp_path / "other", lines))
    for name in ("train", "valid", "test", "card"):
        assert getattr(one, name).read_bytes() == getattr(two, name).read_bytes()


def test_a_second_call_returns_at_once_and_other_settings_build_anew(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = build_domain("materials", folder, **SIZES, fetcher=store)
    assert build_domain("materials", folder, **SIZES, fetcher=store) == first
    assert store.calls == 1
    build_domain("materials", folder, train=20, valid=10, test=10, fetcher=store)
    assert store.calls == 2
    assert len(rows(first.train)) == 20
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "table.whl"]


def test_a_missing_split_is_built_again(store: Store, tmp_path: Path) -> None:
    files = build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    files.valid.unlink()
    build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    assert len(rows(files.valid)) == 10


def test_files_of_others_are_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        build_domain("materials", tmp_path / "mine", **SIZES, fetcher=store)
    assert (tmp_path / "mine" / "train.jsonl").read_text() == "precious"
    with pytest.raises(DataError, match="is a file"):
        build_domain("materials", tmp_path / "mine" / "train.jsonl", **SIZES, fetcher=store)


def test_notes_in_a_built_folder_are_not_deleted(store: Store, tmp_path: Path) -> None:
    build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    (tmp_path / "out" / "notes.txt").write_text("precious")
    build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    with pytest.raises(DataError, match="holds other files"):
        build_domain("materials", tmp_path / "out", train=20, valid=10, test=10, fetcher=store)
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def test_a_table_without_an_answer_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, [f"{formula},1" for formula in formulas()[:2]])
    with pytest.raises(DataError, match="materials: the table leaves no train rows with every one of soft, stiff"):
        build_domain("materials", tmp_path / "out", **SIZES, fetcher=store)
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused_before_any_fetch(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no demo domain 'metals'; there are materials, peptides, solubility"):
        build_domain("metals", tmp_path / "out", fetcher=store)
    with pytest.raises(DataError, match="solubility: valid=1, expected at least one row for each of 2 answers"):
        build_domain("solubility", tmp_path / "out", valid=1, fetcher=store)
    assert store.calls == 0


def item(key: str, label: str, **more: Any) -> Item:
    return Item(key, key, more.pop("group", key), label, **more)


def test_cleaning_drops_and_counts() -> None:
    items = [
        item("9", "yes"),  # reserved key
        item("a", "yes", other_keys=("9",)),
        item("a", "yes", reserved=True),
        item("b", "yes"),
        item("b", "no"),
        item("x", "no"),
        item("x", "no", split="test"),
    ]
    kept, dropped = clean(find_domain("materials"), items)
    assert kept == [item("x", "no", split="test")]
    assert dropped == {"reserved": 3, "contradicting": 2, "repeated": 1}


@given(st.lists(st.sampled_from([item(f"k{n}", "yes", group=f"g{n % 7}") for n in range(40)]), unique=True))
def test_a_group_is_in_one_split_whatever_else_is_there(items: list[Item]) -> None:
    for split, found in assign(items).items():
        assert all(split_of(one.group) == split for one in found)
    assert sum(map(len, assign(items).values())) == len(items)


def test_shares_of_the_splits() -> None:
    shares = Counter(split_of(str(number)) for number in range(10_000))
    assert abs(shares["test"] - 1500) < 110  # three standard errors
    assert abs(shares["valid"] - 1500) < 110


def test_a_test_split_of_the_table_is_kept() -> None:
    items = [item(str(number), "yes", split="test" if number < 50 else None) for number in range(1000)]
    found = assign(items)
    assert [one.key for one in found["test"]] == [str(number) for number in range(50)]
    assert 100 < len(found["valid"]) < 190


@given(st.lists(st.sampled_from("aab"), max_size=60), st.integers(2, 40))
def test_answers_are_balanced(labels: list[str], size: int) -> None:
    items = [item(str(number), label) for number, label in enumerate(labels)]
    chosen = balance(items, ("a", "b"), size)
    each = min(size // 2, labels.count("a"), labels.count("b"))
    assert Counter(one.label for one in chosen) == Counter({"a": each, "b": each})
    assert set(chosen) <= set(items)
    assert len(set(chosen)) == len(chosen)


def test_every_prefix_is_about_balanced_when_one_answer_is_rare() -> None:
    items = [item(str(number), "a" if number % 10 else "b") for number in range(4000)]
    half = balance(items, ("a", "b"), 800)[:400]
    assert abs(Counter(one.label for one in half)["a"] - 200) < 45


@pytest.mark.parametrize("name", DOMAINS)
def test_every_wording_takes_the_item(name: str) -> None:
    domain = find_domain(name)
    assert len(domain.wordings) in (3, 4)
    texts = {to_row(name, domain, item(f"key{n}", domain.answers[0]))["prompt"][0]["content"] for n in range(200)}
    assert len(texts) == 200
    assert all("key" in text for text in texts)

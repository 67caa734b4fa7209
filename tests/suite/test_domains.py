import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xloom.errors import DataError, NotFoundError
from xloom.hub import fetch
from xloom.hub.fetch import Package
from xloom.suite import domains
from xloom.suite.domains import DOMAINS, DomainFiles, build_domain, build_suite, find_domain
from xloom.suite.items import Domain, Item, Read, Task, split_of
from xloom.suite.reserved import is_reserved

PACKAGE = Package("some-table", "1.0", "00", 1, "MIT")
SIZES = {"train": 60, "valid": 12, "test": 12}
SIZE = Task(("How big is {}?", "Size of {}:"), "number", {"tolerance": 1})
PARITY = Task(("Is {} odd or even?", "Odd or even: {}"), answers=("odd", "even"), share=2)


def read_numbers(read: Read) -> Iterator[Item]:
    """Each number of the table in two tasks; tens are groups."""
    for line in read(PACKAGE, "numbers.txt").decode().split():
        number = int(line)
        yield Item("size", line, str(number % 10), line, str(number // 10), facts={"number": number})
        yield Item("parity", line, "odd" if number % 2 else "even", line, str(number // 10))


NUMBERS = Domain("about numbers", (PACKAGE,), read_numbers, {"size": SIZE, "parity": PARITY})


class Store:
    """Serves one wheel of numbers and counts how often it is asked."""

    def __init__(self, folder: Path, numbers: list[int]) -> None:
        self.calls, self.wheel = 0, folder / "table.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("numbers.txt", " ".join(map(str, numbers)))

    def __call__(self, package: object, progress: object) -> Path:
        assert package is PACKAGE
        self.calls += 1
        return self.wheel


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setitem(DOMAINS, "numbers", NUMBERS)
    return Store(tmp_path, list(range(1000)))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def splits(files: DomainFiles) -> dict[str, list[dict[str, Any]]]:
    return {"train": rows(files.train), "valid": rows(files.valid), "test": rows(files.test)}


def singles(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in found if row["scorer"] != "parts"]


def test_rows_are_shared_among_the_tasks(store: Store, tmp_path: Path) -> None:
    files = build_domain("numbers", tmp_path / "out", **SIZES, pairs=0.0, fetcher=store)
    for split, size in SIZES.items():
        found = splits(files)[split]
        assert Counter(row["task"] for row in found) == {"size": size // 3, "parity": 2 * size // 3}
        parity = Counter(row["completion"][0]["content"] for row in found if row["task"] == "parity")
        assert set(parity.values()) == {size // 3}
    row = next(row for row in rows(files.train) if row["task"] == "size")
    number = int(row["key"])
    assert row["options"] == {"tolerance": 1, "number": number}
    assert row["completion"] == [{"role": "assistant", "content": str(number % 10)}]


def test_no_reserved_row_and_no_shared_group(store: Store, tmp_path: Path) -> None:
    files = build_domain("numbers", tmp_path / "out", train=2000, valid=2000, test=2000, fetcher=store)
    written = [(split, key) for split, found in splits(files).items() for row in found for key in row["key"].split("+")]
    assert len(written) > 1500
    assert not any(is_reserved(key) for _, key in written)
    assert all(split_of(str(int(key) // 10)) == split for split, key in written)


def test_some_rows_ask_two_questions_but_never_in_the_test(store: Store, tmp_path: Path) -> None:
    files = build_domain("numbers", tmp_path / "out", train=90, valid=30, test=30, pairs=0.2, fetcher=store)
    found = splits(files)
    assert {split: len(found[split]) for split in found} == {"train": 90, "valid": 30, "test": 30}
    counts = {split: len(found[split]) - len(singles(found[split])) for split in found}
    assert counts == {"train": 18, "valid": 6, "test": 0}
    asked = [
        (task, key)
        for row in found["train"]
        for task, key in zip(row["task"].split("+"), row["key"].split("+"), strict=True)
    ]
    assert len(asked) == len(set(asked)) == 108, "no question is asked twice"
    first_half = found["train"][:45]
    assert 4 <= len(first_half) - len(singles(first_half)) <= 14, "they are spread over the file"


def test_the_card(store: Store, tmp_path: Path) -> None:
    files = build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)
    card = json.loads(files.card.read_text())
    hidden = sum(is_reserved(str(number)) for number in range(1000))
    assert hidden > 0
    assert card["dropped"] == {"reserved": 2 * hidden, "contradicting": 0, "repeated": 0}
    assert card["rows"] == {split: len(found) for split, found in splits(files).items()}
    assert card["rows_of_two_questions"] == {
        split: len(found) - len(singles(found)) for split, found in splits(files).items()
    }
    assert card["packages"] == [{"name": "some-table", "version": "1.0", "licence": "MIT", "sha256": "00"}]
    assert card["tasks"]["parity"]["items"]["test"] == 8
    assert card["tasks"]["parity"]["wordings"] == 2
    assert card["tasks"]["parity"]["test_constant"] == 0.5
    values = [int(row["completion"][0]["content"]) for row in rows(files.test) if row["task"] == "size"]
    best = max(sum(abs(value - guess) <= 1 for value in values) for guess in values)
    assert card["tasks"]["size"]["test_constant"] == best / len(values) > 0.25
    assert card["groups"]["test"] == len({int(row["key"]) // 10 for row in rows(files.test)})


@pytest.mark.parametrize(
    ("answers", "task", "best"),
    [
        (["a", "b", "a"], replace(PARITY, scorer="exact"), 2 / 3),
        (["1.0", "1.5", "-1.5", "9"], replace(SIZE, options={"tolerance": 0.5}), 0.5),
        (["[0.1,0.9]", "[0.15,0.2]", "[0.9,0.2]"], replace(SIZE, scorer="numbers", options={"tolerance": 0.1}), 2 / 3),
        (["CO", "CO"], replace(SIZE, scorer="molecule"), None),
    ],
)
def test_what_the_best_constant_answer_scores(answers: list[str], task: Task, best: float | None) -> None:
    assert domains._best_constant(answers, task) == (best if best is None else pytest.approx(best))


def test_row_order_of_the_table_changes_nothing(store: Store, tmp_path: Path) -> None:
    shuffled = list(range(1000))
    random.Random(0).shuffle(shuffled)
    (tmp_path / "other").mkdir()
    one = build_domain("numbers", tmp_path / "one", **SIZES, fetcher=store)
    two = build_domain("numbers", tmp_path / "two", **SIZES, fetcher=Store(tmp_path / "other", shuffled))
    for name in ("train", "valid", "test", "card"):
        assert getattr(one, name).read_bytes() == getattr(two, name).read_bytes()


def test_a_second_call_returns_at_once_and_other_settings_build_anew(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    first = build_domain("numbers", folder, **SIZES, fetcher=store)
    assert build_domain("numbers", folder, **SIZES, fetcher=store) == first
    assert store.calls == 1
    build_domain("numbers", folder, train=30, valid=12, test=12, fetcher=store)
    assert store.calls == 2
    assert len(rows(first.train)) == 30
    build_domain("numbers", folder, train=30, valid=12, test=12, pairs=0.5, fetcher=store)
    assert store.calls == 3
    other = replace(SIZE, wordings=("{}!",))
    monkeypatch.setitem(DOMAINS, "numbers", replace(NUMBERS, tasks={"size": other, "parity": PARITY}))
    build_domain("numbers", folder, train=30, valid=12, test=12, pairs=0.5, fetcher=store)
    assert store.calls == 4
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "table.whl"]


def test_extra_files_lie_beside_the_rows(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extra(read: Read) -> dict[str, Any]:
        return {"lookup.json": {"b": len(read(PACKAGE, "numbers.txt")), "a": 1}}

    monkeypatch.setitem(DOMAINS, "numbers", replace(NUMBERS, extra=extra))
    folder = tmp_path / "out"
    build_domain("numbers", folder, **SIZES, fetcher=store)
    assert json.loads((folder / "lookup.json").read_text()) == {"a": 1, "b": 3889}
    build_domain("numbers", folder, **SIZES, fetcher=store)
    assert store.calls == 1
    (folder / "lookup.json").unlink()
    build_domain("numbers", folder, **SIZES, fetcher=store)
    assert store.calls == 2
    monkeypatch.setitem(DOMAINS, "numbers", NUMBERS)
    build_domain("numbers", folder, train=30, valid=12, test=12, fetcher=store)
    assert not (folder / "lookup.json").exists()


def test_a_missing_split_is_built_again(store: Store, tmp_path: Path) -> None:
    files = build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)
    files.valid.unlink()
    build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)
    assert len(rows(files.valid)) == 12


def test_files_of_others_are_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        build_domain("numbers", tmp_path / "mine", **SIZES, fetcher=store)
    assert (tmp_path / "mine" / "train.jsonl").read_text() == "precious"
    with pytest.raises(DataError, match="is a file"):
        build_domain("numbers", tmp_path / "mine" / "train.jsonl", **SIZES, fetcher=store)


def test_notes_in_a_built_folder_are_not_deleted(store: Store, tmp_path: Path) -> None:
    build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)
    (tmp_path / "out" / "notes.txt").write_text("precious")
    build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)
    with pytest.raises(DataError, match="holds other files"):
        build_domain("numbers", tmp_path / "out", train=30, valid=12, test=12, fetcher=store)
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def test_a_table_that_leaves_a_task_without_rows_is_refused(store: Store, tmp_path: Path) -> None:
    even = Store(tmp_path, list(range(0, 1000, 2)))
    with pytest.raises(DataError, match="leaves the task parity no train rows with every one of odd, even"):
        build_domain("numbers", tmp_path / "out", **SIZES, fetcher=even)
    assert not (tmp_path / "out").exists()


def test_an_item_of_no_task_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DOMAINS, "numbers", replace(NUMBERS, tasks={"size": SIZE}))
    with pytest.raises(DataError, match=r"numbers: \d+ is of the task 'parity', expected one of size"):
        build_domain("numbers", tmp_path / "out", **SIZES, fetcher=store)


def test_bad_arguments_are_refused_before_any_fetch(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no built-in domain 'metals'; there are .*materials"):
        build_domain("metals", tmp_path / "out", fetcher=store)
    with pytest.raises(DataError, match="numbers: valid=2 leaves 1 rows for the task parity, expected 2 or more"):
        build_domain("numbers", tmp_path / "out", valid=2, fetcher=store)
    with pytest.raises(DataError, match="numbers: pairs=1.5, expected a share from 0 to 1"):
        build_domain("numbers", tmp_path / "out", pairs=1.5, fetcher=store)
    assert store.calls == 0


def test_the_suite_is_every_domain_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(name: str, folder: Path, *, progress: object) -> tuple[str, Path]:
        built.append((name, folder))
        return name, folder

    monkeypatch.setattr(domains, "build_domain", build)
    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path))
    assert build_suite(only=["peptides"]) == {"peptides": ("peptides", tmp_path / "suite" / "peptides")}
    assert list(build_suite(tmp_path / "x")) == list(DOMAINS)
    assert built[1:] == [(name, tmp_path / "x" / name) for name in DOMAINS]
    built.clear()
    with pytest.raises(NotFoundError, match="'metals'"):
        build_suite(only=["materials", "metals"])
    assert built == []


def test_the_domains() -> None:
    assert list(DOMAINS) == ["quantum", "physical", "structure", "materials", "peptides", "mechanics", "reasoning"]


@pytest.mark.parametrize("name", list(DOMAINS))
def test_a_domain_is_sound(name: str) -> None:
    domain = find_domain(name)
    assert domain.about and "\n" not in domain.about
    assert all(package in vars(fetch).values() for package in domain.packages), "pinned in one place"
    for task in domain.tasks.values():
        formal = re.fullmatch(r"\w+<\{\}>", task.wordings[0])  # the X-LoRA paper's way to ask
        assert len(set(task.wordings)) == len(task.wordings) >= (1 if formal else 5)
        assert all("{}" in wording for wording in task.wordings)
        assert task.share > 0
        assert len(set(task.answers)) == len(task.answers) != 1
        for answer in task.answers if len(task.answers) <= 4 else ():
            assert any(answer in wording for wording in task.wordings), "the answers of a choice are said"
        json.dumps(dict(task.options))

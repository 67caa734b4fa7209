"""Sets of rows by name; nothing is fetched here."""

from pathlib import Path

import pytest

from xloom.errors import NotFoundError
from xloom.suite import shelf
from xloom.suite.domains import DomainFiles
from xloom.suite.shelf import find_rows, rows_of
from xloom.training.rows import Source, find_source


def test_general_rows_need_nothing_but_the_package(tmp_path: Path):
    files = rows_of("general", tmp_path)
    assert files.test == tmp_path / "general" / "test.jsonl"
    assert files.test.stat().st_size


def fake_builders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builders that write empty files; gives the list of what was built."""
    built: list[str] = []

    def build(name: str, folder: Path) -> DomainFiles:
        built.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {part: folder / part for part in ("train", "valid", "test", "card")}
        for path in paths.values():
            path.touch()
        return DomainFiles(name, **paths)

    monkeypatch.setattr(shelf, "build_domain", lambda name, folder, progress: build(name, folder))
    monkeypatch.setattr(shelf, "build_suite", lambda root, progress: {"materials": build("materials", root / "m")})
    monkeypatch.setattr(
        shelf, "build_composite", lambda domains, root: {name: build(name, root / name) for name in shelf.FAMILIES}
    )
    monkeypatch.setattr(shelf, "build_unseen", lambda folder, progress: build("unseen", folder))
    return built


def test_a_process_builds_each_set_of_the_cache_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    built = fake_builders(monkeypatch)
    first = rows_of("joined")
    assert built == ["materials", "joined", "conversation"]
    assert rows_of("joined") == first
    rows_of("conversation")
    rows_of("materials")
    assert rows_of("unseen") == rows_of("unseen")
    assert built == ["materials", "joined", "conversation", "unseen"]
    first.test.unlink()  # somebody tidied up
    assert rows_of("joined").test.is_file()
    assert built[4:] == ["materials", "joined", "conversation"]
    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path / "another"))
    assert rows_of("unseen").test.is_relative_to(tmp_path / "another")
    for _ in range(2):
        rows_of("unseen", tmp_path / "own")
    assert built[7:] == ["unseen"] * 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("suite:material:train", "did you mean 'materials'"),
        ("suite:materials:tests", "a split of train, valid, test, found 'tests'"),
        ("suite:materials", "found ''"),
        ("suite::train", "no set of rows ''"),
    ],
)
def test_misspelt_names_are_said(word: str, said: str):
    with pytest.raises(NotFoundError, match=said):
        find_rows(word)


def test_a_set_without_rows_in_a_split_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    empty = tmp_path / "train.jsonl"
    empty.touch()
    files = DomainFiles("unseen", train=empty, valid=empty, test=empty, card=empty)
    monkeypatch.setattr(shelf, "rows_of", lambda name: files)
    with pytest.raises(NotFoundError, match="suite:unseen:train: this set has no train rows"):
        find_rows("suite:unseen:train")


def test_recipes_can_name_rows_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = tmp_path / "train.jsonl"
    rows.write_text("{}\n")
    files = DomainFiles("materials", train=rows, valid=rows, test=rows, card=rows)
    monkeypatch.setattr(shelf, "rows_of", lambda name: files)
    assert find_source("suite:materials:train", tmp_path / "elsewhere") == Source(rows)

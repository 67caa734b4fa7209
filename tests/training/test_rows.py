"""What a recipe's words mean, and the rows that stand there, as plain Python."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import xloom
from toy import chat, write_rows
from xloom.errors import DataError, MissingExtraError, NotFoundError
from xloom.training.rows import Row, Source, find_source, fingerprint, read_rows

MESSAGES = "system, user, assistant, tool"
NEEDS_EXTRA = 'the extra "data" is not installed'
PAIR = {"prompt": "a", "completion": "b"}
MIXED = [PAIR, chat("hi", "yo"), {"prompt": "c", "completion": "d"}]


def parts(source: Source | Path) -> list[tuple[Any, Any]]:
    return [(row.prompt, row.completion) for row in read_rows(source)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason=NEEDS_EXTRA)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDS_EXTRA)
    columns = dict.fromkeys(key for row in rows for key in row)
    parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in columns}), path)
    return path


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with a cache of its own."""
    module = pytest.importorskip("datasets", reason=NEEDS_EXTRA)
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, found invalid JSON (Expecting property name enclosed in double quotes)"),
        ("[1]", "expected a JSON object, found list"),
        ('{"prompt": "a"}', "expected 'messages', or 'prompt' and 'completion', found prompt"),
        ('{"prompt": "a", "completion": []}',
         "expected prompt and completion as two strings or two lists, found str and list"),
        ('{"messages": 3}', "messages: expected a list of messages, found int 3"),
        ('{"messages": null}', "messages: expected a list of messages, found NoneType None"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', f"messages[0]: expected a role of {MESSAGES}, found 'bot'"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: expected content as a string, found NoneType"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
         "messages: expected a prompt and then an assistant message, found a last message of role 'user'"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}',
         "completion: expected one assistant message, found user"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{path}:3: {message}"


def test_a_row_is_empty_when_its_completion_is_blank() -> None:
    user = [{"role": "user", "content": "a"}]
    assert [Row("a", text, "x:1").empty for text in ("", " \n", "b")] == [True, True, False]
    assert [Row(user, [{"role": "assistant", "content": text}], "x:1").empty for text in (" ", "b")] == [True, False]


def test_json_is_lines_or_one_array(tmp_path: Path) -> None:
    lines, array = tmp_path / "lines.json", tmp_path / "array.json"
    write_rows(lines, MIXED)
    array.write_text("\n " + json.dumps(MIXED, indent=1))
    assert parts(lines) == parts(array) == parts(write_rows(tmp_path / "rows.jsonl", MIXED))
    assert [row.where for row in read_rows(lines)] == [f"{lines}:{i}" for i in (1, 2, 3)]
    assert [row.where for row in read_rows(array)] == [f"{array}:row {i}" for i in (1, 2, 3)]
    array.write_text('[{"prompt": "a", "completion": "b"}, 7]')
    with pytest.raises(DataError, match=r"array\.json:row 2: expected a JSON object, found int$"):
        list(read_rows(array))
    array.write_text('[{"prompt": "a"')
    with pytest.raises(DataError, match=r"array\.json: expected a JSON object, found invalid JSON"):
        list(read_rows(array))


def test_other_encodings_are_named_and_the_mark_of_utf8_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "é", "completion": "x"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl: expected UTF-8, found another encoding"):
        list(read_rows(path))
    path.write_text('{"prompt": "é", "completion": "x"}\n', encoding="utf-8-sig")
    assert parts(path) == [("é", "x")]


def test_parquet_has_the_rows_of_jsonl(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{**row, "other": i} for i, row in enumerate(MIXED)])
    assert parts(path) == parts(write_rows(tmp_path / "rows.jsonl", MIXED))
    assert [row.where for row in read_rows(path)] == [f"{path}:row {i}" for i in (1, 2, 3)]


def test_keys_that_a_table_filled_with_null_are_not_there(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call, {"function": {"name": "g"}}]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    path = write_parquet(tmp_path / "rows.parquet", [{"messages": messages}])
    assert parts(path) == [(messages[:3], messages[3:])]


def test_bad_parquet_is_named_by_file_and_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [PAIR, {"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"rows\.parquet:row 2: expected 'messages', .*, found prompt$"):
        list(read_rows(path))
    write_parquet(path, [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match=r"rows\.parquet:row 1: expected 'messages', .*, found text, label$"):
        list(read_rows(path))
    path.write_text("no parquet")
    with pytest.raises(DataError, match=r"^\S+rows\.parquet: expected Parquet, found: [^\n]+$"):
        list(read_rows(path))


def test_a_folder_is_a_dataset(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_rows(folder / "train.jsonl", MIXED)
    write_rows(folder / "test.jsonl", [{"prompt": "e", "completion": "f"}, {"prompt": "g"}])
    train, test = find_source("mine", tmp_path), find_source("mine:test", tmp_path)
    assert parts(train) == parts(folder / "train.jsonl")
    assert [row.where for row in read_rows(train)] == [f"{folder}:row {i}" for i in (1, 2, 3)]
    assert [row.prompt for row in islice(read_rows(test), 1)] == ["e"]
    with pytest.raises(DataError, match=r"mine:test:row 2: expected 'messages', .*, found prompt$"):
        list(read_rows(test))
    with pytest.raises(DataError, match=r"mine:valid: expected a dataset, found: [^\n]*valid[^\n]*$"):
        list(read_rows(find_source("mine:valid", tmp_path)))
    assert not list(tmp_path.rglob("*.arrow")), "a folder is not copied"


def test_a_folder_of_parquet_is_a_dataset(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00001.parquet", MIXED)
    assert parts(folder) == parts(write_rows(tmp_path / "rows.jsonl", MIXED))


def test_a_folder_without_data_is_named(tmp_path: Path, datasets: Any) -> None:
    with pytest.raises(NotFoundError, match=rf"^{re.escape(str(tmp_path))}: cannot be read \([^\n]+\)$"):
        list(read_rows(tmp_path))


def test_a_hub_id_out_of_reach_is_named(datasets: Any) -> None:
    source = find_source("some-org/some-name/plain:train[:9]")
    for use in (fingerprint, lambda source: list(read_rows(source))):
        with pytest.raises(NotFoundError, match=r"^some-org/some-name/plain:train\[:9\]: cannot be read \([^\n]+\)$"):
            use(source)


def test_a_hub_dataset_is_asked_for_by_its_parts(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source, rows = Source("org/name", "plain", "test"), [{**PAIR, "id": 1}, {"prompt": "c", "completion": "d", "id": 2}]
    assert [(row.prompt, row.where) for row in read_rows(source)] == [
        ("a", "org/name/plain:test:row 1"),
        ("c", "org/name/plain:test:row 2"),
    ]
    assert asked == [(("org/name", "plain"), {"split": "test", "streaming": False})]
    before = fingerprint(source)
    assert before == fingerprint(source)
    rows[1]["completion"] = "e"
    assert before != fingerprint(source)


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("org/name", Source("org/name")),
        ("org/name:test", Source("org/name", split="test")),
        ("org/name/plain", Source("org/name", "plain")),
        ("org/name-1.5/plain:train[:9]", Source("org/name-1.5", "plain", "train[:9]")),
    ],
)
def test_words_for_the_hub(tmp_path: Path, word: str, source: Source) -> None:
    assert find_source(word, tmp_path) == source
    assert str(source) == word
    with pytest.raises(NotFoundError):
        find_source(Path(word), tmp_path)


def test_what_is_there_comes_before_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    path = write_rows(folder / "rows.jsonl", [PAIR])
    assert find_source("org/name", tmp_path) == Source(folder)
    assert find_source("org/name:test", tmp_path) == Source(folder, split="test")
    assert find_source("org/name/rows.jsonl", tmp_path) == find_source(str(path), Path("elsewhere")) == Source(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rows.jsonl", r"rows\.jsonl: expected a data file, a dataset's folder or its hub id, found nothing$"),
        ("data/trian.jsonl", r"trian\.jsonl: .*, found nothing \(did you mean 'train\.jsonl'\?\)$"),
        ("data/train.jsnl", r"train\.jsnl: .*, found nothing \(did you mean 'train\.jsonl'\?\)$"),
        ("data/other.parquet", r"other\.parquet: .*, found nothing$"),
        ("nowhere", r"nowhere: .*, found nothing$"),
        ("/org/name", r"^/org/name: .*, found nothing$"),
    ],
)
def test_words_for_nothing_are_named(tmp_path: Path, word: str, message: str) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", [PAIR])
    with pytest.raises(NotFoundError, match=message):
        find_source(word, tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    with pytest.raises(DataError, match=r"rows\.csv: expected a file ending in .jsonl, .json, .parquet, found .csv$"):
        find_source("rows.csv", tmp_path)


def test_the_fingerprint_follows_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / ".hidden").mkdir(parents=True)
    path = write_rows(folder / "a.jsonl", [PAIR])
    of_file, of_folder = fingerprint(Source(path)), fingerprint(Source(folder))
    (folder / ".hidden" / "x").touch()
    assert fingerprint(Source(folder)) == of_folder
    renamed = path.rename(folder / "b.jsonl")
    assert fingerprint(Source(renamed)) == of_file
    assert fingerprint(Source(folder)) != of_folder
    renamed.rename(path)
    assert fingerprint(Source(folder)) == of_folder
    write_rows(path, [PAIR, PAIR])
    assert fingerprint(Source(path)) != of_file
    assert fingerprint(Source(folder)) != of_folder


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    path.touch()
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    for package, source in (("pyarrow", Source(path)), ("datasets", Source(tmp_path)), ("datasets", Source("org/n"))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError) as caught:
            list(read_rows(source))
        assert str(caught.value) == f'{source}: reading it needs the package {package}: pip install "xloom[data]"'


def test_import_is_light() -> None:
    heavy = "torch", "transformers", "pyarrow", "datasets", "numpy"
    code = f"import sys, xloom.training.rows\nprint(*[m for m in {heavy} if m in sys.modules])"
    home = Path(xloom.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=home, timeout=60
    )
    assert done.stdout.strip() == ""

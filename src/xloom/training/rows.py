"""Rows in TRL's shape, from JSONL, JSON and Parquet files and from datasets, as plain Python.

    {"messages": [...]}                     the last message, of the assistant, is the completion
    {"prompt": ..., "completion": ...}      both strings, or both lists of messages

Knows nothing of tokenizers, tensors or recipes. pyarrow and datasets are loaded when a source needs them.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from xloom.errors import DataError, MissingExtraError, NotFoundError, names, near
from xloom.hub.disk import file_sha256
from xloom.suite.shelf import PREFIX, find_rows

COLUMNS = ("messages", "prompt", "completion")
ROLES = ("system", "user", "assistant", "tool")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?(:.+)?")

Text = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row as it stands in a source: strings, or messages. `where` is `file:line` or `source:row N`."""

    prompt: Text
    completion: Text
    where: str

    @property
    def empty(self) -> bool:
        """True if the completion is blank: there is nothing to learn from the row, and no answer to compare with."""
        text = self.completion if isinstance(self.completion, str) else str(self.completion[-1]["content"])
        return not text.strip()


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        place: a file, or the folder of a dataset, as a path; the hub id of a dataset, `org/name`, as a string.
        config, split: of a dataset, in the words of `datasets.load_dataset`.
    """

    place: Path | str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        name = f"{self.place}/{self.config}" if self.config else str(self.place)
        return name if self.split == "train" else f"{name}:{self.split}"


def find_source(word: str | Path, folder: Path = Path()) -> Source:
    """What a word means; only names are looked at. Relative paths start at `folder`, and a `Path` is always local.

        rows.jsonl, rows.json, rows.parquet     a file
        some/folder[:split]                     a dataset in a folder that exists
        org/name[/config][:split]               a dataset on the hub
        suite:SET:SPLIT                         rows of the built-in suite, which are made if they are not there yet

    Raises:
        NotFoundError: none of these.
        DataError: a file of another kind.
    """
    if isinstance(word, str) and word.startswith(PREFIX):
        return Source(find_rows(word))
    path = folder / Path(word).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            found = path.suffix or "a name without an ending"
            raise DataError(f"{path}: expected a file ending in {names(_READERS)}, found {found}")
        return Source(path)
    if path.is_dir():
        return Source(path)
    start, _, split = str(path).rpartition(":")
    if start and Path(start).is_dir():
        return Source(Path(start), split=split)
    hint = _hint(path)
    if isinstance(word, str) and _HUB_ID.fullmatch(word) and path.suffix not in _READERS and not hint:
        name, _, split = word.partition(":")
        owner, repository, *config = name.split("/")
        return Source(f"{owner}/{repository}", config[0] if config else None, split or "train")
    raise NotFoundError(f"{path}: expected a data file, a dataset's folder or its hub id, found nothing{hint}")


def read_rows(source: Source | Path) -> Iterator[Row]:
    """The rows of a source, in its order. Blank lines of JSONL are passed over; rows without a completion are not.

    Raises:
        DataError: with file and line or row, what was expected and what was found.
        NotFoundError: no such file, or no such dataset within reach.
        MissingExtraError: what reads this kind of source is not installed.
    """
    source = find_source(source) if isinstance(source, Path) else source
    for where, value in _values(source):
        yield _row(value, where)


def fingerprint(source: Source) -> str:
    """SHA-256, as hex, of what a source holds: of a file's bytes, of a folder's files, of the rows of a hub's dataset.

    Hidden files of a folder do not count.

    Raises:
        DataError, NotFoundError, MissingExtraError: it cannot be read.
    """
    if isinstance(source.place, str):
        total = hashlib.sha256()
        for _, value in _dataset_values(source):
            total.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
        return total.hexdigest()
    if not source.place.is_dir():
        return _sha256(source.place)
    inside = {path.relative_to(source.place): path for path in source.place.rglob("*") if path.is_file()}
    seen = {name: path for name, path in inside.items() if not any(part.startswith(".") for part in name.parts)}
    parts = [[name.as_posix(), _sha256(path)] for name, path in sorted(seen.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- readers: (where, value) of every row ---


def _values(source: Source) -> Iterator[tuple[str, Any]]:
    if isinstance(source.place, str) or source.place.is_dir():
        return _dataset_values(source)
    return _READERS[source.place.suffix](source.place)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _reading(path), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """One array of rows, or one row per line."""
    with _reading(path), path.open(encoding="utf-8-sig") as lines:
        is_array = next((line.lstrip().startswith("[") for line in lines if line.strip()), False)
        if is_array:
            lines.seek(0)
            for number, value in enumerate(_parse(lines.read(), str(path)), start=1):
                yield f"{path}:row {number}", value
    if not is_array:
        yield from _json_lines(path)


def _parquet_values(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = _optional("pyarrow.parquet", path)
    with _reading(path, "Parquet"), parquet.ParquetFile(path) as file:
        # All columns where none is known: the error then names what there is.
        columns = [name for name in file.schema_arrow.names if name in COLUMNS] or None
        batches = file.iter_batches(columns=columns)
        values = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from _numbered(values, path)


def _dataset_values(source: Source) -> Iterator[tuple[str, Any]]:
    """A folder is streamed, which leaves no second copy of it on the disk; a hub's dataset is kept in its cache."""
    datasets = _optional("datasets", source)
    local = isinstance(source.place, Path)
    errors = (ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    with _reading(source, "a dataset", NotFoundError, errors):
        data = datasets.load_dataset(str(source.place), source.config, split=source.split, streaming=local)
        columns = [name for name in data.column_names or () if name in COLUMNS]
        yield from _numbered(data.select_columns(columns) if columns else data, source)


def _numbered(values: Iterable[Any], source: Source | Path) -> Iterator[tuple[str, Any]]:
    for number, value in enumerate(values, start=1):
        yield f"{source}:row {number}", _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Tables fill the keys that a row does not have with null, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet_values,
}


@contextmanager
def _reading(
    where: object,
    expected: str = "rows",
    missing: type[DataError | NotFoundError] = DataError,
    errors: tuple[type[Exception], ...] = (ValueError, RuntimeError),
) -> Iterator[None]:
    """Errors of the system raise `missing`, `errors` of libraries a DataError, in one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8, found another encoding ({error.reason})") from None
    except OSError as error:
        raise missing(f"{where}: cannot be read ({error.strerror or _first_line(error)})") from None
    except errors as error:
        raise DataError(f"{where}: expected {expected}, found: {_first_line(error.__cause__ or error)}") from None


def _optional(module: str, source: Source | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or package).partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f'{source}: reading it needs the package {package}: pip install "xloom[data]"'
        ) from None


def _hint(path: Path) -> str:
    """A data file beside `path` whose name is nearly the same, in words."""
    if not path.parent.is_dir():
        return ""
    return near(path.name, sorted(item.name for item in path.parent.iterdir() if item.suffix in _READERS))


def _sha256(path: Path) -> str:
    with _reading(path):
        return file_sha256(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- what a row must be ---


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected a JSON object, found invalid JSON ({error.msg})") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if "messages" in value:
        messages = _messages(value["messages"], "messages", where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            found = f"a last message of role {messages[-1]['role']!r}" if len(messages) > 1 else "a single message"
            raise DataError(f"{where}: messages: expected a prompt and then an assistant message, found {found}")
        return Row(messages[:-1], messages[-1:], where)
    for key in ("prompt", "completion"):
        if key not in value:
            raise DataError(f"{where}: expected 'messages', or 'prompt' and 'completion', found {names(value) or '{}'}")
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(prompt, completion, where)
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"{where}: expected prompt and completion as two strings or two lists, found {kinds}")
    row = Row(_messages(prompt, "prompt", where), _messages(completion, "completion", where), where)
    if len(row.completion) != 1 or completion[0]["role"] != "assistant":
        found = names(message["role"] for message in completion)
        raise DataError(f"{where}: completion: expected one assistant message, found {found}")
    return row


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{where}: {key}: expected a list of messages, found {type(value).__name__} {value!r:.40}")
    for number, message in enumerate(value):
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: {key}[{number}]: expected a role of {names(ROLES)}, found {message.get('role')!r}"
            )
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise DataError(f"{where}: {key}[{number}]: expected content as a string, found {found}")
    return value

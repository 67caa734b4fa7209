"""A trace's folder: written part by part while a text is written, read lazily.

    unfinished.json           what is known at the start; goes away at the end
    part-00000.safetensors    scalings [t, S, N] in float16 and the columns of t tokens; whole or not there
    trace.json                the index, which appears at the very end: with it, the trace is finished

A writer that was stopped leaves no `trace.json`, and whole parts. Knows nothing of who writes, or of what is done with
traces.
Letters: T tokens  S sites  N experts
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from xloom.errors import NotFoundError, TraceError, TruncatedFileError, UnfinishedTraceError, names
from xloom.hub.files import read_json, write_json, write_tensors
from xloom.trace.rows import SCALINGS, Rows, Stored
from xloom.trace.tokens import About, Tokens

FORMAT, VERSION = "xloom-trace", 1
INDEX, STARTED = "trace.json", "unfinished.json"
PART_TOKENS = 512


class TraceWriter:
    """Writes a trace while its text is being written, and holds one part of it at most.

    As a context manager it finishes the trace when the block ends, and leaves it unfinished when the block fails.

    Args:
        folder: new or empty.
        part_tokens: tokens of a part; each needs 2 * S * N bytes.

    Raises:
        TraceError: the folder holds something, or cannot be written.
    """

    def __init__(self, folder: Path | str, about: About, *, part_tokens: int = PART_TOKENS) -> None:
        if part_tokens < 1:
            raise TraceError(f"part_tokens: expected at least 1, found {part_tokens}")
        self.folder, self.about = Path(folder), about
        header = about.as_json()
        check_new(self.folder)
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / STARTED, {"format": FORMAT, "version": VERSION, **header})
        self._part_TSN = torch.empty(part_tokens, len(about.sites), len(about.experts), dtype=torch.float16)
        self._columns: list[Tokens] = []
        self._held = 0
        self._parts: list[int] = []
        self._closed = False

    @property
    def held(self) -> int:
        """Tokens that are not on disk yet, fewer than those of a part."""
        return self._held

    @property
    def written(self) -> int:
        """Tokens on disk."""
        return sum(self._parts)

    def add(self, tokens: Tokens, scalings_TSN: Tensor) -> None:
        """Tokens that follow those added before.

        Args:
            scalings_TSN: NaN for a token that was not predicted.

        Raises:
            TraceError: another number of tokens, sites or experts; the disk is full.
        """
        if self._closed:
            raise TraceError(f"{self.folder}: the trace is finished; found more tokens for it")
        expected = (len(tokens), *self._part_TSN.shape[1:])
        if tuple(scalings_TSN.shape) != expected:
            raise TraceError(f"{self.folder}: expected scalings {expected}, found {tuple(scalings_TSN.shape)}")
        at = 0
        while True:
            if self._held == len(self._part_TSN):
                self._flush()
            if at == len(tokens):
                return
            some = min(len(self._part_TSN) - self._held, len(tokens) - at)
            self._part_TSN[self._held : self._held + some] = scalings_TSN[at : at + some].detach()
            self._columns.append(tokens[at : at + some])
            self._held += some
            at += some

    def close(self) -> None:
        """Writes what is held and finishes the trace."""
        if self._closed:
            return
        self._flush()
        index = {"format": FORMAT, "version": VERSION, "tokens": self.written, "parts": self._parts}
        with _writing(self.folder):
            staged = self.folder / f".{INDEX}"
            write_json(staged, {**index, **self.about.as_json()})
            os.replace(staged, self.folder / INDEX)
            (self.folder / STARTED).unlink()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _flush(self) -> None:
        if not self._held:
            return
        tokens = Tokens.cat(self._columns)
        path = part_path(self.folder, len(self._parts))
        with _writing(self.folder):
            staged = path.with_name(f".{path.name}")
            write_tensors(staged, {SCALINGS: self._part_TSN[: len(tokens)], **tokens.tensors()})
            os.replace(staged, path)
        self._parts.append(len(tokens))
        self._columns, self._held = [], 0


def check_new(folder: Path | str) -> None:
    """Raises TraceError unless a trace can be written there: the folder is not there yet, or empty."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise TraceError(f"{folder}: cannot be written: expected a new or empty folder for a trace, found a file")
    with _writing(folder):
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found:
        raise TraceError(f"{folder}: expected a new or empty folder for a trace, found {names(found)}")


def read_folder(folder: Path | str, *, unfinished: bool = False) -> tuple[Tokens, Rows, About]:
    """What a folder holds; the scalings stay on disk until they are asked for.

    Args:
        unfinished: take what a writer that was stopped has left, up to its last whole part.

    Raises:
        NotFoundError: no such folder.
        UnfinishedTraceError: the writer was stopped, and `unfinished` is not asked for.
        TraceError: no trace, or files that contradict each other.
        TruncatedFileError: a file is cut off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: expected the folder of a trace, found {_kind(folder)}")
    finished = (folder / INDEX).is_file()
    if not finished and not (folder / STARTED).is_file():
        found = names(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise TraceError(f"{folder}: expected a trace ({INDEX}), found {found}")
    if not finished and not unfinished:
        raise UnfinishedTraceError(f"{folder}: the trace was never finished; unfinished=True reads what is whole of it")
    index, about = _index(folder / (INDEX if finished else STARTED))
    parts: list[Tokens] = []
    for number in range(len(index["parts"])) if finished else count():
        path = part_path(folder, number)
        if not finished and not path.is_file():
            break
        parts.append(_columns(path, about))
    sizes = list(map(len, parts))
    if finished and (sizes != index["parts"] or sum(sizes) != index.get("tokens")):
        raise TraceError(f"{folder}: expected parts of {names(index['parts'])} tokens, found {names(sizes)}")
    files = [part_path(folder, number) for number in range(len(parts))]
    rows = Stored(files, list(accumulate(sizes)), len(about.sites), len(about.experts))
    return Tokens.cat(parts), rows, about


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.safetensors"


def _index(path: Path) -> tuple[dict[str, Any], About]:
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        found = f"{index.get('format')!r} {index.get('version')!r}"
        raise TraceError(f"{path}: expected format {FORMAT!r} {VERSION}, found {found}")
    parts = index.setdefault("parts", [])
    if not isinstance(parts, list) or not all(isinstance(size, int) and size > 0 for size in parts):
        raise TraceError(f"{path}: parts: expected numbers of tokens, found {parts!r:.60}")
    with _naming(path):
        return index, About.from_json(index)


def _columns(path: Path, about: About) -> Tokens:
    """The columns of a part, whose scalings are looked at but not read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotFoundError(f"{path}: no such file, though the trace's index counts it")
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            shape = file.get_slice(SCALINGS).get_shape() if SCALINGS in there else None
            kind = file.get_slice(SCALINGS).get_dtype() if SCALINGS in there else None
            tensors = {name: file.get_tensor(name) for name in there - {SCALINGS}}
    except (SafetensorError, OSError) as error:
        raise TruncatedFileError(f"{path}: not a whole part of a trace ({error})") from None
    with _naming(path):
        tokens = Tokens.from_tensors(tensors)
    expected = [len(tokens), len(about.sites), len(about.experts)]
    if shape != expected or kind != "F16":
        raise TraceError(f"{path}: scalings: expected {expected} F16, found {shape} {kind}")
    return tokens


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about what a file says name the file."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise TraceError(f"{folder}: cannot be written: {reason}") from error


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing"

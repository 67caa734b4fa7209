"""Tensors of rows, kept on disk between epochs and between runs.

    <cache>/rows/<key>/<digest>.safetensors    many rows each, named by their token ids
    <cache>/rows/<key>/about.json              what the key stands for

`key` stands for whatever the tensors depend on beside the tokens; a shard appears whole or not at all, and is never
changed. Knows nothing of models.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xloom.hub.fetch import cache_dir
from xloom.hub.files import write_json, write_tensors

_SHARD_BYTES = 64 * 2**20
_IN_USE_SECONDS = 600.0


def row_key(input_ids: Iterable[int], name: str = "") -> str:
    """The name of a row's tensor: its tokens, and which of several tensors it is."""
    return hashlib.sha1(f"{name}:{','.join(map(str, input_ids))}".encode(), usedforsecurity=False).hexdigest()


class TensorStore:
    """Tensors by name in a folder.

    Args:
        about: what the tensors depend on; JSON values. Its hash is the folder's name.
        root: of all stores; $XLOOM_CACHE/rows by default.
    """

    def __init__(self, about: Mapping[str, Any], root: Path | None = None) -> None:
        text = json.dumps(dict(about), sort_keys=True)
        self.root = root or cache_dir() / "rows"
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shard_of: dict[str, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self.refresh()
        if not (self.folder / "about.json").is_file():
            write_json(self.folder / "about.json", dict(about))

    def refresh(self) -> None:
        """Sees what other processes have added; marks the store as used."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)  # damaged: computed again
                continue
            self._shard_of.update(dict.fromkeys(shard.keys(), shard))

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of or name in self._waiting

    def __getitem__(self, name: str) -> Tensor:
        if name in self._waiting:
            return self._waiting[name]
        tensor: Tensor = self._shard_of[name].get_tensor(name)
        return tensor

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those not here yet, each once, in their order."""
        return [name for name in dict.fromkeys(names) if name not in self]

    def add(self, name: str, tensor: Tensor) -> None:
        """Written when a shard is full, or at `flush`. Raises OSError when the disk is full."""
        self._waiting[name] = tensor.detach().to("cpu", copy=True)
        self._waiting_bytes += tensor.nbytes
        if self._waiting_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        digest = hashlib.sha1("".join(sorted(self._waiting)).encode(), usedforsecurity=False).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        fresh = path.with_suffix(f".{os.getpid()}.new")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors(fresh, self._waiting)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
        shard = safe_open(path, framework="pt")
        self._shard_of.update(dict.fromkeys(self._waiting, shard))
        self._waiting, self._waiting_bytes = {}, 0

    def make_room(self, wanted: Iterable[str], needed_bytes: int, limit_bytes: int) -> bool:
        """Removes what was longest unused until this store may grow by so much; False, and nothing goes, if it cannot.

        Other stores go first, but for those used within the last minutes (a run may be filling them); then shards here
        that hold none of the `wanted` names.
        """
        names = set(wanted)
        own = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        kept = {path for path in own if self._holds_any(path, names)}
        idle = time.time() - _IN_USE_SECONDS
        others = sorted((p for p in self._stores() if p != self.folder), key=lambda p: p.stat().st_mtime)
        can_go = [p for p in others if p.stat().st_mtime < idle] + [p for p in own if p not in kept]
        total = needed_bytes + sum(map(_size, [self.folder, *others]))
        if total - sum(map(_size, can_go)) > limit_bytes or needed_bytes >= shutil.disk_usage(self.root).free:
            return False
        for path in can_go:
            if total <= limit_bytes:
                break
            total -= _size(path)
            self._remove(path)
        return True

    def _holds_any(self, shard: Path, names: set[str]) -> bool:
        with safe_open(shard, framework="pt") as file:
            return not names.isdisjoint(file.keys())

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            return
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                self._shard_of.pop(name, None)
        path.unlink(missing_ok=True)

    def _stores(self) -> Iterator[Path]:
        return (path.parent for path in self.root.glob("*/about.json"))


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size

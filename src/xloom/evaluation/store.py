"""Answers of one system, kept line by line in a file, so that an evaluation that was stopped goes on.

    {"identity": {...}}                                        first line: what the answers depend on
    {"setting": {...}}                                         what seconds and memory of the lines below depend on
    {"key": ..., "answer": ..., "tokens": ..., "weights": {expert: ...}, "seconds": ..., "cut": ...}
    {"key": ..., "loss": ...}    {"peak_mb": ...}

Knows nothing of systems or models: they hand over their identity as JSON values.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from xloom.checkpoints.native import EXPERT_FOLDERS
from xloom.config import own_fields
from xloom.errors import ConfigError
from xloom.evaluation.answers import Prompt
from xloom.evaluation.tasks import Question
from xloom.hub.files import read_json
from xloom.model import XLoraForCausalLM

_SAMPLE = 2**16  # elements or bytes of a large tensor or file
_COUNTED = (".json", ".safetensors", ".gguf", ".jinja")
_PASSED_OVER = ("training.json", "card.json")
_SHARED_FIELDS = ("experts", "gate_at_layer")  # of the config, which count for every router


@dataclass(frozen=True)
class Kept:
    """An answer: its text, its length, every expert's mean scaling, and its share of the batch's seconds.

    `seconds` is None for one that was written in another setting. `cut` says whether there were no more tokens for it;
    None where nobody noted that.
    """

    text: str
    tokens: int
    weights: Mapping[str, float]
    seconds: float | None
    cut: bool | None = None


class AnswerFile:
    """What is known already, and a place for more.

    Args:
        path: the file; None keeps everything in memory.
        identity: JSON values; a file with another one is put aside as `<name>.old`, and `replaced` says what differs.
        setting: JSON values on which speed and memory depend. Answers of another setting are as good, but their seconds
            and their peak of memory do not count.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, Any], setting: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.setting = json.loads(json.dumps(setting or {}))
        self._last_setting: Any = None  # of the lines that are there; old ones have none
        self.answers: dict[str, Kept] = {}
        self.losses: dict[str, float] = {}
        self.peak_mb: float | None = None
        self.replaced: tuple[str, ...] = ()
        if path is not None:
            with _naming(path):
                self._open(path)

    def add(self, answers: Mapping[str, Kept]) -> None:
        """Written and on the disk when this returns."""
        self.answers |= answers
        lines = [
            {
                "key": key,
                "answer": kept.text,
                "tokens": kept.tokens,
                "weights": dict(kept.weights),
                "seconds": kept.seconds,
                "cut": kept.cut,
            }
            for key, kept in answers.items()
        ]
        self._append([*self._new_setting(), *lines])

    def add_losses(self, losses: Mapping[str, float]) -> None:
        self.losses |= losses
        self._append({"key": key, "loss": loss} for key, loss in losses.items())

    def add_peak(self, peak_mb: float) -> None:
        """Of one run; of several in the same setting, the highest counts."""
        self.peak_mb = max(peak_mb, self.peak_mb or 0.0)
        self._append([*self._new_setting(), {"peak_mb": peak_mb}])

    def _new_setting(self) -> list[dict[str, Any]]:
        """The line that goes before what was measured in this setting, if the lines above are of another."""
        if self._last_setting == self.setting:
            return []
        self._last_setting = self.setting
        return [{"setting": self.setting}]

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # a line that was cut off, by a crash or a full disk, ends without a line feed
            whole = path.read_bytes().rpartition(b"\n")[0]
            lines = [json.loads(line) for line in whole.split(b"\n") if line]
            before = lines[0].get("identity") if lines else None
            if before == self.identity:
                with path.open("r+b") as file:
                    file.truncate(len(whole) + 1)
                for line in lines[1:]:
                    self._take(line)
                return
            if isinstance(before, dict):
                keys = {**before, **self.identity}
                self.replaced = tuple(key for key in keys if before.get(key) != self.identity.get(key))
            os.replace(path, path.with_name(f"{path.name}.old"))
        self._append([{"identity": self.identity}])

    def _take(self, line: Mapping[str, Any]) -> None:
        measured = self._last_setting == self.setting
        if "setting" in line:
            self._last_setting = line["setting"]
        elif "peak_mb" in line:
            if measured:
                self.peak_mb = max(line["peak_mb"], self.peak_mb or 0.0)
        elif "loss" in line:
            self.losses[line["key"]] = line["loss"]
        else:
            seconds = line["seconds"] if measured else None
            kept = Kept(line["answer"], line["tokens"], line["weights"], seconds, line.get("cut"))
            self.answers[line["key"]] = kept

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.path is None:
            return
        with _naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


class _naming:
    """Errors of the system and of damaged files in one line, as ConfigError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):
            raise ConfigError(f"{self.path}: expected kept answers, found something else; remove it") from None


def file_name(system: str) -> str:
    """A system's name as that of a file: `xlora%3Atop1.jsonl`. Different names give different files."""
    return quote(system, safe=",=+") + ".jsonl"


def question_key(question: Question, prompt: Prompt) -> str:
    """What an answer depends on beside the system: token ids, where it has to end, the question's kind."""
    stop = () if prompt.stop is None else (prompt.stop,)
    known = (prompt.ids, prompt.max_new_tokens, question.experts, question.task, *stop)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def model_digest(model: XLoraForCausalLM, *, head: bool) -> str:
    """SHA-256, as hex, of the names, shapes, dtypes and values of a model's tensors; of large ones, of a sample.

    Args:
        head: whether the head and its settings count, or what the other systems share: base and experts.
    """
    told = model.config.to_dict()
    fields = {name: told[name] for name in (sorted(own_fields()) if head else _SHARED_FIELDS) if name in told}
    found = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for site in model.mixture.sites:  # which ranks are whose, and alpha/r: in no tensor
        found.update(repr((site.name, site.ranks, site.scales)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("head.") and not head:
            continue
        found.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        flat = tensor.detach().flatten()
        if len(flat) > 16 * _SAMPLE:
            flat = flat[:: len(flat) // _SAMPLE]
        found.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256, as hex, of a folder's weights and settings, and of the experts that it names elsewhere.

    Reports and logs do not count.
    """
    found = hashlib.sha256()
    if (folder / EXPERT_FOLDERS).is_file():
        for name, way in sorted(read_json(folder / EXPERT_FOLDERS).items()):
            found.update(f"{name}:{folder_digest(folder / str(way))};".encode())
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix not in _COUNTED or path.name in _PASSED_OVER or "logs" in inside.parts:
            continue
        size = path.stat().st_size
        found.update(f"{inside.as_posix()}:{size};".encode())
        with path.open("rb") as file:
            if size <= 2**26:
                found.update(file.read())
            else:  # a base, of which training changes every part
                for start in range(0, size, size // 16):
                    file.seek(start)
                    found.update(file.read(_SAMPLE))
    return found.hexdigest()

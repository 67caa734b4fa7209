"""The writer holds one part at most; what it leaves when it is stopped is known for that; damage has a name."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from random_traces import ABOUT, EXPERTS, SITES, placed_scalings, random_tokens, random_trace
from xloom.errors import NotFoundError, TraceError, TruncatedFileError, UnfinishedTraceError
from xloom.evaluation.memory import PeakMemory
from xloom.trace import About, Tokens, Trace, TraceWriter


def test_no_more_than_one_part_is_held(tmp_path):
    """Token by token and in pieces longer than a part."""
    with TraceWriter(tmp_path / "t", ABOUT, part_tokens=8) as writer:
        at = 0
        for count in [1] * 19 + [30, 3, 0, 16, 1]:
            writer.add(random_tokens(count), placed_scalings(count, at))
            at += count
            assert writer.held < 8
            assert writer.written == at - writer.held == at // 8 * 8
            assert len(list((tmp_path / "t").glob("part-*"))) == at // 8
    found = Trace.load(tmp_path / "t")
    assert torch.equal(found.scalings, placed_scalings(at))
    assert found.about == ABOUT


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a block is known on Linux alone")
def test_memory_stays_flat_over_ten_thousand_tokens(tmp_path):
    """Scalings of 10,000 tokens would be 48 MB in float16; a part of 128 tokens is 0.6 MB."""
    sites = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(300))
    about = About(sites, tuple("abcdefgh"))
    one = torch.rand(1, 300, 8)
    token = Tokens.make([5], ["x"])
    with TraceWriter(tmp_path / "t", about, part_tokens=128) as writer:
        for _ in range(200):  # what libraries need is there now
            writer.add(token, one)
        with PeakMemory(torch.device("cpu")) as start:
            writer.add(token, one)
        with PeakMemory(torch.device("cpu")) as whole:
            for _ in range(9_799):
                writer.add(token, one)
    if start.mb is None or whole.mb is None:
        pytest.skip("the system does not say what the peak of a block was")
    assert whole.mb - start.mb < 16
    trace = Trace.load(tmp_path / "t")
    assert len(trace) == 10_000
    assert torch.equal(trace[9_990:].scalings, one.half().float().expand(10, -1, -1))


def test_a_killed_writer_leaves_whole_parts(tmp_path):
    code = f"""
        import os, signal, sys
        sys.path[:0] = {sys.path}
        from random_traces import ABOUT, placed_scalings, random_tokens
        from xloom.trace import TraceWriter
        writer = TraceWriter("t", ABOUT, part_tokens=4)
        for at in range(11):
            writer.add(random_tokens(1, seed=at), placed_scalings(1, at))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(UnfinishedTraceError, match="unfinished=True"):
        Trace.load(tmp_path / "t")
    found = Trace.load(tmp_path / "t", unfinished=True)
    assert len(found) == 8
    assert torch.equal(found.scalings, placed_scalings(8))
    assert found.tokens.ids.tolist() == [int(random_tokens(1, seed=at).ids) for at in range(8)]
    assert found.sites == SITES


def test_a_part_that_was_being_written_does_not_count(tmp_path, monkeypatch):
    writer = TraceWriter(tmp_path / "t", ABOUT, part_tokens=4)
    writer.add(random_tokens(6), placed_scalings(6))
    monkeypatch.setattr("xloom.trace.folder.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(TraceError, match="the disk is full"):
        writer.add(random_tokens(2), placed_scalings(2, 6))
    with pytest.raises(TraceError, match="the disk is full"):
        writer.add(random_tokens(1), placed_scalings(1, 8))
    assert len(Trace.load(tmp_path / "t", unfinished=True)) == 4


def test_a_block_that_fails_leaves_it_unfinished(tmp_path):
    with pytest.raises(ZeroDivisionError), TraceWriter(tmp_path / "t", ABOUT, part_tokens=2) as writer:
        writer.add(random_tokens(3), placed_scalings(3))
        1 / 0
    assert len(Trace.load(tmp_path / "t", unfinished=True)) == 2


def test_a_finished_trace_is_finished(tmp_path):
    random_trace(9).save(tmp_path / "t", part_tokens=4)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "part-00000.safetensors", "part-00001.safetensors", "part-00002.safetensors", "trace.json",
    ]  # fmt: skip
    assert len(Trace.load(tmp_path / "t", unfinished=True)) == 9
    with pytest.raises(TraceError, match=r"new or empty.*found part-00000"):
        random_trace(9).save(tmp_path / "t")
    writer = TraceWriter(tmp_path / "empty", ABOUT)
    writer.close()
    assert len(Trace.load(tmp_path / "empty")) == 0
    with pytest.raises(TraceError, match="finished"):
        writer.add(random_tokens(1), placed_scalings(1))


def test_what_does_not_fit_is_refused_at_once(tmp_path):
    with pytest.raises(TraceError, match="found 0"):
        TraceWriter(tmp_path / "a", ABOUT, part_tokens=0)
    with pytest.raises(TraceError, match="what JSON knows"):
        TraceWriter(tmp_path / "b", About(SITES, EXPERTS, metadata={"odd": object()}))
    writer = TraceWriter(tmp_path / "c", ABOUT)
    with pytest.raises(TraceError, match=r"\(2, 6, 3\), found \(1, 6, 3\)"):
        writer.add(random_tokens(2), placed_scalings(1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(tmp_path / "file", ABOUT)


# --- damage ---


@pytest.fixture
def folder(tmp_path):
    random_trace(9).save(tmp_path / "t", part_tokens=4)
    return tmp_path / "t"


def test_foreign_folders(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(TraceError, match=r"expected a trace \(trace.json\), found model.safetensors"):
        Trace.load(tmp_path)
    (tmp_path / "trace.json").write_text('{"format": "perfetto"}')
    with pytest.raises(TraceError, match="expected format 'xloom-trace' 1, found 'perfetto' None"):
        Trace.load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 60, 700])
def test_truncated_parts(folder, size: int):
    path = folder / "part-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TruncatedFileError, match="part-00001"):
        Trace.load(folder)


def test_a_part_that_goes_after_loading(folder):
    trace = Trace.load(folder)
    (folder / "part-00002.safetensors").unlink()
    assert len(trace[:8].scalings) == 8
    with pytest.raises(TruncatedFileError, match="part-00002"):
        trace.scalings
    with pytest.raises(NotFoundError, match="part-00002"):
        Trace.load(folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 2, "found 'xloom-trace' 2"),
        ("parts", [4, 4], "expected parts|found 4, 4"),
        ("parts", [4, 4, "x"], "numbers of tokens"),
        ("tokens", 10, "expected parts"),
        ("sites", 3, "'sites': expected list, found int"),
        ("sites", ["a"], r"expected \[4, 1, 3\] F16, found \[4, 6, 3\]"),
        ("experts", [1, 2, 3], "expected names"),
        ("metadata", None, "'metadata': expected dict"),
    ],
)
def test_an_index_that_lies(folder, field: str, value: object, says: str):
    path = folder / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(TraceError, match=says):
        Trace.load(folder)


def test_an_index_that_is_cut_off(folder):
    path = folder / "trace.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(TruncatedFileError, match=r"trace.json"):
        Trace.load(folder)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("scalings", lambda t: t.float(), "F16"),
        ("ids", lambda t: t[:2], "one length"),
        ("logprobs", lambda t: t.half(), "expected one axis of torch.float32"),
        ("text_ends", lambda t: t.flip(0), "text_ends"),
        ("text_bytes", lambda t: t[:-1], "text_ends"),
        ("roles", lambda t: t + 9, "below 5"),
        ("turns", lambda t: None, "'turns'.*found none"),
    ],
)
def test_a_part_that_is_another(folder, name: str, make, says: str):
    path = folder / "part-00001.safetensors"
    tensors = load_file(path)
    tensors[name] = make(tensors[name])
    save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(TraceError, match=says):
        Trace.load(folder)

"""Logs as `flush_log_scalings` of the original xlora writes them."""

import json

import numpy as np
import pytest
import torch

from xloom.errors import NotFoundError, TraceError, TruncatedFileError
from xloom.trace import read_xlora_log, xlora_traces


def flush_log_scalings(path: str, log: list[torch.Tensor]) -> None:
    """As the original does it, with [B, T, S, N] tensors."""
    buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
    for i, scaling in enumerate(log):
        indices, tensors = buckets.setdefault(scaling.shape[0], ([], []))
        indices.append(i)
        tensors.append(scaling)
    if len(buckets) == 1:
        np.save(path, torch.cat([one.unsqueeze(0) for one in log]).numpy())
        return
    mapping = {}
    for key, (indices, tensors) in buckets.items():
        mapping[f"{path}-{key}.npy"] = indices
        np.save(f"{path}-{key}", torch.cat([one.unsqueeze(0) for one in tensors]).numpy())
    with open(f"{path}-mapping.json", "w") as file:
        file.write(json.dumps(mapping))


def forwards(*batches: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, 4, 5, 3, generator=generator).to(dtype) for batch in batches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_one_file(tmp_path, dtype):
    log = forwards(2, 2, 2, dtype=dtype)
    flush_log_scalings(str(tmp_path / "log"), log)
    for path in ("log", "log.npy"):
        found = read_xlora_log(tmp_path / path)
        assert all(torch.equal(a, b.float()) for a, b in zip(found, log, strict=True))


def test_several_files_in_their_order(tmp_path):
    log = forwards(2, 1, 2, 1, 1)
    flush_log_scalings(str(tmp_path / "log"), log)
    assert not (tmp_path / "log.npy").exists()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in list(tmp_path.glob("log*")):
        path.rename(moved / path.name)
    found = read_xlora_log(moved / "log")
    assert all(torch.equal(a, b) for a, b in zip(found, log, strict=True))


def test_as_traces(tmp_path):
    log = forwards(2, 1)
    flush_log_scalings(str(tmp_path / "log"), log)
    traces = xlora_traces(tmp_path / "log", experts=["a", "b", "c"])
    assert [trace.metadata["row"] for trace in traces] == [0, 1, 0]
    assert torch.equal(traces[1].scalings, log[0][1].half().float())
    assert torch.equal(traces[2].expert("b"), log[1][0, :, :, 1].half().float())
    assert traces[0].sites == ("0", "1", "2", "3", "4")
    assert traces[0].tokens.ids.tolist() == [-1] * 4
    with pytest.raises(TraceError, match="names of 3 experts, found 2"):
        xlora_traces(tmp_path / "log", experts=["a", "b"])


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "log.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(TruncatedFileError, match="numbers"):
        read_xlora_log(tmp_path / "log")
    assert not Evil.ran


def test_other_files_have_a_name(tmp_path):
    with pytest.raises(NotFoundError, match="log.npy or log-mapping.json"):
        read_xlora_log(tmp_path / "log")
    np.save(tmp_path / "old.npy", np.zeros((3, 2, 5, 3), dtype=np.float32))
    with pytest.raises(TraceError, match=r"found \(3, 2, 5, 3\) float32"):
        read_xlora_log(tmp_path / "old")
    np.save(tmp_path / "ints.npy", np.zeros((1, 1, 2, 5, 3), dtype=np.int64))
    with pytest.raises(TraceError, match="expected floats"):
        read_xlora_log(tmp_path / "ints")
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    with pytest.raises(TraceError, match="found NpzFile"):
        read_xlora_log(tmp_path / "many.npz")
    flush_log_scalings(str(tmp_path / "log"), forwards(2, 2))
    whole = (tmp_path / "log.npy").read_bytes()
    for size in (0, 3, 40, 300):
        (tmp_path / "log.npy").write_bytes(whole[:size])
        with pytest.raises(TruncatedFileError, match="log.npy"):
            read_xlora_log(tmp_path / "log")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(TruncatedFileError, match="zip.npy"):
        read_xlora_log(tmp_path / "zip")


def test_a_mapping_that_lies(tmp_path):
    flush_log_scalings(str(tmp_path / "log"), forwards(2, 1, 2))
    path = tmp_path / "log-mapping.json"
    right = json.loads(path.read_text())
    two, one = right
    for wrong, says in [({two: [0], one: [1]}, "expected 2 places"), ({two: [0, 3], one: [1]}, "from 0 on")]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(TraceError, match=says):
            read_xlora_log(tmp_path / "log")
    path.write_text(json.dumps({"/nowhere/log-9.npy": [0]}))
    with pytest.raises(NotFoundError, match="log-9"):
        read_xlora_log(tmp_path / "log")

"""However long a text, its writer keeps one part of it and nothing of what is on disk; no clocks and no gauges."""

import gc

import pytest
import torch

from random_traces import ABOUT, EXPERTS, SITES, placed_scalings, random_tokens
from xloom.trace import Tokens, Trace, TraceWriter

PART = 16


def columns_alive() -> int:
    """How many `Tokens` there are."""
    gc.collect()
    return sum(type(one) is Tokens for one in gc.get_objects())


def tensors_alive() -> int:
    """Bytes of all tensors' storages, each once."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) is torch.Tensor:  # others (fake ones, that compilation leaves behind) have no storage
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("piece", [1, 7, 16, 40])
def test_the_writer_keeps_a_fixed_number_of_rows(tmp_path, piece: int):
    """Columns given to it go once their part is written; the buffer of scalings stays the one that it was."""
    before = columns_alive()
    with TraceWriter(tmp_path / "t", ABOUT, part_tokens=PART) as writer:
        buffer = writer._part_TSN
        at = 0
        while at < 2_000:
            writer.add(random_tokens(piece), placed_scalings(piece, at))
            at += piece
            assert writer._part_TSN is buffer
            assert sum(map(len, writer._columns)) == writer.held < PART
        assert columns_alive() - before == len(writer._columns) < PART
    assert buffer.shape == (PART, len(SITES), len(EXPERTS))
    assert len(Trace.load(tmp_path / "t")) == at


def test_memory_of_tensors_does_not_grow(tmp_path):
    """Ten times the text leaves no byte more in tensors."""
    alive = []
    with TraceWriter(tmp_path / "t", ABOUT, part_tokens=PART) as writer:
        for step in range(10 * PART * 10):
            writer.add(random_tokens(1, seed=step), placed_scalings(1, step))
            if step % (10 * PART) == 5:
                alive.append(tensors_alive())
    assert len(alive) == 10
    assert len(set(alive)) == 1, alive


def test_the_gauge_sees_what_is_kept():
    """A test of the test."""
    before = tensors_alive()
    kept = torch.zeros(1000, dtype=torch.float16)
    assert tensors_alive() == before + 2000
    del kept


def test_reading_goes_block_by_block(tmp_path, monkeypatch):
    """`blocks` of a stored trace reads no more than a block at a time, of the files that it lies in."""
    from xloom.trace import rows

    with TraceWriter(tmp_path / "t", ABOUT, part_tokens=PART) as writer:
        writer.add(random_tokens(200), placed_scalings(200))
    read: list[int] = []
    before = rows._slice

    def counting(path, places):
        read.append(places[0].stop - places[0].start)
        return before(path, places)

    monkeypatch.setattr(rows, "_slice", counting)
    for block in Trace.load(tmp_path / "t").blocks(24):
        start = len(read)
        block.scalings
        assert sum(read[start:]) == len(block) <= 24
    assert sum(read) == 200

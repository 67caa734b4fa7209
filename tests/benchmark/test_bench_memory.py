"""`bench_memory` measures what it says: the task of the row, in a process of its own."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from xloom.benchmark import peak_memory, systems
from xloom.benchmark.bench_memory import MemoryRow, bench_memory
from xloom.benchmark.parts import make_parts, random_base, write_parts
from xloom.benchmark.peak_memory import Order, Peak
from xloom.benchmark.run import PLAIN
from xloom.benchmark.tables import write_report
from xloom.errors import ConfigError

TINY = {"layers": 3, "hidden": 32, "vocab": 64, "experts": 2, "rank": 3}


def answering(said, monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """Stands in for the process: `said` gives its peak, or None for one that is killed."""
    orders = []

    def run(command, **options):
        order = Order(**json.loads(options["input"]))
        orders.append(order)
        if (peak := said(order)) is None:
            return subprocess.CompletedProcess(command, -9, "", "")
        return subprocess.CompletedProcess(command, 0, json.dumps(peak._asdict()) + "\n", "")

    monkeypatch.setattr(peak_memory, "subprocess", SimpleNamespace(run=run))  # not the one of others
    return orders


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def said(order: Order) -> Peak | None:
        if order.system == "xloom-early-gate" and order.task == "decode":
            return None
        return Peak(100.0 * (1 + PLAIN.index(order.system)), 50.0, 2.0 * (1 + PLAIN.index(order.system)))

    orders = answering(said, monkeypatch)
    report = bench_memory(prefill_tokens=(9, 5), prompt_tokens=4, new_tokens=[6], **TINY)
    tasks = [("prefill", 5, 0), ("prefill", 9, 0), ("decode", 4, 6)]
    assert [(o.task, o.tokens, o.new, o.system) for o in orders] == [(*task, name) for task in tasks for name in PLAIN]
    found = [(r.task, r.prompt_tokens, r.new_tokens, r.system) for r in report.rows]
    assert found == [(*task, name) for task in tasks for name in PLAIN][:-1]
    for row in report.rows:
        times = 1 + PLAIN.index(row.system)
        assert (row.peak_mb, row.floor_mb, row.call_mb) == (100 * times, 50, 2 * times)
        assert row.peak_to_base == row.call_to_base == times
    assert report.notes[-1] == "decode of 6 tokens: xloom-early-gate: exit code -9 (nothing said)"
    write_report(report, tmp_path / "memory.json")
    assert [MemoryRow(**r) for r in json.loads((tmp_path / "memory.json").read_text())["rows"]] == report.rows
    console = Console(width=160, record=True)
    console.print(report.table())
    text = " ".join(console.export_text().split())
    assert all(word in text for word in ("xloom-early-gate", "400", "3.00", "exit code -9"))


def test_without_the_base_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch):
    answering(lambda order: None if order.system == "base" else Peak(3.0, 2.0, 1.0), monkeypatch)
    (row,) = bench_memory(prefill_tokens=[5], new_tokens=[6], prompt_tokens=4, systems=["xloom"], **TINY).rows[:1]
    assert (row.system, row.peak_to_base, row.call_to_base) == ("xloom", None, None)


def test_in_a_process_of_its_own():
    rows = bench_memory(prefill_tokens=[40], new_tokens=[5], prompt_tokens=4, systems=["xloom"], **TINY).rows
    base, xloom = rows[:2]
    assert 50 < base.floor_mb <= base.peak_mb
    assert 0 < base.call_mb < xloom.call_mb < 50  # two caches
    assert xloom.call_to_base == xloom.call_mb / base.call_mb


@pytest.fixture
def order(tmp_path: Path) -> Order:
    parts = make_parts(random_base(torch.float32, "cpu", layers=3, hidden=32, vocab=64), tmp_path, experts=2, rank=3)
    write_parts(parts, tmp_path)
    return Order(
        "decode", "xloom", "random", (3, 32, 64), "float32", "cpu", str(tmp_path), parts.expert_folders, 1, 7, 4
    )


@pytest.mark.parametrize(("task", "system", "expected"), [
    ("prefill", "xloom", ("prefill", 7)),
    ("prefill", "peft", ("prefill", 7)),
    ("decode", "xloom", ("decode", 7, 4)),
    ("decode", "peft", ("decode", 10, 1)),  # its last step, which holds the most
])  # fmt: skip
def test_what_the_process_does(task, system, expected, order: Order, monkeypatch: pytest.MonkeyPatch):
    """Floor before the system is built, peak after two goes."""
    seen = []
    monkeypatch.setattr(systems.System, "prefill", lambda self, ids: seen.append(("prefill", ids.shape[1])))
    monkeypatch.setattr(systems.System, "decode", lambda self, ids, new: seen.append(("decode", ids.shape[1], new)))
    monkeypatch.setattr(peak_memory, "used_mb", lambda device: float(len(seen)))
    asked = Order(**{**vars(order), "task": task, "system": system})
    assert peak_memory.measure(asked) == Peak(2.0, 0.0, 0.0)
    assert seen == [expected] * 3  # the last one under the profiler


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"systems": ["xlom"]}, r"'xlom'"),
        ({"prefill_tokens": []}, "prefill_tokens"),
        ({"new_tokens": [0]}, "new_tokens must be at least 1"),
        ({"dtype": "float31"}, "float32, bfloat16"),
    ],
)
def test_refusals(wrong, said):
    with pytest.raises(ConfigError, match=said):
        bench_memory(**(TINY | wrong))

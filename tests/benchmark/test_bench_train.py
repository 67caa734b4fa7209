"""The training benchmark measures what it says: equal losses and gradients, consistent figures. Never how fast."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xloom.benchmark import peak_memory, train_systems
from xloom.benchmark.bench_train import SYSTEMS, bench_train, compared
from xloom.benchmark.parts import make_parts, random_base, read_parts, write_parts
from xloom.benchmark.peak_memory import NotMeasuredError, Order, Peak, measure_apart, used_mb
from xloom.benchmark.tables import write_report
from xloom.benchmark.train_tables import EPOCHS, TrainReport, TrainRow, timed_row
from xloom.errors import ConfigError

TINY = {"layers": 3, "hidden": 32, "vocab": 64, "rank": 3, "batch": 2, "tokens": 12, "completion": 4, "rounds": 2}
CACHED = {"xloom-cached", "xloom-cached-checkpointing", "xloom-early-gate"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report() -> TrainReport:
    return bench_train(experts=(3, 2), memory=False, **TINY)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory):
    base = random_base(torch.float32, "cpu", layers=3, hidden=32, vocab=64)
    return make_parts(base, tmp_path_factory.mktemp("experts"), experts=2, rank=3)


@pytest.fixture(scope="module")
def batch() -> train_systems.Batch:
    return train_systems.random_batch(64, rows=2, tokens=12, completion=4, device="cpu")


def test_rows(report: TrainReport):
    assert report.what == "train"
    assert [(r.experts, r.system) for r in report.rows] == [(n, name) for n in (2, 3) for name in SYSTEMS]
    for row in report.rows:
        assert row.rounds == 2
        assert 0 < row.s_per_step_min <= row.s_per_step_low <= row.s_per_step <= row.s_per_step_high < math.inf
        assert 0 < row.ratio_low <= row.ratio_to_peft <= row.ratio_high < math.inf
        assert row.peak_mb is row.floor_mb is row.step_mb is row.memory_to_peft is row.step_to_peft is None
        assert (row.fill_s_per_row is not None) == (row.system in CACHED)
        if row.system in CACHED:
            extra = row.fill_s_per_row * TINY["batch"] / EPOCHS
            assert row.s_per_step_with_fill == pytest.approx(row.s_per_step + extra)
        if row.system == "peft":
            assert row.ratio_low == row.ratio_high == 1


def test_losses_and_gradients_are_those_of_peft(report: TrainReport):
    for row in report.rows:
        if row.system in ("peft", "xloom-early-gate"):
            assert row.loss_equal is row.gradient_error is None
        else:
            assert row.loss_equal is True
            assert row.gradient_error < 1e-4
    for count in (2, 3):
        losses = {r.system: r.loss for r in report.rows if r.experts == count}
        assert losses["xloom-cached"] == pytest.approx(losses["peft"], rel=1e-5)
        assert losses["xloom-early-gate"] != pytest.approx(losses["peft"], rel=1e-4)


def test_the_comparison_can_fail():
    mine = (1.0, torch.tensor([1.0, 0.0]))
    assert compared(mine, mine, exact=True) == {"loss_equal": True, "gradient_error": 0.0}
    assert not compared(mine, (1.01, mine[1]), exact=True)["loss_equal"]
    turned = compared(mine, (1.0, torch.tensor([0.0, 1.0])), exact=True)
    assert not turned["loss_equal"]
    assert turned["gradient_error"] == pytest.approx(2**0.5)
    assert compared(mine, (1.01, mine[1]), exact=False)["loss_equal"] is None


def test_a_wrong_model_is_found(parts, monkeypatch: pytest.MonkeyPatch):
    """Head states of other rows: the report says so."""

    def fill(self, batch):
        return None if not self.kind.cached else self.model.compute_head_states(batch.ids_BT.flip(1), batch.mask_BT)

    monkeypatch.setattr(train_systems.Learner, "fill", fill)
    rows = bench_train(experts=[2], systems=["xloom", "xloom-cached"], memory=False, **TINY).rows
    assert [r.loss_equal for r in rows] == [None, True, False]


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_the_head_learns(name: str, parts, batch: train_systems.Batch):
    learner = train_systems.build(name, parts)
    trained = {id(p) for p in learner.head.parameters()}
    assert {id(p) for p in learner.model.parameters() if p.requires_grad} == trained
    before = {n: t.clone() for n, t in learner.model.state_dict().items()}
    states = learner.fill(batch)
    losses = [float(learner.step(batch, states)) for _ in range(12)]
    assert losses[-1] < losses[0]  # the loss is on the head, whatever the system
    heads = {n for n, t in learner.model.state_dict().items() if not torch.equal(t, before[n])}
    assert heads
    assert all("head." in n or "classifier" in n for n in heads)


def test_the_loss_is_on_the_completion(parts, batch: train_systems.Batch):
    """Against a plain full-length cross-entropy with everything before the completion masked."""
    learner = train_systems.build("xloom", parts)
    with torch.no_grad():
        logits_BTV = learner.model(batch.ids_BT, batch.mask_BT).logits
    wanted = torch.nn.functional.cross_entropy(logits_BTV[:, 7:11].flatten(0, 1), batch.ids_BT[:, 8:].flatten())
    assert float(learner.backward(batch, None)) == pytest.approx(float(wanted), rel=1e-5)


def test_memory_is_measured_apart():
    """A process of its own: what this one holds does not count."""
    ballast = torch.ones(1_200_000_000 // 4)
    (row,) = bench_train(experts=[2], systems=[], memory=True, **TINY).rows
    assert used_mb("cpu") > ballast.nbytes / 1e6
    assert 50 < row.floor_mb <= row.peak_mb < ballast.nbytes / 1e6
    assert 0.01 < row.step_mb < 50
    assert row.memory_to_peft == row.step_to_peft == 1


@pytest.fixture
def order(parts, tmp_path: Path) -> Order:
    write_parts(parts, tmp_path)
    shape = (3, 32, 64)
    return Order("train", "peft", "random", shape, "float32", "cpu", str(tmp_path), parts.expert_folders, 1, 8, 2)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_the_process_does(name: str, order: Order, monkeypatch: pytest.MonkeyPatch):
    """Floor before the system is built, peak after two steps."""
    seen = []

    def step(self, batch, states):
        assert self.name == name
        assert (states is not None) == self.kind.cached
        seen.append(batch.ids_BT.shape)

    monkeypatch.setattr(train_systems.Learner, "step", step)
    monkeypatch.setattr(peak_memory, "used_mb", lambda device: float(len(seen)))
    assert peak_memory.measure(dataclasses.replace(order, system=name)) == Peak(2.0, 0.0, 0.0)
    assert seen == [(1, 8)] * 3  # the last one under the profiler


def test_memory_of_tensors_in_a_call():
    def call():
        one = torch.ones(1_000_000)
        two = one + 1
        del one
        three = two * two
        return len(three)

    assert peak_memory.live_mb(call, "cpu") == pytest.approx(8.0, abs=0.1)  # two of four at a time
    assert peak_memory.live_mb(lambda: None, "cpu") == 0


def test_memory_of_systems_that_end_early(order: Order, monkeypatch: pytest.MonkeyPatch):
    """Killed ones leave a note; ratios need PEFT's own figure."""

    def run(command, **options):
        asked = json.loads(options["input"])
        assert Order(**asked | {"shape": tuple(asked["shape"])}).system == asked["system"]
        if asked["system"] == "peft":
            return subprocess.CompletedProcess(command, -9, "", "")
        if asked["system"] == "xloom-cached":
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no room\n")
        return subprocess.CompletedProcess(
            command, 0, 'a line\n{"peak_mb": 20.0, "floor_mb": 10.0, "step_mb": 5.0}\n', ""
        )

    monkeypatch.setattr(peak_memory.subprocess, "run", run)
    with pytest.raises(NotMeasuredError, match="peft: exit code -9"):
        measure_apart(order)
    report = bench_train(experts=[2], systems=["xloom", "xloom-cached"], **TINY)
    found = [(r.peak_mb, r.floor_mb, r.step_mb, r.memory_to_peft, r.step_to_peft) for r in report.rows]
    assert found == [(None,) * 5, (20.0, 10.0, 5.0, None, None), (None,) * 5]
    assert report.notes[-2:] == [
        "memory with 2 experts: peft: exit code -9 (nothing said)",
        "memory with 2 experts: xloom-cached: exit code 1 (RuntimeError: no room)",
    ]


def test_parts_in_another_process(parts, tmp_path: Path):
    write_parts(parts, tmp_path)
    again = read_parts(parts.base, tmp_path, parts.expert_folders)
    assert torch.equal(again.head_weight, parts.head_weight)
    assert torch.equal(again.head_bias, parts.head_bias)


def test_ratio_says_how_many_times_faster():
    row = timed_row("xloom", 4, [1.0, 2.0, 4.0], [4.0, 6.0, 8.0], loss=1.0, fill_s=6.0, batch=3)
    assert (row.s_per_step, row.ratio_to_peft, row.ratio_low, row.ratio_high) == (2.0, 3.0, 2.5, 3.5)
    assert (row.fill_s_per_row, row.s_per_step_with_fill) == (2.0, 4.0)


def test_bfloat16_runs():
    rows = bench_train(experts=[2], dtype="bfloat16", memory=False, systems=["xloom"], **TINY).rows
    assert [r.loss_equal for r in rows] == [None, None]
    assert rows[1].gradient_error is not None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"systems": ["xlom"]}, r"'xlom'.*peft, xloom, xloom-cached"),
        ({"dtype": "float31"}, "float32, bfloat16"),
        ({"experts": []}, "experts"),
        ({"batch": 0}, "batch must be at least 1, found 0"),
        ({"completion": 12}, r"completion must be below tokens \(12\), found 12"),
        ({"base": "somewhere"}, "its own"),
    ],
)
def test_refusals(wrong: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        bench_train(**({"experts": [2], "memory": False} | TINY | wrong))


def test_json_and_table(report: TrainReport, tmp_path: Path):
    row = dataclasses.replace(report.rows[2], peak_mb=1234.0, floor_mb=300.0, memory_to_peft=0.45)
    wrong = dataclasses.replace(report.rows[1], loss_equal=False)
    shown = dataclasses.replace(report, rows=[report.rows[0], wrong, row])
    write_report(shown, tmp_path / "train.json")
    read = json.loads((tmp_path / "train.json").read_text())
    assert list(read) == ["what", "machine", "settings", "rows", "notes"]
    assert [TrainRow(**r) for r in read["rows"]] == shown.rows
    assert {"load_before", "load_after", "threads"} <= set(read["machine"])
    console = Console(width=200, record=True)
    console.print(shown.table())
    text = console.export_text()
    for word in ("xloom-cached", "1234", "0.45", "yes", "NO", "is another model"):
        assert word in text


def test_importing_costs_little():
    code = "import sys, xloom.benchmark.bench_train; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

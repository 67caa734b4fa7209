"""The benchmark measures what it says: same tokens, consistent figures, a file that reads back. Never how fast."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tiny import tiny_base
from xloom.benchmark import systems
from xloom.benchmark.parts import Parts, make_parts, random_base
from xloom.benchmark.run import bench_decode, bench_prefill
from xloom.benchmark.tables import Report, Row, check_target, write_report
from xloom.benchmark.timing import in_turn, machine, ratios, spread
from xloom.errors import ConfigError, NotFoundError

TINY = {"layers": 3, "hidden": 32, "vocab": 64, "experts": 2, "rank": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two threads wait for each other on a machine that is busy elsewhere, and tiny tensors need only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def decoded() -> Report:
    return bench_decode(prompt_tokens=5, new_tokens=(6, 12), rounds=2, peft_rounds=1, **TINY)


def parts(base, folder: Path) -> Parts:
    return make_parts(base, folder, experts=2, rank=3)


def tiny_llama():
    return random_base(torch.float32, "cpu", layers=3, hidden=32, vocab=64)


def test_rows_of_decode(decoded: Report):
    assert decoded.what == "decode"
    assert [(r.system, r.new_tokens) for r in decoded.rows] == [
        (name, length) for length in (6, 12) for name in ("base", "peft", "xloom", "xloom-early-gate")
    ]
    for row in decoded.rows:
        for field in dataclasses.fields(Row):
            value = getattr(row, field.name)
            if field.type is float:
                assert isinstance(value, float)
                assert 0 < value < math.inf
        assert row.rounds == (1 if row.system == "peft" else 2)
        assert row.ms == pytest.approx(row.ms_per_token * row.new_tokens)
        assert row.ms_per_token_min <= row.ms_per_token_low <= row.ms_per_token <= row.ms_per_token_high
        assert row.ratio_low <= row.ratio_to_base <= row.ratio_high
        if row.system == "base":
            assert row.ratio_low == row.ratio_high == 1
        assert (row.tokens_equal_to_peft is None) == (row.system != "xloom")
    assert any("peft ran 1 of 2 rounds" in note for note in decoded.notes)


def test_ratio_of_a_single_round():
    report = bench_decode(prompt_tokens=4, new_tokens=[3], rounds=1, systems=["xloom"], **TINY)
    base, xloom = report.rows
    assert [base.system, xloom.system] == ["base", "xloom"]  # the base is always there to be measured against
    assert xloom.ratio_to_base == pytest.approx(xloom.ms_per_token / base.ms_per_token)
    assert xloom.tokens_equal_to_peft is None  # nothing to compare with


def test_same_tokens_as_peft(decoded: Report):
    for row in decoded.rows:
        if row.system == "xloom":
            assert (row.tokens_equal_to_peft, row.tokens_equal, row.tokens_compared) == (True,) + (row.new_tokens,) * 2


def test_the_comparison_can_fail(tmp_path: Path):
    """The experts change what the base says, and the head's scalings matter: equal tokens are no accident."""
    made = parts(tiny_llama(), tmp_path)
    ids = torch.arange(5)[None]
    other = dataclasses.replace(made, head_weight=made.head_weight.flip(0))
    said = {name: systems.build(name, made).decode(ids, 12) for name in ("base", "xloom", "peft")}
    assert torch.equal(said["xloom"], said["peft"])
    assert not torch.equal(said["xloom"], said["base"])
    assert len(said["xloom"].unique()) > 4
    logits = [systems.build("xloom", p).model(ids).logits for p in (made, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_peft_is_left_out_of_long_decodes():
    report = bench_decode(
        prompt_tokens=4, new_tokens=(4, 8), rounds=1, peft_new_tokens=4, systems=["peft", "xloom"], **TINY
    )
    assert [(r.system, r.new_tokens) for r in report.rows if r.system == "peft"] == [("peft", 4)]
    long = report.rows[-1]
    assert (long.new_tokens, long.tokens_equal_to_peft, long.tokens_equal, long.tokens_compared) == (8, True, 4, 4)
    assert report.notes == ["peft was not run for 8 new tokens (peft_new_tokens=4)"]


def test_rows_of_prefill():
    report = bench_prefill(prompt_tokens=(9, 4), rounds=2, **TINY)
    assert [r.prompt_tokens for r in report.rows] == [4] * 4 + [9] * 4
    for row in report.rows:
        assert row.new_tokens == 0
        assert row.ms == pytest.approx(row.ms_per_token * row.prompt_tokens)
        assert row.tokens_equal_to_peft is (True if row.system == "xloom" else None)


def test_no_end_token_stops_it(tmp_path: Path):
    """Whatever the base's end token is, the length is the one asked for, and the base given keeps its settings."""
    base = tiny_base("llama")
    end = list(range(64))
    base.config.eos_token_id = base.generation_config.eos_token_id = end
    made = parts(base, tmp_path)
    for name in systems.BUILDERS:
        assert systems.build(name, made).decode(torch.arange(4)[None], 7).shape == (1, 7)
    assert base.generation_config.eos_token_id == base.config.eos_token_id == end


def test_systems_share_the_weights_of_the_base_and_leave_it_alone(tmp_path: Path):
    base = tiny_llama()
    modules = list(base.modules())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    made = parts(base, tmp_path)
    for name in systems.BUILDERS:
        system = systems.build(name, made)
        assert base.lm_head.weight.data_ptr() in {p.data_ptr() for p in system.model.parameters()}
        system.decode(torch.arange(4)[None], 3)
    assert list(base.modules()) == modules
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_bfloat16_runs():
    report = bench_decode(prompt_tokens=4, new_tokens=[3], rounds=1, dtype="bfloat16", **TINY)
    assert report.settings["dtype"] == "bfloat16"
    assert len(report.rows) == 4


def test_a_folder_as_base(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "base")
    report = bench_decode(str(tmp_path / "base"), prompt_tokens=4, new_tokens=[3], rounds=1, experts=2, systems=[])
    assert report.settings["base"] == str(tmp_path / "base")
    with pytest.raises(NotFoundError):
        bench_decode(str(tmp_path / "nowhere"), new_tokens=[3])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"systems": ["xlom"]}, r"'xlom'.*base, peft, xloom, xloom-early-gate"),
        ({"dtype": "float31"}, "float32, bfloat16"),
        ({"new_tokens": []}, "new_tokens"),
        ({"rounds": 0}, "rounds must be at least 1, found 0"),
        ({"peft_rounds": 0}, "peft_rounds"),
        ({"experts": 0}, "experts=0"),
        ({"layers": 0}, "layers"),
        ({"hidden": 33}, "hidden must be even"),
        ({"base": "somewhere"}, "its own"),
    ],
)
def test_refusals(wrong: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        bench_decode(**({"new_tokens": [2], "rounds": 1} | TINY | wrong))


def test_json_and_table(decoded: Report, tmp_path: Path):
    path = tmp_path / "decode.json"
    path.write_text("older")
    write_report(decoded, path)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(decoded.as_json()))
    assert [Row(**row) for row in read["rows"]] == decoded.rows
    assert {"cpu", "threads", "torch", "load_before", "load_after"} <= set(read["machine"])
    assert list(tmp_path.iterdir()) == [path]
    console = Console(width=200, record=True)
    console.print(decoded.table())
    text = console.export_text()
    assert "xloom-early-gate" in text
    assert "12/12" in text


def test_a_file_that_cannot_be_written_is_refused_beforehand(tmp_path: Path):
    for target in (tmp_path, tmp_path / "missing" / "file.json"):
        with pytest.raises(ConfigError, match=str(target.parent)):
            check_target(target)


def test_turns():
    """Every call once per round, the order turning; a call with fewer rounds takes part in the first ones."""
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timed = in_turn(calls, {"a": 3, "b": 1, "c": 3})
    assert "".join(order) == "abc" + "ca" + "ca"
    assert {name: len(times.seconds) for name, times in timed.items()} == {"a": 3, "b": 1, "c": 3}


def test_spread_and_ratios():
    assert spread([4.0]) == (4, 4, 4)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3, 2, 4)
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (3, 2.5, 3.5)
    assert ratios([2.0], [1.0, 3.0, 2.0]) == (2, 2, 2)  # the base's own later rounds have no partner
    assert machine("cpu")["accelerator"] is None


def test_importing_costs_little():
    code = "import sys, xloom.benchmark.run; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

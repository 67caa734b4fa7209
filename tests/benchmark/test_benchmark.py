"""The benchmark measures what it says: same tokens, consistent figures, a file that reads back. Never how fast."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from test_architectures import mixed
from tiny import prompt, tiny_base
from xloom.benchmark import systems
from xloom.benchmark.parts import Parts, make_parts, random_base
from xloom.benchmark.run import bench_decode, bench_prefill
from xloom.benchmark.systems import Decoded
from xloom.benchmark.tables import Report, Row, check_target, write_report
from xloom.benchmark.timing import in_turn, machine, ratios, spread
from xloom.errors import BaseMismatchError, ConfigError, NotFoundError

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
    return bench_decode(prompt_tokens=5, new_tokens=(6, 12), rounds=2, peft_whole=6, **TINY)


def parts(base, folder: Path) -> Parts:
    return make_parts(base, folder, experts=2, rank=3)


def tiny_llama():
    return random_base(torch.float32, "cpu", layers=3, hidden=32, vocab=64)


def test_rows_of_decode(decoded: Report):
    assert decoded.what == "decode"
    assert [(r.system, r.new_tokens) for r in decoded.rows] == [
        (name, length) for length in (6, 12) for name in systems.NAMES
    ]
    for row in decoded.rows:
        for field in dataclasses.fields(Row):
            value = getattr(row, field.name)
            if field.type is float:
                assert isinstance(value, float)
                assert 0 < value < math.inf
        assert row.rounds == 2
        assert row.ms_per_token * (row.new_tokens - 1) < row.ms  # without the prompt
        assert row.ms_per_token_min <= row.ms_per_token_low <= row.ms_per_token <= row.ms_per_token_high
        assert row.ratio_low <= row.ratio_to_base <= row.ratio_high
        if row.system == "base":
            assert row.ratio_low == row.ratio_high == 1
        assert (row.times_faster_than_peft is None) == (row.system == "peft")
        assert row.estimated == (row.system == "peft" and row.new_tokens == 12)
        counted = row.system.endswith(("-lagged", "-speculative"))
        assert (row.tokens_per_forward is not None) == counted
        if row.system == "xloom-lagged":  # one draft at a time
            assert row.tokens_per_forward <= 1


def test_drafts_share_the_model_and_give_its_text(decoded: Report, tmp_path: Path):
    same = {"xloom": "peft"}
    same |= {name: plain for name, (plain, drafter) in systems.NAMES.items() if drafter}
    for row in decoded.rows:
        assert row.same_as == same.get(row.system)
        if row.same_as is None:
            assert row.tokens_equal is row.tokens_compared is None
            continue
        # PEFT wrote no more than 6
        compared = 6 if row.same_as == "peft" else row.new_tokens
        assert (row.tokens_equal, row.tokens_compared) == (2 * compared, 2 * compared)
    built = systems.build_all(list(systems.NAMES), parts(tiny_llama(), tmp_path))
    for name, (plain, _) in systems.NAMES.items():
        assert built[name].model is built[plain].model


def test_drafters_are_who_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What each hands to `generate`, and that its tally is the one that counts."""
    built = systems.build_all(list(systems.NAMES), parts(tiny_llama(), tmp_path))
    for name, system in built.items():
        given, generate = {}, system.model.generate

        def keep(given=given, generate=generate, **options):
            given.update(options)
            return generate(**options)

        monkeypatch.setattr(system.model, "generate", keep)
        tally = system.decode(torch.arange(4).repeat(4)[None], 9).tally
        monkeypatch.undo()
        assert given.get("prompt_lookup_num_tokens") == (systems.LOOKED_UP if name.endswith("-lookup") else None)
        looked_up = {"lagged": 0, "speculative": systems.LOOKED_UP}.get(name.rpartition("-")[2])
        if looked_up is None:
            assert "custom_generate" not in given
            assert tally is None
        else:
            assert given["custom_generate"].looked_up == looked_up
            assert given["custom_generate"].tally is tally
            assert tally.tokens == 8  # after the first


def test_ratio_of_a_single_round():
    report = bench_decode(prompt_tokens=4, new_tokens=[3], rounds=1, systems=["xloom"], **TINY)
    base, xloom = report.rows
    assert [base.system, xloom.system] == ["base", "xloom"]  # the base is always there to be measured against
    assert xloom.ratio_to_base == pytest.approx(xloom.ms_per_token / base.ms_per_token)
    assert xloom.same_as is None  # nothing to compare with


def test_steps_of_a_sample_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Where a step costs a polynomial of second degree in the text's length."""
    cost, seen = lambda length: 0.3 + 0.01 * length + 2e-5 * length**2, []

    def decode(self, ids, new_tokens):
        assert new_tokens == 1
        seen.append(ids)
        return Decoded([7], cost(ids.shape[1]), 0.0, 0.0)

    monkeypatch.setattr(systems.System, "decode", decode)
    ids = torch.arange(10)[None]
    found = systems.decode_sampled(systems.System("peft", torch.nn.Identity()), ids, 401)
    every = [cost(10 + i) for i in range(401)]
    assert found.seconds == pytest.approx(sum(every), rel=1e-3)
    assert found.s_per_token == pytest.approx(sum(every[1:]) / 400, rel=1e-3)
    assert (found.tokens, found.first_s) == ([], cost(10))
    assert [text.shape[1] for text in seen] == [10, 110, 210, 310, 410]
    assert seen[1][0].tolist() == [*range(10)] * 11


def test_time_of_a_token_is_that_after_the_first(tmp_path: Path):
    """Whatever the prompt took: it is slow here, and its time is in `first_s` and the whole alone."""
    system = systems.build("xloom", parts(tiny_llama(), tmp_path))
    slow = lambda module, args, kwargs: time.sleep(2.0 if kwargs["input_ids"].shape[1] > 1 else 0.0)
    system.model.register_forward_pre_hook(slow, with_kwargs=True)
    found = system.decode(torch.arange(5)[None], 4)
    assert found.first_s >= 2
    assert found.seconds >= found.first_s + 2.9 * found.s_per_token
    assert found.s_per_token < found.first_s / 2


def test_rounds_of_several_prompts():
    """Every round has a prompt of its own, and texts are compared with those of the same prompt."""
    prompts = [torch.tensor([[1, 2, 3]]), torch.tensor([[9, 8, 7, 6, 5]])]
    names = ["xloom", "xloom-speculative"]
    report = bench_decode(prompts=prompts, new_tokens=[5], systems=names, **TINY)
    for row in report.rows:
        assert (row.rounds, row.prompt_tokens) == (2, 4)
    assert (report.rows[2].tokens_equal, report.rows[2].tokens_compared) == (10, 10)
    assert (report.settings["rounds"], report.settings["prompts"]) == (2, 2)
    with pytest.raises(ConfigError, match="at least one"):
        bench_decode(prompts=[], new_tokens=[5], **TINY)


def test_models_that_are_there(tmp_path: Path):
    """Called by their names; PEFT has the first one's experts, and its text is its own."""
    models = {
        "two": mixed("llama", tmp_path / "two"),
        "one": mixed("llama", tmp_path / "one", gate_at_layer=0, head_input="running_mean"),
    }
    report = bench_decode(models=models, prompts=[prompt(1, 6)], new_tokens=[5])
    rows = {row.system: row for row in report.rows}
    assert list(rows) == [
        "base", "base-lookup", "two", "two-lookup", "two-lagged", "two-speculative", "one", "one-lookup",
        "one-speculative", "peft",
    ]  # fmt: skip
    assert rows["two"].same_as is rows["peft"].same_as is None
    assert rows["two-lagged"].tokens_equal == rows["one-lookup"].tokens_equal == 5
    assert any("its text is another" in note for note in report.notes)
    with pytest.raises(ConfigError, match="'xloom'.*two-lagged"):
        bench_decode(models=models, prompts=[prompt(1, 6)], new_tokens=[5], systems=["xloom"])


def test_first_experts_of_parts(tmp_path: Path):
    """The head's rows for each site and expert are those of the experts that stay."""
    made = make_parts(tiny_llama(), tmp_path, experts=3, rank=2)
    two = made.first(2)
    assert list(two.expert_folders) == ["expert0", "expert1"]
    for whole, cut in ((made.head_weight, two.head_weight), (made.head_bias, two.head_bias)):
        assert torch.equal(whole.unflatten(0, (21, 3))[:, :2].flatten(0, 1), cut)
    with pytest.raises(BaseMismatchError, match="called nothing"):
        make_parts(tiny_llama(), tmp_path / "x", experts=1, rank=2, targets=["nothing"])


def test_the_comparison_can_fail(tmp_path: Path):
    """The experts change what the base says, and the head's scalings matter: equal tokens are no accident."""
    made = parts(tiny_llama(), tmp_path)
    ids = torch.arange(5)[None]
    other = dataclasses.replace(made, head_weight=made.head_weight.flip(0))
    said = {name: systems.build(name, made).decode(ids, 12).tokens for name in ("base", "xloom", "peft")}
    assert said["xloom"] == said["peft"]
    assert said["xloom"] != said["base"]
    assert len(set(said["xloom"])) > 4
    logits = [systems.build("xloom", p).model(ids).logits for p in (made, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_rows_of_prefill():
    report = bench_prefill(prompt_tokens=(9, 4), rounds=2, **TINY)
    assert [r.prompt_tokens for r in report.rows] == [4] * 4 + [9] * 4
    for row in report.rows:
        assert row.new_tokens == 0
        assert row.ms == pytest.approx(row.ms_per_token * row.prompt_tokens)
        assert (row.tokens_equal, row.tokens_compared) == ((2, 2) if row.system == "xloom" else (None, None))
        assert not row.estimated
    with pytest.raises(ConfigError, match="'xloom-lagged'"):
        bench_prefill(prompt_tokens=[4], systems=["xloom-lagged"], **TINY)


def test_no_end_token_stops_it(tmp_path: Path):
    """Whatever the base's end token is, the length is the one asked for, and the base given keeps its settings."""
    base = tiny_base("llama")
    end = list(range(64))
    base.config.eos_token_id = base.generation_config.eos_token_id = end
    made = parts(base, tmp_path)
    for name in systems.NAMES:
        assert len(systems.build(name, made).decode(torch.arange(4)[None], 7).tokens) == 7
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
    names = ["peft", "xloom-speculative", "xloom-early-gate"]
    report = bench_decode(prompt_tokens=4, new_tokens=[3], rounds=1, dtype="bfloat16", systems=names, **TINY)
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
        ({"systems": ["xlom"]}, r"'xlom'.*base, base-lookup, peft, xloom"),
        ({"dtype": "float31"}, "float32, bfloat16"),
        ({"new_tokens": []}, "new_tokens"),
        ({"new_tokens": [1]}, "new_tokens must be at least 2, found 1"),
        ({"rounds": 0}, "rounds must be at least 1, found 0"),
        ({"peft_whole": 0}, "peft_whole"),
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
    assert "24/24" in text
    assert "~" in text
    assert "Simpson" in text


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
    assert {name: len(times.results) for name, times in timed.items()} == {"a": 3, "b": 1, "c": 3}


def test_spread_and_ratios():
    assert spread([4.0]) == (4, 4, 4)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3, 2, 4)
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (3, 2.5, 3.5)
    assert ratios([2.0], [1.0, 3.0, 2.0]) == (2, 2, 2)  # the base's own later rounds have no partner
    assert machine("cpu")["accelerator"] is None


def test_importing_costs_little():
    code = "import sys, xloom.benchmark.run; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

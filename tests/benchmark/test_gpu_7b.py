"""The script for a GPU runs as a whole on a CPU, with small layers: all its figures, and errors that stay in place."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_7b.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_7b", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_7b"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_7b"]


@pytest.fixture(scope="module")
def found(script, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("gpu") / "tiny.json"
    result = script.main(["--tiny", "--json", str(path), "--seconds", "3600"])
    assert json.loads(path.read_text()) == result
    assert list(path.parent.iterdir()) == [path]
    return result


def test_only_what_needs_a_gpu_fails(script, found):
    graphs = {f"decode: {form} {name}" for form in ("graph", "compile-graph") for name in script.PLAIN}
    assert set(found["errors"]) == graphs
    assert all("CUDA graphs need a GPU" in error for error in found["errors"].values())


def test_every_system_in_every_form(script, found):
    rows = {(row["system"], row["form"]): row for row in found["decode"]}
    expected = {(name, "generate") for name in (*script.PLAIN, *script.DRAFTING, "peft")}
    expected |= {(name, form) for name in script.PLAIN for form in ("step", "compile")}
    assert set(rows) == expected
    for (name, form), row in rows.items():
        ms = row["ms_per_token"]
        assert 0 < ms["low"] <= ms["median"] <= ms["high"] < math.inf
        assert row["times_faster_than_peft"] > 0
        assert ("share_of_floor" in row) == (name in script.PLAIN)
        if form in ("step", "compile"):  # the very text of `generate`
            assert row["tokens_equal"] == [4, 4]
        elif name in script.DRAFTING:
            assert row["tokens_equal"] == [script.TINY.new] * 2
    peft = [row["new_tokens"] for row in found["decode"] if row["system"] == "peft"]
    assert peft == [script.TINY.new, script.TINY.long_new]
    assert {row["system"] for row in found["prefill"]} == {*script.PLAIN, "peft"}


def test_the_floor_counts_what_is_read(script, found):
    s = script.TINY
    head_size = s.hidden // s.heads
    linears = s.hidden * (2 * s.heads + 2 * s.kv_heads) * head_size + 3 * s.hidden * s.mlp
    decoder = s.layers * (linears + 2 * s.hidden) + s.hidden
    kv = 2 * s.layers * s.kv_heads * head_size * (s.prompt + s.new // 2)
    floor = found["floor"]
    assert floor["base"]["bytes"] == 4 * (decoder + kv + s.vocab * s.hidden)
    experts = (
        s.layers
        * s.rank
        * s.experts
        * (4 * s.hidden + 2 * s.heads * head_size + 2 * s.kv_heads * head_size + s.hidden + s.mlp)
    )
    outputs = s.layers * len(script.TARGETS) * s.experts
    assert floor["xloom"]["own_bytes"] == 4 * (experts + outputs * (s.hidden + 1))
    assert floor["xloom"]["bytes"] == 4 * (2 * (decoder + kv) + s.vocab * s.hidden) + floor["xloom"]["own_bytes"]
    assert floor["base"]["bytes"] < floor["xloom-early-gate"]["bytes"] < floor["xloom"]["bytes"]
    assert floor["base"]["ms"] == pytest.approx(1e3 * floor["base"]["bytes"] / found["bytes_per_second"])


def test_a_part_that_fails_leaves_the_others(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    for name in ("generate_texts", "decode_steps", "decode_sampled"):
        monkeypatch.setattr(script, name, fail)
    found = script.main(["--tiny", "--json", str(tmp_path / "x.json"), "--seconds", "3600"])
    assert "out of memory" in found["errors"]["decode: generate"]
    assert "out of memory" in found["errors"]["decode: step xloom"]
    assert "out of memory" in found["errors"]["peft: 16 new tokens"]
    assert found["decode"] == []
    assert {row["system"] for row in found["prefill"]} == {*script.PLAIN, "peft"}


def test_no_part_starts_late(script, tmp_path: Path):
    found = script.main(["--tiny", "--json", str(tmp_path / "x.json"), "--seconds", "-1"])
    assert set(found["errors"]) == {"bandwidth", "build"}
    assert all("no time was left" in error for error in found["errors"].values())
    assert found["decode"] == found["prefill"] == []


def test_the_forward_is_given_back(script):
    model = script.random_mistral(script.TINY, "cpu")
    run = script.Run(script.TINY, "cpu", Path("x"), 0.0)
    with script.compiled(model, run):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
    assert torch.get_default_dtype() == torch.float32

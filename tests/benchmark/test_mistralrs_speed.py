"""The comparison with mistral.rs: rounds are paired, errors stay in their rows, and processes that fail are told."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mistralrs_speed.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mistralrs_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["mistralrs_speed"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mistralrs_speed"]
    sys.path[:] = path


def took(seconds: float) -> dict:
    return {"s_per_token": seconds, "seconds": 9 * seconds, "short_s": seconds, "cores": 1.0, "prompt_tokens": 5}


def test_ratios_are_those_of_rounds_that_both_got_through(script):
    failed = {"error": "out of memory"}
    found = {
        "base": [took(0.5), took(1), took(1)],
        "xloom": [took(1), took(2), took(4)],
        "mistralrs-base": [took(2), took(5), took(2)],
        "mistralrs-xlora": [took(8), failed, took(4)],
        "mistralrs-xlora-f32": [failed, failed, failed],
        "mistralrs-base-f32": [took(2), took(5), took(2)],
    }
    rows = {row["system"]: row for row in script.rows_of(found, 10)}
    mixture = rows["mistralrs-xlora"]
    assert (mixture["rounds"], mixture["error"]) == (2, "out of memory")
    assert mixture["ratio_to_xloom"]["median"] == (8 / 1 + 4 / 4) / 2
    assert mixture["ratio_to_own_base"]["median"] == (8 / 2 + 4 / 2) / 2
    assert mixture["ms_per_token"]["median"] == 6000
    assert rows["xloom"]["ratio_to_own_base"]["median"] == 2
    assert rows["mistralrs-xlora-f32"].keys() == {"system", "new_tokens", "rounds", "error"}


def test_a_turn_counts_the_tokens_after_the_short_text(script, monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def write(new_tokens: int, show: bool) -> dict:
        nonlocal now
        now += 5.0 + 2.0 * (new_tokens - 1)  # the prompt, then each token
        return {"count": new_tokens}

    monkeypatch.setattr(script.time, "perf_counter", lambda: now)
    turn = script.take_turn(write, 11, False)
    assert (turn["short_s"], turn["seconds"], turn["s_per_token"]) == (7.0, 25.0, 2.0)
    with pytest.raises(RuntimeError, match="3 of 11 tokens"):
        script.take_turn(lambda new_tokens, show: {"count": 3}, 11, False)


def test_an_engine_answers_with_its_error(script, tmp_path: Path):
    """This interpreter may have no mistralrs; one that has it lacks the folders."""
    asked = argparse.Namespace(threads=1, patience=60.0)
    with script.started(sys.executable, "mistralrs", tmp_path / "log", asked) as engine:
        for question in ({"job": {"system": "mistralrs-base", "paths": {}}}, {"system": "x", "new_tokens": 2}):
            answer = engine.ask(**question)
            assert "Error" in answer["error"]
        engine.process.stdin.write("no JSON\n")
        assert "ended" in engine.ask(system="x")["error"]
        assert "JSONDecodeError" in engine.last_words()


def test_an_engine_that_does_not_answer_is_ended(script, tmp_path: Path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    asked = argparse.Namespace(threads=1, patience=0.1)
    with script.started(str(silent), "mistralrs", tmp_path / "log", asked) as engine:
        assert "no answer" in engine.ask(job={})["error"]
        assert engine.process.wait(5) != 0
        assert "ended" in engine.ask(job={})["error"]


def test_the_head_needs_the_standard_library_alone(tmp_path: Path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "--side", "mistralrs"],
        input=json.dumps({"job": {"system": "mistralrs-base", "paths": {}}}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ModuleNotFoundError: No module named 'mistralrs'" in json.loads(done.stdout)["error"]

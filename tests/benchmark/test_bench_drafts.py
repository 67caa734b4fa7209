"""`bench_drafts` measures what it says: same texts, consistent counts. Never how fast."""

import pytest
from rich.console import Console

from test_architectures import mixed
from tiny import prompt
from xloom.benchmark.bench_drafts import ALL, bench_drafts
from xloom.benchmark.tables import write_report
from xloom.errors import ConfigError


def test_rows(tmp_path):
    models = {
        "two-pass": mixed("llama", tmp_path / "two"),
        "single-pass": mixed("llama", tmp_path / "one", gate_at_layer=0, head_input="running_mean"),
    }
    prompts = {"a": [prompt(1, 6), prompt(1, 4, seed=2)], "b": [prompt(1, 9, seed=3)]}
    report = bench_drafts(models, prompts, new_tokens=12)
    systems = [
        "base", "base-lookup", "two-pass", "two-pass-lookup", "two-pass-lagged", "two-pass-speculative", "single-pass",
        "single-pass-lookup", "single-pass-speculative",
    ]  # fmt: skip
    assert [(row.column, row.system) for row in report.rows] == [(c, s) for c in ("a", "b", ALL) for s in systems]
    for row in report.rows:
        assert row.prompts == {"a": 2, "b": 1, ALL: 3}[row.column]
        assert row.new_tokens == 12 * row.prompts
        assert row.ratio_low <= row.ratio_to_base <= row.ratio_high
        assert (row.system != "base") or row.ratio_to_base == 1.0
        counted = row.system.endswith(("lagged", "speculative"))
        assert (row.tokens_per_forward is not None) == counted
        assert row.same_text == (row.prompts if counted or row.system.endswith("lookup") else None)
        if row.system == "two-pass-lagged":  # one draft at a time
            assert row.tokens_per_forward <= 1
    Console(width=160).print(report.table())
    write_report(report, tmp_path / "found.json")


def test_until_the_end(tmp_path):
    model = mixed("llama", tmp_path)
    ids = prompt(1, 6)
    model.generation_config.eos_token_id = int(model.generate(ids, max_new_tokens=9, do_sample=False)[0, -1])
    report = bench_drafts({"m": model}, {"a": [ids]}, new_tokens=30, until_end=True)
    assert {row.new_tokens for row in report.rows} == {len(list(model.stream(ids, max_new_tokens=30, do_sample=False)))}


def test_nothing_to_measure(tmp_path):
    with pytest.raises(ConfigError, match="one model and one prompt"):
        bench_drafts({}, {"a": [prompt(1, 4)]})
    with pytest.raises(ConfigError, match="new_tokens must be at least 2"):
        bench_drafts({"m": mixed("llama", tmp_path)}, {"a": [prompt(1, 4)]}, new_tokens=0)

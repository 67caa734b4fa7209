"""`bench_experts` measures what it says: these experts, kept by these tokens. Never how fast."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from xloom.benchmark import bench_experts as under_test
from xloom.benchmark.bench_experts import ExpertsReport, ExpertsRow, Mixed, bench_experts
from xloom.benchmark.parts import make_parts, random_base
from xloom.benchmark.systems import Decoded, System
from xloom.benchmark.tables import write_report
from xloom.errors import ConfigError

TINY = {"layers": 3, "hidden": 32, "vocab": 64, "rank": 2, "prompt_tokens": 6, "new_tokens": 3, "rounds": 2}
EXPECTED = [(0, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)]


@pytest.fixture(scope="module")
def report() -> ExpertsReport:
    return bench_experts(experts=(4, 2), **TINY)


def test_rows(report: ExpertsReport, tmp_path):
    found = [(row.task, row.experts, row.top) for row in report.rows]
    assert found == [(task, *mixed) for task in ("decode", "prefill") for mixed in EXPECTED]
    for row in report.rows:
        assert (row.rounds, row.tokens) == (2, 3 if row.task == "decode" else 6)
        assert 0 < row.ms_per_token_low <= row.ms_per_token <= row.ms_per_token_high
        assert row.ratio_low <= row.ratio_to_base <= row.ratio_high
        assert (row.ratio_to_4 is None) == (row.experts == 0)
        if (row.experts, row.top) == (4, 0):
            assert row.ratio_to_4 == row.ratio_to_4_low == row.ratio_to_4_high == 1
        if row.experts == 0:
            assert row.ratio_to_base == 1
    write_report(report, tmp_path / "experts.json")
    read = json.loads((tmp_path / "experts.json").read_text())
    assert [ExpertsRow(**row) for row in read["rows"]] == report.rows
    console = Console(width=160, record=True)
    console.print(report.table())
    text = console.export_text()
    assert all(word in text for word in ("all mixed", "top-2", "x 4 experts"))


def test_what_runs(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """As many experts as the row says, and as many of them above zero at every token and site."""
    seen = {}

    def decode(self, ids, new_tokens):
        if self.name != "base":
            with torch.no_grad():
                kept = (self.model(ids).scalings > 0).sum(-1)
            seen[len(self.model.experts), self.model.router.top_k] = set(kept.flatten().tolist())
        return Decoded([1], 1.0, 0.5, 0.1)

    monkeypatch.setattr(System, "decode", decode)
    base = random_base(torch.float32, "cpu", layers=3, hidden=32, vocab=64)
    systems = under_test._systems(make_parts(base, tmp_path, experts=4, rank=2), [2, 4], lambda text: None)
    calls = under_test._calls(systems, torch.arange(5)[None], 3, [1, 2])
    assert [tuple(mixed) for mixed in calls["decode"]] == [tuple(mixed) for mixed in calls["prefill"]] == EXPECTED
    for call in calls["decode"].values():
        call()
    assert seen == {(2, None): {2}, (2, 1): {1}, (4, None): {4}, (4, 1): {1}, (4, 2): {2}}


def test_ratios_are_within_rounds():
    gave = {
        Mixed(0): [Decoded([], 6.0, 0.0, 1.0), Decoded([], 12.0, 0.0, 2.0)],
        Mixed(4): [Decoded([], 12.0, 0.0, 3.0), Decoded([], 24.0, 0.0, 6.0)],
        Mixed(8, 2): [Decoded([], 24.0, 0.0, 6.0), Decoded([], 48.0, 0.0, 12.0)],
    }
    base, four, eight = under_test._rows("decode", 3, gave)
    assert (base.ms_per_token, four.ratio_to_base, eight.ratio_to_base, eight.ratio_to_4) == (1500, 3, 6, 2)
    assert (four.ratio_low, four.ratio_high) == (3, 3)
    base, four, eight = under_test._rows("prefill", 6, gave)
    assert (base.ms_per_token, four.ratio_to_base, eight.ratio_to_4) == (1500, 2, 2)
    del gave[Mixed(4)]
    assert under_test._rows("decode", 3, gave)[1].ratio_to_4 is None


def test_the_base_and_one_expert(report: ExpertsReport):
    assert {row.system for row in report.rows} == {"base", "all mixed", "top-1", "top-2"}
    rows = bench_experts(experts=[1], top=[], **TINY).rows
    assert [(row.experts, row.top, row.ratio_to_4) for row in rows] == [(0, 0, None), (1, 0, None)] * 2
    assert dataclasses.asdict(rows[0])["task"] == "decode"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": []}, "experts must be at least 1, found nothing"),
        ({"experts": [0, 2]}, "experts"),
        ({"top": [0]}, "top must be at least 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"dtype": "float31"}, "float32, bfloat16"),
    ],
)
def test_refusals(wrong, said):
    with pytest.raises(ConfigError, match=said):
        bench_experts(**({"experts": [2]} | TINY | wrong))

"""Intervals against slow forms, and what pairing is for."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xloom.evaluation import statistics
from xloom.evaluation.statistics import Comparison, errors, interval, mean_interval, resampled_counts, resampled_means


def whole_counts(*args, **options):
    """[R, Q]"""
    return np.concatenate(list(resampled_counts(*args, **options)))


def slow_means(scores, counts):
    """Each resample written out as the questions it drew."""
    out = []
    for row in counts:
        drawn = [score for score, count in zip(scores, row, strict=True) for _ in range(count)]
        assert len(drawn) == len(scores)
        out.append(sum(drawn) / len(drawn))
    return out


def test_resampled_means_are_means_of_what_was_drawn():
    rng = np.random.default_rng(0)
    scores = rng.random((13, 3))
    counts = whole_counts(13, name="a", resamples=50)
    found = resampled_means(scores, name="a", resamples=50)
    for column in range(3):
        assert found[:, column] == pytest.approx(slow_means(scores[:, column], counts))


def test_the_interval_is_that_of_a_bootstrap_written_out():
    rng = random.Random(1)
    scores = [float(rng.random() < 0.7) for _ in range(80)]
    means = sorted(sum(rng.choice(scores) for _ in scores) / len(scores) for _ in range(4000))
    found = mean_interval(np.array(scores), name="x")
    assert found.value == pytest.approx(sum(scores) / len(scores))
    assert found.low == pytest.approx(means[100], abs=0.02)
    assert found.high == pytest.approx(means[3900], abs=0.02)
    # and about that of the normal distribution
    assert found.half == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 80), rel=0.25)


def test_the_same_seed_gives_the_same_interval_and_columns_are_independent():
    assert (whole_counts(9, name="a") == whole_counts(9, name="a")).all()
    assert (whole_counts(9, name="a") != whole_counts(9, name="b")).any()
    assert (whole_counts(9, name="a", seed=1) != whole_counts(9, name="a")).any()


def test_many_questions_need_little_memory(monkeypatch):
    scores = np.random.default_rng(0).random((300, 2))
    whole = resampled_means(scores, name="a", resamples=100)
    monkeypatch.setattr(statistics, "_AT_ONCE", 1000)
    parts = list(resampled_counts(300, name="a", resamples=100))
    assert [len(part) for part in parts] == [3] * 33 + [1]
    assert resampled_means(scores, name="a", resamples=100) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(statistics, "_AT_ONCE", 10)
    assert all(len(part) == 1 for part in resampled_counts(300, resamples=5)), "one at least"


def table(**columns):
    return Comparison({name: {k: np.array(v, float) for k, v in by.items()} for name, by in columns.items()})


def test_oracle_normalised_mean():
    found = table(
        one={"oracle": [1, 1, 0, 0], "head": [1, 0, 0, 0]},
        two={"oracle": [1, 0, 0, 0], "head": [1, 1, 0, 0]},
        dead={"oracle": [0, 0], "head": [1, 1]},
    )
    normalised = found.normalised(["one", "two", "dead"], "head", "oracle")
    assert normalised.value == pytest.approx((0.5 + 2.0) / 2)
    assert normalised.low <= normalised.value <= normalised.high
    alike = found.normalised(["one", "two"], "oracle", "oracle")
    assert (alike.value, alike.low, alike.high) == (1, 1, 1)
    assert math.isnan(found.normalised(["dead"], "head", "oracle").value)


def test_the_slow_form_of_the_normalised_mean():
    rng = np.random.default_rng(3)
    scores = {c: {s: (rng.random(40) < 0.6).astype(float) for s in ("oracle", "head")} for c in ("one", "two")}
    samples = []
    counts = {c: whole_counts(40, name=c) for c in scores}
    for r in range(2000):
        ratios = []
        for column, by_system in scores.items():
            ratios.append((counts[column][r] @ by_system["head"]) / (counts[column][r] @ by_system["oracle"]))
        samples.append(sum(ratios) / 2)
    found = Comparison(scores).normalised(["one", "two"], "head", "oracle")
    assert found.low == pytest.approx(np.quantile(samples, 0.025))
    assert found.high == pytest.approx(np.quantile(samples, 0.975))


def test_pairing_sees_a_small_but_steady_difference():
    """One system is right wherever the other is, and on a few questions more: unpaired intervals overlap widely."""
    rng = np.random.default_rng(0)
    worse = (rng.random(200) < 0.5).astype(float)
    better = worse.copy()
    better[np.flatnonzero(worse == 0)[:12]] = 1
    found = table(a={"worse": worse, "better": better})
    assert found.cell("a", "better").low < found.cell("a", "worse").high
    difference = found.difference(["a"], "better", "worse")
    assert difference.value == pytest.approx(0.06)
    assert 0 < difference.low < 0.06 < difference.high < 0.12
    back = found.difference(["a"], "worse", "better")
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))


def test_columns_count_alike_in_the_mean():
    found = table(small={"a": [1]}, large={"a": [0] * 99})
    assert found.mean(["small", "large"], "a").value == 0.5
    assert found.has(["small"], "a")
    assert not found.has(["small"], "b")
    assert not found.has([], "a")


def test_infinite_ratios_are_left_out():
    found = interval(1.0, np.array([1.0, np.inf, np.nan, 2.0]))
    assert 1 <= found.low <= found.high <= 2
    alone = interval(3.0, np.array([np.nan]))
    assert (alone.low, alone.high) == (3.0, 3.0)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_intervals_lie_within_the_scores(scores):
    found = mean_interval(np.array(scores), resamples=200)
    assert min(scores) - 1e-9 <= found.low <= found.high <= max(scores) + 1e-9
    assert found.value == pytest.approx(sum(scores) / len(scores))


def test_errors_of_numbers():
    found = errors([(1.0, 1.0), (None, 3.0), (7.0, 5.0)])
    assert found.mae == pytest.approx((0 + 0 + 2) / 3)  # what cannot be read counts as the mean, 3
    assert found.r2 == pytest.approx(1 - 4 / 8)
    assert (found.numbers, found.unreadable) == (3, 1)
    assert errors([(None, 1.0), (None, 3.0)]).r2 == pytest.approx(0)
    assert math.isnan(errors([(1.0, 2.0), (2.0, 2.0)]).r2)

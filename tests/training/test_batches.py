"""Rows as token ids, what is left out of them, and the batches of a run."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from toy import PIECES, chat, toy_rows, write_rows
from xloom.errors import ConfigError, DataError, PromptError
from xloom.training.data import (
    IGNORED,
    Example,
    Examples,
    Row,
    collate,
    overlap,
    plan_batches,
    read_examples,
    rows_record,
    tokenise,
    tokenise_all,
)
from xloom.training.rows import Source


def test_the_completion_starts_where_the_prompt_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = chat("hi", "yo")["messages"]
    ids, start = tokenise(Row(messages[:1], messages[1:], "x:1"), tokenizer)
    text = [PIECES[i] for i in ids]
    assert "".join(text[:start]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text[start:] == ["y", "o", "<|im_end|>"]  # what the template puts after the end is cut
    ids, start = tokenise(Row("hi ", "yo", "x:1"), tokenizer)
    assert [PIECES[i] for i in ids[start:]] == ["y", "o", "<|im_end|>"]


def test_many_rows_at_a_time_are_the_rows_one_by_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xloom.training.data._ROWS_AT_ONCE", 3)
    chats = [row["messages"] for row in toy_rows("up", 5)]
    rows = [Row(m[:-1], m[-1:], "x:1") for m in chats]
    rows[2:2] = [Row("a" * (9 - i), "b" * i, "x:1") for i in range(1, 8)]
    assert list(tokenise_all(rows, tokenizer)) == [tokenise(row, tokenizer) for row in rows]


def test_special_tokens_are_those_of_a_plain_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that starts every text with a token of its own does so once for strings, never for templates."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    messages = chat("hi", "yo")["messages"]
    ids, _ = tokenise(Row(messages[:1], messages[1:], "x:1"), tokenizer)
    wanted = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(ids) == wanted[: len(ids)]
    assert 0 not in ids
    ids, start = tokenise(Row("hi", "yo", "x:1"), tokenizer)
    assert list(ids) == [*tokenizer("hiyo").input_ids, tokenizer.eos_token_id]
    assert (ids.count(0), start) == (1, 3)


def test_a_token_across_the_boundary_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"^x:7: expected the prompt's 2 tokens to begin the whole row, found a token"):
        tokenise(Row("az", "zb", "x:7"), tokenizer)
    with pytest.raises(DataError, match=r"^x:7: expected a prompt, found no tokens in it$"):
        tokenise(Row("", "b", "x:7"), tokenizer)


def test_a_tokenizer_without_what_rows_need_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some/base"
    messages = chat("hi", "yo")["messages"]
    with pytest.raises(PromptError, match=r"^tokenizer some/base: has no chat template"):
        tokenise(Row(messages[:1], messages[1:], "x:1"), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match=r"^tokenizer some/base: has no end token"):
        tokenise(Row("a", "b", "x:1"), tokenizer)


def test_rows_left_out_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pair = {"prompt": "a", "completion": "b"}
    rows = [pair, {"prompt": "a", "completion": " "}, chat("a", ""), pair, {"prompt": "a" * 30, "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read_examples({"up": [path], "down": [Source(path), path]}, tokenizer, max_length=10)
    assert (len(found.items), found.empty, found.too_long, found.duplicates) == (6, 6, 3, 4)
    assert found.domains == {"up": 2, "down": 4}
    assert str(found) == ("6 rows (up 2, down 4), 6 left out as empty, 3 left out as too long, 4 duplicates among them")
    assert str(read_examples({None: [path]}, tokenizer, 99)) == "3 rows, 2 left out as empty, 1 duplicates among them"


def test_a_domain_of_which_nothing_is_left_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good = write_rows(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "b"}])
    bad = write_rows(tmp_path / "bad.jsonl", [chat("a", ""), {"prompt": "abcd", "completion": "b"}])
    with pytest.raises(DataError) as caught:
        read_examples({"up": [good], "down": [bad]}, tokenizer, max_length=4)
    assert str(caught.value) == (
        f"{bad}: expected rows of at most 4 tokens, found none (0 rows, 1 left out as empty, 1 left out as too long)"
    )


def test_overlap_counts_validation_rows_seen_in_training() -> None:
    train = Examples([Example((1, 2), 1, "up"), Example((1, 3), 1, "up")])
    valid = Examples([Example((1, 2), 1, "down"), Example((1, 2), 1), Example((1, 2, 3), 1)])
    assert (overlap(train, valid), overlap(valid, train), overlap(train, Examples())) == (2, 1, 0)


def test_the_record_of_rows_is_plain_json() -> None:
    train = Examples([Example((1, 2), 1, "up"), Example((1, 3), 1, "up")], empty=1, too_long=2, duplicates=3)
    left_out = {"empty": 1, "too_long": 2, "duplicates": 3}
    nothing = {"items": 0, "empty": 0, "too_long": 0, "duplicates": 0, "domains": {}}
    record = rows_record(train, Examples([Example((1, 2), 1)]))
    assert record["train"] == {"items": 2, **left_out, "domains": {"up": 2}}
    assert record["overlap"] == 1
    assert rows_record(Examples(), Examples()) == {"train": nothing, "valid": nothing, "overlap": 0}


def test_collate_pads_on_the_left() -> None:
    rows = [Example((5, 6, 7, 8), 2, "b"), Example((9, 10), 1, "other"), Example((9, 10), 1)]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 10], [0, 0, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert batch["keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 10], [IGNORED, IGNORED, 10]]


# --- plans ---


def test_the_plan_covers_every_row_in_full_batches_of_like_length() -> None:
    lengths = [(i * 37) % 100 for i in range(400)]
    plan = plan_batches(lengths, batch_size=8, batches=100, seed=1)
    assert Counter(plan) == dict.fromkeys(range(400), 2)  # two epochs
    spreads = [max(b) - min(b) for b in ([lengths[i] for i in plan[s : s + 8]] for s in range(0, 800, 8))]
    assert max(spreads) <= 4
    assert plan == plan_batches(lengths, 8, 100, seed=1) != plan_batches(lengths, 8, 100, seed=2)
    assert len(plan_batches([1, 2, 3], batch_size=8, batches=2, seed=0)) == 16


def test_plans_of_interrupted_runs_stay_what_they_were() -> None:
    lengths = [5, 1, 4, 2, 3]
    assert plan_batches(lengths, 2, 5, seed=3) == [1, 1, 0, 0, 4, 4, 2, 2, 3, 3]
    weighted = plan_batches(lengths, 2, 5, seed=3, groups=[0, 0, 0, 1, 1], weights={0: 1, 1: 3})
    assert weighted == [4, 4, 1, 3, 3, 4, 2, 0, 3, 3]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, object]:
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    return {
        "lengths": lengths,
        "batch_size": draw(st.integers(1, 6)),
        "batches": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 9)),
        "pool": draw(st.integers(1, 7)),
    }


@given(run=runs())
def test_rows_come_evenly(run) -> None:
    plan = plan_batches(**run)
    assert len(plan) == run["batches"] * run["batch_size"]
    counts = Counter(plan)
    times = [counts[row] for row in range(len(run["lengths"]))]
    assert max(times) - min(times) <= 1
    assert plan == plan_batches(**run)


@given(run=runs(), data=st.data())
def test_groups_come_by_weight_and_their_rows_evenly(run, data) -> None:
    rows = len(run["lengths"])
    groups = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    weights = data.draw(st.fixed_dictionaries(dict.fromkeys(range(4), st.floats(0.1, 10))))
    plan = plan_batches(**run, groups=groups, weights=weights)
    size = run["batches"] * run["batch_size"]
    assert len(plan) == size
    here = sorted(set(groups))
    total = sum(weights[group] for group in here)
    counts = Counter(plan)
    for group in here:
        share = weights[group] / total
        times = [counts[row] for row in range(rows) if groups[row] == group]
        assert abs(sum(times) - share * size) <= 1 + len(here) * share + 1e-6
        assert max(times) - min(times) <= 1
    assert plan == plan_batches(**run, groups=groups, weights=weights)


def test_no_stretch_of_a_run_forgets_a_group() -> None:
    """A pool holds each group's share, so that a run's first steps see what its last ones do."""
    groups = [0] * 90 + [1] * 10
    plan = plan_batches([1] * 100, 4, 60, seed=0, groups=groups, weights={0: 1, 1: 1}, pool=5)
    shares = [sum(groups[i] for i in plan[start : start + 20]) for start in range(0, 240, 20)]
    assert set(shares) <= {9, 10, 11}
    batches = [tuple(groups[i] for i in plan[s : s + 4]) for s in range(0, 240, 4)]
    assert sum(len(set(batch)) == 2 for batch in batches) > 30, "rows of like length mix within batches"


def test_a_group_of_weight_0_is_left_out() -> None:
    plan = plan_batches([1, 2, 3, 4], 2, 6, seed=0, groups=[0, 1, 0, 1], weights={0: 1, 1: 0, 2: 5})
    assert set(plan) == {0, 2}


@pytest.mark.parametrize("weights", [{}, {0: 1.0}, {0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0, 2: 1.0}])
def test_weights_that_make_no_sense_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match=r"^weights: expected one of at least 0 for each of the groups 0, 1, and not"):
        plan_batches([1, 2], 1, 1, seed=0, groups=[0, 1], weights=weights)


@given(run=runs())
def test_batches_of_a_pool_do_not_overlap_in_length(run) -> None:
    plan, size, pool = plan_batches(**run), run["batch_size"], run["pool"]
    batches = [[run["lengths"][i] for i in plan[s : s + size]] for s in range(0, len(plan), size)]
    for start in range(0, len(batches), pool):
        spans = sorted((min(b), max(b)) for b in batches[start : start + pool])
        assert all(high <= low for (_, high), (low, _) in pairwise(spans))

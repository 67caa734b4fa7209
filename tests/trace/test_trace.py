"""A trace in slices, from its folder, merged and compared is what it was made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xloom
from random_traces import EXPERTS, SITES, random_tokens, random_trace
from xloom.errors import NotFoundError, TraceError, TraceMismatchError, UnknownExpertError
from xloom.trace import About, Tokens, Trace, Turn, compare, merge


def same(one: Trace, other: Trace) -> bool:
    columns = [torch.equal(a, b) for a, b in zip(one.tokens.tensors().values(), other.tokens.tensors().values())]
    kept = torch.equal(one.scalings.nan_to_num(-1), other.scalings.nan_to_num(-1))
    return all(columns) and kept and one.about == other.about


def test_it_is_one_of_the_public_names():
    assert xloom.Trace is Trace


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 30), st.integers(0, 30))
def test_a_folder_gives_every_slice_back(tmp_path_factory, count: int, part: int, start: int, stop: int):
    """Slices of slices, over the boundaries of parts, by token, site and expert."""
    trace = random_trace(count, seed=count)
    folder = tmp_path_factory.mktemp("trace") / "one"
    trace.save(folder, part_tokens=part)
    stored = Trace.load(folder)
    assert same(stored, trace)
    piece, lazy = trace[start:stop], stored[start:stop]
    assert same(lazy, piece)
    assert len(piece) == max(0, min(stop, count) - start)
    assert same(lazy[1:-1], piece[1:-1])
    whole = trace.scalings[start:stop].nan_to_num(-1)
    for s, site in enumerate(SITES):
        assert torch.equal(lazy.site(site).nan_to_num(-1), whole[:, s])
    for n, expert in enumerate(EXPERTS):
        assert torch.equal(lazy.expert(expert).nan_to_num(-1), whole[:, :, n])
    assert lazy.known.tolist() == [at > 0 for at in range(start, min(stop, count))]
    assert not len(piece) or same(merge([*lazy.blocks(4)]), piece)


def test_scalings_are_kept_in_half_precision():
    generator = torch.Generator().manual_seed(1)
    exact = torch.rand(9, len(SITES), len(EXPERTS), generator=generator, dtype=torch.float64)
    trace = Trace(random_tokens(9), exact, About(SITES, EXPERTS))
    assert trace.scalings.dtype == torch.float32
    assert torch.equal(trace.scalings, exact.half().float())
    assert trace.known.all()


def test_texts_turns_and_answers():
    tokens = Tokens.make(
        range(7),
        ["<s>", "hi", "</s>", "<s>", "y", "es", "</s>"],
        special=[True, False, True, True, False, False, True],
        answer=[False, False, False, False, True, True, True],
        turns=[0, 0, 0, 1, 1, 1, 1],
        roles=["user"] * 3 + ["assistant"] * 4,
    )
    trace = Trace(tokens, torch.zeros(7, len(SITES), len(EXPERTS)), About(SITES, EXPERTS))
    assert trace.text == "<s>hi</s><s>yes</s>"
    assert trace.answer == "yes"
    assert trace.turns == [Turn(0, "user", 0, 3), Turn(1, "assistant", 3, 7)]
    assert trace[2:5].turns == [Turn(0, "user", 0, 1), Turn(1, "assistant", 1, 3)]
    assert "7 tokens (3 of the answer)" in repr(trace)
    assert tokens.logprobs.isnan().all()


def test_what_does_not_go_together_is_refused():
    about, tokens = About(SITES, EXPERTS), random_tokens(4)
    for shape in [(3, 6, 3), (4, 5, 3), (4, 6, 2), (4, 6)]:
        with pytest.raises(TraceError, match=rf"\(4, 6, 3\), found \({', '.join(map(str, shape))}\)"):
            Trace(tokens, torch.zeros(shape), about)
    with pytest.raises(TraceError, match="one length"):
        Tokens.make([1, 2], ["a"])
    with pytest.raises(TraceError, match="unknown role 'robot'"):
        Tokens.make([1], roles="robot")
    trace = random_trace()
    with pytest.raises(UnknownExpertError, match="no site named 'x'"):
        trace.site("x")
    with pytest.raises(UnknownExpertError, match="no expert named 'x'"):
        trace.expert("x")
    for place in (slice(0, 9, 2), 3):
        with pytest.raises(TraceError, match=r"trace\[10:20\]"):
            trace[place]
    with pytest.raises(TraceError, match="what JSON knows"):
        trace.with_metadata(odd=object()).about.as_json()


def test_merging():
    one, other = random_trace(5, seed=1, domain="a", run=1), random_trace(7, seed=2, domain="b", run=1)
    both = merge([one, other])
    assert len(both) == 12
    assert both.metadata == {"run": 1}
    assert torch.equal(both.tokens.ids[5:], other.tokens.ids)
    assert both.known.tolist() == [False, *[True] * 4, False, *[True] * 6]
    assert torch.equal(both[5:].scalings[1:], other.scalings[1:])
    with pytest.raises(TraceError, match="found none"):
        merge([])
    foreign = Trace(random_tokens(5), torch.zeros(5, 6, 3), About(SITES, ("chem", "mech", "zoo")))
    with pytest.raises(TraceMismatchError, match="only one has prot, zoo"):
        merge([one, foreign])
    turned = Trace(random_tokens(5), torch.zeros(5, 6, 3), About(SITES[::-1], EXPERTS))
    with pytest.raises(TraceMismatchError, match="sites.*another order"):
        merge([one, turned])


def test_comparing():
    one = random_trace(6, seed=1)
    other = Trace(random_tokens(6, seed=1), one.scalings * 0.5, one.about)
    found = compare(one, other)
    assert found.scalings_TSN[0].isnan().all()
    torch.testing.assert_close(found.scalings_TSN[1:], one.scalings[1:] * -0.5, rtol=0, atol=1e-3)
    assert torch.equal(found.logprobs_T, torch.zeros(6))
    ids = one.tokens.ids.clone()
    ids[4] += 1
    changed = Trace(Tokens.make(ids), one.scalings, one.about)
    with pytest.raises(TraceMismatchError, match="differ from token 4 on"):
        compare(one, changed)
    with pytest.raises(TraceMismatchError, match="found 6 and 5 which differ from token 5 on"):
        compare(one, one[:5])


def test_metadata_can_be_added_later():
    trace = random_trace(3, domain="a")
    assert trace.with_metadata(split="test").metadata == {"domain": "a", "split": "test"}
    assert trace.metadata == {"domain": "a"}


def test_no_such_folder(tmp_path):
    with pytest.raises(NotFoundError, match="found nothing"):
        Trace.load(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="found a file"):
        Trace.load(tmp_path / "file")

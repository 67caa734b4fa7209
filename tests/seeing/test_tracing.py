"""A trace tells of every token what the model said and mixed when it wrote it, whichever way it was made."""

import pytest
import torch
from planted import letters, tiny_model

import xloom
from toy import chat
from xloom import routers
from xloom.errors import PromptError, TraceError, UnfinishedTraceError
from xloom.seeing import contributions, trace_conversation, trace_rows, trace_text, tracing
from xloom.trace import Trace
from xloom.training.rows import Row

MESSAGES = [{"role": "system", "content": "zz"}, {"role": "user", "content": "abc 12"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("experts"))


def check_against_one_forward(model, trace: Trace) -> None:
    """All of the trace's tokens in one forward without a cache."""
    ids = trace.tokens.ids[None]
    with torch.no_grad():
        out = model(ids, use_cache=False)
    logprobs = out.logits[0, :-1].log_softmax(dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(trace.tokens.logprobs[1:], logprobs, rtol=0, atol=2e-4)
    torch.testing.assert_close(trace.scalings[1:], out.scalings[0, :-1], rtol=0, atol=1e-3)
    assert trace.tokens.logprobs[0].isnan()
    assert trace.scalings[0].isnan().all()
    assert out.scalings[0].std(dim=0).max() > 0.05, "a test of the test: scalings differ from token to token"


@pytest.mark.parametrize("piece", [1, 5, 256])
def test_a_text_is_what_generate_writes(model, monkeypatch, piece: int):
    monkeypatch.setattr(tracing, "READ_AT_ONCE", piece)
    tokenizer = letters()
    trace = trace_text(model, tokenizer, MESSAGES, max_new_tokens=6, metadata={"domain": "up"})
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(trace.tokens.ids, whole[0])
    check_against_one_forward(model, trace)
    assert trace.tokens.answer.tolist() == [False] * (len(trace) - 6) + [True] * 6
    assert [(turn.number, turn.role) for turn in trace.turns] == [(0, "system"), (1, "user"), (2, "assistant")]
    assert trace.text.startswith("<|im_start|>system\nzz<|im_end|>\n<|im_start|>user\nabc 12<|im_end|>\n")
    assert trace.tokens.special.tolist() == [i in tokenizer.all_special_ids for i in trace.tokens.ids.tolist()]
    assert trace.answer == tokenizer.decode(whole[0, -6:], skip_special_tokens=True)
    assert trace.metadata == {"domain": "up"}
    assert (trace.sites, trace.experts) == (model.sites, model.experts)
    assert trace.about.router == "XLora"
    assert trace.about.config["layerwise_scalings"] is True


@pytest.mark.parametrize(
    ("router", "described"),
    [
        (routers.Uniform(), "Uniform"),
        (routers.BaseOnly(), "BaseOnly"),
        (routers.XLora(without=["chem"]), "XLora(without=('chem',))"),
        (routers.Single("chem"), "Single(expert='chem')"),
    ],
)
def test_the_router_in_charge_is_traced(model, router, described: str):
    with model.routing(router):
        trace = trace_text(model, letters(), "abc", max_new_tokens=3)
        with torch.no_grad():
            expected = model(trace.tokens.ids[None]).scalings[0, :-1]
    torch.testing.assert_close(trace.scalings[1:], expected, rtol=0, atol=1e-3)
    assert trace.about.router == described
    assert [turn.role for turn in trace.turns] == ["text", "text"]


def test_drafting_and_folders_change_nothing(model, tmp_path):
    tokenizer = letters()
    plain = trace_text(model, tokenizer, "abcabcab", max_new_tokens=12)
    drafted = trace_text(
        model, tokenizer, "abcabcab", max_new_tokens=12, speculative=xloom.speculative(), folder=tmp_path / "t"
    )
    assert torch.equal(plain.tokens.ids, drafted.tokens.ids)
    torch.testing.assert_close(plain.scalings, drafted.scalings, rtol=0, atol=2e-3, equal_nan=True)
    assert torch.equal(Trace.load(tmp_path / "t").tokens.ids, plain.tokens.ids)
    with pytest.raises(TraceError, match="new or empty"):
        trace_text(model, tokenizer, "abc", folder=tmp_path / "t")


def test_what_stops_leaves_a_trace_unfinished(model, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_text(model, letters(), "abc", folder=tmp_path / "t", logits_processor=[stop])
    with pytest.raises(UnfinishedTraceError):
        Trace.load(tmp_path / "t")


def test_a_conversation_is_read_once(model):
    """Every token but the last goes through the model exactly once, and the cache holds what was written."""
    tokenizer = letters()
    with model.logging_scalings() as log:
        trace = trace_conversation(model, tokenizer, ["ab", "12?", "c"], system="zz", max_new_tokens=4)
    assert sum(entry.shape[1] for entry in log.entries) == len(trace) - 1
    check_against_one_forward(model, trace)
    assert [(turn.number, turn.role) for turn in trace.turns] == [
        (0, "system"), (1, "user"), (2, "assistant"), (3, "user"), (4, "assistant"), (5, "user"), (6, "assistant"),
    ]  # fmt: skip
    assert int(trace.tokens.answer.sum()) == 12
    for turn in trace.turns:
        part = trace[turn.start : turn.stop]
        assert part.text.startswith(f"<|im_start|>{turn.role}\n")
        assert part.tokens.answer.any() == (turn.role == "assistant")


def test_an_answer_that_ends_by_itself_is_closed_once(model):
    tokenizer = letters()
    first = trace_text(model, tokenizer, [{"role": "user", "content": "ab"}], max_new_tokens=3)
    end = int(first.tokens.ids[-3])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.eos_token is None:
        pytest.skip("the random model wrote a token that has no text")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", tokenizer.eos_token)
    trace = trace_conversation(model, tokenizer, ["ab", "c"], max_new_tokens=3, eos_token_id=end)
    answers = [trace[turn.start : turn.stop] for turn in trace.turns if turn.role == "assistant"]
    ids = answers[0].tokens.ids.tolist()
    written = answers[0].tokens.answer.tolist()
    if ids[written.index(True)] == end:
        assert written.count(True) == 1
        assert ids.count(end) == 1


def test_rows_as_they_are_given(model):
    tokenizer = letters()
    rows = [
        Row("ab", "cd", "rows:1"),
        Row(chat("ab", "")["messages"][:1], [{"role": "assistant", "content": "xyx"}], "rows:2"),
    ]
    traces = list(trace_rows(model, tokenizer, rows, metadata={"domain": "up"}))
    for trace, row in zip(traces, rows, strict=True):
        check_against_one_forward(model, trace)
        assert trace.metadata == {"where": row.where, "domain": "up"}
    assert [trace.answer for trace in traces] == ["cd", "xyx"]
    assert traces[0].text == "abcd<|im_end|>"
    assert traces[0].tokens.answer.tolist() == [False, False, True, True, True]
    assert [turn.role for turn in traces[1].turns] == ["user", "assistant"]
    assert traces[1].tokens.roles.tolist() == [2] * traces[1].turns[0].stop + [3] * (
        len(traces[1]) - traces[1].turns[0].stop
    )


def test_what_has_no_room(model, tmp_path):
    tokenizer = letters()
    with pytest.raises(PromptError, match="513 tokens, the model's window is 512"):
        trace_text(model, tokenizer, "a" * 513, folder=tmp_path / "t")
    assert not (tmp_path / "t").exists()
    with pytest.raises(PromptError, match="512 tokens in a window of 512"):
        trace_text(model, tokenizer, "a" * 512)
    assert len(trace_text(model, tokenizer, "a" * 510, max_new_tokens=9)) == 512
    with pytest.raises(PromptError, match="found none"):
        trace_conversation(model, tokenizer, [])


@pytest.mark.parametrize("kind", ["single", "masked", "arrow"])
def test_an_argument_is_as_a_block(model, kind):
    """Of every call that looks at the mixing; and the call's own router comes before that of the block around."""
    tokenizer = letters()
    row = Row(MESSAGES, [{"role": "assistant", "content": "cba"}], "mine:1")

    def look(**asked):
        text = trace_text(model, tokenizer, MESSAGES, max_new_tokens=4, **asked)
        talk = trace_conversation(model, tokenizer, ["ab", "cd"], max_new_tokens=3, **asked)
        (given,) = trace_rows(model, tokenizer, [row], **asked)
        found = contributions(model, given.tokens.ids, **asked)
        return [text.scalings, talk.scalings, given.scalings, found.relative_TSN], text.about.router

    expert = model.experts[0]
    of_kind = {"single": routers.Single(expert), "masked": routers.XLora(without=[expert]), "arrow": routers.Arrow()}
    router = of_kind[kind]
    with model.routing(router):
        expected, name = look()
    with model.routing(routers.BaseOnly()):
        found, same = look(routing=router)
    assert name == same
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    plain, _ = look()
    assert not torch.equal(plain[2].nan_to_num(), found[2].nan_to_num())

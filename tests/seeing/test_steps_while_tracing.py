"""What is written can be watched while its trace is made."""

import pytest
import torch
from planted import letters, tiny_model

from xloom.seeing import trace_text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("experts"))


def test_steps_are_those_of_the_stream(model, tmp_path):
    tokenizer, seen = letters(), []
    trace = trace_text(model, tokenizer, "abc12", max_new_tokens=9, folder=tmp_path / "t", on_step=seen.append)
    streamed = list(model.stream(tokenizer("abc12", return_tensors="pt").input_ids, tokenizer, max_new_tokens=9))
    assert [step.token_id for step in seen] == [step.token_id for step in streamed] == trace.tokens.ids[-9:].tolist()
    assert [step.text for step in seen] == [step.text for step in streamed]
    assert "".join(step.text for step in seen) == trace.answer
    torch.testing.assert_close(torch.stack([s.scalings for s in seen]), trace.scalings[-9:], rtol=0, atol=1e-3)
    assert seen[0].experts == model.experts


def test_it_is_on_the_disk_before_it_is_shown(model, tmp_path):
    """A reader that stops everything finds the tokens it has seen so far in the writer, or in the folder."""
    written = []

    def look(step):
        written.append((tmp_path / "t" / "unfinished.json").is_file())

    trace_text(model, letters(), "abc", max_new_tokens=4, folder=tmp_path / "t", on_step=look)
    assert written == [True] * 4


def test_a_trace_ends_where_a_string_does(model):
    tokenizer = letters()
    whole = trace_text(model, tokenizer, "abc12", max_new_tokens=9)
    text = [piece for piece in whole.tokens.texts[-9:] if piece.strip()]
    if len(set(text)) < 2:
        pytest.skip("the random model wrote one letter again and again")
    cut = trace_text(model, tokenizer, "abc12", max_new_tokens=9, stop_strings=text[0])
    assert len(cut) < len(whole)
    assert cut.answer == whole.answer[: len(cut.answer)]
    assert cut.answer.endswith(text[0])

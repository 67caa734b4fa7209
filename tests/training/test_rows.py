from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from toy import PIECES, chat, write_rows
from xloom.errors import DataError, PromptError
from xloom.training.data import IGNORED, Example, Row, collate, plan_batches, read_examples, read_rows, tokenise

MESSAGES = "system, user, assistant, tool"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, found invalid JSON (Expecting property name enclosed in double quotes)"),
        ("[1]", "expected a JSON object, found list"),
        ('{"prompt": "a"}', "expected 'messages', or 'prompt' and 'completion', found prompt"),
        ('{"prompt": "a", "completion": " "}', "expected a completion, found ' '"),
        ('{"prompt": "a", "completion": []}',
         "expected prompt and completion as two strings or two lists, found str and list"),
        ('{"messages": 3}', "messages: expected a list of messages, found int 3"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', f"messages[0]: expected a role of {MESSAGES}, found 'bot'"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: expected content as a string, found NoneType"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
         "messages: expected a prompt and then an assistant message, found a last message of role 'user'"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}',
         "completion: expected one assistant message, found user"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{path}:3: {message}"


def test_the_completion_starts_where_the_prompt_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = chat("hi", "yo")["messages"]
    ids, start = tokenise(Row(messages[:1], messages[1:], "x:1"), tokenizer)
    text = [PIECES[i] for i in ids]
    assert "".join(text[:start]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text[start:] == ["y", "o", "<|im_end|>"]  # what the template puts after the end is cut
    ids, start = tokenise(Row("hi ", "yo", "x:1"), tokenizer)
    assert [PIECES[i] for i in ids[start:]] == ["y", "o", "<|im_end|>"]


def test_a_token_across_the_boundary_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"^x:7: expected the prompt's 2 tokens to begin the whole row, found a token"):
        tokenise(Row("az", "zb", "x:7"), tokenizer)


def test_a_tokenizer_without_what_rows_need_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some/base"
    messages = chat("hi", "yo")["messages"]
    with pytest.raises(PromptError, match=r"^tokenizer some/base: has no chat template"):
        tokenise(Row(messages[:1], messages[1:], "x:1"), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match=r"^tokenizer some/base: has no end token"):
        tokenise(Row("a", "b", "x:1"), tokenizer)


def test_long_rows_are_dropped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "a" * 30, "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read_examples({"d": [path]}, tokenizer, max_length=10)
    assert (len(found.items), found.too_long, found.duplicates) == (2, 1, 1)
    assert str(found) == "2 rows, 1 left out as too long, 1 duplicates among them"
    with pytest.raises(DataError, match=r"expected rows of at most 2 tokens, found none \(0 rows, 3 left out"):
        read_examples({"d": [path]}, tokenizer, max_length=2)


def test_collate_pads_on_the_left() -> None:
    rows = [Example((5, 6, 7, 8), 2, "b"), Example((9, 10), 1, "other")]
    batch = collate(rows, pad_id=0, experts=["a", "b"])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 10]]
    assert torch.equal(batch["expert"], torch.tensor([1, IGNORED]))


def test_the_plan_covers_every_row_in_full_batches_of_like_length() -> None:
    lengths = [(i * 37) % 100 for i in range(400)]
    plan = plan_batches(lengths, batch_size=8, batches=100, seed=1)
    assert Counter(plan) == dict.fromkeys(range(400), 2)  # two epochs
    spreads = [max(b) - min(b) for b in ([lengths[i] for i in plan[s : s + 8]] for s in range(0, 800, 8))]
    assert max(spreads) <= 4
    assert plan == plan_batches(lengths, 8, 100, seed=1) != plan_batches(lengths, 8, 100, seed=2)
    assert len(plan_batches([1, 2, 3], batch_size=8, batches=2, seed=0)) == 16


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "é", "completion": "x"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl: expected UTF-8"):
        list(read_rows(path))

"""Every token of a prompt has its turn and role; a conversation that goes on repeats nothing."""

import pytest

from toy import tiny_tokenizer
from xloom.errors import PromptError
from xloom.seeing.prompts import Chat, encode_prompt

USER, SYSTEM = {"role": "user", "content": "ab c"}, {"role": "system", "content": "zz"}
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe nice<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = DEFAULT_SYSTEM.replace("m['content']", "m['content'] | trim")


def texts(tokenizer, piece) -> list[tuple[int, str, str]]:
    """(turn, role, text) of each run of tokens."""
    runs: list[tuple[int, str, list[int]]] = []
    for token, turn, role in zip(piece.ids, piece.turns, piece.roles, strict=True):
        if not runs or runs[-1][:2] != (turn, role):
            runs.append((turn, role, []))
        runs[-1][2].append(token)
    return [(turn, role, "".join(tokenizer.convert_ids_to_tokens(ids))) for turn, role, ids in runs]


def test_plain_text():
    tokenizer = tiny_tokenizer()
    piece = encode_prompt(tokenizer, "azzb")
    assert texts(tokenizer, piece) == [(0, "text", "azzb")]
    assert len(piece.ids) == 3
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(tokenizer, "")


def test_messages():
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer, [SYSTEM, USER])
    assert texts(tokenizer, chat.piece) == [
        (0, "system", "<|im_start|>system\nzz<|im_end|>\n"),
        (1, "user", "<|im_start|>user\nab c<|im_end|>\n"),
        (2, "assistant", "<|im_start|>assistant\n"),
    ]
    whole = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(chat.piece.ids) == whole
    assert encode_prompt(tokenizer, [SYSTEM, USER]) == chat.piece


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, STRIPS])
def test_a_system_message_of_the_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = Chat(tokenizer, [USER])
    assert texts(tokenizer, chat.piece) == [
        (0, "system", "<|im_start|>system\nbe nice<|im_end|>\n"),
        (1, "user", "<|im_start|>user\nab c<|im_end|>\n"),
        (2, "assistant", "<|im_start|>assistant\n"),
    ]
    assert chat.turn == 2
    assert texts(tokenizer, Chat(tokenizer, [SYSTEM, USER]).piece)[0] == (
        0, "system", "<|im_start|>system\nzz<|im_end|>\n",
    )  # fmt: skip
    chat.go_on(" yes ", "and?")
    closed = [" ", "<|im_end|>\n"] if template == DEFAULT_SYSTEM else ["<|im_end|>\n"]
    assert texts(tokenizer, chat.piece)[0] == (2, "assistant", closed[-1])


def test_going_on():
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer, [USER])
    chat.go_on("so", "b", written=5)
    rest = [(2, "user", "<|im_start|>user\nb<|im_end|>\n"), (3, "assistant", "<|im_start|>assistant\n")]
    assert texts(tokenizer, chat.piece) == [(1, "assistant", "<|im_end|>\n"), *rest]
    chat.go_on("ja", "c", written=tokenizer.eos_token_id)
    assert texts(tokenizer, chat.piece) == [
        (3, "assistant", "\n"),
        (4, "user", "<|im_start|>user\nc<|im_end|>\n"),
        (5, "assistant", "<|im_start|>assistant\n"),
    ]


def test_earlier_answers_are_part_of_the_prompt():
    tokenizer = tiny_tokenizer()
    said = {"role": "assistant", "content": "x"}
    found = texts(tokenizer, Chat(tokenizer, [USER, said, USER]).piece)
    assert [run[:2] for run in found] == [(0, "user"), (1, "assistant"), (2, "user"), (3, "assistant")]
    assert found[1][2] == "<|im_start|>assistant\nx<|im_end|>\n"


def test_what_cannot_be_asked():
    tokenizer = tiny_tokenizer()
    for messages, says in [
        ([], "found none"),
        ([{"role": "robot", "content": "x"}], "found 'robot'"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([USER, {"role": "assistant", "content": "x"}], "can be answered"),
    ]:
        with pytest.raises(PromptError, match=says):
            Chat(tokenizer, messages)
    tokenizer.chat_template = "{{ raise_exception('no such thing') }}"
    with pytest.raises(PromptError, match="no such thing"):
        Chat(tokenizer, [USER])
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        Chat(tokenizer, [USER])


def test_a_template_that_rewrites_the_past():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    chat = Chat(tokenizer, [USER])
    with pytest.raises(PromptError, match="only grows"):
        chat.go_on("a", "b")

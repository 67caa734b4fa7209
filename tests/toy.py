"""A character tokenizer of our own for the tiny Llama, and rows of two toy domains."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tiny import VOCAB

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = ["<pad>", "<|im_start|>", "<|im_end|>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789 \n:=", "zz"]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per character, and one for "zz"."""
    assert len(PIECES) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"zz|[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_rows(domain: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """`up` asks with letters and answers aaa, `down` asks with digits and answers xyx; lengths vary."""
    letters, answer = {"up": ("bcdefgh", "aaa"), "down": ("1234567", "xyx")}[domain]
    rows = range(start, start + count)
    return [chat("".join(letters[(i * 3 + j * j) % 7] for j in range(12 + i % 5)), answer) for i in rows]

"""A tiny model whose experts have domains of their own, and the files of those domains."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tiny import make_experts, tiny_base
from toy import chat, tiny_tokenizer, write_rows
from xloom import XLoraForCausalLM
from xloom.evaluation.answers import Prompt, answers
from xloom.routers import Single

DOMAINS = ("chem", "mech", "prot")
LETTERS = "abcdefgh"


def tiny_model(folder: Path, **head: Any) -> XLoraForCausalLM:
    """Three experts on a Llama with a window long enough for solved questions; a head that decides."""
    base = tiny_base("llama", max_position_embeddings=1024)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    experts = make_experts(base, folder / "experts")
    model = XLoraForCausalLM.from_experts(str(folder / "base"), experts, layerwise_scalings=True, **head)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.3)
    return model


def questions(count: int, start: int = 0) -> list[str]:
    """Words of different lengths; some come again in other domains, where other answers are right."""
    numbers = range(start, start + count)
    return ["".join(LETTERS[(i * 5 + j * j + i // 8) % 8] for j in range(4 + i % 4)) for i in numbers]


def write_domains(folder: Path, model: XLoraForCausalLM, count: int = 4) -> dict[str, Path]:
    """test.jsonl and train.jsonl of every expert's domain; right is what begins as that expert alone does."""
    out = {}
    for number, domain in enumerate(DOMAINS):
        out[domain] = folder / domain
        out[domain].mkdir(parents=True)
        for split, start in (("test", 100 * number), ("train", 100 * number + 50)):
            asked = questions(count, start)
            ids = [encode(word) for word in asked]
            said: dict[int, str] = {}
            expert = Single(domain)
            for batch in answers(model, tiny_tokenizer(), [Prompt(i, 4) for i in ids], expert):
                said |= {place: answer.text for place, answer in batch.items()}
            rows = [
                {
                    **chat(word, said[i] or "zz"),
                    "domain": domain,
                    "task": f"t{i % 2}",
                    "key": word,
                    "scorer": "agreement",
                }
                for i, word in enumerate(asked)
            ]
            write_rows(out[domain] / f"{split}.jsonl", rows)
    return out


@cache
def encode(word: str) -> tuple[int, ...]:
    messages = [{"role": "user", "content": word}]
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tuple(ids)

"""Rows of JSONL in TRL's shape, as token ids whose completion starts at a known place, and as batches of them.

    {"messages": [...]}                     the last message, of the assistant, is the completion
    {"prompt": ..., "completion": ...}      both strings, or both lists of messages

Knows nothing of models or recipes. Batches are padded on the left, so that completions end together and logits are
needed at the last `keep` positions only.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from xloom.errors import DataError, PromptError, names

IGNORED = -100  # a label that takes no part in the loss
ROLES = ("system", "user", "assistant", "tool")
_POOL = 50  # batches whose rows are sorted by length together

Text = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file: strings, or messages. `where` is file:line."""

    prompt: Text
    completion: Text
    where: str


@dataclass(frozen=True)
class Example:
    """One row as token ids; the completion is `input_ids[completion_start:]`."""

    input_ids: tuple[int, ...]
    completion_start: int
    domain: str | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.completion_start


@dataclass
class Examples:
    """Rows ready for training, and what became of the others.

    `too_long` rows were left out; `duplicates` are kept.
    """

    items: list[Example] = field(default_factory=list)
    too_long: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        notes = [f"{len(self.items)} rows"]
        notes += [f"{self.too_long} left out as too long"] if self.too_long else []
        notes += [f"{self.duplicates} duplicates among them"] if self.duplicates else []
        return ", ".join(notes)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one JSONL file; blank lines are passed over.

    Raises:
        DataError: with file:line, what was expected and what was found.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, found another encoding ({error.reason})") from None


def read_examples(
    files: Mapping[str | None, Sequence[Path]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    """Every row of files given by domain, tokenised.

    Raises:
        DataError: a row is wrong, or not a single one is left.
        PromptError: the tokenizer lacks the chat template or the end token that the rows need.
    """
    found = Examples()
    seen: set[tuple[str | None, tuple[int, ...]]] = set()
    for domain, paths in files.items():
        for row in (row for path in paths for row in read_rows(path)):
            ids, start = tokenise(row, tokenizer)
            if len(ids) > max_length:
                found.too_long += 1
                continue
            found.duplicates += (domain, ids) in seen
            seen.add((domain, ids))
            found.items.append(Example(ids, start, domain))
        if not any(item.domain == domain for item in found.items):
            raise DataError(f"{names(paths)}: expected rows of at most {max_length} tokens, found none ({found})")
    return found


def tokenise(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and completion, and where the completion starts.

    The prompt's own ids must be the beginning of the whole: what is trained is then what generation meets.

    Raises:
        DataError: the two parts have no boundary between tokens.
        PromptError: the tokenizer lacks a chat template, or an end token.
    """
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        prompt = list(tokenizer(row.prompt).input_ids)
        whole = list(tokenizer(row.prompt + row.completion).input_ids)
        if tokenizer.eos_token_id is None:
            raise PromptError(f"tokenizer {tokenizer.name_or_path}: has no end token to put after a completion")
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole.append(tokenizer.eos_token_id)
    else:
        assert isinstance(row.prompt, list)
        assert isinstance(row.completion, list)
        prompt = _chat_ids(row.prompt, tokenizer, row.where, add_generation_prompt=True)
        whole = _chat_ids(row.prompt + row.completion, tokenizer, row.where, add_generation_prompt=False)
    start = len(prompt)
    if not prompt or whole[:start] != prompt:
        raise DataError(
            f"{row.where}: expected the prompt's {start} tokens to begin the whole row, found a token across the "
            "boundary (move blanks from the prompt's end to the completion's start, or use another chat template)"
        )
    # What a template puts after the end token is never generated.
    ends = [i for i, token in enumerate(whole) if token == tokenizer.eos_token_id and i >= start]
    whole = whole[: ends[-1] + 1] if ends else whole
    if len(whole) == start:
        raise DataError(f"{row.where}: expected a completion, found no tokens in it")
    return tuple(whole), start


def collate(examples: Sequence[Example], pad_id: int, experts: Sequence[str] = ()) -> dict[str, Any]:
    """A batch, padded on the left.

    Returns:
        input_ids, attention_mask, position_ids [B, T]; labels [B, keep]: the last `keep` tokens, IGNORED before the
        completion; keep: the longest completion and one more, whose logits predict it; expert [B]: the index of the
        expert whose name the row's domain is, IGNORED for the others.
    """
    longest = max(len(e.input_ids) for e in examples)
    keep = max(e.completion_tokens for e in examples) + 1
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(examples), keep), IGNORED)
    for row, example in enumerate(examples):
        size, answer = len(example.input_ids), example.completion_tokens
        ids[row, longest - size :] = torch.tensor(example.input_ids)
        mask[row, longest - size :] = 1
        labels[row, keep - answer :] = ids[row, longest - answer :]
    index = {name: i for i, name in enumerate(experts)}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": labels,
        "keep": keep,
        "expert": torch.tensor([index.get(e.domain or "", IGNORED) for e in examples]),
    }


def plan_batches(lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> list[int]:
    """Row numbers of all batches of a run, one batch after the other: full, of similar lengths, in random order.

    Epochs follow each other without a gap. Known beforehand, so a run that resumes needs no sampler state.
    """
    rng = random.Random(seed)
    stream: list[int] = []
    while len(stream) < batches * batch_size:
        stream += rng.sample(range(len(lengths)), len(lengths))
    plan: list[int] = []
    for start in range(0, batches * batch_size, _POOL * batch_size):
        pool = stream[start : min(start + _POOL * batch_size, batches * batch_size)]
        pool.sort(key=lambda i: lengths[i])
        cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(cut)
        plan += [i for batch in cut for i in batch]
    return plan


def _parse(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected a JSON object, found invalid JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if "messages" in value:
        messages = _messages(value["messages"], "messages", where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            found = f"a last message of role {messages[-1]['role']!r}" if len(messages) > 1 else "a single message"
            raise DataError(f"{where}: messages: expected a prompt and then an assistant message, found {found}")
        return _whole(Row(messages[:-1], messages[-1:], where))
    for key in ("prompt", "completion"):
        if key not in value:
            raise DataError(f"{where}: expected 'messages', or 'prompt' and 'completion', found {names(value) or '{}'}")
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _whole(Row(prompt, completion, where))
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"{where}: expected prompt and completion as two strings or two lists, found {kinds}")
    row = Row(_messages(prompt, "prompt", where), _messages(completion, "completion", where), where)
    if len(row.completion) != 1 or completion[0]["role"] != "assistant":
        found = names(message["role"] for message in completion)
        raise DataError(f"{where}: completion: expected one assistant message, found {found}")
    return _whole(row)


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{where}: {key}: expected a list of messages, found {type(value).__name__} {value!r:.40}")
    for number, message in enumerate(value):
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: {key}[{number}]: expected a role of {names(ROLES)}, found {message.get('role')!r}"
            )
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise DataError(f"{where}: {key}[{number}]: expected content as a string, found {found}")
    return value


def _whole(row: Row) -> Row:
    text = row.completion if isinstance(row.completion, str) else str(row.completion[-1]["content"])
    if not text.strip():
        raise DataError(f"{row.where}: expected a completion, found {text!r}")
    return row


def _chat_ids(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, add_generation_prompt: bool
) -> list[int]:
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise PromptError(f"tokenizer {tokenizer.name_or_path}: has no chat template, which rows of messages need")
    try:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        )
    except TemplateError as error:
        raise DataError(f"{where}: expected messages that the chat template takes, found: {error}") from None

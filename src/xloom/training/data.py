"""Rows as token ids whose completion starts at a known place, and as batches of them.

Knows nothing of models, recipes or of how rows are stored (`rows.py`). Batches are padded on the left, so that
completions end together and logits are needed at the last `keep` positions only.
Letters: B batch  T tokens
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from xloom.errors import ConfigError, DataError, PromptError, names
from xloom.training.objective import IGNORED
from xloom.training.rows import Row, Source, read_rows

_ROWS_AT_ONCE = 1000


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

    `empty` rows (without a completion) and `too_long` ones were left out; `duplicates` within a domain are kept.
    """

    items: list[Example] = field(default_factory=list)
    empty: int = 0
    too_long: int = 0
    duplicates: int = 0

    @property
    def domains(self) -> dict[str, int]:
        """Rows by domain; those of no domain are not counted."""
        return dict(Counter(item.domain for item in self.items if item.domain is not None))

    def __str__(self) -> str:
        by_domain = names((f"{domain} {count}" for domain, count in self.domains.items()), limit=10)
        notes = [f"{len(self.items)} rows" + (f" ({by_domain})" if by_domain else "")]
        notes += [f"{self.empty} left out as empty"] if self.empty else []
        notes += [f"{self.too_long} left out as too long"] if self.too_long else []
        notes += [f"{self.duplicates} duplicates among them"] if self.duplicates else []
        return ", ".join(notes)


def read_examples(
    sources: Mapping[str | None, Sequence[Source | Path]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    """Every row of sources given by domain, tokenised.

    Raises:
        DataError: a row is wrong, or not a single one of a domain is left.
        NotFoundError, MissingExtraError: a source cannot be read.
        PromptError: the tokenizer lacks the chat template or the end token that the rows need.
    """
    found = Examples()
    for domain, places in sources.items():
        part = _read_domain(domain, places, tokenizer, max_length)
        if not part.items:
            raise DataError(f"{names(places)}: expected rows of at most {max_length} tokens, found none ({part})")
        found.items += part.items
        found.empty += part.empty
        found.too_long += part.too_long
        found.duplicates += part.duplicates
    return found


def overlap(train: Examples, valid: Examples) -> int:
    """Validation rows whose token ids are also those of a training row."""
    known = {item.input_ids for item in train.items}
    return sum(item.input_ids in known for item in valid.items)


def rows_record(train: Examples, valid: Examples) -> dict[str, Any]:
    """What training.json tells of the rows."""

    def counts(rows: Examples) -> dict[str, Any]:
        left_out = {"empty": rows.empty, "too_long": rows.too_long, "duplicates": rows.duplicates}
        return {"items": len(rows.items), **left_out, "domains": rows.domains}

    return {"train": counts(train), "valid": counts(valid), "overlap": overlap(train, valid)}


def tokenise(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and completion, and where the completion starts.

    The prompt's own ids must be the beginning of the whole: what is trained is then what generation meets.

    Raises:
        DataError: the two parts have no boundary between tokens.
        PromptError: the tokenizer lacks a chat template, or an end token.
    """
    return next(tokenise_all([row], tokenizer))


def tokenise_all(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[tuple[int, ...], int]]:
    """`tokenise` for many rows, many at a time, which is faster."""
    for is_text, alike in groupby(rows, key=lambda row: isinstance(row.prompt, str)):
        while some := list(islice(alike, _ROWS_AT_ONCE)):
            pairs = [_texts(row, tokenizer) for row in some]
            # A chat template writes the special tokens itself.
            ids = [tokenizer(list(side), add_special_tokens=is_text).input_ids for side in zip(*pairs, strict=True)]
            for row, prompt, whole in zip(some, *ids, strict=True):
                yield _bounded(row, prompt, whole, tokenizer)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """A batch, padded on the left.

    Returns:
        input_ids, attention_mask, position_ids [B, T]; labels [B, keep]: the last `keep` tokens, IGNORED before the
        completion; keep: the longest completion and one more, whose logits predict it.
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
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": labels,
        "keep": keep,
    }


def plan_batches(
    lengths: Sequence[int],
    batch_size: int,
    batches: int,
    seed: int,
    *,
    groups: Sequence[int] | None = None,
    weights: Mapping[int, float] | None = None,
    pool: int = 50,
) -> list[int]:
    """Row numbers of all batches of a run, one batch after the other: full, of similar lengths, in random order.

    Epochs follow each other without a gap. Known beforehand, so a run that resumes needs no sampler state.

    Args:
        lengths: tokens of every row.
        groups, weights: the group of every row, and each group's share of the run. Without weights, rows have equal
            shares; with them, each group goes through epochs of its own.
        pool: batches whose rows are sorted by length together.

    Raises:
        ConfigError: a group has no weight, or one below 0, or all are 0.
    """
    rng = random.Random(seed)
    size = batches * batch_size
    if weights is None:
        stream = list(islice(_epochs(range(len(lengths)), rng), size))
    else:
        assert groups is not None
        stream = _weighted(groups, weights, size, rng)
    plan: list[int] = []
    for start in range(0, size, pool * batch_size):
        part = sorted(stream[start : start + pool * batch_size], key=lambda i: lengths[i])
        cut = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        rng.shuffle(cut)
        plan += [i for batch in cut for i in batch]
    return plan


def _epochs(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    """All rows in random order, again and again."""
    while rows:
        yield from rng.sample(rows, len(rows))


def _weighted(groups: Sequence[int], weights: Mapping[int, float], size: int, rng: random.Random) -> list[int]:
    """Rows in turn by weight: turn k of a group comes at time (k + its offset) / weight."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    shares = {group: weights.get(group, -1.0) for group in sorted(rows)}
    if any(share < 0 for share in shares.values()) or not any(shares.values()):
        expected = f"one of at least 0 for each of the groups {names(shares)}, and not all 0"
        raise ConfigError(f"weights: expected {expected}, found {dict(weights)}")

    def turns(group: int, share: float) -> Iterator[tuple[float, int]]:
        offset = rng.random()
        for turn, row in enumerate(_epochs(rows[group], rng)):
            yield (turn + offset) / share, row

    merged = merge(*(turns(group, share) for group, share in shares.items() if share))
    return [row for _, row in islice(merged, size)]


def _read_domain(
    domain: str | None, places: Sequence[Source | Path], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    found = Examples()
    seen: set[tuple[int, ...]] = set()

    def filled() -> Iterator[Row]:
        for row in chain.from_iterable(map(read_rows, places)):
            found.empty += row.empty
            if not row.empty:
                yield row

    for ids, start in tokenise_all(filled(), tokenizer):
        if len(ids) > max_length:
            found.too_long += 1
            continue
        found.duplicates += ids in seen
        seen.add(ids)
        found.items.append(Example(ids, start, domain))
    return found


def _bounded(
    row: Row, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], int]:
    """The whole with one end token at its end, and where its completion starts."""
    end, start = tokenizer.eos_token_id, len(prompt)
    if isinstance(row.prompt, str) and whole[-1:] != [end]:
        whole = [*whole, end]
    if not prompt:
        raise DataError(f"{row.where}: expected a prompt, found no tokens in it")
    if whole[:start] != prompt:
        raise DataError(
            f"{row.where}: expected the prompt's {start} tokens to begin the whole row, found a token across the "
            "boundary (move blanks from the prompt's end to the completion's start, or use another chat template)"
        )
    # What a template puts after the end token is never generated.
    ends = [i for i in range(start, len(whole)) if whole[i] == end]
    whole = whole[: ends[-1] + 1] if ends else whole
    if len(whole) == start:
        raise DataError(f"{row.where}: expected a completion, found no tokens in it")
    return tuple(whole), start


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt, and the prompt with its completion, as the tokenizer reads them."""
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        if tokenizer.eos_token_id is None:
            raise PromptError(f"tokenizer {tokenizer.name_or_path}: has no end token to put after a completion")
        return row.prompt, row.prompt + row.completion
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    prompt = _chat(row.prompt, tokenizer, row.where, add_generation_prompt=True)
    return prompt, _chat(row.prompt + row.completion, tokenizer, row.where, add_generation_prompt=False)


def _chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, add_generation_prompt: bool
) -> str:
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise PromptError(f"tokenizer {tokenizer.name_or_path}: has no chat template, which rows of messages need")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False))
    except TemplateError as error:
        raise DataError(f"{where}: expected messages that the chat template takes, found: {error}") from None

"""Traces made with a model: of texts that it writes, of conversations, and of rows that are given.

All go through one `Reader`: prompts are read in pieces, answers come from `model.stream`, all in one cache, and every
token is handed on with the logprob and the scalings it was written with. Knows nothing of what is done with traces.
Letters: T tokens  V vocabulary  S sites  N experts
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xloom.cache import new_cache
from xloom.decoding.stream import Detokenizer, Step
from xloom.errors import PromptError
from xloom.model import XLoraForCausalLM
from xloom.routers import Routed, Router, Routing
from xloom.seeing.prompts import Chat, Message, Piece, encode_prompt
from xloom.trace import About, Tokens, Trace, TraceWriter
from xloom.training.base import pad_id
from xloom.training.data import tokenise_all
from xloom.training.rows import Row

MAX_NEW_TOKENS = 64
READ_AT_ONCE = 256  # tokens whose logits are in memory together
_GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def trace_text(
    model: XLoraForCausalLM,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    folder: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    routing: Routed | None = None,
    on_step: Callable[[Step], None] | None = None,
    **options: Any,
) -> Trace:
    """The trace of a prompt and of what the model writes after it.

    Args:
        prompt: plain text as it stands, or messages for the chat template.
        folder: new or empty; the trace is written there while it is made, and not held in memory.
        metadata: anything that JSON knows, e.g. {"domain": "quantum"}.
        routing: who decides, for the one row; None: as in the `with model.routing(...)` around, or the head.
        on_step: is called with what `model.stream` gives, as soon as it is written.
        options: as `model.stream` takes them (`do_sample`, `temperature`, `speculative`, ...); greedy by default.

    Raises:
        PromptError: empty, longer than the model's window, or messages that the chat template does not take.
        TraceError: the folder holds something or cannot be written. What was written so far stays there, unfinished.
    """
    if isinstance(prompt, str):
        piece, turn, role = encode_prompt(tokenizer, prompt), 1, "text"
    else:
        chat = Chat(tokenizer, prompt)
        piece, turn, role = chat.piece, chat.turn, "assistant"
    routed = model.router if routing is None else routing
    with _Sink(about(model, metadata, routed), folder) as sink:
        reader = Reader(model, tokenizer, sink, routed)
        reader.read(piece)
        reader.write(turn, role, max_new_tokens, options, on_step)
    return sink.trace()


def trace_conversation(
    model: XLoraForCausalLM,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    folder: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    routing: Routed | None = None,
    **options: Any,
) -> Trace:
    """The trace of a conversation in one cache: the model answers each question before it sees the next one.

    Args:
        max_new_tokens: of each answer.
        Others: as in `trace_text`.

    Raises:
        PromptError: as `trace_text`, and for a template that writes earlier messages in another way as it goes on.
        TraceError: as `trace_text`.
    """
    if not questions:
        raise PromptError("expected questions, found none")
    start = [] if system is None else [{"role": "system", "content": system}]
    chat = Chat(tokenizer, [*start, {"role": "user", "content": questions[0]}])
    routed = model.router if routing is None else routing
    with _Sink(about(model, metadata, routed), folder) as sink:
        reader = Reader(model, tokenizer, sink, routed)
        for number, _ in enumerate(questions):
            reader.read(chat.piece)
            ids = reader.write(chat.turn, "assistant", max_new_tokens, options)
            if number + 1 < len(questions):
                said = tokenizer.decode(ids, skip_special_tokens=True)
                chat.go_on(said, questions[number + 1], written=ids[-1])
    return sink.trace()


def trace_rows(
    model: XLoraForCausalLM,
    tokenizer: Any,
    rows: Iterable[Row],
    *,
    metadata: Mapping[str, Any] | None = None,
    routing: Routed | None = None,
) -> Iterator[Trace]:
    """The trace of each row as it is given, prompt and completion: what the mixing is on text that is known.

    Metadata has `where` the row comes from.

    Raises:
        DataError: a row is wrong. PromptError: longer than the model's window, or a tokenizer without what it takes.
    """
    rows, routed = list(rows), model.router if routing is None else routing
    for row, (ids, start) in zip(rows, tokenise_all(rows, tokenizer), strict=True):
        chat = None if isinstance(row.prompt, str) else Chat(tokenizer, row.prompt)
        turn, role = (1, "text") if chat is None else (chat.turn, "assistant")
        piece = encode_prompt(tokenizer, row.prompt) if chat is None else chat.piece
        if piece.ids != ids[:start]:
            piece = Piece((), (), ()).followed_by(ids[:start], 0, "text")
        with _Sink(about(model, {"where": row.where, **(metadata or {})}, routed), None) as sink:
            Reader(model, tokenizer, sink, routed).read(
                piece.followed_by(ids[start:], turn, role), answer=len(ids) - start
            )
        yield sink.trace()


def about(model: XLoraForCausalLM, metadata: Mapping[str, Any] | None = None, routed: Routed | None = None) -> About:
    """What a trace tells of its model, and of who decides."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for axis in ("sites", "experts"):
        config.pop(axis, None)
    name = str(model.name_or_path or model.config.base_model_name_or_path or "")
    return About(
        model.sites,
        model.experts,
        name,
        _described(model.router if routed is None else routed),
        config,
        dict(metadata or {}),
    )


def _described(router: Routed) -> str:
    """`XLora(without=('chem',))`: its kind and such of its settings as can be said in a word."""
    if isinstance(router, Routing):
        return ", ".join(dict.fromkeys(_in_words(line.decider) for line in router.lines))
    return _in_words(router) if isinstance(router, Router) else ", ".join(map(_described, router))


def _in_words(router: object) -> str:
    said = {key: value for key, value in vars(router).items() if not key.startswith("_") and value}
    words = [f"{key}={value!r}" for key, value in said.items() if isinstance(value, (str, int, float, tuple, dict))]
    return type(router).__name__ + (f"({', '.join(words)})" if words else "")


class Reader:
    """A text that a model reads and writes, in one cache that holds all of it but the last token.

    Args:
        sink: takes every token once, in order, with `add(tokens, scalings_TSN)`.
        routed: who decides.
    """

    def __init__(self, model: XLoraForCausalLM, tokenizer: Any, sink: "_Sink", routed: Routed) -> None:
        self._model, self._tokenizer, self._sink = model, tokenizer, sink
        self._routing = model.routing_of(routed)
        self._cache = new_cache(model.config)
        self._ids: list[int] = []
        self._detokenizer = Detokenizer(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)

    @torch.no_grad()
    def read(self, piece: Piece, *, answer: int = 0) -> None:
        """Goes on with a text that is given, whose last `answer` tokens are the answer.

        Raises:
            PromptError: it is longer than the model's window.
        """
        before, whole = len(self._ids), [*self._ids, *piece.ids]
        if (window := _window(self._model)) is not None and len(whole) > window:
            raise PromptError(f"the text has {len(whole)} tokens, the model's window is {window}")
        self._ids = whole
        answers = [place >= len(whole) - answer for place in range(before, len(whole))]
        if before == 0:
            self._add(whole[:1], [float("nan")], self._nothing(), answers[:1], piece.turns[:1], piece.roles[:1])
        while (start := int(self._cache.get_seq_length())) < len(whole) - 1:
            stop = min(start + READ_AT_ONCE, len(whole) - 1)
            ids = torch.tensor(whole[start : stop + 1], device=self._model.device)
            out = self._model(ids[None, :-1], past_key_values=self._cache, use_cache=True, routing=self._routing)
            logprobs = out.logits[0].float().log_softmax(dim=-1).gather(-1, ids[1:, None])[:, 0].cpu()
            new = slice(start + 1 - before, stop + 1 - before)
            self._add(ids[1:].tolist(), logprobs, out.scalings[0], answers[new], piece.turns[new], piece.roles[new])

    def write(
        self,
        turn: int,
        role: str,
        max_new_tokens: int,
        options: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> list[int]:
        """Goes on with what the model writes, and returns its tokens.

        Raises:
            PromptError: the model's window is full.
        """
        model, start = self._model, len(self._ids)
        room = room_after(model, start, max_new_tokens)
        ids = torch.tensor([self._ids], device=model.device)
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": pad_id(self._tokenizer)}
        given["routing"] = self._routing
        given |= options if options.get("do_sample") else {**_GREEDY, **options}
        for step in model.stream(ids, self._tokenizer, past_key_values=self._cache, max_new_tokens=room, **given):
            self._ids.append(step.token_id)
            self._add([step.token_id], [step.logprob], step.scalings[None], [True], [turn], [role])
            if on_step is not None:
                on_step(step)
        return self._ids[start:]

    def _add(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float] | Tensor,
        scalings_TSN: Tensor,
        answer: Sequence[bool],
        turns: Sequence[int],
        roles: Sequence[str],
    ) -> None:
        special = [token in self._special for token in ids]
        texts = [self._text(token, odd) for token, odd in zip(ids, special, strict=True)]
        tokens = Tokens.make(ids, texts, logprobs=logprobs, special=special, answer=answer, turns=turns, roles=roles)
        self._sink.add(tokens, scalings_TSN)

    def _text(self, token: int, special: bool) -> str:
        return str(self._tokenizer.decode([token])) if special else self._detokenizer.add(token)

    def _nothing(self) -> Tensor:
        return torch.full((1, len(self._model.sites), len(self._model.experts)), torch.nan)


class _Sink:
    """Where tokens go: a folder, which is made for the first of them, or memory.

    A block that fails leaves the folder unfinished.
    """

    def __init__(self, about: About, folder: Path | str | None) -> None:
        self._about, self._folder = about, folder
        self._writer: TraceWriter | None = None
        self._tokens: list[Tokens] = []
        self._scalings: list[Tensor] = []

    def add(self, tokens: Tokens, scalings_TSN: Tensor) -> None:
        if self._folder is None:
            self._tokens.append(tokens)
            self._scalings.append(scalings_TSN.detach().to("cpu", torch.float16, copy=True))
            return
        if self._writer is None:
            self._writer = TraceWriter(self._folder, self._about)
        self._writer.add(tokens, scalings_TSN)

    def trace(self) -> Trace:
        if self._folder is not None:
            return Trace.load(self._folder)
        return Trace(Tokens.cat(self._tokens), torch.cat(self._scalings), self._about)

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None and kind is None:
            self._writer.close()


def room_after(model: XLoraForCausalLM, tokens: int, wanted: int) -> int:
    """How many of the wanted tokens the model's window has room for after so many.

    Raises:
        PromptError: for none.
    """
    window = _window(model)
    room = wanted if window is None else min(wanted, window - tokens)
    if room < 1:
        raise PromptError(f"expected room for an answer, found {tokens} tokens in a window of {window}")
    return room


def _window(model: XLoraForCausalLM) -> int | None:
    found: int | None = getattr(model.config.base_text_config, "max_position_embeddings", None)
    return found

"""Prompts as token ids that know their turn and role: plain text, messages, and how a conversation goes on.

    turns  0 system   1 user   2 assistant   3 user ...     each with what the chat template puts around it

Knows nothing of models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xloom.errors import PromptError, names
from xloom.trace import ROLES

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """Some token ids in a row, with the turn and the role of each."""

    ids: tuple[int, ...]
    turns: tuple[int, ...]
    roles: tuple[str, ...]

    def followed_by(self, ids: Sequence[int], turn: int, role: str) -> "Piece":
        count = len(ids)
        return Piece((*self.ids, *ids), (*self.turns, *[turn] * count), (*self.roles, *[role] * count))


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message]) -> Piece:
    """A string as it is, or messages through the chat template, up to where the answer begins.

    What a template puts before the first message, as its own system message, is a turn of role "system".

    Raises:
        PromptError: empty, a role that is unknown, or messages that the chat template does not take.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        if not ids:
            raise PromptError("the prompt is empty")
        return Piece(tuple(ids), (0,) * len(ids), ("text",) * len(ids))
    return Chat(tokenizer, prompt).piece


class Chat:
    """A conversation that grows.

    Attributes:
        piece: what is to be read next: at first all of it, then what follows the last answer. It ends where an answer
            begins.
        turn: of that answer.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Message]) -> None:
        _check(messages)
        self._tokenizer, self._messages = tokenizer, list(messages)
        self._text = render(tokenizer, messages, answer=True)
        extra = _template_start(tokenizer, messages)
        self._before_first = int(extra > 0)
        cuts = [(extra, 0, "system")] * self._before_first
        for number, message in enumerate(messages[:-1]):
            end = _end_of(tokenizer, messages[: number + 1], self._text)
            if end is not None:
                cuts.append((end, number + self._before_first, message["role"]))
        self.turn = len(messages) + self._before_first
        last = render(tokenizer, messages, answer=False)
        self.piece = self._cut(self._text, [*cuts, *self._ending(messages[-1], self._text, len(last))])

    def go_on(self, answer: str, question: str, written: int | None = None) -> None:
        """The model has answered and the user speaks again.

        Args:
            written: the last token of the answer, which is not read again where it is the one that closes the message.

        Raises:
            PromptError: the template writes what has been read in another way now.
        """
        self._messages += [{"role": "assistant", "content": answer}]
        closed = render(self._tokenizer, self._messages, answer=False)
        self._messages += [{"role": "user", "content": question}]
        asked = render(self._tokenizer, self._messages, answer=False)
        text = render(self._tokenizer, self._messages, answer=True)
        said = next((one for one in (answer, answer.strip()) if text.startswith(self._text + one)), None)
        if said is None or not text.startswith(closed):
            raise PromptError(
                "expected a chat template under which a conversation only grows, found one that writes earlier "
                "messages in another way"
            )
        start = len(self._text) + len(said)
        cuts = [(len(closed) - start, self.turn, "assistant")]
        self.turn += 2
        rest = text[start:]
        piece = self._cut(rest, [*cuts, *self._ending(self._messages[-1], rest, len(asked) - start)])
        drop = int(written is not None and piece.ids[:1] == (written,))
        self.piece = Piece(piece.ids[drop:], piece.turns[drop:], piece.roles[drop:])
        self._text = text

    def _ending(self, last: Message, text: str, end: int) -> list[tuple[int, int, str]]:
        """The last message, and the beginning of the answer to it."""
        return [(end, self.turn - 1, last["role"]), (len(text), self.turn, "assistant")]

    def _cut(self, text: str, cuts: Sequence[tuple[int, int, str]]) -> Piece:
        """The text's ids; those up to each cut, given as (place in the text, turn, role), belong to it."""
        whole = self._tokenizer(text, add_special_tokens=False).input_ids
        piece = Piece((), (), ())
        for end, turn, role in cuts:
            some = self._tokenizer(text[:end], add_special_tokens=False).input_ids if end < len(text) else whole
            same = next((i for i, (a, b) in enumerate(zip(some, whole)) if a != b), min(len(some), len(whole)))
            piece = piece.followed_by(whole[len(piece.ids) : same], turn, role)
        return piece


def render(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> str:
    """The messages as text, and where an answer is due its beginning.

    Raises:
        PromptError: no chat template, or messages that it does not take.
    """
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise PromptError(f"tokenizer {tokenizer.name_or_path}: has no chat template, which messages need")
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer, tokenize=False))
    except TemplateError as error:
        raise PromptError(f"expected messages that the chat template takes, found: {error}") from None


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise PromptError("the prompt is empty: expected messages, found none")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES[1:] or not isinstance(content, str):
            expected = f"a role of {names(ROLES[1:])} and content as a string"
            raise PromptError(f"message {number}: expected {expected}, found {role!r} and {type(content).__name__}")
    if messages[-1]["role"] == "assistant":
        raise PromptError("expected a last message that can be answered, found one of the assistant")


def _end_of(tokenizer: Any, messages: Sequence[Message], text: str) -> int | None:
    """Where these messages end in the text; None if the template does not take or write them alone."""
    try:
        start = render(tokenizer, messages, answer=False)
    except PromptError:
        return None
    return len(start) if text.startswith(start) else None


def _template_start(tokenizer: Any, messages: Sequence[Message]) -> int:
    """Characters that the template writes before the first message: what it does not write before it a second time."""
    first = messages[0]
    if first["role"] != "user":
        return 0
    before = [first, {"role": "assistant", "content": "x"}]
    try:
        once, twice = render(tokenizer, [first], answer=False), render(tokenizer, [*before, first], answer=False)
        again = twice[len(render(tokenizer, before, answer=False)) :]
    except PromptError:
        return 0
    return len(once) - len(again) if again and once.endswith(again) else 0

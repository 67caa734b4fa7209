"""What a report is made of: prompts from a JSONL file, or traces that are on disk already.

    "text"                                        a line can be a prompt alone
    {"prompt": "text" or [messages]}              or an object; "completion" is the right answer, if it is known
    {"messages": [...]}                           a last message of the assistant is the right answer
    {"questions": ["...", "..."]}                 a conversation: each is asked after the answer to the one before it
    with "system", "domain" or "group", "name"    a system message; what is compared; a heading of its own

Knows nothing of models.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.errors import DataError, NotFoundError, names
from xloom.trace import ROLES, Trace
from xloom.training.rows import find_source

GROUP, NAME, LINE = "group", "name", "line"  # keys of the metadata of an ask, and so of its trace
_KEYS = ("prompt", "messages", "questions")
_OTHERS = ("completion", "system", "domain", "group", "name")
_INDEX = "trace.json"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        prompt: text as it stands, or messages for the chat template; of a conversation its first messages.
        then: further questions of a conversation.
        answer: the right one, if it is known.
        metadata: `line`, and where the row has them `group` and `name`.
    """

    prompt: str | Messages
    then: tuple[str, ...] = ()
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str | None:
        """The system message that a conversation begins with."""
        first = self.prompt[0] if not isinstance(self.prompt, str) else {}
        return str(first["content"]) if first.get("role") == "system" else None

    @property
    def questions(self) -> list[str]:
        """All questions of a conversation, or the last message of a prompt."""
        last = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])
        return [last, *self.then]


def read_asks(source: str | Path, *, limit: int | None = None, raw: bool = False) -> list[Ask]:
    """The prompts of a JSONL file, or of `suite:SET:SPLIT`.

    Args:
        limit: only the first so many.
        raw: a prompt that is a string is taken as it stands, and not as a user's message.

    Raises:
        DataError: a line is none of the forms above, named by file and line; or there is none.
        NotFoundError: no such file.
    """
    path = find_source(source).place
    if not isinstance(path, Path) or path.suffix != ".jsonl":
        raise DataError(f"{source}: expected prompts in a file ending in .jsonl, or a folder of traces")
    found: list[Ask] = []
    for number, value in _lines(path):
        if limit is not None and len(found) == limit:
            break
        try:
            found.append(_ask(value, raw, number))
        except DataError as error:
            raise DataError(f"{source}:{number}: {error}") from None
    if not found:
        raise DataError(f"{source}: expected prompts, found none")
    return found


def read_traces(folder: Path, *, limit: int | None = None) -> list[Trace]:
    """The trace in a folder, or those in the folders of it, in the order of their names.

    Raises:
        NotFoundError: there is none. Others as `Trace.load`.
    """
    if (folder / _INDEX).is_file():
        return [Trace.load(folder)]
    found = sorted(path.parent for path in folder.glob(f"*/{_INDEX}"))
    if not found:
        raise NotFoundError(f"{folder}: expected a trace ({_INDEX}) or folders of traces, found none")
    return [_named(Trace.load(path), path.name) for path in found[:limit]]


def _named(trace: Trace, name: str) -> Trace:
    """With the folder's name, where that is more than a number."""
    return trace if NAME in trace.metadata or name.isdigit() else trace.with_metadata(**{NAME: name})


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: expected JSON, found invalid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, found another encoding ({error.reason})") from None
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from None


def _ask(value: Any, raw: bool, line: int) -> Ask:
    if isinstance(value, str):
        value = {"prompt": value}
    kinds = [key for key in _KEYS if isinstance(value, dict) and key in value]
    if len(kinds) != 1:
        found = names(value) or "{}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"expected a string, or an object with one of {names(_KEYS)}, found {found}")
    given = {key: _string(value, key) for key in _OTHERS[1:] if value.get(key) is not None}
    group = given.get("group", given.get("domain"))
    metadata = {LINE: line} | ({GROUP: group} if group else {}) | ({NAME: given["name"]} if "name" in given else {})
    system: Messages = [{"role": "system", "content": given["system"]}] if "system" in given else []
    if kinds[0] == "questions":
        questions = value["questions"]
        if not isinstance(questions, list) or not questions or not all(_filled(one) for one in questions):
            raise DataError(f"questions: expected a list of strings, found {questions!r:.40}")
        return Ask([*system, _user(questions[0])], tuple(questions[1:]), None, metadata)
    prompt, answer = _prompt(value[kinds[0]], kinds[0]), value.get("completion")
    if kinds[0] == "messages" and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        prompt, answer = prompt[:-1], prompt[-1:]
    if isinstance(prompt, str) and not raw:
        prompt = [_user(prompt)]
    if system:
        prompt = [*system, *([_user(prompt)] if isinstance(prompt, str) else prompt)]
    return Ask(prompt, (), _answer(answer), metadata)


def _prompt(value: Any, key: str) -> str | Messages:
    if key == "prompt" and _filled(value):
        return str(value)
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{key}: expected messages{' or a string' * (key == 'prompt')}, found {value!r:.40}")
    for number, message in enumerate(value):
        if message.get("role") not in ROLES[1:] or not isinstance(message.get("content"), str):
            expected = f"a role of {names(ROLES[1:])} and content as a string"
            raise DataError(f"{key}[{number}]: expected {expected}, found {message!r:.60}")
    if all(message["role"] == "assistant" for message in value):
        raise DataError(f"{key}: expected a message to answer, found those of the assistant alone")
    return list(value)


def _answer(value: Any) -> str | None:
    """The text of a completion; a blank one is none."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if value is not None and not isinstance(value, str):
        raise DataError(f"completion: expected a string or one message of the assistant, found {value!r:.40}")
    return value if value and value.strip() else None


def _string(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise DataError(f"{key}: expected a string, found {value[key]!r:.40}")
    return str(value[key])


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}

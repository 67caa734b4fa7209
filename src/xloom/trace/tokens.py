"""What a trace knows beside its scalings: the columns of its tokens, and what is the same for all of them.

Knows nothing of files, models or tokenizers.
Letters: T tokens
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from xloom.errors import TraceError, names

ROLES = ("text", "system", "user", "assistant", "tool")  # stored as numbers: new ones go to the end
NO_TOKEN = -1  # the id of a token that is not known


@dataclass(frozen=True, eq=False)
class Tokens:
    """The columns of T tokens; `Tokens.make` fills in what is not given.

    Attributes:
        ids: [T] int64.
        logprobs: [T] float32, natural logarithm of the model's probability of each token after those before it; NaN
            where there is none.
        special: [T] bool, tokens that are no text of their own, as `<|im_end|>`.
        answer: [T] bool, tokens that were written, or given as the answer; the others are prompt.
        turns: [T] int32, which message of a conversation (0, 1, ...), with what the chat template puts around it.
        roles: [T] uint8, that message's place in `ROLES`; "text" outside of conversations.
        texts: what each adds to the text; empty for a token that does not complete a character.
    """

    ids: Tensor
    logprobs: Tensor
    special: Tensor
    answer: Tensor
    turns: Tensor
    roles: Tensor
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = {one.name: len(getattr(self, one.name)) for one in fields(self)}
        if len(set(sizes.values())) != 1:
            raise TraceError(f"columns of a trace's tokens: expected one length, found {sizes}")
        if len(self.roles) and int(self.roles.max()) >= len(ROLES):
            raise TraceError(f"roles: expected numbers below {len(ROLES)}, found {int(self.roles.max())}")

    @classmethod
    def make(
        cls,
        ids: Sequence[int] | Tensor,
        texts: Sequence[str] | None = None,
        *,
        logprobs: Sequence[float] | Tensor | None = None,
        special: Sequence[bool] | Tensor | bool = False,
        answer: Sequence[bool] | Tensor | bool = False,
        turns: Sequence[int] | Tensor | int = 0,
        roles: Sequence[str] | str = "text",
    ) -> Self:
        """Columns from Python values; one value stands for all tokens.

        Raises:
            TraceError: lengths differ, or a role is unknown.
        """
        count = len(ids)
        named = [roles] * count if isinstance(roles, str) else list(roles)
        return cls(
            ids=torch.as_tensor(ids, dtype=torch.int64),
            logprobs=_column(float("nan") if logprobs is None else logprobs, count, torch.float32),
            special=_column(special, count, torch.bool),
            answer=_column(answer, count, torch.bool),
            turns=_column(turns, count, torch.int32),
            roles=torch.tensor([_role(name) for name in named], dtype=torch.uint8),
            texts=("",) * count if texts is None else tuple(texts),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Tokens({len(self)}, {int(self.answer.sum())} of the answer: {start_of(''.join(self.texts))!r})"

    def __getitem__(self, place: slice) -> Self:
        return type(self)(**{one.name: getattr(self, one.name)[place] for one in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence["Tokens"]) -> Self:
        """One after the other."""
        if not parts:
            return cls.make([])
        columns = [one.name for one in fields(cls) if one.name != "texts"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
        return cls(**joined, texts=tuple(text for part in parts for text in part.texts))

    @property
    def role_names(self) -> list[str]:
        """The role of each token, by name."""
        return [ROLES[place] for place in self.roles.tolist()]

    # --- as tensors alone, for safetensors ---

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name; the texts as UTF-8 bytes and the places where each ends."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in self.texts]
        columns = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "texts"}
        ends = torch.tensor(list(accumulate(map(len, encoded))), dtype=torch.int64)
        joined = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
        return columns | {"text_bytes": joined, "text_ends": ends}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Raises TraceError where the columns are not those of `tensors`."""
        expected = cls.make([]).tensors()
        for name, like in expected.items():
            found = tensors.get(name)
            if found is None or found.ndim != 1 or found.dtype != like.dtype:
                kind = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise TraceError(f"column {name!r}: expected one axis of {like.dtype}, found {kind}")
        whole, ends = bytes(tensors["text_bytes"].tolist()), tensors["text_ends"].tolist()
        if sorted(ends) != ends or (ends[-1] if ends else 0) != len(whole):
            raise TraceError("column 'text_ends': expected places in the text, in order, found others")
        texts = tuple(whole[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise([0, *ends]))
        columns = {one.name: tensors[one.name] for one in fields(cls) if one.name != "texts"}
        return cls(**columns, texts=texts)


@dataclass(frozen=True)
class About:
    """What is the same for all tokens of a trace.

    Attributes:
        sites, experts: names of the S and N axes.
        model: name of the model, or where it came from.
        router: who gave the scalings.
        config: the model's settings, as JSON knows them.
        metadata: anything else that JSON knows, e.g. `{"domain": "quantum"}`.
    """

    sites: tuple[str, ...]
    experts: tuple[str, ...]
    model: str = ""
    router: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Raises TraceError for a value that JSON does not know."""
        value = {one.name: getattr(self, one.name) for one in fields(self)}
        value |= {"config": dict(self.config), "metadata": dict(self.metadata)}
        try:
            whole: dict[str, Any] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise TraceError(f"config or metadata of a trace: expected what JSON knows, found: {error}") from None
        return whole

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises TraceError for a field that is missing or of the wrong kind."""
        kinds = {"sites": list, "experts": list, "model": str, "router": str, "config": dict, "metadata": dict}
        for name, kind in kinds.items():
            if not isinstance(value.get(name), kind):
                raise TraceError(f"field {name!r}: expected {kind.__name__}, found {type(value.get(name)).__name__}")
        known = {name: value[name] for name in kinds}
        return cls(**known | {"sites": _words(value, "sites"), "experts": _words(value, "experts")})


def start_of(text: str) -> str:
    """The first 40 characters."""
    return text if len(text) <= 40 else f"{text[:39]}…"


def _words(value: Mapping[str, Any], field_name: str) -> tuple[str, ...]:
    words: list[Any] = value[field_name]
    if not all(isinstance(word, str) for word in words):
        raise TraceError(f"field {field_name!r}: expected names, found {names(map(repr, words))}")
    return tuple(words)


def _column(value: Iterable[Any] | Tensor | float, count: int, dtype: torch.dtype) -> Tensor:
    if isinstance(value, (bool, int, float)):
        return torch.full((count,), value, dtype=dtype)
    return torch.as_tensor(value if isinstance(value, Tensor) else list(value), dtype=dtype)


def _role(name: str) -> int:
    if name not in ROLES:
        raise TraceError(f"unknown role {name!r}; expected one of {names(ROLES)}")
    return ROLES.index(name)

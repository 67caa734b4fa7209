"""What a recipe's fields may hold, and how a wrong one is told in one line.

Knows nothing of files, or of what recipes are for.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xloom.errors import RecipeError, names, near


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def off(value: Any) -> Any:
    return "off" if value is False else value  # which is what YAML takes the word for


def _check_targets(value: Any) -> Any:
    if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("expected 'all-linear' or a list of module names")


Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Layer = Annotated[int, Field(strict=True, ge=0)]
Weight = Annotated[float, Field(ge=0)]
Word = Annotated[str, Field(min_length=1)]
Paths = Annotated[tuple[Word, ...], BeforeValidator(_as_list), Field(min_length=1)]
Targets = Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_check_targets)]


class Checked(BaseModel):
    """A frozen model whose construction raises RecipeError in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RecipeError("; ".join(_one_line(type(self), problem) for problem in error.errors())) from None


class Lora(BaseModel):
    """Shape of the LoRA adapter; fields mean what they mean in PEFT's `LoraConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: Count = 8
    alpha: Count = 16
    dropout: Share = 0.0
    targets: Targets = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = None


class Domain(BaseModel):
    """Rows of one domain for the head.

    Args:
        files: what holds them, see `rows.find_source`.
        expert: the right expert for them; by default the one that has the domain's name. "base": none of them, which
            the null expert stands for. None: there is no single right one, and the experts' own losses say how well
            each suits a row.
        weight: how often rows are drawn from here, relative to the other domains; not from how many.
        rows: take the first so many rows only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    files: Paths
    expert: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    rows: Count | None = None

    @property
    def says_expert(self) -> bool:
        """Whether `expert` was given, be it as null."""
        return "expert" in self.model_fields_set


def _as_domain(value: Any) -> Any:
    return {"files": value} if isinstance(value, (str, list, tuple)) else value


Domains = dict[str, Annotated[Domain, BeforeValidator(_as_domain)]]


def _one_line(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    loc: tuple[Any, ...] = problem["loc"]
    key = ".".join(str(part) for part in loc if not str(part).startswith(("literal[", "tuple[")))
    if problem["type"] == "extra_forbidden":
        inner: dict[Any, type[BaseModel]] = {"lora": Lora, "data": Domain}
        known = inner.get(loc[0], kind) if len(loc) > 1 else kind
        return f"unknown key {key!r}{_nearest(str(loc[-1]), known.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: expected a value, found nothing"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    expected = re.sub(r"^(String|Tuple|Value) should have (.*?)( after validation.*)?$", r"\2", expected)
    expected = expected.removeprefix("be ")
    expected = {"a valid tuple": "a list", "a valid dictionary": "keys with values"}.get(expected, expected)
    if expected.startswith("a valid dictionary or instance of Domain"):
        expected = "files, or keys with values"
    return f"{key}: expected {expected.removeprefix('expected ')}, found {problem['input']!r}"


def _nearest(word: str, known: Iterable[str]) -> str:
    return near(word, known) or f"; known are {names(known, 40)}"

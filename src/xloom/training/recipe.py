"""Recipes: what one training run is, as a YAML file or as keywords, checked before anything heavy starts.

    ExpertRecipe   base + rows                      -> one LoRA expert
    HeadRecipe     base + experts + rows by domain  -> one X-LoRA head

Every problem is a one-line `RecipeError` that names file, key, what was expected and what was found.
Knows nothing of models, tokenizers or of what stands in the data files.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from xloom.config import XLoraConfig, check_expert_names, check_field_names
from xloom.errors import RecipeError, XLoomError, names
from xloom.files import fetch_folder

_NAME_OR_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_R = TypeVar("_R", bound="Recipe")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_targets(value: Any) -> Any:
    if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("expected 'all-linear' or a list of module names")


Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
Targets = Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_check_targets)]


class _Checked(BaseModel):
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
    layers_to_transform: tuple[Annotated[int, Field(strict=True, ge=0)], ...] | None = None


class Recipe(_Checked):
    """What both kinds of run have in common.

    Args:
        base: folder, hub id, or the name of the built-in base.
        output: folder that the run makes.
        max_steps: optimizer steps.
        batch_size: rows per forward; a step sees `batch_size * gradient_accumulation` rows.
        warmup_ratio: share of the steps over which the learning rate rises.
        max_length: tokens; longer rows are left out and counted.
        dtype: of the frozen base. What is trained stays float32.
        eval_every: steps between validations; None validates at the end only.
        save_every: steps between checkpoints that an interrupted run resumes from.
        early_stopping: stop after so many validations without a lower loss, and keep the best; needs `eval_every`.
    """

    base: Annotated[str, Field(min_length=1)]
    output: Annotated[str, Field(min_length=1)]
    max_steps: Count
    batch_size: Count = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_ratio: Share = 0.03
    max_length: Count = 512
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    eval_every: Count | None = None
    save_every: Count = 100
    early_stopping: Count | None = None
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False

    _file: Path | None = PrivateAttr(default=None)

    @property
    def where(self) -> str:
        """The recipe's file, for messages."""
        return str(self._file or type(self).__name__)

    def path(self, word: str) -> Path:
        """A path of the recipe: relative ones start at the recipe's folder, or here if it was made in Python."""
        folder = self._file.parent if self._file else Path()
        return (folder / Path(word).expanduser()).absolute()

    @property
    def output_folder(self) -> Path:
        return self.path(self.output)

    @property
    def base_source(self) -> str:
        """The base as transformers finds it: a folder that exists as an absolute path, anything else as it is."""
        folder = self.path(self.base)
        return str(folder) if folder.is_dir() else self.base

    def data_files(self) -> dict[str, tuple[str, ...]]:
        """Every data file, by the key that names it."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises RecipeError for whatever would stop the run: files that are missing, keys that contradict."""
        if not self.path(self.base).is_dir() and not _NAME_OR_HUB_ID.fullmatch(self.base):
            self.refuse("base", "a folder, a hub id or the built-in base", f"nothing at {self.path(self.base)}")
        files = self.data_files()
        for key, words in files.items():
            for word in words:
                if not self.path(word).is_file():
                    self.refuse(key, "a JSONL file", f"nothing at {self.path(word)}")
        if self.eval_every and not any(key.startswith("valid") for key in files):
            self.refuse("eval_every", "validation files under 'valid'", "none")
        if self.early_stopping and not self.eval_every:
            self.refuse("early_stopping", "eval_every beside it", "none")

    def refuse(self, key: str, expected: str, found: str) -> None:
        raise RecipeError(f"{self.where}: {key}: expected {expected}, found {found}")


class ExpertRecipe(Recipe):
    """One LoRA expert from JSONL files. The other fields are those of `Recipe`."""

    train: Paths
    valid: Paths | None = None
    lora: Lora = Lora()

    def data_files(self) -> dict[str, tuple[str, ...]]:
        return {"train": self.train} | ({"valid": self.valid} if self.valid else {})


class HeadRecipe(Recipe):
    """One X-LoRA head on experts that exist. The other fields are those of `Recipe`.

    Args:
        experts: LoRA folder or hub id by name, in the order of the scalings' last axis.
        data, valid: JSONL files by domain. Rows of a domain that has an expert's name are labelled with it.
        head: fields of `XLoraConfig`.
        routing_weight: of the cross-entropy between a labelled row's mean scalings and its expert.
        zero_init: start from equal scalings.
    """

    experts: dict[str, str]
    data: Annotated[dict[str, Paths], Field(min_length=1)]
    valid: dict[str, Paths] = {}
    head: dict[str, Any] = {}
    routing_weight: Annotated[float, Field(ge=0)] = 1.0
    zero_init: bool = True
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3

    def data_files(self) -> dict[str, tuple[str, ...]]:
        return {f"{key}.{domain}": v for key in ("data", "valid") for domain, v in getattr(self, key).items()}

    def expert_source(self, name: str) -> str:
        """An expert's folder as an absolute path, or its hub id as it is."""
        folder = self.path(self.experts[name])
        return str(folder) if folder.is_dir() else self.experts[name]

    def check(self) -> None:
        super().check()
        self._check_head()
        for name, word in self.experts.items():
            try:
                fetch_folder(self.expert_source(name))
            except XLoomError as error:
                path = self.path(word)
                found = f"nothing at {path}" if path.parent.is_dir() else str(error)
                self.refuse(f"experts.{name}", "a LoRA folder or a hub id", found)
        if self.routing_weight and not set(self.data) & set(self.experts):
            self.refuse(
                "routing_weight",
                f"0 where no domain has an expert's name (experts {names(self.experts)}; domains {names(self.data)})",
                f"{self.routing_weight:g}",
            )

    def _check_head(self) -> None:
        try:
            check_expert_names(list(self.experts))
            check_field_names(list(self.head))
            config = XLoraConfig(**self.head, experts=list(self.experts))
        except XLoomError as error:
            raise RecipeError(f"{self.where}: head: {error}") from None
        if config.use_trainable_adapters and self.dtype != "float32":
            self.refuse("dtype", "float32 with head.use_trainable_adapters", self.dtype)


def load_expert_recipe(path: str | Path) -> ExpertRecipe:
    """Reads and checks a recipe. Raises RecipeError."""
    return _load(ExpertRecipe, Path(path))


def load_head_recipe(path: str | Path) -> HeadRecipe:
    """Reads and checks a recipe. Raises RecipeError."""
    return _load(HeadRecipe, Path(path))


def _load(kind: type[_R], path: Path) -> _R:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: expected a recipe, found {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: expected keys and values, found {type(data).__name__}")
    try:
        recipe = kind(**data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    recipe._file = path.absolute()
    recipe.check()
    return recipe


def _one_line(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    loc: tuple[Any, ...] = problem["loc"]
    key = ".".join(str(part) for part in loc if not str(part).startswith(("literal[", "tuple[")))
    if problem["type"] == "extra_forbidden":
        known = Lora.model_fields if loc[0] == "lora" and len(loc) > 1 else kind.model_fields
        return f"unknown key {key!r}{_nearest(str(loc[-1]), known)}"
    if problem["type"] == "missing":
        return f"{key}: expected a value, found nothing"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ").removeprefix("be ")
    expected = {"a valid tuple": "a list", "a valid dictionary": "keys with values"}.get(expected, expected)
    return f"{key}: expected {expected.removeprefix('expected ')}, found {problem['input']!r}"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {names(known, 40)}"

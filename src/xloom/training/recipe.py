"""Recipes: what one training run is, as a YAML file or as keywords, checked before anything heavy starts.

    ExpertRecipe   base + rows                      -> one LoRA expert
    HeadRecipe     base + experts + rows by domain  -> one X-LoRA head

Every problem is a one-line `RecipeError` that names file, key, what was expected and what was found.
Knows nothing of models, tokenizers or of what stands in the data files.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr

from xloom.config import XLoraConfig, check_expert_names, check_field_names
from xloom.errors import RecipeError, XLoomError, names, near
from xloom.hub.files import fetch_folder
from xloom.training.recipe_fields import Checked, Count, Domains, Lora, Paths, Share, Weight, off
from xloom.training.rows import find_source

BASE_ALONE = "base"  # instead of an expert's name
_NAME_OR_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_R = TypeVar("_R", bound="Recipe")


class Recipe(Checked):
    """What both kinds of run have in common.

    Args:
        base: folder, hub id, or the name of the built-in base.
        output: folder that the run makes.
        max_steps: optimizer steps.
        batch_size: rows per forward; a step sees `batch_size * gradient_accumulation` rows.
        warmup_ratio: share of the steps over which the learning rate rises.
        max_length: tokens; longer rows are left out and counted.
        dtype: of the frozen base. What is trained stays float32.
        quantisation: of the frozen base's linear modules, by bitsandbytes: "4bit" (nf4) or "8bit".
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
    quantisation: Literal["4bit", "8bit"] | None = None
    eval_every: Count | None = None
    save_every: Count = 100
    early_stopping: Count | None = None
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False

    kind: ClassVar[str]  # of what is made
    _file: Path | None = PrivateAttr(default=None)

    @property
    def where(self) -> str:
        """The recipe's file, for messages."""
        return str(self._file or type(self).__name__)

    @property
    def folder(self) -> Path:
        """Where relative paths start: the recipe's folder, or here if it was made in Python."""
        return self._file.parent if self._file else Path()

    def path(self, word: str) -> Path:
        return (self.folder / Path(word).expanduser()).absolute()

    @property
    def output_folder(self) -> Path:
        return self.path(self.output)

    @property
    def base_source(self) -> str:
        """The base as transformers finds it: a folder that exists as an absolute path, anything else as it is."""
        folder = self.path(self.base)
        return str(folder) if folder.is_dir() else self.base

    @abstractmethod
    def data_files(self) -> dict[str, tuple[str, ...]]:
        """Every data file, by the key that names it."""

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON values, with what follows from those left out."""
        return self.model_dump(mode="json")

    def meaning(self) -> dict[str, Any]:
        """What decides the result beside the fields' values: their order where it counts."""
        return {}

    def check(self) -> None:
        """Raises RecipeError for whatever would stop the run: files that are missing, keys that contradict."""
        if not self.path(self.base).is_dir() and not _NAME_OR_HUB_ID.fullmatch(self.base):
            self.refuse("base", "a folder, a hub id or the built-in base", f"nothing at {self.path(self.base)}")
        files = self.data_files()
        for key, words in files.items():
            for word in words:
                try:
                    find_source(word, self.folder)
                except XLoomError as error:
                    raise RecipeError(f"{self.where}: {key}: {error}") from None
        if self.eval_every and not any(key.startswith("valid") for key in files):
            self.refuse("eval_every", "validation files under 'valid'", "none")
        if self.early_stopping and not self.eval_every:
            self.refuse("early_stopping", "eval_every beside it", "none")

    def refuse(self, key: str, expected: str, found: str) -> None:
        raise RecipeError(f"{self.where}: {key}: expected {expected}, found {found}")


class ExpertRecipe(Recipe):
    """One LoRA expert from JSONL files. The other fields are those of `Recipe`.

    Args:
        save_dtype: of the adapter's file; 16 bits halve it. The training itself is in float32.
    """

    kind = "expert"
    train: Paths
    valid: Paths | None = None
    lora: Lora = Lora()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def check(self) -> None:
        super().check()
        if self.quantisation == "8bit" and self.lora.use_dora:
            self.refuse("lora.use_dora", "false with an 8-bit base (bitsandbytes), or quantisation: 4bit", "true")

    def data_files(self) -> dict[str, tuple[str, ...]]:
        return {"train": self.train} | ({"valid": self.valid} if self.valid else {})


class HeadRecipe(Recipe):
    """One X-LoRA head on experts that exist. The other fields are those of `Recipe`.

    Args:
        experts: LoRA folder or hub id by name, in the order of the scalings' last axis.
        data: domains by name; files alone, or the fields of `Domain`.
        valid: files by domain, for validation.
        valid_rows: of each domain at most, evenly spaced.
        head: fields of `XLoraConfig`.
        init: "zero" starts from equal scalings, "random" as torch makes a Linear, "arrow" from a least-squares fit to
            what Arrow routing (arXiv 2405.11157) does on some of the rows, "labels" from training on the routing term
            alone, which takes seconds because it needs no pass with experts.
        label_steps: with init "labels": that start sees what so many steps would draw, up to as many draws as there are
            different rows among them; by default `max_steps`. More rows cost little there.
        routing_weight: of the cross-entropy between a row's mean share and its right expert.
        soft_labels: what rows without a right expert are held against: each expert's own likelihood of the whole
            completion ("row") or of each of its tokens ("token"); "off" leaves them to the next-token loss.
        soft_temperature: divides the losses before the soft labels' softmax; 1 is Bayes' posterior.
        balance_weight: of log N - H(mean share of a batch), in nats.
        entropy_weight: of the mean entropy of the shares per token and site, in nats; above 0 sharpens.
        start_temperature: of the head's softmax at the first step, going down geometrically to
            `head.softmax_temperature`; None keeps it there throughout.
        experts_learning_rate: trains the experts along with the head, at this rate.
        include_experts: False names the experts' folders in the model instead of copying them into it.
        drop_sites_below_gate: with `head.gate_at_layer`, cut what experts adapt below it instead of refusing them.
        state_cache_gb: room on disk for what the head reads of each row; 0 computes it anew in every step.
    """

    kind = "head"
    experts: dict[str, str]
    data: Annotated[Domains, Field(min_length=1)]
    valid: dict[str, Paths] = {}
    valid_rows: Count = 200
    head: dict[str, Any] = {}
    init: Literal["zero", "random", "arrow", "labels"] = "zero"
    label_steps: Annotated[int, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    routing_weight: Weight = 1.0
    soft_labels: Annotated[Literal["row", "token", "off"], BeforeValidator(off)] = "row"
    soft_temperature: Annotated[float, Field(gt=0)] = 1.0
    balance_weight: Weight = 0.0
    entropy_weight: Weight = 0.0
    start_temperature: Annotated[float, Field(gt=0)] | None = None
    experts_learning_rate: Annotated[float, Field(gt=0)] | None = None
    state_cache_gb: Weight = 10.0
    drop_sites_below_gate: bool = False
    include_experts: bool = True

    def data_files(self) -> dict[str, tuple[str, ...]]:
        train = {f"data.{name}": domain.files for name, domain in self.data.items()}
        return train | {f"valid.{name}": files for name, files in self.valid.items()}

    def as_record(self) -> dict[str, Any]:
        record, right = super().as_record(), self.right_experts()
        right |= dict.fromkeys(self.base_domains(), BASE_ALONE)
        for name, domain in record["data"].items():
            domain["expert"] = right.get(name)
        return record

    def meaning(self) -> dict[str, Any]:
        orders = {"order of experts": list(self.experts), "order of data": list(self.data)}
        return orders | {"right_experts": self.right_experts()}

    def right_experts(self) -> dict[str, str]:
        """The right expert by domain, for the domains that have one."""
        found = {name: name for name in [*self.data, *self.valid] if name in self.experts}
        for name, domain in self.data.items():
            if domain.says_expert:
                found.pop(name, None)
                found |= {name: domain.expert} if domain.expert in self.experts else {}
        return found

    def base_domains(self) -> list[str]:
        """Those that the base should answer alone."""
        return [n for n, domain in self.data.items() if domain.expert == BASE_ALONE and BASE_ALONE not in self.experts]

    def head_fields(self) -> dict[str, Any]:
        """The fields of `XLoraConfig` that the model is made with."""
        return self.head | ({"use_trainable_adapters": True} if self.experts_learning_rate else {})

    def mixing_options(self) -> dict[str, Any]:
        """What `from_experts` takes beside the base and the experts."""
        return self.head_fields() | {"drop_sites_below_gate": self.drop_sites_below_gate}

    def expert_source(self, name: str) -> str:
        """An expert's folder as an absolute path, or its hub id as it is."""
        folder = self.path(self.experts[name])
        return str(folder) if folder.is_dir() else self.experts[name]

    def check(self) -> None:
        super().check()
        self._check_head()
        for name, word in self.experts.items():
            if self.path(word).resolve() == self.output_folder.resolve():
                self.refuse("output", f"another folder than that of experts.{name}", self.output)
            try:
                fetch_folder(self.expert_source(name))
            except XLoomError as error:
                path = self.path(word)
                found = f"nothing at {path}" if path.parent.is_dir() else str(error)
                self.refuse(f"experts.{name}", "a LoRA folder or a hub id", found)
        self._check_domains()

    def _check_domains(self) -> None:
        of_base = self.base_domains()
        if of_base and not self.head.get("null_expert"):
            self.refuse(f"data.{of_base[0]}.expert", "head.null_expert: true beside 'base'", "no null expert")
        for name, domain in self.data.items():
            if domain.expert is not None and domain.expert not in self.experts and name not in of_base:
                self.refuse(
                    f"data.{name}.expert",
                    f"one of {names(self.experts)}, 'base' or null",
                    f"{domain.expert!r}{near(domain.expert, self.experts)}",
                )
            if not domain.says_expert and name not in self.experts:
                wanted = f"an expert's name ({names(self.experts)}), or 'expert: NAME' or 'expert: null' below it"
                self.refuse(f"data.{name}", wanted, f"{name!r}{near(name, self.experts)}")
        for name in self.valid:
            if name not in self.data and name not in self.experts:
                self.refuse("valid", f"domains of data ({names(self.data)})", f"{name!r}{near(name, self.data)}")
        needed = self.routing_weight or self.init == "labels"
        if not self.right_experts() and not of_base and needed and self.soft_labels == "off":
            self.refuse("soft_labels", "'row' or 'token' (or no routing term) where no domain has an expert", "'off'")

    def _check_head(self) -> None:
        try:
            check_expert_names(list(self.experts))
            check_field_names(list(self.head))
            config = XLoraConfig(**self.head_fields(), experts=list(self.experts))
        except XLoomError as error:
            raise RecipeError(f"{self.where}: head: {error}") from None
        if config.use_trainable_adapters and not self.experts_learning_rate:
            self.refuse("head.use_trainable_adapters", "experts_learning_rate, which trains the experts", "none")
        if config.use_trainable_adapters and self.dtype != "float32":
            self.refuse("dtype", "float32 where experts are trained", self.dtype)
        if not self.include_experts and (self.experts_learning_rate or self.drop_sites_below_gate):
            self.refuse("include_experts", "true where experts are trained or cut", "false")
        if self.drop_sites_below_gate and config.gate_at_layer is None:
            self.refuse("drop_sites_below_gate", "head.gate_at_layer beside it", "none")
        if self.label_steps is not None and (self.init != "labels" or self.label_steps < self.max_steps):
            self.refuse(
                "label_steps", f"init: labels beside it, and max_steps={self.max_steps} or more", str(self.label_steps)
            )
        for key in ("start_temperature", "init") if not config.enable_softmax else ():
            if getattr(self, key) not in (None, "zero", "random"):
                self.refuse(key, "a head with enable_softmax", "enable_softmax: false")


def load_expert_recipe(path: str | Path) -> ExpertRecipe:
    """Reads and checks a recipe. Raises RecipeError."""
    return _load(ExpertRecipe, Path(path))


def load_head_recipe(path: str | Path) -> HeadRecipe:
    """Reads and checks a recipe. Raises RecipeError."""
    return _load(HeadRecipe, Path(path))


class _EachKeyOnce(yaml.SafeLoader):
    """YAML takes the last of equal keys without a word; here they are refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1 and key != "<<"]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} twice, the second time in or after line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _load(kind: type[_R], path: Path) -> _R:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        raise RecipeError(f"{path}: expected a recipe, found {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: expected keys and values, found {type(data).__name__}")
    if kind is HeadRecipe and {"lora", "train"} & set(data):
        raise RecipeError(f"{path}: expected a recipe for a head, found one for an expert: see xloom train-expert")
    if kind is ExpertRecipe and {"experts", "data"} & set(data):
        raise RecipeError(f"{path}: expected a recipe for an expert, found one for a head: see xloom train")
    try:
        recipe = kind(**data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    recipe._file = path.absolute()
    recipe.check()
    return recipe

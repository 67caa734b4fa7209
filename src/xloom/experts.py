"""Reading LoRA adapters: a PEFT folder or hub id becomes an `Expert`, or a named refusal.

An expert is data: for every adapted module the two low-rank factors and how they are scaled. Knows nothing of base
models, except to say which of its modules each factor belongs to (`match_modules`).
Letters: I in-features  O out-features  R rank
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xloom.errors import (
    ActivatedLoraError,
    BaseMismatchError,
    ConvolutionError,
    ExpertError,
    ModulesToSaveError,
    NoMatchingSiteError,
    NonFiniteError,
    NotLoraError,
    PickleError,
    TargetParametersError,
    UnsupportedLoraError,
    names,
)
from xloom.hub.files import fetch_folder, read_json, read_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_SCORE = f"{PREFIX}score."

# Options of PEFT's LoraConfig that say nothing about what the saved weights compute. Any other option that is set and
# not handled below is refused by name: ignoring it could change the expert's meaning.
_BOOKKEEPING = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_HANDLED = {
    "alora_invocation_tokens", "alpha_pattern", "bias", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_parameters", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that subtract something from the base's own weights when PEFT loads the adapter.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LINEAR_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(\.\w+)?\.(?P<kind>weight|bias)")
_EMBEDDING_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B)(\.\w+)?")
_MAGNITUDE_KEY = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.\w+)?")


@dataclass(frozen=True)
class LowRank:
    """One expert at one module: `delta(x) = scale * (B A x + bias)`, or DoRA's delta when `magnitude_O` is there.

    `scale` is alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA.
    """

    A_RI: Tensor
    B_OR: Tensor
    scale: float
    bias_O: Tensor | None = None
    magnitude_O: Tensor | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    def to(self, **place: Any) -> "LowRank":
        """The same with all tensors moved or cast."""
        bias = None if self.bias_O is None else self.bias_O.to(**place)
        magnitude = None if self.magnitude_O is None else self.magnitude_O.to(**place)
        A_RI, B_OR = self.A_RI.to(**place), self.B_OR.to(**place)
        return replace(self, A_RI=A_RI, B_OR=B_OR, bias_O=bias, magnitude_O=magnitude)


@dataclass(frozen=True)
class Expert:
    """A LoRA adapter as read from its folder.

    Args:
        source: where it came from, for messages.
        config: its adapter_config.json, as it stands.
        modules: one `LowRank` per adapted module, by module path.
        score: weights of the score head that a PEFT adapter for classification (SEQ_CLS) brings, by name; not mixed.
    """

    source: str
    config: Mapping[str, Any]
    modules: Mapping[str, LowRank] = field(repr=False)
    score: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, subfolder: str | None = None, revision: str | None = None
    ) -> "Expert":
        """Reads a PEFT LoRA folder, or a hub id (`org/name` or `org/name/sub/folder`).

        Raises:
            NotFoundError, TruncatedFileError: the files are not there or not whole.
            ExpertError: one of its children names what cannot be mixed; see `xloom.errors`.
        """
        folder = fetch_folder(source, revision=revision, subfolder=subfolder)
        if not (folder / CONFIG_FILE).is_file():
            raise NotLoraError(f"{folder}: expected a PEFT adapter, found no {CONFIG_FILE}")
        config = read_json(folder / CONFIG_FILE)
        check_lora_config(config, where=str(folder / CONFIG_FILE))
        if not (folder / WEIGHTS_FILE).is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
            if pickles:
                raise PickleError(
                    f"{folder}: weights are a pickle ({names(pickles)}), which can run code; expected {WEIGHTS_FILE}"
                )
        return cls.from_tensors(config, read_tensors(folder / WEIGHTS_FILE), source=str(folder / WEIGHTS_FILE))

    @classmethod
    def from_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, source: str) -> "Expert":
        """The same from tensors under PEFT's key names. Raises as `from_pretrained`."""
        score = _score_head(tensors, config, source)
        parts = _sort_tensors({key: tensors[key] for key in tensors if key not in score}, source)
        modules = {module: _low_rank(module, found, config, source) for module, found in parts.items()}
        if not modules:
            raise NoMatchingSiteError(f"{source}: holds no LoRA tensors")
        return cls(source, dict(config), modules, {key.removeprefix(_SCORE): score[key] for key in score})

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """True if casting to `dtype` loses nothing by kind: same dtype, or a wider one."""
        kinds = {low.A_RI.dtype for low in self.modules.values()} | {low.B_OR.dtype for low in self.modules.values()}
        return all(torch.promote_types(kind, dtype) == dtype for kind in kinds)

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's key names: what `from_tensors` reads."""
        out: dict[str, Tensor] = {}
        for module, low in self.modules.items():
            a, b = ("lora_embedding_A", "lora_embedding_B") if low.is_embedding else ("lora_A.weight", "lora_B.weight")
            out[f"{PREFIX}{module}.{a}"] = low.A_RI
            out[f"{PREFIX}{module}.{b}"] = low.B_OR
            if low.bias_O is not None:
                out[f"{PREFIX}{module}.lora_B.bias"] = low.bias_O
            if low.magnitude_O is not None:
                out[f"{PREFIX}{module}.lora_magnitude_vector"] = low.magnitude_O
        return out | {f"{_SCORE}{name}": tensor for name, tensor in self.score.items()}

    def match_modules(self, base_modules: Collection[str], decoder_prefix: str) -> "Expert":
        """The same expert with module paths as the base has them.

        An adapter trained on the bare decoder lacks the prefix that the decoder has in a causal model (`model.`), or
        carries one too many; both are put right.

        Raises:
            BaseMismatchError: a module is in neither place.
        """
        renamed, missing = {}, []
        for module, low in self.modules.items():
            candidates = (module, f"{decoder_prefix}.{module}", module.removeprefix(f"{decoder_prefix}."))
            home = next((c for c in candidates if c in base_modules), None)
            if home is None:
                missing.append(module)
            else:
                renamed[home] = low
        if missing and not renamed:
            raise NoMatchingSiteError(
                f"{self.source}: none of its {len(missing)} modules is in the base model: {names(missing, 3)}"
            )
        if missing:
            raise BaseMismatchError(f"{self.source}: made for another base, which has also {names(missing, 3)}")
        return replace(self, modules=renamed)


def check_lora_config(config: Mapping[str, Any], where: str) -> None:
    """Raises the error that names the first option of an adapter_config.json that cannot be mixed."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotLoraError(f"{where}: expected peft_type 'LORA', found {kind!r}")
    if config.get("modules_to_save") and not _saves_only_a_score_head(config):
        raise ModulesToSaveError(
            f"{where}: modules_to_save={list(config['modules_to_save'])} holds whole modules, which cannot be mixed "
            "per token; train the expert without it"
        )
    if config.get("target_parameters"):
        raise TargetParametersError(f"{where}: target_parameters={list(config['target_parameters'])} is not supported")
    if config.get("alora_invocation_tokens"):
        raise ActivatedLoraError(
            f"{where}: an activated LoRA (alora_invocation_tokens) switches itself on; not mixable"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedLoraError(f"{where}: bias={config['bias']!r} changes the base's own biases; expected 'none'")
    _check_ranks(config, where)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise UnsupportedLoraError(
            f"{where}: init_lora_weights={init!r} changes the base's weights when it is loaded; convert the adapter "
            "to a plain LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for option, value in config.items():
        if value and option not in _BOOKKEEPING and option not in _HANDLED:
            raise UnsupportedLoraError(f"{where}: option {option}={value!r} is not supported")


def _saves_only_a_score_head(config: Mapping[str, Any]) -> bool:
    """PEFT adds the two usual names of such a head to every adapter for classification."""
    return config.get("task_type") == "SEQ_CLS" and set(config["modules_to_save"]) <= {"score", "classifier"}


def _check_ranks(config: Mapping[str, Any], where: str) -> None:
    for option, positive in (("r", True), ("lora_alpha", False)):
        _check_number(config.get(option), positive, f"{where}: {option}")
    for option, positive in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise ExpertError(f"{where}: {option}: expected patterns with numbers, found {patterns!r}")
        for pattern, value in patterns.items():
            _check_number(value, positive, f"{where}: {option}[{pattern!r}]")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ExpertError(f"{where}: {option}: {pattern!r} is no regular expression ({error})") from None


def _check_number(value: Any, whole_and_positive: bool, where: str) -> None:
    kinds = int if whole_and_positive else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not right or (whole_and_positive and value < 1):
        wanted = "a whole number of at least 1" if whole_and_positive else "a number"
        raise ExpertError(f"{where}: expected {wanted}, found {value!r}")


def lora_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank and the scale that an adapter_config.json gives a module (PEFT: rank_pattern, alpha_pattern, rslora)."""
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _score_head(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors, by their keys, of the score head that an adapter for classification brings."""
    if config.get("task_type") != "SEQ_CLS":
        return {}
    found = {f"{_SCORE}{part}": tensors.get(f"{_SCORE}{part}") for part in ("weight", "bias")}
    score = {key: tensor for key, tensor in found.items() if tensor is not None}
    for key, tensor in score.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{source}: tensor {key} holds NaN or infinity")
    return score


def _sort_tensors(tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """module path -> {"A", "B", "bias", "magnitude", "embedding"}; whatever is no LoRA tensor is refused."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        if linear := _LINEAR_KEY.fullmatch(inner):
            if linear["part"] == "lora_A" and linear["kind"] == "bias":
                raise UnsupportedLoraError(f"{source}: tensor {key}: a bias on lora_A is not supported")
            name = "bias" if linear["kind"] == "bias" else linear["part"][-1]
            found, module = {name: tensor}, linear["module"]
        elif embedding := _EMBEDDING_KEY.fullmatch(inner):
            found, module = {embedding["part"][-1]: tensor, "embedding": tensor}, embedding["module"]
        elif magnitude := _MAGNITUDE_KEY.fullmatch(inner):
            found, module = {"magnitude": tensor}, magnitude["module"]
        elif inner.endswith(".base_layer.weight"):
            continue  # PEFT adds a copy of an adapted embedding's own weights; the base has them
        else:
            raise ModulesToSaveError(
                f"{source}: tensor {key} is no LoRA factor but a whole weight, which cannot be mixed"
            )
        if tensor.ndim > 2:
            if tensor.ndim == 3:
                raise TargetParametersError(f"{source}: tensor {key}: {tensor.ndim} axes, of an adapted bare parameter")
            raise ConvolutionError(f"{source}: tensor {key}: shape {tuple(tensor.shape)} adapts a convolution")
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{source}: tensor {key} holds NaN or infinity")
        parts.setdefault(module, {}).update(found)
    return parts


def _low_rank(module: str, found: dict[str, Tensor], config: Mapping[str, Any], source: str) -> LowRank:
    if "A" not in found or "B" not in found:
        lacking = "lora_A" if "A" not in found else "lora_B"
        raise ExpertError(f"{source}: module {module} has no {lacking}: the file is not whole")
    rank, scale = lora_scale(config, module)
    A_RI, B_OR = found["A"], found["B"]
    for part, axes in (("A", 2), ("B", 2), ("bias", 1), ("magnitude", 1)):
        if part in found and found[part].ndim != axes:
            shape = tuple(found[part].shape)
            raise ExpertError(f"{source}: module {module}: expected {part} with {axes} axes, found shape {shape}")
    if A_RI.shape[0] != rank or B_OR.shape[1] != rank:
        raise ExpertError(
            f"{source}: module {module}: the config gives rank {rank}, the tensors have "
            f"A {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}"
        )
    for part in ("bias", "magnitude"):
        if part in found and found[part].shape[0] != B_OR.shape[0]:
            raise ExpertError(
                f"{source}: module {module}: expected {part} of length {B_OR.shape[0]}, found {found[part].shape[0]}"
            )
    if bool(config.get("use_dora")) != ("magnitude" in found):
        raise ExpertError(f"{source}: module {module}: use_dora and the presence of lora_magnitude_vector disagree")
    return LowRank(A_RI, B_OR, scale, found.get("bias"), found.get("magnitude"), "embedding" in found)

"""`XLoraConfig`: what a mixture is made of and how its head gates, in PEFT's words plus ours.

Checks itself when it is made: unknown fields, values out of range and contradictions raise `ConfigError`.
Knows nothing of files, weights or modules; the base model is known by its transformers config alone.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from xloom.errors import ConfigError, DuplicateExpertError, NoExpertsError, UnsupportedArchitectureError, names, near

CACHEABLE_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
DEFAULT_HALF_LIFE = 32.0
_EXPERT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_KINDS: dict[str, tuple[type, ...]] = {
    "experts": (list, tuple, type(None)),
    "sites": (list, tuple, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "base_revision": (str, type(None)),
    "base_config": (dict, PreTrainedConfig, type(None)),
}
_WORDS = {
    "experts": "a list of names",
    "sites": "a list of module paths",
    "base_model_name_or_path": "a path or hub id",
    "base_revision": "a branch, tag or commit",
    "base_config": "the base's config",
}
# Fields that follow from the base and the experts.
FILLED_IN = frozenset(_KINDS)

# What transformers itself puts into a config beside the declared fields.
_TRANSFORMERS_FIELDS = {
    "_attn_implementation", "_commit_hash", "_name_or_path", "attn_implementation", "auto_map",
    "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions",
    "quantization_config", "torch_dtype", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class HeadInput:
    """One way in which the head sees the hidden states of a sequence.

    `half_life` is in tokens: None reads the token's own state (the paper), infinity the causal running mean,
    anything between an exponentially decaying mean.
    """

    half_life: float | None = None

    @property
    def pooled(self) -> bool:
        return self.half_life is not None

    @property
    def decay(self) -> float:
        """Weight of the sum so far when one more token arrives; 1 for the running mean."""
        assert self.half_life is not None
        return math.pow(2.0, -1.0 / self.half_life)


def parse_head_input(value: str | Sequence[str]) -> tuple[HeadInput, ...]:
    """`"token"`, `"running_mean"`, `"ema"`, `"ema:8"` (half-life in tokens), or a list of those, concatenated.

    Raises:
        ConfigError: on any other word, an empty list, a repeated entry or a half-life that is not positive.
    """
    if not isinstance(value, (str, list, tuple)):
        raise ConfigError(f"head_input must be a word or a list of words, found {value!r}")
    words = [value] if isinstance(value, str) else list(value)
    inputs = tuple(_parse_one_head_input(word) for word in words)
    if not inputs or len(set(inputs)) != len(inputs):
        raise ConfigError(f"head_input must name one or more different inputs, found {value!r}")
    return inputs


def _parse_one_head_input(word: object) -> HeadInput:
    if word == "token":
        return HeadInput()
    if word == "running_mean":
        return HeadInput(math.inf)
    kind, colon, half_life = str(word).partition(":")
    try:
        tokens = float(half_life) if colon else DEFAULT_HALF_LIFE
    except ValueError:
        tokens = math.nan
    if kind != "ema" or not 0 < tokens < math.inf:
        raise ConfigError(
            "head_input must be 'token', 'running_mean', 'ema' or 'ema:<half-life in tokens>' (or a list of them), "
            f"found {word!r}"
        )
    return HeadInput(tokens)


class XLoraConfig(PreTrainedConfig):
    """Settings of an X-LoRA model. Fields without a note mean what they mean in PEFT's `XLoraConfig`.

    Args:
        base_config: transformers config of the frozen base model.
        base_model_name_or_path, base_revision: where the base comes from; a local path is kept relative.
        experts: names in the order of the scalings' last axis.
        sites: names of the adapted modules in the order of the scalings' third axis, which is the order in which
            the base registers its modules (as in PEFT and the original xlora).
        layerwise_scalings: the head gives each site its own scalings; otherwise all sites share one set per token.
        xlora_depth, xlora_size: number of Linears in the head and their width between.
        xlora_dropout_p: dropout between the head's Linears, in training.
        enable_relu_and_dropout, use_bias: as in the original xlora; PEFT has both always on.
        enable_softmax, softmax_temperature: softmax over the experts of logits / temperature.
        top_k_lora: keep the k largest weights of each token and site; the others become 0, without renormalising.
        enable_softmax_topk: another softmax over the kept ones, per token and site. Needs `top_k_lora`.
            (PEFT drops a kept weight that is exactly 0; here the selection goes by index.)
        scaling_pass_value: scalings of every expert in the scaling pass. 0 is the plain base; None means 1/N.
        global_scaling_weight: a factor on every expert's output.
        use_trainable_adapters: experts are parameters that training changes, not frozen buffers.
        null_expert: (ours) one more softmax column that adds nothing, so that "use the base" is a choice.
        head_input: (ours) what the head reads, see `parse_head_input`. Other than "token", the hidden state is
            standardised per channel with statistics kept in the head.
        gate_at_layer: (ours) m makes one pass of two: layers below m run without experts, the head reads the hidden
            state that enters layer m, experts act from layer m on.

    Raises:
        ConfigError: unknown field, value out of range, or fields that contradict each other.
    """

    model_type = "xlora"
    # what transformers' Trainer does not collect row by row
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "scalings", "aux_loss"]
    sub_configs_defaults: ClassVar = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True)
    }

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    experts: list[str] | None = None
    sites: list[str] | None = None

    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    enable_softmax: bool = True
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    enable_softmax_topk: bool = False
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0
    use_trainable_adapters: bool = False

    null_expert: bool = False
    head_input: str | list[str] = "token"
    gate_at_layer: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - _TRANSFORMERS_FIELDS)
        if unknown:
            raise ConfigError("; ".join(_unknown_field(name) for name in unknown))
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise ConfigError(f"{name}: expected {_WORDS[name]}, found {getattr(self, name)!r}")
        self.experts = list(self.experts or [])
        self.sites = list(self.sites or [])
        if isinstance(self.base_config, PreTrainedConfig):
            # transformers writes its attention setting into nested configs: not into the base model's own.
            kwargs.setdefault("attn_implementation", self.base_config._attn_implementation)
            self.base_config = copy.deepcopy(self.base_config)
        super().__post_init__(**kwargs)
        self._check_ranges()
        self._check_contradictions()
        if self.experts:
            check_expert_names(self.experts)

    # --- what follows from the fields ---

    @property
    def head_inputs(self) -> tuple[HeadInput, ...]:
        return parse_head_input(self.head_input)

    @property
    def pools(self) -> tuple[HeadInput, ...]:
        """The inputs that carry a state from token to token; each has one layer in the cache."""
        return tuple(i for i in self.head_inputs if i.pooled)

    @property
    def num_stacks(self) -> int:
        return 1 if self.gate_at_layer is not None else 2

    @property
    def base_text_config(self) -> PreTrainedConfig:
        if not isinstance(self.base_config, PreTrainedConfig):
            raise ConfigError("base_config is not set: make the model with from_experts")
        return self.base_config.get_text_config(decoder=True)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's text config with as many layers as the cache has: every stack, then one layer per pool.

        transformers asks this when it builds a cache, so every cache that `generate` makes has the right layers.
        """
        if not isinstance(self.base_config, PreTrainedConfig):
            return self
        text = copy.deepcopy(self.base_text_config)
        types = layer_types(text) * self.num_stacks + ["full_attention"] * len(self.pools)
        text.num_hidden_layers = len(types)
        text.layer_types = types
        return text

    # --- checks ---

    def _check_ranges(self) -> None:
        for name in (
            "layerwise_scalings", "enable_relu_and_dropout", "use_bias", "enable_softmax", "enable_softmax_topk",
            "use_trainable_adapters", "null_expert",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}")
        self._check_number("xlora_depth", low=1, whole=True)
        self._check_number("xlora_size", low=1, whole=True)
        self._check_number("xlora_dropout_p", low=0.0, high=1.0)
        self._check_number("softmax_temperature", low=1e-6)
        self._check_number("global_scaling_weight")
        self._check_number("scaling_pass_value", optional=True)
        self._check_number("top_k_lora", low=1, whole=True, optional=True)
        self._check_number("gate_at_layer", low=0, whole=True, optional=True)
        parse_head_input(self.head_input)

    def _check_number(
        self, name: str, *, low: float = -math.inf, high: float = math.inf, whole: bool = False, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise ConfigError(f"{name} must be {'a whole' if whole else 'a finite'} number, found {value!r}")
        if not low <= value <= high:
            wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name} must be {wanted}, found {value!r}")

    def _check_contradictions(self) -> None:
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ConfigError("enable_softmax_topk needs top_k_lora: there are no top-k weights to normalise")
        if self.null_expert and not (self.enable_softmax or self.enable_softmax_topk):
            raise ConfigError("null_expert needs a softmax to be a column of: set enable_softmax=True")
        columns = len(self.experts or []) + int(self.null_expert)
        if self.experts and self.top_k_lora is not None and self.top_k_lora > columns:
            raise ConfigError(f"top_k_lora={self.top_k_lora} is more than the {columns} experts there are to keep")
        if self.gate_at_layer is not None:
            if self.scaling_pass_value != 0:
                raise ConfigError(
                    f"gate_at_layer={self.gate_at_layer} has no scaling pass, so scaling_pass_value must stay 0, "
                    f"found {self.scaling_pass_value!r}"
                )
            if isinstance(self.base_config, PreTrainedConfig):
                depth = self.base_text_config.num_hidden_layers
                if self.gate_at_layer >= depth:
                    raise ConfigError(f"gate_at_layer={self.gate_at_layer}: the base has layers 0 to {depth - 1}")


def check_expert_names(experts: Sequence[str]) -> None:
    """Names become folder names and column labels: plain, and each once."""
    if not experts:
        raise NoExpertsError("a mixture needs at least one expert, found none")
    for name in experts:
        if not isinstance(name, str) or not _EXPERT_NAME.fullmatch(name):
            raise ConfigError(f"expert name {name!r}: use letters, digits, '_', '-' and '.' (it becomes a folder name)")
    repeated = sorted({name for name in experts if list(experts).count(name) > 1})
    if repeated:
        raise DuplicateExpertError(f"expert names must differ, found more than once: {names(repeated)}")


def check_field_names(fields: Sequence[str]) -> None:
    """Raises ConfigError for a keyword that is no setting of `XLoraConfig`, naming the nearest."""
    filled_in = [name for name in fields if name in FILLED_IN]
    if filled_in:
        raise ConfigError(f"{names(filled_in)}: follows from the base and the experts; leave it out")
    unknown = [name for name in fields if name not in own_fields()]
    if unknown:
        raise ConfigError("; ".join(_unknown_field(name) for name in unknown))


def layer_types(text_config: PreTrainedConfig) -> list[str]:
    """What each layer of a decoder keeps in a cache.

    Raises:
        UnsupportedArchitectureError: a layer keeps something that two stacks cannot share a cache for.
    """
    count = text_config.num_hidden_layers
    types: list[str] | None = getattr(text_config, "layer_types", None)
    if types is None:
        sliding = getattr(text_config, "sliding_window", None) is not None
        chunked = getattr(text_config, "attention_chunk_size", None) is not None
        types = ["sliding_attention" if sliding else "chunked_attention" if chunked else "full_attention"] * count
    odd = sorted(set(types) - set(CACHEABLE_LAYER_TYPES))
    shared = any(getattr(text_config, field, None) for field in ("num_kv_shared_layers", "kv_sharing_modes"))
    if odd or shared:
        raise UnsupportedArchitectureError(
            f"{text_config.model_type}: xloom keeps keys and values of {names(CACHEABLE_LAYER_TYPES)} layers, "
            f"found {names(odd) if odd else 'layers that share their keys and values'}"
        )
    return list(types)


def own_fields() -> set[str]:
    """Names of the fields that are X-LoRA's and not of every transformers config."""
    return set(XLoraConfig.__annotations__)


def _unknown_field(name: str) -> str:
    return f"unknown field {name!r}{near(name, sorted(own_fields()))}"

"""What xloom must know of a base model: loading it, its layers, and whether two stacks work on it.

The one place that looks into the structure of transformers' models.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from xloom.config import XLoraConfig, layer_types
from xloom.errors import (
    BaseMismatchError,
    ConfigError,
    NoMatchingSiteError,
    NotFoundError,
    UnsupportedArchitectureError,
    XLoomError,
    names,
)
from xloom.experts import Expert
from xloom.hub.base_model import resolve_base
from xloom.modules import keep_as_stored
from xloom.site import Site
from xloom.wrapping import GateLayer, decoder_layers

Kind = Literal["causal", "classification"]  # what a base puts on top of its decoder

# Options of from_experts and from_pretrained that go to the loading of the base.
BASE_OPTIONS = frozenset({
    "attn_implementation", "cache_dir", "device_map", "dtype", "local_files_only", "low_cpu_mem_usage", "max_memory",
    "offload_folder", "quantization_config", "revision", "token", "trust_remote_code",
})  # fmt: skip

# Architectures whose cached, batched and speculative decoding the tests hold against the uncached model. Any other is
# tried on a few tokens when the model is made.
VERIFIED = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "falcon",
    "olmo2", "granite", "starcoder2", "cohere", "stablelm", "bloom", "mixtral", "qwen3_moe",
})  # fmt: skip
_POSITIONS_FROM_MASKS = {"bloom"}  # of these


class _Made(Protocol):
    """The part of an X-LoRA model that `check` uses."""

    base: PreTrainedModel

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...

    @property
    def sites(self) -> tuple[str, ...]: ...


def load_base(
    base: str | Path | PreTrainedModel, options: Mapping[str, Any], kind: Kind = "causal"
) -> tuple[PreTrainedModel, str | None]:
    """The base model, and where it came from: an absolute path, a hub id, the name of the built-in base, or None.

    With kind "classification" and a base given by name, `score` is fresh where the base has none of that shape.

    Raises:
        NotFoundError: no such folder or repository.
        UnsupportedArchitectureError: not a decoder-only model of that kind whose layers keep keys and values.
    """
    if isinstance(base, PreTrainedModel):
        if options:
            raise ConfigError(f"{names(sorted(options))}: of no use with a base that is loaded already")
        model, where = base, base.config._name_or_path or None
    else:
        where = str(base)
        with naming_base(where):
            model = _from_disk(where, options, kind)
    check_base(model, kind)
    keep_as_stored(model)
    if where is not None and Path(where).is_dir():
        where = str(Path(where).resolve())
    return model, where


def _from_disk(where: str, options: Mapping[str, Any], kind: Kind) -> PreTrainedModel:
    if kind == "causal":
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve_base(where), **options)
        return model
    # The score head may be missing there or have another shape, which transformers allows for all weights or for none.
    model, found = AutoModelForSequenceClassification.from_pretrained(
        resolve_base(where), ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    lost = sorted(key for key, *_ in found["mismatched_keys"] if not key.startswith("score."))
    lost += sorted(key for key in found["missing_keys"] if not key.startswith("score."))
    if lost:
        raise UnsupportedArchitectureError(
            f"base model {where}: weights are missing or of another shape: {names(lost)}"
        )
    return model


def meta_base(base: str | Path) -> Any:
    """The base without its weights, on the meta device: what fits it can be seen before anything heavy is loaded.

    Raises:
        NotFoundError, UnsupportedArchitectureError: as `load_base`.
    """
    with naming_base(str(base)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_base(str(base))))


@contextmanager
def naming_base(where: str) -> Iterator[None]:
    """What transformers says when a base cannot be loaded, in one line that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not Path(where).is_dir():
            raise NotFoundError(f"base model {where}: no such folder, and no hub repository within reach") from None
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(f"base model {where}: cannot be loaded: {reason}") from None


def check_base(model: nn.Module, kind: Kind = "causal") -> None:
    """Raises UnsupportedArchitectureError unless two stacks can be made of the model."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not _is_a(kind, model):
        wanted = {
            "causal": "causal language model of transformers",
            "classification": "model of transformers for sequence classification, with a linear `score`",
        }[kind]
        raise UnsupportedArchitectureError(f"{name}: expected a decoder-only {wanted}")
    if model.base_model is model or (kind == "causal" and model.get_output_embeddings() is None):
        raise UnsupportedArchitectureError(f"{name}: has no decoder apart from its head")
    if any(isinstance(module, (Site, GateLayer)) for module in model.modules()):
        raise UnsupportedArchitectureError(f"{name}: carries a mixture of experts already; unload() it first")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise UnsupportedArchitectureError(f"{name}: carries PEFT adapters; pass the plain base and name the adapters")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise UnsupportedArchitectureError(f"{name}: a model with other inputs beside text; load its text model alone")
    if model.device.type != "meta" and any(p.device.type == "meta" for p in model.parameters()):
        raise UnsupportedArchitectureError(f"{name}: parts are offloaded; use a device_map that keeps all on devices")
    layer_types(model.config)


def _is_a(kind: Kind, model: PreTrainedModel) -> bool:
    return bool(model.can_generate()) if kind == "causal" else isinstance(getattr(model, "score", None), nn.Linear)


def hidden_size(model: PreTrainedModel, *, gated: bool) -> int:
    """Size of the hidden state that the head reads: what leaves the decoder, or with an early gate enters a layer."""
    text = model.config.get_text_config(decoder=True)
    # OPT-350m's decoder projects its last state down to the embedding size.
    leaving = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    return int(text.hidden_size if gated else leaving)


def fit_experts(
    model: PreTrainedModel, experts: Mapping[str, Expert], gate_at_layer: int | None, drop: bool
) -> dict[str, Expert]:
    """The experts with module paths as the base has them, and with `gate_at_layer` none below it.

    Raises:
        BaseMismatchError, NoMatchingSiteError: an expert belongs to another base.
        ConfigError: an expert adapts something below the gate and `drop` is False.
    """
    present = {name for name, _ in model.named_modules()}
    fitted = {n: e.match_modules(present, model.base_model_prefix) for n, e in experts.items()}
    if gate_at_layer is None:
        return fitted
    path, _ = decoder_layers(model)
    for label, expert in fitted.items():
        below = [m for m in expert.modules if _is_below(m, path, gate_at_layer, model)]
        if below and not drop:
            raise ConfigError(
                f"expert {label!r} adapts {len(below)} modules below gate_at_layer={gate_at_layer} "
                f"({names(below, 2)}), where its scalings are not known yet; "
                "train it with layers_to_transform from there on, or pass drop_sites_below_gate=True"
            )
        kept = {m: low for m, low in expert.modules.items() if m not in below}
        if not kept:
            raise NoMatchingSiteError(f"expert {label!r} adapts nothing from gate_at_layer={gate_at_layer} on")
        fitted[label] = replace(expert, modules=kept)
    return fitted


def check_same_base(config: XLoraConfig, model: PreTrainedModel) -> None:
    """Raises BaseMismatchError if the base differs from the one that the checkpoint was made with."""
    if not isinstance(config.base_config, PreTrainedConfig):
        return
    was, now = config.base_text_config, model.config.get_text_config(decoder=True)
    for field in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if getattr(was, field, None) != getattr(now, field, None):
            raise BaseMismatchError(
                f"base model {model.config._name_or_path or type(model).__name__}: the checkpoint was made for {field} "
                f"{getattr(was, field, None)!r}, this base has {getattr(now, field, None)!r}"
            )


def _is_below(module: str, layers: str, gate: int, model: PreTrainedModel) -> bool:
    if module.startswith(f"{layers}."):
        return int(module.removeprefix(f"{layers}.").split(".")[0]) < gate
    return model.get_submodule(module) is not model.get_output_embeddings()


def takes_own_masks(base: PreTrainedModel) -> bool:
    """Whether a decoder goes by the masks [1, 1, T, past + T] and positions it is given, and by nothing else."""
    text = base.config.get_text_config(decoder=True)
    plain = text._attn_implementation in {"sdpa", "eager"}
    return plain and text.model_type in VERIFIED - _POSITIONS_FROM_MASKS


def attention_windows(base: PreTrainedModel) -> dict[str, int | None]:
    """Tokens that the attention of each kind of layer reaches back, itself included; None for all."""
    text = base.config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds: list[str] | None = getattr(text, "layer_types", None)
    if kinds is None:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def check(made: _Made, tokens: int = 8) -> None:
    """Tries an architecture that the tests do not cover: cached in pieces against uncached at once.

    Raises:
        UnsupportedArchitectureError: with the difference found, or with what failed.
    """
    base = made.base
    text = base.config.get_text_config(decoder=True)
    if text.model_type in VERIFIED or base.device.type == "meta":
        return
    ids = torch.arange(tokens, device=base.device).unsqueeze(0) % text.vocab_size
    try:
        with torch.no_grad():
            whole = made(ids, use_cache=False).logits
            first = made(ids[:, : tokens - 3], use_cache=True)
            rest = made(ids[:, tokens - 3 :], past_key_values=first.past_key_values, use_cache=True)
    except XLoomError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(f"{text.model_type}: the two passes fail: {reason}") from error
    # a model for classification answers once per row, at the last token
    pieces = rest.logits if whole.ndim == 2 else torch.cat([first.logits, rest.logits], dim=1)
    difference = (whole - pieces).float().abs().max().item()
    allowed = 1e-3 * max(1.0, whole.float().abs().max().item()) * (1 if whole.dtype.itemsize >= 4 else 50)
    if not difference <= allowed:
        raise UnsupportedArchitectureError(
            f"{text.model_type}: cached and uncached logits differ by {difference:.3g} (allowed {allowed:.3g}): this "
            "model keeps something from token to token that is not in its cache"
        )

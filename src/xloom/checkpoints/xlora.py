"""The original xlora package's folder.

    xlora_config.json              settings; `adapters` is the list of names
    xlora_classifier.safetensors   inner.<i>.weight|bias, last.weight|bias
    <name>/                        a PEFT LoRA folder each

`i` is the index in a ModuleList: a Linear every 3 places with ReLU and dropout, every place without.
"""

from pathlib import Path
from typing import Any

from xloom.checkpoints.saved import Saved, kinds, our_fields_in_use, refuse, scaling_pass_number, write_expert
from xloom.config import XLoraConfig
from xloom.errors import ConfigError, NotFoundError, PickleError, TruncatedFileError, names
from xloom.experts import CONFIG_FILE, Expert
from xloom.hub.files import naming, read_json, read_tensors, write_json, write_tensors

CONFIG, HEAD = "xlora_config.json", "xlora_classifier.safetensors"
FIELDS = (
    "enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth", "xlora_size",
    "enable_relu_and_dropout", "use_bias", "xlora_dropout_p", "use_trainable_adapters", "softmax_temperature",
    "top_k_lora", "scaling_pass_value", "global_scaling_weight",
)  # fmt: skip


def read(folder: Path) -> Saved:
    raw = read_json(folder / CONFIG)
    adapters = raw.get("adapters")
    if not adapters or "base_model_id" not in raw:
        raise TruncatedFileError(f"{folder / CONFIG}: expected `adapters` and `base_model_id`")
    with naming(folder / CONFIG):
        if unknown := sorted(set(raw) - {*FIELDS, "adapters", "base_model_id", "hidden_size", "device"}):
            raise ConfigError(f"unknown field {names(map(repr, unknown))}")
        if not isinstance(adapters, (list, dict)):
            raise ConfigError(f"adapters: expected a list of names, found {adapters!r}")
        # Released checkpoints carry the mapping name -> path of training time; the names are what counts.
        labels = list(adapters)
        fields = {key: raw[key] for key in FIELDS if key in raw}
        config = XLoraConfig(experts=labels, base_model_name_or_path=raw["base_model_id"], **fields)
    experts = {name: _expert(folder, name) for name in config.experts or []}
    if not (folder / HEAD).is_file() and (folder / "xlora_classifier.pt").is_file():
        raise PickleError(
            f"{folder}: the head is a pickle (xlora_classifier.pt), which can run code; save it as {HEAD}"
        )
    keys = keys_of(config)
    ours = {theirs: mine for mine, theirs in keys.items()}
    head = {ours.get(key, key): value for key, value in read_tensors(folder / HEAD).items()}
    return Saved(config, head, experts, where=str(folder / HEAD), head_names=keys)


def write(saved: Saved, folder: Path, *, final: Path) -> None:
    reasons = our_fields_in_use(saved.config)
    # xlora ignores DoRA's magnitudes, multiplies token ids by scalings, and adds a LoRA bias without them.
    reasons += sorted(kinds(saved) & {"DoRA experts", "Embedding experts", "lora_bias"})
    reasons += [f"an expert called {name!r}" for name in saved.experts if name in (CONFIG, HEAD)]
    if saved.config.enable_softmax_topk:
        reasons.append("enable_softmax_topk=True (xlora normalises over the whole batch)")
    refuse("xlora", reasons)
    write_json(folder / CONFIG, config_dict(saved))
    write_tensors(folder / HEAD, head_tensors(saved))
    for name, expert in saved.experts.items():
        write_expert(expert, folder / name)


def config_dict(saved: Saved) -> dict[str, Any]:
    """xlora_config.json, as xlora and mistral.rs read it."""
    config = saved.config
    return {
        "hidden_size": saved.head["layers.0.weight"].shape[1],
        "base_model_id": config.base_model_name_or_path or "",
        "adapters": list(saved.experts),
        **{key: getattr(config, key) for key in FIELDS},
        "scaling_pass_value": scaling_pass_number(saved),
    }


def head_tensors(saved: Saved) -> dict[str, Any]:
    return {theirs: saved.head[mine] for mine, theirs in keys_of(saved.config).items()}


def keys_of(config: XLoraConfig) -> dict[str, str]:
    """Our name of every head tensor -> xlora's."""
    step = 3 if config.enable_relu_and_dropout else 1
    parts = ("weight", "bias") if config.use_bias else ("weight",)
    *inner, last = range(config.xlora_depth)
    keys = {f"layers.{i}.{part}": f"inner.{i * step}.{part}" for i in inner for part in parts}
    return keys | {f"layers.{last}.{part}": f"last.{part}" for part in parts}


def _expert(folder: Path, name: str) -> Expert:
    # An adapter that PEFT calls "default" lands in the folder itself.
    inside = folder / name
    if name == "default" and not inside.is_dir() and (folder / CONFIG_FILE).is_file():
        inside = folder
    if not inside.is_dir():
        raise NotFoundError(f"{folder / CONFIG}: expert {name!r} has no folder {inside}")
    return Expert.from_pretrained(inside)

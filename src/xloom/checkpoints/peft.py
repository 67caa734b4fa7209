"""PEFT's X-LoRA folder.

    adapter_config.json        peft_type XLORA; `adapters`: name -> path
    adapter_model.safetensors  base_model.internal_xlora_classifier.layers.<i>.weight|bias

`i` is the index in a Sequential: a Linear every 3 places with dropout (Linear, ReLU, Dropout), every 2 without.
peft >= 0.20 drops `layers.<i>` from the file when an expert is called `<i>`, which PEFT's experts always are; such a
file is refused with the names of what it lacks. Folders `0/`, `1/`, ... that PEFT writes beside hold parts of the base
and incomplete experts, and are never read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xloom.checkpoints.saved import Saved, kinds, our_fields_in_use, refuse, scaling_pass_number, write_expert
from xloom.config import XLoraConfig
from xloom.errors import ConfigError, NotFoundError, PickleError, TruncatedFileError
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE, Expert
from xloom.hub.files import naming, read_json, read_tensors, write_json, write_tensors

PREFIX = "base_model.internal_xlora_classifier.layers."
FIELDS = (
    "enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth", "xlora_size", "xlora_dropout_p",
    "use_trainable_adapters", "softmax_temperature", "top_k_lora", "scaling_pass_value", "global_scaling_weight",
)  # fmt: skip


def read(folder: Path, moved: Mapping[str, str | Path]) -> Saved:
    """Args: moved: where experts are now, by their names in the file."""
    raw = read_json(folder / CONFIG_FILE)
    adapters = raw.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        raise TruncatedFileError(f"{folder / CONFIG_FILE}: names no adapters")
    if unknown := set(moved) - set(adapters):
        raise NotFoundError(f"experts {sorted(unknown)}: {folder / CONFIG_FILE} names {sorted(adapters)}")
    if all(name.isdigit() for name in adapters):
        # PEFT sorts the file's keys as text: "0", "1", "10", "2"; columns are in the order of the numbers.
        adapters = dict(sorted(adapters.items(), key=lambda item: int(item[0])))
    with naming(folder / CONFIG_FILE):
        note = raw.get("xloom", {})
        labels = note.get("experts", list(adapters)) if isinstance(note, dict) else None
        if not isinstance(labels, list) or len(labels) != len(adapters):
            raise ConfigError(f"xloom: expected the names of {len(adapters)} experts, found {note!r}")
        config = XLoraConfig(
            experts=labels,
            base_model_name_or_path=raw.get("base_model_name_or_path"),
            base_revision=raw.get("revision"),
            **{key: raw[key] for key in FIELDS if key in raw},
        )
    experts = {
        label: _expert(folder, name, moved.get(name, path))
        for label, (name, path) in zip(labels, adapters.items(), strict=True)
    }
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise PickleError(
            f"{folder}: the head is a pickle (adapter_model.bin), which can run code; save it as safetensors"
        )
    keys = _keys(config)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    ours = {theirs: mine for mine, theirs in keys.items()}
    head = {ours.get(key, key): value for key, value in tensors.items() if key.startswith(PREFIX)}
    hint = (
        f"Written by peft {raw.get('peft_version', 'of unknown version')}: peft >= 0.20 loses the head's layers "
        "that are numbered like an expert when it saves; save again with peft 0.19.1, or from memory with xloom."
    )
    return Saved(config, head, experts, where=str(folder / WEIGHTS_FILE), head_names=keys, missing_hint=hint)


def write(saved: Saved, folder: Path, *, final: Path) -> None:
    config = saved.config
    reasons = our_fields_in_use(config)
    if not config.use_bias:
        reasons.append("use_bias=False")
    if config.xlora_depth > 1 and not config.enable_relu_and_dropout:
        reasons.append("enable_relu_and_dropout=False")
    # PEFT's X-LoRA raises on DoRA, and adds a LoRA bias without the scaling.
    reasons += sorted(kinds(saved) & {"DoRA experts", "lora_bias"})
    refuse("peft", reasons)
    raw: dict[str, Any] = {
        "peft_type": "XLORA", "auto_mapping": None, "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": config.base_model_name_or_path, "revision": config.base_revision,
        "hidden_size": saved.head["layers.0.weight"].shape[1],
        "adapters": {str(i): f"./experts/{name}" for i, name in enumerate(saved.experts)},
        "xloom": {"experts": list(saved.experts)},
    }  # fmt: skip
    raw |= {key: getattr(config, key) for key in FIELDS}
    raw["scaling_pass_value"] = scaling_pass_number(saved)
    write_json(folder / CONFIG_FILE, raw)
    write_tensors(folder / WEIGHTS_FILE, {theirs: saved.head[mine] for mine, theirs in _keys(config).items()})
    for name, expert in saved.experts.items():
        write_expert(expert, folder / "experts" / name)


def _keys(config: XLoraConfig) -> dict[str, str]:
    """Our name of every head tensor -> PEFT's."""
    step = 3 if config.xlora_dropout_p > 0 else 2
    parts = [(i, part) for i in range(config.xlora_depth) for part in ("weight", "bias")]
    return {f"layers.{i}.{part}": f"{PREFIX}{i * step}.{part}" for i, part in parts}


def _expert(folder: Path, name: str, path: str | Path) -> Expert:
    inside = folder / str(path)
    try:
        return Expert.from_pretrained(inside if inside.is_dir() else path)
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder / CONFIG_FILE}: expert {name!r} is said to be at {str(path)!r}: {error}; PEFT keeps the path of "
            f"training time, so pass experts={{{name!r}: 'where it is now'}}"
        ) from None

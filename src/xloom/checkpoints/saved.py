"""The one form that every codec reads into and writes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from xloom.config import XLoraConfig
from xloom.errors import NotExportableError, names
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE, Expert
from xloom.hub.files import write_json, write_tensors

# Names in config.json of the classes that there are checkpoints of.
CAUSAL, CLASSIFICATION = "XLoraForCausalLM", "XLoraForSequenceClassification"


@dataclass
class Saved:
    """A checkpoint in memory.

    Args:
        head: tensors by the names of `ScalingHead.state_dict`.
        base_folder: the base, where the checkpoint carries it.
        where: the file that the head came from, for messages.
        head_names: what the file calls those tensors, for messages.
        missing_hint: why tensors may be missing from such a file.
        model_class: CAUSAL or CLASSIFICATION.
        score: the score head of a model for classification, by the names of its `state_dict`.
        expert_folders: (xloom) where each expert's own folder is, for a checkpoint that is to name it and not to hold
            a copy.
    """

    config: XLoraConfig
    head: dict[str, Tensor]
    experts: dict[str, Expert]
    base_folder: Path | None = None
    where: str = ""
    head_names: Mapping[str, str] = field(default_factory=dict)
    missing_hint: str = ""
    model_class: str = CAUSAL
    score: dict[str, Tensor] = field(default_factory=dict)
    expert_folders: Mapping[str, Path] | None = None


def write_expert(expert: Expert, folder: Path) -> None:
    """An ordinary PEFT LoRA folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, dict(expert.config))
    write_tensors(folder / WEIGHTS_FILE, expert.tensors())


def refuse(format: str, reasons: list[str]) -> None:
    """Raises NotExportableError if there are reasons."""
    if reasons:
        raise NotExportableError(f"format {format!r} cannot hold this model: {names(reasons, 10)}")


def our_fields_in_use(config: XLoraConfig) -> list[str]:
    """Settings that no other implementation knows."""
    found = []
    if config.null_expert:
        found.append("null_expert")
    if config.head_input not in ("token", ["token"]):
        found.append(f"head_input={config.head_input!r}")
    if config.gate_at_layer is not None:
        found.append(f"gate_at_layer={config.gate_at_layer}")
    return found


def kinds(saved: Saved) -> set[str]:
    """What kinds of experts there are beside plain LoRA on linear modules."""
    lows = [(module, low) for expert in saved.experts.values() for module, low in expert.modules.items()]
    found = {
        "DoRA experts": any(low.magnitude_O is not None for _, low in lows),
        "Embedding experts": any(low.is_embedding for _, low in lows),
        "lora_bias": any(low.bias_O is not None for _, low in lows),
        "experts on lm_head": any("lm_head" in module for module, _ in lows),
    }
    return {kind for kind, there in found.items() if there}


def scaling_pass_number(saved: Saved) -> float:
    """`scaling_pass_value` as a number; None means 1/N."""
    value = saved.config.scaling_pass_value
    return 1.0 / len(saved.experts) if value is None else value

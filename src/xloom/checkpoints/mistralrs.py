"""The flat folder and ordering file that mistral.rs 0.6.0 loads an X-LoRA model from. Written, not read.

    xlora_config.json  xlora_classifier.safetensors     as in the xlora format
    <name>.safetensors  <name>.json                     one pair per expert; names are told apart by substring
    ordering.json                                        expert order, and site -> index

mistral.rs reads rank and alpha once per expert and wants the same target modules in all: rsLoRA and alpha patterns are
rewritten into B, and a site that an expert lacks is filled with zeros.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from xloom.checkpoints import xlora
from xloom.checkpoints.saved import Saved, our_fields_in_use, refuse
from xloom.experts import PREFIX, Expert, LowRank
from xloom.files import write_json, write_tensors

ORDERING = "ordering.json"


def write(saved: Saved, folder: Path, *, final: Path) -> None:
    config = saved.config
    reasons = our_fields_in_use(config)
    modules = {module: low for e in saved.experts.values() for module, low in e.modules.items()}
    if any(low.is_embedding for low in modules.values()):
        reasons.append("Embedding experts")
    if any("lm_head" in module for module in modules):
        reasons.append("experts on lm_head")
    if any(low.magnitude_O is not None for e in saved.experts.values() for low in e.modules.values()):
        reasons.append("DoRA experts")
    if any(low.bias_O is not None for e in saved.experts.values() for low in e.modules.values()):
        reasons.append("lora_bias")
    if config.enable_softmax_topk:
        reasons.append("enable_softmax_topk=True")
    if config.xlora_depth > 1 and config.xlora_size != config.base_text_config.hidden_size:
        reasons.append(f"xlora_depth={config.xlora_depth} unless xlora_size is the hidden size")
    if config.xlora_depth > 2 and config.enable_relu_and_dropout:
        reasons.append(f"xlora_depth={config.xlora_depth} with enable_relu_and_dropout")
    if any(_rank(e) is None for e in saved.experts.values()):
        reasons.append("an expert with different ranks at different sites")
    refuse("mistralrs", reasons)

    labels = _labels(list(saved.experts))
    settings = xlora.config_dict(saved) | {"adapters": labels, "xlora_dropout_p": 0.0}
    write_json(folder / xlora.CONFIG, settings)
    write_tensors(folder / xlora.HEAD, xlora.head_tensors(saved))
    targets = sorted({module.rpartition(".")[2] for module in modules})
    for label, expert in zip(labels, saved.experts.values(), strict=True):
        rank = _rank(expert) or 1
        write_tensors(folder / f"{label}.safetensors", _tensors(expert, modules, rank))
        # alpha = r: the scale is in B already
        write_json(
            folder / f"{label}.json",
            {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": targets},
        )
    ordering = {
        "base_model_id": settings["base_model_id"],
        "order": labels,
        "layers": {site: index for index, site in enumerate(config.sites or [])},
    }
    write_json(folder / ORDERING, ordering)


def _labels(experts: list[str]) -> list[str]:
    """Names of which none is part of another: files are found by substring."""
    width = len(str(len(experts)))
    plain = [re.sub(r"[^A-Za-z0-9]+", "_", name) for name in experts]
    clash = any(a != b and a in b for a in plain for b in plain) or len(set(plain)) != len(plain)
    clash = clash or any(p in f for p in plain for f in ("xlora_config.json", "xlora_classifier.safetensors", ORDERING))
    return [f"expert{i + 1:0{width}d}_{name}" for i, name in enumerate(plain)] if clash else plain


def _rank(expert: Expert) -> int | None:
    ranks = {low.rank for low in expert.modules.values()}
    return ranks.pop() if len(ranks) == 1 else None


def _tensors(expert: Expert, modules: dict[str, LowRank], rank: int) -> dict[str, Tensor]:
    out = {}
    for module, example in modules.items():
        low = expert.modules.get(module)
        if low is None:
            out[f"{PREFIX}{module}.lora_A.weight"] = torch.zeros(rank, example.A_RI.shape[1], dtype=example.A_RI.dtype)
            out[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(example.B_OR.shape[0], rank, dtype=example.B_OR.dtype)
        else:
            out[f"{PREFIX}{module}.lora_A.weight"] = low.A_RI
            out[f"{PREFIX}{module}.lora_B.weight"] = low.B_OR * low.scale
    return out

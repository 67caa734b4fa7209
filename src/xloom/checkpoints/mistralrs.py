"""The flat folder and ordering file that mistral.rs 0.6.0 loads an X-LoRA model from. Written, not read.

    xlora_config.json  xlora_classifier.safetensors     as in the xlora format, Linears numbered 0, 1, ...
    <label>.safetensors  <label>.json                    one pair per expert; files are told apart by substring
    ordering.json                                        expert order, and site -> index

mistral.rs wants every expert to adapt every module of the same names, with one rank and one alpha each: what an expert
lacks is filled with zeros, and the scale (rsLoRA, alpha patterns) goes into B. See docs/mistralrs.md.
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from xloom.checkpoints import xlora
from xloom.checkpoints.saved import Saved, kinds, our_fields_in_use, refuse
from xloom.experts import PREFIX, Expert, LowRank
from xloom.hub.files import write_json, write_tensors

ORDERING = "ordering.json"


def write(saved: Saved, folder: Path, *, final: Path) -> None:
    refuse("mistralrs", _reasons(saved))
    shapes = _every_site(saved)
    labels = _labels(list(saved.experts))
    # mistral.rs applies dropout at inference too
    settings = xlora.config_dict(saved) | {"adapters": labels, "xlora_dropout_p": 0.0}
    settings["xlora_size"] = settings["hidden_size"]
    write_json(folder / xlora.CONFIG, settings)
    write_tensors(folder / xlora.HEAD, _head(saved, len(shapes)))
    targets = sorted({site.rpartition(".")[2] for site in shapes})
    for label, expert in zip(labels, saved.experts.values(), strict=True):
        rank = max(low.rank for low in expert.modules.values())
        write_tensors(folder / f"{label}.safetensors", _tensors(expert, shapes, rank))
        write_json(
            folder / f"{label}.json",
            {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": targets},
        )
    ordering = {
        "base_model_id": settings["base_model_id"],
        "order": labels,
        "layers": {site: index for index, site in enumerate(shapes)},
    }
    write_json(folder / ORDERING, ordering)


def _reasons(saved: Saved) -> list[str]:
    config = saved.config
    hidden = saved.head["layers.0.weight"].shape[1]
    checks = {
        "a base without a name or path (mistral.rs compares it)": not config.base_model_name_or_path,
        "enable_softmax_topk=True": config.enable_softmax_topk,
        f"xlora_size={config.xlora_size} above the hidden size {hidden}": config.xlora_depth > 1
        and config.xlora_size > hidden,
    }
    return our_fields_in_use(config) + sorted(kinds(saved)) + [reason for reason, applies in checks.items() if applies]


def _every_site(saved: Saved) -> dict[str, LowRank]:
    """Our sites in their order, then the modules of the same names in other layers, each with an example's shapes."""
    lows = {site: low for expert in saved.experts.values() for site, low in expert.modules.items()}
    sites = {site: lows[site] for site in saved.config.sites or []}
    for site, low in list(sites.items()):
        for layer in range(saved.config.base_text_config.num_hidden_layers):
            sites.setdefault(re.sub(r"\.\d+\.", f".{layer}.", site, count=1), low)
    return sites


def _head(saved: Saved, sites: int) -> dict[str, Tensor]:
    """The head with its inner width padded to the hidden size, and rows of zeros for sites that nobody adapts."""
    config, head = saved.config, dict(saved.head)
    hidden = head["layers.0.weight"].shape[1]
    *inner, last = range(config.xlora_depth)
    out = {}
    for i in [*inner, last]:
        name = "last" if i == last else f"inner.{i}"
        weight, bias = head[f"layers.{i}.weight"], head.get(f"layers.{i}.bias")
        wanted = hidden
        if i == last:
            wanted = sites * len(saved.experts) if config.layerwise_scalings else weight.shape[0]
        out[f"{name}.weight"] = F.pad(weight, (0, hidden - weight.shape[1], 0, wanted - weight.shape[0]))
        if bias is not None:
            out[f"{name}.bias"] = F.pad(bias, (0, wanted - bias.shape[0]))
    return out


def _labels(experts: list[str]) -> list[str]:
    """Names of which none is part of another file's name."""
    width = len(str(len(experts)))
    plain = [re.sub(r"[^A-Za-z0-9]+", "_", name) for name in experts]
    taken = (xlora.CONFIG, xlora.HEAD, ORDERING)
    clash = len(set(plain)) != len(plain) or any(a in b for a in plain for b in [*plain, *taken] if a is not b)
    return [f"expert_{i + 1:0{width}d}" for i in range(len(plain))] if clash else plain


def _tensors(expert: Expert, shapes: dict[str, LowRank], rank: int) -> dict[str, Tensor]:
    out = {}
    for site, example in shapes.items():
        low = expert.modules.get(site)
        dtype = example.A_RI.dtype
        A = torch.zeros(0, example.A_RI.shape[1], dtype=dtype) if low is None else low.A_RI
        B = torch.zeros(example.B_OR.shape[0], 0, dtype=dtype) if low is None else low.B_OR * low.scale
        out[f"{PREFIX}{site}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - A.shape[0]))
        out[f"{PREFIX}{site}.lora_B.weight"] = F.pad(B, (0, rank - B.shape[1]))
    return out

"""`inspect`: what experts are made of, where they act, and what does not fit. No weights of the base are loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xloom import checkpoints
from xloom.cli.common import quiet, write_result
from xloom.errors import ForeignCheckpointError, XLoomError, names
from xloom.experts import Expert
from xloom.hub.base_model import resolve_base
from xloom.mixture import Mixture


def inspect_paths(paths: Sequence[str], *, base: str | None, list_sites: bool, json_path: Path | None) -> int:
    """Prints the tables; returns the exit code: 2 if there is a problem."""
    quiet()
    console = Console()
    problems: list[str] = []
    saved = _read_model(paths)
    experts: dict[str, Expert] = {}
    if saved is not None:
        experts = saved.experts
        base = base or _base_of(saved, problems)
    else:
        for path in paths:
            try:
                experts[_label(path, experts)] = Expert.from_pretrained(path)
            except XLoomError as error:
                problems.append(str(error))
    skeleton = _skeleton(base, problems) if base else None
    if skeleton is not None:
        experts = _fit(skeleton, experts, problems)
    rows = [expert_row(name, expert) for name, expert in experts.items()]
    if rows:
        console.print(_expert_table(rows))
    if saved is not None:
        console.print(_settings_line(saved))
    sites = site_rows(experts)
    if list_sites:
        console.print(_site_table(sites, list(experts)))
    for problem in problems:
        console.print(f"problem: {problem}", style="red", soft_wrap=True, markup=False)
    write_result(json_path, {"what": "inspect", "rows": rows, "sites": sites, "problems": problems})
    return 2 if problems else 0


def expert_row(name: str, expert: Expert) -> dict[str, Any]:
    """One flat row about an expert."""
    ranks = Counter(low.rank for low in expert.modules.values())
    kinds = Counter(module.rpartition(".")[2] for module in expert.modules)
    tensors = expert.tensors().values()
    flags = [
        word
        for word, there in (
            ("DoRA", expert.config.get("use_dora")),
            ("rsLoRA", expert.config.get("use_rslora")),
            ("lora_bias", expert.config.get("lora_bias")),
        )
        if there
    ]
    return {
        "expert": name,
        "sites": len(expert.modules),
        "modules": ", ".join(f"{kind} x{count}" for kind, count in kinds.items()),
        "ranks": ", ".join(str(rank) for rank in sorted(ranks)),
        "scale": ", ".join(sorted({f"{low.scale:g}" for low in expert.modules.values()})),
        "parameters": sum(t.numel() for t in tensors),
        "megabytes": round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 3),
        "kind": " ".join(["LoRA", *flags]) if "DoRA" not in flags else " ".join(flags),
        "base": expert.config.get("base_model_name_or_path"),
    }


def site_rows(experts: Mapping[str, Expert]) -> list[dict[str, Any]]:
    """One row per site with each expert's rank there (0: adds nothing)."""
    sites = dict.fromkeys(site for expert in experts.values() for site in expert.modules)
    return [
        {"site": site, **{n: e.modules[site].rank if site in e.modules else 0 for n, e in experts.items()}}
        for site in sites
    ]


def _read_model(paths: Sequence[str]) -> checkpoints.Saved | None:
    if len(paths) != 1:
        return None
    try:
        return checkpoints.read(paths[0])
    except ForeignCheckpointError:
        return None


def _base_of(saved: checkpoints.Saved, problems: list[str]) -> str | None:
    try:
        return checkpoints.locate_base(saved)
    except XLoomError as error:
        problems.append(str(error))
        return None


def _skeleton(base: str, problems: list[str]) -> PreTrainedModel | None:
    """The base's modules without their weights."""
    try:
        config = AutoConfig.from_pretrained(resolve_base(base))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model
    except (OSError, ValueError):
        problems.append(f"base model {base}: no such folder, and no hub repository within reach")
        return None


def _fit(skeleton: PreTrainedModel, experts: dict[str, Expert], problems: list[str]) -> dict[str, Expert]:
    present = {name for name, _ in skeleton.named_modules()}
    fitting = {}
    for name, expert in experts.items():
        try:
            found = expert.match_modules(present, skeleton.base_model_prefix)
            plain = {m: low for m, low in found.modules.items() if low.magnitude_O is None}
            if plain:  # DoRA reads the base's weights, which are not here
                Mixture(skeleton, {name: Expert(expert.source, expert.config, plain)}).remove()
            fitting[name] = found
        except XLoomError as error:
            problems.append(str(error))
            fitting[name] = expert
    return fitting


def _label(path: str, taken: Mapping[str, Any]) -> str:
    name = Path(path).name
    return name if name not in taken else path


def _expert_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("expert", "kind", "sites", "modules", "ranks", "scale", "parameters", "megabytes", "base")
    for column in columns:
        table.add_column(column, justify="right" if column in {"sites", "parameters", "megabytes"} else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c] or "-") for c in columns))
    return table


def _site_table(sites: list[dict[str, Any]], experts: list[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("site")
    for name in experts:
        table.add_column(name, justify="right")
    for row in sites:
        table.add_row(row["site"], *(str(row[name] or "-") for name in experts))
    return table


def _settings_line(saved: checkpoints.Saved) -> str:
    config = saved.config
    parts = [
        f"head: depth {config.xlora_depth}",
        "per site" if config.layerwise_scalings else "same for all sites",
        f"{sum(t.numel() for t in saved.head.values()):,} parameters",
        f"reads {config.head_input if isinstance(config.head_input, str) else names(config.head_input)}",
    ]
    if config.top_k_lora:
        parts.append(f"top-{config.top_k_lora}")
    if config.null_expert:
        parts.append("null expert")
    if config.gate_at_layer is not None:
        parts.append(f"early gate at layer {config.gate_at_layer}")
    return ", ".join(parts) + f"; base: {config.base_model_name_or_path or 'in the folder'}"

"""Our own format: a folder that holds everything but the base, and the base too if asked.

config.json                XLoraConfig, with the base's config, expert and site names
head.safetensors           ScalingHead.state_dict
score.safetensors          for classification: the state_dict of the base's score head
experts/<name>/            a PEFT LoRA folder each
experts.json               instead of experts/: where they are, as ways from this folder
base/                      optional: the base as transformers saves it
"""

import os
from pathlib import Path

from xloom.checkpoints.saved import CAUSAL, CLASSIFICATION, Saved, write_expert
from xloom.config import XLoraConfig
from xloom.errors import CheckpointError, NotFoundError, TruncatedFileError
from xloom.experts import Expert
from xloom.hub.files import naming, read_json, read_tensors, write_json, write_tensors

CONFIG, HEAD, SCORE, EXPERTS, BASE = "config.json", "head.safetensors", "score.safetensors", "experts", "base"
EXPERT_FOLDERS = "experts.json"


def read(folder: Path) -> Saved:
    raw = read_json(folder / CONFIG)
    if not raw.get("experts"):
        raise TruncatedFileError(f"{folder / CONFIG}: names no experts")
    elsewhere = _read_ways(folder / EXPERT_FOLDERS) if (folder / EXPERT_FOLDERS).is_file() else {}
    with naming(folder / CONFIG):
        config = XLoraConfig(**raw)
    experts = {name: _read_expert(name, folder, elsewhere) for name in config.experts or []}
    model_class = (raw.get("architectures") or [CAUSAL])[0]
    if model_class not in (CAUSAL, CLASSIFICATION):
        raise CheckpointError(
            f"{folder / CONFIG}: expected architectures {CAUSAL} or {CLASSIFICATION}, found {model_class!r}"
        )
    base = folder / BASE
    where = config.base_model_name_or_path
    if where and where.startswith("."):
        config.base_model_name_or_path = str((folder / where).resolve())
    return Saved(
        config,
        read_tensors(folder / HEAD),
        experts,
        base_folder=base if base.is_dir() else None,
        where=str(folder / HEAD),
        model_class=model_class,
        score=read_tensors(folder / SCORE) if model_class == CLASSIFICATION else {},
    )


def write(saved: Saved, folder: Path, *, final: Path) -> None:
    config = saved.config.to_dict()
    config["architectures"] = [saved.model_class]
    config["base_model_name_or_path"] = relative_base(saved.config.base_model_name_or_path, final)
    config.pop("_name_or_path", None)
    if isinstance(config.get("base_config"), dict):
        config["base_config"].pop("_name_or_path", None)
    write_json(folder / CONFIG, config)
    write_tensors(folder / HEAD, saved.head)
    if saved.score:
        write_tensors(folder / SCORE, saved.score)
    if saved.expert_folders is not None:
        write_json(folder / EXPERT_FOLDERS, {name: way(path, final) for name, path in saved.expert_folders.items()})
        return
    for name, expert in saved.experts.items():
        write_expert(expert, folder / EXPERTS / name)


def relative_base(base: str | None, final: Path) -> str | None:
    """A local base by its way from the checkpoint, so that both can move together; a hub id as it is."""
    return way(base, final) if base is not None and os.path.isabs(base) else base


def way(place: str | Path, final: Path) -> str:
    """How to get to a place from a checkpoint's folder, starting with a dot."""
    found = os.path.relpath(place, Path(final).resolve())
    return found if found.startswith(".") else f"./{found}"


def _read_ways(path: Path) -> dict[str, str]:
    ways = read_json(path)
    if odd := [name for name, way in ways.items() if not isinstance(way, str) or not way]:
        raise CheckpointError(
            f"{path}: expected the way to a LoRA folder for expert {odd[0]!r}, found {ways[odd[0]]!r}"
        )
    return ways


def _read_expert(name: str, folder: Path, elsewhere: dict[str, str]) -> Expert:
    if name not in elsewhere:
        return Expert.from_pretrained(folder / EXPERTS / name)
    place = (folder / elsewhere[name]).resolve()
    if not place.is_dir():
        raise NotFoundError(
            f"{folder / EXPERT_FOLDERS}: expected the LoRA folder of expert {name!r} at {place}, found nothing"
        )
    return Expert.from_pretrained(place)

"""Checkpoints: one in-memory form, `Saved`, and a codec for each format on disk.

    xloom      config.json  head.safetensors  [score.safetensors]  experts/<name>/  [base/]     read and written
    peft       adapter_config.json (peft_type XLORA)  adapter_model.safetensors read and written
    xlora      xlora_config.json  xlora_classifier.safetensors  <name>/         read and written
    mistralrs  a flat folder and an ordering file for mistral.rs 0.6.0          written

Knows nothing of running models. Names of head tensors inside `Saved` are those of `ScalingHead.state_dict`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from xloom.checkpoints import mistralrs, native, peft, xlora
from xloom.checkpoints.saved import CAUSAL, CLASSIFICATION, Saved, refuse
from xloom.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    ForeignCheckpointError,
    MissingTensorsError,
    names,
)
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE
from xloom.hub.files import fetch_folder, new_folder, read_json

__all__ = [
    "CAUSAL", "CLASSIFICATION", "Format", "Saved", "check_class", "check_sites", "checked_head", "checked_score",
    "locate_base", "read", "write",
]  # fmt: skip

# Top-level names of all formats: what an older checkpoint left in a folder must not be taken for part of the new one.
_MARKERS = (
    native.CONFIG, native.HEAD, native.SCORE, native.EXPERTS, native.EXPERT_FOLDERS, native.BASE, CONFIG_FILE,
    WEIGHTS_FILE, xlora.CONFIG, xlora.HEAD, mistralrs.ORDERING,
)  # fmt: skip

Format = Literal["xloom", "peft", "xlora", "mistralrs"]


def read(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    experts: Mapping[str, str | Path] | None = None,
) -> Saved:
    """Reads a checkpoint of any format; the files in the folder tell which.

    Args:
        experts: (peft) where experts are, by the names that the checkpoint gives them.

    Raises:
        ForeignCheckpointError: none of the formats.
        NotFoundError, TruncatedFileError, MissingTensorsError, ConfigError, ExpertError: what is wrong, and where.
    """
    folder = fetch_folder(source, revision=revision, subfolder=subfolder)
    is_peft = (folder / CONFIG_FILE).is_file() and read_json(folder / CONFIG_FILE).get("peft_type") == "XLORA"
    if experts and not is_peft:
        raise ConfigError(f"{folder}: experts=... says where a PEFT X-LoRA checkpoint's experts are; this is none")
    if (folder / mistralrs.ORDERING).is_file():
        raise ForeignCheckpointError(f"{folder}: an export for mistral.rs, which is written but not read")
    if (folder / xlora.CONFIG).is_file():
        return xlora.read(folder)
    if (folder / native.CONFIG).is_file() and read_json(folder / native.CONFIG).get("model_type") == "xlora":
        return native.read(folder)
    if is_peft:
        return peft.read(folder, experts or {})
    if (folder / CONFIG_FILE).is_file():
        kind = read_json(folder / CONFIG_FILE).get("peft_type")
        raise ForeignCheckpointError(
            f"{folder}: a PEFT adapter of type {kind!r}; one adapter is an expert, not a mixture: see from_experts"
        )
    raise ForeignCheckpointError(
        f"{folder}: expected a checkpoint of xloom (config.json), PEFT X-LoRA ({CONFIG_FILE}) or xlora "
        f"({xlora.CONFIG}), found {names(sorted(p.name for p in folder.iterdir())) or 'an empty folder'}"
    )


def write(
    saved: Saved,
    folder: Path,
    format: Format,
    base: Any = None,
) -> None:
    """Writes a checkpoint; the folder appears whole or not at all.

    Args:
        base: the plain base model, to be put into the folder as well.

    Raises:
        NotExportableError: the format has no words for something in it.
    """
    if format not in get_args(Format):
        raise ConfigError(f"unknown format {format!r}; expected one of {names(get_args(Format))}")
    with new_folder(folder, replaces=_MARKERS) as staged:
        if format == "xloom":
            native.write(saved, staged, final=folder)
            if base is not None:
                base.save_pretrained(staged / native.BASE)
        else:
            refuse(format, [f"an {saved.model_class} (its score head)"] if saved.score else [])
            {"peft": peft, "xlora": xlora, "mistralrs": mistralrs}[format].write(saved, staged, final=folder)


def locate_base(saved: Saved) -> str:
    """Folder or hub id of the base that a checkpoint names or carries.

    Raises:
        CheckpointError: it names none.
    """
    if saved.base_folder is not None:
        return str(saved.base_folder)
    if saved.config.base_model_name_or_path:
        return saved.config.base_model_name_or_path
    raise CheckpointError("the checkpoint does not say which base model it belongs to; pass base=...")


def check_sites(saved: Saved, sites: Sequence[str]) -> None:
    """Raises BaseMismatchError unless the sites are those, in the order, that the head was trained with."""
    expected = saved.config.sites or []
    if expected and list(expected) != list(sites):
        changed = [name for name in expected if name not in sites] or [name for name in sites if name not in expected]
        raise BaseMismatchError(
            f"the head was trained for {len(expected)} sites, this base and these experts have {len(sites)}"
            + (f"; they differ in {names(changed, 3)}" if changed else " in another order")
        )


def check_class(saved: Saved, wanted: str) -> None:
    """Raises CheckpointError if the checkpoint belongs to another of our classes."""
    if saved.model_class != wanted:
        raise CheckpointError(
            f"{saved.where}: a checkpoint of {saved.model_class}, which is not {wanted}: load it with "
            f"{saved.model_class}.from_pretrained"
        )


def checked_head(saved: Saved, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved head, if its tensors are those that the config calls for.

    Raises:
        MissingTensorsError: some are not there; they are named, and why where it is known.
        CheckpointError: some are of another shape or not finite, or there are more.
    """
    where, shown = f"{saved.where}: the head", saved.head_names
    if missing := [shown.get(key, key) for key in expected if key not in saved.head]:
        hint = f" {saved.missing_hint}" if saved.missing_hint else ""
        raise MissingTensorsError(f"{where} lacks {names(missing)}.{hint}")
    _check_tensors(saved.head, expected, where, shown)
    return saved.head


def checked_score(saved: Saved, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved score head, likewise."""
    where = f"{Path(saved.where).with_name(native.SCORE)}: the score head"
    if missing := [key for key in expected if key not in saved.score]:
        raise MissingTensorsError(f"{where} lacks {names(missing)}.")
    _check_tensors(saved.score, expected, where, {})
    return saved.score


def _check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, shown: Mapping[str, str]
) -> None:
    if extra := [key for key in found if key not in expected]:
        raise CheckpointError(f"{where} has tensors that the config does not call for: {names(extra)}")
    for key, tensor in found.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{where}: tensor {shown.get(key, key)} holds NaN or infinity")
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{where}: tensor {shown.get(key, key)} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )

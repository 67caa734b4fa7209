"""`convert`: one checkpoint format into another."""

from pathlib import Path
from typing import Any, cast, get_args

from xloom.checkpoints import Format
from xloom.cli.common import load_tokenizer, quiet
from xloom.errors import ConfigError, PromptError, names
from xloom.files import new_folder
from xloom.model import XLoraForCausalLM


def convert_checkpoint(source: str, target: Path, format: str, *, base: str | None, include_base: bool) -> str:
    """Reads, writes, and says what was written."""
    if format not in get_args(Format):
        raise ConfigError(f"unknown format {format!r}; expected one of {names(get_args(Format))}")
    quiet()
    model = XLoraForCausalLM.from_pretrained(source, base=base)
    model.save_pretrained(target, format=cast(Format, format), include_base=include_base)
    if format == "xloom":
        _copy_tokenizer(source, model, target)
    return f"{len(model.experts)} experts at {len(model.sites)} sites written to {target} ({format})"


def _copy_tokenizer(source: str, model: XLoraForCausalLM, target: Path) -> None:
    try:
        tokenizer: Any = load_tokenizer(source, model.config.base_model_name_or_path)
    except PromptError:
        return
    with new_folder(target) as staged:
        tokenizer.save_pretrained(staged)

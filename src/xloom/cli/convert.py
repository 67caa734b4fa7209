"""`convert`: one checkpoint format into another, or a mixture into one static LoRA."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from xloom.checkpoints import Format
from xloom.cli.common import load, load_tokenizer, quiet
from xloom.collapse import RECORD, collapse, split, write_collapsed
from xloom.errors import ConfigError, PromptError, names
from xloom.hub.files import new_folder
from xloom.merging import check_output
from xloom.model import XLoraForCausalLM
from xloom.training.data import read_examples
from xloom.training.rows import Source, find_source


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


def collapse_checkpoint(
    source: str, target: Path, *, base: str | None, data: Sequence[str], rows: int, rank: int | None
) -> str:
    """Writes the mean of the head's scalings as one static LoRA, and says what it costs on rows that are held."""
    if not data:
        raise ConfigError("--collapse takes the mean over rows: name them with --data rows.jsonl")
    check_output(target, RECORD)
    sources: dict[str | None, list[Source | Path]] = {place: [find_source(place)] for place in data}
    model, tokenizer = load(source, base, Console(stderr=True))
    window = getattr(model.config.base_text_config, "max_position_embeddings", None) or sys.maxsize
    found = read_examples(sources, tokenizer, window)
    by_source = [[item for item in found.items if item.domain == place] for place in sources]
    result = collapse(model, *split(by_source, rows), rank=rank)
    write_collapsed(result, target, source=source, data=data)
    return f"static LoRA written to {target}: {result}"


def _copy_tokenizer(source: str, model: XLoraForCausalLM, target: Path) -> None:
    try:
        tokenizer: Any = load_tokenizer(source, model.config.base_model_name_or_path)
    except PromptError:
        return
    with new_folder(target) as staged:
        tokenizer.save_pretrained(staged)

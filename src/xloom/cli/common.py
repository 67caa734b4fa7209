"""What several commands share: loading a model quietly, its tokenizer, and router words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from xloom.errors import ConfigError, PromptError, XLoomError
from xloom.hub.base_model import resolve_base
from xloom.model import XLoraForCausalLM
from xloom.routers import Router
from xloom.routers.words import read_router

PALETTE = ("dodger_blue1", "orange1", "green3", "magenta", "gold1", "cyan1", "red1", "medium_purple", "chartreuse3")
BASE_COLOUR = "grey62"


def quiet() -> None:
    """No notes and bars of transformers between ours."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(
    path: str, base: str | None, console: Console, *, dtype: str | None = None, device: str = "cpu"
) -> tuple[XLoraForCausalLM, Any]:
    """A model and its tokenizer, from the model's folder or from its base.

    Raises:
        ConfigError: the device cannot be used.
        XLoomError: one of its children says what is wrong with the folder.
    """
    quiet()
    options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with console.status(escape(f"loading {path}")):
        model = XLoraForCausalLM.from_pretrained(path, base=base, **options)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"--device {device}: cannot be used: {reason}") from None
        return model, load_tokenizer(path, model.config.base_model_name_or_path)


def load_tokenizer(*places: str | None) -> Any:
    """The first tokenizer found.

    Raises:
        PromptError: there is none in any of the places.
    """
    from transformers import AutoTokenizer

    tried = [resolve_base(place) for place in places if place]
    for place in tried:
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")):
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
    places_tried = " or ".join(tried) or "the model folder"
    raise PromptError(f"found no tokenizer in {places_tried}; save one into the model folder")


def encode(tokenizer: Any, prompt: str | Sequence[dict[str, str]], model: XLoraForCausalLM, raw: bool) -> Any:
    """Token ids [1, T] of a prompt, or of a conversation through the chat template.

    Raises:
        PromptError: empty, longer than the model's window, or a tokenizer without a chat template.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise PromptError("the prompt is empty")
    if raw:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        if not tokenizer.chat_template:
            raise PromptError("this model's tokenizer has no chat template; pass --raw to use the prompt as it is")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
    window = getattr(model.config.base_text_config, "max_position_embeddings", None)
    if window is not None and ids.shape[1] >= window:
        raise PromptError(f"the prompt has {ids.shape[1]} tokens, the model's window is {window}")
    return ids.to(model.device)


def parse_router(word: str, experts: Sequence[str]) -> Router:
    """A router of a model with these experts, from its word (`routers.words`): `single:a`, `arrow:top2`, ...

    Raises:
        ConfigError: another word. UnknownExpertError: a name that the model does not have.
    """
    asked = read_router(word)
    asked.check(experts)
    return asked.make()


def pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    """`name=value` words.

    Raises:
        ConfigError: another form, or a name twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {word}: expected name=path")
        if name in found:
            raise ConfigError(f"{option} {name}: given more than once")
        found[name] = value
    return found


def write_result(path: Path | None, value: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise XLoomError(f"{path}: cannot be written: {error.strerror}") from None

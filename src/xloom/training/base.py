"""How a recipe's frozen base and its tokenizer are loaded, quietly."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from xloom.architecture import naming_base
from xloom.errors import MissingExtraError, NotFoundError
from xloom.hub.base_model import resolve_base
from xloom.training.recipe import Recipe

_SAMPLE = 2**20  # bytes


def base_options(recipe: Recipe) -> dict[str, Any]:
    """Options of `from_pretrained` for the base: its dtype, and how it is quantised.

    Raises:
        MissingExtraError: quantisation is asked for, and bitsandbytes is not installed.
    """
    dtype = getattr(torch, recipe.dtype)
    if recipe.quantisation is None:
        return {"dtype": dtype}
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"{recipe.where}: quantisation needs bitsandbytes, found none; install it with: pip install "
            "'xloom[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    if recipe.quantisation == "8bit":
        return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"dtype": dtype, "quantization_config": four}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        NotFoundError: the base has none within reach.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_base(source))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise NotFoundError(
            f"base model {source}: no such folder or hub repository, or it has no tokenizer ({reason})"
        ) from None


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: what is padded is masked and has no labels."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def base_identity(recipe: Recipe) -> str:
    """Tells whether the base is still the same: a hash of a local one, the commit of one on the hub.

    Of large files, whose every part training changes, a megabyte at sixteen places is read.
    """
    where = resolve_base(recipe.base_source)
    folder = Path(where)
    if not folder.is_dir():
        with naming_base(recipe.base):
            return str(getattr(AutoConfig.from_pretrained(where), "_commit_hash", None) or where)
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".gguf"):
            continue
        size = path.stat().st_size
        found.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLE, size // 16)):
                file.seek(start)
                found.update(file.read(_SAMPLE))
    return found.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing and shows no bars of its own inside the block."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""How a recipe's frozen base is loaded."""

from importlib.util import find_spec
from typing import Any

import torch

from xloom.errors import MissingExtraError
from xloom.training.recipe import Recipe


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

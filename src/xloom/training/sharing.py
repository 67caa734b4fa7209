"""A beginning that all rows of a batch have in common (a system message, say) is computed once, not once per row.

    plain    [ pad | beginning | rest ]      every row whole
    shared   [ beginning ]                   one row, whose keys and values are then repeated
                     [ pad | rest ]          every row, on top of them

Exact, as attention looks back only: logits and gradients are those of whole rows. Knows nothing of what is trained.
Letters: B batch  T tokens  P tokens in common
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from xloom.training.data import Example

_WORTH = 8  # tokens in common from which a second forward pays


def common_beginning(examples: Sequence[Example]) -> int:
    """Tokens P that all rows start with, before the last token of every prompt; 0 if too few to be worth it."""
    if len(examples) < 2:
        return 0
    rows = [e.input_ids[: e.completion_start - 1] for e in examples]
    low, high = min(rows), max(rows)  # what the two extremes share, all between them share
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return size if size >= _WORTH else 0


def can_share(config: PreTrainedConfig) -> bool:
    """Whether every layer keeps keys and values of all tokens: padding would shift a sliding window."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def shared_outputs(
    forward: Callable[[slice, dict[str, Any]], Any], batch: dict[str, Any], config: PreTrainedConfig
) -> Any:
    """The output of `forward` for the rest of every row.

    Args:
        forward: runs the model; is given which tokens of the left-padded rows these are, and the model's inputs.
        batch: of `collate`, with `shared` P above 0.
        config: of the model, which tells what its cache looks like.
    """
    ids_BT, mask_BT, size = batch["input_ids"], batch["attention_mask"], batch["shared"]
    rows, tokens = ids_BT.shape
    longest = ids_BT[longest_row(mask_BT)]
    cache = DynamicCache(config=config)
    forward(slice(0, size), {"input_ids": longest[None, :size], "past_key_values": cache, "logits_to_keep": 1})
    cache.batch_repeat_interleave(rows)
    # The rest of a row stands at the end, as far from the start of its columns as the whole row was.
    rest_mask = mask_BT[:, : tokens - size]
    inputs = {
        "input_ids": ids_BT[:, size:],
        "attention_mask": torch.cat([rest_mask.new_ones(rows, size), rest_mask], dim=1),
        "position_ids": (size + rest_mask.cumsum(dim=1) - 1).clamp(min=0),
        "past_key_values": cache,
        "logits_to_keep": batch["keep"],
    }
    return forward(slice(size, tokens), inputs)


def longest_row(mask_BT: Tensor) -> int:
    """A row without padding."""
    return int(mask_BT[:, 0].argmax())

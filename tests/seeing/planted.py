"""A tiny model with a head that decides, and a router whose shares are known."""

import torch
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from tiny import make_experts, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM
from xloom.routers import SiteRouter
from xloom.seeing.sites import places
from xloom.site import Site


def tiny_model(folder, **fields) -> XLoraForCausalLM:
    """Three experts on a Llama whose window is long enough for conversations."""
    base = tiny_base("llama", max_position_embeddings=512)
    fields = {"layerwise_scalings": True, "head_input": ["token", "ema:4"], **fields}
    model = XLoraForCausalLM.from_experts(base, make_experts(base, folder), **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.3)
    return model


def letters() -> PreTrainedTokenizerBase:
    """The toy tokenizer, whose text has no blanks between its tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


class Planted(SiteRouter):
    """Known weights by place and layer, kept from forward to forward; `plan` gives [N] for a place and a layer."""

    def __init__(self, plan) -> None:
        self.plan = plan
        self.seen: dict[int, int] = {}

    def scalings(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        start = self.seen.get(site.index, 0)
        self.seen[site.index] = start + x.shape[1]
        layer = places([site.name])[0].layer
        return torch.tensor([[self.plan(start + t, layer) for t in range(x.shape[1])]], dtype=x.dtype)

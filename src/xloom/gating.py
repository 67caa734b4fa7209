"""From hidden states to scalings: pooling, the head, and the gate. Mathematics only.

    hidden_BTD --standardise, pool--> features_BTF --head--> logits_BTSC --gate--> scalings_BTSN

Knows nothing of models, caches or files: states come in and go out as tensors.
Letters: B batch  T tokens  D hidden size  F features of the head  S sites  N experts  C columns (N, or N+1 with the
null expert)
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xloom.config import HeadInput, XLoraConfig
from xloom.errors import ConfigError

_CHUNK = 128  # tokens whose decay weights are formed at once; bounds memory at B * chunk^2


class PoolState(NamedTuple):
    """A decaying sum of hidden states at every token, and how many tokens it counts: its mean is sum / count."""

    sums_BTD: Tensor
    counts_BT1: Tensor

    @property
    def mean_BTD(self) -> Tensor:
        """Positions before the first real token have no mean yet and give zeros."""
        return self.sums_BTD / self.counts_BT1.clamp(min=torch.finfo(self.counts_BT1.dtype).tiny)


def pool_reference(hidden_BTD: Tensor, keep_BT: Tensor, decay: float) -> PoolState:
    """One token at a time: `sum = decay * sum + hidden`, `count = decay * count + 1`; padding changes nothing."""
    sums, counts = torch.zeros_like(hidden_BTD[:, 0]), torch.zeros_like(hidden_BTD[:, 0, :1])
    states = []
    for t in range(hidden_BTD.shape[1]):
        keep = keep_BT[:, t, None]
        sums = torch.where(keep, decay * sums + hidden_BTD[:, t], sums)
        counts = torch.where(keep, decay * counts + 1, counts)
        states.append((sums, counts))
    return PoolState(torch.stack([s for s, _ in states], dim=1), torch.stack([c for _, c in states], dim=1))


def pool(hidden_BTD: Tensor, keep_BT: Tensor, decay: float, past: PoolState | None = None) -> PoolState:
    """The same for all tokens at once, going on from `past` (its last position counts).

    Args:
        keep_BT: True where a token is real, False where it is padding.
        decay: weight of the sum so far when a token arrives, 0 < decay <= 1.
    """
    ones_BT1 = torch.ones_like(hidden_BTD[..., :1])
    # filled, not multiplied: some models leave NaN at padding
    summed = torch.cat([hidden_BTD, ones_BT1], dim=-1).masked_fill(~keep_BT[..., None], 0.0)
    carry = torch.zeros_like(summed[:, :1])
    if past is not None:
        carry = torch.cat([past.sums_BTD, past.counts_BT1], dim=-1)[:, -1:].to(summed)
    chunks = []
    for chunk, keep in zip(torch.split(summed, _CHUNK, dim=1), torch.split(keep_BT, _CHUNK, dim=1), strict=True):
        if decay == 1.0:
            state = chunk.cumsum(dim=1) + carry
        else:
            age = keep.cumsum(dim=1).to(summed.dtype)
            gap_BTT = (age[:, :, None] - age[:, None, :]).clamp(min=0)
            weight_BTT = torch.tril(decay**gap_BTT)
            state = weight_BTT @ chunk + (decay ** age[..., None]) * carry
        chunks.append(state)
        carry = state[:, -1:]
    whole = torch.cat(chunks, dim=1)
    return PoolState(whole[..., :-1], whole[..., -1:])


class ScalingHead(nn.Module):
    """The MLP that predicts the logits of every expert, per token and per site, from hidden states.

    Layer stack, activations and the layer-major order of the outputs are those of PEFT's and xlora's classifier.

    Args:
        config: settings; `config.experts` and `config.sites` give the sizes.
        hidden_size: D.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: XLoraConfig, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inputs: tuple[HeadInput, ...] = config.head_inputs
        self.num_sites = len(config.sites or [])
        self.num_columns = len(config.experts or []) + int(config.null_expert)
        self.layerwise = config.layerwise_scalings
        outputs = self.num_columns * (self.num_sites if self.layerwise else 1)
        widths = [hidden_size * len(self.inputs), *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=config.use_bias, dtype=dtype) for i, o in pairwise(widths))
        self.between = (
            nn.Sequential(nn.ReLU(), nn.Dropout(config.xlora_dropout_p))
            if config.enable_relu_and_dropout
            else nn.Identity()
        )
        self.standardises = any(i.pooled for i in self.inputs)
        if self.standardises:
            self.register_buffer("input_mean", torch.zeros(hidden_size, dtype=dtype))
            self.register_buffer("input_std", torch.ones(hidden_size, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.linears[0].weight.dtype

    @property
    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def pool_like(self) -> Tensor | None:
        """Something [D] of the dtype and device of pooled states; None without pooled inputs."""
        return self.input_mean if self.standardises else None

    def zero_init_(self) -> None:
        """Starts from equal logits for every expert: the last Linear becomes 0."""
        with torch.no_grad():
            for parameter in self.linears[-1].parameters():
                parameter.zero_()

    def set_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Fixes the standardisation of the hidden state, per channel.

        Raises:
            ConfigError: the head reads plain token states, which the paper does not standardise.
        """
        if not self.standardises:
            raise ConfigError("head_input='token' reads the hidden state as it is: there is nothing to standardise")
        self.input_mean.copy_(mean_D)
        self.input_std.copy_(std_D.clamp(min=1e-6))

    def features(
        self, hidden_BTD: Tensor, keep_BT: Tensor, past: list[PoolState | None]
    ) -> tuple[Tensor, list[PoolState]]:
        """What the MLP reads, and the new state of each pooled input in the order of `config.pools`."""
        hidden_BTD = hidden_BTD.to(self.dtype)
        if self.standardises:
            hidden_BTD = (hidden_BTD - self.input_mean) / self.input_std
        parts, states = [], []
        waiting = iter(past)
        for head_input in self.inputs:
            if head_input.pooled:
                state = pool(hidden_BTD, keep_BT, head_input.decay, next(waiting))
                states.append(state)
                parts.append(state.mean_BTD)
            else:
                parts.append(hidden_BTD)
        return torch.cat(parts, dim=-1), states

    def before_last(self, features_BTF: Tensor) -> Tensor:
        """What the last Linear reads."""
        x: Tensor = features_BTF.to(self.dtype)
        for layer in self.linears[:-1]:
            x = self.between(layer(x))
        return x

    def forward(self, features_BTF: Tensor) -> Tensor:
        """Logits [B, T, S, C]; without layerwise scalings every site sees the same ones."""
        logits: Tensor = self.linears[-1](self.before_last(features_BTF))
        if self.layerwise:
            return logits.reshape(*logits.shape[:-1], self.num_sites, self.num_columns)
        return logits.unsqueeze(2).expand(-1, -1, self.num_sites, -1)


def gate(
    logits: Tensor,
    config: XLoraConfig,
    *,
    allowed_N: Tensor | None = None,
    bias_N: Tensor | None = None,
    top_k: int | None = None,
    renormalise: bool | None = None,
    temperature: float | None = None,
) -> Tensor:
    """Scalings of the experts from logits [..., C]: softmax, top-k, softmax of the kept, as the config says.

    Args:
        allowed_N: False for experts that must stay out; their share goes to the others.
        bias_N: added to the logits.
        top_k, renormalise, temperature: in place of the config's `top_k_lora`, `enable_softmax_topk` and
            `softmax_temperature`; a `top_k` beyond C keeps all.

    Returns:
        [..., N]: the null expert's column takes part in every step and is dropped at the end.
    """
    top_k = config.top_k_lora if top_k is None else min(top_k, logits.shape[-1])
    renormalise = config.enable_softmax_topk if renormalise is None else renormalise
    num_experts = logits.shape[-1] - config.null_expert
    keep = torch.ones_like(logits, dtype=torch.bool)
    if bias_N is not None:
        logits = torch.cat([logits[..., :num_experts] + bias_N, logits[..., num_experts:]], dim=-1)
    if allowed_N is not None:
        keep[..., :num_experts] &= allowed_N
    weights = logits
    if config.enable_softmax:
        heat = config.softmax_temperature if temperature is None else temperature
        weights = _softmax_of_kept(logits / heat, keep)
    if top_k is not None:
        keep = keep & top_k_mask(weights.masked_fill(~keep, -torch.inf), top_k)
    if renormalise:
        weights = _softmax_of_kept(weights, keep)
    return weights.masked_fill(~keep, 0.0)[..., :num_experts]


def top_k_mask(weights: Tensor, k: int) -> Tensor:
    """True at the k largest of the last axis, by index: ties do not let more than k through."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    return mask.scatter_(-1, weights.topk(k, dim=-1).indices, True)


def scaling_pass_scalings(config: XLoraConfig, like: Tensor) -> Tensor | None:
    """Scalings [N] of every token and site in the scaling pass, or None when they are all 0 (the plain base).

    Like PEFT, a value other than 0 goes through the same top-k and softmax as the head's scalings.
    """
    num_experts = len(config.experts or [])
    value = 1.0 / num_experts if config.scaling_pass_value is None else config.scaling_pass_value
    if value == 0:
        return None
    weights = like.new_full((num_experts,), value)
    keep = torch.ones_like(weights, dtype=torch.bool)
    if config.top_k_lora is not None:
        keep = top_k_mask(weights, min(config.top_k_lora, num_experts))
    if config.enable_softmax_topk:
        weights = _softmax_of_kept(weights, keep)
    return weights.masked_fill(~keep, 0.0)


def _softmax_of_kept(values: Tensor, keep: Tensor) -> Tensor:
    return torch.softmax(values.masked_fill(~keep, -torch.inf), dim=-1)

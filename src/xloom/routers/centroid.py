"""Routing by likeness to a few prompts of each expert, read in the base's hidden states (after LoraRetriever).

    z(prompt) = (mean over its tokens of the base's hidden state - mean) / std        per channel
    c_n       = mean over the prompts of expert n of z
    weights   = softmax over n of cos(z, c_n) / temperature                           one per sequence

LoraRetriever (arXiv 2402.09997) embeds with another model; here the base itself does. The decision is made from the
prompt before generation, and is a `PerRow` then: caches need not know of it.
Letters: B batch  T tokens  D hidden size  N experts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from xloom.errors import ConfigError, names
from xloom.routers.factors import TokenIds, check_softmax, softmax_of_top
from xloom.routers.given import PerRow
from xloom.routers.routing import Fitted, check_known


@dataclass(frozen=True)
class Centroid:
    """Fitted with `fit`; `router` gives the router for a batch of prompts.

    Args:
        experts: names, in the order of N.
        centroids_ND: mean of the standardised prompts of each expert.
        mean_D, std_D: over the tokens of all prompts, every expert counting alike.
        layer: whose hidden state is read, as transformers numbers them: 0 the embeddings, -1 after the final norm.
        temperature: divides the cosines; above 0.
        top_k: experts kept per sequence before the softmax; all, if None.

    Raises:
        ConfigError: temperature or top_k is out of range.
    """

    experts: tuple[str, ...]
    centroids_ND: Tensor
    mean_D: Tensor
    std_D: Tensor
    layer: int = -1
    temperature: float = 0.1
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_softmax(self.temperature, self.top_k)

    @classmethod
    def fit(
        cls,
        model: Fitted,
        prompts: Mapping[str, Sequence[TokenIds]],
        *,
        layer: int = -1,
        temperature: float = 0.1,
        top_k: int | None = None,
    ) -> Self:
        """From token ids [T] of a few prompts for each expert; no answers are needed.

        Raises:
            UnknownExpertError: a name that the model does not have.
            ConfigError: an expert without prompts, a prompt without tokens, or no such layer.
        """
        check_softmax(temperature, top_k)
        check_known(list(prompts), model.experts)
        if lacking := [name for name in model.experts if not len(prompts.get(name, ()))]:
            raise ConfigError(f"prompts: expected some for every expert, found none for {names(lacking)}")
        means, seconds, by_expert = [], [], []  # moments of the tokens, and the prompts' own means, by expert
        for name in model.experts:
            states = [_hidden(model, _row(ids, name, model.device), None, layer)[0].double() for ids in prompts[name]]
            tokens_TD = torch.cat(states)
            means.append(tokens_TD.mean(dim=0))
            seconds.append(tokens_TD.square().mean(dim=0))
            by_expert.append(torch.stack([state.mean(dim=0) for state in states]))
        mean_D = torch.stack(means).mean(dim=0)
        std_D = (torch.stack(seconds).mean(dim=0) - mean_D**2).clamp(min=1e-12).sqrt()
        centroids_ND = torch.stack([((rows_PD - mean_D) / std_D).mean(dim=0) for rows_PD in by_expert])
        return cls(model.experts, centroids_ND, mean_D, std_D, layer, temperature, top_k)

    def weights(self, model: Fitted, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Weights [B, N] of prompts [B, T]; padding, where the mask [B, T] is 0, is left out.

        Raises:
            ConfigError: the model's experts are others than those fitted, or a prompt is padding alone.
        """
        if tuple(model.experts) != self.experts:
            raise ConfigError(f"fitted for the experts {names(self.experts)}, the model has {names(model.experts)}")
        keep_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep_BT1 = keep_BT.bool().unsqueeze(-1)
        if not keep_BT1.any(dim=1).all():
            raise ConfigError("input_ids: expected at least one token in every prompt, found one of padding alone")
        hidden_BTD = _hidden(model, input_ids, attention_mask, self.layer).double().masked_fill(~keep_BT1, 0.0)
        z_BD = (hidden_BTD.sum(dim=1) / keep_BT1.sum(dim=1) - self.mean_D) / self.std_D
        cosine_BN = torch.nn.functional.cosine_similarity(z_BD[:, None], self.centroids_ND, dim=-1)
        return softmax_of_top(cosine_BN, self.temperature, self.top_k)

    def router(self, model: Fitted, input_ids: Tensor, attention_mask: Tensor | None = None) -> PerRow:
        """`model.generate(ids, attention_mask=mask, routing=centroid.router(model, ids, mask))`."""
        return PerRow(self.weights(model, input_ids, attention_mask))


def _row(ids: TokenIds, expert: str, device: torch.device) -> Tensor:
    row_BT = torch.as_tensor(ids, device=device).view(1, -1)
    if not row_BT.numel():
        raise ConfigError(f"prompts: expected tokens, found a prompt of expert {expert!r} without any")
    return row_BT


def _hidden(model: Fitted, input_ids: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
    """The plain base's hidden state [B, T, D], without its head."""
    given: dict[str, Any] = {}
    if attention_mask is not None:
        given = {"attention_mask": attention_mask, **model.positions(attention_mask)}
    with torch.no_grad():  # no call runs: the base alone
        out = model.base.base_model(input_ids, use_cache=False, output_hidden_states=True, **given)
    count = len(out.hidden_states)
    if not -count <= layer < count:
        raise ConfigError(f"layer: expected {-count} to {count - 1}, found {layer}")
    states: Tensor = out.hidden_states[layer]
    return states

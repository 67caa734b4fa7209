"""What the head is trained for beside the next token: where its shares should lie. Mathematics only.

    cross-entropy of the next token at completions
    share     softmax of the head's logits over the experts (and the null expert), before top-k
    routing   cross-entropy of a row's mean share with its target: the labelled expert, or the experts' own posterior
    balance   log C - H(mean share of the batch): 0 when all experts are used alike
    entropy   mean H(share): 0 when every token and site has one expert

Before top-k, because an expert that was not kept would have no gradient. Knows nothing of models or recipes.
Letters: B batch  T tokens  K kept positions at the end  S sites  V vocabulary
C columns (experts, and the null expert if there is)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that takes no part in the loss
_SMALLEST_SHARE = 1e-6


def token_losses(logits_BKV: Tensor, labels_BK: Tensor) -> Tensor:
    """Next-token cross-entropy [B, K-1] in nats, 0 where there is no label."""
    logits_BKV = logits_BKV[:, :-1]
    if logits_BKV.dtype != torch.float64:
        logits_BKV = logits_BKV.float()
    return F.cross_entropy(logits_BKV.transpose(1, 2), labels_BK[:, 1:], ignore_index=IGNORED, reduction="none")


def mean_over_tokens(shares_BTSC: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over real tokens and sites [B, C]."""
    per_token_BTC = shares_BTSC.mean(dim=2) * mask_BT[..., None]
    return per_token_BTC.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)


def cross_entropy(shares: Tensor, targets: Tensor) -> Tensor:
    """-sum_c target * log share over the last axis; below a share of 1e-6, log goes on as its tangent, never flat."""
    below = shares.clamp(max=_SMALLEST_SHARE) / _SMALLEST_SHARE - 1  # 0 from the smallest share on
    return -(targets * (shares.clamp(min=_SMALLEST_SHARE).log() + below)).sum(dim=-1)


def routing_losses(shares_BTSC: Tensor, mask_BT: Tensor, row_targets_BC: Tensor, token_targets_BKC: Tensor) -> Tensor:
    """The routing term, summed over rows: of a row's mean share, or of those that predict its last K tokens."""
    by_row_B = cross_entropy(mean_over_tokens(shares_BTSC, mask_BT), row_targets_BC)
    before_BKC = shares_BTSC[:, -token_targets_BKC.shape[1] - 1 : -1].mean(dim=2)
    return by_row_B.sum() + cross_entropy(before_BKC, token_targets_BKC).sum()


def entropy(shares: Tensor) -> Tensor:
    """In nats, over the last axis; what is missing to a sum of 1 is ignored."""
    found: Tensor = -torch.special.xlogy(shares, shares).sum(dim=-1)
    return found


def entropy_per_row(shares_BTSC: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean entropy [B] of a row's real tokens and sites, in nats."""
    return mean_over_tokens(entropy(shares_BTSC)[..., None], mask_BT)[:, 0]


def imbalance(shares_BTSC: Tensor, mask_BT: Tensor) -> Tensor:
    """log C - H(mean share over all real tokens and sites of the batch): a scalar, 0 when all are used alike."""
    per_token_BTC = shares_BTSC.mean(dim=2) * mask_BT[..., None]
    mean_C = per_token_BTC.sum(dim=(0, 1)) / mask_BT.sum()
    return torch.log(mean_C.new_tensor(float(len(mean_C)))) - entropy(mean_C)


def posterior(losses: Tensor, temperature: float = 1.0) -> Tensor:
    """Which column most likely gave this text: softmax(-loss / temperature) over the last axis.

    With summed losses (nats) and temperature 1 that is Bayes' posterior under equal priors.
    """
    return torch.softmax(-losses / temperature, dim=-1)

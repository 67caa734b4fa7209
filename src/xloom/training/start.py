"""What a head starts from: statistics of what it reads, and scalings that are equal, random, Arrow's or the labels'.

Letters: B batch  T tokens  D hidden size  F features of the head  S sites  N experts  C columns of the head
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from xloom.model import XLoraForCausalLM
from xloom.routers import Arrow
from xloom.training.data import Example, collate
from xloom.training.objective import routing_losses

_SMALLEST_SHARE = 1e-3  # of what Arrow gives, whose logarithm is fitted
_RIDGE = 1e-2  # relative to the mean square of a feature
_LABEL_EPOCHS = 6
_LABEL_STEPS = 200  # at least, where rows are few
_LABEL_RATE = 5e-3  # of AdamW, falling to 0 along a cosine
_LABEL_WARMUP = 20  # steps


def statistics(states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] over all tokens of hidden states [T, D], in float64."""
    count, total_D, squares_D = 0, torch.zeros(()), torch.zeros(())
    for states_TD in states:
        states_TD = states_TD.double().cpu()
        count += len(states_TD)
        total_D = total_D + states_TD.sum(dim=0)
        squares_D = squares_D + states_TD.square().sum(dim=0)
    mean_D = total_D / count
    return mean_D, (squares_D / count - mean_D.square()).clamp(min=0).sqrt()


def states_of(model: XLoraForCausalLM, examples: Sequence[Example], pad_id: int, batch_size: int) -> Iterator[Tensor]:
    """What the head reads of every example, [T, D]."""
    model.eval()
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = collate(part, pad_id)
        ids, mask = (batch[key].to(model.device) for key in ("input_ids", "attention_mask"))
        for example, states_TD in zip(part, model.compute_head_states(ids, mask), strict=True):
            yield states_TD[-len(example.input_ids) :]


@torch.no_grad()
def fit_to_arrow(model: XLoraForCausalLM, examples: Sequence[Example], pad_id: int, batch_size: int) -> None:
    """Sets the head's last Linear to the ridge regression of log scalings that Arrow routing gives on examples."""
    head, config = model.head.eval(), model.config
    features: list[Tensor] = []
    logits: list[Tensor] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id)
        ids, mask = (batch[key].to(model.device) for key in ("input_ids", "attention_mask"))
        inputs = {"attention_mask": mask, "use_cache": False, **model.positions(mask)}
        arrow_BTSN = model(ids, routing=Arrow(), **inputs).scalings
        states_BTD = model.compute_head_states(ids, mask)
        features_BTF, _ = head.features(states_BTD, mask.bool(), [None] * len(config.pools))
        features.append(head.before_last(features_BTF)[mask.bool()].double())
        logits.append(_targets(arrow_BTSN[mask.bool()].double(), model))
    x, y = torch.cat(features), torch.cat(logits)
    last = head.linears[-1]
    mean_x, mean_y = (x.mean(dim=0), y.mean(dim=0)) if last.bias is not None else (0.0, 0.0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge, x.T @ y).T
    last.weight.copy_(weight)
    if last.bias is not None:
        last.bias.copy_(mean_y - weight @ mean_x)


def fit_to_labels(
    model: XLoraForCausalLM,
    batches: Sequence[Sequence[Example]],
    collate: Callable[[Sequence[Example]], Mapping[str, Any]],
    seed: int,
) -> None:
    """Trains the head on the routing term alone, several times over all batches: no pass with experts is needed.

    As long as the next token plays no part, sites that start alike have the same gradient and stay alike. So one of
    them is trained, and copied to the others.

    Args:
        collate: gives "attention_mask", "row_targets", "token_targets" and, where they are kept, "head_states".
    """
    head, config = model.head.train(), model.config
    last = head.linears[-1]
    site = nn.Linear(
        last.in_features, head.num_columns, last.bias is not None, device=last.weight.device, dtype=head.dtype
    )
    trained = [*site.parameters(), *(p for layer in head.linears[:-1] for p in layer.parameters())]
    for parameter in site.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(trained, lr=_LABEL_RATE, weight_decay=0.0)
    epochs = max(_LABEL_EPOCHS, math.ceil(_LABEL_STEPS / len(batches)))
    schedule = get_cosine_schedule_with_warmup(optimizer, _LABEL_WARMUP, epochs * len(batches))
    rng = random.Random(seed)
    for _ in range(epochs):
        for examples in rng.sample(batches, len(batches)):
            batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in collate(examples).items()}
            targets = batch["row_targets"].sum() + batch["token_targets"].sum()
            if not targets:
                continue
            mask_BT = batch["attention_mask"]
            states_BTD = batch.get("head_states")
            if states_BTD is None:
                states_BTD = model.compute_head_states(batch["input_ids"], mask_BT)
            features_BTF, _ = head.features(states_BTD, mask_BT.bool(), [None] * len(config.pools))
            logits_BTC = site(head.before_last(features_BTF))
            shares_BT1C = torch.softmax(logits_BTC / config.softmax_temperature, dim=-1).unsqueeze(2)
            loss = routing_losses(shares_BT1C, mask_BT, batch["row_targets"], batch["token_targets"]) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        copies = head.num_sites if head.layerwise else 1
        last.weight.copy_(site.weight.repeat(copies, 1))
        if last.bias is not None:
            last.bias.copy_(site.bias.repeat(copies))


def _targets(arrow_TSN: Tensor, model: XLoraForCausalLM) -> Tensor:
    """Logits [T, outputs of the head] whose softmax is Arrow's; the null expert gets the experts' mean."""
    config = model.config
    logits_TSN = config.softmax_temperature * arrow_TSN.clamp(min=_SMALLEST_SHARE).log()
    logits_TSC = logits_TSN - logits_TSN.mean(dim=-1, keepdim=True)
    if config.null_expert:
        logits_TSC = torch.cat([logits_TSC, torch.zeros_like(logits_TSC[..., :1])], dim=-1)
    return logits_TSC.flatten(1) if config.layerwise_scalings else logits_TSC.mean(dim=1)

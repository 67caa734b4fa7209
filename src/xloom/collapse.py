"""A mixture as one static LoRA: the mean of its scalings over the tokens of some rows, in place of the router.

    D_s = sum_n  w * mean(scalings_BTSN[..., s, n]) * scale_n * B_n A_n  =  B A        at every site s

B and A are the experts' factors side by side (rank: the sum of theirs), or cut to a rank by truncated SVD. What is
lost is measured on rows that took no part in the mean. Knows nothing of
formats beside PEFT's folder, or of the command line.
Letters: B batch  T tokens  I in-features  O out-features  S sites  N experts  R rank
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xloom.checkpoints.saved import write_expert
from xloom.errors import ConfigError, DataError, NotExportableError, names
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE, Expert, LowRank
from xloom.hub.files import new_folder, write_json
from xloom.merging import check_output, plain_config
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Routed, Single
from xloom.site import Site
from xloom.training.data import Example, collate
from xloom.training.objective import IGNORED, token_losses

RECORD = "collapse.json"
HELD_EVERY = 5


@dataclass(frozen=True)
class Collapsed:
    """A static LoRA, and what it costs.

    Args:
        expert: of scale 1, in float32.
        scalings_SN: the mean scalings it was made with.
        error: |D - BA| / |D| over all sites as one matrix: what the cut to a rank left out.
        rows, held: numbers of rows that the mean was taken over, and that the losses were.
        losses: nats per completion token of the held rows: "dynamic" the mixture, "collapsed" the LoRA, "base" neither.
        sites, experts: names of the axes S and N.
    """

    expert: Expert
    scalings_SN: Tensor = field(repr=False)
    error: float
    rows: int
    held: int
    losses: Mapping[str, float]
    sites: tuple[str, ...] = field(repr=False)
    experts: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest of any site."""
        return max(low.rank for low in self.expert.modules.values())

    def as_json(self) -> dict[str, Any]:
        shares = dict(zip(self.experts, self.scalings_SN.mean(dim=0).tolist(), strict=True))
        by_site = dict(zip(self.sites, self.scalings_SN.tolist(), strict=True))
        return {
            "losses": dict(self.losses), "rows": self.rows, "held_rows": self.held, "rank": self.rank,
            "cut_error": self.error, "experts": list(self.experts), "mean_scalings": shares, "scalings": by_site,
        }  # fmt: skip

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
        cut = f", cut error {self.error:.3g}" if self.error else ""
        return (
            f"{len(self.expert.modules)} sites, rank {self.rank} at most{cut}; "
            f"loss per token on {self.held} held rows: {losses}"
        )


@torch.no_grad()
def collapse(
    model: XLoraForCausalLM,
    rows: Sequence[Example],
    held: Sequence[Example],
    *,
    rank: int | None = None,
    batch: int = 8,
    routing: Routed | None = None,
) -> Collapsed:
    """Takes the mean of the scalings over `rows`, and measures on `held`.

    Args:
        model: in evaluation mode.
        rank: of every site at most, by truncated SVD; the sum of the experts' ranks, if None.
        batch: rows per forward.
        routing: who decides; None: as in the `with model.routing(...)` around, or the head.

    Raises:
        ConfigError: the rank is below 1, or no expert has any weight.
        DataError: no rows, or none held.
        NotExportableError: experts with DoRA or a LoRA bias, which one plain LoRA cannot carry.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: expected at least 1, found {rank}")
    if not rows or not held:
        raise DataError(f"expected rows to take the mean over and others to measure on, found {len(rows)}, {len(held)}")
    scalings_SN = mean_scalings(model, rows, batch, routing)
    expert, error = static_expert(model, scalings_SN, rank)
    static = XLoraForCausalLM.from_experts(model.plain_base(), {"collapsed": expert})
    losses = {
        "dynamic": mean_loss(model, held, batch, routing),
        "collapsed": mean_loss(static, held, batch, Single("collapsed")),
        "base": mean_loss(static, held, batch, BaseOnly()),
    }
    return Collapsed(expert, scalings_SN, error, len(rows), len(held), losses, model.sites, model.experts)


def split(sources: Iterable[Sequence[Example]], limit: int) -> tuple[list[Example], list[Example]]:
    """At most `limit` rows of each source, evenly spaced, of which every fifth is held; its copies take no other part.

    Raises:
        ConfigError: the limit is below 5.
        DataError: a source has fewer than 5 rows.
    """
    if limit < HELD_EVERY:
        raise ConfigError(f"rows: expected at least {HELD_EVERY}, found {limit}")
    rows: list[Example] = []
    held: list[Example] = []
    for source in sources:
        if len(source) < HELD_EVERY:
            raise DataError(f"expected at least {HELD_EVERY} rows of every source, one to be held; found {len(source)}")
        count = min(limit, len(source))
        some = [source[i * len(source) // count] for i in range(count)]
        rows += [row for i, row in enumerate(some) if (i + 1) % HELD_EVERY]
        held += some[HELD_EVERY - 1 :: HELD_EVERY]
    known = {row.input_ids for row in held}
    return [row for row in rows if row.input_ids not in known], held


def mean_scalings(
    model: XLoraForCausalLM, rows: Sequence[Example], batch: int = 8, routing: Routed | None = None
) -> Tensor:
    """The mean [S, N] of the scalings over all real tokens, in float64."""
    total, tokens = torch.zeros(len(model.sites), len(model.experts), dtype=torch.float64), 0
    for inputs, _ in _batches(model, rows, batch):
        scalings_BTSN = model(**inputs, logits_to_keep=1, use_cache=False, routing=routing).scalings
        keep_BT = inputs["attention_mask"].bool()
        total += scalings_BTSN[keep_BT].double().sum(dim=0).cpu()
        tokens += int(keep_BT.sum())
    return total / tokens


def mean_loss(model: XLoraForCausalLM, rows: Sequence[Example], batch: int = 8, routing: Routed | None = None) -> float:
    """Nats per completion token."""
    total, tokens = 0.0, 0
    for inputs, labels_BK in _batches(model, rows, batch):
        keep = labels_BK.shape[1]
        logits_BKV = model(**inputs, logits_to_keep=keep, use_cache=False, routing=routing).logits
        total += token_losses(logits_BKV, labels_BK).double().sum().item()
        tokens += int((labels_BK[:, 1:] != IGNORED).sum())
    return total / tokens


def static_expert(model: XLoraForCausalLM, scalings_SN: Tensor, rank: int | None = None) -> tuple[Expert, float]:
    """The LoRA that gives every token these scalings, and the relative error of its cut to a rank (0 without one).

    Experts whose mean is exactly 0 at a site leave no ranks there, and sites without any are left out.

    Raises:
        NotExportableError: experts with DoRA or a LoRA bias.
        ConfigError: no expert has any weight.
    """
    odd = {
        "DoRA": any(site.dora_NO is not None for site in model.mixture.sites),
        "a LoRA bias": any(site.bias_NO is not None for site in model.mixture.sites),
    }
    if found := [kind for kind, there in odd.items() if there]:
        raise NotExportableError(f"experts with {names(found)} cannot be collapsed into one plain LoRA")
    modules, lost, whole = {}, 0.0, 0.0
    for site in model.mixture.sites:
        A_RI, B_OR = _weighted(site, scalings_SN[site.index] * model.config.global_scaling_weight)
        if not A_RI.shape[0]:
            continue
        if rank is not None:
            A_RI, B_OR, dropped, norm = cut(A_RI, B_OR, rank)
            lost, whole = lost + dropped**2, whole + norm**2
        modules[site.name] = LowRank(A_RI.float(), B_OR.float(), 1.0, is_embedding=site.is_embedding)
    if not modules:
        raise ConfigError("the scalings are 0 everywhere: there is nothing to collapse")
    config = plain_config(modules, model.plain_base(), model.config.base_model_name_or_path)
    return Expert("collapsed", config, modules), math.sqrt(lost / whole) if whole else 0.0


def cut(A_RI: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Factors of the best approximation of BA of that rank; the Frobenius norms of what is lost and of BA."""
    left_OR, inner_left = torch.linalg.qr(B_OR)
    right_IR, inner_right = torch.linalg.qr(A_RI.T)
    U, s, Vt = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    A = (right_IR @ Vt[:rank].T * root).T
    B = left_OR @ U[:, :rank] * root
    return A, B, float(s[rank:].norm()), float(s.norm())


def write_collapsed(found: Collapsed, folder: Path, *, source: str, data: Sequence[str]) -> None:
    """A PEFT folder with a card and `collapse.json`; it appears whole or not at all.

    Raises:
        ConfigError: the folder holds other files.
        CheckpointError: it cannot be written.
    """
    check_output(folder, RECORD)
    with new_folder(folder, replaces=[CONFIG_FILE, WEIGHTS_FILE, RECORD, "README.md"]) as staged:
        write_expert(found.expert, staged)
        write_json(staged / RECORD, {"source": source, "data": list(data), **found.as_json()})
        (staged / "README.md").write_text(_card(found, folder.name, source, data), encoding="utf-8")


def _weighted(site: Site, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] in float64, each expert's part of B times its weight and scale; R may be 0."""
    parts = [
        (low.A_RI.detach().double().cpu(), low.B_OR.detach().double().cpu() * (low.scale * weight))
        for low, weight in zip(site.experts(), weights_N.tolist(), strict=True)
        if low is not None and weight != 0
    ]
    if not parts:
        return site.A_RI.new_zeros(0, site.A_RI.shape[1]), site.B_OR.new_zeros(site.B_OR.shape[0], 0)
    A, B = zip(*parts, strict=True)
    return torch.cat(A, dim=0), torch.cat(B, dim=1)


def _batches(model: XLoraForCausalLM, rows: Sequence[Example], size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(ordered), size):
        batch = collate(ordered[start : start + size], pad_id=0)
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "position_ids")}
        yield inputs, batch["labels"].to(model.device)


def _card(found: Collapsed, name: str, source: str, data: Sequence[str]) -> str:
    base = found.expert.config["base_model_name_or_path"]
    head = {"library_name": "peft", "tags": ["lora", "xloom"]} | ({"base_model": base} if base else {})
    lines = [
        "---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "",
        f"# {name}", "",
        "A mixture of LoRA experts collapsed into one static LoRA (`xloom convert --collapse`): every token gets",
        f"the mean scalings of {found.rows} rows. Scalings per site and losses: {RECORD}.", "",
        f"- mixture: `{source}`, experts {', '.join(found.experts)}",
        f"- rows: {', '.join(f'`{Path(place).name}`' for place in data)}",
        f"- {found}", "",
    ]  # fmt: skip
    return "\n".join(lines)

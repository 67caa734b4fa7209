"""The shared loop with the terms of the head, and what it computes before the first step.

    loss = next-token loss + routing_weight * routing + balance_weight * balance + entropy_weight * entropy

The terms are those of `objective`; what the frozen parts give is kept on disk (`prepared`).
Letters: B batch  T tokens  S sites  N experts  C columns of the head  K kept positions at the end
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xloom.model import XLoraForCausalLM
from xloom.routers import Precomputed, Routing, XLora
from xloom.training import processes
from xloom.training.data import Example, Examples, plan_batches
from xloom.training.loop import CompletionTrainer, Settings, loss_names
from xloom.training.objective import entropy_per_row, imbalance, mean_over_tokens, posterior, routing_losses
from xloom.training.prepared import BASE, UNIFORM, ExpertLosses, HeadStates, base_fingerprint
from xloom.training.progress import counting
from xloom.training.recipe import HeadRecipe
from xloom.training.run import Run
from xloom.training.sharing import longest_row, shared_outputs
from xloom.training.start import fit_to_arrow, fit_to_labels, states_of, statistics

_SAMPLE = 256  # rows that the head's statistics are taken from
_USE, _ENTROPY = "use/", "entropy/"  # of the names of what validation observes
_POOL = 4  # batches sorted by length together: with more, batches of one domain alone pull the gate to and fro
_ARROW_SAMPLE = 64  # rows that a head is fitted to Arrow on


class HeadTrainer(CompletionTrainer):
    """The shared loop with the terms of the head; checkpoints hold the head, and the experts where they are trained."""

    model: XLoraForCausalLM
    optimizer: Any
    losses: ExpertLosses

    def __init__(
        self,
        model: XLoraForCausalLM,
        settings: Settings,
        train: Examples,
        valid: Examples,
        *,
        recipe: HeadRecipe,
        **rest: Any,
    ) -> None:
        self.recipe = recipe
        self.rows = train.items
        self.columns = [*model.experts, *([BASE] if model.config.null_expert else [])]
        self.domains = sorted({e.domain or "" for e in [*train.items, *valid.items]})
        self.right: dict[str | None, int] = {
            domain: model.experts.index(name) for domain, name in recipe.right_experts().items()
        }
        self.labels = self.right | dict.fromkeys(recipe.base_domains(), len(model.experts))  # columns
        self.states: HeadStates | None = None
        self.references: dict[str, dict[str, float]] = {}
        self.soft: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self._heat = 1.0  # divides the logits beside the config's own temperature
        super().__init__(model, settings, train.items, valid.items, **rest)
        self.model.config.__dict__.pop("use_cache", None)  # Trainer writes its own there, which would be saved

    def plan(self, train: Sequence[Example], settings: Settings) -> list[int]:
        groups = [self.domains.index(e.domain or "") for e in train]
        weights = {self.domains.index(name): domain.weight for name, domain in self.recipe.data.items()}
        batches = (self.recipe.label_steps or settings.max_steps) * settings.gradient_accumulation_steps
        lengths, size = [len(e.input_ids) for e in train], self.recipe.batch_size
        return plan_batches(lengths, size, batches, settings.seed, groups=groups, weights=weights, pool=_POOL)

    @property
    def seen(self) -> list[Example]:
        """The rows of the whole run, each once, those of the start from labels included."""
        return [self.rows[i] for i in dict.fromkeys(self.train_dataset.order)]

    # --- before the first step ---

    def prepare(self, run: Run, expert_ids: Mapping[str, str]) -> None:
        """Computes once what the frozen parts give for every row that the run will see."""
        recipe = self.recipe
        base_id = base_fingerprint(self.model)
        moving = recipe.experts_learning_rate and self.model.config.scaling_pass_value != 0
        if recipe.state_cache_gb and not moving:
            states = HeadStates(self.model, base_id, expert_ids)
            rows = [*self.seen, *self.validation]
            needed, limit = states.bytes_of(rows), int(recipe.state_cache_gb * 1e9)
            if processes.first(lambda: states.make_room(rows, limit)):
                self.states = states
                run.say(f"head states: {len(rows)} rows, {needed / 1e6:,.0f} MB more in {states.store.folder}")
                with counting(run.console, "head states", len(rows)) as tick:
                    states.fill(rows, recipe.batch_size, self.pad_id, tick)
            else:
                run.say(
                    f"head states of {len(rows)} rows need {needed / 1e9:.1f} GB, more than state_cache_gb="
                    f"{recipe.state_cache_gb:g} or the disk has; they are computed in every step instead"
                )
        self.losses = ExpertLosses(self.model, base_id, expert_ids)
        self._fill_soft_labels(run, [e for e in self.seen if e.domain not in self.labels])
        self._fill_references(run)

    def _fill_soft_labels(self, run: Run, unlabelled: Sequence[Example]) -> None:
        recipe = self.recipe
        needed = recipe.routing_weight or recipe.init == "labels"
        if not unlabelled or not needed or recipe.soft_labels == "off":
            return
        with counting(run.console, "soft labels", len(unlabelled) * len(self.columns)) as tick:
            for name in self.columns:
                self.losses.fill(unlabelled, name, recipe.batch_size, self.pad_id, tick)
        self.soft = {(e.input_ids, e.completion_start): self._soft_label(e) for e in unlabelled}

    def _fill_references(self, run: Run) -> None:
        """Loss per token on the validation rows of the base, of each domain's own expert there, and of a flat mix."""
        rows_of: dict[str, list[Example]] = {BASE: self.validation, UNIFORM: self.validation}
        for number in sorted(set(self.right.values())):
            rows_of[self.model.experts[number]] = [e for e in self.validation if self.right.get(e.domain) == number]
        with counting(run.console, "references", sum(map(len, rows_of.values()))) as tick:
            for name, rows in rows_of.items():
                self.losses.fill(rows, name, self.recipe.batch_size, self.pad_id, tick)
        titles = {BASE: "base", UNIFORM: "uniform"}
        sums = {titles.get(n, f"single:{n}"): self._losses_under(n, rows) for n, rows in rows_of.items() if rows}
        self.references = sums

    def _soft_label(self, example: Example) -> Tensor:
        """The experts' posterior given a completion [C], or given each of its tokens [K, C]."""
        losses_KC = torch.stack([self.losses.of(example, name) for name in self.columns], dim=-1)
        by_row = self.recipe.soft_labels == "row"
        return posterior(losses_KC.sum(dim=0) if by_row else losses_KC, self.recipe.soft_temperature)

    def start_head(self) -> None:
        """Statistics of what the head reads, and its first weights."""
        recipe, head = self.recipe, self.model.head
        sample = random.Random(recipe.seed).sample(self.seen, min(_SAMPLE, len(self.seen)))
        if head.standardises:
            kept = map(self.states.__getitem__, sample) if self.states else None
            head.set_statistics(*statistics(kept or states_of(self.model, sample, self.pad_id, recipe.batch_size)))
        if recipe.init == "zero":
            head.zero_init_()
        elif recipe.init == "arrow":
            fit_to_arrow(self.model, sample[:_ARROW_SAMPLE], self.pad_id, recipe.batch_size)
        elif recipe.init == "labels":
            # as they are drawn, but no longer: a run of many epochs learns no more of the labels
            order, size = self.train_dataset.order[: len(self.seen)], recipe.batch_size
            batches = [[self.rows[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
            fit_to_labels(self.model, batches, self.collate, recipe.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW; the experts, where they are trained, at their own learning rate."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            head = [p for name, p in named if name.startswith("head.")]
            experts = [p for name, p in named if not name.startswith("head.")]
            groups: list[dict[str, Any]] = [{"params": head}]
            if experts:
                groups.append({"params": experts, "lr": self.recipe.experts_learning_rate})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # --- a step ---

    def trained(self) -> dict[str, Tensor]:
        statistics = {f"head.{name}": buffer for name, buffer in self.model.head.named_buffers()}
        return super().trained() | statistics

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = super().collate(examples)
        if self.states is not None:
            batch["head_states"] = self.states.batch(examples)
        rows, keep, columns = len(examples), batch["keep"], len(self.columns)
        row_targets, token_targets = torch.zeros(rows, columns), torch.zeros(rows, keep - 1, columns)
        for i, example in enumerate(examples):
            soft = self.soft.get((example.input_ids, example.completion_start))
            if example.domain in self.labels:
                row_targets[i, self.labels[example.domain]] = 1.0
            elif soft is not None and soft.ndim == 1:
                row_targets[i] = soft
            elif soft is not None:
                token_targets[i, -len(soft) :] = soft / len(soft)
        return batch | {
            "row_targets": row_targets,
            "token_targets": token_targets,
            "domain": torch.tensor([self.domains.index(e.domain or "") for e in examples]),
        }

    @property
    def _temperature(self) -> float:
        return float(self.model.config.softmax_temperature * self._heat)

    @property
    def _routing(self) -> Routing:
        return self.model.routing_of(XLora(temperature=self._temperature))

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        if batch["shared"] and "head_states" in batch:
            return self._shared_outputs(batch)
        kept = ("input_ids", "attention_mask", "position_ids", "head_states")
        inputs = {key: batch[key] for key in kept if key in batch}
        asked = {"logits_to_keep": batch["keep"], "use_cache": False, "output_head_logits": True}
        return model(**inputs, **asked, routing=self._routing)

    def _shared_outputs(self, batch: dict[str, Any]) -> Any:
        """The same with the rows' common beginning computed once: the head decides on whole rows first."""
        mask_BT = batch["attention_mask"]
        decided = self.model.decide(batch["head_states"], mask_BT, routing=self._routing)
        longest = longest_row(mask_BT)

        def forward(tokens: slice, inputs: dict[str, Any]) -> Any:
            rows = slice(longest, longest + 1) if tokens.start == 0 else slice(None)
            return self.model(**inputs, use_cache=True, routing=Precomputed(decided.scalings_BTSN[rows, tokens]))

        out = shared_outputs(forward, batch, self.model.config)
        out.scalings, out.head_logits = decided.scalings_BTSN, decided.logits_BTSC
        return out

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        targets = batch["row_targets"].sum() + batch["token_targets"].sum()  # each row's targets sum to 1, or to 0
        return super().counts(batch) | {"targets": float(targets), "rows": float(len(batch["domain"]))}

    def terms(self, out: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        terms = super().terms(out, batch)
        recipe, totals, mask_BT = self.recipe, self.step_totals, batch["attention_mask"]
        shares_BTSC = torch.softmax(out.head_logits / self._temperature, dim=-1)
        if recipe.routing_weight:
            losses = routing_losses(shares_BTSC, mask_BT, batch["row_targets"], batch["token_targets"])
            terms["routing"] = recipe.routing_weight * losses / totals["targets"]
        if recipe.balance_weight:
            share = len(mask_BT) / totals["rows"]  # of the step; balanced within each batch
            terms["balance"] = recipe.balance_weight * share * imbalance(shares_BTSC, mask_BT)
        if recipe.entropy_weight:
            summed = entropy_per_row(shares_BTSC, mask_BT).sum()
            terms["entropy"] = recipe.entropy_weight * summed / totals["rows"]
        return terms

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        last = self.model.config.softmax_temperature
        first = self.recipe.start_temperature or last
        left = 1 - self.state.global_step / max(1, self.args.max_steps - 1)
        self._heat = float((first / last) ** max(0.0, left))
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
            return loss
        finally:
            self._heat = 1.0

    # --- validation ---

    def observe(self, batch: dict[str, Any], out: Any) -> Mapping[str, tuple[float, float]]:
        """Every expert's use and the entropy of the scalings by domain, and how often the right expert leads."""
        mask_BT = batch["attention_mask"]
        use_BN = mean_over_tokens(out.scalings, mask_BT).float().cpu()
        entropy_B = entropy_per_row(out.scalings.float(), mask_BT).cpu()
        found: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for number, use_N, entropy in zip(batch["domain"].tolist(), use_BN, entropy_B.tolist(), strict=True):
            domain = self.domains[number]
            values = {
                f"{_USE}{domain}/{name}": use for name, use in zip(self.model.experts, use_N.tolist(), strict=True)
            }
            if self.model.config.enable_softmax or self.model.config.enable_softmax_topk:
                values[f"{_ENTROPY}{domain}"] = entropy
            if domain in self.right:
                values["routing_accuracy"] = float(use_N.argmax() == self.right[domain])
            found.update(values)
            counts.update(dict.fromkeys(values, 1))
        return {key: (found[key], counts[key]) for key in counts}

    def summary(self) -> dict[str, Any]:
        """Beside the loop's: what the mixing does on the validation rows, and what others lose on the same rows."""
        record = super().summary()
        if not self.validation:
            return record
        found = record["validation"]
        there = {e.domain or "" for e in self.validation}
        return record | {
            "validation": {key: v for key, v in found.items() if not key.startswith((_USE, _ENTROPY))},
            "use": {d: {name: found[f"{_USE}{d}/{name}"] for name in self.model.experts} for d in sorted(there)},
            "entropy": {d: found[f"{_ENTROPY}{d}"] for d in sorted(there) if f"{_ENTROPY}{d}" in found},
            "references": self.references,
        }

    def _losses_under(self, name: str, rows: Sequence[Example]) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for row in rows:
            for key in loss_names(row):
                total = sums.setdefault(key, [0.0, 0.0])
                total[0] += self.losses.of(row, name).double().sum().item()
                total[1] += row.completion_tokens
        return {key: loss / tokens for key, (loss, tokens) in sorted(sums.items())}

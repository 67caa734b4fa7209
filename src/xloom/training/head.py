"""Training the X-LoRA head, and the experts if asked, on a frozen base.

    loss = next-token loss at completions + routing_weight * mean over labelled rows of -log(share of the right expert)

A row's share of an expert is the softmax of the head's logits, averaged over the row's real tokens and all sites. It
is taken before top-k, which would leave an expert that was not kept without a gradient; without top-k it is the mean
scaling itself. Knows nothing of checkpoint formats.
Letters: B batch  T tokens  D hidden size  S sites  N experts  C columns of the head
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import set_seed

from xloom.config import XLoraConfig
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE
from xloom.files import fetch_folder
from xloom.model import XLoraForCausalLM
from xloom.routers import HiddenStateRouter, XLora
from xloom.training.data import Example, Examples, collate, read_examples
from xloom.training.expert import summary
from xloom.training.loop import CompletionTrainer, train
from xloom.training.recipe import HeadRecipe
from xloom.training.run import Run, load_tokenizer, pad_id, quiet

_STATISTICS_ROWS = 256
_SMALLEST_SHARE = 1e-6


def train_head(recipe: HeadRecipe, *, progress: bool = True) -> Path:
    """Trains the head, or goes on with an interrupted run of the same recipe; a finished one is returned at once.

    Args:
        progress: show a bar and what is being done, on stderr.

    Returns:
        The folder: a checkpoint of ours (`XLoraForCausalLM.from_pretrained`), the base's tokenizer, training.json.

    Raises:
        XLoomError: RecipeError, DataError, PromptError, DivergedError, or what `from_experts` finds wrong.
        KeyboardInterrupt: Ctrl-C; the step is finished and a checkpoint written first.
    """
    recipe.check()
    sources = {name: recipe.expert_source(name) for name in recipe.experts}
    run = Run(recipe, inputs=_weights(sources), progress=progress)
    if run.finished():
        return run.output
    checkpoint = run.open()
    with quiet(), run.bar() as callbacks:
        source = recipe.base_source
        tokenizer = load_tokenizer(source)
        rows, valid = (
            read_examples({d: [recipe.path(p) for p in ps] for d, ps in part.items()}, tokenizer, recipe.max_length)
            if part
            else Examples()
            for part in (recipe.data, recipe.valid)
        )
        run.say(f"{run.output.name}: {rows}" + (f"; validation: {valid}" if recipe.valid else ""))
        set_seed(recipe.seed)
        model = XLoraForCausalLM.from_experts(source, sources, dtype=getattr(torch, recipe.dtype), **recipe.head)
        if recipe.zero_init:
            model.head.zero_init_()
        trainer = HeadTrainer(
            model,
            run.settings(),
            rows.items,
            valid.items,
            routing_weight=recipe.routing_weight,
            pad_id=pad_id(tokenizer),
            experts=model.experts,
            callbacks=callbacks,
        )
        if model.head.standardises and checkpoint is None:
            sample = random.Random(recipe.seed).sample(rows.items, min(_STATISTICS_ROWS, len(rows.items)))
            model.head.set_statistics(*hidden_statistics(model, sample, pad_id(tokenizer), recipe.batch_size))
        train(trainer, checkpoint)
        results = summary(trainer, rows, valid)

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return run.publish(write, results)


@final
class Watched(HiddenStateRouter):
    """The head's own routing, with its distribution over the experts before top-k kept at hand."""

    def __init__(self) -> None:
        self.shares_BTSN: Tensor | None = None

    def decide(self, logits_BTSC: Tensor, config: XLoraConfig, experts: Sequence[str]) -> Tensor:
        shares_BTSC = torch.softmax(logits_BTSC / config.softmax_temperature, dim=-1)
        self.shares_BTSN = shares_BTSC[..., : len(experts)]
        return XLora().decide(logits_BTSC, config, experts)


class HeadTrainer(CompletionTrainer):
    """The shared loop with the routing term; checkpoints hold the head, and the experts where they are trained."""

    model: XLoraForCausalLM

    def __init__(self, *args: Any, routing_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.config.__dict__.pop("use_cache", None)  # Trainer writes its own there, which would be saved
        self.routing_weight = routing_weight
        self._router = Watched()
        self._right = self._judged = 0

    def trained(self) -> dict[str, Tensor]:
        statistics = {f"head.{name}": buffer for name, buffer in self.model.head.named_buffers()}
        return super().trained() | statistics

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        with self.model.routing(self._router):
            return super().outputs(model, batch)

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        return super().counts(batch) | {"labelled": float((batch["expert"] >= 0).sum())}

    def terms(self, out: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        terms = super().terms(out, batch)
        labelled_B = batch["expert"] >= 0
        if self.routing_weight and labelled_B.any():
            assert self._router.shares_BTSN is not None
            shares_BN = mean_over_tokens(self._router.shares_BTSN, batch["attention_mask"])
            losses = routing_losses(shares_BN[labelled_B], batch["expert"][labelled_B])
            terms["routing"] = self.routing_weight * losses.sum() / self.step_totals["labelled"]
        return terms

    def measure(self) -> dict[str, Any]:
        self._right = self._judged = 0
        found = super().measure()
        if self._judged:
            found["routing_accuracy"] = self._right / self._judged
        return found

    def observe(self, batch: dict[str, Any], out: Any) -> None:
        labelled_B = batch["expert"] >= 0
        guess_B = mean_over_tokens(out.scalings, batch["attention_mask"]).argmax(dim=-1)
        self._right += int((guess_B == batch["expert"])[labelled_B].sum())
        self._judged += int(labelled_B.sum())


def mean_over_tokens(scalings_BTSN: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over real tokens and sites [B, N]."""
    per_token_BTN = scalings_BTSN.mean(dim=2) * mask_BT[..., None]
    return per_token_BTN.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)


def routing_losses(shares_BN: Tensor, expert_B: Tensor) -> Tensor:
    """-log of each row's share of its expert [B]."""
    return -shares_BN.gather(1, expert_B[:, None])[:, 0].clamp(min=_SMALLEST_SHARE).log()


def hidden_statistics(
    model: XLoraForCausalLM, examples: Sequence[Example], pad_id: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of the hidden state that the head reads, over the real tokens of examples."""
    like = model.head.linears[0].weight
    count = 0
    total_D = squares_D = torch.zeros(())
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id)
        ids, mask = (batch[key].to(like.device) for key in ("input_ids", "attention_mask"))
        real_ND = model.compute_head_states(ids, mask)[mask.bool()].cpu().double()
        count += len(real_ND)
        total_D = total_D.to(real_ND.device) + real_ND.sum(dim=0)
        squares_D = squares_D.to(real_ND.device) + real_ND.square().sum(dim=0)
    mean_D = total_D / count
    return mean_D.to(like), (squares_D / count - mean_D.square()).clamp(min=0).sqrt().to(like)


def _weights(sources: dict[str, str]) -> dict[str, Path]:
    folders = {name: fetch_folder(source) for name, source in sources.items()}
    files = {f"{name}/{file}": folders[name] / file for name in folders for file in (CONFIG_FILE, WEIGHTS_FILE)}
    return {f"experts.{name}": path for name, path in files.items() if path.is_file()}

"""What all systems share: the model, the questions as prompts, how long answers may be, and sample prompts.

Knows nothing of the ways to answer, or of grades.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xloom.decoding.batch import BATCH_TOKENS
from xloom.errors import ConfigError, DataError, NotFoundError, PromptError, XLoomError, names
from xloom.evaluation.answers import Prompt
from xloom.evaluation.tasks import Question, Task
from xloom.model import XLoraForCausalLM
from xloom.training.base import load_tokenizer
from xloom.training.data import tokenise_all

SLACK = 2  # tokens that an answer may have more than the longest right one of its kind
FREE_TOKENS = 24  # of answers in free words, whose length the right one does not tell
_MEASURED = 32  # right answers with the most letters, among which that with the most tokens is sought
SAMPLES = 24  # training prompts of each expert for routers that are fitted

Ids = tuple[tuple[int, ...], int]  # token ids of a prompt and its right answer, and where the answer starts


@dataclass(frozen=True)
class Bench:
    """What all systems share.

    Args:
        model, tokenizer: the X-LoRA model whose experts are compared.
        tasks: the columns that are asked, with their training rows.
        few_shot: solved rows before a question, for the system that has some.
        batch_tokens: bound on rows times tokens of one forward.
        base: that the model was put onto in place of the one it names, if any; further models are put onto it too.
    """

    model: XLoraForCausalLM
    tokenizer: Any
    tasks: tuple[Task, ...]
    few_shot: int = 3
    batch_tokens: int = BATCH_TOKENS
    base: str | Path | None = None

    @property
    def setting(self) -> dict[str, Any]:
        """What speed and memory depend on, beside the model and the questions; as JSON values."""
        return {
            "device": device_name(self.model.device),
            "threads": torch.get_num_threads(),
            "batch_tokens": self.batch_tokens,
            "dtype": str(self.model.base.dtype).removeprefix("torch."),
        }

    def encode(self, questions: Sequence[Question]) -> list[Ids]:
        """Raises DataError or PromptError, with the row's place."""
        return list(tokenise_all([question.row for question in questions], self.tokenizer))

    @cached_property
    def budgets(self) -> Mapping[tuple[str, str], int]:
        """New tokens at most, by column and kind of question: those of the longest right answer, and `SLACK`.

        Of all rows of the column's files, asked or not.
        """
        kinds: dict[tuple[str, str], list[Question]] = {}
        for task in self.tasks:
            for question in (*task.questions, *task.beyond, *task.train):
                kinds.setdefault((question.column, question.task), []).append(question)
        found = {}
        for kind, known in kinds.items():
            known.sort(key=lambda question: len(question.right), reverse=True)
            found[kind] = max(len(ids) - start for ids, start in self.encode(known[:_MEASURED])) + SLACK
        return found

    def budget(self, question: Question) -> int:
        if "max_new_tokens" in question.scorer.options:
            return int(question.scorer.options["max_new_tokens"])
        own = self.budgets[question.column, question.task]
        return max(own, FREE_TOKENS) if question.scorer.name == "contains" else own

    def prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        """Raises PromptError where a prompt leaves no room in the model's window."""
        window = getattr(self.model.config.base_text_config, "max_position_embeddings", None)
        out = []
        for question, (ids, start) in zip(questions, self.encode(questions), strict=True):
            budget = self.budget(question)
            if window is not None and start + budget > window:
                raise PromptError(
                    f"{question.row.where}: {start} tokens and {budget} new ones are more than the model's window of "
                    f"{window}"
                )
            out.append(Prompt(ids[:start], budget))
        return out

    def train_of(self, column: str) -> Sequence[Question]:
        return next(task.train for task in self.tasks if task.name == column)

    def samples(self) -> dict[str, list[tuple[int, ...]]]:
        """Prompts out of the training rows of every expert's own domain.

        Raises:
            DataError: an expert has none.
        """
        found: dict[str, list[Question]] = {name: [] for name in self.model.experts}
        for question in (question for task in self.tasks for question in task.train):
            if len(question.experts) == 1 and question.experts[0] in found:
                found[question.experts[0]].append(question)
        if lacking := [name for name, some in found.items() if not some]:
            raise DataError(f"training rows for {names(lacking)}: expected some for every expert, found none")
        return {name: [ids[:start] for ids, start in self.encode(some[:SAMPLES])] for name, some in found.items()}


def device_name(device: torch.device) -> str:
    """What the processor or the accelerator calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def right_experts(question: Question, experts: Sequence[str]) -> tuple[str, ...]:
    """The experts that a question needs; none, where the model lacks one of them."""
    return question.experts if set(question.experts) <= set(experts) else ()


def check_alike(bench: Bench, folder: Path, model: XLoraForCausalLM) -> None:
    """Refuses another model that would not understand the bench's prompts.

    Raises:
        ConfigError: its base or its tokenizer is of another kind, or its window of another length.
    """
    mine, its = bench.model.config.base_text_config, model.config.base_text_config
    for field in ("model_type", "vocab_size", "max_position_embeddings"):
        expected, found = getattr(mine, field, None), getattr(its, field, None)
        if expected != found:
            raise ConfigError(f"{folder}: its base has {field} {found!r}; expected {expected!r}, as the other systems'")
    own = str(folder) if any(folder.glob("tokenizer*")) else model.config.base_model_name_or_path
    try:
        tokenizer = load_tokenizer(own) if own else bench.tokenizer
    except NotFoundError:  # it brings none that could differ
        return
    rows = [task.questions[0].row for task in bench.tasks]
    try:
        same = list(tokenise_all(rows, tokenizer)) == list(tokenise_all(rows, bench.tokenizer))
    except XLoomError:  # rows that the bench's tokenizer has read before
        same = False
    if not same:
        raise ConfigError(
            f"{folder}: its tokenizer or chat template gives other token ids than the other systems' for "
            f"{rows[0].where}; expected the same"
        )

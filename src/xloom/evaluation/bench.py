"""What all systems share: the model, the questions as prompts, how long answers may be, and sample prompts.

Knows nothing of the ways to answer, or of grades.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xloom.errors import DataError, PromptError, names
from xloom.evaluation.decoding import BATCH_TOKENS, Prompt
from xloom.evaluation.tasks import Question, Task
from xloom.model import XLoraForCausalLM
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
    """

    model: XLoraForCausalLM
    tokenizer: Any
    tasks: tuple[Task, ...]
    few_shot: int = 3
    batch_tokens: int = BATCH_TOKENS

    def encode(self, questions: Sequence[Question]) -> list[Ids]:
        """Raises DataError or PromptError, with the row's place."""
        return list(tokenise_all([question.row for question in questions], self.tokenizer))

    @cached_property
    def budgets(self) -> Mapping[tuple[str, str], int]:
        """New tokens at most, by column and kind of question: those of the longest right answer, and `SLACK`."""
        kinds: dict[tuple[str, str], list[Question]] = {}
        for question in (question for task in self.tasks for question in (*task.questions, *task.train)):
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


def right_experts(question: Question, experts: Sequence[str]) -> tuple[str, ...]:
    """The experts that a question needs; none, where the model lacks one of them."""
    return question.experts if set(question.experts) <= set(experts) else ()

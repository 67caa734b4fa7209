"""What can be compared: every way to answer with the same experts. `registry.find_systems` makes them from names.

A system is asked for its prompts and then makes itself ready, once, to answer them. Takes a `Bench`; knows nothing of
grades, of files of answers, or of names on the command line.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch

from xloom.collapse import mean_scalings, static_expert
from xloom.evaluation.bench import Bench, Ids, changed, check_alike, right_experts
from xloom.evaluation.decoding import Answer, Prompt, RouterOf, decode, losses
from xloom.evaluation.shots import SEPARATOR, Constants, solved, with_shots
from xloom.evaluation.tasks import Question, Task
from xloom.experts import Expert
from xloom.merging import Method, merge_experts, on_deltas
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Centroid, Fixed, PerRow, Router, Single, check_known
from xloom.training.data import Example


class Ready(ABC):
    """A system that is set up. `experts` names the last axis of the answers' weights."""

    experts: tuple[str, ...] = ()

    @abstractmethod
    def answers(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> Iterator[dict[int, Answer]]:
        """Batch by batch, by the questions' places in the list."""

    def losses(self, questions: Sequence[Question], rows: Sequence[Ids]) -> list[float] | None:
        """Mean loss of each right answer in nats per token; None where there is no model."""
        return None


class System(ABC):
    """One way to answer.

    Attributes:
        name: as it is asked for and as it stands in tables.
        about: one line about it.
        routes: whether its scalings tell which expert it takes to be the right one.
        reads_head: whether the model's head has a part in its answers.
        fitted: whether the bench's samples have one.
        kept: whether its answers are worth keeping.
    """

    routes = False
    reads_head = False
    fitted = False
    kept = True

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about

    def takes(self, bench: Bench, task: Task) -> bool:
        """Whether there is what it needs for this column."""
        return True

    def rows(self, bench: Bench, questions: Sequence[Question]) -> list[Question]:
        """The questions as this system sees them."""
        return list(questions)

    def prompts(self, bench: Bench, rows: Sequence[Question]) -> list[Prompt]:
        """Of its `rows`. Raises as `Bench.prompts`."""
        return bench.prompts(rows)

    def borrows(self, bench: Bench, task: Task) -> bool:
        """Whether its answers to this column are chosen by the right ones: its score there is no fair one."""
        return False

    def folder(self) -> Path | None:
        """Of a model of its own."""
        return None

    def settings(self, bench: Bench) -> dict[str, Any]:
        """What decides its answers beside the prompts, the model's files and its name."""
        return {"samples": hashlib.sha256(repr(bench.samples()).encode()).hexdigest()} if self.fitted else {}

    @abstractmethod
    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        """Set up for as long as the block runs; the bench's model is as before afterwards."""


class _ModelReady(Ready):
    """Answers of a model.

    Args:
        group_of: questions of different groups never share a batch.
        router_of: the router for questions of one group, by them and their prompts; by default the model's own.
        alike: whether all questions of a group have the same router, so that a prefix can be shared.
    """

    def __init__(
        self,
        bench: Bench,
        model: XLoraForCausalLM,
        router_of: Callable[[Sequence[Question], Sequence[Prompt]], Router] | None = None,
        group_of: Callable[[Question, Prompt], Hashable] = lambda question, prompt: None,
        alike: bool = True,
    ) -> None:
        self.experts = model.experts
        self._bench, self._model = bench, model
        self._router_of, self._group_of, self._alike = router_of, group_of, alike

    def answers(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> Iterator[dict[int, Answer]]:
        pairs = zip(questions, prompts, strict=True)
        grouped = [replace(prompt, group=self._group_of(question, prompt)) for question, prompt in pairs]
        yield from decode(
            self._model,
            self._bench.tokenizer,
            grouped,
            router_of=self._by_places(questions, prompts),
            batch_tokens=self._bench.batch_tokens,
            share_prefix=self._alike,
        )

    def losses(self, questions: Sequence[Question], rows: Sequence[Ids]) -> list[float]:
        prompts = [Prompt(ids[:start], 1) for ids, start in rows]
        return losses(
            self._model,
            self._bench.tokenizer,
            rows,
            router_of=self._by_places(questions, prompts),
            groups=[self._group_of(question, prompt) for question, prompt in zip(questions, prompts, strict=True)],
            batch_tokens=self._bench.batch_tokens,
        )

    def _by_places(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> RouterOf | None:
        router_of = self._router_of
        if router_of is None:
            return None
        return lambda places: router_of([questions[i] for i in places], [prompts[i] for i in places])


# --- without a mixture ---


@final
class Constant(System):
    """The best constant answer to every kind of question."""

    kept = False

    def borrows(self, bench: Bench, task: Task) -> bool:
        constants = _constants(bench)
        return any(constants.borrowed(question) for question in task.questions)

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        yield _ConstantReady(_constants(bench))


def _constants(bench: Bench) -> Constants:
    train = [question for task in bench.tasks for question in task.train]
    return Constants(train, [question for task in bench.tasks for question in task.questions])


class _ConstantReady(Ready):
    def __init__(self, constants: Constants) -> None:
        self._constants = constants

    def answers(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> Iterator[dict[int, Answer]]:
        if questions:
            yield {place: Answer(self._constants.answer(question), 0) for place, question in enumerate(questions)}


@final
class FewShot(System):
    """The base, with solved training rows of the same kind before the question.

    In plain text its answer ends where the next solved question would begin, as no end token stands in such a prompt.
    """

    def takes(self, bench: Bench, task: Task) -> bool:
        return bool(task.train)

    def rows(self, bench: Bench, questions: Sequence[Question]) -> list[Question]:
        shots: dict[tuple[str, str], list[Question]] = {}
        out = []
        for question in questions:
            kind = (question.column, question.task)
            if kind not in shots:
                shots[kind] = solved(question, bench.train_of(question.column), bench.few_shot)
            out.append(replace(question, row=with_shots(question.row, shots[kind])))
        return out

    def prompts(self, bench: Bench, rows: Sequence[Question]) -> list[Prompt]:
        whole = {task.name for task in bench.tasks if any(SEPARATOR in known.right for known in task.train)}
        return [
            replace(prompt, stop=SEPARATOR)
            if bench.few_shot and isinstance(row.row.prompt, str) and row.column not in whole
            else prompt
            for row, prompt in zip(rows, bench.prompts(rows), strict=True)
        ]

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        base = BaseOnly()
        yield _ModelReady(bench, bench.model, lambda *_: base, lambda question, _: (question.column, question.task))


# --- routers ---


@final
class Routed(System):
    """The model under another router, the same for all questions.

    Args:
        make: the router, from the bench; asked once.
        fields: of the model's config, changed for as long as it answers.
        fitted: whether `make` looks at the bench's samples.
    """

    def __init__(
        self,
        name: str,
        about: str,
        make: Callable[[Bench], Router],
        *,
        routes: bool = False,
        reads_head: bool = False,
        fields: Mapping[str, Any] | None = None,
        fitted: bool = False,
    ) -> None:
        super().__init__(name, about)
        self.routes, self.reads_head, self.fitted = routes, reads_head, fitted
        self._make, self._fields = make, dict(fields or {})

    def settings(self, bench: Bench) -> dict[str, Any]:
        return self._fields | super().settings(bench)

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        with changed(bench.model.config, self._fields):
            router = self._make(bench)
            yield _ModelReady(bench, bench.model, lambda *_: router)


@final
class RightExpert(System):
    """The right expert of every question; where it needs several, all of those alike."""

    routes = True

    def takes(self, bench: Bench, task: Task) -> bool:
        return all(right_experts(question, bench.model.experts) for question in task.questions)

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        def group(question: Question, _: Prompt) -> tuple[str, ...]:
            return right_experts(question, bench.model.experts)

        def router_of(questions: Sequence[Question], prompts: Sequence[Prompt]) -> Router:
            return _alike(group(questions[0], prompts[0]), bench.model.experts)

        yield _ModelReady(bench, bench.model, router_of, group)


@final
class Nearest(System):
    """Experts by the likeness of the prompt to those of each expert (`routers.Centroid`)."""

    routes = True
    fitted = True

    def __init__(self, name: str, about: str, top_k: int | None = None) -> None:
        super().__init__(name, about)
        self._top_k = top_k

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        centroid = Centroid.fit(bench.model, bench.samples(), top_k=self._top_k)
        weights: dict[tuple[int, ...], torch.Tensor] = {}

        def of(prompt: Prompt) -> torch.Tensor:
            if prompt.ids not in weights:
                ids = torch.tensor([prompt.ids], device=bench.model.device)
                weights[prompt.ids] = centroid.weights(bench.model, ids)[0]
            return weights[prompt.ids]

        def router_of(questions: Sequence[Question], prompts: Sequence[Prompt]) -> Router:
            return PerRow(torch.stack([of(prompt) for prompt in prompts]))

        if self._top_k == 1:  # few kinds of weights: rows of a kind can share a prefix

            def router_of_one(questions: Sequence[Question], prompts: Sequence[Prompt]) -> Router:
                return Single(bench.model.experts[int(of(prompts[0]).argmax())])

            yield _ModelReady(bench, bench.model, router_of_one, lambda _, prompt: int(of(prompt).argmax()))
        else:
            yield _ModelReady(bench, bench.model, router_of, alike=False)


# --- other adapters on the same base, and other models ---


@final
class OneAdapter(System):
    """The base with one static adapter: several experts merged, or what somebody made of them.

    Args:
        fitted: whether `make` looks at the bench's samples.
    """

    def __init__(
        self,
        name: str,
        about: str,
        make: Callable[[Bench], Expert],
        *,
        folder: Path | None = None,
        reads_head: bool = False,
        fitted: bool = False,
    ) -> None:
        super().__init__(name, about)
        self.reads_head, self.fitted = reads_head, fitted
        self._make, self._folder = make, folder

    def folder(self) -> Path | None:
        return self._folder

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        adapter = self._make(bench)
        with bench.model.plain_base() as base:
            model = XLoraForCausalLM.from_experts(base, {"adapter": adapter})
            try:
                router = Single("adapter")
                yield _ModelReady(bench, model, lambda *_: router)
            finally:
                model.unload()


@final
class OtherModel(System):
    """Another X-LoRA model of the same tokens, with experts and a head of its own; its base is loaded beside."""

    routes = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, f"X-LoRA model {folder.name}")
        self._folder = folder

    def folder(self) -> Path | None:
        return self._folder

    def settings(self, bench: Bench) -> dict[str, Any]:
        return {} if bench.base is None else {"base": str(bench.base)}

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        model = XLoraForCausalLM.from_pretrained(self._folder, base=bench.base, dtype=bench.model.base.dtype)
        check_alike(bench, self._folder, model)
        yield _ModelReady(bench, model.to(bench.model.device))


def collapsed(bench: Bench) -> Expert:
    """The head's mean scalings over the sample prompts, as one adapter (`xloom.collapse`)."""
    rows = [Example(ids, len(ids) - 1) for some in bench.samples().values() for ids in some]
    return static_expert(bench.model, mean_scalings(bench.model, rows))[0]


def merged(bench: Bench, method: Method) -> Expert:
    """The model's experts as one, through PEFT."""
    experts = experts_of(bench.model)
    with bench.model.plain_base() as base:
        return merge_experts(base, experts, method)


def fitting_method(model: XLoraForCausalLM, method: Method) -> Method:
    """The method itself where all experts have one rank; else its form that works on deltas and not on factors."""
    ranks = {low.rank for expert in experts_of(model).values() for low in expert.modules.values()}
    return on_deltas(method) if len(ranks) > 1 else method


def experts_of(model: XLoraForCausalLM) -> dict[str, Expert]:
    """The model's experts as they are in it, by name."""
    by_site = model.mixture.experts_of_sites()
    pairs = zip(model.experts, by_site, strict=True)
    return {name: Expert(name, model.expert_configs[name], modules) for name, modules in pairs}


def _alike(chosen: Sequence[str], experts: Sequence[str]) -> Router:
    check_known(chosen, experts)
    return Single(chosen[0]) if len(chosen) == 1 else Fixed(dict.fromkeys(chosen, 1 / len(chosen)))

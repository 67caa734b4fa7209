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
from xloom.evaluation.answers import Answer, Prompt, answers, losses
from xloom.evaluation.bench import Bench, Ids, check_alike, right_experts
from xloom.evaluation.shots import SEPARATOR, Constants, solved, with_shots
from xloom.evaluation.tasks import Question, Task
from xloom.experts import Expert
from xloom.merging import Method, merge_experts, on_deltas
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Centroid, Fixed, PerRow, Router, Routing, Single, XLora, check_known
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
        router_of: who decides, by a question and its prompt.
        as_they_are: whether the config's `global_scaling_weight` is left out (taken as 1).
        kind_of: prompts of one kind begin alike, further than all do; they are answered together, not among others.
    """

    def __init__(
        self,
        bench: Bench,
        model: XLoraForCausalLM,
        router_of: Callable[[Question, Prompt], Router],
        *,
        as_they_are: bool = True,
        kind_of: Callable[[Question], Hashable] = lambda question: None,
    ) -> None:
        self.experts = model.experts
        self._bench, self._model, self._router_of = bench, model, router_of
        self._as_they_are, self._kind_of = as_they_are, kind_of

    def answers(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> Iterator[dict[int, Answer]]:
        routings = self._routings(questions, prompts)
        kinds: dict[Hashable, list[int]] = {}
        for place, question in enumerate(questions):
            kinds.setdefault(self._kind_of(question), []).append(place)
        for places in kinds.values():
            some, whose = [prompts[i] for i in places], [routings[i] for i in places]
            tokens = self._bench.batch_tokens
            for found in answers(self._model, self._bench.tokenizer, some, whose, batch_tokens=tokens):
                yield {places[at]: answer for at, answer in found.items()}

    def losses(self, questions: Sequence[Question], rows: Sequence[Ids]) -> list[float]:
        prompts = [Prompt(ids[:start], 1) for ids, start in rows]
        return losses(self._model, rows, self._routings(questions, prompts), batch_tokens=self._bench.batch_tokens)

    def _routings(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Routing]:
        pairs = zip(questions, prompts, strict=True)
        found = [self._model.routing_of(self._router_of(question, prompt)) for question, prompt in pairs]
        return [routing.weighed(1.0) for routing in found] if self._as_they_are else found


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
        yield _ModelReady(bench, bench.model, lambda *_: base, kind_of=lambda asked: (asked.column, asked.task))


# --- routers ---


@final
class WithRouter(System):
    """The model with another router, the same for all questions.

    Args:
        make: the router, from the bench; asked once.
        fields: of the model's config that the router has values of its own for.
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
        router = self._make(bench)
        yield _ModelReady(bench, bench.model, lambda *_: router, as_they_are=not self.reads_head)


@final
class RightExpert(System):
    """The right expert of every question; where it needs several, all of those alike."""

    routes = True

    def takes(self, bench: Bench, task: Task) -> bool:
        return all(right_experts(question, bench.model.experts) for question in task.questions)

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Ready]:
        experts = bench.model.experts
        yield _ModelReady(bench, bench.model, lambda question, _: _alike(right_experts(question, experts), experts))


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

        def router_of(question: Question, prompt: Prompt) -> Router:
            if prompt.ids not in weights:
                ids = torch.tensor([prompt.ids], device=bench.model.device)
                weights[prompt.ids] = centroid.weights(bench.model, ids)
            return PerRow(weights[prompt.ids])

        yield _ModelReady(bench, bench.model, router_of)


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
        model = XLoraForCausalLM.from_experts(bench.model.plain_base(), {"adapter": adapter})
        router = Single("adapter")
        yield _ModelReady(bench, model, lambda *_: router)


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
        head = XLora()
        yield _ModelReady(bench, model.to(bench.model.device), lambda *_: head, as_they_are=False)


def collapsed(bench: Bench) -> Expert:
    """The head's mean scalings over the sample prompts, as one adapter (`xloom.collapse`)."""
    rows = [Example(ids, len(ids) - 1) for some in bench.samples().values() for ids in some]
    return static_expert(bench.model, mean_scalings(bench.model, rows))[0]


def merged(bench: Bench, method: Method) -> Expert:
    """The model's experts as one, through PEFT."""
    return merge_experts(bench.model.plain_base(), experts_of(bench.model), method)


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

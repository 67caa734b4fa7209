"""`evaluate`: every system answers every question, once; what is known already is not asked again.

Takes a model, tasks and systems; gives an `Evaluation` (`results.py`). Knows nothing of tables.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.decoding.batch import BATCH_TOKENS
from xloom.errors import ConfigError, DataError, XLoomError, names
from xloom.evaluation.answers import Answer, Prompt
from xloom.evaluation.bench import Bench
from xloom.evaluation.memory import PeakMemory
from xloom.evaluation.results import Column, Evaluation, Outcome
from xloom.evaluation.scorers import Grade
from xloom.evaluation.shots import CANDIDATES
from xloom.evaluation.store import AnswerFile, Kept, file_name, folder_digest, model_digest, question_key
from xloom.evaluation.systems import System
from xloom.evaluation.tasks import Question, Task
from xloom.model import XLoraForCausalLM

FORMAT = 1  # raised when answers change in a way that the rest of their identity does not show
_LOSS_ROWS = 256  # whose losses are kept at once


@dataclass(frozen=True)
class Watch:
    """Who wants to know how far an evaluation is.

    Args:
        system: called with a system and how many answers it lacks, before it starts.
        answered: called with how many more there are.
    """

    system: Callable[[System, int], None] = lambda system, missing: None
    answered: Callable[[int], None] = lambda count: None


@dataclass
class _Grader:
    """Grades, each computed once: the same answer to the same question comes from many systems."""

    known: dict[tuple[int, str], Grade] = field(default_factory=dict)

    def __call__(self, question: Question, answer: str) -> Grade:
        key = (id(question), answer)
        if key not in self.known:
            self.known[key] = question.grade(answer)
        return self.known[key]


def evaluate(
    model: XLoraForCausalLM,
    tokenizer: Any,
    tasks: Sequence[Task],
    systems: Sequence[System],
    *,
    output: Path | None = None,
    few_shot: int = 3,
    batch_tokens: int = BATCH_TOKENS,
    loss: bool = False,
    against: str | None = None,
    optional: Collection[str] = (),
    base: str | Path | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Greedy answers of all systems to all questions, graded.

    Args:
        output: answers are kept below it, in answers/<system>.jsonl: run again to go on. Answers under another model,
            training row or setting are put aside, and the evaluation's notes say so.
        few_shot: solved rows before the question, for the system that has some.
        batch_tokens: bound on rows times tokens of one forward.
        loss: take the mean loss of the right answers as well.
        against: a system that the others are compared with, in pairs.
        optional: systems that are left out, with a note, where they cannot be made, instead of ending the evaluation.
        base: that the model was put onto in place of the one it names; further models are put onto it too.

    Raises:
        ConfigError: nothing to compare, or `against` is none of the systems.
        XLoomError: one of its children names the row, the system or the file that is at fault.
    """
    if not tasks or not systems:
        raise ConfigError("expected at least one task and one system, found none")
    if against is not None and against not in {system.name for system in systems}:
        found = names((system.name for system in systems), 20)
        raise ConfigError(f"against={against!r}: expected one of the systems that are compared, found {found}")
    if repeated := sorted({task.name for task in tasks if [t.name for t in tasks].count(task.name) > 1}):
        raise ConfigError(f"task names must differ, found more than once: {names(repeated)}")
    bench = Bench(model.eval(), tokenizer, tuple(tasks), few_shot, batch_tokens, base)
    digests = {head: model_digest(model, head=head) for head in {system.reads_head for system in systems}}
    grade, notes, outcomes = _Grader(), list[str](), list[Outcome]()
    for system in systems:
        try:
            outcomes.append(
                _one(system, bench, digests[system.reads_head], output, loss, grade, notes, watch or Watch())
            )
        except _NotReadyError as error:
            if system.name not in optional:
                raise type(error.reason)(f"{system.name}: {error.reason}") from None
            notes.append(f"{system.name}: left out: {error.reason}")
    if not outcomes:
        raise ConfigError(f"none of the systems could be made ready; {notes[-1]}")
    return Evaluation(tuple(tasks), tuple(outcomes), model.experts, against, tuple(notes))


def _one(
    system: System,
    bench: Bench,
    digest: str,
    output: Path | None,
    loss: bool,
    grade: _Grader,
    notes: list[str],
    watch: Watch,
) -> Outcome:
    tasks = [task for task in bench.tasks if system.takes(bench, task)]
    if not tasks:
        known = names([task.name for task in bench.tasks], 20)
        raise _NotReadyError(DataError(f"expected what it needs for one task of {known} at least, found none"))
    if left := [task.name for task in bench.tasks if task not in tasks]:
        notes.append(f"{system.name}: lacks what it needs for {names(left, 20)}")
    questions = [question for task in tasks for question in task.questions]
    path = output / "answers" / file_name(system.name) if output is not None and system.kept else None
    with _preparing():
        identity = _identity(system, bench, digest)
    file = AnswerFile(path, identity, bench.setting)
    if file.replaced:
        notes.append(f"{system.name}: answered anew, as it differs from what was kept in: {names(file.replaced)}")
    with _preparing():
        asked = _Asked(questions, system, bench)
    _fill(system, bench, asked, file, loss, watch)
    columns, at = {}, 0
    for task in tasks:
        span = range(at, at + len(task.questions))
        at = span.stop
        kept = [file.answers[asked.keys[i]] for i in span]
        columns[task.name] = Column(
            kept=tuple(kept),
            grades=tuple(grade(q, k.text) for q, k in zip(task.questions, kept, strict=True)),
            losses=tuple(v for i in span if (v := file.losses.get(asked.loss_keys[i])) is not None) if loss else (),
        )
    borrowed = tuple(task.name for task in tasks if system.borrows(bench, task))
    if borrowed:
        how = f"the best of the {CANDIDATES} commonest answers to them"
        notes.append(f"{system.name}: chosen on the test questions of {names(borrowed, 20)}: {how}")
    return Outcome(system.name, system.about, columns, file.peak_mb, system.routes, borrowed)


class _Asked:
    """The questions of one system, as it sees them, with the names under which answers are kept."""

    def __init__(self, questions: Sequence[Question], system: System, bench: Bench) -> None:
        self.rows: list[Question] = system.rows(bench, questions)
        self.prompts: list[Prompt] = system.prompts(bench, self.rows)
        self.keys = [question_key(question, prompt) for question, prompt in zip(questions, self.prompts, strict=True)]
        self.loss_keys = [f"{key} {question.right}" for key, question in zip(self.keys, questions, strict=True)]


def _fill(system: System, bench: Bench, asked: _Asked, file: AnswerFile, loss: bool, watch: Watch) -> None:
    """Asks what is not known."""
    missing = [place for place, key in enumerate(asked.keys) if key not in file.answers]
    unmeasured = [place for place, key in enumerate(asked.loss_keys) if loss and key not in file.losses]
    watch.system(system, len(missing))
    if not missing and not unmeasured:
        return
    with PeakMemory(bench.model.device) as memory, ExitStack() as stack:
        with _preparing():
            ready = stack.enter_context(system.ready(bench))
        started = time.perf_counter()
        for batch in ready.answers([asked.rows[i] for i in missing], [asked.prompts[i] for i in missing]):
            each, started = (time.perf_counter() - started) / len(batch), time.perf_counter()
            kept = {
                asked.keys[missing[at]]: Kept(
                    answer.text, answer.tokens, _named(ready.experts, answer), each, answer.cut
                )
                for at, answer in batch.items()
            }
            file.add(kept)
            watch.answered(len(batch))
        for start in range(0, len(unmeasured), _LOSS_ROWS):
            some = unmeasured[start : start + _LOSS_ROWS]
            rows = [asked.rows[i] for i in some]
            found = ready.losses(rows, bench.encode(rows))
            if found is None:
                break
            file.add_losses({asked.loss_keys[i]: value for i, value in zip(some, found, strict=True)})
    if memory.mb is not None and any(file.answers[asked.keys[place]].tokens for place in missing):
        file.add_peak(memory.mb)


class _NotReadyError(Exception):
    """A system that cannot be made, and why: no fault of the questions or of the disk."""

    def __init__(self, reason: XLoomError) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def _preparing() -> Iterator[None]:
    try:
        yield
    except XLoomError as error:
        raise _NotReadyError(error) from error


def _named(experts: Sequence[str], answer: Answer) -> dict[str, float]:
    return {name: round(weight, 5) for name, weight in zip(experts, answer.weights)}


def _identity(system: System, bench: Bench, digest: str) -> dict[str, Any]:
    folder = system.folder()
    own = {} if folder is None else {"folder": folder_digest(folder)}
    return {"format": FORMAT, "system": system.name, "model": digest, **own, **system.settings(bench)}

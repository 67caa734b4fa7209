"""`eval`: tasks x systems, from words to tables and files."""

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xloom.benchmark.tables import check_target
from xloom.cli.common import load, pairs, write_result
from xloom.errors import ConfigError, XLoomError, names
from xloom.evaluation import Evaluation, System, Task, Watch, evaluate, find_systems, load_tasks
from xloom.evaluation.plot import check_plot, plot
from xloom.evaluation.registry import ALL, HEAD, check_words
from xloom.evaluation.report import WIDTH, costs, markdown, tables
from xloom.evaluation.results import MEAN
from xloom.evaluation.tasks import describe

BUILTIN = "builtin"
SHIPPED = "two-pass"  # the model that the built-in suite is about
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """What the command was given, as it was given."""

    model: str | None
    base: str | None = None
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    collapse: Path | None = None
    scorer: str | None = None
    limit: int | None = None
    few_shot: int = 3
    against: str | None = None
    loss: bool = False
    output: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    batch_tokens: int = 1024
    threads: int | None = None
    device: str = "cpu"
    dtype: str | None = None


def run(given: Settings) -> Evaluation:
    """Everything the command does. Raises XLoomError for what is wrong with its words, before anything heavy starts."""
    words = given.routers or (ALL,)
    for file in (given.json, given.markdown, given.plot):
        if file is not None:
            check_target(file)
    if given.plot is not None:
        check_plot(given.plot)
    if given.dtype is not None and given.dtype not in _DTYPES:
        raise ConfigError(f"--dtype {given.dtype}: expected one of {names(_DTYPES)}")
    path, shipped = (given.model, {}) if given.model else _shipped(given)
    models = shipped | {name: Path(place) for name, place in pairs("--model", given.models).items()}
    for name, place in models.items():
        if not place.is_dir():
            raise ConfigError(f"--model {name}={place}: expected the folder of an X-LoRA model")
    check_words([*words, *filter(None, [given.against])], models)
    if given.collapse is not None and not given.collapse.is_dir():
        raise ConfigError(f"--collapse {given.collapse}: expected a PEFT folder")
    console = Console(width=None if sys.stdout.isatty() else max(WIDTH, Console().width))
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    tasks = _tasks(given, console)
    model, tokenizer = load(path, given.base, console, dtype=given.dtype, device=given.device)
    systems = find_systems(words, model, collapse=given.collapse, models=models)
    named = {*words, *pairs("--model", given.models)}  # these must not be left out
    output = given.output or default_output(path)
    console.print(f"{describe(tasks)}; {len(systems)} systems; answers are kept in {output}", style="dim", markup=False)
    with watching(console, systems, sum(len(task.questions) for task in tasks)) as watch:
        found = evaluate(
            model,
            tokenizer,
            tasks,
            systems,
            output=output,
            few_shot=given.few_shot,
            batch_tokens=given.batch_tokens,
            loss=given.loss,
            against=given.against or _first_head(systems),
            optional={system.name for system in systems} - named,
            base=given.base,
            watch=watch,
        )
    _show(found, given, console)
    return found


def default_output(path: str) -> Path:
    """`runs/eval/<folder>-<8 digits of its whole path>`: two models of one name have answers apart."""
    place = Path(path).resolve()
    return Path("runs/eval") / f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def command() -> str:
    """The command line as it was typed, for pages that say how they were made."""
    return shlex.join(["xloom", *sys.argv[1:]])


def _show(found: Evaluation, given: Settings, console: Console) -> None:
    for table in tables(found, max(console.width, 60)):
        console.print(table)
        console.print()
    console.print(costs(found))
    for note in found.notes:
        console.print(note, style="yellow", markup=False)
    write_result(given.json, found.as_json())
    if given.markdown is not None:
        try:
            given.markdown.write_text(markdown(found, command()), encoding="utf-8")
        except OSError as error:
            raise XLoomError(f"{given.markdown}: cannot be written: {error.strerror}") from None
    if given.plot is not None:
        plot(found, given.plot)


# --- what is compared ---


def _tasks(given: Settings, console: Console) -> list[Task]:
    sources: dict[str, str | Path] = {}
    if given.suite is not None:
        if given.suite != BUILTIN:
            raise ConfigError(f"--suite {given.suite}: expected {BUILTIN}; your own tasks are --task name=file.jsonl")
        sources |= builtin_suite(console)
    own = pairs("--task", given.tasks)
    if taken := [name for name in own if name in sources or name == MEAN]:
        raise ConfigError(f"--task {taken[0]}: that name is taken; choose another")
    sources |= own
    if not sources:
        raise ConfigError(f"nothing to ask: pass --suite {BUILTIN}, or --task name=file.jsonl")
    if given.scorer is not None and ":" in given.scorer:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    return load_tasks(sources, scorer=given.scorer, limit=given.limit)


def builtin_suite(console: Console) -> dict[str, Path]:
    """Folders of the built-in suite by name: domains, then composites, the unseen family and the base's own manners."""
    from xloom.suite.shelf import SETS, rows_of

    with _bars(console) as progress:
        return {name: rows_of(name, progress=progress).test.parent for name in SETS}


def _shipped(given: Settings) -> tuple[str, dict[str, Path]]:
    """The folder of the model that the suite is about, and of the others that come with xloom, by name."""
    if given.suite is None:
        raise ConfigError("name the model to evaluate: xloom eval MODEL --task name=file.jsonl")
    from xloom.hub.shipped import model_folder, model_folders

    return str(model_folder(SHIPPED)), {name: place for name, place in model_folders().items() if name != SHIPPED}


def _first_head(systems: Sequence[System]) -> str | None:
    return next((system.name for system in systems if system.name == HEAD), None)


# --- on the way ---


@contextmanager
def watching(console: Console, systems: Sequence[System], questions: int) -> Iterator[Watch]:
    """A bar over all systems; a line for each of them, where there is no terminal."""
    if not console.is_terminal:
        yield Watch(lambda system, missing: console.print(f"{system.name}: {missing} to answer", markup=False))
        return
    with _bars(console) as progress:
        bar = progress.add_task("answering", total=len(systems) * questions)
        done = 0

        def on_system(system: System, missing: int) -> None:
            nonlocal done
            place = systems.index(system)
            done = max(done, (place + 1) * questions - missing)
            progress.update(bar, description=escape(system.name), completed=done)

        def on_answers(count: int) -> None:
            nonlocal done
            done += count
            progress.update(bar, completed=done)

        yield Watch(on_system, on_answers)
        progress.update(bar, completed=len(systems) * questions)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)

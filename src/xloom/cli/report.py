"""`report`: prompts or traces, from words to one HTML page."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from xloom.benchmark.tables import check_target
from xloom.cli.common import load, parse_router
from xloom.cli.evaluate import SHIPPED, command
from xloom.errors import ConfigError, TraceMismatchError
from xloom.report import Findings, check_plotly, find, read_again, read_asks, read_traces, write_report
from xloom.report.findings import Watch
from xloom.report.html import plain_name
from xloom.seeing.tracing import MAX_NEW_TOKENS

HEAD = "xlora"


@dataclass(frozen=True)
class Settings:
    """What the command was given, as it was given."""

    source: str
    output: Path
    model: str | None = None
    against: str | None = None
    base: str | None = None
    router: str = HEAD
    max_new_tokens: int = MAX_NEW_TOKENS
    limit: int | None = None
    worth: bool = True
    raw: bool = False


def run(given: Settings) -> Path:
    """Everything the command does. Raises XLoomError for what is wrong with its words, before a model is loaded."""
    check_target(given.output)
    check_plotly()
    console = Console()
    notes = []
    start = time.perf_counter()
    if Path(given.source).is_dir():
        if given.model or given.against or given.base or given.router != HEAD:
            raise ConfigError(f"{given.source}: holds traces; found options for prompts, which a model has to answer")
        findings = Findings(read_traces(Path(given.source), limit=given.limit))
        notes.append("Made from traces: what the experts add and are worth was not measured.")
    else:
        findings = _answered(given, console)
        if not given.worth:
            notes.append("What the experts are worth was not measured (--no-worth).")
        elif given.router != HEAD:
            notes.append("What the experts are worth is measured of the head alone, and so not with another router.")
    found = time.perf_counter()
    with console.status("writing the page"):
        write_report(findings, given.output, command=command(), notes=notes)
    before, after = found - start, time.perf_counter() - found
    size, count = given.output.stat().st_size / 1e6, len(findings.traces)
    steps = "opening traces" if Path(given.source).is_dir() else "loading models, answering and measuring"
    told = (
        f"{given.output}: {count} text{'s' if count != 1 else ''}, {size:.1f} MB; "
        f"{steps} took {before:.1f} s, making the page of them {after:.1f} s"
    )
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return given.output


def _answered(given: Settings, console: Console) -> Findings:
    asks = read_asks(given.source, limit=given.limit, raw=given.raw)
    path = given.model or _shipped()
    model, tokenizer = load(path, given.base, console)
    chosen = parse_router(given.router, model.experts)
    with _watching(console) as watch:
        found = find(
            model, tokenizer, asks, max_new_tokens=given.max_new_tokens, models=[plain_name(path)],
            measure_worth=given.worth and given.router == HEAD, routing=chosen, watch=watch,
        )  # fmt: skip
    if given.against is None:
        return found
    second, its_tokenizer = load(given.against, given.base, console)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise TraceMismatchError(f"--against {given.against}: expected the tokenizer of {path}, found another")
    with _watching(console) as watch:
        against = read_again(second, found.traces, watch, parse_router(given.router, second.experts))
    return replace(found, against=against, models=_names(path, given.against))


def _names(*paths: str) -> list[str]:
    """Two folders of one name are told apart by what stands before it."""
    found = [plain_name(path) for path in paths]
    if len(set(found)) < len(found):
        found = ["/".join(Path(path).parts[-2:]) for path in paths]
    return found if len(set(found)) == len(found) else ["first", "second"]


def _shipped() -> str:
    from xloom.hub.shipped import model_folder

    return str(model_folder(SHIPPED))


@contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    """A bar for each stage; a line for each of them, where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stages: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                for task in stages.values():
                    progress.update(task, completed=progress.tasks[task].total)
                stages[stage] = progress.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(stage, style="dim")
            progress.update(stages[stage], completed=done)

        yield watch
        for task in stages.values():
            progress.update(task, completed=progress.tasks[task].total)

"""An evaluation for reading: tables for the terminal, and a whole page of Markdown.

Takes an `Evaluation`; knows nothing of how it came about.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table
from rich.text import Text

from xloom.evaluation.bench import FREE_TOKENS, SLACK
from xloom.evaluation.registry import HEAD
from xloom.evaluation.results import MEAN, Evaluation, Outcome
from xloom.evaluation.shots import CANDIDATES
from xloom.evaluation.statistics import RESAMPLES, Interval

WIDTH = 100  # columns of a terminal that tables fit into
_CELL = 9  # of a column of figures: 100.0 ±10
_GAP = 1
_LIBRARIES = ("xloom", "torch", "transformers", "peft", "numpy")


def tables(found: Evaluation, width: int = WIDTH) -> list[Table]:
    """Systems down, columns across, in per cent with half the 95 % interval; wide ones folded, the means first."""
    label = min(max(len(o.system) for o in found.outcomes), 30)
    parts: list[list[str]] = []
    room = 0
    for heading in _headings(found):
        need = _width(heading) + _GAP
        if not parts or need > room:
            parts.append([])
            room = width - label - _GAP
        parts[-1].append(heading)
        room -= need
    return [_table(found, part, label, first=not number) for number, part in enumerate(parts)]


def costs(found: Evaluation) -> Table:
    """What each system cost: speed and memory; and how many of its answers had no more tokens."""
    table = Table(title="speed and memory", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("rows/s", "tokens/s", "peak MB", "cut short, %", "right expert leads, %"):
        table.add_column(heading, justify="right")
    leads = {row["router"]: row["score"] for row in found.rows() if _is(row, MEAN, "routing_accuracy")}
    for outcome in found.outcomes:
        table.add_row(
            outcome.system,
            _plain(outcome.rows_per_second, 1),
            _plain(outcome.tokens_per_second, 1),
            _plain(outcome.peak_mb, 0),
            _percent(outcome.cut),
            _percent(leads.get(outcome.system)),
        )
    return table


def markdown(found: Evaluation, command: str, about: Sequence[str] = ()) -> str:
    """A page that says what was found, how, and with what; without a date, so that the same run gives the same page.

    Args:
        command: what makes the page.
        about: further lines on model and data.
    """
    sections = [
        ["# Results", "", *about, *_asked(found), "", "Made by", "", f"    {command}", "", f"with {_versions()}."],
        ["## Scores", "", *_score_lines(found)],
        ["## Oracle-normalised mean", "", *_oracle_lines(found)],
        _difference_lines(found),
        _part_lines(found),
        _error_lines(found),
        _routing_lines(found),
        ["## Speed and memory", "", *_cost_lines(found)],
        ["## Systems", "", *_grid(["system", "what it is"], ([o.system, o.about] for o in found.outcomes))],
        ["## Method", "", *_method(found)],
        ["## Notes", "", *(f"- {note}" for note in found.notes)] if found.notes else [],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


# --- terminal ---


def _headings(found: Evaluation) -> list[str]:
    """`mean`, `of oracle`, then the columns."""
    first = [MEAN] if len(found.means) > 1 else []
    if any(found.normalised(o.system) for o in found.outcomes):
        first.append("of oracle")
    return [*first, *found.columns]


def _width(heading: str) -> int:
    return min(max(_CELL, len(heading)), 20)


def _value(found: Evaluation, heading: str, system: str) -> Interval | None:
    if heading == MEAN:
        return found.score(system)
    return found.normalised(system) if heading == "of oracle" else found.score(system, heading)


def _table(found: Evaluation, headings: Sequence[str], label: int, *, first: bool) -> Table:
    title = "score, % (± half the 95 % interval; best in bold)" if first else None
    table = Table(title=title, title_justify="left", box=None, padding=(0, _GAP, 0, 0))
    table.add_column("", min_width=label, max_width=label, overflow="fold")
    for heading in headings:
        size = _width(heading)
        table.add_column(heading, justify="right", min_width=size, max_width=size, overflow="fold")
    best = {heading: _best(found, heading) for heading in headings}
    for outcome in found.outcomes:
        cells = []
        for heading in headings:
            value = _value(found, heading, outcome.system)
            text = "-" if value is None else f"{100 * value.value:.1f} ±{100 * value.half:.0f}"
            cells.append(Text(text, style="bold" if outcome.system in best[heading] else ""))
        table.add_row(Text(outcome.system, style="bold" if outcome.system == HEAD else ""), *cells)
    return table


def _best(found: Evaluation, heading: str) -> set[str]:
    values = {outcome.system: _value(found, heading, outcome.system) for outcome in found.outcomes}
    columns = {MEAN: found.means, "of oracle": found.domains}.get(heading, (heading,))
    return found.best(values, columns)


# --- Markdown ---


def _score_lines(found: Evaluation) -> Iterator[str]:
    headings = [heading for heading in _headings(found) if heading != "of oracle"]
    best = {heading: _best(found, heading) for heading in headings}

    def cells(outcome: Outcome) -> Iterator[str]:
        yield outcome.system
        for heading in headings:
            text = _interval(_value(found, heading, outcome.system))
            yield f"**{text}**" if outcome.system in best[heading] else text

    aside = "the Oracle and what was chosen on the questions themselves aside"
    yield f"Per cent, with 95 % bootstrap intervals; the best of a column, {aside}, in bold."
    yield ""
    yield from _grid(["system", *headings], (list(cells(o)) for o in found.outcomes))


def _oracle_lines(found: Evaluation) -> Iterator[str]:
    values = {o.system: found.normalised(o.system) for o in found.outcomes}
    ranked = sorted(((v, name) for name, v in values.items() if v is not None), key=lambda pair: -pair[0].value)
    if not ranked:
        yield "Not taken: it needs the system `oracle`, and tasks named after the experts."
        return
    yield (
        f"Mean over {', '.join(found.domains)} of a system's score divided by the score of the right expert of each "
        "question, in per cent, with paired bootstrap intervals."
    )
    yield ""
    yield from _grid(["system", "of the Oracle"], ([name, _interval(value)] for value, name in ranked))


def _difference_lines(found: Evaluation) -> list[str]:
    rows = [row for row in found.rows() if _is(row, MEAN, "difference") and row["router"] != found.against]
    if not rows:
        return []
    lines = [[row["router"], _points(row), "yes" if row["low"] > 0 or row["high"] < 0 else "no"] for row in rows]
    return [
        f"## Against {found.against}",
        "",
        f"Difference of the mean score to that of `{found.against}`, in points, paired question by question; "
        "they differ where the interval leaves out 0.",
        "",
        *_grid(["system", "difference", "differ"], lines),
    ]


def _part_lines(found: Evaluation) -> list[str]:
    """A table for each column that has several kinds of questions."""
    rows = found.rows()
    lines: list[str] = []
    for task in found.tasks:
        if not task.parts:
            continue
        counts = {part: sum(q.task == part for q in task.questions) for part in task.parts}
        by_system: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["domain"] == task.name and row["task"] is not None and row["metric"] == "score":
                by_system.setdefault(row["router"], {})[row["task"]] = _percent(row["score"])
        header = ["system", *(f"{part} ({count})" for part, count in counts.items())]
        body = ([system, *(cells.get(part, "") for part in counts)] for system, cells in by_system.items())
        lines += ["", f"### {task.name}", "", *_grid(header, body)]
    return ["## By kind of question", "", "Per cent; the number of questions in brackets.", *lines] if lines else []


def _error_lines(found: Evaluation) -> list[str]:
    rows = [row for row in found.rows() if row["metric"] in {"mae", "r2"}]
    kinds = list(dict.fromkeys((row["domain"], row["task"]) for row in rows))
    if not kinds:
        return []
    lines = []
    for system in dict.fromkeys(row["router"] for row in rows):
        own = {(row["domain"], row["task"], row["metric"]): row for row in rows if row["router"] == system}
        cells = [system]
        for kind in kinds:
            mae, r2 = own.get((*kind, "mae")), own.get((*kind, "r2"))
            text = "" if mae is None or r2 is None else f"{_plain(mae['score'], 3)}, {_plain(r2['score'], 2)}"
            cells.append(text + (f" ({mae['unreadable']} unreadable)" if mae and mae["unreadable"] else ""))
        lines.append(cells)
    return [
        "## Numbers",
        "",
        "Mean absolute error and R2. An answer without a number counts as the mean of the right ones.",
        "",
        *_grid(["system", *(f"{domain}: {task}" for domain, task in kinds)], lines),
    ]


def _routing_lines(found: Evaluation) -> list[str]:
    rows = [row for row in found.rows() if row["metric"] == "routing_accuracy"]
    if not rows:
        return []
    headings = list(dict.fromkeys(row["domain"] for row in rows if row["domain"] != MEAN))
    by_system: dict[str, dict[str, str]] = {}
    for row in rows:
        by_system.setdefault(row["router"], {})[row["domain"]] = _percent(row["score"])
    body = ([name, cells.get(MEAN, ""), *(cells.get(h, "") for h in headings)] for name, cells in by_system.items())
    return [
        "## Routing",
        "",
        "Share of questions, in per cent, for which the right expert is the one with the largest mean scaling over the "
        "answer's tokens and all sites. `all` pools the questions of all columns.",
        "",
        *_grid(["system", "all", *headings], body),
    ]


def _cost_lines(found: Evaluation) -> Iterator[str]:
    yield (
        "Batched; reading the prompts included, loading and fitting not. Memory is the most that the process held "
        "while a system answered, with libraries and all loaded models in it (on CUDA: tensors on the device). Answers "
        "that are cut short did not end by themselves: they had no more tokens."
    )
    yield ""
    header = ["system", "questions per second", "new tokens per second", "peak MB", "cut short, %"]
    yield from _grid(
        header,
        (
            [
                o.system,
                _plain(o.rows_per_second, 1),
                _plain(o.tokens_per_second, 1),
                _plain(o.peak_mb, 0),
                _percent(o.cut),
            ]
            for o in found.outcomes
        ),
    )


def _asked(found: Evaluation) -> Iterator[str]:
    counts = ", ".join(f"{task.name} {len(task.questions)}" for task in found.tasks)
    yield f"Questions: {counts}."


def _method(found: Evaluation) -> Iterator[str]:
    yield (
        f"- Greedy answers in batches. An answer may have {SLACK} tokens more than the longest right one of the same "
        f"kind (with the scorer `contains` at least {FREE_TOKENS}), or as many as its row says (`max_new_tokens`). In "
        "plain text `few-shot` ends where the next solved question would begin."
    )
    yield (
        "- A score is what the row's scorer gives, 0 to 1, as a mean over the column's questions; the mean is one over "
        f"{', '.join(found.means)}, each counting alike."
    )
    yield (
        f"- Intervals: percentiles of {RESAMPLES} bootstrap resamples of the questions of each column, the same for "
        "all systems. They say how much depends on which questions were asked, not on the seed of a training."
    )
    yield "- `oracle` is told the domain of each question; where a question needs several experts it weighs them alike."
    yield (
        f"- `constant` is, of the {CANDIDATES} commonest answers, the one that does best on training rows of the same "
        "kind; where there are none, on the questions themselves. The notes name such columns; it is not bold there."
    )


def _interval(value: Interval | None) -> str:
    if value is None:
        return ""
    return f"{100 * value.value:.1f} ({100 * value.low:.1f}-{100 * value.high:.1f})"


def _points(row: dict[str, Any]) -> str:
    value, low, high = (f"{round(100 * row[key], 1) + 0.0:+.1f}" for key in ("score", "low", "high"))  # no -0.0
    return f"{value} ({low} to {high})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _is(row: dict[str, Any], domain: str, metric: str) -> bool:
    return bool(row["domain"] == domain and row["metric"] == metric)


def _grid(header: Sequence[str], lines: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for cells in lines:
        yield f"| {' | '.join(cells)} |"


def _versions() -> str:
    found = []
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)

"""What a finished run says of itself: `report.md` and `report.html`, made from its record alone.

    write_report(record, folder)      both files; the same record gives the same bytes
    warnings_of(record)               what looks wrong, in plain words (of `findings.py`)

A part of the record that is missing leaves its part of the report out; nothing is guessed. All losses are per
completion token, in nats. Knows nothing of models, of training, or of where the record comes from.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from xloom.training.findings import SEEN, SMALLEST_GAP, Facts, mapping, numbers, percent, warnings_of
from xloom.training.plots import COLOURS, GREY, Chart, draw

__all__ = ["charts_of", "summary_of", "warnings_of", "write_report"]

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of a row its name; `heat` in 0..1 for the others."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heat: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Bar:
    """One bar: [(share of the width, colour), ...], and the same in words."""

    name: str
    parts: Sequence[tuple[float, str]]
    words: str


@dataclass(frozen=True)
class Section:
    """One heading with what stands below it. `bars` has a `legend`: name, colour and dash."""

    title: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    bars: Sequence[Bar] = ()
    legend: Sequence[tuple[str, str, str]] = ()


def write_report(record: Mapping[str, Any], folder: Path) -> None:
    """Writes `report.md` and `report.html`, the latter one file that loads nothing else.

    Args:
        record: of a run, as in its training.json; at least recipe, steps and losses.
        folder: exists. The title is the name of the recipe's output, as the folder may be a temporary one.
    """
    facts = Facts(record)
    settings = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True)
    makers = (_losses_section, _use_section, _entropy_section, _rows_section)
    words = {
        "title": Path(str(facts.recipe.get("output", ""))).name or folder.name,
        "summary": summary_of(record),
        "warnings": warnings_of(record),
        "charts": charts_of(record),
        "curves": _curves_table(charts_of(record)),
        "sections": [section for maker in makers if (section := maker(facts))],
        "settings": settings,
        "fence": _fence(settings),
        "versions": _versions_table(facts),
    }
    for name in ("report.md", "report.html"):
        (folder / name).write_text(_pages().get_template(f"{name}.j2").render(words), encoding="utf-8")


@cache
def _pages() -> Environment:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.globals["draw"] = lambda chart: Markup(draw(chart))  # escaped by whoever wrote the SVG
    pages.filters["md"] = _markdown
    return pages


def summary_of(record: Mapping[str, Any]) -> str:
    """What was trained on what, for how long, and with what result, as one paragraph."""
    facts = Facts(record)
    return " ".join([_what_was_done(facts), *_what_came_out(facts)])


def _what_was_done(facts: Facts) -> str:
    recipe, rows = facts.recipe, facts.rows_of("train")
    rank = mapping(recipe.get("lora")).get("r")
    experts = f"{_count(len(facts.experts), 'expert')} ({', '.join(facts.experts)})" if facts.experts else "experts"
    text = f"A head that mixes {experts}" if facts.is_head else "A LoRA expert" + (f" of rank {rank}" if rank else "")
    text += f" on the base model {recipe['base']}" if "base" in recipe else ""
    text += f" was trained for {_count(facts.scalars.get('steps', len(facts.losses)), 'step')}"
    if "items" in rows:
        domains = mapping(recipe.get("data")) or mapping(mapping(facts.rows.get("train")).get("domains"))
        text += f" on {_count(rows['items'], 'row')}" + (f" of {_count(len(domains), 'domain')}" if domains else "")
    if "seconds" in facts.scalars:
        text += f" in {_duration(facts.scalars['seconds'])}"
    processes = facts.machine.get("processes", 1)
    speed = facts.scalars.get("tokens_per_second")
    notes = [str(facts.machine["device"])] if facts.machine.get("device") else []
    notes += [f"{processes} processes"] if processes != 1 else []
    notes += [f"{speed:,.0f} tokens per second"] if speed is not None else []
    text += f" ({', '.join(notes)})." if notes else "."
    best = facts.scalars.get("best_step")
    if facts.stopped_early:
        text += " It stopped early, as validation no longer improved."
    return text + (f" Validation was best at step {best:g}." if best is not None else "")


def _what_came_out(facts: Facts) -> Iterator[str]:
    end, base = facts.overall.model, facts.overall.base
    if end is not None:
        flat = facts.overall.uniform
        against = f", against {base:.3f} of the base model alone" if base is not None else ""
        against += f" and {flat:.3f} of all experts mixed alike" if base is not None and flat is not None else ""
        yield f"Its validation loss per completion token is {end:.3f}{against}."
    closed = [(s.closed, s.domain) for s in facts.standings if s.closed is not None]
    if closed:
        mean = sum(share for share, _ in closed) / len(closed)
        least = f" (mean of {len(closed)} domains; least in {min(closed)[1]}, {percent(min(closed)[0])})"
        yield (
            f"It closes {percent(mean)} of the gap between the base and each domain's own expert"
            f"{least if len(closed) > 1 else ''}."
        )
    right = facts.end.get("routing_accuracy")
    if right is not None:
        chance = f" (chance: {percent(1 / len(facts.experts))})" if facts.experts else ""
        yield f"{percent(right)} of the labelled validation rows go to their own expert{chance}."


def charts_of(record: Mapping[str, Any]) -> list[Chart]:
    """The curves of a run; validations make one from the second on."""
    facts = Facts(record)
    parts = {name.replace("_", " "): points for name, points in facts.parts.items()}
    totals = {"total": facts.losses} | (parts if len(parts) > 1 else {})
    losses = {s.domain: facts.curve(f"loss_{s.domain}") for s in facts.standings} | {"all rows": facts.curve("loss")}
    return [
        Chart(title, lines, "share" if title == "Routing accuracy" else "number", noisy=title == "Training loss")
        for title, every in {
            "Training loss": totals,
            "Validation loss": losses,
            "Routing accuracy": {"accuracy": facts.curve("routing_accuracy")},
            "Learning rate": {"learning rate": facts.rates},
        }.items()
        if (lines := {name: points for name, points in every.items() if len(points) > 1})
    ]


def _curves_table(charts: Sequence[Chart]) -> Table | None:
    rows = [
        (f"{chart.title}: {name}" if len(chart.lines) > 1 else chart.title,
         *(f"{y:.4g} (step {x:g})" for x, y in (points[0], points[len(points) // 2], points[-1])))
        for chart in charts
        for name, points in chart.lines.items()
    ]  # fmt: skip
    return Table(("curve", "first", "middle", "last"), rows) if rows else None


def _losses_section(facts: Facts) -> Section | None:
    standings = [*facts.standings, *([facts.overall] if facts.overall.model is not None else [])]
    named = {"base": "base", "uniform": "uniform", "own expert": "own", "this model": "model"}
    named = {title: name for title, name in named.items() if any(getattr(s, name) is not None for s in standings)}
    closed = any(s.closed is not None for s in standings)
    rows = [
        (s.domain or "all rows", *(_decimal(getattr(s, name)) for name in named.values()),
         *([percent(s.closed) if s.closed is not None else NONE] if closed else []))
        for s in standings
    ]  # fmt: skip
    notes = ["Mean loss per completion token, in nats; lower is better. Base: the base model alone."]
    notes[0] += " Uniform: all experts mixed alike." if "uniform" in named else ""
    if closed:
        notes.append(
            "Gap closed: 0 % is as good as the base, 100 % as good as the domain's own expert alone, more is better "
            f"than that. It is left out where that expert is not at least {SMALLEST_GAP:g} better than the base."
        )
    columns = ("domain" if facts.standings else "", *named, *(["gap closed"] if closed else []))
    title = "Validation loss by domain" if facts.standings else "Validation loss"
    return Section(title, [Table(columns, rows)], notes) if rows else None


def _use_section(facts: Facts) -> Section | None:
    if not facts.use:
        return None
    rest = {domain: 1 - sum(u.values()) for domain, u in facts.use.items()}
    has_rest = facts.shares and max(rest.values()) > SEEN
    show = (lambda v: percent(v, 1)) if facts.shares else _decimal
    rows = [
        (domain, *(show(u[n]) if n in u else NONE for n in facts.experts), *([show(rest[domain])] if has_rest else []))
        for domain, u in facts.use.items()
    ]
    columns = ("domain", *facts.experts, *(["no expert"] if has_rest else []))
    notes = ["Mean scaling of every expert over the validation rows of a domain, all tokens and sites."]
    if not facts.shares:
        return Section("Use of the experts", [Table(columns, rows)], notes)
    if has_rest:
        notes.append("No expert: what the null expert took or top-k cut off.")
    heat = [[u.get(n, 0.0) for n in facts.experts] + [0.0] * has_rest for u in facts.use.values()]
    bars, legend = _bars(facts)
    return Section("Use of the experts", [Table(columns, rows, heat)], notes, bars, legend)


def _bars(facts: Facts) -> tuple[list[Bar], list[tuple[str, str, str]]]:
    """A bar per domain; experts past the last colour, the least used ones, share one grey."""
    total = {n: sum(u.get(n, 0) for u in facts.use.values()) for n in facts.experts}
    shown = sorted(facts.experts, key=lambda n: -total[n])[: len(COLOURS)]
    colours = dict(zip([n for n in facts.experts if n in shown], COLOURS))
    others = len(facts.experts) - len(shown)
    bars = []
    for domain, use in facts.use.items():
        parts = [(use.get(name, 0.0), colour) for name, colour in colours.items()]
        parts += [(sum(v for n, v in use.items() if n not in colours), GREY)] if others else []
        words = ", ".join(f"{name} {percent(value)}" for name, value in use.items())
        bars.append(Bar(domain, parts, f"{domain}: {words}"))
    legend = [(name, colour, "solid") for name, colour in colours.items()]
    return bars, legend + ([(f"{others} others", GREY, "solid")] if others else [])


def _entropy_section(facts: Facts) -> Section | None:
    if not facts.entropy:
        return None
    count = len(facts.experts)
    most = math.log(count) if count > 1 else None
    rows = [(d, _decimal(v), *([percent(v / most)] if most else [])) for d, v in facts.entropy.items()]
    columns = ("domain", "entropy in nats", *(["of the largest"] if most else []))
    largest = f"log {count} = {most:.3f}" if most else "log N"
    note = f"Mean entropy of the scalings per token and site: 0 = always one expert; {largest} = all alike."
    return Section("Entropy of the gate", [Table(columns, rows)], [note])


def _rows_section(facts: Facts) -> Section | None:
    parts = {name: facts.rows_of(part) for part, name in (("train", "training"), ("valid", "validation"))}
    if not any(parts.values()):
        return None
    counts = ("empty", "too_long", "items", "duplicates")
    rows = []
    for name, rows_of in parts.items():
        read = sum(rows_of[c] for c in counts[:3]) if all(c in rows_of for c in counts[:3]) else None
        rows.append((name, *(f"{v:,.0f}" if v is not None else NONE for v in (read, *map(rows_of.get, counts)))))
    tables = [Table(("rows", "read", "empty, left out", "too long, left out", "kept", "duplicates among them"), rows)]
    domains = [numbers(mapping(facts.rows.get(part)).get("domains")) for part in ("train", "valid")]
    names = dict.fromkeys(name for found in domains for name in found)
    if names:
        rows = [(n, *(f"{found[n]:,.0f}" if n in found else NONE for found in domains)) for n in names]
        tables.append(Table(("kept rows by domain", "training", "validation"), rows))
    overlap = numbers(facts.rows).get("overlap")
    notes = [] if overlap is None else [f"Validation rows that are among the training rows too: {overlap:,.0f}."]
    return Section("Rows", tables, notes)


def _versions_table(facts: Facts) -> Table | None:
    rows = [(name, str(version)) for name, version in facts.versions.items()]
    return Table(("package", "version"), rows) if rows else None


# --- numbers and text ---


def _decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _count(number: float, noun: str) -> str:
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line, also inside a table."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)

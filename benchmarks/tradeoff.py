"""Speed against accuracy: the shipped models and cheaper ways to write with them, in one table and one plot.

    python benchmarks/tradeoff.py --json benchmarks/results/tradeoff.json --plot docs/tradeoff.svg

Quality: greedy answers to validation questions of the suite, scored as `xloom eval` scores them and divided by the
score of the right expert (Oracle), domain by domain; `joined` questions need two experts and stand alone. Speed: a
token after the first in texts of fixed length, relative to the base on the same prompt. One sequence at a time.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import xloom
from xloom import XLoraForCausalLM, routers
from xloom.benchmark.systems import Decoded, System, of_models
from xloom.benchmark.tables import BASE
from xloom.benchmark.timing import load, machine, spread
from xloom.evaluation import Bench, Question, load_tasks
from xloom.evaluation.statistics import Comparison
from xloom.hub.shipped import model_folder
from xloom.seeing.plots import COLOURS, GREY, save, styled
from xloom.suite.shelf import rows_of

DOMAINS = ("quantum", "physical", "structure", "materials", "peptides", "mechanics", "reasoning")
COMPOSITE, ORACLE = "joined", "oracle"
TWO, ONE = "two-pass", "single-pass"


@dataclass(frozen=True)
class Way:
    """One way to write with one of the models.

    Args:
        custom: makes what `generate` takes as `custom_generate`.
        router: who decides while it writes.
        same_as: the way whose text it must give.
    """

    model: str
    custom: Callable[[], Any] | None = None
    router: routers.Router = field(default_factory=routers.XLora)
    same_as: str | None = None


WAYS = {
    "two passes": Way(TWO),
    "two passes, drafts": Way(TWO, xloom.speculative, same_as="two passes"),
    "refreshed every 4": Way(TWO, lambda: xloom.refreshing(4)),
    "refreshed every 16": Way(TWO, lambda: xloom.refreshing(16)),
    "frozen after the prompt": Way(TWO, xloom.refreshing),
    "single pass": Way(ONE),
    "single pass, drafts": Way(ONE, xloom.speculative, same_as="single pass"),
    "single pass, top 1": Way(ONE, router=routers.XLora(top_k=1)),
}


@dataclass
class Bed:
    """What all ways share."""

    models: dict[str, XLoraForCausalLM]
    tokenizer: Any
    base: System
    bench: Bench

    @contextmanager
    def system(self, name: str) -> Iterator[System]:
        way = WAYS[name]
        with self.models[way.model].routing(way.router):
            yield System(name, self.models[way.model], way=way.custom)

    def answer(self, system: System, question: Question) -> str:
        (prompt,) = self.bench.prompts([question])
        found = system.decode(torch.tensor([prompt.ids]), prompt.max_new_tokens, stop=True)
        text: str = self.tokenizer.decode(found.tokens, skip_special_tokens=True)
        return text


def prepare(rows: int) -> Bed:
    models = {name: XLoraForCausalLM.from_pretrained(model_folder(name)) for name in (TWO, ONE)}
    tokenizer = AutoTokenizer.from_pretrained(model_folder(TWO))
    folders = {name: rows_of(name).valid for name in (*DOMAINS, COMPOSITE)}
    tasks = load_tasks(folders, limit=rows)
    base = of_models({TWO: models[TWO]})[BASE]
    return Bed(models, tokenizer, base, Bench(models[TWO], tokenizer, tuple(tasks)))


def qualities(bed: Bed) -> dict[str, dict[str, list[float]]]:
    """Scores by domain and way."""
    scores: dict[str, dict[str, list[float]]] = {}
    for task in bed.bench.tasks:
        own = scores[task.name] = {}
        plain = System(ORACLE, bed.models[TWO])
        own[ORACLE] = []
        for question in task.questions:
            with bed.models[TWO].routing(routers.Single(question.experts[0])):
                own[ORACLE].append(question.grade(bed.answer(plain, question)).score)
        for name, way in WAYS.items():
            if way.same_as is None:
                with bed.system(name) as system:
                    own[name] = [question.grade(bed.answer(system, question)).score for question in task.questions]
        print(f"{task.name}: " + ", ".join(f"{name} {100 * np.mean(own[name]):.0f}" for name in own), flush=True)
        own |= {name: own[way.same_as] for name, way in WAYS.items() if way.same_as is not None}
    return scores


def paces(bed: Bed, prompts: int, new_tokens: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """For each way, ratios to the base of the time per token; and tokens per forward of those who draft.

    Raises:
        RuntimeError: a way gave another text than it must.
    """
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    forwards: dict[str, list[float]] = {name: [] for name in WAYS}
    turn = 0
    for task in bed.bench.tasks:
        for number, question in enumerate(task.questions[:prompts]):
            turn += 1
            ids = torch.tensor([bed.bench.prompts([question])[0].ids])
            found: dict[str, Decoded] = {}
            order = [BASE, *WAYS]
            for name in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody is always first
                if name == BASE:
                    found[name] = bed.base.decode(ids, new_tokens)
                else:
                    with bed.system(name) as system:
                        found[name] = system.decode(ids, new_tokens)
            for name, way in WAYS.items():
                if way.same_as is not None and found[name].tokens != found[way.same_as].tokens:
                    raise RuntimeError(
                        f"{task.name}, prompt {number + 1}: {name} wrote another text than {way.same_as}"
                    )
                ratios[name].append(found[name].s_per_token / found[BASE].s_per_token)
                tally = found[name].tally
                if tally is not None and way.same_as is not None:
                    forwards[name].append(tally.tokens_per_forward)
        print(f"{task.name}: " + ", ".join(f"{n} {median(r):.2f}x" for n, r in ratios.items()), flush=True)
    return ratios, forwards


def rows_from(scores: dict[str, Any], ratios: dict[str, list[float]], forwards: dict[str, list[float]]) -> list[Any]:
    compared = Comparison({task: {n: np.array(v) for n, v in own.items()} for task, own in scores.items()})
    rows = []
    for name in WAYS:
        pace = spread(ratios[name])
        quality, joined = compared.normalised(DOMAINS, name, ORACLE), compared.cell(COMPOSITE, name)
        change = compared.difference(DOMAINS, name, "two passes")
        rows.append(
            {
                "way": name, "ratio_to_base": pace.median, "ratio_low": pace.low, "ratio_high": pace.high,
                "oracle_normalised": quality.value, "low": quality.low, "high": quality.high,
                "less_two_passes": change.value, "less_low": change.low, "less_high": change.high,
                "joined": joined.value, "joined_low": joined.low, "joined_high": joined.high,
                "tokens_per_forward": median(forwards[name]) if forwards[name] else None,
            }
        )  # fmt: skip
    return rows


@styled
def draw(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Quality by time per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = (("oracle_normalised", "low", "high", "score, % of the right expert's", 60),
              ("joined", "joined_low", "joined_high", "score on questions for two experts, %", 0))  # fmt: skip
    *plots, key = figure.subplots(1, 3, width_ratios=(1, 1, 0.62))
    for axes, (value, low, high, title, least) in zip(plots, panels, strict=True):
        for number, row in enumerate(rows, start=1):
            way = WAYS[row["way"]]
            colour = COLOURS[0] if way.model == TWO else COLOURS[4]
            x, y = row["ratio_to_base"], 100 * row[value]
            axes.plot([x, x], [100 * row[low], 100 * row[high]], color=colour, linewidth=0.8, alpha=0.4)
            axes.plot([row["ratio_low"], row["ratio_high"]], [y, y], color=colour, linewidth=0.8, alpha=0.4)
            filled = way.same_as is None
            axes.plot(x, y, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=8)
            inside = "white" if filled else colour
            axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=6, color=inside)
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_title(title)
        axes.set_ylim(bottom=least)
        axes.set_xlabel("time per token, times the base")
    key.axis("off")
    for number, row in enumerate(rows, start=1):
        colour = COLOURS[0] if WAYS[row["way"]].model == TWO else COLOURS[4]
        key.text(0, 1 - 0.09 * number, f"{number}  {row['way']}", color=colour, transform=key.transAxes)
    note = "blue: two-pass model\nred: single-pass model\nopen: drafts, same text"
    key.text(0, 0, note, fontsize=7, transform=key.transAxes)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20, help="questions of each domain that are scored")
    parser.add_argument("--prompts", type=int, default=2, help="of each domain whose speed is taken")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--draw", action="store_true", help="only draw what --json holds")
    chosen = parser.parse_args()
    if chosen.draw:
        save(draw(json.loads(chosen.json.read_text(encoding="utf-8"))["rows"]), chosen.plot)
        return
    torch.set_num_threads(chosen.threads)
    bed = prepare(chosen.rows)
    about = machine("cpu")
    ratios, forwards = paces(bed, chosen.prompts, chosen.new_tokens)
    about["load_after"] = load()
    rows = rows_from(qualities(bed), ratios, forwards)
    for row in rows:
        print(
            f"{row['way']:28s} {row['ratio_to_base']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})  "
            f"{100 * row['oracle_normalised']:.1f} % of Oracle ({100 * row['low']:.1f}-{100 * row['high']:.1f})  "
            f"less two passes {100 * row['less_two_passes']:+.1f} ({100 * row['less_low']:+.1f} to "
            f"{100 * row['less_high']:+.1f})  joined {100 * row['joined']:.1f}"
        )
    if chosen.json:
        settings = {"rows": chosen.rows, "prompts": chosen.prompts, "new_tokens": chosen.new_tokens}
        report = {"what": "tradeoff", "machine": about, "settings": settings, "rows": rows}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if chosen.plot:
        save(draw(rows), chosen.plot)


if __name__ == "__main__":
    main()

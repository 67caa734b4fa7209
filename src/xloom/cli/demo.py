"""`demo`: the whole path on the built-in base, with experts that are shipped and a head trained on the spot."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from xloom.cli.common import encode, load_tokenizer, quiet
from xloom.cli.evaluate import watching
from xloom.cli.text import Sampling, colour, share_table, write_one
from xloom.evaluation import Evaluation, Task, evaluate, find_systems, load_tasks
from xloom.evaluation.report import WIDTH, tables
from xloom.hub.base_model import BUILTIN_BASE, builtin_base
from xloom.hub.shipped import expert_folders, model_folder
from xloom.model import XLoraForCausalLM
from xloom.suite.domains import DOMAINS, DomainFiles, build_suite
from xloom.suite.items import join_questions
from xloom.training.head import train_head
from xloom.training.recipe import HeadRecipe
from xloom.training.recipe_fields import Domain

SHOWN = ("materials", "peptides", "reasoning")  # the domains whose rows are there soonest
SHIPPED = "single-pass"  # the model that is shown beside the head trained here
SYSTEMS = ("constant", "base", *(f"single:{name}" for name in SHOWN), "uniform", "oracle", "xlora", SHIPPED)


def run(folder: Path, *, head_steps: int, items: int) -> Evaluation:
    """Everything is kept below `folder`; a second run goes on from there."""
    quiet()
    console = Console()
    folder = folder.absolute()
    _say(console, 1, "the base model, and rows of three domains")
    with _progress(console) as progress:
        builtin_base(progress)
        rows = build_suite(only=SHOWN, progress=progress)

    _say(console, 2, "LoRA experts that are there already: ordinary PEFT folders, shipped with xloom")
    experts = expert_folders()
    console.print(expert_table(experts))

    _say(console, 3, f"a head that mixes {', '.join(SHOWN)}: {head_steps} steps; base and experts stay as they are")
    path = train_head(head_recipe(folder, rows, experts, head_steps))

    about = f"{SHIPPED} is a model that is shipped, over all seven experts"
    _say(console, 4, f"{items} test questions of each domain, answered in every way; {about}")
    model = XLoraForCausalLM.from_pretrained(path)
    tasks = load_tasks({name: files.test.parent for name, files in rows.items()}, limit=items)
    tokenizer = load_tokenizer(str(path))
    systems = find_systems(SYSTEMS, model, models={SHIPPED: model_folder(SHIPPED)})
    with watching(console, systems, sum(len(task.questions) for task in tasks)) as watch:
        found = evaluate(model, tokenizer, tasks, systems, output=folder, watch=watch)
    for table in tables(found, min(WIDTH, console.width)):
        console.print(table)

    _say(console, 5, "a question of each domain, and two in one: each token in the colour of the expert that leads it")
    for question in _asked(tasks):
        prompt = question["prompt"]
        console.print(Text(f"\n> {prompt[-1]['content']}", style="bold"))
        ids = encode(tokenizer, prompt, model, raw=False)
        written = write_one(model, tokenizer, ids, Sampling(max_new_tokens=16), console)
        console.print(Text(f"right: {question['completion'][0]['content']}", style="dim"))
        console.print(share_table(written))
    console.print(f"\n[bold]How the head was trained:[/bold] {_short(path)}/report.html")
    console.print(
        f"[bold]Yours to use:[/bold] xloom chat {_short(path)}, or xloom chat {_short(model_folder(SHIPPED))}"
    )
    return found


def head_recipe(folder: Path, rows: dict[str, DomainFiles], experts: dict[str, Path], steps: int) -> HeadRecipe:
    """A small head that needs one pass only: it reads means of the base's input embeddings."""
    return HeadRecipe(
        base=BUILTIN_BASE,
        output=str(folder / "model"),
        experts={name: str(experts[name]) for name in SHOWN},
        data={name: Domain(files=(str(files.train),)) for name, files in rows.items()},
        valid={name: (str(files.valid),) for name, files in rows.items()},
        valid_rows=8,
        head={
            "layerwise_scalings": True,
            "gate_at_layer": 0,
            "head_input": ["token", "ema:8", "running_mean"],
            "xlora_depth": 2,
            "xlora_size": 64,
            "enable_relu_and_dropout": True,
        },
        init="labels",
        routing_weight=0.1,
        learning_rate=2e-3,
        include_experts=False,
        max_steps=steps,
        batch_size=8,
        save_every=10,
    )


def expert_table(experts: dict[str, Path]) -> Table:
    """Name, size and subject of every expert."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for heading in ("expert", "MB", "answers questions on"):
        table.add_column(heading, justify="right" if heading == "MB" else "left")
    for name, folder in experts.items():
        size = (folder / "adapter_model.safetensors").stat().st_size / 1e6
        table.add_row(Text(name, style=colour(name, list(experts))), f"{size:.1f}", DOMAINS[name].about)
    return table


def _asked(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The first question of every domain, and two of different domains in one."""
    rows = [dict(task.questions[0].raw) for task in tasks]
    return [*rows, join_questions(rows[:2], "demo")]


def _say(console: Console, step: int, text: str) -> None:
    console.print(f"\n[bold]{step}/5[/bold]  {text}")


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def _short(path: Path) -> str:
    return os.path.relpath(path)

"""`demo`: the whole path on the built-in base, each step kept in a folder so that a second run goes on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from xloom.cli.common import encode, load_tokenizer, quiet, write_result
from xloom.cli.text import Sampling, colour, share_table, write_one
from xloom.evaluation import Score, expected, score
from xloom.files import read_json
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Router, Single, Uniform, XLora
from xloom.suite.base_model import BUILTIN_BASE, builtin_base
from xloom.suite.disk import file_sha256
from xloom.suite.domains import DOMAINS, DomainFiles, build_domain
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.recipe import Domain, ExpertRecipe, HeadRecipe, Lora
from xloom.training.rows import Row, read_rows

MIXTURE = "X-LoRA"
ADAPTED_LAYERS = tuple(range(10, 30))  # of the base's 30: a third less to train back through


def run(folder: Path, *, expert_steps: int, head_steps: int, items: int) -> list[Score]:
    quiet()
    console = Console()
    folder = folder.absolute()
    _say(console, 1, "the base model and three domains of measured data")
    with _progress(console) as progress:
        builtin_base(progress)
        domains = {name: build_domain(name, folder / "data" / name, progress=progress) for name in DOMAINS}

    _say(console, 2, f"one LoRA expert per domain, {expert_steps} steps each")
    experts = {name: train_expert(_expert_recipe(folder, files, expert_steps)) for name, files in domains.items()}

    _say(console, 3, f"the head that mixes them, {head_steps} steps; base and experts stay as they are")
    path = train_head(_head_recipe(folder, domains, experts, head_steps))

    held_out = {
        name: [row for row in read_rows(files.test) if not row.empty][:items] for name, files in domains.items()
    }
    counts = sorted({len(rows) for rows in held_out.values()})
    _say(console, 4, f"greedy answers to {' to '.join(map(str, counts))} held-out items per domain")
    model = XLoraForCausalLM.from_pretrained(path)
    tokenizer = load_tokenizer(str(path))
    scores = _scores(model, tokenizer, held_out, folder, console)
    console.print(score_table(scores, held_out))

    _say(console, 5, "one prompt per domain, each token in the colour of the expert that leads it")
    for rows in held_out.values():
        prompt = rows[0].prompt
        assert not isinstance(prompt, str)
        console.print(Text(f"> {prompt[-1]['content']}", style="bold"))
        ids = encode(tokenizer, prompt, model, raw=False)
        written = write_one(model, tokenizer, ids, Sampling(max_new_tokens=8), console)
        console.print(Text(f"right: {expected(rows[0])}", style="dim"))
        console.print(share_table(written), "")
    console.print(f"[bold]How the head was trained:[/bold] {_short(path)}/report.html")
    console.print(f"[bold]Yours to use:[/bold] xloom chat {_short(path)}")
    return scores


def _expert_recipe(folder: Path, files: DomainFiles, steps: int) -> ExpertRecipe:
    return ExpertRecipe(
        base=BUILTIN_BASE,
        output=str(folder / "experts" / files.name),
        train=(str(files.train),),
        max_steps=steps,
        batch_size=8,
        learning_rate=2e-3,
        lora=Lora(layers_to_transform=ADAPTED_LAYERS),
        save_every=20,
    )


def _head_recipe(folder: Path, domains: dict[str, DomainFiles], experts: dict[str, Path], steps: int) -> HeadRecipe:
    return HeadRecipe(
        base=BUILTIN_BASE,
        output=str(folder / "model"),
        experts={name: str(path) for name, path in experts.items()},
        data={name: Domain(files=(str(files.train),)) for name, files in domains.items()},
        valid={name: (str(files.valid),) for name, files in domains.items()},
        valid_rows=20,
        head={"layerwise_scalings": True},
        max_steps=steps,
        batch_size=8,
        save_every=10,
    )


def _scores(
    model: XLoraForCausalLM, tokenizer: Any, held_out: dict[str, list[Row]], folder: Path, console: Console
) -> list[Score]:
    """Scores of every router; kept, so that a second run only prints them."""
    kept = folder / "scores.json"
    asked = {name: len(rows) for name, rows in held_out.items()}
    files = [folder / "model" / "head.safetensors", *(folder / "data" / name / "test.jsonl" for name in held_out)]
    identity = {"items": asked, "sha256": [file_sha256(file) for file in files]}
    if kept.is_file() and (found := read_json(kept)).get("identity") == identity:
        return [Score(r["router"], r["domain"], round(r["score"] * r["items"]), r["items"]) for r in found["rows"]]
    routers: dict[str, Router] = {"base": BaseOnly()}
    routers |= {name: Single(name) for name in model.experts}
    routers |= {"uniform": Uniform(), MIXTURE: XLora()}
    with _progress(console) as progress:
        task = progress.add_task("answering", total=len(routers) * sum(asked.values()))
        scores = score(model, tokenizer, held_out, routers, on_batch=lambda done: progress.advance(task, done))
    write_result(kept, {"what": "demo", "identity": identity, "rows": [s.as_row() for s in scores]})
    return scores


def score_table(scores: Sequence[Score], held_out: dict[str, list[Row]]) -> Table:
    """Routers down, domains across, accuracy in per cent; the best of a column is bold."""
    domains = list(held_out)
    table = Table(title="held-out accuracy, % (± standard error)", title_justify="left", box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    for domain in domains:
        table.add_column(domain, justify="right")
    table.add_column("mean", justify="right")
    majority = [_majority(rows) for rows in held_out.values()]
    table.add_row("most common answer", *(f"{100 * m:.0f}" for m in [*majority, _mean(majority)]))
    by_router: dict[str, dict[str, Score]] = {}
    for one in scores:
        by_router.setdefault(one.router, {})[one.domain] = one
    best = {domain: max(row[domain].right for row in by_router.values()) for domain in domains}
    for router, row in by_router.items():
        cells = []
        for domain in domains:
            cell = f"{100 * row[domain].accuracy:.0f} ±{100 * row[domain].standard_error:.0f}"
            cells.append(f"[bold]{cell}[/bold]" if row[domain].right == best[domain] else cell)
        mean = f"{100 * _mean([row[d].accuracy for d in domains]):.0f}"
        style = colour(router, domains) if router in domains else "bold" if router == MIXTURE else ""
        table.add_row(Text(router, style=style), *cells, mean)
    return table


def _majority(rows: Sequence[Row]) -> float:
    return max(Counter(expected(row) for row in rows).values()) / len(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _say(console: Console, step: int, text: str) -> None:
    console.print(f"\n[bold]{step}/5[/bold]  {text}")


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

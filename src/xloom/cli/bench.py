"""`bench`: runs a measurement, prints the table, writes the JSON file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.benchmark.bench_drafts import bench_drafts
from xloom.benchmark.bench_train import SYSTEMS as TRAIN_SYSTEMS
from xloom.benchmark.bench_train import bench_train
from xloom.benchmark.run import SYSTEMS, bench_decode, bench_prefill
from xloom.benchmark.tables import Report, check_target, write_report


def decode(
    base: str,
    experts: int,
    rank: int,
    prompt_tokens: int,
    new_tokens: Sequence[int],
    rounds: int,
    systems: Sequence[str] | None,
    device: str,
    dtype: str,
    json: Path | None,
) -> None:
    _run(
        lambda say: bench_decode(
            base,
            experts=experts,
            rank=rank,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            systems=systems or SYSTEMS,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
    )


def prefill(
    base: str,
    experts: int,
    rank: int,
    prompt_tokens: Sequence[int],
    rounds: int,
    systems: Sequence[str] | None,
    device: str,
    dtype: str,
    json: Path | None,
) -> None:
    _run(
        lambda say: bench_prefill(
            base,
            experts=experts,
            rank=rank,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            systems=systems or SYSTEMS,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
    )


def train(
    base: str,
    experts: Sequence[int],
    rank: int,
    batch: int,
    tokens: int,
    completion: int,
    rounds: int,
    systems: Sequence[str] | None,
    memory: bool,
    device: str,
    dtype: str,
    json: Path | None,
) -> None:
    _run(
        lambda say: bench_train(
            base,
            experts=experts,
            rank=rank,
            batch=batch,
            tokens=tokens,
            completion=completion,
            rounds=rounds,
            systems=systems or TRAIN_SYSTEMS,
            memory=memory,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
    )


def drafts(
    models: Sequence[str],
    tasks: Sequence[str],
    prompts: int,
    new_tokens: int,
    until_end: bool,
    threads: int | None,
    device: str,
    json: Path | None,
) -> None:
    """With nothing named: the models that are shipped, on the built-in suite."""
    import torch

    from xloom.cli.common import load, pairs
    from xloom.cli.evaluate import builtin_suite
    from xloom.evaluation import load_tasks
    from xloom.suite.shipped import model_folders
    from xloom.training.data import tokenise_all

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    folders = pairs("--model", models) or {name: str(place) for name, place in model_folders().items()}
    loaded = {name: load(folder, None, console, device=device) for name, folder in folders.items()}
    tokenizer = next(iter(loaded.values()))[1]
    asked = {}
    for task in load_tasks(pairs("--task", tasks) or builtin_suite(console), limit=prompts):
        rows = tokenise_all([question.row for question in task.questions], tokenizer)
        asked[task.name] = [torch.tensor([ids[:start]], device=device) for ids, start in rows]
    _run(
        lambda say: bench_drafts(
            {name: model for name, (model, _) in loaded.items()},
            asked,
            new_tokens=new_tokens,
            until_end=until_end,
            settings={"models": sorted(folders), "prompts": prompts, "until_end": until_end},
            progress=say,
        ),
        json,
    )


def _run(measure: Callable[[Callable[[str], None]], Report[Any]], json: Path | None) -> None:
    if json is not None:
        check_target(json)
    console = Console()
    with console.status("starting") as status:
        report = measure(status.update)
    console.print(report.table())
    if json is not None:
        write_report(report, json)

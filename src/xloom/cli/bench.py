"""`bench`: runs a measurement, prints the table, writes the JSON file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

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


def _run(measure: Callable[[Callable[[str], None]], Report[Any]], json: Path | None) -> None:
    if json is not None:
        check_target(json)
    console = Console()
    with console.status("starting") as status:
        report = measure(status.update)
    console.print(report.table())
    if json is not None:
        write_report(report, json)

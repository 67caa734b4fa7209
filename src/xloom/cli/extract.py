"""`extract-expert`: how much of a fine-tune the expert carries, as a table."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xloom.cli.common import quiet, write_result
from xloom.training.extract import ALL_LINEAR, Extraction, LeftOut, SiteFit, extract_expert

WORST = 5


def extract(
    tuned: str, base: str, output: Path, *, rank: int, targets: Sequence[str] | None, json_path: Path | None
) -> None:
    """Extracts with a bar on stderr, and prints the errors and what is left out."""
    quiet()
    found = _with_bar(tuned, base, output, rank, list(targets) if targets else ALL_LINEAR)
    console = Console()
    console.print(kind_table(found.sites))
    worst = sorted(found.sites, key=lambda fit: -fit.error)[:WORST]
    console.print("\nlargest errors", style="bold")
    console.print(_site_table(worst))
    if found.left_out:
        console.print("\nnot in the expert", style="bold")
        console.print(_left_out_table(found.left_out))
    console.print()
    for line in found.warnings():
        console.print(f"note: {line}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    console.print(summary(found), soft_wrap=True, markup=False, highlight=False)
    write_result(json_path, found.as_json())


def summary(found: Extraction) -> str:
    """The last line: where, how large, how exact."""
    unchanged = f", {len(found.unchanged)} unchanged" if found.unchanged else ""
    return (
        f"expert written to {found.output}: {len(found.sites)} sites{unchanged}, {found.parameters:,} parameters, "
        f"error {found.error:.3g}, {found.energy:.2%} of the difference kept"
    )


def kind_table(sites: Sequence[SiteFit]) -> Table:
    """One row per kind of module: q_proj, k_proj, ..."""
    kinds: dict[str, list[SiteFit]] = {}
    for fit in sites:
        kinds.setdefault(fit.site.rpartition(".")[2], []).append(fit)
    table = _table("module", "sites", "ranks", "change", "median error", "worst error", "least kept")
    for kind, fits in kinds.items():
        errors = [fit.error for fit in fits]
        ranks = sorted({fit.rank for fit in fits})
        table.add_row(
            kind,
            str(len(fits)),
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
            f"{median(fit.change for fit in fits):.3g}",
            f"{median(errors):.3g}",
            f"{max(errors):.3g}",
            f"{min(fit.energy for fit in fits):.2%}",
        )
    return table


def _site_table(sites: Sequence[SiteFit]) -> Table:
    table = _table("site", "rank", "change", "error", "kept")
    for fit in sites:
        table.add_row(fit.site, str(fit.rank), f"{fit.change:.3g}", f"{fit.error:.3g}", f"{fit.energy:.2%}")
    return table


def _left_out_table(groups: Sequence[LeftOut]) -> Table:
    table = _table("tensors", "count", "change")
    for left in groups:
        table.add_row(left.group, str(left.tensors), f"{left.change:.3g}" if left.change else "none")
    return table


def _table(first: str, *rest: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in rest:
        table.add_column(column, justify="right")
    return table


def _with_bar(tuned: str, base: str, output: Path, rank: int, targets: str | list[str]) -> Extraction:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="extracting", completed=done, total=total)

        return extract_expert(tuned, base, output, rank=rank, targets=targets, progress=show)

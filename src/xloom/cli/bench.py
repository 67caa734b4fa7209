"""`bench ...`: runs a measurement, prints the table, writes the JSON file and the picture.

Only typer is imported here; everything heavy is imported inside the command that needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from xloom.benchmark.tables import Report
    from xloom.model import XLoraForCausalLM

bench = typer.Typer(help="Measure speed side by side with the base model and with PEFT.", no_args_is_help=True)

BaseOption = Annotated[str, typer.Option("--base", help="Path, hub id, built-in name, or 'random' (135M parameters).")]
SystemOption = Annotated[list[str] | None, typer.Option(help="Only these systems; may be given more than once.")]
ExpertsOption = Annotated[int, typer.Option(min=1, help="Number of experts.")]
RankOption = Annotated[int, typer.Option(min=1, help="Rank of every expert.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds, in each of which every system runs once.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as well.")]
PlotOption = Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg or .pdf) to this file.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
ModelOption = Annotated[list[str] | None, typer.Option(help="name=folder of an X-LoRA model, once each.")]
TaskOption = Annotated[
    list[str] | None, typer.Option(help="name=rows.jsonl, once for each; default: the suite's validation.")
]


@bench.command()
def decode(
    base: BaseOption = "random",
    experts: ExpertsOption = 4,
    rank: RankOption = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the random prompt.")] = 32,
    new_tokens: Annotated[list[int], typer.Option(min=2, help="May be given more than once.")] = [64, 256],  # noqa: B006
    rounds: RoundsOption = 3,
    system: SystemOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json: JsonOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
    model: ModelOption = None,
    task: TaskOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="(--model) Prompts of each task; every one is a round.")] = 1,
) -> None:
    """Time per new token: base, xloom without and with drafts, PEFT X-LoRA; same weights, in turn.

    Random weights and a random prompt, or with --model trained ones on the rows of tasks.
    """
    from xloom.benchmark.run import bench_decode
    from xloom.errors import ConfigError

    if task and not model:
        raise ConfigError("--task gives prompts to trained models: name them by --model")
    common: dict[str, Any] = {"new_tokens": new_tokens, "systems": system}
    if model:
        if dtype != "float32" or base != "random":
            raise ConfigError("--model brings its own base and dtype: leave --base and --dtype out")
        loaded, asked = _on_rows(model, task or [], prompts, device)
        texts = [ids for some in asked.values() for ids in some]
        _run(lambda say: bench_decode(models=loaded, prompts=texts, progress=say, **common), json, plot, threads)
        return
    common |= {"experts": experts, "rank": rank, "prompt_tokens": prompt_tokens, "rounds": rounds}
    _run(lambda say: bench_decode(base, device=device, dtype=dtype, progress=say, **common), json, plot, threads)


@bench.command()
def prefill(
    base: BaseOption = "random",
    experts: ExpertsOption = 4,
    rank: RankOption = 8,
    prompt_tokens: Annotated[list[int], typer.Option(help="May be given more than once.")] = [32, 128, 512],  # noqa: B006
    rounds: RoundsOption = 3,
    system: SystemOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json: JsonOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Time to read a prompt: base, xloom, PEFT X-LoRA; same weights, in turn."""
    from xloom.benchmark.run import bench_prefill

    _run(
        lambda say: bench_prefill(
            base,
            experts=experts,
            rank=rank,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            systems=system,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
        plot,
        threads,
    )


@bench.command("experts")
def more_experts(
    base: BaseOption = "random",
    experts: Annotated[list[int], typer.Option(min=1, help="Numbers of experts.")] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006
    top: Annotated[list[int], typer.Option(min=1, help="Experts that a token keeps, beside all.")] = [1, 2],  # noqa: B006
    rank: RankOption = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are written.")] = 16,
    rounds: RoundsOption = 5,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json: JsonOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
) -> None:
    """What more experts cost: all mixed, or the top few of every token; against the base and four experts."""
    from xloom.benchmark.bench_experts import bench_experts

    _run(
        lambda say: bench_experts(
            base,
            experts=experts,
            top=top,
            rank=rank,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
        plot,
        threads,
    )


@bench.command()
def memory(
    base: BaseOption = "random",
    experts: ExpertsOption = 4,
    rank: RankOption = 8,
    prefill_tokens: Annotated[list[int], typer.Option(min=1, help="Prompts that are read.")] = [512, 2048],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of the texts that are written.")] = 32,
    new_tokens: Annotated[list[int], typer.Option(min=1, help="Texts that are written.")] = [256],  # noqa: B006
    system: SystemOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json: JsonOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Peak memory of reading and writing: base, xloom, PEFT X-LoRA; each in a process of its own."""
    from xloom.benchmark.bench_memory import bench_memory
    from xloom.benchmark.run import PLAIN

    _run(
        lambda say: bench_memory(
            base,
            experts=experts,
            rank=rank,
            prefill_tokens=prefill_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            systems=system or PLAIN,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
        plot,
        threads,
    )


@bench.command()
def drafts(
    model: ModelOption = None,
    task: TaskOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 48,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop where the first model does.")] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Drafts, column by column: how many are right, tokens per forward, time per token against the base.

    With nothing named: the models that are shipped, on the built-in suite.
    """
    from xloom.benchmark.bench_drafts import bench_drafts

    loaded, asked = _on_rows(model or [], task or [], prompts, device)
    settings = {"models": sorted(loaded), "prompts": prompts, "until_end": until_end}
    _run(
        lambda say: bench_drafts(
            loaded, asked, new_tokens=new_tokens, until_end=until_end, settings=settings, progress=say
        ),
        json,
        plot,
        threads,
    )


@bench.command()
def train(
    base: BaseOption = "random",
    experts: Annotated[list[int], typer.Option(min=1, help="Number of experts; may be given more than once.")] = [4, 9],  # noqa: B006
    rank: RankOption = 8,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    completion: Annotated[int, typer.Option(min=1, help="Tokens at the end of a row that the loss is on.")] = 16,
    rounds: RoundsOption = 5,
    system: SystemOption = None,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each system in a process of its own.")] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json: JsonOption = None,
    plot: PlotOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Time and memory per training step of the head: PEFT X-LoRA, xloom; same weights and rows, in turn."""
    from xloom.benchmark.bench_train import SYSTEMS, bench_train

    _run(
        lambda say: bench_train(
            base,
            experts=experts,
            rank=rank,
            batch=batch,
            tokens=tokens,
            completion=completion,
            rounds=rounds,
            systems=system or SYSTEMS,
            memory=memory,
            device=device,
            dtype=dtype,
            progress=say,
        ),
        json,
        plot,
        threads,
    )


def _on_rows(
    models: Sequence[str], tasks: Sequence[str], prompts: int, device: str
) -> "tuple[dict[str, XLoraForCausalLM], dict[str, list[Tensor]]]":
    """Models by name (default: those that are shipped), and their prompts by task (default: the suite's validation)."""
    import torch
    from rich.console import Console

    from xloom.cli.common import load, pairs
    from xloom.cli.evaluate import builtin_suite
    from xloom.evaluation import load_tasks
    from xloom.hub.shipped import model_folders
    from xloom.training.data import tokenise_all

    console = Console()
    folders = pairs("--model", models) or {name: str(place) for name, place in model_folders().items()}
    loaded = {name: load(folder, None, console, device=device) for name, folder in folders.items()}
    tokenizer = next(iter(loaded.values()))[1]
    asked = {}
    sources: dict[str, Any] = dict(pairs("--task", tasks))
    if not sources:
        sources = _validation_rows(builtin_suite(console))
    for task in load_tasks(sources, limit=prompts):
        rows = tokenise_all([question.row for question in task.questions], tokenizer)
        asked[task.name] = [torch.tensor([ids[:start]], device=device) for ids, start in rows]
    return {name: model for name, (model, _) in loaded.items()}, asked


def _validation_rows(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The test rows are for grades alone; what is unseen has no others, and its validation file is empty."""
    files = {name: folder / "valid.jsonl" for name, folder in folders.items()}
    return {name: file for name, file in files.items() if file.is_file() and file.stat().st_size}


def _run(
    measure: "Callable[[Callable[[str], None]], Report[Any]]",
    json: Path | None,
    plot: Path | None,
    threads: int | None,
) -> None:
    import torch
    from rich.console import Console

    from xloom.benchmark.tables import check_target, write_report
    from xloom.cli.common import quiet

    for path in (json, plot):
        if path is not None:
            check_target(path)
    if plot is not None:
        from xloom.evaluation.plot import check_plot

        check_plot(plot)
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with console.status("starting") as status:
        report = measure(status.update)
    table = report.table()
    whole = console.measure(table, options=console.options.update(max_width=1_000)).maximum
    console.width = max(console.width, whole)  # a figure that is cut short says nothing
    console.print(table)
    if json is not None:
        write_report(report, json)
    if plot is not None:
        from xloom.benchmark.plots import draw
        from xloom.seeing.plots import save

        save(draw(report), plot)

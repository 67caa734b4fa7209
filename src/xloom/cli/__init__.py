"""The command line. A command parses, calls one library function and prints.

Only typer and rich are imported here; everything heavy is imported inside the command that needs it.
"""

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from xloom import __version__
from xloom.cli.bench import JsonOption, bench
from xloom.errors import ConfigError, XLoomError

app = typer.Typer(
    name="xloom",
    help="Mix the LoRA adapters you have, per token and per layer (X-LoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")

ModelArg = Annotated[str, typer.Argument(help="Folder or hub id of an X-LoRA model (xloom, PEFT or xlora format).")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Base model to use instead of the one that the checkpoint names.")
]
RouterOption = Annotated[
    str,
    typer.Option(
        help="xlora[:without=NAME,...], base, uniform, single:NAME, fixed:NAME=WEIGHT,..., "
        "arrow or spectr[:topK,temperature=X]."
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling, when the temperature is not 0.")]
SeedOption = Annotated[int, typer.Option(help="Seed for sampling.")]
MapOption = Annotated[bool, typer.Option("--map", help="Show a map of layers x experts, in letters without colour.")]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        help="New folder for traces, written token by token; of several texts 001, 002, ... in it. Shows --map."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xloom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is kept; run again to go on from there.")] = Path(
        "runs/demo"
    ),
    head_steps: Annotated[int, typer.Option(min=1, help="Training steps of the head, of 8 rows.")] = 20,
    items: Annotated[int, typer.Option(min=1, help="Test questions per domain.")] = 20,
) -> None:
    """The whole path on the built-in base: shipped experts, a head trained on the spot, a table, text."""
    from xloom.cli.demo import run

    run(folder, head_steps=head_steps, items=items)


@app.command("train-expert")
def train_expert(recipe: Annotated[Path, typer.Argument(help="YAML file, see docs/training.md.")]) -> None:
    """Train one LoRA expert from a recipe; the result is an ordinary PEFT folder."""
    from xloom.training.expert import train_expert as train
    from xloom.training.recipe import load_expert_recipe

    _once(f"expert written to {train(load_expert_recipe(recipe))}")


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="YAML file, see docs/training.md.")]) -> None:
    """Train the head that mixes experts (and the experts too, if the recipe says so)."""
    from xloom.training.head import train_head
    from xloom.training.recipe import load_head_recipe

    _once(f"model written to {train_head(load_head_recipe(recipe))}")


@app.command("extract-expert")
def extract_expert(
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: folder or hub id.")],
    base: Annotated[str, typer.Option(help="What it was tuned from: folder, hub id, or the built-in base.")],
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank at most, at every site.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, an ordinary PEFT LoRA.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Only modules of this name or ending (default: all linear ones but the language-model head)."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Turn a full fine-tune into a LoRA expert: truncated SVD of the difference, error per site."""
    from xloom.cli.extract import extract

    extract(tuned, base, output, rank=rank, targets=target, json_path=json)


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; '-' reads one from standard input.")],
    base: BaseOption = None,
    router: RouterOption = "xlora",
    max_new_tokens: TokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    map: MapOption = False,
    trace: TraceOption = None,
    json: JsonOption = None,
) -> None:
    """Write text, every token coloured by the expert that leads it, and each expert's share."""
    from xloom.cli.text import Sampling, Shown, generate_texts

    sampling, shown = Sampling(max_new_tokens, temperature, top_p, seed), Shown(map, trace)
    generate_texts(model, prompt, base=base, router=router, sampling=sampling, raw=raw, json_path=json, shown=shown)


@app.command()
def chat(
    model: ModelArg,
    base: BaseOption = None,
    router: RouterOption = "xlora",
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    map: MapOption = False,
    trace: TraceOption = None,
) -> None:
    """Talk with a model; /router NAME, /reset and /quit are commands."""
    from xloom.cli.text import Sampling, Shown, chat_loop

    sampling, shown = Sampling(max_new_tokens, temperature, top_p, seed), Shown(map, trace)
    chat_loop(model, base=base, router=router, sampling=sampling, system=system, shown=shown)


@app.command()
def report(
    source: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="JSONL file, suite:SET:SPLIT, or a folder of traces.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of an X-LoRA model; default: the shipped one.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A second model of the same experts, which reads the same tokens.")
    ] = None,
    base: BaseOption = None,
    router: RouterOption = "xlora",
    max_new_tokens: TokensOption = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    worth: Annotated[
        bool, typer.Option("--worth/--no-worth", help="Measure what is lost when an expert is turned off.")
    ] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are, without the chat template.")] = False,
) -> None:
    """One HTML page, to look at and to share: how the experts are mixed on some prompts, and what that is worth."""
    from xloom.cli.report import Settings, run

    run(Settings(source, output, model, against, base, router, max_new_tokens, limit, worth, raw))


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(help="An X-LoRA model, or one or more LoRA adapters.")],
    base: BaseOption = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    json: JsonOption = None,
) -> None:
    """Show which experts adapt which sites, their ranks and sizes, and what does not fit."""
    from xloom.cli.inspect import inspect_paths

    raise typer.Exit(inspect_paths(paths, base=base, list_sites=sites, json_path=json))


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of an X-LoRA model; of --suite builtin, the shipped one.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="builtin: the domains and families that come with xloom.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="name=FILE.jsonl or name=FOLDER (with test.jsonl); may be given more than once."),
    ] = None,
    router: Annotated[
        list[str] | None, typer.Option(help="What to compare, see docs/evaluation.md; default: all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="For rows that bring none: a scorer's name, or module:function.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers are kept here; run again to go on from there.")
    ] = None,
    json: JsonOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the whole page to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg or .pdf) to this file.")] = None,
    other: Annotated[
        list[str] | None, typer.Option("--model", help="name=FOLDER of a further X-LoRA model to compare.")
    ] = None,
    collapse: Annotated[Path | None, typer.Option(help="What `convert --collapse` wrote, to compare it too.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare all with this system, in pairs; default: xlora.")] = None,
    loss: Annotated[bool, typer.Option("--loss", help="Take the loss of the right answers as well.")] = False,
    few_shot: Annotated[int, typer.Option(min=1, help="Solved rows that the system few-shot sees.")] = 3,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Rows times tokens of one forward, at most.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    base: BaseOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as the model was saved.")] = None,
) -> None:
    """Compare a mixture with every other way to use its experts: tasks x routers, with intervals."""
    from xloom.cli.evaluate import Settings, run

    run(
        Settings(
            model,
            base=base,
            suite=suite,
            tasks=tuple(task or ()),
            routers=tuple(router or ()),
            models=tuple(other or ()),
            collapse=collapse,
            scorer=scorer,
            limit=limit,
            few_shot=few_shot,
            against=against,
            loss=loss,
            output=output,
            json=json,
            markdown=markdown,
            plot=plot,
            batch_tokens=batch_tokens,
            threads=threads,
            device=device,
            dtype=dtype,
        )
    )


@app.command()
def convert(
    source: ModelArg,
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option("--to", help="xloom, peft, xlora or mistralrs.")] = "xloom",
    base: BaseOption = None,
    include_base: Annotated[bool, typer.Option("--include-base", help="Put the base into the folder too.")] = False,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Write one static LoRA instead, with the head's mean scalings.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option(help="(--collapse) Rows to take the mean over; may be given more than once.")
    ] = None,
    rows: Annotated[int, typer.Option(help="(--collapse) Rows of each source; every fifth only tells the loss.")] = 200,
    rank: Annotated[int | None, typer.Option(help="(--collapse) Cut to this rank by truncated SVD.")] = None,
) -> None:
    """Read a checkpoint of any format and write it in another, or collapse it into one static LoRA."""
    from xloom.cli.convert import collapse_checkpoint, convert_checkpoint

    if collapse:
        if format != "xloom" or include_base:
            raise ConfigError("--collapse writes a PEFT LoRA: leave --to and --include-base out")
        typer.echo(collapse_checkpoint(source, target, base=base, data=data or [], rows=rows, rank=rank))
        return
    if data or rank is not None:
        raise ConfigError("--data and --rank belong to --collapse")
    typer.echo(convert_checkpoint(source, target, format, base=base, include_base=include_base))


def _once(text: str) -> None:
    """Of several processes of a launcher, the first alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the user's input is wrong, 1 anything else, 130 interrupted."""
    # what libraries say to each other's authors
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    try:
        app(standalone_mode=True)
    except XLoomError as error:
        typer.secho(f"xloom: {error}", fg="red", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.secho("xloom: interrupted", fg="yellow", err=True)
        raise SystemExit(130) from None

"""`generate` and `chat`: text whose tokens are coloured by the expert that leads them, its map and its trace."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xloom.cli.common import BASE_COLOUR, PALETTE, encode, load, parse_router, write_result
from xloom.cli.mixing import has_colour, keys, mixing_map, ribbon
from xloom.decoding import Step
from xloom.errors import XLoomError
from xloom.model import XLoraForCausalLM
from xloom.seeing import by_layer, trace_text
from xloom.trace import check_new
from xloom.trace.shares import BASE, shares
from xloom.training.base import pad_id

BASE_LABEL = BASE


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


@dataclass(frozen=True)
class Shown:
    """What is shown and kept of the mixing, beside the text.

    Args:
        map: layers x experts, in place of the table of weights.
        trace: where traces go; they bring the map.
    """

    map: bool = False
    trace: Path | None = None

    def check(self) -> None:
        """Raises TraceError for a folder that holds something: said before anything is loaded or written."""
        if self.trace is not None:
            check_new(self.trace)

    def place(self, number: int, of: int | None) -> Path | None:
        """Where a trace goes: the only one into the folder itself, several into `001`, `002`, ... in it."""
        return self.trace if self.trace is None or of == 1 else self.trace / f"{number:03}"


@dataclass
class Written:
    """What was generated: token ids, the text of each, and each one's mean weight per expert.

    Attributes:
        share_sum_SC: shares of every site and expert, and of the base, summed over the tokens.
    """

    experts: Sequence[str]
    sites: Sequence[str]
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    text: str = ""
    share_sum_SC: Tensor | float = 0.0

    def add(self, step: Step) -> None:
        self.token_ids.append(step.token_id)
        self.pieces.append(step.text)
        self.weights.append(step.scalings.mean(dim=0).tolist())
        self.text += step.text
        self.share_sum_SC = self.share_sum_SC + shares(step.scalings.cpu())

    def shares(self) -> dict[str, float]:
        """Mean weight of every expert over the generated tokens; what is left of 1 is the base's."""
        count = max(len(self.weights), 1)
        return {name: sum(row[n] for row in self.weights) / count for n, name in enumerate(self.experts)}

    def leaders(self) -> list[str]:
        """The expert that leads each token, or the base."""
        return [leader(row, self.experts) for row in self.weights]

    def led(self) -> dict[str, float]:
        """Part of the tokens that each expert, or the base, leads."""
        leaders = self.leaders()
        return {name: leaders.count(name) / max(len(leaders), 1) for name in [*self.experts, BASE_LABEL]}

    def as_json(self) -> dict[str, Any]:
        tokens = [
            {"id": i, "text": p, "weights": dict(zip(self.experts, map(_rounded, w), strict=True))}
            for i, p, w in zip(self.token_ids, self.pieces, self.weights, strict=True)
        ]
        shares = {name: _rounded(share) for name, share in self.shares().items()}
        return {"text": self.text, "shares": shares, "led": self.led(), "tokens": tokens}


def leader(weights: Sequence[float], experts: Sequence[str]) -> str:
    """The expert with the largest weight; the base where what is left of 1 is larger still."""
    best = max(range(len(weights)), key=lambda n: weights[n])
    return experts[best] if weights[best] > 0 and weights[best] >= 1 - sum(weights) else BASE_LABEL


def colour(name: str, experts: Sequence[str]) -> str:
    return BASE_COLOUR if name == BASE_LABEL else PALETTE[list(experts).index(name) % len(PALETTE)]


def write_one(model: XLoraForCausalLM, tokenizer: Any, ids: Tensor, sampling: Sampling, console: Console) -> Written:
    """Generates one answer and prints it while it comes, each token in the colour of the expert that led to it.

    A token's weights are those at the position that predicted it, averaged over the sites.
    """
    written = Written(model.experts, model.sites)
    torch.manual_seed(sampling.seed)
    options = sampling.options()
    window = getattr(model.config.base_text_config, "max_position_embeddings", None)
    if window is not None:
        options["max_new_tokens"] = min(options["max_new_tokens"], window - ids.shape[1])
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": pad_id(tokenizer)}
    for step in model.stream(ids, tokenizer, speculative=True, **options):
        _show(written, console, step)
    console.print()
    return written


def write_traced(
    model: XLoraForCausalLM,
    tokenizer: Any,
    prompt: str | Sequence[dict[str, str]],
    sampling: Sampling,
    console: Console,
    folder: Path,
) -> Written:
    """As `write_one`, with a trace of prompt and answer, which is on the disk as it grows.

    Args:
        prompt: a string as it stands, or messages for the chat template.
    """
    written = Written(model.experts, model.sites)
    torch.manual_seed(sampling.seed)
    on_step = partial(_show, written, console)
    trace_text(model, tokenizer, prompt, folder=folder, on_step=on_step, speculative=True, **sampling.options())
    console.print()
    return written


def _show(written: Written, console: Console, step: Step) -> None:
    written.add(step)
    style = colour(leader(written.weights[-1], written.experts), written.experts)
    console.print(Text(step.text, style=style), end="", soft_wrap=True)


def print_mixing(written: Written, console: Console, shown: Shown) -> None:
    """The table of weights, or the map; where colours do not show, the map comes with the text once more, in letters
    of the experts that lead it.
    """
    if not (shown.map or shown.trace):
        console.print(share_table(written, console))
        return
    names = [*written.experts, BASE_LABEL]
    if not has_colour(console):
        by_name = dict(zip(names, keys(names), strict=True))
        for line in ribbon(written.pieces, [by_name[name] for name in written.leaders()], console.width):
            console.print(Text(line), soft_wrap=True)
    led, styles = written.led(), [colour(name, written.experts) for name in names]
    share_SC = torch.as_tensor(written.share_sum_SC) / len(written.token_ids)
    layers = by_layer(written.sites)
    console.print(mixing_map(share_SC, layers, names, styles, [led[name] for name in names], console))


def share_table(written: Written, console: Console | None = None) -> Table:
    """Every expert's mean weight over the answer, and the part of its tokens that it leads."""
    width = 80 if console is None else console.width
    room = max(0, min(24, width - 24 - max(map(len, written.experts))))  # beside name and numbers
    mark = "#" if console is not None and console.options.ascii_only else "█"
    table = Table(title=f"{len(written.token_ids)} tokens", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("expert")
    table.add_column("mean weight", justify="right")
    table.add_column("leads", justify="right")
    table.add_column("")
    led = written.led()
    shares = written.shares()
    rows = {**shares, BASE_LABEL: max(0.0, 1 - sum(shares.values()))}
    for name, share in rows.items():
        if name == BASE_LABEL and share < 5e-4 and led[name] == 0:
            continue
        style = colour(name, written.experts)
        bar = Text(mark * round(room * min(share, 1.0)), style=style)
        table.add_row(Text(name, style=style), f"{share:.3f}", f"{led[name]:.0%}", bar)
    return table


def generate_texts(
    path: str,
    prompts: Sequence[str],
    *,
    base: str | None,
    router: str,
    sampling: Sampling,
    raw: bool,
    json_path: Path | None,
    shown: Shown = Shown(),
    console: Console | None = None,
) -> list[Written]:
    console = console or Console()
    shown.check()
    model, tokenizer = load(path, base, console)
    chosen = parse_router(router, model.experts)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    encoded = [encode(tokenizer, text, model, raw) for text in texts]  # all prompts are checked before any is answered
    answers = []
    with model.routing(chosen):
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), 1):
            console.print(Text(f"> {text}", style="bold"))
            if (folder := shown.place(number, len(texts))) is None:
                answers.append(write_one(model, tokenizer, ids, sampling, console))
            else:
                prompt = text if raw else [{"role": "user", "content": text}]
                answers.append(write_traced(model, tokenizer, prompt, sampling, console, folder))
            print_mixing(answers[-1], console, shown)
            if folder is not None:
                console.print(Text(f"trace: {folder}", style="dim"), soft_wrap=True)
            console.print()
    rows = [{"prompt": text, **answer.as_json()} for text, answer in zip(texts, answers, strict=True)]
    write_result(json_path, {"model": path, "router": router, "rows": rows})
    return answers


def chat_loop(
    path: str,
    *,
    base: str | None,
    router: str,
    sampling: Sampling,
    system: str | None,
    shown: Shown = Shown(),
) -> None:
    """Reads lines until the end. Of every answer a trace of its own holds the conversation up to it."""
    console = Console()
    shown.check()
    model, tokenizer = load(path, base, console)
    chosen = parse_router(router, model.experts)
    start = [{"role": "system", "content": system}] if system else []
    messages, answered = list(start), 0
    console.print(f"experts: {', '.join(model.experts)}. /router NAME, /reset, /quit", style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not line:
            continue
        try:
            if line in {"/quit", "/exit"}:
                return
            if line == "/reset":
                messages = list(start)
            elif line.startswith("/router"):
                chosen = parse_router(line.removeprefix("/router").strip(), model.experts)
            else:
                asked = [*messages, {"role": "user", "content": line}]
                ids, folder = encode(tokenizer, asked, model, raw=False), shown.place(answered + 1, None)
                with model.routing(chosen):
                    if folder is None:
                        written = write_one(model, tokenizer, ids, sampling, console)
                    else:
                        written = write_traced(model, tokenizer, asked, sampling, console, folder)
                answered += 1
                print_mixing(written, console, shown)
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": written.text}]
        except XLoomError as error:  # a slip in one line should not end the conversation
            console.print(str(error), style="red", markup=False)


def _rounded(value: float) -> float:
    return round(value, 5)

"""`generate` and `chat`: text whose tokens are coloured by the expert that leads them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xloom.cli.common import BASE_COLOUR, PALETTE, encode, load, parse_router, write_result
from xloom.errors import XLoomError
from xloom.model import XLoraForCausalLM
from xloom.training.base import pad_id

BASE_LABEL = "base"


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


@dataclass
class Written:
    """What was generated: token ids, the text of each, and each one's mean weight per expert."""

    experts: Sequence[str]
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    text: str = ""

    def add(self, token_id: int, piece: str, weights: list[float]) -> None:
        self.token_ids.append(token_id)
        self.pieces.append(piece)
        self.weights.append(weights)
        self.text += piece

    def shares(self) -> dict[str, float]:
        """Mean weight of every expert over the generated tokens; what is left of 1 is the base's."""
        count = max(len(self.weights), 1)
        return {name: sum(row[n] for row in self.weights) / count for n, name in enumerate(self.experts)}

    def led(self) -> dict[str, float]:
        """Part of the tokens that each expert, or the base, leads."""
        leaders = [leader(row, self.experts) for row in self.weights]
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
    written = Written(model.experts)
    torch.manual_seed(sampling.seed)
    options = sampling.options()
    window = getattr(model.config.base_text_config, "max_position_embeddings", None)
    if window is not None:
        options["max_new_tokens"] = min(options["max_new_tokens"], window - ids.shape[1])
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": pad_id(tokenizer)}
    for step in model.stream(ids, tokenizer, speculative=True, **options):
        weights = step.scalings.mean(dim=0).tolist()
        written.add(step.token_id, step.text, weights)
        style = colour(leader(weights, written.experts), written.experts)
        console.print(Text(step.text, style=style), end="", soft_wrap=True)
    console.print()
    return written


def share_table(written: Written) -> Table:
    """Every expert's mean weight over the answer, and the part of its tokens that it leads."""
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
        bar = Text("█" * round(24 * min(share, 1.0)), style=style)
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
    console: Console | None = None,
) -> list[Written]:
    console = console or Console()
    model, tokenizer = load(path, base, console)
    chosen = parse_router(router, model.experts)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    encoded = [encode(tokenizer, text, model, raw) for text in texts]  # all prompts are checked before any is answered
    answers = []
    with model.routing(chosen):
        for text, ids in zip(texts, encoded, strict=True):
            console.print(Text(f"> {text}", style="bold"))
            answers.append(write_one(model, tokenizer, ids, sampling, console))
            console.print(share_table(answers[-1]))
            console.print()
    rows = [{"prompt": text, **answer.as_json()} for text, answer in zip(texts, answers, strict=True)]
    write_result(json_path, {"model": path, "router": router, "rows": rows})
    return answers


def chat_loop(path: str, *, base: str | None, router: str, sampling: Sampling, system: str | None) -> None:
    console = Console()
    model, tokenizer = load(path, base, console)
    chosen = parse_router(router, model.experts)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
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
                ids = encode(tokenizer, [*messages, {"role": "user", "content": line}], model, raw=False)
                with model.routing(chosen):
                    written = write_one(model, tokenizer, ids, sampling, console)
                console.print(share_table(written))
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": written.text}]
        except XLoomError as error:  # a slip in one line should not end the conversation
            console.print(str(error), style="red", markup=False)


def _rounded(value: float) -> float:
    return round(value, 5)

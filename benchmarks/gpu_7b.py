"""Decode and prefill of a 7B X-LoRA model on a GPU, against the base model, PEFT's X-LoRA and the bandwidth floor.

    python benchmarks/gpu_7b.py --json gpu-7b.json          a GPU of 40 GB or more, at most 8 minutes
    python benchmarks/gpu_7b.py --json tiny.json --tiny     the same steps with 2 small layers on the CPU, in seconds

The base has Mistral-7B's shape (32 layers, hidden 4096, 32 heads, 8 key-value heads, MLP 14336, vocabulary 32000) and
random bfloat16 weights; 9 experts of rank 16 adapt q, k, v, o and gate, as in the paper (arXiv 2402.07148). Nothing is
fetched. The floor of a token is what must be read for it (weights once for each pass, factors, keys and values) by the
bandwidth of a large copy in the same run.

Every part stands alone: where one fails its error is kept, and the next one runs; the file is written after each. Forms
of decoding: `generate` (transformers' loop, growing cache), `step` (one forward after the other, static cache),
`graph` (the same as one captured CUDA graph), `compile` and `compile-graph` (both with a compiled forward).
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, StaticCache
from transformers.utils import logging

from xloom.benchmark.parts import Parts, make_parts
from xloom.benchmark.run import wait_for
from xloom.benchmark.systems import System, build_all, decode_sampled
from xloom.benchmark.tables import agreement
from xloom.benchmark.timing import in_turn, load, machine, ratios, spread

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
PLAIN = ("base", "xloom", "xloom-early-gate")
DRAFTING = ("xloom-lagged", "xloom-speculative", "xloom-early-gate-speculative")


@dataclass(frozen=True)
class Size:
    """What is measured. Tokens are those of a prompt, of a text, and of a cache that graphs read."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14_336
    vocab: int = 32_000
    experts: int = 9
    rank: int = 16
    prompt: int = 128
    new: int = 128
    long_new: int = 2048
    prefill: tuple[int, ...] = (512, 2048)
    steps: int = 32
    rounds: int = 3
    copy_bytes: int = 2 << 30
    dtype: str = "bfloat16"


TINY = Size(
    layers=2, hidden=32, heads=4, kv_heads=2, mlp=48, vocab=64, experts=2, rank=2, prompt=8, new=6, long_new=16,
    prefill=(8,), steps=3, rounds=2, copy_bytes=1 << 20, dtype="float32",
)  # fmt: skip


@dataclass
class Run:
    """What has been found so far; a part that fails leaves its error here and nothing else.

    Args:
        ends: when no further part may start, on the clock of `time.monotonic`.
        texts: what `generate` wrote, by system; the other forms must write the same.
    """

    size: Size
    device: str
    path: Path
    ends: float
    found: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None with its error kept; what there is by then is written."""
        began, result = time.monotonic(), None
        try:
            if began > self.ends:
                raise TimeoutError("no time was left")
            print(f"{name} ...", flush=True)
            result = work()
        except Exception as error:
            self.errors[name] = "".join(traceback.format_exception(error, limit=-6))[-4000:]
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        self.seconds[name] = round(time.monotonic() - began, 1)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        compare_decode(self)
        self.write()
        return result

    def write(self) -> None:
        whole = {**self.found, "errors": self.errors, "seconds_of_parts": self.seconds, "load_after": load()}
        fresh = self.path.with_name(f".{self.path.name}.fresh")
        fresh.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Everything, in the order of what matters most. Returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU: does the script run?")
    parser.add_argument("--seconds", type=float, default=360, help="no part starts later than this")
    given = parser.parse_args(words)
    size = TINY if given.tiny else Size()
    device = "cpu" if given.tiny else "cuda"
    logging.set_verbosity_error()
    run = Run(size, device, given.json, time.monotonic() + given.seconds)
    run.found |= {"machine": machine(device), "size": vars(size), "decode": [], "prefill": []}
    with tempfile.TemporaryDirectory(prefix="xloom-7b-") as folder, torch.no_grad():
        run.part("bandwidth", lambda: run.found.update(bytes_per_second=copy_bandwidth(size.copy_bytes, device)))
        built = run.part("build", lambda: build(run, Path(folder)))
        if built is not None:
            measure(*built, run)
    return json.loads(run.path.read_text(encoding="utf-8"))


def build(run: Run, folder: Path) -> tuple[Parts, dict[str, System]]:
    size = run.size
    base = random_mistral(size, run.device)
    parts = make_parts(base, folder, experts=size.experts, rank=size.rank, targets=TARGETS)
    return parts, build_all([*PLAIN, *DRAFTING], parts)


def measure(parts: Parts, systems: dict[str, System], run: Run) -> None:
    """All parts; compiling comes last, as it takes longest."""
    plain = {name: systems[name] for name in PLAIN}
    run.part("floor", lambda: run.found.update(floor=floors(systems, run)))
    run.part("decode: generate", lambda: generate_texts(systems, run))
    decode_all(plain, (STEP, GRAPH), run)
    run.part("prefill", lambda: read_prompts(plain, run))
    peft = run.part("peft", lambda: build_all(["peft"], parts)["peft"])
    if peft is not None:
        against_peft(peft, plain, run)
    for name, system in plain.items():
        run.part(f"compile {name}", partial(decode_compiled, system, run))


def random_mistral(size: Size, device: str) -> PreTrainedModel:
    """Random weights made where they stay; what 7B of them say does not matter, only that they are finite."""
    config = MistralConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=32_768,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def copy_bandwidth(size: int, device: str) -> float:
    """Bytes read and written per second by the best of ten large copies."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = in_turn({"copy": lambda: target.copy_(source)}, {"copy": 11}, wait=partial(wait_for, device))
    return 2 * size / min(timed["copy"].seconds[1:])


def floors(systems: dict[str, System], run: Run) -> dict[str, dict[str, float]]:
    """Bytes that one token must read, and the milliseconds that takes at the measured bandwidth.

    Keys and values are those of a text half as long as the measured ones; an embedding is one row, not counted.
    """
    size, base = run.size, systems["base"].model
    head = _bytes(base.get_output_embeddings())
    decoder = _bytes(base.base_model) - _bytes(base.get_input_embeddings())
    item = next(base.parameters()).element_size()
    kv = 2 * size.layers * size.kv_heads * (size.hidden // size.heads) * item * (size.prompt + size.new // 2)
    found = {}
    for name in PLAIN:
        passes = 2 if name == "xloom" else 1
        own = 0 if name == "base" else _own_bytes(systems[name].model)
        read = passes * (decoder + kv) + head + own
        found[name] = {"bytes": read, "own_bytes": own, "ms": 1e3 * read / run.found["bytes_per_second"]}
    return found


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _own_bytes(model: Any) -> int:
    """Factors of the experts and the head of an X-LoRA model."""
    factors = sum(t.numel() * t.element_size() for site in model.mixture.sites for t in (site.A_RI, site.B_OR))
    return factors + _bytes(model.head)


def generate_texts(systems: dict[str, System], run: Run) -> None:
    """All systems in turn, by their own `generate`."""
    ids = random_ids(run, run.size.prompt)
    for system in systems.values():
        system.decode(ids, 4)
    timed = in_turn(
        {name: partial(system.decode, ids, run.size.new) for name, system in systems.items()},
        dict.fromkeys(systems, run.size.rounds),
        wait=partial(wait_for, run.device),
    )
    base = [one.s_per_token for one in timed["base"].results]
    run.texts = {name: of.result.tokens for name, of in timed.items()}
    for name, of in timed.items():
        mine = [one.s_per_token for one in of.results]
        row: dict[str, Any] = {"ratio_in_round": ratios(mine, base)._asdict(), "whole_s": of.result.seconds}
        if (tally := of.result.tally) is not None:
            row |= {"tokens_per_forward": tally.tokens_per_forward, "acceptance": tally.acceptance}
            row |= {"tokens_equal": agreement(run.texts[name], run.texts[systems[name].same_as or name])}
        add_decode(run, name, "generate", mine, row)


STEP, GRAPH, COMPILE = "step", "graph", "compile"


def decode_all(systems: dict[str, System], forms: tuple[str, ...], run: Run) -> None:
    """Systems in some forms, each a part of its own."""
    for form in forms:
        for name, system in systems.items():
            run.part(f"decode: {form} {name}", partial(decode_steps, system, form, run))


def decode_compiled(system: System, run: Run) -> None:
    with compiled(system.model, run):
        decode_all({system.name: system}, (COMPILE, f"{COMPILE}-{GRAPH}"), run)


def decode_steps(system: System, form: str, run: Run) -> None:
    """Single steps over a static cache that holds the prompt; each round starts there again."""
    model: Any = system.model
    cache = StaticCache(config=model.config, max_cache_len=run.size.prompt + 3 * run.size.steps + 16)
    ids = random_ids(run, run.size.prompt)
    token = torch.ones(1, 1, dtype=torch.long, device=run.device)
    place = torch.full((1, 1), run.size.prompt, dtype=torch.long, device=run.device)
    tokens = []

    def start() -> None:
        cache.reset()
        forward = type(model).forward  # not compiled: that would be one more graph, for this length
        out = forward(model, input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.fill_(run.size.prompt)

    def step() -> None:
        out = model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.add_(1)

    start()
    call = captured(step, run.device) if form.endswith(GRAPH) else step
    seconds = []
    for _ in range(run.size.rounds):
        start()
        tokens = [int(token)]
        for _ in range(2):  # the first steps of a compiled forward may still compile
            call()
            tokens.append(int(token))
        wait_for(run.device)
        began = time.perf_counter()
        for _ in range(run.size.steps):
            call()
        wait_for(run.device)
        seconds.append((time.perf_counter() - began) / run.size.steps)
    tokens.append(int(token))
    text = run.texts.get(system.name, [])
    expected = [*text[:3], *text[2 + run.size.steps : 3 + run.size.steps]]
    add_decode(run, system.name, form, seconds, {"tokens_equal": agreement(tokens, expected)})


def captured(step: Callable[[], None], device: str) -> Callable[[], Any]:
    """A step as one CUDA graph. Raises RuntimeError where something in it waits for the device, or there is none."""
    if device != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def compiled(model: Any, run: Run) -> Iterator[None]:
    """The whole forward as one compiled graph, both passes and the head, for as long as the block runs."""
    torch.compiler.reset()
    how: dict[str, Any] = {"backend": "eager"} if run.device == "cpu" else {}
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **how)
    try:
        yield
    finally:
        del model.forward
        torch.compiler.reset()


def read_prompts(systems: dict[str, System], run: Run) -> None:
    """One forward over a prompt, all systems in turn."""
    for length in run.size.prefill:
        ids = random_ids(run, length)
        for system in systems.values():
            system.prefill(ids)
        timed = in_turn(
            {name: partial(system.prefill, ids) for name, system in systems.items()},
            dict.fromkeys(systems, run.size.rounds + 2),
            wait=partial(wait_for, run.device),
        )
        for name, of in timed.items():
            ms = spread([1e3 * seconds for seconds in of.seconds])
            row = {"system": name, "tokens": length, "ms": ms._asdict(), "turn_with": list(systems)}
            row["ratio_to_base"] = ratios(of.seconds, timed["base"].seconds)._asdict()
            run.found["prefill"].append(row)


def against_peft(peft: System, plain: dict[str, System], run: Run) -> None:
    """PEFT's X-LoRA: single steps at sampled lengths, as it recomputes the whole text for every token."""

    def decode(length: int) -> None:
        ids = random_ids(run, run.size.prompt)
        peft.decode(ids, 1)
        of = decode_sampled(peft, ids, length)
        add_decode(run, "peft", "generate", [of.s_per_token], {"new_tokens": length, "whole_s": of.seconds})

    for length in (run.size.new, run.size.long_new):
        run.part(f"peft: {length} new tokens", partial(decode, length))
    run.part("peft: prefill", lambda: read_prompts({**plain, "peft": peft}, run))


def add_decode(run: Run, system: str, form: str, seconds: list[float], more: dict[str, Any]) -> None:
    ms = spread([1e3 * one for one in seconds])
    run.found["decode"].append({"system": system, "form": form, "ms_per_token": ms._asdict(), **more})


def compare_decode(run: Run) -> None:
    """Every decode row beside the base in the same form, PEFT, and its own floor."""
    rows = run.found["decode"]
    medians = {(row["system"], row["form"]): row["ms_per_token"]["median"] for row in reversed(rows)}
    fastest = min((ms for (name, _), ms in medians.items() if name == "base"), default=None)
    for row in rows:
        ms, plain = row["ms_per_token"]["median"], row["system"].removesuffix("-lagged").removesuffix("-speculative")
        if same := medians.get(("base", row["form"])):
            row["ratio_to_base_same_form"] = ms / same
        if fastest:
            row["ratio_to_fastest_base"] = ms / fastest
        if peft := medians.get(("peft", "generate")):
            row["times_faster_than_peft"] = peft / ms
        if (floor := run.found.get("floor", {}).get(plain)) and plain == row["system"]:
            row["share_of_floor"] = floor["ms"] / ms
    sampled = [row for row in rows if row["system"] == "peft"]
    run.found["notes"] = [
        "share_of_floor: the time that reading takes at the copy's bandwidth, by the time a token took",
        f"peft: {len(sampled)} lengths of text, each by single steps at sampled lengths and Simpson's rule",
        f"times_faster_than_peft: against PEFT's texts of {run.size.new} tokens",
    ]


def random_ids(run: Run, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, run.size.vocab, (1, tokens), generator=generator).to(run.device)


if __name__ == "__main__":
    result = main()
    for row in result["decode"]:
        print(f"{row['system']:30} {row['form']:9} {row['ms_per_token']['median']:8.2f} ms/token", end="  ")
        print(f"x base {row.get('ratio_to_base_same_form', float('nan')):.2f}", end="  ")
        print(f"of floor {row.get('share_of_floor', float('nan')):.0%}")

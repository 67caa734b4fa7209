"""Decoding speed of xloom and of mistral.rs 0.6.0 on the same X-LoRA model: CPU, batch 1, greedy.

    python3.11 -m venv mistralrs-env && mistralrs-env/bin/pip install mistralrs==0.6.0
    python benchmarks/mistralrs_speed.py --mistralrs-python mistralrs-env/bin/python --json mistralrs-cpu.json
    ... --tiny                                             the same steps with two small layers, in seconds

The base is a random Mistral in SmolLM2-135M's shape; random experts adapt q, k, v, o and gate, with a layer-wise head
of one linear. mistral.rs reads xloom's export. Systems: `base`, `xloom` and `xloom-speculative` in one process and in
float32; `mistralrs-base` and `mistralrs-xlora`, in a process each, in float16, which is what mistral.rs takes on a CPU
unless told otherwise; and both in float32 (`-f32`), in which it is many times slower, up to --float32-tokens. All are
loaded and warm before the clock starts and take turns; who waits is stopped, as an idle mistral.rs keeps a core busy. A
turn is a text of two tokens and then the long one: a further token takes the difference by the tokens between. (A text
of one token, max_tokens=0, would go on unseen in mistral.rs and slow what follows.) Texts are compared first.

A system that fails keeps its error in its rows, and the others go on; the file is written after each length. mistral.rs
has threads by RAYON_NUM_THREADS (no OpenMP or MKL in its wheel), xloom by OMP_NUM_THREADS; "cores" in the table is
what they used: processor time by time. The other interpreter runs this file too: its head needs no other package.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

DTYPES = {"xloom": "float32", "mistralrs": "float16", "mistralrs-f32": "float32"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
PROMPT = "Low rank adapters are mixed token by token"
CHECKED = 32  # tokens that are compared before the clock starts
SHORT = 2  # the fewest that mistral.rs can be asked for
XLOOM = ("base", "xloom", "xloom-speculative")
MISTRALRS = ("mistralrs-base", "mistralrs-xlora")
FLOAT32 = ("mistralrs-base-f32", "mistralrs-xlora-f32")
OWN_BASE = {
    "xloom": "base", "xloom-speculative": "base", "mistralrs-xlora": "mistralrs-base",
    "mistralrs-xlora-f32": "mistralrs-base-f32",
}  # fmt: skip
SAME_AS = {
    "xloom-speculative": "xloom", "mistralrs-base": "base", "mistralrs-xlora": "xloom", "mistralrs-base-f32": "base",
    "mistralrs-xlora-f32": "xloom",
}  # fmt: skip
Json = dict[str, Any]
Writer = Callable[[int, bool], Json]  # new tokens, whether to show them -> what is known of the text


@dataclass(frozen=True)
class Size:
    layers: int = 30
    hidden: int = 576
    mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49_152
    experts: int = 4
    rank: int = 8


TINY = Size(layers=2, hidden=64, mlp=128, heads=4, kv_heads=2, vocab=512, experts=2, rank=2)


def open_xloom(job: Json) -> tuple[dict[str, Writer], Json]:
    """Makes the model, leaves it below job["folder"] for the other engine, and gives xloom's writers."""
    import torch
    from check_mistralrs import stage
    from make_mistralrs_example import tokenizer

    from xloom.benchmark.parts import make_parts
    from xloom.benchmark.systems import build_all
    from xloom.benchmark.timing import machine

    torch.set_num_threads(job["threads"])
    size, folder = Size(**job["size"]), Path(job["folder"])
    words = tokenizer()
    words.add_tokens([f"<{i}>" for i in range(len(words), size.vocab)])
    base = make_base(size)
    base.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    parts = make_parts(base, folder / "experts", experts=size.experts, rank=size.rank, targets=TARGETS)
    systems = build_all(XLOOM, parts)
    model: Any = systems["xloom"].model
    model.config.base_model_name_or_path = "base"
    model.save_pretrained(folder / "export", format="mistralrs")
    (folder / "staged").mkdir()
    paths = stage(folder / "base", folder / "export", folder / "export" / "ordering.json", folder / "staged")
    ids_1T = words(PROMPT, return_tensors="pt").input_ids

    def write(name: str, new_tokens: int, show: bool) -> Json:
        of = systems[name].decode(ids_1T, new_tokens)
        found: Json = {"count": len(of.tokens), "prompt_tokens": ids_1T.shape[1]}
        if show:
            found["tokens"] = [words.decode([token]) for token in of.tokens]
        if of.tally is not None:
            found["tokens_per_forward"] = of.tally.tokens_per_forward
        return found

    return {name: partial(write, name) for name in systems}, {"machine": machine("cpu"), "paths": paths}


def make_base(size: Size) -> Any:
    """A random Mistral whose end token is never the likeliest: its logit is always 0."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        sliding_window=None,
        tie_word_embeddings=False,  # mistral.rs wants a stored lm_head
        initializer_range=size.hidden**-0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[1].zero_()
    return model


def open_mistralrs(job: Json) -> tuple[dict[str, Writer], Json]:
    """Loads the plain base or the export; its prefix cache is off, so that every text reads its prompt."""
    import mistralrs

    paths = job["paths"]
    dtype = mistralrs.ModelDType.F32 if job["system"] in FLOAT32 else mistralrs.ModelDType.F16
    options = {"model_id": paths["base"], "arch": mistralrs.Architecture.Mistral, "dtype": dtype}
    if "base" in job["system"]:
        which = mistralrs.Which.Plain(**options)
    else:
        which = mistralrs.Which.XLora(xlora_model_id=paths["export"], order=paths["ordering"], **options)
    runner = mistralrs.Runner(which, jinja_explicit=paths["template"], prefix_cache_n=0)

    def write(new_tokens: int, show: bool) -> Json:
        request = mistralrs.ChatCompletionRequest(
            messages=PROMPT,
            model="any",
            temperature=0.0,
            max_tokens=new_tokens - 1,  # 0.6.0 writes one more
            logprobs=show,
        )
        answer = runner.send_chat_completion_request(request)
        found: Json = {"count": answer.usage.completion_tokens, "prompt_tokens": answer.usage.prompt_tokens}
        if show:
            found["tokens"] = [step.token for step in answer.choices[0].logprobs.content]
        return found

    about = {"mistralrs": importlib.metadata.version("mistralrs"), "mistralrs_python": platform.python_version()}
    return {job["system"]: write}, about


def take_turn(write: Writer, new_tokens: int, show: bool) -> Json:
    """A short text, then one of `new_tokens` (3 or more). Raises RuntimeError where a text ends early."""
    began = time.perf_counter()
    write(SHORT, False)
    between, used = time.perf_counter(), time.process_time()
    found = write(new_tokens, show)
    seconds, short = time.perf_counter() - between, between - began
    if found["count"] != new_tokens:
        raise RuntimeError(f"{found['count']} of {new_tokens} tokens")
    pace, cores = (seconds - short) / (new_tokens - SHORT), (time.process_time() - used) / seconds
    return {**found, "seconds": seconds, "short_s": short, "s_per_token": pace, "cores": cores}


def serve(side: str) -> None:
    """A line of JSON for each line of JSON: the first opens an engine, every other is a turn."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the engine prints goes to its log
    writers: dict[str, Writer] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "job" in question:
                writers, answer = {"xloom": open_xloom, "mistralrs": open_mistralrs}[side](question["job"])
            else:
                answer = take_turn(writers[question["system"]], question["new_tokens"], question["show"])
        except BaseException as error:  # Rust panics are no Exception
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@dataclass(frozen=True)
class Engine:
    """A process that serves, and is stopped in between. What goes wrong with it is an answer: {"error": ...}."""

    process: "subprocess.Popen[str]"
    log: Path
    patience: float

    def ask(self, **question: Any) -> Json:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": f"the process has ended: {self.last_words()}"}
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            if not waiting.select(self.patience):
                self.process.kill()
                return {"error": f"no answer in {self.patience:.0f} s"}
        line = self.process.stdout.readline()
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line) if line else {"error": f"the process ended: {self.last_words()}"}

    def last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-500:]


@contextmanager
def started(python: str, side: str, log: Path, asked: argparse.Namespace) -> Iterator[Engine]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(asked.threads))
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--side", side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        try:
            yield Engine(process, log, asked.patience)
        finally:
            process.kill()
            process.communicate()


Turn = Callable[[int, bool], Json]  # new tokens and whether to show them -> what take_turn gives, or an error


def open_all(asked: argparse.Namespace, size: Size, folder: Path, stack: ExitStack) -> tuple[dict[str, Turn], Json]:
    """A function for the turns of each system, and what the engines say of themselves. Raises SystemExit."""
    xloom = stack.enter_context(started(sys.executable, "xloom", folder / "xloom.log", asked))
    job = {"size": asdict(size), "folder": str(folder), "threads": asked.threads}
    about = xloom.ask(job=job)
    if "error" in about:
        raise SystemExit(f"xloom: {about['error']}")
    turns: dict[str, Turn] = {name: partial(turn, xloom, name) for name in XLOOM}
    machine = about["machine"]
    for name in (*MISTRALRS, *(FLOAT32 if asked.float32_tokens else ())):
        engine = stack.enter_context(started(asked.mistralrs_python, "mistralrs", folder / f"{name}.log", asked))
        answer = engine.ask(job={"system": name, "paths": about["paths"]})
        if "error" in answer:
            print(f"{name}: {answer['error']}", flush=True)
            turns[name] = partial(repeated, answer)
        else:
            machine |= answer
            turns[name] = partial(turn, engine, name)
    return turns, machine


def turn(engine: Engine, name: str, new_tokens: int, show: bool) -> Json:
    answer = engine.ask(system=name, new_tokens=new_tokens, show=show)
    said = answer["error"] if "error" in answer else f"{1e3 * answer['s_per_token']:.1f} ms/token"
    print(f"  {name}: {said}", flush=True)
    return answer


def repeated(answer: Json, new_tokens: int, show: bool) -> Json:
    """The turn of an engine that never opened."""
    return answer


def compare_texts(texts: Mapping[str, Json]) -> dict[str, tuple[int, int]]:
    """By system: tokens before the first difference from the system it must equal, and tokens compared."""
    from xloom.benchmark.tables import agreement

    tokens = {name: text["tokens"] for name, text in texts.items() if "error" not in text}
    pairs = {name: same for name, same in SAME_AS.items() if name in tokens and same in tokens}
    return {name: agreement(tokens[name], tokens[same]) for name, same in pairs.items()}


def rows_of(found: Mapping[str, Sequence[Json]], new_tokens: int) -> list[Json]:
    """A row per system, from its turn in every round. Ratios are those of a further token, within a round."""
    from xloom.benchmark.timing import spread

    rows = []
    for name, gave in found.items():
        good = [one for one in gave if "error" not in one]
        row: Json = {"system": name, "new_tokens": new_tokens, "rounds": len(good)}
        if errors := [one["error"] for one in gave if "error" in one]:
            row["error"] = errors[0]
        if good:
            row["ms_per_token"] = spread([1e3 * one["s_per_token"] for one in good])._asdict()
            whole, short = (1e3 * median(one[what] for one in good) for what in ("seconds", "short_s"))
            row |= {"ms": whole, "ms_short": short, "tokens_per_forward": good[-1].get("tokens_per_forward")}
            row |= {"cores": median(one["cores"] for one in good), "prompt_tokens": good[-1]["prompt_tokens"]}
            row["ratio_to_xloom"] = ratio_in_round(gave, found["xloom"])
            row["ratio_to_own_base"] = ratio_in_round(gave, found[OWN_BASE.get(name, name)])
        rows.append(row)
    return rows


def ratio_in_round(mine: Sequence[Json], theirs: Sequence[Json]) -> Json | None:
    """Over the rounds that both got through."""
    from xloom.benchmark.timing import ratios

    both = [(a, b) for a, b in zip(mine, theirs, strict=True) if "error" not in a and "error" not in b]
    return ratios([a["s_per_token"] for a, _ in both], [b["s_per_token"] for _, b in both])._asdict() if both else None


def measure(asked: argparse.Namespace, size: Size, stack: ExitStack) -> Json:
    """Everything the file holds."""
    from xloom.benchmark.timing import in_turn, load

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xloom-mistralrs-")))
    turns, machine = open_all(asked, size, folder, stack)
    print(f"check and warm-up, {CHECKED} new tokens", flush=True)
    texts = {name: one(CHECKED, True) for name, one in turns.items()}
    settings = {"size": asdict(size), "threads": asked.threads, "rounds": asked.rounds, "targets": TARGETS}
    settings |= {"prompt": PROMPT, "dtypes": DTYPES, "malloc": os.environ.get("GLIBC_TUNABLES")}
    found: Json = {"machine": machine, "settings": settings, "tokens_equal": compare_texts(texts), "rows": []}
    for length in asked.new_tokens:
        print(f"{length} new tokens, {asked.rounds} rounds", flush=True)
        calls = {
            name: partial(one, length, False)
            for name, one in turns.items()
            if name not in FLOAT32 or length <= asked.float32_tokens
        }
        timed = in_turn(calls, dict.fromkeys(calls, asked.rounds))
        found["rows"] += rows_of({name: of.results for name, of in timed.items()}, length)
        machine["load_after"] = load()
        if asked.json is not None:
            asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def show(found: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    from xloom.benchmark.tables import filled, shown

    def quartiles(of: Json | None) -> str:
        return "" if of is None else f"{of['median']:.2f} ({of['low']:.2f}-{of['high']:.2f})"

    rows, machine, size = found["rows"], found["machine"], found["settings"]["size"]
    cells = {
        "system": [row["system"] for row in rows],
        "new": [str(row["new_tokens"]) for row in rows],
        "rounds": [str(row["rounds"]) for row in rows],
        "ms/token": [quartiles(row.get("ms_per_token")) for row in rows],
        "x xloom": [quartiles(row.get("ratio_to_xloom")) for row in rows],
        "x own base": [quartiles(row.get("ratio_to_own_base")) for row in rows],
        "ms of 2": [shown(row.get("ms_short"), ".0f") for row in rows],
        "tokens/forward": [shown(row.get("tokens_per_forward"), ".2f") for row in rows],
        "cores": [shown(row.get("cores"), ".2f") for row in rows],
        "error": [row.get("error", "")[:40] for row in rows],
    }
    equal = ", ".join(f"{name} {a}/{b} as {SAME_AS[name]}" for name, (a, b) in found["tokens_equal"].items())
    title = f"random Mistral, {', '.join(f'{name} {value}' for name, value in size.items())}"
    caption = (
        f"{machine['cpu']}, {found['settings']['threads']} threads, load {machine['load_before']} before and "
        f"{machine['load_after']} after, torch {machine['torch']}, mistralrs {machine.get('mistralrs')}\n"
        f"tokens before the first difference: {equal}"
    )
    console = Console()
    console.width = max(console.width, 160)  # a log's reader scrolls
    console.print(filled(Table(title=title, caption=caption), cells, sections=[row["new_tokens"] for row in rows]))


def main(words: list[str] | None = None) -> Json:
    """Returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistralrs-python", required=True, help="the Python that can import mistralrs")
    parser.add_argument("--new-tokens", type=int, nargs="+", help="lengths of the texts; default: 64 256 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
    parser.add_argument("--float32-tokens", type=int, default=64, help="longest text of mistral.rs in float32; 0: none")
    parser.add_argument("--patience", type=float, default=1800, help="seconds to wait for a turn")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--tiny", action="store_true", help="small: does the script run?")
    asked = parser.parse_args(words)
    asked.new_tokens = asked.new_tokens or ([8, 32] if asked.tiny else [64, 256, 512])
    if min(asked.new_tokens) <= SHORT or min(asked.rounds, asked.threads) < 1:
        parser.error("texts have 3 tokens or more, rounds and threads are 1 or more")
    with ExitStack() as stack:
        return measure(asked, TINY if asked.tiny else Size(), stack)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        serve(sys.argv[2])
    else:
        show(main())

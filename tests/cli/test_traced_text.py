"""`generate` and `chat` with `--map` and `--trace`: the same text, a map that fits, and a trace of what was written."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import decoders

from tiny import make_experts, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM
from xloom.cli import main
from xloom.cli.mixing import has_colour, keys, mixing_map, ribbon
from xloom.errors import UnfinishedTraceError
from xloom.seeing import by_layer, summarise
from xloom.trace import Trace
from xloom.trace.shares import BLOCKS, DIGITS

NAMES = ("materials", "quantum", "a-long-name-of-an-expert", "base")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_base("llama")
    base.save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no blanks between tokens
    tokenizer.save_pretrained(folder / "base")
    model = XLoraForCausalLM.from_experts(
        str(folder / "base"), make_experts(base, folder / "experts"), layerwise_scalings=True
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def run(monkeypatch, capsys, model_folder, tmp_path):
    """Runs a command in an empty folder, 80 columns wide; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(command: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xloom", command, str(model_folder), *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return invoke


def rows(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())["rows"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--raw",),
        ("--router", "single:mech"),
        ("--router", "base"),
        ("--router", "xlora:without=chem"),
        ("--temperature", "0.7", "--seed", "3"),
    ],
)
def test_tracing_changes_nothing_and_holds_what_was_written(run, words):
    assert run("generate", "abc", "-n", "8", *words, "--json", "plain")[0] == 0
    code, out, err = run("generate", "abc", "-n", "8", *words, "--json", "traced", "--trace", "t")
    assert code == 0, err
    (plain,), (traced,) = rows("plain"), rows("traced")
    assert traced["text"] == plain["text"]
    assert [token["id"] for token in traced["tokens"]] == [token["id"] for token in plain["tokens"]]
    for mine, theirs in zip(traced["tokens"], plain["tokens"], strict=True):
        assert mine["weights"] == pytest.approx(theirs["weights"], abs=2e-3)
    assert traced["text"] in out
    assert "trace: t" in out
    trace = Trace.load("t")
    answer = trace[len(trace) - 8 :]
    assert answer.tokens.answer.all() and int(trace.tokens.answer.sum()) == 8
    assert answer.tokens.ids.tolist() == [token["id"] for token in traced["tokens"]]
    weights = answer.scalings.mean(dim=1)
    for token, weight in zip(traced["tokens"], weights.tolist(), strict=True):
        assert list(token["weights"].values()) == pytest.approx(weight, abs=2e-3)
    assert trace.text.startswith("abc" if "--raw" in words else "<|im_start|>user\nabc")
    share = summarise(answer).share()
    for name in (*trace.experts, "base"):
        line = next((line.split() for line in out.splitlines() if name in line.split()), None)
        if line is None:
            assert name == "base" and share["all", name] < 5e-4
        else:
            assert float(line[-2].rstrip("%")) / 100 == pytest.approx(share["all", name], abs=0.0101)


def test_several_prompts_and_folders_that_hold_something(run):
    code, out, _ = run("generate", "abc", "xyz", "-n", "3", "--trace", "t")
    assert code == 0
    assert sorted(os.listdir("t")) == ["001", "002"]
    assert [Trace.load(f"t/{name}").tokens.answer.sum().item() for name in ("001", "002")] == [3, 3]
    assert all(f"trace: t/{name}" in out for name in ("001", "002"))
    code, out, err = run("generate", "abc", "--trace", "t")
    assert (code, out) == (2, "")
    assert "new or empty folder for a trace, found 001, 002" in err
    Path("file").write_text("x")
    code, _, err = run("generate", "abc", "--trace", "file")
    assert code == 2 and "found a file" in err
    assert run("generate", "abc", "a" * 200, "--trace", "u")[0] == 2
    assert not Path("u").exists(), "all prompts are checked before any is answered"


def test_what_is_interrupted_stays_unfinished(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("xloom.cli.text._show", stop)
    assert run("generate", "abc", "--trace", "t")[0] == 130
    with pytest.raises(UnfinishedTraceError):
        Trace.load("t")


def test_the_map_without_a_trace(run):
    code, out, _ = run("generate", "abc", "-n", "4", "--map")
    assert code == 0
    assert "layers 0-2" in out and "mean weight" not in out
    assert not os.listdir(".")


def test_a_conversation(run, monkeypatch):
    lines = iter(["ab", "/reset", "cd", "a" * 200, "zz", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    code, out, _ = run("chat", "-n", "3", "--trace", "t")
    assert code == 0
    assert sorted(os.listdir("t")) == ["001", "002", "003"]
    assert out.count("layers 0-2") == 3
    whole = Trace.load("t/003")
    assert [turn.role for turn in whole.turns] == ["user", "assistant", "user", "assistant"]
    assert int(whole.tokens.answer.sum()) == 3, "what was said before is prompt"
    assert len(Trace.load("t/002").turns) == 2


# --- how it looks ---


def console_of(width: int, *, colour: bool = False, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)


def printed(console: Console, *what) -> str:
    console.print(*what)
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)


def map_of(console: Console, layers: int = 30, modules=("q_proj", "up_proj"), more=(), base: float = 0.0) -> str:
    """The first expert alone in the first third of layers, the second in the others."""
    sites = [f"model.layers.{i}.{m}" for i in range(layers) for m in modules]
    share = torch.zeros(len(sites) + len(more), len(NAMES), dtype=torch.float64)
    first = len(modules) * layers // 3
    share[:first, 0] = 1 - base
    share[first:, 1] = 1 - base
    share[:, -1] = base
    led = [1 / 3, 2 / 3, 0.0, 0.0]
    return printed(console, mixing_map(share, by_layer([*sites, *more]), NAMES, ["red"] * 4, led, console))


@pytest.mark.parametrize("width", [80, 40, 24])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("layers", [1, 3, 30, 80])
def test_a_map_fits(width: int, colour: bool, layers: int):
    console = console_of(width, colour=colour)
    out = map_of(console, layers)
    plain = out if not colour else "".join(part.partition("m")[2] for part in ("\x1b[m" + out).split("\x1b["))
    lines = plain.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    names = [line for line in lines if "%" in line and ";" not in line and "is" not in line.split()]
    assert len(names) == 3, "an expert a line, and none for a base without a share"
    marks = [sum(map(line.count, BLOCKS)) for line in names]
    assert marks[0] == marks[1] == marks[2] >= min(layers, 2)
    assert ("\x1b[" in out) == colour
    assert all(line.startswith(key) == (not colour) for line, key in zip(names, "ABC"))


def test_a_map_says_what_is_where():
    line = map_of(console_of(80)).splitlines()
    assert line[0] == "layers 0-29; █ is 100%"
    first, second, third = line[2:5]
    assert first.split() == ["A", "materials", "█" * 10 + "·" * 20, "33%", "33%"]
    assert second.split() == ["B", "quantum", "·" * 10 + "█" * 20, "67%", "67%"]
    assert third.split() == ["C", "a-long-name-of-an-e…", "·" * 30, "0%", "0%"]
    narrow = map_of(console_of(40)).splitlines()
    assert "2 to a column" in narrow[0]
    assert narrow[2].split()[2] == "█" * 5 + "·" * 10
    based = map_of(console_of(80), base=0.25)
    assert based.splitlines()[-1].split() == ["-", "base", "▃" * 30, "25%", "0%"]
    outside = map_of(console_of(80), more=("lm_head", "model.embed_tokens")).splitlines()
    assert "layers 0-29, embed_tokens, lm_head;" in outside[0]
    assert outside[2].split()[2:4] == ["█" * 10 + "·" * 20, "··"]


def test_without_unicode():
    out = map_of(console_of(60, encoding="ascii"))
    assert "9 is 100%" in out
    assert "9" * 10 + "." * 20 in out and DIGITS[0] == "."
    assert "a-long-name-of-" in out, "cut without a sign for it"


@pytest.mark.parametrize(
    ("variables", "terminal", "expected"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False)],
)
def test_where_colours_reach_the_reader(variables, terminal, expected):
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ={"TERM": "xterm", **variables})
    assert has_colour(console) is expected
    assert has_colour(Console(file=io.StringIO(), record=True)), "a picture is made of it"


def test_letters_under_a_text():
    assert ribbon(["ab", " c", "", "d"], ["A", "B", "C", "-"], 80) == ["ab cd", "AABB-"]
    assert ribbon(["abcdef"], ["A"], 4) == ["abcd", "AAAA", "ef", "AA"]
    assert ribbon(["a\nb\n", "c"], ["A", "B"], 80) == ["a", "A", "b", "A", "c", "B"]
    assert ribbon(["日本", "x"], ["A", "B"], 80) == ["日本x", "AAAAB"], "wide letters have two"
    assert ribbon(["日本"], ["A"], 3) == ["日", "AA", "本", "AA"]
    assert ribbon(["a\x1b[0m\t\ud800"], ["A"], 80) == ["a [0m  ", "AAAAAAA"]
    assert ribbon([], [], 80) == []
    assert keys(NAMES) == ["A", "B", "C", "-"]
    assert len(set(keys(["x"] * 53))) == 53
    assert keys(["x"] * 60)[-8:] == ["?"] * 7 + ["-"]

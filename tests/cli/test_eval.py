"""`xloom eval` on a tiny model: tables and files, going on, and mistakes in one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tiny import make_experts, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom import XLoraForCausalLM
from xloom.cli import main
from xloom.cli.evaluate import default_output
from xloom.evaluation.store import file_name

DOMAINS = {"chem": "up", "mech": "down", "prot": "up"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, other/, and a folder of rows for each of three domains."""
    folder = tmp_path_factory.mktemp("eval")
    base = tiny_base("llama", max_position_embeddings=512)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    experts = make_experts(base, folder / "experts")
    for name, extra in (("model", {}), ("other", {"head_input": "running_mean"})):
        XLoraForCausalLM.from_experts(str(folder / "base"), experts, **extra).save_pretrained(folder / name)
    for domain, kind in DOMAINS.items():
        (folder / domain).mkdir()
        for split, start in (("test", 0), ("train", 20)):
            rows = [{**row, "task": f"t{i % 2}"} for i, row in enumerate(toy_rows(kind, 4, start))]
            write_rows(folder / domain / f"{split}.jsonl", rows)
    (folder / "judge.py").write_text("def vowels(answer, row):\n    return float(any(c in answer for c in 'aeiou'))\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, project):
    """Runs `xloom eval` in the project's folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xloom", "eval", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return invoke


TASKS = [word for domain in DOMAINS for word in ("--task", f"{domain}={domain}")]


def test_all_systems(run, tmp_path):
    """The whole of it: every system, and every file that can be asked for."""
    files = [tmp_path / name for name in ("r.json", "r.md", "r.png")]
    words = ["model", *TASKS, "--router", "all", "--model", "twin=other", "--collapse", "experts/chem", "--loss"]
    words += [
        "-o",
        str(tmp_path / "out"),
        "--json",
        str(files[0]),
        "--markdown",
        str(files[1]),
        "--plot",
        str(files[2]),
    ]
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(files[0].read_text())
    systems = [system["router"] for system in found["systems"]]
    assert len(systems) == len(set(systems)) == 25
    assert {"constant", "base", "few-shot", "oracle", "merge:dare", "xlora:top2", "collapse", "twin"} <= set(systems)
    assert found["notes"] == []
    constant = next(r for r in found["rows"] if r["router"] == "constant" and r["domain"] == "mean")
    assert constant["score"] == 1.0  # a toy domain has one answer
    assert all(max(map(len, table.splitlines())) <= 120 for table in out.split("\n\n"))
    assert all(system in out for system in systems)
    page = files[1].read_text()
    assert page.startswith("# Results")
    assert f"    xloom eval model {' '.join(TASKS)} --router all" in page
    for heading in ("## Scores", "## Oracle-normalised", "## Against xlora", "## Routing", "## Method", "### chem"):
        assert heading in page
    assert page.count("| twin |") >= 5
    assert "nan" not in page
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 24


def test_a_second_run_only_prints(run, tmp_path):
    words = ("model", *TASKS, "--router", "base", "--router", "xlora", "-o", str(tmp_path))
    _, first, _ = run(*words)
    assert "base: 12 to answer" in first
    _, second, _ = run(*words)
    assert "base: 0 to answer" in second
    assert first.partition("score, %")[2] == second.partition("score, %")[2]


def test_tasks_of_the_users_own(run, project, tmp_path):
    rows = toy_rows("up", 3)
    write_rows(project / "mine.jsonl", rows)
    words = ("model", "--task", "mine=mine.jsonl", "--router", "uniform", "--router", "single:mech", "--limit", "2")
    code, out, err = run(*words, "--scorer", "judge:vowels", "-o", str(tmp_path), "--json", str(tmp_path / "r.json"))
    assert code == 0, err
    assert "2 questions: mine 2" in out
    found = {r["router"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"] if r["domain"] == "mine"}
    for name, row in found.items():
        lines = (tmp_path / "answers" / file_name(name)).read_text().splitlines()
        said = [json.loads(line)["answer"] for line in lines if "answer" in json.loads(line)]
        assert row["score"] == pytest.approx(sum(any(c in s for c in "aeiou") for s in said) / 2)
        assert row["oracle_normalised"] is None


def test_the_tables_fit(run, tmp_path):
    """Many columns are folded, and narrow enough for a terminal of 100 columns."""
    tasks = [word for i in range(12) for word in ("--task", f"chemistry-{i:02d}=chem")]
    code, out, err = run("model", *tasks, "--router", "base", "--router", "uniform", "-o", str(tmp_path))
    assert code == 0, err
    tables = out.partition("score, %")[2]
    assert max(map(len, tables.splitlines())) <= 100
    assert tables.count("uniform") == 3  # two parts, and what it cost
    flat = "".join(tables.split())
    assert all(f"{i:02d}" in flat for i in range(12))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name the model"),
        (("model",), "nothing to ask"),
        (("model", "--suite", "huge"), "--suite huge: expected builtin"),
        (("model", "--task", "chem"), "--task chem: expected name=path"),
        (("model", "--task", "a=nowhere.jsonl"), "nowhere.jsonl: expected a file of rows"),
        (("model", "--task", "a=chem", "--task", "a=mech"), "--task a: given more than once"),
        (("model", "--task", "mean=chem"), "that name is taken"),
        (("nowhere", *TASKS), "nowhere"),
        (("experts/chem", *TASKS), "one adapter is an expert"),
        (("model", *TASKS, "--router", "oracles"), "unknown system 'oracles'"),
        (("model", *TASKS, "--router", "single:zoo"), "'zoo'"),
        (("model", *TASKS, "--collapse", "nowhere"), "--collapse nowhere: expected a PEFT folder"),
        (("model", *TASKS, "--model", "twin=nowhere"), "twin=nowhere: expected the folder"),
        (("model", *TASKS, "--model", "base=other"), "choose another"),
        (("model", *TASKS, "--router", "base", "--against", "xlora"), "against='xlora'"),
        (("model", *TASKS, "--scorer", "nonsense"), "no scorer named 'nonsense'"),
        (("model", *TASKS, "--scorer", "judge:nothing"), "has no 'nothing'"),
        (("model", *TASKS, "--dtype", "int8"), "--dtype int8: expected one of"),
        (("model", *TASKS, "--device", "cuda:99"), "--device cuda:99: cannot be used"),
        (("model", *TASKS, "--json", "no/folder/x.json"), "no folder"),
        (("model", *TASKS, "--plot", "x.gif"), "expected a picture"),
        (("model", *TASKS, "-o", "model/config.json"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, words, says):
    code, out, err = run(*words)
    assert code == 2, out + err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in out


def test_a_system_asked_for_beside_all_must_not_be_left_out(run, project, tmp_path):
    """`all` leaves out what lacks training rows; by name, or as a model, it is an error."""
    rows = write_rows(project / "untrained.jsonl", toy_rows("up", 2))
    words = ["model", "--task", f"mine={rows}", "--router", "all", "-o", str(tmp_path)]
    code, out, err = run(*words)
    assert code == 0, err
    assert "centroid: left out" in out
    code, _, err = run(*words, "--router", "centroid")
    assert code == 2
    assert "centroid: training rows for" in err
    other = XLoraForCausalLM.from_pretrained(project / "model")
    other.save_pretrained(project / "odd")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "robot")
    tokenizer.save_pretrained(project / "odd")
    code, _, err = run(*words, "--model", "odd=odd")
    assert code == 2
    assert "odd: " in err
    assert "its tokenizer or chat template" in err


def test_the_base_that_is_given_is_that_of_all_models(run, project, tmp_path):
    base = tiny_base("llama", max_position_embeddings=512)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(-1)
    base.save_pretrained(project / "moved")
    tiny_tokenizer().save_pretrained(project / "moved")
    words = ["model", *TASKS, "--router", "xlora", "--router", "twin", "--model", "twin=model", "-o", str(tmp_path)]
    for more in ((), ("--base", "moved")):
        code, _, err = run(*words, *more)
        assert code == 0, err
    texts = {}
    for path in (tmp_path / "answers").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        texts[path.name] = {line["key"]: line["answer"] for line in lines if "answer" in line}
    assert texts["twin.jsonl"] == texts["xlora.jsonl"]
    assert texts["twin.jsonl.old"] == texts["xlora.jsonl.old"] != texts["xlora.jsonl"]


def test_models_of_one_name_keep_their_answers_apart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first, second = default_output("a/model"), default_output("b/model")
    assert first != second
    assert first == default_output(str(tmp_path / "a" / "model")) == default_output("a/../a/model")
    assert first.parts[:2] == ("runs", "eval")
    assert re.fullmatch(r"model-[0-9a-f]{8}", first.name)


def test_a_wrong_row_is_named(run, project):
    write_rows(project / "bad.jsonl", [*toy_rows("up", 1), {"prompt": "a"}])
    code, _, err = run("model", "--task", "bad=bad.jsonl")
    assert code == 2
    assert "bad.jsonl:2: expected 'messages'" in err

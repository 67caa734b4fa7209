"""The command line on a tiny model: what it prints, its exit codes, and that nothing is half-written."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny import make_expert, make_experts, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom import XLoraForCausalLM
from xloom.cli import main


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, experts/<name>/, model/ (ours) of a tiny Llama with a character tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_base("llama")
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    experts = make_experts(base, folder / "experts")
    model = XLoraForCausalLM.from_experts(str(folder / "base"), experts, layerwise_scalings=True)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, project):
    """Runs a command in the project's folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xloom", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return invoke


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, xloom.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, **path})


def test_generate_prints_text_and_shares(run, project, tmp_path):
    code, out, _ = run("generate", "model", "abc", "xyz", "-n", "5", "--json", str(tmp_path / "out.json"))
    assert code == 0
    assert "> abc" in out
    assert all(name in out for name in ("chem", "mech", "prot", "mean weight"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["prompt"] for row in rows] == ["abc", "xyz"]
    row = rows[0]
    assert len(row["tokens"]) == 5
    assert "".join(token["text"] for token in row["tokens"]) == row["text"]
    assert row["text"] in out
    assert sum(row["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert sum(row["led"].values()) == pytest.approx(1.0)
    # the text is that of the library
    tokenizer, model = tiny_tokenizer(), XLoraForCausalLM.from_pretrained(project / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with model.logging_scalings() as log:
        expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert [token["id"] for token in row["tokens"]] == expected.tolist()
    weights = log.tokens()[0, ids.shape[1] - 1 :].mean(dim=1)
    assert [list(t["weights"].values()) for t in row["tokens"]] == [
        pytest.approx(w, abs=1e-4) for w in weights.tolist()
    ]


def test_generate_with_other_routers(run):
    for router, lead in (("single:mech", {"mech": 1.0}), ("base", {"base": 1.0})):
        code, out, _ = run("generate", "model", "abc", "-n", "3", "--router", router, "--raw")
        assert code == 0
        assert all(f"{share:.0%}" in out and name in out for name, share in lead.items())
    for router in ("xlora:without=mech", "arrow:top2,temperature=0.5"):
        code, _, err = run("generate", "model", "abc", "-n", "3", "--router", router)
        assert code == 0, err
    code, _, err = run("generate", "model", "abc", "--router", "arrow:top_k=2")
    assert code == 2
    assert "router 'arrow:top_k=2': expected arrow[:topK,temperature=X]" in one_line(err)
    code, _, err = run("generate", "model", "abc", "--router", "single:nobody")
    assert code == 2
    assert "'nobody'" in one_line(err) and "chem, mech, prot" in err
    code, _, err = run("generate", "model", "abc", "--router", "oracle")
    assert code == 2
    assert "unknown router 'oracle'" in one_line(err)


def test_sampling_is_seeded(run, tmp_path):
    texts = []
    for seed in ("1", "1", "2"):
        run(
            "generate",
            "model",
            "abc",
            "-n",
            "12",
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--json",
            str(tmp_path / "o"),
        )
        texts.append(json.loads((tmp_path / "o").read_text())["rows"][0]["text"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", "nowhere", "a"), "nowhere"),
        (("generate", "nobody/nothing", "a"), "nobody/nothing"),
        (("generate", "model", "  "), "the prompt is empty"),
        (("generate", "model", "a" * 200), "the model's window is 128"),
        (("generate", "model", "a", "--base", "nowhere"), "nowhere"),
        (("generate", "base", "a"), "expected a checkpoint"),
        (("generate", "experts/chem", "a"), "one adapter is an expert"),
        (("convert", "model", "out", "--to", "gguf"), "unknown format 'gguf'"),
        (("inspect", "nowhere"), "nowhere"),
        (("train", "nowhere.yaml"), "nowhere.yaml"),
        (("train-expert", "nowhere.yaml"), "nowhere.yaml"),
        (("bench", "decode", "--system", "vllm"), "vllm"),
        (("bench", "decode", "--json", "no/folder/x.json"), "no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, words, expected):
    code, out, err = run(*words)
    assert code == 2
    said = err if err.strip() else out  # inspect lists problems on standard output
    assert expected in one_line(said)
    assert "Traceback" not in out + err
    assert not Path("out").exists()


def test_usage_errors(run):
    assert run("generate")[0] == 2
    assert run("no-such-command")[0] == 2
    assert run("--version")[:2] == (0, "xloom 0.1.0\n")


def test_no_chat_template(run, project, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    XLoraForCausalLM.from_pretrained("model" if Path("model").is_dir() else project / "model").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run("generate", str(tmp_path), "abc", "--base", str(project / "base"))
    assert code == 2
    assert "no chat template; pass --raw" in one_line(err)
    assert run("generate", str(tmp_path), "abc", "--raw", "-n", "2", "--base", str(project / "base"))[0] == 0


def test_chat(run, monkeypatch):
    lines = iter(["hello", "/router single:chem", "/router nonsense", "/reset", "again", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    code, out, _ = run("chat", "model", "-n", "3")
    assert code == 0
    assert out.count("mean weight") == 2
    assert "unknown router 'nonsense'" in out


def test_inspect(run, project, tmp_path):
    code, out, _ = run("inspect", "model", "--sites", "--json", str(tmp_path / "i.json"))
    assert code == 0
    assert "q_proj x3, v_proj x3" in out
    assert "model.layers.0.self_attn.q_proj" in out
    found = json.loads((tmp_path / "i.json").read_text())
    assert [row["expert"] for row in found["rows"]] == ["chem", "mech", "prot"]
    assert [row["ranks"] for row in found["rows"]] == ["4", "2", "3"]
    assert found["problems"] == []
    code, out, _ = run("inspect", "experts/chem", "experts/prot")
    assert code == 0
    tiny_base("gpt2").save_pretrained(tmp_path / "other")
    code, out, _ = run("inspect", "experts/chem", "--base", str(tmp_path / "other"))
    assert code == 2
    assert "problem:" in out


@pytest.mark.parametrize("format", ["xloom", "peft", "xlora"])
def test_convert_there_and_back(run, project, tmp_path, format):
    code, out, _ = run("convert", "model", str(tmp_path / "there"), "--to", format)
    assert code == 0
    assert "3 experts at 21 sites" in out
    assert run("convert", str(tmp_path / "there"), str(tmp_path / "back"), "--base", "base")[0] == 0
    ours, back = (project / "model", tmp_path / "back")
    assert (ours / "head.safetensors").read_bytes() == (back / "head.safetensors").read_bytes()
    for name in ("chem", "mech", "prot"):
        file = f"experts/{name}/adapter_model.safetensors"
        assert (ours / file).read_bytes() == (back / file).read_bytes()


def test_train_both_from_recipes(run, project, tmp_path):
    for domain in ("up", "down"):
        write_rows(tmp_path / f"{domain}.jsonl", toy_rows(domain, 12))
        recipe = {
            "base": str(project / "base"),
            "output": domain,
            "train": f"{domain}.jsonl",
            "max_steps": 2,
            "batch_size": 4,
        }
        (tmp_path / f"{domain}.yaml").write_text(yaml.safe_dump(recipe))
        assert run("train-expert", str(tmp_path / f"{domain}.yaml"))[0] == 0
    head = {
        "base": str(project / "base"),
        "output": "mixed",
        "experts": {"up": "up", "down": "down"},
        "data": {"up": "up.jsonl", "down": "down.jsonl"},
        "max_steps": 2,
        "batch_size": 4,
    }
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(head))
    code, out, _ = run("train", str(tmp_path / "head.yaml"))
    assert (code, out.split()[-1]) == (0, str(tmp_path / "mixed"))
    assert run("generate", str(tmp_path / "mixed"), "bcd", "-n", "2")[0] == 0
    head["max_step"] = head.pop("max_steps")
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(head))
    code, _, err = run("train", str(tmp_path / "head.yaml"))
    assert code == 2
    assert "did you mean 'max_steps'" in one_line(err)


def test_interrupted(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("xloom.cli.text.generate_texts", stop)
    code, out, err = run("generate", "model", "a")
    assert code == 130
    assert "Traceback" not in out + err


def test_every_recipe_loads(tmp_path, monkeypatch):
    """With rows and experts in place; the small head is the one that the demo trains."""
    from xloom.suite import shelf
    from xloom.suite.domains import DOMAINS, DomainFiles
    from xloom.training.recipe import load_expert_recipe, load_head_recipe

    rows = write_rows(tmp_path / "rows.jsonl", toy_rows("up", 2))
    monkeypatch.setattr(shelf, "rows_of", lambda name: DomainFiles(name, rows, rows, rows, rows))
    shutil.copytree(Path(__file__).parents[2] / "recipes", tmp_path / "recipes")
    base = tiny_base("llama")
    for name in DOMAINS:
        ours = load_expert_recipe(tmp_path / "recipes" / "suite" / f"{name}.yaml")
        assert ours.train == (f"suite:{name}:train",)
        make_expert(base, tmp_path / "experts" / name, r=2, target_modules=["q_proj"])
    for name in ("two-pass", "single-pass"):
        assert list(load_head_recipe(tmp_path / "recipes" / "suite" / f"{name}.yaml").experts) == list(DOMAINS)
    demo = importlib.import_module("xloom.cli.demo")  # the package has a command of that name
    files = {name: shelf.rows_of(name) for name in demo.SHOWN}
    theirs = demo.head_recipe(tmp_path, files, {name: tmp_path / "experts" / name for name in demo.SHOWN}, 20)
    for name in ("head", "unlabelled"):
        ours = load_head_recipe(tmp_path / "recipes" / f"{name}.yaml")
        for field in (
            "base",
            "max_steps",
            "batch_size",
            "learning_rate",
            "head",
            "routing_weight",
            "init",
            "valid_rows",
        ):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        assert list(ours.experts) == list(demo.SHOWN)
    assert {p.stem for p in (tmp_path / "recipes").glob("*.yaml")} == {"head", "unlabelled"}
    assert {p.stem for p in (tmp_path / "recipes" / "suite").glob("*.yaml")} == {*DOMAINS, "two-pass", "single-pass"}

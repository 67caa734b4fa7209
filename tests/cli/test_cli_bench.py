"""`xloom bench ...`: words reach the measurement, tables are printed, files written; wrong words are refused."""

import json

import pytest
from typer.testing import CliRunner

from xloom.cli.bench import bench
from xloom.errors import ConfigError

TINY_BASE = ["--experts", "2", "--rank", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tiny import tiny_base

    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama").save_pretrained(folder)
    return str(folder)


def run(*words: str, columns: int = 200):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(bench, list(words), catch_exceptions=False)


@pytest.mark.parametrize(
    "words",
    [
        ["decode", "--new-tokens", "3", "--rounds", "1", "--system", "xloom-speculative", *TINY_BASE],
        ["prefill", "--prompt-tokens", "5", "--rounds", "1", "--system", "xloom", *TINY_BASE],
        ["experts", "--experts", "1", "--experts", "4", "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"],
        ["train", "--no-memory", "--batch", "1", "--tokens", "8", "--completion", "2", "--rounds", "1",
         "--system", "xloom", "--experts", "2", "--rank", "2"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_table_file_and_picture(words, base, tmp_path):
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    found = run(*words, "--base", base, *files)
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["what"] == words[0]
    for row in report["rows"]:
        assert row.get("system", "all mixed") in found.output
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_cut_short(base, tmp_path):
    file = tmp_path / "x.json"
    words = ["prefill", "--prompt-tokens", "5", "--rounds", "1", *TINY_BASE, "--base", base, "--json", str(file)]
    found = run(*words, columns=40)
    table = found.output.split("torch")[0]
    for row in json.loads(file.read_text())["rows"]:
        assert f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}" in table
    assert "…" not in table


def test_prompts_are_validation_rows_where_there_are_any(tmp_path):
    from xloom.cli.bench import _validation_rows

    for name, files in {
        "quantum": {"valid": "{}", "test": "{}"},
        "unseen": {"valid": "", "test": "{}"},
        "no": {},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / f"{file}.jsonl").write_text(text)
    folders = {path.name: path for path in tmp_path.iterdir()}
    assert _validation_rows(folders) == {"quantum": tmp_path / "quantum" / "valid.jsonl"}


def test_memory_hands_its_words_on(monkeypatch, tmp_path):
    from xloom.benchmark import bench_memory as module

    seen = {}

    def measure(base, **options):
        seen.update(options, base=base)
        raise ConfigError("far enough")

    monkeypatch.setattr(module, "bench_memory", measure)
    with pytest.raises(ConfigError, match="far enough"):
        run("memory", "--prefill-tokens", "7", "--new-tokens", "5", "--system", "xloom", *TINY_BASE)
    del seen["progress"]
    assert seen == {
        "base": "random", "experts": 2, "rank": 2, "prefill_tokens": [7], "prompt_tokens": 32, "new_tokens": [5],
        "systems": ["xloom"], "device": "cpu", "dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decode", "--plot", "x.gif"], "expected a picture ending in .png"),
        (["decode", "--json", "no/folder/x.json"], "no folder"),
        (["experts", "--plot", "no/folder/x.png"], "no folder"),
        (["decode", "--task", "a=b.jsonl"], "name them by --model"),
        (["decode", "--model", "a=b", "--dtype", "bfloat16"], "leave --base and --dtype out"),
        (["decode", "--model", "two"], "expected name=path"),
    ],
)
def test_wrong_words(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        run(*words)
    assert list(tmp_path.iterdir()) == []

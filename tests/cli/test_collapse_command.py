"""`xloom convert --collapse`: what it prints and writes, and what it refuses."""

import json
import re
import sys

import pytest
import torch
from peft import PeftModel

from tiny import make_experts, prompt, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom import XLoraForCausalLM
from xloom.cli import main
from xloom.experts import Expert


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command beside base/, model/ and two files of rows; gives exit code, standard output and error."""
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    experts = make_experts(base, tmp_path / "experts")
    model = XLoraForCausalLM.from_experts(str(tmp_path / "base"), experts, layerwise_scalings=True)
    with torch.no_grad():
        model.head.linears[-1].weight.zero_()
    model.save_pretrained(tmp_path / "model")
    for name in ("up", "down"):
        write_rows(tmp_path / f"{name}.jsonl", toy_rows(name, 20))
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xloom", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return invoke


def test_it_writes_a_lora_that_peft_serves(run, tmp_path):
    words = ("convert", "model", "out", "--collapse", "--data", "up.jsonl", "--data", "down.jsonl", "--rows", "10")
    code, out, err = run(*words)
    assert code == 0, err
    line = out.strip()
    assert re.fullmatch(
        r"static LoRA written to out: 21 sites, rank 9 at most; loss per token on 4 held rows: "
        r"dynamic (\S+), collapsed \1, base \S+",
        line,
    ), line
    record = json.loads((tmp_path / "out" / "collapse.json").read_text())
    assert (record["source"], record["data"], record["rows"]) == ("model", ["up.jsonl", "down.jsonl"], 16)
    with torch.no_grad():
        expected = XLoraForCausalLM.from_pretrained("model")(prompt(2, 5)).logits
        found = PeftModel.from_pretrained(tiny_base("llama"), "out").eval()(prompt(2, 5)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    code, out, _ = run(*words, "--rank", "2")
    assert code == 0
    assert "rank 2 at most, cut error 0." in out
    assert {low.rank for low in Expert.from_pretrained(tmp_path / "out").modules.values()} == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--collapse",), "--data rows.jsonl"),
        (("--data", "up.jsonl"), "belong to --collapse"),
        (("--rank", "3"), "belong to --collapse"),
        (("--collapse", "--data", "up.jsonl", "--to", "peft"), "leave --to"),
        (("--collapse", "--data", "up.jsonl", "--include-base"), "leave --to"),
        (("--collapse", "--data", "none.jsonl"), "none.jsonl"),
        (("--collapse", "--data", "up.jsonl", "--rows", "3"), "rows: expected at least 5, found 3"),
        (("--collapse", "--data", "up.jsonl", "--rank", "0"), "rank"),
    ],
    ids=str,
)
def test_refusals(run, tmp_path, words, said):
    code, _, err = run("convert", "model", "out", *words)
    assert code == 2
    assert said in [line for line in err.splitlines() if line.startswith("xloom:")][-1]
    assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone(run, tmp_path):
    code, _, err = run("convert", "model", "model", "--collapse", "--data", "up.jsonl")
    assert (code, "other files" in err) == (2, True)
    assert not (tmp_path / "model" / "adapter_config.json").exists()

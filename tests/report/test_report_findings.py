"""What is found with a model: its own measurements, put together; and the command."""

import json
import re
import sys

import pytest
import torch
from pages import unpacked

from tiny import make_experts, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM, routers
from xloom.cli import main
from xloom.errors import TraceMismatchError
from xloom.report import Ask, find, read_again
from xloom.seeing import contributions, trace_text, worth
from xloom.training.rows import Row


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ASKS = [
    Ask(user("abc"), (), "xyx", {"line": 1}),
    Ask("abab", (), None, {"line": 2}),
    Ask(user("12"), ("3", "4"), None, {"line": 4, "group": "talk"}),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory):
    """base/ and model/ of a tiny Llama with a head that decides, on disk."""
    folder = tmp_path_factory.mktemp("report")
    base = tiny_base("llama", max_position_embeddings=512)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    experts = make_experts(base, folder / "experts")
    model = XLoraForCausalLM.from_experts(str(folder / "base"), experts, layerwise_scalings=True)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "model")
    return folder, model


def test_findings_are_the_library_s(project):
    _, model = project
    tokenizer, stages = tiny_tokenizer(), []
    found = find(model, tokenizer, ASKS, max_new_tokens=4, watch=lambda *now: stages.append(now[0]))
    assert list(dict.fromkeys(stages)) == ["answering", "contributions", "worth"]
    alone = trace_text(model, tokenizer, user("abc"), max_new_tokens=4)
    assert torch.equal(found.traces[0].tokens.ids, alone.tokens.ids)
    assert [turn.role for turn in found.traces[2].turns] == ["user", "assistant"] * 3
    assert found.traces[2].metadata == {"line": 4, "group": "talk"}
    total = sum(contributions(model, trace.tokens.ids).relative_TSN[1:].double().sum(0) for trace in found.traces)
    torch.testing.assert_close(found.relative_SN, total / sum(len(trace) - 1 for trace in found.traces))
    assert found.given == [ASKS[place].answer is not None for place in found.worth_of]
    assert 0 in found.worth_of
    expected = worth(model, tokenizer, [Row(user("abc"), [{"role": "assistant", "content": "xyx"}], "line 1")])
    torch.testing.assert_close(found.worth.losses_QR[:, :1], expected.losses_QR, rtol=0, atol=1e-4)
    assert find(model, tokenizer, ASKS[:1], max_new_tokens=2, measure_worth=False).worth is None


def test_a_second_model_reads_the_same_tokens(project):
    _, model = project
    trace = trace_text(model, tiny_tokenizer(), user("abc 12 ab"), max_new_tokens=6, metadata={"group": "g"})
    (again,) = read_again(model, [trace])
    assert torch.equal(again.tokens.ids, trace.tokens.ids)
    assert again.metadata == trace.metadata
    torch.testing.assert_close(again.scalings, trace.scalings, rtol=0, atol=2e-3, equal_nan=True)
    torch.testing.assert_close(again.tokens.logprobs, trace.tokens.logprobs, rtol=0, atol=1e-3, equal_nan=True)
    with model.routing(routers.Single("mech")):
        (other,) = read_again(model, [trace])
    assert other.expert("mech")[1:].eq(1).all()


def test_other_experts_are_refused(project, tmp_path):
    _, model = project
    trace = trace_text(model, tiny_tokenizer(), "ab", max_new_tokens=2)
    base = tiny_base("llama")
    two = dict(list(make_experts(base, tmp_path).items())[:2])
    with pytest.raises(TraceMismatchError, match="expected a second model with the experts chem, mech, prot"):
        read_again(XLoraForCausalLM.from_experts(base, two), [trace])


# --- the command ---


@pytest.fixture
def run(project, monkeypatch, capsys):
    monkeypatch.chdir(project[0])
    lines = ['"abc"', json.dumps({"prompt": "12", "domain": "down"})]
    (project[0] / "prompts.jsonl").write_text("\n".join(lines))

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xloom", "report", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return invoke


def test_the_command(run, project, tmp_path):
    folder, _ = project
    words = ("prompts.jsonl", "-o", "page.html", "--model", "model", "--against", "./model", "-n", "3")
    code, out, err = run(*words)
    assert code == 0, err
    assert "page.html: 2 texts" in out
    took = re.search(
        r"loading models, answering and measuring took ([\d.]+) s, making the page of them ([\d.]+) s", out
    )
    assert took and float(took[1]) > 0, out
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert '<code id="command">xloom report prompts.jsonl -o page.html --model model' in text
    assert str(folder) not in text
    data = json.loads(unpacked(text, "data"))
    assert data["models"] == ["model", "./model"] and len(data["texts"]) == 4
    for name in ("0-2", "1-3"):  # a model and itself
        assert all(abs(value) < 2e-3 for one in data["differences"][name] for value in one)
    loaded = XLoraForCausalLM.from_pretrained("model")
    trace_text(loaded, tiny_tokenizer(), "abab", max_new_tokens=3, folder=tmp_path / "traces" / "one")
    code, out, _ = run(str(tmp_path / "traces"), "-o", "page.html")
    assert code == 0 and "1 texts" not in out and "1 text," in out and "opening traces took" in out
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert "Made from traces" in text and "<dt>model</dt><dd>model</dd>" in text and "<dd>base</dd>" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing.jsonl", "-o", "page.html"), "nothing.jsonl: expected a data file"),
        (("prompts.jsonl", "-o", "no/page.html"), "there is no folder"),
        (("base", "-o", "page.html", "--model", "model"), "found options for prompts"),
        (("base", "-o", "page.html"), "expected a trace"),
        (("prompts.jsonl", "-o", "page.html", "--model", "base"), "base"),
    ],
)
def test_wrong_words(run, project, words, said):
    (project[0] / "page.html").unlink(missing_ok=True)
    code, _, err = run(*words)
    assert code == 2 and said in err
    assert not (project[0] / "page.html").exists()

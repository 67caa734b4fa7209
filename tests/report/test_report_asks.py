"""Prompts of every form, and lines that are none."""

import json

import pytest
from pages import random_trace

from xloom.errors import DataError, NotFoundError, XLoomError
from xloom.report import Ask, read_asks, read_traces

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be short"}


def asked(tmp_path, *lines, **options) -> list[Ask]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return read_asks(str(path), **options)


@pytest.mark.parametrize(
    ("line", "prompt", "then", "answer"),
    [
        ('"hi"', [USER], (), None),
        ({"prompt": "hi"}, [USER], (), None),
        ({"prompt": "hi", "completion": "yes"}, [USER], (), "yes"),
        ({"prompt": "hi", "completion": " "}, [USER], (), None),
        ({"prompt": "hi", "system": "be short"}, [SYSTEM, USER], (), None),
        ({"prompt": [USER], "completion": [SAID]}, [USER], (), "yes"),
        ({"messages": [SYSTEM, USER, SAID]}, [SYSTEM, USER], (), "yes"),
        ({"messages": [USER, SAID, USER]}, [USER, SAID, USER], (), None),
        ({"questions": ["hi", "and?"]}, [USER], ("and?",), None),
        ({"questions": ["hi"], "system": "be short"}, [SYSTEM, USER], (), None),
    ],
)
def test_forms(tmp_path, line, prompt, then, answer):
    (found,) = asked(tmp_path, line)
    assert (found.prompt, found.then, found.answer) == (prompt, then, answer)
    assert found.questions == ["hi", *then]
    assert found.system == ("be short" if prompt[0]["role"] == "system" else None)


def test_metadata_limit_and_raw(tmp_path):
    lines = ["", {"prompt": "a", "domain": "x"}, {"prompt": "b", "domain": "x", "group": "y", "name": "n"}]
    found = asked(tmp_path, *lines, raw=True)
    assert [one.prompt for one in found] == ["a", "b"]
    assert [one.metadata for one in found] == [{"line": 2, "group": "x"}, {"line": 3, "group": "y", "name": "n"}]
    assert len(asked(tmp_path, *lines, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "invalid JSON"),
        ("3", "found int"),
        ({}, "found {}"),
        ({"prompt": "a", "messages": [USER]}, "one of prompt, messages, questions"),
        ({"prompt": ""}, "prompt: expected messages or a string"),
        ({"messages": "a"}, "messages: expected messages, found 'a'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]: expected a role of"),
        ({"messages": [SAID]}, "alone"),
        ({"questions": []}, "questions: expected a list of strings"),
        ({"questions": ["a", 3]}, "questions: expected a list of strings"),
        ({"prompt": "a", "completion": 3}, "completion: expected"),
        ({"prompt": "a", "domain": 3}, "domain: expected a string"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, said):
    with pytest.raises(DataError, match=rf"prompts.jsonl:2: .*{said}"):
        asked(tmp_path, '"fine"', line)


def test_wrong_places(tmp_path):
    with pytest.raises(DataError, match="expected prompts, found none"):
        asked(tmp_path, "")
    (tmp_path / "rows.json").write_text("[]")
    for place in ("nothing.jsonl", "rows.json"):
        with pytest.raises(XLoomError, match=place):
            read_asks(str(tmp_path / place))


def test_traces_on_disk(tmp_path):
    with pytest.raises(NotFoundError, match="found none"):
        read_traces(tmp_path)
    for seed, name in enumerate("cab"):
        random_trace(seed=seed).save(tmp_path / name)
    found = read_traces(tmp_path)
    assert [trace.metadata["name"] for trace in found] == ["a", "b", "c"]
    assert found[0].text == random_trace(seed=1).text
    assert len(read_traces(tmp_path, limit=2)) == 2
    assert [trace.text for trace in read_traces(tmp_path / "c")] == [random_trace(seed=0).text]
    random_trace(seed=3).save(tmp_path / "001")
    assert "name" not in read_traces(tmp_path)[0].metadata, "a number is no name: its title is what is asked"

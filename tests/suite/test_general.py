import ast
import json
import re
from pathlib import Path

import pytest

from xloom.errors import DataError
from xloom.suite import general
from xloom.suite.general import best_word, build_general, fact_row, read_general, talk_row


def test_the_file_of_the_package_is_small_and_whole() -> None:
    known = read_general()
    sizes = {
        name: {split: sum(row["split"] == split for row in known[name]) for split in ("train", "valid", "test")}
        for name in ("facts", "talk")
    }
    assert sizes == {
        "facts": {"train": 0, "valid": 40, "test": 110},
        "talk": {"train": 250, "valid": 50, "test": 100},
    }
    prompts = [row["prompt"] for name in ("facts", "talk") for row in known[name]]
    assert len(set(prompts)) == len(prompts)
    assert all(row["answer"].strip() == row["answer"] != "" for row in known["talk"])
    path = Path(general.__file__).parent / "data" / "general.json"
    assert path.stat().st_size < 300_000
    assert re.fullmatch(r"[0-9a-f]{64}", known["about"]["gguf_sha256"])


def test_the_base_gets_three_in_four_of_the_facts_in_every_split() -> None:
    for split in ("valid", "test"):
        facts = [fact for fact in read_general()["facts"] if fact["split"] == split]
        assert 0.7 <= sum(fact["right"] for fact in facts) / len(facts) <= 0.8
        for fact in facts:
            words = "|".join(map(re.escape, fact["any"]))
            assert fact["right"] == bool(re.search(rf"(?<!\w)({words})(?!\w)", fact["answer"], re.IGNORECASE))


def test_rows(tmp_path: Path) -> None:
    files = build_general(tmp_path / "general")
    rows = {
        split: [json.loads(line) for line in getattr(files, split).read_text().splitlines()]
        for split in ("train", "valid", "test")
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 250, "valid": 90, "test": 210}
    keys = [row["key"] for found in rows.values() for row in found]
    assert len(set(keys)) == len(keys)
    assert {row["task"] for row in rows["train"]} == {"talk"}
    assert {(row["task"], row["scorer"]) for row in rows["test"]} == {("facts", "contains"), ("talk", "agreement")}
    assert all(row["domain"] == "general" for found in rows.values() for row in found)
    kinds = [row["task"] for row in rows["test"]]
    assert kinds != sorted(kinds), "mixed, so that a limit takes of both"
    card = json.loads(files.card.read_text())
    assert card["tasks"]["facts"] == {"train": 0, "valid": 40, "test": 110}
    assert 0.7 <= card["facts_test_base"] <= 0.8
    assert card["facts_test_constant"] < 0.1
    before = files.test.read_bytes()
    assert build_general(tmp_path / "again").test.read_bytes() == before


def test_no_topic_of_the_prompts_is_in_two_splits() -> None:
    script = ast.parse((Path(__file__).parents[2] / "scripts" / "make_general.py").read_text(encoding="utf-8"))
    lists = {ast.unparse(n.targets[0]): n.value for n in script.body if isinstance(n, ast.Assign)}
    topics = {split: text.split(", ") for split, text in ast.literal_eval(lists["TOPICS"]).items()}
    every = [topic for found in topics.values() for topic in found]
    assert len(set(every)) == len(every) > 100
    for turn in read_general()["talk"]:
        named = [topic for topic in every if re.search(rf"\b{topic}\b", turn["prompt"])]
        assert set(named) & set(topics[turn["split"]]), turn["prompt"]


def test_a_fact_and_a_turn_as_rows() -> None:
    row = fact_row({"prompt": "Up?", "any": ["down", "below"], "answer": "Down.", "right": True, "split": "test"})
    assert row["completion"] == [{"role": "assistant", "content": "down"}]
    assert (row["scorer"], row["options"], row["key"]) == ("contains", {"any": ["down", "below"]}, "facts:Up?")
    row = talk_row({"prompt": "Hi!", "answer": "Hello!", "split": "test"})
    assert row["prompt"] == [{"role": "user", "content": "Hi!"}]
    assert (row["completion"][0]["content"], row["scorer"], row["options"]) == ("Hello!", "agreement", {})


def test_the_best_word_counts_facts_it_answers() -> None:
    assert best_word([{"any": ["4", "four"]}, {"any": ["Four"]}, {"any": ["5"]}, {"any": ["6", "6"]}]) == 0.5


def test_a_damaged_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "general.json").write_text('{"facts": [')
    monkeypatch.setattr(general.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"general.json: cannot be read"):
        read_general()

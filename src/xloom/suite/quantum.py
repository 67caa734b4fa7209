"""Quantum chemistry of small molecules (QM9, B3LYP): gap, LUMO, dipole moment, and a molecule for a given gap.

Takes qm9pack's tables (CSV); gives items with RDKit's canonical SMILES as key. The values of reserved molecules are
never read, so that no threshold hangs on them, and they are not in the table by which designed molecules are judged.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from xloom.hub.fetch import QM9PACK
from xloom.suite.items import Domain, Item, Read, Task, fraction, split_of
from xloom.suite.molecules import canonical, choice_wordings, evenly, scaffold, value_wordings
from xloom.suite.reserved import is_reserved

PARTS = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))
LOOKUP = "lookup.json"
HARTREE = 27.211386  # eV
SAMPLE = 0.12  # of the table's molecules, by a hash of their SMILES
PER_TENTH = 60  # items of the same gap in tenths of eV
DESIGNS_PER_TENTH = 12
LONGEST_DESIGN = 12  # characters; a model has to write them
TOLERANCE = 0.5  # eV


@dataclass(frozen=True)
class _Molecule:
    key: str
    spelling: str  # as the table writes it
    group: str
    gap: float  # eV
    lumo: float  # eV
    dipole: float  # debye


def qm9(read: Read) -> Iterator[dict[str, str]]:
    """The rows of the whole table by column name, as text; energies in hartree, dipole moments in debye."""
    for part in PARTS:
        # not StringIO, which takes four bytes for each of 80 million characters
        yield from csv.DictReader(io.TextIOWrapper(io.BytesIO(read(QM9PACK, part)), encoding="utf-8", newline=""))


def place(smiles: str) -> float:
    """Where in [0, 1) a spelling of the table falls; the lowest `SAMPLE` are this domain's."""
    return fraction("qm9", smiles)


def read_quantum(read: Read) -> Iterator[Item]:
    """The items of all tasks about a sample of the table; reserved molecules are marked, and have no answer."""
    molecules = []
    for row in qm9(read):
        spelling = row["SMILES"]
        key = canonical(spelling) if place(spelling) < SAMPLE else None
        if key is None:
            continue
        if is_reserved(key) or is_reserved(spelling):
            yield Item("gap", key, "", key, "", other_keys=(spelling,), reserved=True)
            continue
        values = [float(row[column]) for column in ("HOMO_LUMO_gap_au", "LUMO_au", "Dipole_debye")]
        molecules.append(_Molecule(key, spelling, scaffold(key), values[0] * HARTREE, values[1] * HARTREE, values[2]))
    yield from evenly((_item("gap", m, _tenths(m.gap)) for m in molecules), PER_TENTH, lambda item: item.answer)
    for m in molecules:
        yield _item("lumo", m, "positive" if m.lumo > 0 else "negative")
    dipoles = sorted(m.dipole for m in molecules)
    third = len(dipoles) // 3
    for m in molecules:
        if m.dipole < dipoles[third]:
            yield _item("dipole", m, "low")
        elif m.dipole > dipoles[-1 - third]:
            yield _item("dipole", m, "high")
    yield from evenly(_designs(molecules), DESIGNS_PER_TENTH, lambda item: item.text)


def lookup(read: Read) -> dict[str, float]:
    """The gap in eV, to one decimal, of every molecule of the table that is not reserved, by canonical SMILES."""
    gaps: dict[str, list[float]] = defaultdict(list)
    for row in qm9(read):
        spelling = row["SMILES"]
        key = canonical(spelling)
        if key is not None and not is_reserved(key) and not is_reserved(spelling):
            gaps[key].append(float(row["HOMO_LUMO_gap_au"]) * HARTREE)
    return {key: round(fmean(values), 1) for key, values in sorted(gaps.items())}


def _designs(molecules: list[_Molecule]) -> Iterator[Item]:
    """Short molecules by their gap; no target is asked for in two splits, and no scaffold is the answer in two."""
    for m in molecules:
        target = _tenths(m.gap)
        if len(m.key) <= LONGEST_DESIGN and split_of(f"design:{target}") == split_of(m.group):
            facts = {"target": float(target)}
            yield Item("design", target, m.key, m.key, m.group, other_keys=(m.spelling,), facts=facts)


def _item(task: str, molecule: _Molecule, answer: str) -> Item:
    return Item(task, molecule.key, answer, molecule.key, molecule.group, other_keys=(molecule.spelling,))


def _tenths(value: float) -> str:
    return f"{value:.1f}"


def _extra(read: Read) -> Mapping[str, Any]:
    return {LOOKUP: lookup(read)}


DOMAIN = Domain(
    about="Quantum chemistry of small molecules (QM9): gap, LUMO, dipole moment, and molecules for a given gap.",
    packages=(QM9PACK,),
    read=read_quantum,
    extra=_extra,
    tasks={
        "gap": Task(
            value_wordings("HOMO-LUMO gap in eV", "Answer with one decimal."),
            scorer="number",
            options={"tolerance": TOLERANCE},
        ),
        "lumo": Task(
            choice_wordings("LUMO energy", "positive or negative", "What sign has"),
            answers=("positive", "negative"),
            share=0.8,
        ),
        "dipole": Task(choice_wordings("dipole moment", "low or high"), answers=("low", "high"), share=0.8),
        "design": Task(
            (
                "Name a molecule with a HOMO-LUMO gap of about {} eV.",
                "Which molecule has a HOMO-LUMO gap near {} eV? Answer in SMILES.",
                "Give the SMILES of a molecule whose HOMO-LUMO gap is {} eV.",
                "I would like a molecule with a HOMO-LUMO gap close to {} eV. Write its SMILES.",
                "Find a molecule: HOMO-LUMO gap around {} eV. Give a SMILES.",
                "{} eV is the HOMO-LUMO gap of which molecule?",
                "Tell me a molecule that has a HOMO-LUMO gap of {} eV.",
                "For a HOMO-LUMO gap of {} eV, what molecule would you take? Answer in SMILES.",
            ),
            scorer="molecule",
            options={"property": "gap", "tolerance": TOLERANCE, "table": LOOKUP},
            share=0.2,
        ),
    },
)

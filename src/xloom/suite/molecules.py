"""What the domains about molecules have in common: RDKit's view of a SMILES, and the forms of their questions.

Takes SMILES, gives canonical ones and the group that keeps relatives in one split. RDKit is imported at the first
call. Knows nothing of tables, values or tasks.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from xloom.errors import DataError, MissingExtraError
from xloom.suite.items import Item, by_hash

ELEMENTS = frozenset(("C", "H", "N", "O", "F", "P", "S", "Cl", "Br", "I"))
LONGEST = 40  # characters of a SMILES; short rows train quickly
HEAVIEST = 22  # atoms but hydrogen

# The same sentences in every domain, so that none is known by its phrases.
_VALUE_FORMS = (
    "What is the WHAT of {}? HINT",
    "What is the WHAT of the molecule {}?",
    "Give the WHAT of {}. HINT",
    "{}: what is its WHAT? HINT",
    "Tell me the WHAT of {}.",
    "For {}, find the WHAT. HINT",
    "Consider the molecule {}. What is its WHAT?",
    "I would like to know the WHAT of {}. HINT",
)
_CHOICE_FORMS = (
    "Is the WHAT of {} CHOICES?",
    "What is the WHAT of {}? Answer CHOICES.",
    "ASK the WHAT of {}?",
    "{}: is its WHAT CHOICES?",
    "Tell me whether the WHAT of {} is CHOICES.",
    "For {}, is the WHAT CHOICES?",
    "Consider the molecule {}. ASK its WHAT? Say CHOICES.",
    "I would like to know if the WHAT of {} is CHOICES.",
)


def value_wordings(what: str, hint: str) -> tuple[str, ...]:
    """Questions for a value or a name: `what` as in "the ... of {}", `hint` a sentence on the answer's form."""
    return tuple(form.replace("WHAT", what).replace("HINT", hint) for form in _VALUE_FORMS)


def choice_wordings(what: str, choices: str, ask: str = "How high is") -> tuple[str, ...]:
    """Questions for a level: `what` as in "the ... of {}", `choices` as "low or high", `ask` as "How high is"."""
    parts = {"WHAT": what, "CHOICES": choices, "ASK": ask}
    return tuple(re.sub("|".join(parts), lambda match: parts[match[0]], form) for form in _CHOICE_FORMS)


def canonical(smiles: str) -> str | None:
    """RDKit's canonical SMILES with its stereo marks, or None where the text is no molecule and nothing else.

    Raises MissingExtraError without rdkit.
    """
    molecule = parse(smiles)
    return None if molecule is None else str(rdkit("Chem").MolToSmiles(molecule))


def scaffold(smiles: str) -> str:
    """The group of relatives that a molecule belongs to, whatever its stereo marks.

    With two rings or more: its Murcko scaffold. With one: the ring and the atoms bonded to it, for benzene's bare
    scaffold would bring a third of all molecules into one split. With none: the molecule itself.
    Raises DataError if the SMILES is no molecule, MissingExtraError without rdkit.
    """
    molecule = parse(smiles)
    if molecule is None:
        raise DataError(f"{smiles!r} is not a molecule in SMILES")
    chem = rdkit("Chem")
    chem.RemoveStereochemistry(molecule)
    rings = molecule.GetRingInfo().AtomRings()
    if not rings:
        return str(chem.MolToSmiles(molecule))
    if len(rings) > 1:
        return str(rdkit("Chem.Scaffolds.MurckoScaffold").MurckoScaffoldSmiles(mol=molecule))
    near = {atom.GetIdx() for index in rings[0] for atom in molecule.GetAtomWithIdx(index).GetNeighbors()}
    return str(chem.MolFragmentToSmiles(molecule, sorted(near.union(rings[0]))))


def ordinary(smiles: str) -> str | None:
    """The canonical SMILES of a small organic molecule in one piece, or None for anything else.

    Small is up to 22 heavy atoms and 40 characters; organic is carbon with the elements of `ELEMENTS` and no isotope
    named. Raises MissingExtraError without rdkit.
    """
    if "." in smiles or len(smiles) > 2 * LONGEST:
        return None
    molecule = parse(smiles)
    if molecule is None or molecule.GetNumHeavyAtoms() > HEAVIEST:
        return None
    atoms = list(molecule.GetAtoms())
    symbols = {atom.GetSymbol() for atom in atoms}
    if "C" not in symbols or symbols - ELEMENTS or any(atom.GetIsotope() for atom in atoms):
        return None
    text = str(rdkit("Chem").MolToSmiles(molecule))
    return text if len(text) <= LONGEST else None


def parse(smiles: str) -> Any:
    """RDKit's molecule, or None where the text is no molecule and nothing else. Raises MissingExtraError."""
    chem = rdkit("Chem")
    if smiles.split() != [smiles]:  # RDKit would take what follows a blank for the molecule's name
        return None
    with rdkit("rdBase").BlockLogs():
        return chem.MolFromSmiles(smiles)


def evenly(items: Iterable[Item], most: int, by: Callable[[Item], str]) -> list[Item]:
    """At most so many items of each `by`, chosen by hash, so that one constant answer is rarely right."""
    seen: Counter[str] = Counter()
    chosen = []
    for item in by_hash(items, "evenly"):
        seen[by(item)] += 1
        if seen[by(item)] <= most:
            chosen.append(item)
    return chosen


def rdkit(module: str) -> Any:
    """A module of RDKit, as "Chem". Raises MissingExtraError where RDKit is not installed."""
    try:
        return importlib.import_module(f"rdkit.{module}")
    except ImportError:
        raise MissingExtraError('molecules need the package rdkit: pip install "xloom[suite]"') from None

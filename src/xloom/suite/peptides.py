"""Short peptides: antimicrobial or not (modlAMP's table), and what Biopython's ProtParam computes from the sequence.

Takes modlAMP's `AMPvsUniProt.csv`; gives items whose key is the sequence and whose group is its similarity cluster.
No property of a reserved sequence is computed. Knows nothing of splits or files.
"""

import csv
import io
from collections.abc import Iterator
from importlib import import_module

from xloom.errors import MissingExtraError
from xloom.hub.fetch import MODLAMP
from xloom.suite.items import Domain, Item, Read, Task
from xloom.suite.reserved import is_reserved
from xloom.suite.sequences import RESIDUES, similarity_groups, spaced

MEMBER = "modlamp/data/AMPvsUniProt.csv"
SHORTEST, LONGEST = 3, 30  # residues; short rows train quickly
PIECE = 20  # residues whose properties are asked for: a longer sequence gives its first ones
NEUTRAL = 0.5  # elementary charges: closer to 0 than this counts as neutral


def read(read: Read) -> list[Item]:
    """The items of all four tasks.

    `antimicrobial`: sequences of 3 to 30 standard residues. The others: the first 20 residues of every sequence of
    standard residues, of whatever length. Raises MissingExtraError without Biopython.
    """
    rows = [
        (sequence.strip(), label.strip())
        for sequence, label in list(csv.reader(io.StringIO(read(MODLAMP, MEMBER).decode("utf-8"))))[1:]
    ]
    plain = [(sequence, label) for sequence, label in rows if len(sequence) >= SHORTEST and set(sequence) <= RESIDUES]
    whole = [(sequence, label) for sequence, label in plain if len(sequence) <= LONGEST]
    # a piece of a reserved sequence says something about it: neither is looked at
    pieces = sorted({sequence[:PIECE] for sequence, _ in plain if not is_reserved(sequence)})
    pieces = [piece for piece in pieces if not is_reserved(piece)]
    free = [sequence for sequence, _ in whole if not is_reserved(sequence)]
    groups = similarity_groups([*free, *pieces])
    items = [_antimicrobial(sequence, label, groups) for sequence, label in whole]
    return items + [item for piece in pieces for item in _properties(piece, groups[piece])]


def charge_word(charge: float) -> str:
    """`negative`, `neutral` or `positive`, from a net charge in elementary charges."""
    if abs(charge) < NEUTRAL:
        return "neutral"
    return "positive" if charge > 0 else "negative"


def _antimicrobial(sequence: str, label: str, groups: dict[str, str]) -> Item:
    if is_reserved(sequence):
        return Item("antimicrobial", "", "", sequence, sequence, reserved=True)
    return Item("antimicrobial", spaced(sequence), "yes" if label == "1" else "no", sequence, groups[sequence])


def _properties(sequence: str, group: str) -> Iterator[Item]:
    try:
        prot_param = import_module("Bio.SeqUtils.ProtParam")
    except ImportError:
        raise MissingExtraError('peptide properties need Biopython: pip install "xloom[suite]"') from None
    analysis = prot_param.ProteinAnalysis(sequence)
    answers = {
        "charge": charge_word(analysis.charge_at_pH(7.0)),
        "gravy": "hydrophobic" if analysis.gravy() > 0 else "hydrophilic",
        "isoelectric": str(round(analysis.isoelectric_point())),
    }
    for task, answer in answers.items():
        yield Item(task, spaced(sequence), answer, sequence, group)


TASKS = {
    "antimicrobial": Task(
        (
            "Is the peptide {} antimicrobial? Answer yes or no.",
            "Does {} kill microbes? Answer yes or no.",
            "Antimicrobial, yes or no: {}",
            "Would {} act against bacteria? Say yes or no.",
            "Yes or no: is {} one of the peptides that stop microbes from growing?",
            "{}: does this chain of residues defend against microbes, yes or no?",
        ),
        answers=("yes", "no"),
        share=0.4,
    ),
    "charge": Task(
        (
            "Is the net charge of {} at pH 7 negative, neutral or positive?",
            "Net charge at pH 7, negative, neutral or positive: {}",
            "What charge does the peptide {} carry in neutral water? Answer negative, neutral or positive.",
            "{} at pH 7: negative, neutral or positive?",
            "Say whether {} is negative, neutral or positive at neutral pH.",
        ),
        answers=("negative", "neutral", "positive"),
        share=0.25,
    ),
    "gravy": Task(
        (
            "Is {} hydrophobic or hydrophilic on average?",
            "Hydrophobic or hydrophilic by its mean hydropathy: {}",
            "Does the sign of GRAVY make {} hydrophobic or hydrophilic?",
            "{}: is this peptide, all in all, hydrophobic or hydrophilic?",
            "Averaged over its residues, is {} hydrophobic or hydrophilic?",
        ),
        answers=("hydrophobic", "hydrophilic"),
        share=0.2,
    ),
    "isoelectric": Task(
        (
            "What is the isoelectric point of {}? Answer with a whole number.",
            "Isoelectric point, as a whole number: {}",
            "At which pH does {} carry no net charge? Give a whole number.",
            "To the nearest whole number, what is the pI of {}?",
            "{}: estimate its isoelectric point as a whole number.",
        ),
        scorer="number",
        options={"tolerance": 0.4},
        share=0.15,
    ),
}

DOMAIN = Domain(
    about="short peptides: antimicrobial or not (modlAMP), charge, hydropathy and isoelectric point (ProtParam)",
    packages=(MODLAMP,),
    read=read,
    tasks=TASKS,
)

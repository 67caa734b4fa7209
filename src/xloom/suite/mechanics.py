"""Protein mechanics, in the task strings of the X-LoRA paper: CalculateForce<A C D ...> gives [0.262].

The labels are computed with the coarse-grained pulling model of `pulling` and are no measurements: a table shipped with
xloom holds the largest force and the work of about 2,400 chains (scripts/make_mechanics.py). Forces and energies stand
as 0..1, 1 being the largest of the training rows. Knows nothing of where rows are written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources import files
from typing import Any

from xloom.suite.items import Domain, Item, Read, Task, split_of
from xloom.suite.pulling import LONGEST, SHORTEST, pull
from xloom.suite.reserved import is_reserved
from xloom.suite.sequences import is_plain, similarity_groups, spaced, unspaced

Labels = Mapping[str, float]  # force and energy, 0..1

TABLE = "data/mechanics.json"
TOLERANCE = 0.1
MEASURED = ("force", "energy")  # what `check_sequence` can be asked about
GENERATED = 14  # residues: the longest chain that an answer spells out


def read(_: Read) -> list[Item]:
    """The items of the shipped table; nothing is fetched."""
    table = json.loads(files("xloom.suite").joinpath(TABLE).read_text(encoding="utf-8"))
    return list(items_of((sequence, force, energy) for sequence, force, energy in table["rows"]))


def items_of(rows: Iterable[tuple[str, float, float]], *, inverse: bool = True) -> Iterator[Item]:
    """Items of all tasks from rows of a sequence, its force and its energy, in any units.

    Without `inverse` none of the Generate tasks, whose answers are judged by `pulling`: for a table of other labels.
    Reserved sequences are left out, and count for no scale.
    """
    free = {sequence: (force, energy) for sequence, force, energy in rows if not is_reserved(sequence)}
    groups = similarity_groups(free)
    training = [labels for sequence, labels in free.items() if split_of(groups[sequence]) == "train"]
    scales = {
        "force": max((force for force, _ in training), default=1.0),
        "energy": max((energy for _, energy in training), default=1.0),
    }
    for sequence, (force, energy) in free.items():
        labels = {"force": _scaled(force, scales["force"]), "energy": _scaled(energy, scales["energy"])}
        for task, answer in _FORWARD.items():
            yield Item(task, spaced(sequence), answer(labels), sequence, groups[sequence])
        if inverse and len(sequence) <= GENERATED:
            for task, names in _INVERSE.items():
                asked = {name: labels[name] for name in names}
                facts = {"targets": asked, "scales": {name: scales[name] for name in names}}
                text = ",".join(f"{value:.3f}" for value in asked.values())
                yield Item(task, text, f"[{spaced(sequence)}]", sequence, groups[sequence], facts=facts)


def check_sequence(answer: str, options: Mapping[str, Any]) -> float:
    """1.0 if the answer is a chain that `pulling` labels as asked, else 0.0: the `sequence` scorer.

    The answer may have blanks and square brackets; a chain has 8 to 30 standard residues. `options` holds `targets`
    (`force`, `energy` or both, 0..1), `scales` (what 1 stands for, in pN and kJ/mol) and `tolerance`. Raises
    MissingExtraError without OpenMM.
    """
    sequence = unspaced(answer)
    if not is_plain(sequence, SHORTEST, LONGEST):
        return 0.0
    found = pull(sequence)
    values = {"force": found.force, "energy": found.energy}
    near = (
        abs(_scaled(values[name], options["scales"][name]) - target) <= options["tolerance"] + 1e-9
        for name, target in options["targets"].items()
    )
    return float(all(near))


def _scaled(value: float, largest: float) -> float:
    """Three decimals from 0 to 1, 1 for the largest and what is beyond."""
    return round(min(max(value / largest, 0.0), 1.0), 3)


_FORWARD: dict[str, Callable[[Labels], str]] = {
    "CalculateForce": lambda labels: f"[{labels['force']:.3f}]",
    "CalculateEnergy": lambda labels: f"[{labels['energy']:.3f}]",
    "CalculateForceEnergy": lambda labels: f"[{labels['force']:.3f},{labels['energy']:.3f}]",
    "unfolding force": lambda labels: f"{labels['force']:.2f}",
    "unfolding energy": lambda labels: f"{labels['energy']:.2f}",
}
_INVERSE = {
    "GenerateForce": ("force",),
    "GenerateEnergy": ("energy",),
    "GenerateForceEnergy": ("force", "energy"),
}


def _formal(name: str, share: float) -> Task:
    """A task of the paper's; its string is the one way to ask."""
    scorer = "sequence" if name in _INVERSE else "numbers"
    return Task((f"{name}<{{}}>",), scorer, {"tolerance": TOLERANCE}, share=share)


TASKS = {
    "CalculateForce": _formal("CalculateForce", 0.23),
    "CalculateEnergy": _formal("CalculateEnergy", 0.15),
    "CalculateForceEnergy": _formal("CalculateForceEnergy", 0.14),
    "unfolding force": Task(
        (
            "How much force does it take to unfold {}? Give a number between 0 and 1.",
            "How strong is the chain {} when its ends are pulled apart, from 0 to 1?",
            "From 0 (weak) to 1 (strong), what is the largest force as {} unfolds?",
            "{}: how hard must one pull to unfold it? Answer with a number from 0 to 1.",
            "Rate the unfolding force of {} between 0 and 1.",
        ),
        "number",
        {"tolerance": TOLERANCE},
        share=0.2,
    ),
    "unfolding energy": Task(
        (
            "How much energy does it take to unfold {}? Give a number between 0 and 1.",
            "How much work does pulling the ends of {} apart cost, from 0 to 1?",
            "From 0 (little) to 1 (much), what energy does unfolding {} need?",
            "{}: how much energy goes into stretching it out? Answer with a number from 0 to 1.",
            "Rate the unfolding energy of {} between 0 and 1.",
        ),
        "number",
        {"tolerance": TOLERANCE},
        share=0.13,
    ),
    "GenerateForce": _formal("GenerateForce", 0.05),
    "GenerateEnergy": _formal("GenerateEnergy", 0.05),
    "GenerateForceEnergy": _formal("GenerateForceEnergy", 0.05),
}

DOMAIN = Domain(
    about="force and energy to unfold short protein chains, computed with a coarse-grained pulling model, not measured",
    packages=(),
    read=read,
    tasks=TASKS,
)

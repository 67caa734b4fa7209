"""A coarse-grained pulling model of short protein chains: how much force and energy it takes to unfold one.

A model, not a measurement: one bead per residue, at its alpha carbon, no solvent and no temperature. The potential is

    sum over bonds      (k/2) (r - r0)^2
    + native contacts   e_ij ((d/r)^12 - 2 (d/r)^6)      d: distance in the fold
    + other pairs       c (s/r)^12
    + spring            (K/2) (R - L)^2                  R: distance of the ends

L grows in small steps from its value in the fold, and the chain is relaxed at each. Force is K (L - R), work the sum of
force times step. Sources:

- fold, helix or hairpin: propensities of Chou and Fasman, Adv. Enzymol. 47, 45 (1978), and ideal geometry;
- strengths e_ij: Miyazawa and Jernigan, J. Mol. Biol. 256, 623 (1996), table 3, in units of RT;
- such chains pulled at their ends: Cieplak, Hoang and Robbins, Proteins 49, 104 (2002).

Needs OpenMM to pull, and nothing to give the fold. Knows nothing of tables, tasks or answers.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from xloom.errors import DataError, MissingExtraError
from xloom.suite.sequences import RESIDUES

Point = tuple[float, float, float]  # nm

SHORTEST, LONGEST = 8, 30  # residues
RT = 2.479  # kJ/mol at 298 K, the unit of the contact energies
BOND = 0.38  # nm between neighbours along the chain
BOND_STIFFNESS = 50_000.0  # kJ/mol/nm^2
CONTACT = 0.65  # nm: beads nearer than this in the fold are in contact
APART = 3  # residues between which the first contact can be
CORE, CORE_STRENGTH = 0.4, 1.0  # nm and kJ/mol of the repulsion between all other beads
SPRING = 200.0  # kJ/mol/nm^2 (332 pN/nm) between the ends
STEP = 0.05  # nm by which the spring grows
TAUT = 0.97  # of the contour length, where pulling ends
WINDOW = 3  # steps over which force is averaged
TOLERANCE = 0.1  # kJ/mol/nm, root mean square force of a relaxed chain
PICONEWTON = 1.66054  # pN in one kJ/mol/nm

# Chou-Fasman P(a) and P(b)
HELIX = {
    "A": 1.42, "C": 0.70, "D": 1.01, "E": 1.51, "F": 1.13, "G": 0.57, "H": 1.00, "I": 1.08, "K": 1.16, "L": 1.21,
    "M": 1.45, "N": 0.67, "P": 0.57, "Q": 1.11, "R": 0.98, "S": 0.77, "T": 0.83, "V": 1.06, "W": 1.08, "Y": 0.69,
}  # fmt: skip
STRAND = {
    "A": 0.83, "C": 1.19, "D": 0.54, "E": 0.37, "F": 1.38, "G": 0.75, "H": 0.87, "I": 1.60, "K": 0.74, "L": 1.30,
    "M": 1.05, "N": 0.89, "P": 0.55, "Q": 1.10, "R": 0.93, "S": 0.75, "T": 1.19, "V": 1.70, "W": 1.37, "Y": 1.47,
}  # fmt: skip

# Miyazawa-Jernigan -e_ij in units of RT: row i holds the contacts with residue i and those after it
_ORDER = "CMFILVWYAGTSQNEDHRKP"
_STRENGTHS = """
5.44 4.99 5.80 5.50 5.83 4.96 4.95 4.16 3.57 3.16 3.11 2.86 2.59 2.85 2.41 2.27 3.60 2.57 1.95 3.07
5.46 6.56 6.02 6.41 5.32 5.55 4.91 3.94 3.39 3.51 3.03 2.95 3.30 2.57 2.89 3.98 3.12 2.48 3.45
7.26 6.84 7.28 6.29 6.16 5.66 4.81 4.13 4.28 4.02 3.75 4.10 3.48 3.56 4.77 3.98 3.36 4.25
6.54 7.04 6.05 5.78 5.25 4.58 3.78 4.03 3.52 3.24 3.67 3.17 3.27 4.14 3.63 3.01 3.76
7.37 6.48 6.14 5.67 4.91 4.16 4.34 3.92 3.74 4.04 3.40 3.59 4.54 4.03 3.37 4.20
5.52 5.18 4.62 4.04 3.38 3.46 3.05 2.83 3.07 2.48 2.67 3.58 3.07 2.49 3.32
5.06 4.66 3.82 3.42 3.22 2.99 3.07 3.11 2.84 2.99 3.98 3.41 2.69 3.73
4.17 3.36 3.01 3.01 2.78 2.76 2.97 2.76 2.79 3.52 3.16 2.60 3.19
2.72 2.31 2.32 2.01 1.84 1.89 1.70 1.51 2.41 1.83 1.31 2.03
2.24 2.08 1.82 1.74 1.66 1.59 1.22 2.15 1.72 1.15 1.87
2.12 1.96 1.88 1.90 1.80 1.74 2.42 1.90 1.31 1.90
1.67 1.58 1.49 1.63 1.48 2.11 1.62 1.05 1.57
1.68 1.71 1.68 1.51 2.08 1.64 1.21 1.53
1.54 1.46 1.42 1.98 1.80 1.29 1.73
1.21 1.02 2.32 2.29 1.68 1.33
0.91 2.15 2.27 1.80 1.26
3.05 2.16 1.35 2.25
1.55 0.59 1.70
0.12 0.97
1.75
"""


def _strengths() -> dict[tuple[str, str], float]:
    table = {}
    for first, line in enumerate(_STRENGTHS.split("\n")[1:-1]):
        for second, value in enumerate(line.split(), first):
            table[_ORDER[first], _ORDER[second]] = table[_ORDER[second], _ORDER[first]] = float(value)
    return table


STRENGTH = _strengths()


@dataclass(frozen=True)
class Pull:
    """What one pull gave: the largest smoothed force in pN and the work in kJ/mol."""

    force: float
    energy: float


def is_helix(sequence: str) -> bool:
    """Whether the chain folds to a helix (else a hairpin): the larger mean Chou-Fasman propensity decides."""
    return sum(HELIX[residue] - STRAND[residue] for residue in sequence) >= 0


def fold(sequence: str) -> list[Point]:
    """The folded chain: one point in nm per residue. Raises DataError for what is no sequence of 8 to 30 residues."""
    if not SHORTEST <= len(sequence) <= LONGEST or not set(sequence) <= RESIDUES:
        raise DataError(f"{sequence!r} is no sequence of {SHORTEST} to {LONGEST} standard residues")
    return helix(len(sequence)) if is_helix(sequence) else hairpin(len(sequence))


def helix(length: int) -> list[Point]:
    """Alpha carbons of an ideal alpha helix: radius 0.23 nm, 100 degrees and 0.15 nm per residue."""
    turn = math.radians(100)
    return [(0.23 * math.cos(turn * n), 0.23 * math.sin(turn * n), 0.15 * n) for n in range(length)]


def hairpin(length: int) -> list[Point]:
    """Alpha carbons of two pleated strands, paired from the ends, 0.5 nm apart, with a tight turn between them."""
    rungs = length // 2
    half = []
    for rung in range(rungs):
        inmost = rung == rungs - 1 and length % 2 == 0
        half.append((0.33 * rung, 0.19 if inmost else 0.25, 0.09 * (-1) ** rung))
    tip = [(0.33 * (rungs - 1) + 0.22, 0.0, 0.09 * (-1) ** rungs)] if length % 2 else []
    return half + tip + [(x, -y, z) for x, y, z in reversed(half)]


def contacts(sequence: str) -> list[tuple[int, int, float, float]]:
    """Native contacts: the two residues, their distance in the fold in nm, the strength in kJ/mol."""
    points = fold(sequence)
    return [
        (i, j, distance, RT * STRENGTH[sequence[i], sequence[j]])
        for i in range(len(points))
        for j in range(i + APART, len(points))
        if (distance := math.dist(points[i], points[j])) < CONTACT
    ]


def pull(sequence: str) -> Pull:
    """Pull the ends of the folded chain apart, step by step, the chain relaxed at each; the same at every call.

    Raises DataError for what is no sequence of 8 to 30 residues, MissingExtraError without OpenMM.
    """
    forces = force_curve(sequence)
    smooth = [sum(forces[n : n + WINDOW]) / WINDOW for n in range(len(forces) - WINDOW + 1)]
    return Pull(PICONEWTON * max(smooth), STEP * sum(forces))


def force_curve(sequence: str) -> list[float]:
    """The force in kJ/mol/nm between the ends at each step of a pull."""
    points = fold(sequence)
    mm, context = _context(sequence, points)
    context.setPositions([mm.Vec3(*point) for point in points])
    start, end = math.dist(points[0], points[-1]), TAUT * BOND * (len(points) - 1)
    forces = []
    for number in range(1, math.ceil((end - start) / STEP) + 1):
        length = start + STEP * number
        context.setParameter("length", length)
        mm.LocalEnergyMinimizer.minimize(context, TOLERANCE)
        positions = context.getState(positions=True).getPositions(asNumpy=True)._value
        forces.append(SPRING * (length - math.dist(positions[0], positions[-1])))
    return forces


def _context(sequence: str, points: list[Point]) -> tuple[Any, Any]:
    try:
        mm = import_module("openmm")
    except ImportError:
        raise MissingExtraError('pulling a chain needs OpenMM: pip install "xloom[suite]"') from None
    last = len(points) - 1
    native = contacts(sequence)
    bonds = mm.HarmonicBondForce()
    for n in range(last):
        bonds.addBond(n, n + 1, math.dist(points[n], points[n + 1]), BOND_STIFFNESS)
    attraction = mm.CustomBondForce("strength*((native/r)^12-2*(native/r)^6)")
    for name in ("native", "strength"):
        attraction.addPerBondParameter(name)
    for i, j, distance, strength in native:
        attraction.addBond(i, j, [distance, strength])
    repulsion = mm.CustomBondForce(f"{CORE_STRENGTH}*({CORE}/r)^12")
    taken = {(i, j) for i, j, _, _ in native}
    for i in range(last + 1):
        for j in range(i + 2, last + 1):
            if (i, j) not in taken:
                repulsion.addBond(i, j, [])
    spring = mm.CustomBondForce(f"{SPRING / 2}*(r-length)^2")
    spring.addGlobalParameter("length", 0.0)
    spring.addBond(0, last, [])
    system = mm.System()
    for _ in points:
        system.addParticle(1.0)
    for force in (bonds, attraction, repulsion, spring):
        system.addForce(force)
    platform = mm.Platform.getPlatformByName("Reference")
    return mm, mm.Context(system, mm.VerletIntegrator(0.001), platform)

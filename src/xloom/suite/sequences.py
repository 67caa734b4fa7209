"""Protein sequences in one-letter code: which are plain, how a prompt writes them, which resemble each other.

Knows nothing of tables, labels or splits.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWY")  # the 20 standard amino acids
SIMILAR = 0.3  # share of 3-mers in common from which two sequences count as relatives


def is_plain(sequence: str, shortest: int, longest: int) -> bool:
    """Whether a sequence has `shortest` to `longest` residues, all of them standard."""
    return shortest <= len(sequence) <= longest and set(sequence) <= RESIDUES


def spaced(sequence: str) -> str:
    """Residues with blanks between them, one token each; without, the tokenizer merges them irregularly."""
    return " ".join(sequence)


def unspaced(text: str) -> str:
    """The sequence in a text that may have blanks, lower case or square brackets around it; not checked."""
    return "".join(text.strip().removeprefix("[").removesuffix("]").split()).upper()


def kmers(sequence: str, size: int = 3) -> set[str]:
    """The distinct pieces of `size` residues of a sequence."""
    return {sequence[start : start + size] for start in range(len(sequence) - size + 1)}


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

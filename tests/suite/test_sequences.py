import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.suite.sequences import RESIDUES, is_plain, kmers, similarity_groups, spaced, unspaced


def similar(one: str, other: str) -> bool:
    return 10 * len(kmers(one) & kmers(other)) >= 3 * len(kmers(one) | kmers(other))


def components(sequences: set[str]) -> dict[str, str]:
    """What `similarity_groups` means: spread from each sequence to its relatives until nothing is left."""
    groups: dict[str, str] = {}
    for start in sorted(sequences):
        waiting = [] if start in groups else [start]
        while waiting:
            sequence = waiting.pop()
            groups[sequence] = start
            waiting += [other for other in sequences if other not in groups and similar(sequence, other)]
    return groups


@given(st.sets(st.text("AG", min_size=3, max_size=9) | st.text("AGKL", min_size=3, max_size=8), max_size=12))
def test_groups_are_the_components_of_similarity(sequences: set[str]) -> None:
    assert similarity_groups(sequences) == components(sequences)


def test_relatives_are_grouped_and_strangers_are_not() -> None:
    groups = similarity_groups(["GLFDIVKKVV", "GLFDIVKKIA", "RRWWRRWW"])
    assert groups == {"GLFDIVKKVV": "GLFDIVKKIA", "GLFDIVKKIA": "GLFDIVKKIA", "RRWWRRWW": "RRWWRRWW"}


def test_three_of_ten_in_common_are_enough() -> None:
    """3 of 10 different 3-mers in common make relatives, 3 of 11 do not."""
    assert len(set(similarity_groups(["ACDEFGH", "ACDEFKLMNP"]).values())) == 1
    assert len(set(similarity_groups(["ACDEFGH", "ACDEFKLMNPQ"]).values())) == 2


@given(st.text("".join(sorted(RESIDUES)), min_size=1, max_size=30))
def test_writing_is_read_back(sequence: str) -> None:
    assert spaced(sequence).split() == list(sequence)
    assert unspaced(f" [{spaced(sequence).lower()}]\n") == unspaced(sequence) == sequence


@pytest.mark.parametrize(
    ("sequence", "plain"), [("GLF", True), ("GL", False), ("GLFG", False), ("GLX", False), ("gLF", False), ("", False)]
)
def test_plain_sequences(sequence: str, plain: bool) -> None:
    assert is_plain(sequence, 3, 3) is plain

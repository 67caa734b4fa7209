"""What messages are put together from."""

from xloom.errors import near


def test_the_nearest_name_is_said():
    known = ("materials", "mechanics", "peptides")
    assert near("material", known) == " (did you mean 'materials'?)"
    assert near("zoo", known) == ""
    assert near("peptide", known, cutoff=0.99) == ""
    assert near("a", iter([])) == ""

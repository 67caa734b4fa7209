import sys

import pytest

from xloom.errors import DataError, MissingExtraError
from xloom.suite import molecules
from xloom.suite.items import Item
from xloom.suite.molecules import canonical, choice_wordings, evenly, ordinary, scaffold, value_wordings


def test_without_rdkit_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rdkit", "rdkit.Chem"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'pip install "xloom\[suite\]"'):
        canonical("CCO")


def test_wordings_hold_the_item_once_and_nothing_unfilled() -> None:
    values = value_wordings("logP", "Answer with one decimal.")
    choices = choice_wordings("melting point", "low or high")
    for wordings in (values, choices):
        assert len(set(wordings)) >= 6
        for wording in wordings:
            assert wording.count("{}") == 1
            assert not {"WHAT", "HINT", "CHOICES", "ASK"} & set(wording.replace("{}", "").split())
    assert 0 < sum("one decimal" in wording for wording in values) < len(values)
    assert 0 < sum("low or high" in wording for wording in choices) < len(choices)


def test_wordings_keep_a_word_that_stands_for_another_part() -> None:
    assert choice_wordings("ASK", "WHAT or CHOICES", "HINT")[0] == "Is the ASK of {} WHAT or CHOICES?"


def test_evenly_cuts_only_what_is_too_many_whatever_the_order() -> None:
    items = [Item("gap", f"C{n}", "7.0" if n < 8 else "5.0", f"C{n}", "") for n in range(10)]
    chosen = evenly(items, 3, lambda item: item.answer)
    assert sorted(item.answer for item in chosen) == ["5.0"] * 2 + ["7.0"] * 3
    assert evenly(reversed(items), 3, lambda item: item.answer) == chosen


class TestRdkit:
    @pytest.fixture(autouse=True)
    def rdkit(self) -> None:
        pytest.importorskip("rdkit", reason="needs rdkit, of the extra suite")

    @pytest.mark.parametrize(
        ("smiles", "text"),
        [("OCC", "CCO"), ("C1=CC=CC=C1", "c1ccccc1"), ("C(C)(=O)[O-]", "CC(=O)[O-]"), ("N[C@H](C)O", "C[C@@H](N)O")],
    )
    def test_canonical(self, smiles: str, text: str) -> None:
        assert canonical(smiles) == text
        assert canonical(text) == text

    @pytest.mark.parametrize(
        "text", ["", " ", "C1CC", "yes", "CCO is ethanol", "CCO\nCCO", " CCO", "C(C)(C)(C)(C)C", "é"]
    )
    def test_what_is_no_molecule_alone_has_no_canonical_form(self, text: str) -> None:
        assert canonical(text) is None

    def test_nothing_is_printed_about_a_bad_molecule(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert canonical("C1CC") is None and canonical("c1cccc1") is None
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("CCCC1CC2CC1C2", "OC1CC2CC1C2"),  # several rings: Murcko scaffold
            ("CCc1ccc(OC)cc1", "CCCCc1ccc(OCC)cc1"),  # one ring: what is bonded to it
            ("C/C=C/C", "C/C=C\\C"),  # no stereo marks
            ("C[C@H](O)C1CC1", "C[C@@H](O)C1CC1"),
            ("OCC", "CCO"),
        ],
    )
    def test_relatives_are_in_one_group(self, one: str, other: str) -> None:
        assert scaffold(one) == scaffold(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [("CCO", "CCN"), ("Cc1ccccc1", "Oc1ccccc1"), ("Cc1ccccc1C", "Cc1ccc(C)cc1"), ("C1CC2CC12", "C1OC2CC12")],
    )
    def test_others_are_not(self, one: str, other: str) -> None:
        assert scaffold(one) != scaffold(other)

    def test_a_group_does_not_hang_on_how_the_molecule_is_written(self) -> None:
        for spellings in (("Cc1ccc(O)cc1", "OC1=CC=C(C)C=C1"), ("c1cc[nH]c1C", "CC1=CC=CN1")):
            assert len({scaffold(spelling) for spelling in spellings}) == 1

    def test_no_molecule_has_no_group(self) -> None:
        with pytest.raises(DataError, match="'C1CC' is not a molecule"):
            scaffold("C1CC")

    @pytest.mark.parametrize(
        "smiles",
        [
            "[Na+].[Cl-]",
            "CCO.O",
            "O",
            "[2H]C([2H])O",
            "C[Si](C)C",
            "C" * 23,
            "C1CC",
            "[NH3+][C@@H](CC(=O)[O-])[C@@H](C(=O)[O-])[C@H](N)O",
        ],
    )
    def test_not_ordinary(self, smiles: str) -> None:
        assert ordinary(smiles) is None

    def test_ordinary(self) -> None:
        assert ordinary("C1=CC=CC=C1[N+](=O)[O-]") == "O=[N+]([O-])c1ccccc1"
        assert ordinary("C" * 22) == "C" * 22
        assert len(ordinary("FC(F)(Cl)CBr") or "") <= molecules.LONGEST

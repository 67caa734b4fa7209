"""Grades: hand-made answers, and what must hold for any text."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import ConfigError, DataError, MissingExtraError, NotFoundError
from xloom.evaluation.scorers import NAMED, Grade, Scorer, by_place, find_scorer, read_number


def grade(name, answer, right, **options):
    return find_scorer(name, options).grade(answer, right).score


@pytest.mark.parametrize(
    ("name", "answer", "right", "options", "expected"),
    [
        ("exact", " Yes ", "yes", {}, 1),
        ("exact", "yes.", "yes", {}, 0),
        ("exact", "", "yes", {}, 0),
        ("contains", "The capital is Paris, of course", "Paris", {"any": ["paris"]}, 1),
        ("contains", "comparison", "Paris", {"any": ["paris"]}, 0),
        ("contains", "it has 12 legs", "12", {"any": ["12", "twelve"]}, 1),
        ("contains", "it has 112 legs", "12", {"any": ["12", "twelve"]}, 0),
        ("contains", "C++ it is", "C++", {"any": ["C++"]}, 1),
        ("agreement", "a b x d", "a b c d", {}, 0.5),
        ("agreement", "a b c d e f", "a b c d", {}, 1),
        ("agreement", "b a", "a b", {}, 0),
        ("number", "about 7.4 eV, or 3", "7", {"tolerance": 0.5}, 1),
        ("number", "7.6", "7.0", {"tolerance": 0.5}, 0),
        ("number", "\u22121.5", "-1.5", {}, 1),
        ("number", "0.4", "0.3", {"tolerance": 0.1}, 1),
        ("number", "none", "1", {"tolerance": 10}, 0),
        ("number", "qm9 says 4", "4", {}, 1),
        ("number", "LUMO \u22122.3", "-2.3", {}, 1),
        ("number", "[0.262]", "[0.300]", {"tolerance": 0.05}, 1),
        ("numbers", "[0.2,0.9]", "[0.25,0.5]", {"tolerance": 0.1}, 0.5),
        ("numbers", "1, 2, 3", "1, 2", {}, 2 / 3),
        ("numbers", "1", "1, 2", {}, 0.5),
        ("numbers", "", "1, 2", {}, 0),
    ],
)
def test_grades(name, answer, right, options, expected):
    assert grade(name, answer, right, **options) == pytest.approx(expected)


def test_parts_are_graded_by_their_own_scorers():
    parts = [{"answer": "yes"}, {"answer": "7.0", "scorer": "number", "options": {"tolerance": 0.5}}]
    scorer = find_scorer("parts", {"parts": parts})
    assert scorer.grade("yes; 7.2", "yes; 7.0").score == 1
    assert scorer.grade("7.2; yes", "yes; 7.0").score == 0
    assert scorer.grade("no;7.4", "yes; 7.0").score == 0.5
    assert scorer.grade("yes", "yes; 7.0").score == 0.5
    assert scorer.grade("yes; x", "yes; 7.0").numbers == ((None, 7.0),)


def test_numbers_are_handed_on_for_mae_and_r2():
    assert find_scorer("numbers", {}).grade("0.5, x, 3", "1, 2, 3").numbers == ((0.5, 1.0), (None, 2.0), (3.0, 3.0))
    assert find_scorer("number", {}).grade("a", "2").numbers == ((None, 2.0),)


@given(st.floats(-1e6, 1e6), st.sampled_from(["{}", "it is {}", "[{}]", "x={} eV"]))
def test_a_number_is_read_as_it_was_written(value, words):
    assert read_number(words.format(value)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2.3 eV", -2.3),
        ("LUMO -2.3", -2.3),
        ("LUMO: -2.3", -2.3),
        ("LUMO=-2.3", -2.3),
        ("(-2.3)", -2.3),
        ("LUMO-2.3", 2.3),  # a hyphen after a letter or digit joins
        ("carbon-12", 12),
        ("3-5", 3),
        ("LUMO\u22122.3", -2.3),  # a minus sign is no hyphen
        ("1e-3", 1e-3),
        ("1e\u22123", 1e-3),
        ("+.5", 0.5),
        ("qm9", None),
        ("1e999", None),
    ],
)
def test_signs(text, value):
    assert read_number(text) == value


def test_places_of_numbers_are_kept_apart():
    """Force and energy, say: the spread between them is none of either's."""
    scorer = find_scorer("numbers", {})
    found = by_place([scorer.grade("1, 20", "1, 10"), scorer.grade("x", "2, 30"), Grade(0.0, ((5.0, 3.0),))])
    assert found == [[(1.0, 1.0), (None, 2.0), (5.0, 3.0)], [(20.0, 10.0), (None, 30.0)]]
    assert by_place([]) == by_place([Grade(1.0)]) == []


@given(st.text())
def test_any_text_can_be_graded(text):
    for name in ("exact", "contains", "agreement", "number", "numbers", "parts"):
        options = {"any": ["a"], "parts": [{"answer": "1", "scorer": "number"}, {"answer": "b"}], "tolerance": 1.0}
        found = find_scorer(name, options).grade(text, "1")
        assert 0 <= found.score <= 1
        assert all(p is None or math.isfinite(p) for p, _ in found.numbers)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_agreement_counts_the_common_beginning(reference, said):
    same = 0
    for left, right in zip(reference, said, strict=False):
        if left != right:
            break
        same += 1
    assert grade("agreement", " ".join(said), " ".join(reference)) == same / len(reference)


def test_molecules(tmp_path):
    pytest.importorskip("rdkit")
    assert grade("smiles", "OCC", "CCO") == 1
    assert grade("smiles", "CCO and more", "CCO") == 0
    assert grade("smiles", "(", "CCO") == 0
    assert grade("smiles", "", "CCO") == 0
    (tmp_path / "table.json").write_text(json.dumps({"CCO": 7.1, "CC": {"gap": 9.0}}))
    options = {"property": "gap", "target": 7.0, "tolerance": 0.5, "table": "table.json"}
    scorer = find_scorer("molecule", options, tmp_path)
    assert scorer.grade("OCC", "CCO").score == 1
    assert scorer.grade("CC", "CCO").score == 0  # known, but far
    assert scorer.grade("CCCO", "CCO").score == 0  # not in the table
    assert scorer.grade("nonsense(", "CCO").score == 0
    with pytest.raises(NotFoundError, match=r"nowhere\.json"):
        find_scorer("molecule", {**options, "table": "nowhere.json"}, tmp_path).grade("CC", "CCO")


def test_reasoning_gym_judges_its_own():
    pytest.importorskip("reasoning_gym")
    options = {"dataset": "chain_sum", "entry": {"answer": "171", "metadata": {}}}
    assert grade("reasoning", " 171", "171", **options) == 1
    assert grade("reasoning", "170", "171", **options) < 0.5


def test_a_missing_package_names_the_extra(monkeypatch):
    import importlib

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for name, options in (("smiles", {}), ("reasoning", {"dataset": "chain_sum", "entry": {"answer": "1"}})):
        with pytest.raises(MissingExtraError, match=r"xloom\[suite\]"):
            grade(name, "1", "1", **options)


def test_functions_of_the_users_own():
    scorer = find_scorer(lambda answer, row: 0.25 * len(answer) + row["extra"])
    assert scorer.grade("ab", "", {"extra": 0.5}).score == 1.0
    assert find_scorer(lambda answer, row: answer == "a").grade("a", "").score == 1.0
    for wrong in (1.5, -0.1, "good", None, math.nan):
        with pytest.raises(DataError, match="expected a number from 0 to 1"):
            find_scorer(lambda answer, row, wrong=wrong: wrong).grade("a", "")
    assert find_scorer("operator:contains").name == "operator:contains"


def test_a_function_that_raises_is_named():
    def fragile(answer, row):
        return float(row["weight"])

    with pytest.raises(DataError, match="^scorer fragile: raised KeyError: 'weight'$"):
        find_scorer(fragile).grade("a", "")

    def picky(answer, row):
        raise NotFoundError("table.json: not there")

    with pytest.raises(NotFoundError, match=r"^table\.json"):
        find_scorer(picky).grade("a", "")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("numbr", "did you mean 'number'"),
        ("nowhere_at_all:f", "cannot import 'nowhere_at_all'"),
        ("json:nothing", "has no 'nothing'"),
        ("json:__name__", "expected a function, found str"),
    ],
)
def test_unknown_scorers(word, says):
    with pytest.raises(ConfigError, match=says):
        find_scorer(word)


CHAIN = "A C D E F G H I"
ODD = [
    ("number", {"tolerance": -1}, "1", "the option 'tolerance' as a number of at least 0, found -1"),
    ("number", {"tolerance": "0.1"}, "1", "the option 'tolerance' as a number of at least 0, found '0.1'"),
    ("number", {"tolerance": math.inf}, "1", "the option 'tolerance' as a number of at least 0, found inf"),
    ("number", {"tolerance": 10**400}, "1", "the option 'tolerance' as a number of at least 0, found 1000"),
    ("number", {}, "high", "a number as the right answer, found 'high'"),
    ("numbers", {}, "1, high", "a number as the right answer, found ' high'"),
    ("contains", {}, "a", "the option 'any' as a list of texts, found None"),
    ("contains", {"any": []}, "a", r"the option 'any' as a list of texts, found \[\]"),
    ("contains", {"any": [42]}, "a", r"the option 'any' as a list of texts, found \[42\]"),
    ("contains", {"any": "paris"}, "a", "the option 'any' as a list of texts, found 'paris'"),
    ("molecule", {"target": 1.0, "table": "x"}, "CC", "the option 'property' as a text, found None"),
    (
        "molecule",
        {"property": "gap", "table": "x", "target": True},
        "CC",
        "the option 'target' as a number, found True",
    ),
    ("sequence", {}, CHAIN, "the option 'targets' as an object of numbers for force, energy, found None"),
    ("sequence", {"targets": {"length": 1}}, CHAIN, "the option 'targets' as an object of numbers for force, energy"),
    ("sequence", {"targets": {"force": "1"}}, CHAIN, "the option 'targets' as numbers, found {'force': '1'}"),
    ("sequence", {"targets": {"force": 1}}, CHAIN, "the option 'scales' as an object of numbers"),
    (
        "sequence",
        {"targets": {"force": 1}, "scales": {"energy": 1}},
        CHAIN,
        "the option 'scales' as numbers above 0 for force",
    ),
    (
        "sequence",
        {"targets": {"force": 1}, "scales": {"force": 0}},
        CHAIN,
        "the option 'scales' as numbers above 0 for force",
    ),
    ("reasoning", {"dataset": 1}, "a", "the option 'dataset' as a text, found 1"),
    ("reasoning", {"dataset": "chain_sum"}, "a", "the option 'entry' as an object, found None"),
    ("parts", {"parts": "a"}, "a", "the option 'parts' as a list of objects, found 'a'"),
    ("agreement", {}, " ", "a reference answer, found an empty one"),
]


@pytest.mark.parametrize(("name", "options", "right", "says"), ODD)
def test_options_that_make_no_sense(name, options, right, says):
    """Whatever the answer is."""
    for answer in (right, "", "?"):
        with pytest.raises(DataError, match=f"^scorer {name}: expected {says}"):
            Scorer(name, options).grade(answer, right)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("a", "expected an object with an answer, found 'a'"),
        ({}, "expected an object with an answer, found {}"),
        ({"answer": ["a"]}, "expected an object with an answer"),
        ({"answer": "a", "scorer": "exactly"}, r"no scorer named 'exactly' \(did you mean 'exact'\?\)"),
        ({"answer": "a", "scorer": ["exact"]}, r"no scorer named \['exact'\]"),
        ({"answer": "a", "options": "x"}, "expected its options as an object, found 'x'"),
        ({"answer": "a", "scorer": "contains"}, "scorer contains: expected the option 'any' as a list of texts"),
        ({"answer": "a", "options": {"max_new_tokens": 0}}, "scorer exact: expected the option 'max_new_tokens'"),
    ],
)
def test_parts_that_make_no_sense(part, says):
    with pytest.raises(DataError, match=f"^scorer parts: part 2: {says}"):
        Scorer("parts", {"parts": [{"answer": "b"}, part]}).grade("b; a", "b; a")


def test_what_reasoning_gym_cannot_judge():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        DataError, match="^scorer reasoning: expected the option 'dataset' as a name that .*, found 'sums'"
    ):
        grade("reasoning", "1", "1", dataset="sums", entry={"answer": "1"})
    with pytest.raises(
        DataError, match=r"^scorer reasoning: expected the option 'entry' as what chain_sum judges by \(Key"
    ):
        grade("reasoning", "1", "1", dataset="chain_sum", entry={"question": "1"})


def test_an_answer_that_reasoning_gym_cannot_read_is_wrong(monkeypatch):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(
        gym, "get_score_answer_fn", lambda name: lambda answer, entry: float(answer == str(int(answer)))
    )
    assert grade("reasoning", "7", "7", dataset="any", entry={"answer": "7"}) == 1
    assert grade("reasoning", "seven", "7", dataset="any", entry={"answer": "7"}) == 0


@pytest.mark.parametrize("odd", ["x", "5", 0, -1, 2.5, True, None])
def test_the_length_of_answers_is_checked_at_once(odd):
    says = f"expected the option 'max_new_tokens' as a whole number above 0, found {odd!r}"
    with pytest.raises(DataError, match=f"^scorer exact: {says}"):
        find_scorer("exact", {"max_new_tokens": odd})
    with pytest.raises(DataError, match=f": {says}"):
        find_scorer(lambda answer, row: 1.0, {"max_new_tokens": odd})
    assert find_scorer("exact", {"max_new_tokens": 5}).grade("a", "a").score == 1


def test_a_table_of_values_is_checked(tmp_path):
    pytest.importorskip("rdkit")
    options = {"property": "gap", "target": 7.0, "table": "table.json"}
    for wrong, says in (("[]", "expected an object"), ('{"CC": "high"}', "numbers as values of 'gap', found 'high'")):
        folder = tmp_path / says[:8].strip()
        folder.mkdir()
        (folder / "table.json").write_text(wrong)
        with pytest.raises(DataError, match=rf"table\.json: .*{says}"):
            find_scorer("molecule", options, folder).grade("CC", "CC")


def test_every_named_scorer_gives_the_right_answer_full_marks():
    rights = {"number": ("2", {}), "numbers": ("1, 2", {}), "agreement": ("a b", {}), "exact": ("a", {})}
    rights |= {"contains": ("b", {"any": ["b"]}), "parts": ("a; 2", {"parts": [{"answer": "a"}, {"answer": "2"}]})}
    assert set(rights) <= set(NAMED)
    for name, (right, options) in rights.items():
        assert grade(name, right, right, **options) == 1

"""The one grammar of routers, before and with the names of a model's experts."""

import pytest

from xloom import routers
from xloom.cli.common import parse_router
from xloom.errors import ConfigError, UnknownExpertError
from xloom.routers.words import FORMS, read_router

EXPERTS = ("chem", "mech", "prot")


def settings(router: routers.Router) -> dict[str, object]:
    return {key: value for key, value in vars(router).items() if isinstance(value, (str, int, float, tuple, dict))}


@pytest.mark.parametrize(
    ("word", "router", "about"),
    [
        ("base", routers.BaseOnly(), "the base model, no expert"),
        ("uniform", routers.Uniform(), "every expert with weight 1/N"),
        ("single:mech", routers.Single("mech"), "the expert mech alone"),
        ("fixed:chem=0.5,prot=-1", routers.Fixed({"chem": 0.5, "prot": -1.0}), "the same weights everywhere"),
        ("xlora", routers.XLora(), "the model's own head"),
        (
            "xlora:without=mech,chem",
            routers.XLora(without=("mech", "chem")),
            "the model's own head, without mech, chem",
        ),
        ("arrow", routers.Arrow(), "Arrow (arXiv 2405.11157)"),
        ("arrow:top1", routers.Arrow(top_k=1), "Arrow (arXiv 2405.11157), its best"),
        ("arrow:temperature=2", routers.Arrow(temperature=2.0), "Arrow (arXiv 2405.11157), temperature 2"),
        (
            "spectr:top2,temperature=0.5",
            routers.SpectR(top_k=2, temperature=0.5),
            "SpectR (arXiv 2504.03454), its 2 best, temperature 0.5",
        ),
    ],
)
def test_words(word: str, router: routers.Router, about: str):
    found = parse_router(word, EXPERTS)
    assert type(found) is type(router)
    assert settings(found) == settings(router)
    asked = read_router(word)
    assert asked.about == about
    assert asked.routes == (word.partition(":")[0] in {"xlora", "arrow", "spectr"})
    assert asked.reads_head == word.startswith("xlora")
    assert asked.make() is not asked.make()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("oracle", "unknown router 'oracle'; expected xlora"),
        ("arow:top1", r"unknown router 'arow:top1' \(did you mean 'arrow'\?\)"),
        ("", "unknown router ''"),
        ("base:x", "router 'base:x': expected base"),
        ("uniform:", "router 'uniform:': expected uniform"),
        ("single", "expected single:NAME"),
        ("single:", "expected single:NAME"),
        ("fixed", "expected fixed:NAME=WEIGHT"),
        ("fixed:chem", "expected fixed:NAME=WEIGHT"),
        ("fixed:chem=a", "expected fixed:NAME=WEIGHT"),
        ("fixed:=1", "expected fixed:NAME=WEIGHT"),
        ("fixed:chem=nan", "expected fixed:NAME=WEIGHT"),
        ("fixed:chem=1,chem=2", "expected fixed:NAME=WEIGHT"),
        ("xlora:top1", "without=NAME"),
        ("xlora:without=", "without=NAME"),
        ("xlora:without=chem,", "without=NAME"),
        ("arrow:top0", r"expected arrow\[:topK,temperature=X\]"),
        ("arrow:top_k=2", r"expected arrow\[:topK,temperature=X\]"),
        ("spectr:top1,top2", r"expected spectr\[:topK,temperature=X\]"),
        ("spectr:top1,", r"expected spectr\[:topK,temperature=X\]"),
        ("arrow:temperature=0", "expected a temperature above 0"),
        ("arrow:temperature=inf", "expected a temperature above 0"),
        ("arrow:temperature=warm", "expected a temperature above 0"),
    ],
)
def test_other_words_are_refused_without_a_model(word: str, says: str):
    with pytest.raises(ConfigError, match=says):
        read_router(word)


def test_words_are_held_against_the_experts_there_are():
    for word in ("single:zoo", "fixed:zoo=1", "xlora:without=zoo"):
        with pytest.raises(UnknownExpertError, match="'zoo'.*chem, mech, prot"):
            parse_router(word, EXPERTS)
    with pytest.raises(ConfigError, match="router 'arrow:top4': expected K of topK from 1 to 3"):
        parse_router("arrow:top4", EXPERTS)
    assert all(kind in form for kind, form in FORMS.items())

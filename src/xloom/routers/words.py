"""Routers by word: the one grammar of the command line and of evaluation.

    base   uniform   single:NAME   fixed:NAME=WEIGHT,...
    xlora   xlora:without=NAME,...
    arrow   arrow:topK   arrow:temperature=X   arrow:topK,temperature=X   and spectr alike

A word is read before there is a model, and then held against the model's experts. Knows nothing of what is no router.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from xloom.errors import ConfigError, names, near
from xloom.routers.factors import Arrow, SpectR
from xloom.routers.given import BaseOnly, Fixed, Single, Uniform
from xloom.routers.head import XLora
from xloom.routers.routing import Router, check_known

HEAD = "xlora"  # the model's own head
_TOP = re.compile(r"top([1-9]\d*)")


@dataclass(frozen=True)
class RouterWord:
    """What a word asks for.

    Attributes:
        word: as it was given.
        about: one line about the router.
        make: the router, a new one at every call.
        routes: whether its weights depend on what is read.
        reads_head: whether they are those of the model's head.
        experts: the names that the word has.
        top_k: how many experts it keeps; all, if None.
    """

    word: str
    about: str
    make: Callable[[], Router]
    routes: bool = False
    reads_head: bool = False
    experts: tuple[str, ...] = ()
    top_k: int | None = None

    def check(self, experts: Sequence[str]) -> None:
        """Raises UnknownExpertError or ConfigError where a model with these experts cannot have this router."""
        check_known(self.experts, experts)
        check_top_k(self.word, self.top_k, len(experts))


def read_router(word: str) -> RouterWord:
    """What a word asks for, as far as it can be told without a model.

    Raises:
        ConfigError: no such router, or settings that it does not take.
    """
    kind, colon, rest = word.partition(":")
    if kind not in FORMS:
        raise ConfigError(f"unknown router {word!r}{near(kind, FORMS)}; expected {names(FORMS.values(), len(FORMS))}")
    if colon and not rest:
        raise refused(word, FORMS[kind])
    return _KINDS[kind][1](word, rest)


def refused(word: str, form: str) -> ConfigError:
    """The error for a word whose kind is known and whose settings are not of the form."""
    return ConfigError(f"router {word!r}: expected {form}")


def check_top_k(word: str, top_k: int | None, most: int) -> None:
    """Raises ConfigError where a word keeps more experts than the `most` that there are."""
    if top_k is not None and top_k > most:
        raise refused(word, f"K of topK from 1 to {most}")


# --- one function for each kind: (word, what stands after the colon) -> RouterWord ---


def _plain(make: Callable[[], Router], about: str, word: str, rest: str) -> RouterWord:
    """BaseOnly or Uniform."""
    if rest:
        raise refused(word, FORMS[word.partition(":")[0]])
    return RouterWord(word, about, make)


def _single(word: str, rest: str) -> RouterWord:
    if not rest:
        raise refused(word, FORMS["single"])
    return RouterWord(word, f"the expert {rest} alone", partial(Single, rest), experts=(rest,))


def _fixed(word: str, rest: str) -> RouterWord:
    parts = [part.rpartition("=") for part in rest.split(",")]
    weights = {name: _number(text) for name, _, text in parts}
    if len(weights) < len(parts) or not all(name and math.isfinite(weight) for name, weight in weights.items()):
        raise refused(word, FORMS["fixed"])
    return RouterWord(word, "the same weights everywhere", partial(Fixed, weights), experts=tuple(weights))


def _xlora(word: str, rest: str) -> RouterWord:
    about = "the model's own head"
    if not rest:
        return RouterWord(word, about, XLora, routes=True, reads_head=True)
    without = tuple(rest.removeprefix("without=").split(","))
    if not rest.startswith("without=") or not all(without):
        raise refused(word, FORMS[HEAD])
    about = f"{about}, without {names(without)}"
    make = partial(XLora, without=without)
    return RouterWord(word, about, make, routes=True, reads_head=True, experts=without)


def _by_score(kind: Callable[..., Router], about: str, word: str, rest: str) -> RouterWord:
    """Arrow or SpectR."""
    top_k = temperature = None
    for part in rest.split(",") if rest else ():
        found = _TOP.fullmatch(part)
        if found and top_k is None:
            top_k = int(found[1])
        elif part.startswith("temperature=") and temperature is None:
            temperature = _number(part.removeprefix("temperature="))
        else:
            raise refused(word, FORMS[word.partition(":")[0]])
    settings: dict[str, float] = {}
    if temperature is not None:
        if not 0 < temperature < math.inf:
            raise refused(word, "a temperature above 0")
        settings["temperature"] = temperature
    best = "" if top_k is None else f", its {top_k} best" if top_k > 1 else ", its best"
    about += best + "".join(f", {key} {value:g}" for key, value in settings.items())
    return RouterWord(word, about, partial(kind, top_k=top_k, **settings), routes=True, top_k=top_k)


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


_KINDS: Mapping[str, tuple[str, Callable[[str, str], RouterWord]]] = {
    HEAD: ("xlora[:without=NAME,...]", _xlora),
    "base": ("base", partial(_plain, BaseOnly, "the base model, no expert")),
    "uniform": ("uniform", partial(_plain, Uniform, "every expert with weight 1/N")),
    "single": ("single:NAME", _single),
    "fixed": ("fixed:NAME=WEIGHT,...", _fixed),
    "arrow": ("arrow[:topK,temperature=X]", partial(_by_score, Arrow, "Arrow (arXiv 2405.11157)")),
    "spectr": ("spectr[:topK,temperature=X]", partial(_by_score, SpectR, "SpectR (arXiv 2504.03454)")),
}
FORMS: Mapping[str, str] = {kind: form for kind, (form, _) in _KINDS.items()}  # how each is spelt

"""From an answer and the right one to a grade between 0 and 1: scorers by name, and those that users bring.

    exact, contains, agreement          texts
    number, numbers                     within a tolerance; they also give (predicted, true) for MAE and R2
    smiles, molecule, sequence          what chemistry and proteins need
    reasoning                           reasoning-gym's own
    parts                               several answers joined by "; "

Knows nothing of models, files of rows, or tables.
"""

import difflib
import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from xloom.errors import ConfigError, DataError, MissingExtraError, NotFoundError, names

Options = Mapping[str, Any]
Custom = Callable[[str, dict[str, Any]], float]

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_SLACK = 1e-9  # of a tolerance: 0.4 - 0.3 is more than 0.1


@dataclass(frozen=True)
class Grade:
    """How good an answer is, 0 to 1.

    `numbers` holds (predicted, true) of every number that was asked for; predicted is None where none could be read.
    """

    score: float
    numbers: tuple[tuple[float | None, float], ...] = ()


@dataclass(frozen=True)
class Scorer:
    """How the answers to one row are graded.

    Args:
        name: one of `NAMED`, or "module:function".
        options: the scorer's settings.
        custom: a function of the user's, (answer, row) -> float in [0, 1]; it sees the row as it stands in its file.
        folder: where the files that options name lie.
    """

    name: str = "exact"
    options: Options = field(default_factory=dict)
    custom: Custom | None = None
    folder: Path = Path()

    def grade(self, answer: str, right: str, row: Mapping[str, Any] | None = None) -> Grade:
        """The grade of one answer.

        Raises:
            DataError: the right answer or the options do not fit the scorer, or a custom one gives no number in [0, 1].
            MissingExtraError: the scorer needs a package that is not installed.
        """
        if self.custom is None:
            return NAMED[self.name](answer, right, self.options, self.folder)
        score = self.custom(answer, dict(row or {}))
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise DataError(f"scorer {self.name}: expected a number from 0 to 1, found {score!r}")
        return Grade(float(score))


def find_scorer(word: str | Custom, options: Options | None = None, folder: Path = Path()) -> Scorer:
    """The scorer that a word or a function stands for: a name in `NAMED`, or "module:function".

    Raises:
        ConfigError: no such scorer, module or function.
    """
    if not isinstance(word, str):
        return Scorer(getattr(word, "__name__", "custom"), options or {}, word, folder)
    if word in NAMED:
        return Scorer(word, options or {}, None, folder)
    module, colon, function = word.partition(":")
    if not colon:
        near = next(iter(difflib.get_close_matches(word, NAMED, n=1)), None)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ConfigError(
            f"no scorer named {word!r}{hint}; expected one of {names(NAMED, limit=20)}, or module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(f"scorer {word}: cannot import {module!r} ({error})") from None
    except AttributeError:
        raise ConfigError(f"scorer {word}: module {module!r} has no {function!r}") from None
    if not callable(found):
        raise ConfigError(f"scorer {word}: expected a function, found {type(found).__name__}")
    return Scorer(word, options or {}, found, folder)


# --- texts ---


def _exact(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where the texts are equal, case and outer blanks aside."""
    return Grade(float(answer.strip().casefold() == right.strip().casefold()))


def _contains(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where any of the words `any` stands in the answer as a whole word, in upper or lower case."""
    words = _option(options, "contains", "any", list)
    return Grade(float(any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer, re.IGNORECASE) for w in words)))


def _agreement(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """Share of the reference's words that the answer begins with: 1 where it says the same, as far as that goes."""
    said, reference = answer.split(), right.split()
    if not reference:
        raise DataError("scorer agreement: expected a reference answer, found an empty one")
    same = 0
    while same < min(len(said), len(reference)) and said[same] == reference[same]:
        same += 1
    return Grade(same / len(reference))


# --- numbers ---


def read_number(text: str) -> float | None:
    """The first number in a text; None where there is none, or none that is finite."""
    found = _NUMBER.search(text.replace("\N{MINUS SIGN}", "-"))
    value = float(found.group()) if found else math.nan
    return value if math.isfinite(value) else None


def _number(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where the first number in the answer is within `tolerance` of the right one."""
    pair = (read_number(answer), _right_number(right))
    return Grade(float(_near(*pair, _tolerance(options, "number"))), (pair,))


def _numbers(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """Share of the comma-separated places within `tolerance`; places too many count as wrong ones."""
    tolerance = _tolerance(options, "numbers")
    true = [_right_number(part) for part in right.split(",")]
    said = [read_number(part) for part in answer.split(",")]
    pairs = tuple((said[i] if i < len(said) else None, value) for i, value in enumerate(true))
    within = sum(_near(predicted, value, tolerance) for predicted, value in pairs)
    return Grade(within / max(len(true), len(said)), pairs)


def _near(predicted: float | None, true: float, tolerance: float) -> bool:
    return predicted is not None and abs(predicted - true) <= tolerance + _SLACK


def _right_number(text: str) -> float:
    value = read_number(text)
    if value is None:
        raise DataError(f"expected a number as the right answer, found {text!r:.40}")
    return value


def _tolerance(options: Options, scorer: str) -> float:
    value = options.get("tolerance", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise DataError(f"scorer {scorer}: expected a tolerance of at least 0, found {value!r}")
    return float(value)


# --- molecules and sequences ---


def _smiles(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where both SMILES are the same molecule."""
    wanted = _canonical(right)
    if wanted is None:
        raise DataError(f"scorer smiles: expected a valid SMILES as the right answer, found {right!r:.60}")
    return Grade(float(_canonical(answer) == wanted))


def _molecule(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where the answer is a valid molecule whose `property` in the `table` is within `tolerance` of `target`."""
    key = _option(options, "molecule", "property", str)
    target = float(_option(options, "molecule", "target", (int, float)))
    found = _canonical(answer)
    value = None if found is None else _table(folder / _option(options, "molecule", "table", str), key).get(found)
    return Grade(float(_near(value, target, _tolerance(options, "molecule"))))


def _canonical(answer: str) -> str | None:
    found: str | None = _optional("xloom.suite.molecules", "smiles").canonical(answer.strip())
    return found


@cache
def _table(path: Path, key: str) -> dict[str, float]:
    """Values by canonical SMILES, of a file {smiles: value} or {smiles: {property: value}}."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read ({error.strerror}); scorer molecule needs it") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, dict):
        raise DataError(f"{path}: expected an object of values by SMILES, found {type(rows).__name__}")
    values = {smiles: value.get(key) if isinstance(value, dict) else value for smiles, value in rows.items()}
    return {smiles: float(value) for smiles, value in values.items() if value is not None}


def _sequence(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """What `xloom.suite.mechanics.check_sequence` says of a designed protein sequence."""
    return Grade(float(_optional("xloom.suite.mechanics", "sequence").check_sequence(answer, options)))


# --- others ---


def _reasoning(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """The score of reasoning-gym's own scorer for the `dataset` that made the `entry`."""
    dataset = _option(options, "reasoning", "dataset", str)
    entry = _option(options, "reasoning", "entry", dict)
    score = _optional("reasoning_gym", "reasoning").get_score_answer_fn(dataset)(answer.strip(), dict(entry))
    return Grade(min(max(float(score), 0.0), 1.0))


def _parts(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """Share of the parts that are right; answers are joined by "; "."""
    parts = _option(options, "parts", "parts", list)
    said = [part.strip() for part in answer.split(";")]
    grades = []
    for number, part in enumerate(parts):
        scorer = Scorer(part.get("scorer", "exact"), part.get("options") or {}, None, folder)
        if scorer.name not in NAMED:
            raise DataError(f"scorer parts: part {number + 1}: no scorer named {scorer.name!r}")
        grades.append(scorer.grade(said[number] if number < len(said) else "", str(part["answer"])))
    numbers = tuple(pair for grade in grades for pair in grade.numbers)
    return Grade(sum(grade.score for grade in grades) / len(grades), numbers)


NAMED: Mapping[str, Callable[[str, str, Options, Path], Grade]] = {
    "exact": _exact,
    "contains": _contains,
    "agreement": _agreement,
    "number": _number,
    "numbers": _numbers,
    "smiles": _smiles,
    "molecule": _molecule,
    "sequence": _sequence,
    "reasoning": _reasoning,
    "parts": _parts,
}


def _option(options: Options, scorer: str, key: str, kind: type | tuple[type, ...]) -> Any:
    value = options.get(key)
    if not isinstance(value, kind) or value in ([], {}, ""):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"scorer {scorer}: expected the option {key!r} as {kinds}, found {value!r:.40}")
    return value


def _optional(module: str, scorer: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtraError(f'scorer {scorer}: needs the package {package}: pip install "xloom[suite]"') from None


def check(scorer: Scorer, right: str, row: Mapping[str, Any] | None = None) -> None:
    """Grades the right answer itself, which finds options that make no sense before any model runs.

    Raises:
        DataError: the options or the right answer do not fit.
        MissingExtraError: a package is not installed.
    """
    if scorer.custom is None:
        scorer.grade(right, right, row)

"""From an answer and the right one to a grade between 0 and 1: scorers by name, and those that users bring.

    exact, contains, agreement          texts
    number, numbers                     within a tolerance; they also give (predicted, true) for MAE and R2
    smiles, molecule, sequence          what chemistry and proteins need
    reasoning                           reasoning-gym's own
    parts                               several answers joined by "; "

Knows nothing of models, files of rows, or tables.
"""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from xloom.errors import ConfigError, DataError, MissingExtraError, NotFoundError, XLoomError, names, near

Options = Mapping[str, Any]
Custom = Callable[[str, dict[str, Any]], float]

_MINUS = "\N{MINUS SIGN}"
_NUMBER = re.compile(rf"(?:{_MINUS}|(?<![\w.])[-+]?)(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+{_MINUS}]?\d+)?")
_SLACK = 1e-9  # of a tolerance: 0.4 - 0.3 is more than 0.1


@dataclass(frozen=True)
class Grade:
    """How good an answer is, 0 to 1.

    `numbers` holds (predicted, true) of every number that was asked for, place by place; predicted is None where none
    could be read.
    """

    score: float
    numbers: tuple[tuple[float | None, float], ...] = ()


@dataclass(frozen=True)
class Scorer:
    """How the answers to one row are graded.

    Args:
        name: one of `NAMED`, or "module:function".
        options: the scorer's settings. `max_new_tokens`, how long an answer may be, goes with every scorer.
        custom: a function of the user's, (answer, row) -> float in [0, 1]; it sees the row as it stands in its file.
        folder: where the files that options name lie.

    Raises:
        DataError: `max_new_tokens` is no whole number above 0.
    """

    name: str = "exact"
    options: Options = field(default_factory=dict)
    custom: Custom | None = None
    folder: Path = Path()

    def __post_init__(self) -> None:
        tokens = self.options.get("max_new_tokens", 1)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise _misfit(self.name, "max_new_tokens", "a whole number above 0", tokens)

    def grade(self, answer: str, right: str, row: Mapping[str, Any] | None = None) -> Grade:
        """The grade of one answer.

        Raises:
            DataError: the right answer or the options do not fit the scorer, or a custom one raises, or gives no number
                in [0, 1].
            MissingExtraError: the scorer needs a package that is not installed.
        """
        if self.custom is None:
            return NAMED[self.name](answer, right, self.options, self.folder)
        try:
            score = self.custom(answer, dict(row or {}))
        except XLoomError:
            raise
        except Exception as error:
            raise DataError(f"scorer {self.name}: raised {type(error).__name__}: {error}") from error
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise DataError(f"scorer {self.name}: expected a number from 0 to 1, found {score!r}")
        return Grade(float(score))


def find_scorer(word: str | Custom, options: Options | None = None, folder: Path = Path()) -> Scorer:
    """The scorer that a word or a function stands for: a name in `NAMED`, or "module:function".

    Raises:
        ConfigError: no such scorer, module or function.
        DataError: as `Scorer`.
    """
    if not isinstance(word, str):
        return Scorer(getattr(word, "__name__", "custom"), options or {}, word, folder)
    if word in NAMED:
        return Scorer(word, options or {}, None, folder)
    module, colon, function = word.partition(":")
    if not colon:
        raise ConfigError(
            f"no scorer named {word!r}{near(word, NAMED)}; expected one of {names(NAMED, 20)}, or module:function"
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
    words = options.get("any")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise _misfit("contains", "any", "a list of texts", words)
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
    """The first number in a text; None where there is none, or none that is finite.

    Digits within a word are none ("qm9"). A hyphen right after a letter or digit joins, and is no sign: "LUMO-2.3" and
    "carbon-12" are 2.3 and 12, "3-5" is 3. A true minus sign (U+2212) is one everywhere.
    """
    found = _NUMBER.search(text)
    value = float(found.group().replace(_MINUS, "-")) if found else math.nan
    return value if math.isfinite(value) else None


def _number(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where the first number in the answer is within `tolerance` of the right one."""
    pair = (read_number(answer), _right_number(right, "number"))
    return Grade(float(_near(*pair, _tolerance(options, "number"))), (pair,))


def _numbers(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """Share of the comma-separated places within `tolerance`; places too many count as wrong ones."""
    tolerance = _tolerance(options, "numbers")
    true = [_right_number(part, "numbers") for part in right.split(",")]
    said = [read_number(part) for part in answer.split(",")]
    pairs = tuple((said[i] if i < len(said) else None, value) for i, value in enumerate(true))
    within = sum(_near(predicted, value, tolerance) for predicted, value in pairs)
    return Grade(within / max(len(true), len(said)), pairs)


def _near(predicted: float | None, true: float, tolerance: float) -> bool:
    return predicted is not None and abs(predicted - true) <= tolerance + _SLACK


def _right_number(text: str, scorer: str) -> float:
    value = read_number(text)
    if value is None:
        raise DataError(f"scorer {scorer}: expected a number as the right answer, found {text!r:.40}")
    return value


def by_place(grades: Iterable[Grade]) -> list[list[tuple[float | None, float]]]:
    """(predicted, true) of all grades, place by place: what stands at different places differs in meaning and unit."""
    places: list[list[tuple[float | None, float]]] = []
    for grade in grades:
        places += [[] for _ in range(len(grade.numbers) - len(places))]
        for place, pair in zip(places, grade.numbers):
            place.append(pair)
    return places


# --- molecules and sequences ---


def _smiles(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where both SMILES are the same molecule."""
    wanted = _canonical(right)
    if wanted is None:
        raise DataError(f"scorer smiles: expected a valid SMILES as the right answer, found {right!r:.60}")
    return Grade(float(_canonical(answer) == wanted))


def _molecule(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """1 where the answer is a valid molecule whose `property` in the `table` is within `tolerance` of `target`."""
    key, table = (_text(options, "molecule", name) for name in ("property", "table"))
    target, tolerance = _real(options, "molecule", "target"), _tolerance(options, "molecule")
    found = _canonical(answer)
    value = None if found is None else _table(folder / table, key).get(found)
    return Grade(float(_near(value, target, tolerance)))


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
    if odd := [value for value in values.values() if value is not None and not _is_real(value)]:
        raise DataError(f"{path}: expected numbers as values of {key!r}, found {odd[0]!r:.40}")
    return {smiles: float(value) for smiles, value in values.items() if value is not None}


def _sequence(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """What `xloom.suite.mechanics.check_sequence` says of a designed protein sequence."""
    mechanics = _optional("xloom.suite.mechanics", "sequence")
    targets = _reals(options, "targets", mechanics.MEASURED)
    scales = _reals(options, "scales", mechanics.MEASURED)
    if not all(scales.get(name, 0) > 0 for name in targets):
        raise _misfit("sequence", "scales", f"numbers above 0 for {names(targets)}", options["scales"])
    read = {"targets": targets, "scales": scales, "tolerance": _tolerance(options, "sequence")}
    return Grade(float(mechanics.check_sequence(answer, read)))


# --- others ---


def _reasoning(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """The score of reasoning-gym's own scorer for the `dataset` that made the `entry`; 0 where it cannot read it."""
    dataset, entry = _text(options, "reasoning", "dataset"), options.get("entry")
    if not isinstance(entry, Mapping) or not entry:
        raise _misfit("reasoning", "entry", "an object", entry)
    gym = _optional("reasoning_gym", "reasoning")
    try:
        judge = gym.get_score_answer_fn(dataset)
    except ValueError:
        raise _misfit("reasoning", "dataset", "a name that reasoning-gym knows", dataset) from None
    try:
        score = float(judge(answer.strip(), dict(entry)))
    except Exception:
        # is it the answer, or the entry?
        try:
            judge(right.strip(), dict(entry))
        except Exception as error:
            what = f"what {dataset} judges by ({type(error).__name__}: {error})"
            raise _misfit("reasoning", "entry", what, entry) from error
        score = 0.0
    return Grade(min(max(score, 0.0), 1.0))


def _parts(answer: str, right: str, options: Options, folder: Path) -> Grade:
    """Share of the parts that are right; answers are joined by "; "."""
    parts = options.get("parts")
    if not isinstance(parts, list) or not parts:
        raise _misfit("parts", "parts", "a list of objects", parts)
    said = [part.strip() for part in answer.split(";")]
    grades = []
    for place, part in enumerate(parts):
        try:
            scorer, wanted = _part(part, folder)
            grades.append(scorer.grade(said[place] if place < len(said) else "", wanted))
        except XLoomError as error:
            raise type(error)(f"scorer parts: part {place + 1}: {error}") from None
    numbers = tuple(pair for grade in grades for pair in grade.numbers)
    return Grade(sum(grade.score for grade in grades) / len(grades), numbers)


def _part(part: Any, folder: Path) -> tuple[Scorer, str]:
    """The scorer of one part, and its right answer."""
    if not isinstance(part, Mapping) or not isinstance(part.get("answer"), (str, int, float)):
        raise DataError(f"expected an object with an answer, found {part!r:.60}")
    name, options = part.get("scorer", "exact"), part.get("options") or {}
    if not isinstance(name, str) or name not in NAMED:
        raise DataError(f"no scorer named {name!r:.40}{near(str(name), NAMED)}; expected one of {names(NAMED, 20)}")
    if not isinstance(options, Mapping):
        raise DataError(f"expected its options as an object, found {options!r:.40}")
    return Scorer(name, options, None, folder), str(part["answer"])


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


# --- options ---


def _text(options: Options, scorer: str, key: str) -> str:
    value = options.get(key)
    if not isinstance(value, str) or not value:
        raise _misfit(scorer, key, "a text", value)
    return value


def _real(options: Options, scorer: str, key: str) -> float:
    value = options.get(key)
    if not _is_real(value):
        raise _misfit(scorer, key, "a number", value)
    return float(value)


def _tolerance(options: Options, scorer: str) -> float:
    value = options.get("tolerance", 0.0)
    if not _is_real(value) or value < 0:
        raise _misfit(scorer, "tolerance", "a number of at least 0", value)
    return float(value)


def _reals(options: Options, key: str, known: Iterable[str]) -> dict[str, float]:
    """(sequence) Numbers by name."""
    values = options.get(key)
    if not isinstance(values, Mapping) or not values or not set(values) <= set(known):
        raise _misfit("sequence", key, f"an object of numbers for {names(known)}", values)
    if not all(map(_is_real, values.values())):
        raise _misfit("sequence", key, "numbers", values)
    return {name: float(value) for name, value in values.items()}


def _is_real(value: object) -> TypeGuard[float]:
    """A finite number that a float can hold, and neither true nor false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _misfit(scorer: str, key: str, expected: str, found: object) -> DataError:
    return DataError(f"scorer {scorer}: expected the option {key!r} as {expected}, found {found!r:.60}")


def _optional(module: str, scorer: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtraError(f'scorer {scorer}: needs the package {package}: pip install "xloom[suite]"') from None

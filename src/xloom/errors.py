"""Every error that xloom raises on bad input, as one tree under `XLoomError`.

A message says what was wrong, where (file, tensor, site, expert), what was expected and what was found.
Knows nothing of torch or transformers, so that the command line can import it for free.
"""

import difflib
from collections.abc import Iterable


class XLoomError(Exception):
    """Base of all errors caused by input, files or settings; the command line exits with `exit_code`."""

    exit_code = 2


# settings


class ConfigError(XLoomError):
    """A field of `XLoraConfig` or a call argument is out of range, or two of them contradict each other."""


class RecipeError(XLoomError):
    """A training recipe cannot be read: a misspelt key, a missing file, a value of the wrong kind."""


class DataError(XLoomError):
    """A row of training or evaluation data is wrong; the message names file and line."""


# where things come from


class NotFoundError(XLoomError):
    """A path does not exist, or a hub id is unknown or out of reach."""


class DownloadError(XLoomError):
    """A package could not be fetched, is damaged, or there is no room for it."""

    exit_code = 1


# experts


class ExpertError(XLoomError):
    """An adapter cannot serve as an expert."""


class NotLoraError(ExpertError):
    """The folder holds no LoRA adapter, or one of another PEFT type."""


class ModulesToSaveError(ExpertError):
    """The adapter carries whole copies of base modules (`modules_to_save`), which cannot be mixed per token."""


class ConvolutionError(ExpertError):
    """The adapter adapts a convolution, which has no token axis to mix along."""


class TargetParametersError(ExpertError):
    """The adapter adapts bare parameters (`target_parameters`), which have no input of their own to route."""


class ActivatedLoraError(ExpertError):
    """The adapter is an activated LoRA (aLoRA), which switches itself on at its own tokens."""


class UnsupportedLoraError(ExpertError):
    """The adapter uses another LoRA option that would change its meaning if it were ignored; named in the message."""


class PickleError(ExpertError):
    """Weights are offered as a pickle (`.bin`, `.pt`), which can run code when loaded."""


class BaseMismatchError(ExpertError):
    """The adapter was made for another base: a module is missing there, or a shape differs."""


class NoMatchingSiteError(ExpertError):
    """No module of the base is adapted by the expert."""


class NonFiniteError(ExpertError):
    """A weight holds NaN or infinity."""


class DuplicateExpertError(ExpertError):
    """Two experts carry the same name."""


class NoExpertsError(ExpertError):
    """A mixture was asked for without a single expert."""


class UnknownExpertError(ExpertError):
    """A name does not belong to any expert of the model."""


# model


class UnsupportedArchitectureError(XLoomError):
    """The base model cannot be run as two stacks with one cache."""


class CacheError(XLoomError):
    """A cache passed by the caller does not fit the model or the router in use."""


class RowError(XLoomError):
    """A row of a batch failed by what its request brought: its stop, or a logits processor.

    Attributes:
        row: the number that `Batch.join` gave.
        error: what was raised.
    """

    def __init__(self, row: int, error: Exception) -> None:
        super().__init__(f"row {row}: {type(error).__name__}: {' '.join(str(error).split())}")
        self.row, self.error = row, error


class ScalingsShapeError(XLoomError):
    """Scalings do not fit the tokens, sites or experts they are meant for."""


# checkpoints


class CheckpointError(XLoomError):
    """A checkpoint cannot be read or written."""


class TruncatedFileError(CheckpointError):
    """A safetensors or JSON file is cut off or damaged."""


class MissingTensorsError(CheckpointError):
    """Tensors that the config calls for are not in the file."""


class ForeignCheckpointError(CheckpointError):
    """A folder is none of the formats that xloom reads."""


class NotExportableError(CheckpointError):
    """The target format has no words for something that this model uses."""


# prompts


class PromptError(XLoomError):
    """A prompt cannot be used: empty, longer than the model's window, or a chat without a chat template."""


# training


class DivergedError(XLoomError):
    """A loss or a trained weight is no longer finite."""

    exit_code = 1


# helpers


class MissingExtraError(XLoomError):
    """An optional package is not installed; the message names the extra that brings it."""


def names(items: Iterable[object], limit: int = 5) -> str:
    """`a, b, c and 4 more`: a list short enough for one line."""
    words = [str(item) for item in items]
    shown = ", ".join(words[:limit])
    return shown if len(words) <= limit else f"{shown} and {len(words) - limit} more"


def near(word: str, known: Iterable[object], cutoff: float = 0.6) -> str:
    """` (did you mean 'a'?)` after a word that is none of the known ones, or "" where none is like it.

    Args:
        cutoff: how much alike, from 0 to 1, as difflib counts.
    """
    found = difflib.get_close_matches(word, [str(item) for item in known], n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


# traces


class TraceError(XLoomError):
    """A trace cannot be written or read, or what it is made of does not fit together."""


class UnfinishedTraceError(TraceError):
    """The trace's writer never came to its end."""


class TraceMismatchError(TraceError):
    """Two traces are not of the same tokens, sites or experts."""

"""Sampling with generators of one's own, by transformers' `generate`: two calls at once draw as each would alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from xloom.errors import ConfigError

Generators = torch.Generator | Sequence[torch.Generator]


class _Draw(LogitsProcessor):
    """The last processor: leaves each row the token that was drawn, and no other."""

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self.scores: list[Tensor] = []  # what was drawn from, if it is to be kept
        self.keeps = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.keeps:
            self.scores.append(scores)
        drawn = torch.full_like(scores, -torch.inf)
        for row, generator in enumerate(self._of_rows(len(scores))):
            token = torch.multinomial(scores[row].float().softmax(-1), 1, generator=generator)
            drawn[row, token] = 0.0
        return drawn

    def _of_rows(self, rows: int) -> Sequence[torch.Generator]:
        if isinstance(self._generators, torch.Generator):
            return [self._generators] * rows
        if len(self._generators) != rows:
            raise ConfigError(f"generator: expected one for each of {rows} rows, found {len(self._generators)}")
        return self._generators


def generate_drawn(generators: Generators, streamer: Any = None) -> Callable[..., Any]:
    """A `custom_generate` that samples as `generate` does, with these generators: one for all rows, or one for each.

    Raises:
        ConfigError: no generators; when it writes: greedy text or beams, or another number of rows.
    """

    some = [generators] if isinstance(generators, torch.Generator) else generators
    if not isinstance(some, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in some):
        raise ConfigError(f"generator: expected a torch.Generator, or a list of them, found {generators!r}")

    def sample(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **inputs: Any) -> Any:
        if not generation_config.do_sample or (generation_config.num_beams or 1) != 1:
            found = f"do_sample={generation_config.do_sample}, num_beams={generation_config.num_beams}"
            raise ConfigError(f"generator: expected do_sample=True and num_beams=1, found {found}")
        draw = _Draw(generators)
        draw.keeps = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
        found = model._sample(
            input_ids, LogitsProcessorList([*logits_processor, draw]), generation_config=generation_config,
            streamer=streamer, **inputs,
        )  # fmt: skip
        if draw.keeps:
            found.scores = tuple(draw.scores)
        return found

    return sample

"""One text of a batch: what is asked, how its tokens are chosen, and when it is over. Knows nothing of other rows.

Letters: T tokens  S sites  N experts  V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

from xloom.decoding.loop import Chooser, Written
from xloom.decoding.stream import Detokenizer, Step, prepared, told
from xloom.errors import ConfigError, names
from xloom.passes import TwoPassModel
from xloom.routers import Routed
from xloom.routers.routing import Replay

End = Literal["end", "stop", "length"]

# of generate's settings, those that say how a row's tokens are chosen
_OPTIONS = set(GenerationConfig().to_dict()) - {
    "assistant_confidence_threshold", "cache_config", "cache_implementation", "max_length", "max_new_tokens",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "prompt_lookup_num_tokens",
    "return_dict_in_generate", "stop_strings", "use_cache",
} | {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A text to be gone on with.

    Args:
        ids: tokens of the prompt.
        max_new_tokens: at most so many are written.
        routing: who decides, for this row; None: as in the `with model.routing(...)` around when it joins.
        stop: whether the text so far, without the prompt, is over.
        options: as `generate` takes them (`do_sample`, `top_p`, `repetition_penalty`, `eos_token_id`, ...); greedy by
            default.
        generator: draws the tokens, where `do_sample` is on; by default the global one.
    """

    ids: Sequence[int]
    max_new_tokens: int
    routing: Routed | None = None
    stop: Callable[[str], bool] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None


class RowStep(NamedTuple):
    """One token of one row.

    Args:
        row: the number that `join` gave; in `write`, the request's place.
        end: why it is the row's last: an end token, the request's `stop`, no more tokens; None if more follow.
    """

    row: int
    step: Step
    end: End | None


class Row:
    """A request while it is written."""

    def __init__(self, number: int, model: TwoPassModel, tokenizer: Any, request: Request) -> None:
        check_request(model, tokenizer, request)
        routing = model.routing_of(request.routing)
        if len(routing) != 1:
            raise ConfigError(f"routing: expected one line for one request, found {len(routing)}")
        if isinstance(routing.lines[0].decider, Replay):
            raise ConfigError("routing: a replay is for one forward, and a text takes many; found Precomputed")
        self.number, self.request, self.line = number, request, routing.lines[0]
        self.ids = [int(token) for token in request.ids]
        ids_1T = torch.tensor([self.ids], device=model.device)
        options = {"attention_mask": torch.ones_like(ids_1T), "pad_token_id": 0, "do_sample": False, **request.options}
        text = prepared(model, ids_1T, routing, options | {"max_new_tokens": request.max_new_tokens})
        text.check(request.generator)
        self.read, self._text, self._detokenizer = len(self.ids), "", Detokenizer(tokenizer)
        ends = text.settings._eos_token_tensor
        self._ends = frozenset() if ends is None else frozenset(ends.view(-1).tolist())
        own = [one for one in text.stop if not isinstance(one, (EosTokenCriteria, MaxLengthCriteria))]
        self._stop = StoppingCriteriaList(own)
        self._chooser = Chooser(text.processed, bool(text.settings.do_sample), request.generator)
        self._is_plain = not text.process and not self._chooser.samples

    def next_token(self, logits_V: Tensor, likeliest: int) -> int:
        if self._is_plain:
            return likeliest
        return self._chooser.choose(torch.tensor([self.ids], device=logits_V.device), logits_V, None)[0]

    def goes_on(self, written: Written, experts: tuple[str, ...]) -> RowStep:
        step = told(written, self._detokenizer, experts)
        self.ids.append(step.token_id)
        self._text += step.text
        return RowStep(self.number, step, self._end(step.token_id, written.logits_V))

    def _end(self, token: int, logits_V: Tensor) -> End | None:
        if token in self._ends:
            return "end"
        if self.request.stop is not None and self.request.stop(self._text):
            return "stop"
        if self._stop and bool(self._stop(torch.tensor([self.ids], device=logits_V.device), logits_V[None])[0]):
            return "stop"
        return "length" if len(self.ids) - self.read >= self.request.max_new_tokens else None


def check_request(model: TwoPassModel, tokenizer: Any, request: Request) -> None:
    """Raises ConfigError for what no row can be made of."""
    if not isinstance(request, Request):
        raise ConfigError(f"expected a Request, found {request!r:.60}")
    new, vocabulary = request.max_new_tokens, model.config.base_text_config.vocab_size
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(f"expected a model that writes, found {type(model).__name__}")
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, found {new!r}")
    if request.stop is not None and not callable(request.stop):
        raise ConfigError(f"stop: expected a function of the text so far, found {request.stop!r}")
    if request.stop is not None and tokenizer is None:
        raise ConfigError("stop: expected a tokenizer that makes text of tokens, found none")
    if request.generator is not None and not isinstance(request.generator, torch.Generator):
        raise ConfigError(f"generator: expected a torch.Generator, found {request.generator!r}")
    try:
        tokens = [index(token) for token in request.ids]
    except TypeError:
        raise ConfigError(f"ids: expected token ids of one prompt, found {request.ids!r:.60}") from None
    if not tokens:
        raise ConfigError("ids: expected at least one token, found none")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ConfigError(f"ids: expected tokens from 0 to {vocabulary - 1}, found {min(tokens)} to {max(tokens)}")
    window = getattr(model.config.base_text_config, "max_position_embeddings", None)
    if window is not None and len(tokens) + new > window:
        raise ConfigError(f"ids: {len(tokens)} tokens and {new} new ones are more than the model's window of {window}")
    if odd := set(request.options) - _OPTIONS:
        raise ConfigError(f"options: {names(sorted(odd))}: not for a row of a batch (a text to end at: `stop`)")

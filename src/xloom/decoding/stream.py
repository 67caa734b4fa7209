"""`steps`: text as it is written, each token with its probability and the mixing that wrote it."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xloom.decoding.generating import Decoding, Plain, Text
from xloom.decoding.loop import Written
from xloom.decoding.speculation import Speculative
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel
from xloom.routers import Routed, Routing
from xloom.trace.html import step_html
from xloom.trace.shares import BASE, leaders, shares


class Step(NamedTuple):
    """One token of the text.

    Args:
        text: what it adds to the decoded text; empty without a tokenizer, and while a character is not complete.
        logprob: natural logarithm of the model's own probability of it, before temperature and the like.
        scalings: [S, N] the experts' weights with which it was written.
        from_draft: whether it had been drafted.
        experts: names of the N experts.
    """

    token_id: int
    text: str
    logprob: float
    scalings: Tensor
    from_draft: bool
    experts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        share_C = shares(self.scalings).mean(dim=0)
        leader = int(leaders(share_C))
        led = f"{self._names[leader]} leads with {share_C[leader]:.0%}"
        sizes = " x ".join(map(str, self.scalings.shape))
        draft = ", from a draft" if self.from_draft else ""
        return f"Step({self.text!r}, id {self.token_id}, logprob {self.logprob:.3f}, {sizes} scalings: {led}{draft})"

    def _repr_html_(self) -> str:
        return step_html(self.text, self.token_id, self.logprob, self.scalings, self.from_draft, self._names[:-1])

    @property
    def _names(self) -> tuple[str, ...]:
        """Of the experts, numbered where they are not known, and of the base."""
        count = self.scalings.shape[-1]
        return (*(self.experts or (f"expert {n}" for n in range(count))), BASE)


class Detokenizer:
    """Decodes token by token; text comes out once its characters are complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._shown = 0  # decoding needs some tokens before the new ones

    def add(self, token: int) -> str:
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._start : self._shown]), self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def prepared(model: Any, input_ids: Tensor, routing: Routing, options: Mapping[str, Any]) -> Text:
    """A text as `generate` prepares it: processors, criteria, settings, mask and cache, by its options."""
    found: list[Text] = []

    def prepare(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        found.append(Text.of(model, input_ids, logits_processor, stopping_criteria, generation_config, inputs))
        return input_ids

    try:
        model.generate(input_ids, routing=routing, custom_generate=prepare, **options)
    except ValueError as error:  # transformers' own words for options that it does not know
        raise ConfigError(f"options: {' '.join(str(error).split())}") from None
    return found[0]


def steps(
    model: TwoPassModel,
    input_ids: Tensor,
    tokenizer: Any = None,
    *,
    routing: Routed | None = None,
    generator: torch.Generator | None = None,
    speculative: Speculative | bool = False,
    custom_generate: Decoding | None = None,
    **options: Any,
) -> Iterator[Step]:
    """See `XLoraForCausalLM.stream`."""
    if speculative and custom_generate is not None:
        raise ConfigError("stream: pass either speculative or custom_generate, and not both")
    how = custom_generate or Plain()
    if speculative:
        how = Speculative() if speculative is True else speculative
    if generator is not None and how.generator is not None:
        raise ConfigError("stream: found a generator, and another in what it writes with; expected one")
    ends = options.pop("stop_strings", None) or []  # generate hands its tokenizer to no custom decoding
    ends = [ends] if isinstance(ends, str) else list(ends)
    if ends and tokenizer is None:
        raise ConfigError(f"stop_strings={ends!r}: expected a tokenizer to find them with, found none")
    text = prepared(model, input_ids, model.routing_of(routing), options)
    text.check(generator)
    written = text.written(how, how.generator if generator is None else generator)
    return _told(written, Detokenizer(tokenizer), ends, model.experts)


def _told(
    written: Generator[Written], detokenizer: Detokenizer, ends: Sequence[str], experts: tuple[str, ...]
) -> Iterator[Step]:
    tail, longest = "", max((len(end) for end in ends), default=0)
    with closing(written):
        for one in written:
            step = told(one, detokenizer, experts)
            yield step
            tail = tail[-longest:] + step.text if longest else ""
            if any(end in tail for end in ends):
                return


def told(one: Written, detokenizer: Detokenizer, experts: tuple[str, ...]) -> Step:
    """A step of what was written."""
    logits_V = one.logits_V.float()
    logprob = float(logits_V[one.token] - logits_V.logsumexp(dim=-1))
    return Step(one.token, detokenizer.add(one.token), logprob, one.scalings_SN, one.from_draft, experts)

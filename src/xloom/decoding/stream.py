"""`steps`: text as it is written, each token with its probability and the mixing that wrote it."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xloom.decoding.generating import Decoding, Plain, decode
from xloom.decoding.speculation import Speculative
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel
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


def steps(
    model: TwoPassModel,
    input_ids: Tensor,
    tokenizer: Any = None,
    *,
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
    prepared: dict[str, Any] = {}

    def prepare(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        prepared.update(given, input_ids=input_ids)
        return input_ids

    ends = options.pop("stop_strings", None) or []  # generate hands its tokenizer to no custom decoding
    ends = [ends] if isinstance(ends, str) else list(ends)
    if ends and tokenizer is None:
        raise ConfigError(f"stop_strings={ends!r}: expected a tokenizer to find them with, found none")
    generate: Any = model.generate  # it prepares prompts, processors, criteria and the cache as it always does
    generate(input_ids, custom_generate=prepare, **options)
    detokenizer = Detokenizer(tokenizer)
    ids, process = prepared.pop("input_ids"), prepared.pop("logits_processor")
    stop, settings = prepared.pop("stopping_criteria"), prepared.pop("generation_config")
    text, longest = "", max((len(end) for end in ends), default=0)
    with closing(decode(model, ids, process, stop, settings, prepared, how)) as written:
        for one in written:
            logprob = float(torch.log_softmax(one.logits_V.float(), dim=-1)[one.token])
            piece = detokenizer.add(one.token)
            step = Step(one.token, piece, logprob, one.scalings_SN, one.from_draft, model.experts)
            yield step
            text = text[-longest:] + step.text if longest else ""
            if any(end in text for end in ends):
                return

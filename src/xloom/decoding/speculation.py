"""Speculation without loss, for `generate` and `stream`: the same text in fewer forwards.

model.generate(ids, custom_generate=xloom.speculative(), max_new_tokens=200)
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from xloom.cache import new_cache
from xloom.decoding.loop import Chooser, Policy, Tally, Written, write
from xloom.decoding.steppers import Stepper, stepper_for
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel

MOST_LOOKED_UP = 8


@final
class Speculative:
    """What `generate` takes as `custom_generate`. Greedy text is that of plain decoding (float32; in 16 bits near-ties
    may fall the other way); drawn text has the same distribution. One sequence at a time.

    Two-pass models draft with the newest scalings; all models with what followed the same words before (prompt lookup).

    Attributes:
        tally: what drafting did in all calls so far.

    Args:
        looked_up: tokens of a prompt-lookup draft at most; 0 turns it off.
        generator: draws the tokens; the global one by default.
    """

    def __init__(self, looked_up: int = MOST_LOOKED_UP, generator: torch.Generator | None = None) -> None:
        if looked_up < 0:
            raise ConfigError(f"looked_up: expected 0 or more, found {looked_up}")
        self.looked_up, self.generator = looked_up, generator
        self.tally = Tally()

    def __call__(
        self,
        model: TwoPassModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Raises ConfigError for what it cannot do: batches, beams, attentions or hidden states in the output."""
        streamer = model_kwargs.pop("streamer", None)
        texts, written = [input_ids], list[Written]()
        for one in decode(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, self):
            written.append(one)
            texts.append(input_ids.new_tensor([[one.token]]))
            if streamer is not None:
                streamer.put(texts[-1][0].cpu())
        if streamer is not None:
            streamer.end()
        sequences = torch.cat(texts, dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(one.scores_V[None] for one in written) if generation_config.output_scores else None,
            logits=tuple(one.logits_V[None] for one in written) if generation_config.output_logits else None,
            past_key_values=model_kwargs.get("past_key_values"),
        )


def speculative(looked_up: int = MOST_LOOKED_UP, generator: torch.Generator | None = None) -> Speculative:
    """`Speculative`, for `model.generate(..., custom_generate=xloom.speculative())`."""
    return Speculative(looked_up, generator)


@torch.no_grad()
def decode(
    model: TwoPassModel,
    input_ids: Tensor,
    process: Callable[..., Tensor],
    stop: Callable[..., Tensor],
    settings: GenerationConfig,
    inputs: dict[str, Any],
    how: Speculative | None,
) -> Generator[Written]:
    """Tokens after `input_ids` [1, T], until `stop` says so.

    Args:
        process, stop, settings, inputs: as `generate` hands them to its decoding methods.
        how: None writes without drafts.

    Raises:
        ConfigError: as `Speculative.__call__`.
    """
    _check(input_ids, settings, inputs)
    chooser = Chooser(process, bool(settings.do_sample), how.generator if how else None)
    tally, policy = how.tally if how else Tally(), Policy(how.looked_up if how else 0)
    with _started(model, input_ids, inputs, drafting=how is not None) as (stepper, last):
        token, scores_V = chooser.choose(input_ids, last.logits_V, None)
        first = last._replace(token=token, scores_V=scores_V)
        text = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=1)
        yield first
        if bool(stop(text, first.scores_V[None])[0]):
            return
        more = write(
            stepper, input_ids, token, chooser,
            room=lambda: settings.max_length - text.shape[1], policy=policy, tally=tally,
        )  # fmt: skip
        try:
            for one in more:
                text = torch.cat([text, text.new_tensor([[one.token]])], dim=1)
                yield one
                if bool(stop(text, one.scores_V[None])[0]):
                    return
        finally:
            more.close()


@contextmanager
def _started(
    model: TwoPassModel, input_ids: Tensor, inputs: dict[str, Any], *, drafting: bool
) -> Iterator[tuple[Stepper, Written]]:
    """The prompt in the cache, and what it says comes next."""
    cache = inputs.get("past_key_values") or new_cache(model.config)
    inputs["past_key_values"] = cache
    mask, held = inputs.get("attention_mask"), int(cache.get_seq_length())
    positions = {} if mask is None else {name: of[:, held:] for name, of in model.positions(mask).items()}
    out = model(
        input_ids[:, held:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
    )
    last = Written(0, out.logits[0, -1], out.logits[0, -1], out.scalings[0, -1], False)
    stepper = stepper_for(model, cache, input_ids.shape[1], mask, last.scalings_SN, drafting=drafting)
    try:
        yield stepper, last
    finally:
        stepper.close()


def _check(input_ids: Tensor, settings: GenerationConfig, inputs: dict[str, Any]) -> None:
    def refuse(what: str, found: object) -> None:
        raise ConfigError(f"{what}, found {found}; leave custom_generate out")

    if (settings.num_beams or 1) != 1:
        refuse("speculative decoding is greedy or sampling: expected num_beams=1", settings.num_beams)
    if input_ids.shape[0] != 1:
        refuse("speculative decoding writes one sequence at a time: expected 1 row", input_ids.shape[0])
    if inputs.get("inputs_embeds") is not None:
        refuse("speculative decoding reads the text: expected input_ids", "inputs_embeds")
    if settings.use_cache is False or inputs.get("use_cache") is False:
        refuse("speculative decoding needs a cache: expected use_cache=True", False)
    for name in ("output_attentions", "output_hidden_states"):
        if settings.return_dict_in_generate and getattr(settings, name):
            refuse(f"speculative decoding computes drafts too: expected {name}=False", True)

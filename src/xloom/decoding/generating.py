"""A way of writing one sequence, for `generate` and `stream`: what all of them share.

model.generate(ids, custom_generate=way, max_new_tokens=200)
model.stream(ids, custom_generate=way, max_new_tokens=200)

Letters: T tokens  V vocabulary  S sites  N experts
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from xloom.cache import new_cache
from xloom.call import Observer
from xloom.decoding.loop import Chooser, Policy, Tally, Written, write
from xloom.decoding.steppers import Begun, OnePass, Stepper
from xloom.errors import ConfigError
from xloom.passes import TwoPassModel
from xloom.routers import Routing
from xloom.trace import ScalingsLog


class Decoding(ABC):
    """What `generate` and `stream` take as `custom_generate`.

    Attributes:
        tally: what drafting did in all calls so far.
        looked_up: tokens of a prompt-lookup draft at most.

    Args:
        generator: draws the tokens; the global one by default.
    """

    looked_up = 0

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.tally = Tally()

    def check(self, model: TwoPassModel, routing: Routing) -> None:  # noqa: B027
        """Raises ConfigError for a model or a routing that it cannot write with, before anything runs."""

    @abstractmethod
    def stepper(self, begun: Begun) -> Stepper:
        """How windows go through the model, after a prompt that was read."""

    def __call__(
        self,
        model: TwoPassModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Raises ConfigError for batches, beams, attentions or hidden states in the output."""
        streamer = model_kwargs.pop("streamer", None)
        texts, written = [input_ids], list[Written]()
        text = Text.of(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        for one in text.written(self, self.generator):
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


@final
class Plain(Decoding):
    """Token by token, as the model is."""

    def stepper(self, begun: Begun) -> Stepper:
        return OnePass(begun)


@dataclass
class Text:
    """One text to be written, with everything `generate` has prepared for it, and what holds where it was prepared.

    Args:
        input_ids: [1, T].
        process, stop: logits processors and stopping criteria.
        settings: `generate`'s own, made of all that was asked for.
        inputs: what goes with the model's forward, `routing` among it.
        log: where scalings are logged, if anywhere.
        observer: is shown every site of a mixed pass.
    """

    model: TwoPassModel
    input_ids: Tensor
    process: LogitsProcessorList
    stop: StoppingCriteriaList
    settings: GenerationConfig
    inputs: dict[str, Any]
    log: ScalingsLog | None
    observer: Observer | None

    @classmethod
    def of(
        cls,
        model: TwoPassModel,
        input_ids: Tensor,
        process: LogitsProcessorList,
        stop: StoppingCriteriaList,
        settings: GenerationConfig,
        inputs: dict[str, Any],
    ) -> Self:
        """With the log and the observer of the blocks around."""
        return cls(model, input_ids, process, stop, settings, inputs, model.current_log, model.current_observer)

    def processed(self, ids_1T: Tensor, scores_1V: Tensor) -> Tensor:
        """What the processors make of scores; some run the model themselves (guidance)."""
        with self.model.routing(self.inputs["routing"]):
            scores: Tensor = self.process(ids_1T, scores_1V)
            return scores

    def check(self, generator: torch.Generator | None = None) -> None:
        """Raises ConfigError for batches, beams, no cache, no ids, attentions or hidden states in the output, and for a
        generator that has nothing to draw.
        """
        settings, inputs = self.settings, self.inputs
        gives = settings.return_dict_in_generate
        no_cache = settings.use_cache is False or inputs.get("use_cache") is False
        rows, beams = self.input_ids.shape[0], settings.num_beams or 1
        for wrong, said in [
            (beams != 1, f"this decoding is greedy or sampling: expected num_beams=1, found {beams}"),
            (rows != 1, f"this decoding writes one text at a time: expected 1 row, found {rows}"),
            (
                inputs.get("inputs_embeds") is not None,
                "this decoding reads ids: expected input_ids, found inputs_embeds",
            ),
            (generator is not None and not settings.do_sample, "generator: expected do_sample=True, found False"),
            (no_cache, "this decoding needs a cache: expected use_cache=True, found False"),
            (gives and settings.output_attentions, "output_attentions: expected False in this decoding, found True"),
            (
                gives and settings.output_hidden_states,
                "output_hidden_states: expected False in this decoding, found True",
            ),
        ]:
            if wrong:
                raise ConfigError(said)

    @torch.no_grad()
    def written(self, how: Decoding, generator: torch.Generator | None) -> Generator[Written]:
        """Tokens after the prompt, until `stop` says so.

        Args:
            generator: draws them.

        Raises:
            ConfigError: as `Decoding.__call__`.
        """
        ids, settings = self.input_ids, self.settings
        self.check()
        routing = self.model.routing_of(self.inputs.get("routing")).for_rows(1)
        how.check(self.model, routing)
        chooser = Chooser(self.processed, bool(settings.do_sample), generator)
        with self._started(how, routing) as (stepper, last):
            token, scores_V = chooser.choose(ids, last.logits_V, None)
            first = last._replace(token=token, scores_V=scores_V)
            text = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
            yield first
            if bool(self.stop(text, first.scores_V[None])[0]):
                return
            more = write(
                stepper, ids, token, chooser,
                room=lambda: settings.max_length - text.shape[1], policy=Policy(how.looked_up), tally=how.tally,
            )  # fmt: skip
            try:
                for one in more:
                    text = torch.cat([text, text.new_tensor([[one.token]])], dim=1)
                    yield one
                    if bool(self.stop(text, one.scores_V[None])[0]):
                        return
            finally:
                more.close()

    @contextmanager
    def _started(self, how: Decoding, routing: Routing) -> Iterator[tuple[Stepper, Written]]:
        """The prompt in the cache, and what it says comes next."""
        model, inputs = self.model, self.inputs
        cache = inputs.get("past_key_values")
        if cache is None:  # an empty one is false
            cache = new_cache(model.config)
        inputs["past_key_values"] = cache
        mask, held = inputs.get("attention_mask"), int(cache.get_seq_length())
        positions = {} if mask is None else {name: of[:, held:] for name, of in model.positions(mask).items()}
        with model.unlogged(), model.observing_sites(self.observer):
            out = model(
                self.input_ids[:, held:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1,
                routing=routing, **positions,
            )  # fmt: skip
        if self.log is not None:
            self.log.append(out.scalings)
        last = Written(0, out.logits[0, -1], out.logits[0, -1], out.scalings[0, -1], False)
        length = self.input_ids.shape[1]
        stepper = how.stepper(Begun(model, cache, length, mask, last.scalings_SN, routing, self.log, self.observer))
        try:
            yield stepper, last
        finally:
            if not sys.is_finalizing():  # a text left open at the interpreter's end: tensors may be beyond use
                stepper.close()

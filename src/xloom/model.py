"""`XLoraForCausalLM`: the X-LoRA model that writes text.

What it is made of and how it runs is in `xloom.passes`; making, loading and saving in `xloom.loading`.
Letters: B batch  T tokens  D hidden size  S sites  N experts
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, StopStringCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from xloom import checkpoints
from xloom.config import XLoraConfig
from xloom.decoding import Decoding, Speculative, Step, generate_drawn, steps
from xloom.errors import ConfigError, ModulesToSaveError, names
from xloom.experts import Expert
from xloom.loading import XLoraModel
from xloom.routers import Routed


@dataclass
class XLoraOutput(CausalLMOutputWithPast):
    """A causal model's output, and `scalings` [B, T, S, N]: the experts' weights at every site, after top-k.

    `aux_loss` is a mixture-of-experts base's own balancing loss, where it has one. `head_logits` [B, T, S, C] are what
    the head said, before the gate; only with `output_head_logits=True`, and where the head has a part in it.
    """

    scalings: Tensor | None = None
    aux_loss: Tensor | None = None
    head_logits: Tensor | None = None


class XLoraForCausalLM(XLoraModel, GenerationMixin):
    """A base language model whose LoRA experts are weighed per token and per site (X-LoRA, arXiv 2402.07148).

    Make one with `from_experts` or `from_pretrained`. It is a transformers model: `generate`, `Trainer`, `pipeline`
    and the Auto classes work as with any other.

    Attributes:
        base: the causal model, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites.
    """

    saved_as = checkpoints.CAUSAL

    def __init__(self, config: XLoraConfig, base: Any = None, experts: Any = None) -> None:
        super().__init__(config, base, experts)
        if base.generation_config is not None:
            self.generation_config = base.generation_config

    @classmethod
    def _check_experts(cls, experts: Mapping[str, Expert]) -> None:
        for label, expert in experts.items():
            if expert.score:
                raise ModulesToSaveError(
                    f"expert {label!r} ({expert.source}) brings a score head, for which a causal model has no place; "
                    "see XLoraForSequenceClassification"
                )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        head_states: Tensor | None = None,
        routing: Routed | None = None,
        output_head_logits: bool = False,
        **kwargs: Any,
    ) -> XLoraOutput | tuple[Tensor, ...]:
        """As the base's forward; the output has `scalings` [B, T, S, N] beside.

        Args:
            attention_mask: [B, past + T], 1 for real tokens. Pooled head inputs leave padding out, and need it 2-D.
            labels: [B, T] as for any causal model; the loss is the base's own.
            head_states: [B, T, D] from `compute_head_states` on the same tokens, which need not be computed again;
                without a cache only.
            routing: who decides on the scalings: a router for all rows (`xloom.routers`), a list with one for each, or
                a `Routing`. None: as in the `with model.routing(...)` around, or the head.
            output_head_logits: whether the output has the head's logits.
        """
        if "router" in kwargs:  # a base takes any keyword, and says nothing
            raise ConfigError("router: no such argument; expected routing=...")
        # Experts on the language-model head need all tokens there: scalings belong to tokens, not to what is kept.
        cut_after = self.adapts_lm_head and not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
        out, decision = self.run_passes(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            head_states=head_states,
            labels=labels,
            logits_to_keep=0 if cut_after else logits_to_keep,
            routing=routing,
            keep_logits=output_head_logits,
            **kwargs,
        )
        self.log(decision.scalings_BTSN)
        if cut_after:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = out.logits[:, kept]
        output = XLoraOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            scalings=decision.scalings_BTSN,
            aux_loss=getattr(out, "aux_loss", None),
            head_logits=decision.logits_BTSC,
        )
        return output if return_dict is not False else output.to_tuple()

    def generate(
        self,
        *args: Any,
        routing: Routed | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> Any:
        """As transformers' `generate`, which see for arguments and output.

        Args:
            routing: as in `forward`; a list has a router for each row of `inputs`, whatever number of beams or answers.
            generator: draws the tokens, where `do_sample` is on; a list has one for each row that is written. By
                default the global one, which all threads share.

        Raises:
            ConfigError: a generator, and nothing that it could draw.
        """
        bound = self.routing_of(routing)
        if self.current_log is not None or self.current_observer is not None:
            options["disable_compile"] = True  # a compiled forward sees neither
        if generator is not None:
            if taken := {"custom_generate", "assistant_model", "prompt_lookup_num_tokens"} & set(options):
                raise ConfigError(f"generator: expected no {names(sorted(taken))}, which draws by itself; found both")
            if ends := options.pop("stop_strings", None):  # transformers hands its tokenizer to no custom decoding
                criteria = options.get("stopping_criteria") or []
                options["stopping_criteria"] = [*criteria, StopStringCriteria(options.pop("tokenizer"), ends)]
            options["custom_generate"] = generate_drawn(generator, options.get("streamer"))
        # an assistant would be handed the routing too; and guidance runs the model with no argument of ours
        given = {} if options.get("assistant_model") is not None else {"routing": bound}
        with self.routing(bound):
            return super().generate(*args, **given, **options)

    def stream(
        self,
        input_ids: Tensor,
        tokenizer: Any = None,
        *,
        routing: Routed | None = None,
        generator: torch.Generator | None = None,
        speculative: Speculative | bool = False,
        custom_generate: Decoding | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Token by token, each with its text, log-probability and the scalings that wrote it.

        The text is written with what holds when the stream is made, wherever and between whatever else it is read.

        Args:
            input_ids: [1, T].
            tokenizer: gives each step its text; without one it is empty.
            routing: as in `forward`, for the one row.
            generator: draws the tokens, where `do_sample` is on; by default the global one.
            speculative: True, or `xloom.speculative(...)`, writes the same text in fewer forwards.
            custom_generate: another way to write, as `xloom.refreshing(...)`.
            options: as `generate` takes them (`max_new_tokens`, `do_sample`, `attention_mask`, ...).

        Raises:
            ConfigError: more than one sequence, beams, two ways to write, a generator beside a way that has its own.
        """
        return steps(
            self, input_ids, tokenizer, routing=routing, generator=generator, speculative=speculative,
            custom_generate=custom_generate, **options,
        )  # fmt: skip

    def _expand_inputs_for_generation(self, expand_size: int = 1, **options: Any) -> Any:
        """Beams and several answers are copies of a row, side by side: its routing is copied alike."""
        routing = options.get("routing")
        if routing is not None and len(routing) > 1:
            options["routing"] = routing.repeat(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the base does it (Phi-3 starts its cache anew where its rotary scaling changes)."""
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        prepared: dict[str, Any] = self.base.prepare_inputs_for_generation(input_ids, **given, **kwargs)
        # For a static cache transformers makes a 4-D mask here: too early, as each pass has a stack of its own.
        prepared.pop("attention_mask", None)
        return prepared if attention_mask is None else prepared | {"attention_mask": attention_mask}


AutoModelForCausalLM.register(XLoraConfig, XLoraForCausalLM, exist_ok=True)

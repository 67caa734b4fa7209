"""`XLoraForCausalLM`: the X-LoRA model that writes text.

What it is made of and how it runs is in `xloom.passes`; making, loading and saving in `xloom.loading`.
Letters: B batch  T tokens  D hidden size  S sites  N experts
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from xloom import checkpoints
from xloom.config import XLoraConfig
from xloom.decoding import Decoding, Speculative, Step, steps
from xloom.errors import ModulesToSaveError
from xloom.experts import Expert
from xloom.loading import XLoraModel


@dataclass
class XLoraOutput(CausalLMOutputWithPast):
    """A causal model's output, and `scalings` [B, T, S, N]: the experts' weights at every site, after top-k.

    `aux_loss` is a mixture-of-experts base's own balancing loss, where it has one.
    """

    scalings: Tensor | None = None
    aux_loss: Tensor | None = None


class XLoraForCausalLM(XLoraModel, GenerationMixin):
    """A base language model whose LoRA experts are weighed per token and per site (X-LoRA, arXiv 2402.07148).

    Make one with `from_experts` or `from_pretrained`. It is a transformers model: `generate`, `Trainer`, `pipeline`
    and the Auto classes work as with any other.

    Attributes:
        base: the causal model, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites and the router in charge.
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
        **kwargs: Any,
    ) -> XLoraOutput | tuple[Tensor, ...]:
        """As the base's forward; the output has `scalings` [B, T, S, N] beside.

        Args:
            attention_mask: [B, past + T], 1 for real tokens. Pooled head inputs leave padding out, and need it 2-D.
            labels: [B, T] as for any causal model; the loss is the base's own.
            head_states: [B, T, D] from `compute_head_states` on the same tokens, which need not be computed again;
                without a cache only.
        """
        # Experts on the language-model head need all tokens there: scalings belong to tokens, not to what is kept.
        cut_after = self.adapts_lm_head and not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
        out, scalings = self.run_passes(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            head_states=head_states,
            labels=labels,
            logits_to_keep=0 if cut_after else logits_to_keep,
            **kwargs,
        )
        if cut_after:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = out.logits[:, kept]
        output = XLoraOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            scalings=scalings,
            aux_loss=getattr(out, "aux_loss", None),
        )
        return output if return_dict is not False else output.to_tuple()

    def stream(
        self,
        input_ids: Tensor,
        tokenizer: Any = None,
        *,
        speculative: Speculative | bool = False,
        custom_generate: Decoding | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Token by token, each with its text, log-probability and the scalings that wrote it.

        Args:
            input_ids: [1, T].
            tokenizer: gives each step its text; without one it is empty.
            speculative: True, or `xloom.speculative(...)`, writes the same text in fewer forwards.
            custom_generate: another way to write, as `xloom.refreshing(...)`.
            options: as `generate` takes them (`max_new_tokens`, `do_sample`, `attention_mask`, ...).

        Raises:
            ConfigError: more than one sequence, beams, two ways to write.
        """
        return steps(self, input_ids, tokenizer, speculative=speculative, custom_generate=custom_generate, **options)

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

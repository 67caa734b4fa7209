"""`TwoPassModel`: a frozen base and its experts, run as two passes over one cache.

    scaling pass   decoder alone, experts off (or at `scaling_pass_value`)  -> hidden state -> head -> scalings
    mixed pass     the whole base, every site with these scalings           -> the base's own output

With `gate_at_layer` both happen in a single pass. Who decides, for each row, is a `Routing` that travels with the call;
what a pass needs is a `Call`. Nothing of the model changes meanwhile, and calls of several threads run at once.
Knows nothing of what the base puts on top of its decoder, nor of loading and saving.
Letters: B batch  T tokens  D hidden size  S sites  N experts  C columns of the head
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from xloom import architecture, wrapping
from xloom.blocks import WithBlocks
from xloom.cache import CacheViews, new_cache, views
from xloom.call import Call, Current, times
from xloom.config import XLoraConfig
from xloom.errors import ConfigError
from xloom.experts import Expert
from xloom.gating import PoolState, ScalingHead, scaling_pass_scalings
from xloom.mixture import Mixture
from xloom.routers import Routed, Routing


class Decision(NamedTuple):
    """Of tokens: the head's logits [B, T, S, C], where they are wanted, and the scalings [B, T, S, N] decided on."""

    logits_BTSC: Tensor | None
    scalings_BTSN: Tensor


class TwoPassModel(WithBlocks, PreTrainedModel):
    """What all X-LoRA models are made of and how they run; see `XLoraForCausalLM`.

    Attributes:
        base: a model of transformers, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites.
        takes_positions: whether the base's decoder takes `position_ids`.
    """

    config_class = XLoraConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # whether a forward makes a cache unless told otherwise
    makes_cache: ClassVar[bool] = True

    config: XLoraConfig
    base: PreTrainedModel
    head: ScalingHead

    def __init__(self, config: XLoraConfig, base: PreTrainedModel | None = None, experts: Any = None) -> None:
        if base is None or experts is None:
            kind = type(self).__name__
            raise ConfigError(
                f"an X-LoRA model is made of a base and its experts: use {kind}.from_experts(base, experts) or "
                f"{kind}.from_pretrained(path)"
            )
        super().__init__(config)
        self.base = base
        self._can_compile_fullgraph = base._can_compile_fullgraph
        self.expert_configs: dict[str, Mapping[str, Any]] = {name: dict(e.config) for name, e in experts.items()}
        self._expert_sources: dict[str, str] = {name: e.source for name, e in experts.items()}
        self._expert_scores: dict[str, Mapping[str, Tensor]] = {name: e.score for name, e in experts.items()}
        self.mixture = Mixture(base, experts, trainable=config.use_trainable_adapters)
        # An expert that the base's dtype rounds is kept as it was read, to be saved as it was read.
        self._rounded: dict[str, Expert] = {}
        if not config.use_trainable_adapters:
            self._rounded = {n: e for n, e in experts.items() if not e.is_exact_in(self.mixture.dtype)}
        config.sites = [site.name for site in self.mixture.sites]
        self.base.requires_grad_(False)
        if config.use_trainable_adapters:
            for site in self.mixture.sites:
                for parameter in site.parameters(recurse=False):
                    parameter.requires_grad_(True)
        gate = config.gate_at_layer
        self._gate = None if gate is None else wrapping.Gate(base, gate, self.mixture.current)
        # Small and decisive: the head stays in full precision whatever the base is stored in.
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        size = architecture.hidden_size(base, gated=config.gate_at_layer is not None)
        self.head = ScalingHead(config, size, dtype).to(base.device)
        self.takes_positions = "position_ids" in inspect.signature(base.base_model.forward).parameters
        self.adapts_lm_head = any(site is base.get_output_embeddings() for site in self.mixture.sites)
        self._open_blocks()
        self.post_init()
        self.eval()

    def unload(self) -> PreTrainedModel:
        """Takes the experts out for good and gives the base back: its own modules and weights, still frozen."""
        if self._gate is not None:
            self._gate.remove()
        self.mixture.remove()
        return self.base

    def plain_base(self) -> PreTrainedModel:
        """The base without sites and gate, beside the model: modules and parameters of its own in the same memory."""
        return wrapping.plain(self.base)

    # --- what it is made of ---

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the scalings' last axis."""
        return self.mixture.expert_names

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the adapted modules, in the order of the scalings' third axis."""
        return tuple(self.config.sites or ())

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ConfigError("the base is frozen: change its embeddings before from_experts")

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        raise ConfigError("the base is frozen: change its embeddings before from_experts")

    def get_decoder(self, modality: Any = None) -> Any:
        return self.base.base_model

    def init_weights(self) -> None:
        """Nothing: the base and the experts come with their weights, and the head has made its own."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the base has tied its own weights."""

    # --- the two passes ---

    def in_two_passes(self, routing: Routing) -> bool:
        """Whether it takes a pass of its own to get the hidden states that decide."""
        return routing.reads_head and self._gate is None

    def run_passes(
        self,
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        head_states: Tensor | None,
        token_type_ids: Tensor | None = None,
        routing: Routed | None = None,
        keep_logits: bool = False,
        **for_base: Any,
    ) -> tuple[Any, Decision]:
        """What the base answers in the mixed pass, and what was decided before it.

        Args:
            routing: who decides; None: as in the block around.
            keep_logits: whether the head's logits are wanted.
            for_base: what the base's forward takes beside (`labels`, `logits_to_keep`, ...).
            Others: see `XLoraForCausalLM.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass either input_ids or inputs_embeds, and not both")
        use_cache = self._caches(use_cache, past_key_values, head_states)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids if self.takes_positions else None,
            "token_type_ids": token_type_ids,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None} | {"use_cache": use_cache}
        first = input_ids if input_ids is not None else inputs_embeds
        assert first is not None
        tokens = (first.shape[0], first.shape[1])
        lines = self.routing_of(routing).for_rows(tokens[0])
        split = (
            views(past_key_values, self.config, two_passes=lines.reads_head) if past_key_values is not None else None
        )
        call = Call(observer=self.current_observer)
        found: list[Decision] = []

        def decide(hidden_BTD: Tensor | None) -> None:
            logits_BTSC = None
            if hidden_BTD is not None:
                logits_BTSC = self._read(hidden_BTD, self._real_tokens(attention_mask, tokens), split)
            scalings_BTSN = lines.decide(logits_BTSC, tokens, self.config, self.head.linears[0].weight)
            found.append(Decision(logits_BTSC if keep_logits else None, scalings_BTSN))
            if not lines.adds_nothing:
                self.mix(call, lines, scalings_BTSN)

        def at_gate(hidden_BTD: Tensor) -> Tensor | None:
            given = None if head_states is None else head_states.to(hidden_BTD)
            if lines.reads_head:
                decide(hidden_BTD if given is None else given)
            return given

        if not lines.reads_head:
            decide(None)
        elif self._gate is None:
            decide(self.scaling_pass(inputs, split) if head_states is None else head_states)
        if self._gate is not None:
            call.at_gate = at_gate
            if head_states is not None:
                call.first, call.in_tuples = self._gate.index, self._gate.gives_tuples()
        # a pass that adds nothing is the base's own
        alone = lines.adds_nothing and call.observer is None and head_states is None
        with self.mixture.current.running(None if alone else call):
            out = self.base(**inputs, past_key_values=split.mixed if split else None, return_dict=True, **for_base)
        out.past_key_values = past_key_values if use_cache else None
        (decision,) = found
        if lines.asked:
            decision = decision._replace(scalings_BTSN=self._answered(call, decision.scalings_BTSN))
        return out, decision

    def _caches(self, asked: bool | None, cache: Cache | None, head_states: Tensor | None) -> bool:
        """Whether a forward fills a cache."""
        if head_states is not None:
            if asked or cache is not None:
                raise ConfigError("head_states belong to whole sequences: pass neither use_cache nor past_key_values")
            return False
        if asked is None:
            return self.makes_cache and getattr(self.base.config, "use_cache", True) and not self.training
        return asked

    def mix(self, call: Call, lines: Routing, scalings_BTSN: Tensor) -> Call:
        """The call with scalings [B, T, S, N] that a routing has decided on, before its global weight."""
        global_B = lines.global_B(self.config)
        if lines.asked:
            return call.with_asked(scalings_BTSN, lines.asked, global_B)
        return self.weigh(call, times(scalings_BTSN, global_B), lines.most(self.config))

    def weigh(self, call: Call, scalings_BTSN: Tensor, most: int | None) -> Call:
        """The call with scalings [B, T, S, N] as they are used.

        Args:
            most: how many experts of a token can have a scaling other than 0 at a site; None: any number.
        """
        spread = None if torch.is_grad_enabled() else self.mixture.spread_over_ranks(scalings_BTSN, most)
        return call.with_scalings(scalings_BTSN, spread)

    def scaling_pass(self, inputs: dict[str, Any], split: CacheViews | None) -> Tensor:
        """Hidden state [B, T, D] after the final norm, from the decoder alone: no logits, no gradients, no dropout.

        Args:
            inputs: as the base's decoder takes them.
            split: views of a cache, whose first stack goes on.
        """
        call, weights_N = None, scaling_pass_scalings(self.config, self.head.linears[0].weight)
        if weights_N is not None:
            first = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
            weights_N = weights_N * self.config.global_scaling_weight
            call = Call().with_scalings(weights_N.expand(*first.shape[:2], len(self.sites), -1))
        past = split.scaling if split else None
        with torch.no_grad(), _evaluating(self.base), self.mixture.current.running(call):
            hidden: Tensor = self.base.base_model(**inputs, past_key_values=past, return_dict=True).last_hidden_state
        return hidden

    def _read(self, hidden_BTD: Tensor, keep_BT: Tensor, split: CacheViews | None) -> Tensor:
        """The head's logits [B, T, S, C]; pools go on."""
        past: list[PoolState | None] = split.past_pools() if split else [None] * len(self.config.pools)
        hidden_BTD = hidden_BTD.detach().to(keep_BT.device)
        features_BTF, states = self.head.features(hidden_BTD, keep_BT, past)
        if split:
            split.append_pools(states)
        logits: Tensor = self.head(features_BTF)
        return logits

    def compute_head_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the head reads: hidden states [B, T, D] after the scaling pass, or entering layer `gate_at_layer`.

        They depend on the base and `scaling_pass_value` alone, never on the head.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            inputs |= {"attention_mask": attention_mask, **self.positions(attention_mask)}
        if self._gate is None:
            return self.scaling_pass(inputs, None)
        seen: list[Tensor] = []
        call = Call(at_gate=seen.append, stop=self._gate.index, in_tuples=self._gate.gives_tuples())
        with torch.no_grad(), _evaluating(self.base), self.mixture.current.running(call):
            self.base.base_model(**inputs)
        return seen[0]

    def decide(
        self,
        head_states: Tensor,
        attention_mask: Tensor,
        split: CacheViews | None = None,
        routing: Routed | None = None,
    ) -> Decision:
        """Logits [B, T, S, C] and scalings [B, T, S, N] of tokens from what the head reads.

        Args:
            head_states: as `compute_head_states` gives them: whole rows, unless `split` holds what came before.
            split: views of a cache, whose pools go on.
            routing: as in a forward; all of its rows read the head.
        """
        tokens = (head_states.shape[0], head_states.shape[1])
        lines = self.routing_of(routing).for_rows(tokens[0])
        logits_BTSC = self._read(head_states, self._real_tokens(attention_mask, tokens), split)
        return Decision(logits_BTSC, lines.decide(logits_BTSC, tokens, self.config, self.head.linears[0].weight))

    def positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """`position_ids` [B, T] of left-padded rows as a keyword, or nothing where the base takes none."""
        if not self.takes_positions:
            return {}
        return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)}

    def _real_tokens(self, attention_mask: Any, tokens: tuple[int, int]) -> Tensor:
        device = self.head.linears[0].weight.device
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            return attention_mask[:, -tokens[1] :].to(device).bool()
        if attention_mask is not None and self.config.pools:
            raise ConfigError("a pooled head input needs attention_mask as [B, T], to leave padding out")
        return torch.ones(tokens, dtype=torch.bool, device=device)

    def _answered(self, call: Call, decided_BTSN: Tensor) -> Tensor:
        """What the sites were answered [B, T, S, N]; rows and sites that did not ask, or got None, as decided."""
        out = decided_BTSN.clone()
        for index, answer in call.answers.items():
            answer_BTN = answer.reshape(out[:, :, index].shape).to(out)
            for asked in call.asked:
                rows = slice(None) if asked.rows is None else asked.rows
                out[rows, :, index] = answer_BTN[rows]
        return out

    # --- what transformers asks ---

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        # bound to what a copy of the model copies with it
        super()._set_gradient_checkpointing(enable, partial(_checkpointed, self.mixture.current), **kwargs)


def _checkpointed(current: Current, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The backward pass runs layers again after the forward has ended: its call must come back with them."""
    call = current.call
    contexts = lambda: (nullcontext(), current.running(call))  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: dropout in the scaling pass would give the head noise to read."""
    if not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()

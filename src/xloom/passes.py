"""`TwoPassModel`: a frozen base and its experts, run as two passes over one cache.

    scaling pass   decoder alone, experts off (or at `scaling_pass_value`)  -> hidden state -> head -> scalings
    mixed pass     the whole base, every site asking the router             -> the base's own output

With `gate_at_layer` both happen in a single pass. Knows nothing of what the base puts on top of its decoder, nor of
loading and saving.
Letters: B batch  T tokens  D hidden size  S sites  N experts  C columns of the head
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from xloom import architecture
from xloom.cache import CacheViews, new_cache, views
from xloom.config import XLoraConfig
from xloom.errors import ConfigError
from xloom.experts import Expert
from xloom.gating import PoolState, ScalingHead, scaling_pass_scalings
from xloom.mixture import Mixture
from xloom.routers import Fixed, HiddenStateRouter, Precomputed, XLora
from xloom.site import Router
from xloom.trace import ScalingsLog


class TwoPassModel(PreTrainedModel):
    """What all X-LoRA models are made of and how they run; see `XLoraForCausalLM`.

    Attributes:
        base: a model of transformers, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites and the router in charge.
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
        self.mixture.global_weight = config.global_scaling_weight
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
        self._gate_layer = (
            architecture.install_gate(base, config.gate_at_layer) if config.gate_at_layer is not None else None
        )
        # Small and decisive: the head stays in full precision whatever the base is stored in.
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        size = architecture.hidden_size(base, gated=config.gate_at_layer is not None)
        self.head = ScalingHead(config, size, dtype).to(base.device)
        self.takes_positions = "position_ids" in inspect.signature(base.base_model.forward).parameters
        self.adapts_lm_head = any(site is base.get_output_embeddings() for site in self.mixture.sites)
        self._router: Router = XLora()
        self._log: ScalingsLog | None = None
        self.post_init()
        self.eval()

    def unload(self) -> PreTrainedModel:
        """Takes the experts out for good and gives the base back: its own modules and weights, still frozen."""
        if self._gate_layer is not None:
            self._gate_layer.remove()
        self.mixture.remove()
        return self.base

    @contextmanager
    def plain_base(self) -> Iterator[PreTrainedModel]:
        """The base without sites or gate, for as long as the block runs."""
        sites = self.mixture.sites
        if self._gate_layer is not None:
            self._gate_layer.remove()
        self.mixture.remove()
        try:
            yield self.base
        finally:
            self.mixture.put_back(sites)
            if self._gate_layer is not None:
                self._gate_layer.put_back()

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

    # --- routing and logging ---

    @property
    def router(self) -> Router:
        return self._router

    @property
    def runs_two_passes(self) -> bool:
        """Whether the router in charge reads hidden states that a pass of their own gives."""
        return isinstance(self._router, HiddenStateRouter) and self._gate_layer is None

    @contextmanager
    def routing(self, router: Router) -> Iterator[None]:
        """Scalings come from `router` inside the block: `with model.routing(routers.Uniform()): ...`."""
        before = self._router
        self._router = router
        try:
            yield
        finally:
            self._router = before

    @contextmanager
    def logging_scalings(self, max_tokens: int = 65_536) -> Iterator[ScalingsLog]:
        """Collects the scalings of every forward in the block, detached and bounded.

        `with model.logging_scalings() as log: model.generate(...)`, then `log[site, expert]`, `log.shares()`.
        """
        before = self._log
        self._log = log = ScalingsLog(self.sites, self.experts, max_tokens)
        try:
            yield log
        finally:
            self._log = before

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Forwards in the block are not logged: drafts that may be thrown away."""
        before, self._log = self._log, None
        try:
            yield
        finally:
            self._log = before

    def log(self, scalings_BTSN: Tensor) -> None:
        """For those who ran a forward unlogged and keep it."""
        if self._log is not None:
            self._log.append(scalings_BTSN)

    # --- the two passes ---

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
        **for_base: Any,
    ) -> tuple[Any, Tensor]:
        """What the base answers in the mixed pass, and the scalings [B, T, S, N] in use.

        Args:
            for_base: what the base's forward takes beside (`labels`, `logits_to_keep`, ...).
            Others: see `XLoraForCausalLM.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass either input_ids or inputs_embeds, and not both")
        if head_states is not None:
            if use_cache or past_key_values is not None:
                raise ConfigError("head_states belong to whole sequences: pass neither use_cache nor past_key_values")
            use_cache = False
        if use_cache is None:
            use_cache = self.makes_cache and getattr(self.base.config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids if self.takes_positions else None,
            "token_type_ids": token_type_ids,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None} | {"use_cache": bool(use_cache)}
        gating = isinstance(self._router, HiddenStateRouter)
        split = views(past_key_values, self.config, two_passes=gating) if past_key_values is not None else None
        first = input_ids if input_ids is not None else inputs_embeds
        assert first is not None
        tokens = (first.shape[0], first.shape[1])
        self.mixture.global_weight = self.config.global_scaling_weight
        decided: list[Precomputed] = []

        def decide(hidden_BTD: Tensor) -> Precomputed:
            decided.append(self._decide(hidden_BTD, self._real_tokens(attention_mask, tokens), split))
            return decided[-1]

        router: Router | None = self._router
        if self.runs_two_passes:
            router = decide(self.scaling_pass(inputs, split) if head_states is None else head_states)
        elif gating:
            router = None  # until the gate layer is reached
        asked: dict[int, Tensor] = {}
        with self.mixture.routed_by(router), self._gated(decide if gating else None, head_states), ExitStack() as stack:
            if not gating:
                asked = stack.enter_context(self.mixture.recording())
            out = self.base(**inputs, past_key_values=split.mixed if split else None, return_dict=True, **for_base)
        out.past_key_values = past_key_values if use_cache else None
        scalings = decided[0].scalings_BTSN if decided else self._answered(asked, tokens)
        self.log(scalings)
        return out, scalings

    def scaling_pass(self, inputs: dict[str, Any], split: CacheViews | None) -> Tensor:
        """Hidden state [B, T, D] after the final norm, from the decoder alone: no logits, no gradients, no dropout.

        Args:
            inputs: as the base's decoder takes them.
            split: views of a cache, whose first stack goes on.
        """
        weights = scaling_pass_scalings(self.config, self.head.linears[0].weight)
        router = None if weights is None else Fixed(dict(zip(self.experts, weights.tolist(), strict=True)))
        past = split.scaling if split else None
        with torch.no_grad(), _evaluating(self.base), self.mixture.routed_by(router):
            hidden: Tensor = self.base.base_model(**inputs, past_key_values=past, return_dict=True).last_hidden_state
        return hidden

    def _decide(self, hidden_BTD: Tensor, keep_BT: Tensor, split: CacheViews | None) -> Precomputed:
        assert isinstance(self._router, HiddenStateRouter)
        past: list[PoolState | None] = split.past_pools() if split else [None] * len(self.config.pools)
        hidden_BTD = hidden_BTD.detach().to(keep_BT.device)
        features_BTF, states = self.head.features(hidden_BTD, keep_BT, past)
        if split:
            split.append_pools(states)
        scalings_BTSN = self._router.decide(self.head(features_BTF), self.config, self.experts)
        return Precomputed(scalings_BTSN, once=True, most=self._router.most(self.config))

    @contextmanager
    def _gated(
        self, decide: Callable[[Tensor], Precomputed] | None, states_BTD: Tensor | None = None
    ) -> Iterator[None]:
        """With an early gate, the hidden state that enters layer m decides for all that follow it.

        Given that state beforehand, the pass starts at layer m.
        """
        if self._gate_layer is None or (decide is None and states_BTD is None):
            yield
            return

        def on_hidden(hidden_BTD: Tensor) -> Tensor | None:
            given = None if states_BTD is None else states_BTD.to(hidden_BTD)
            if decide is not None:
                self.mixture.router = decide(hidden_BTD if given is None else given)
            return given

        with ExitStack() as stack:
            if states_BTD is not None:
                stack.enter_context(self._gate_layer.only_from_here())
            stack.enter_context(self._gate_layer.watched_by(on_hidden))
            yield

    def compute_head_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the head reads: hidden states [B, T, D] after the scaling pass, or entering layer `gate_at_layer`.

        They depend on the base and `scaling_pass_value` alone, never on the head.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            inputs |= {"attention_mask": attention_mask, **self.positions(attention_mask)}
        if self._gate_layer is None:
            return self.scaling_pass(inputs, None)
        with torch.no_grad(), _evaluating(self.base), self._gate_layer.only_below() as seen:
            self.base.base_model(**inputs)
        return seen[0]

    def decide(self, head_states: Tensor, attention_mask: Tensor, split: CacheViews | None = None) -> Tensor:
        """Scalings [B, T, S, N] of tokens from what the head reads, by the head and the router in charge.

        Args:
            head_states: as `compute_head_states` gives them: whole rows, unless `split` holds what came before.
            split: views of a cache, whose pools go on.
        """
        tokens = (head_states.shape[0], head_states.shape[1])
        return self._decide(head_states, self._real_tokens(attention_mask, tokens), split).scalings_BTSN

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

    def _answered(self, record: dict[int, Tensor], tokens: tuple[int, int]) -> Tensor:
        """The recorded answers as [B, T, S, N]; sites that were not asked, or got None, count as 0."""
        zeros = self.head.linears[0].weight.new_zeros(()).expand(*tokens, len(self.experts))
        if not record:
            return zeros.unsqueeze(2).expand(-1, -1, len(self.sites), -1)
        rows = [record.get(index, zeros) for index in range(len(self.sites))]
        return torch.stack([row.reshape(*tokens, -1).to(zeros) for row in rows], dim=2)

    # --- what transformers asks ---

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            # The backward pass runs layers again after the forward has ended: the router must come back with them.
            router = self.mixture.router
            contexts = lambda: (nullcontext(), self.mixture.routed_by(router))  # noqa: E731
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **options)

        super()._set_gradient_checkpointing(enable, run, **kwargs)


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

"""`XLoraForCausalLM`: a frozen base and its experts as one transformers model with one cache.

    scaling pass   decoder alone, experts off (or at `scaling_pass_value`)  -> hidden state -> head -> scalings
    mixed pass     the whole base, every site asking the router             -> logits

With `gate_at_layer` both happen in a single pass. Loading and saving go through `xloom.checkpoints`.
Letters: B batch  T tokens  D hidden size  S sites  N experts  C columns of the head
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from xloom import architecture, checkpoints
from xloom.cache import CacheViews, new_cache, views
from xloom.config import XLoraConfig, check_expert_names, check_field_names
from xloom.errors import ConfigError, names
from xloom.experts import Expert
from xloom.gating import PoolState, ScalingHead, scaling_pass_scalings
from xloom.mixture import Mixture, Router
from xloom.routers import Fixed, HiddenStateRouter, Precomputed, XLora
from xloom.trace import ScalingsLog


@dataclass
class XLoraOutput(CausalLMOutputWithPast):
    """A causal model's output, and `scalings` [B, T, S, N]: the experts' weights at every site, after top-k.

    `aux_loss` is a mixture-of-experts base's own balancing loss, where it has one.
    """

    scalings: Tensor | None = None
    aux_loss: Tensor | None = None


class XLoraForCausalLM(PreTrainedModel, GenerationMixin):
    """A base language model whose LoRA experts are weighed per token and per site (X-LoRA, arXiv 2402.07148).

    Make one with `from_experts` or `from_pretrained`. It is a transformers model: `generate`, `Trainer`, `pipeline`
    and the Auto classes work as with any other.

    Attributes:
        base: the causal model, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites and the router in charge.
    """

    config_class = XLoraConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    config: XLoraConfig
    base: PreTrainedModel
    head: ScalingHead

    def __init__(self, config: XLoraConfig, base: PreTrainedModel | None = None, experts: Any = None) -> None:
        if base is None or experts is None:
            raise ConfigError(
                "an X-LoRA model is made of a base and its experts: use XLoraForCausalLM.from_experts(base, experts) "
                "or XLoraForCausalLM.from_pretrained(path)"
            )
        super().__init__(config)
        self.base = base
        self.expert_configs: dict[str, Mapping[str, Any]] = {name: dict(e.config) for name, e in experts.items()}
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
        self._adapts_lm_head = any(site is base.get_output_embeddings() for site in self.mixture.sites)
        self._takes_positions = "position_ids" in inspect.signature(base.base_model.forward).parameters
        self._router: Router = XLora()
        self._log: ScalingsLog | None = None
        if base.generation_config is not None:
            self.generation_config = base.generation_config
        self.post_init()
        self.eval()

    # --- making, loading, saving ---

    @classmethod
    def from_experts(
        cls,
        base: str | Path | PreTrainedModel,
        experts: Mapping[str, str | Path | Expert],
        *,
        drop_sites_below_gate: bool = False,
        **options: Any,
    ) -> "XLoraForCausalLM":
        """A model with a fresh head on a base and LoRA adapters that exist.

        Args:
            base: a causal model, or the path or hub id of one.
            experts: by name, in the order of the scalings' last axis: a PEFT LoRA folder, a hub id (`org/name` or
                `org/name/sub/folder`), or an `Expert`.
            drop_sites_below_gate: with `gate_at_layer=m`, cut what experts adapt below layer m instead of refusing.
            options: fields of `XLoraConfig`; and for a base given by name, `dtype`, `device_map`, `revision`,
                `attn_implementation`, `quantization_config`, `trust_remote_code`, `token`, `cache_dir`.

        Raises:
            XLoomError: one of its children names what does not fit.
        """
        check_expert_names(list(experts))
        fields = {key: value for key, value in options.items() if key not in architecture.BASE_OPTIONS}
        hidden_size = fields.pop("hidden_size", None)
        check_field_names(list(fields))
        XLoraConfig(**fields, experts=list(experts))  # contradictions show before anything heavy starts
        read = {n: e if isinstance(e, Expert) else Expert.from_pretrained(e) for n, e in experts.items()}
        base_options = {key: value for key, value in options.items() if key in architecture.BASE_OPTIONS}
        model, where = architecture.load_base(base, base_options)
        config = XLoraConfig(
            base_config=model.config,
            base_model_name_or_path=where,
            base_revision=base_options.get("revision"),
            experts=list(experts),
            dtype=model.dtype,
            **fields,
        )
        found = architecture.hidden_size(model, gated=config.gate_at_layer is not None)
        if hidden_size not in (None, found):
            raise ConfigError(f"hidden_size={hidden_size}, but the base's hidden size is {found}")
        fitted = architecture.fit_experts(model, read, config.gate_at_layer, drop_sites_below_gate)
        made = cls(config, model, fitted)
        with made._unloaded_on_failure():
            architecture.check(made)
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        experts: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> "XLoraForCausalLM":
        """Loads a checkpoint of ours, of PEFT's X-LoRA or of the original xlora; their files tell them apart.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            base: instead of the base that the checkpoint names (or carries).
            experts: where experts are that a PEFT checkpoint names by a path that is gone, by their names there.
            options: for loading the base, as in `from_experts`.

        Raises:
            XLoomError: one of its children says which file, tensor or field is wrong.
        """
        if (dtype := options.pop("torch_dtype", None)) is not None:  # the older name
            options.setdefault("dtype", dtype)
        for key in ("config", "adapter_kwargs", "_from_auto", "use_safetensors", "weights_only"):
            options.pop(key, None)  # what the Auto classes pass beside; the config is in the same folder
        unknown = set(options) - architecture.BASE_OPTIONS
        if unknown:
            raise ConfigError(f"unknown option {names(sorted(unknown))}; XLoraConfig fields belong to from_experts")
        saved = checkpoints.read(pretrained_model_name_or_path, revision=revision, subfolder=subfolder, experts=experts)
        source = base if base is not None else checkpoints.locate_base(saved)
        if saved.config.base_revision and base is None:
            options.setdefault("revision", saved.config.base_revision)
        if saved.config.dtype is not None and not isinstance(source, PreTrainedModel):
            options.setdefault("dtype", saved.config.dtype)  # the head was trained on the base in this dtype
        model, where = architecture.load_base(source, options)
        architecture.check_same_base(saved.config, model)
        config = XLoraConfig(**{**saved.config.to_dict(), "base_config": model.config, "dtype": model.dtype})
        config.base_model_name_or_path = where or saved.config.base_model_name_or_path
        fitted = architecture.fit_experts(model, saved.experts, config.gate_at_layer, drop=False)
        made = cls(config, model, fitted)
        with made._unloaded_on_failure():
            checkpoints.check_sites(saved, made.sites)
            made.head.load_state_dict(checkpoints.checked_head(saved, made.head.state_dict()))
            made.name_or_path = str(pretrained_model_name_or_path)
            architecture.check(made)
        return made

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        format: checkpoints.Format = "xloom",
        include_base: bool = False,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a self-contained folder; the folder appears whole or not at all.

        Args:
            format: "xloom", "peft" (X-LoRA of PEFT), "xlora" (the original) or "mistralrs" (mistral.rs 0.6.0).
            include_base: (xloom) put the base model into the folder too.
            kwargs: what transformers' callers pass beside (`state_dict`, `safe_serialization`, ...) is not needed here;
                with `push_to_hub=True`, `repo_id`, `token` and the like.

        Raises:
            NotExportableError: the format has no words for something that this model uses.
            CheckpointError: the folder cannot be written.
        """
        if not is_main_process:
            return
        if include_base and format != "xloom":
            raise ConfigError(f"include_base belongs to format='xloom', found {format!r}")
        checkpoints.write(
            self._as_saved(), Path(save_directory), format, base=self._plain_base if include_base else None
        )
        if push_to_hub:
            from huggingface_hub import HfApi

            repo = kwargs.get("repo_id") or Path(save_directory).name
            api = HfApi(token=kwargs.get("token"))
            repo = api.create_repo(repo, private=kwargs.get("private"), exist_ok=True).repo_id
            api.upload_folder(repo_id=repo, folder_path=save_directory)

    def _as_saved(self) -> checkpoints.Saved:
        by_site = self.mixture.experts_of_sites()
        experts = {
            name: self._rounded.get(name) or Expert(name, self.expert_configs[name], modules)
            for name, modules in zip(self.experts, by_site, strict=True)
        }
        return checkpoints.Saved(self.config, dict(self.head.state_dict()), experts)

    @contextmanager
    def _plain_base(self) -> Iterator[PreTrainedModel]:
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

    @contextmanager
    def _unloaded_on_failure(self) -> Iterator[None]:
        """The caller's base does not keep the sites of a model that was never handed over."""
        try:
            yield
        except BaseException:
            self.unload()
            raise

    def unload(self) -> PreTrainedModel:
        """Takes the experts out for good and gives the base back: its own modules and weights, still frozen."""
        if self._gate_layer is not None:
            self._gate_layer.remove()
        self.mixture.remove()
        return self.base

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

    # --- forward ---

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
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass either input_ids or inputs_embeds, and not both")
        if head_states is not None:
            if use_cache or past_key_values is not None:
                raise ConfigError("head_states belong to whole sequences: pass neither use_cache nor past_key_values")
            use_cache = False
        if use_cache is None:
            use_cache = getattr(self.base.config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids if self._takes_positions else None,
            "token_type_ids": kwargs.pop("token_type_ids", None),
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
        if gating and self._gate_layer is None:
            router = decide(self._scaling_pass(inputs, split) if head_states is None else head_states)
        elif gating:
            router = None  # until the gate layer is reached
        # Experts on the language-model head need all tokens there: scalings belong to tokens, not to what is kept.
        cut_after = self._adapts_lm_head and not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
        asked: dict[int, Tensor] = {}
        with self.mixture.routed_by(router), self._gated(decide if gating else None, head_states), ExitStack() as stack:
            if not gating:
                asked = stack.enter_context(self.mixture.recording())
            out = self.base(
                **inputs,
                past_key_values=split.mixed if split else None,
                labels=labels,
                logits_to_keep=0 if cut_after else logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        if cut_after:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = out.logits[:, kept]
        scalings = decided[0].scalings_BTSN if decided else self._answered(asked, tokens)
        if self._log is not None:
            self._log.append(scalings)
        output = XLoraOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            scalings=scalings,
            aux_loss=getattr(out, "aux_loss", None),
        )
        return output if return_dict is not False else output.to_tuple()

    def _scaling_pass(self, inputs: dict[str, Any], split: CacheViews | None) -> Tensor:
        """Hidden state [B, T, D] after the final norm, from the decoder alone: no logits, no gradients, no dropout."""
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
        return Precomputed(self._router.decide(self.head(features_BTF), self.config, self.experts))

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
            return self._scaling_pass(inputs, None)
        with torch.no_grad(), _evaluating(self.base), self._gate_layer.only_below() as seen:
            self.base.base_model(**inputs)
        return seen[0]

    def positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """`position_ids` [B, T] of left-padded rows as a keyword, or nothing where the base takes none."""
        if not self._takes_positions:
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


AutoConfig.register("xlora", XLoraConfig, exist_ok=True)
AutoModelForCausalLM.register(XLoraConfig, XLoraForCausalLM, exist_ok=True)

"""The systems that are compared: one base, the same experts and the same head in each.

    base               transformers' generate, with its cache: no experts
    peft               PEFT's X-LoRA: two passes over the whole sequence for every token, no cache
    xloom              two passes with one cache
    xloom-early-gate   one pass: the head reads what enters layer L//3, experts act from there on

A system gives tokens for tokens; it knows nothing of clocks or tables. Weights of the base are shared, not copied.
Letters: B batch  T tokens
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xloom import architecture
from xloom.benchmark.parts import Parts
from xloom.errors import ConfigError, UnsupportedArchitectureError, names
from xloom.model import XLoraForCausalLM


@dataclass(frozen=True)
class System:
    """A model that continues token ids greedily.

    Args:
        cached: it keeps keys and values from token to token.
        exact: its tokens must be those of PEFT's X-LoRA.
    """

    name: str
    model: nn.Module
    cached: bool
    exact: bool

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        """The next token [B, 1]: one forward over the prompt that leaves its cache behind, where there is one."""
        mask = torch.ones_like(ids_BT)
        out = self.model(input_ids=ids_BT, attention_mask=mask, use_cache=self.cached, logits_to_keep=1)
        next_B1: Tensor = out.logits[:, -1:].argmax(dim=-1)
        return next_B1

    def decode(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """The next `new_tokens` tokens [B, new_tokens], by the system's own `generate` from the prompt on."""
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        mask = torch.ones_like(ids_BT)
        whole = generate(
            input_ids=ids_BT, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=self.cached
        )
        new = whole[:, ids_BT.shape[1] :]
        if new.shape[1] != new_tokens:
            raise RuntimeError(f"{self.name} stopped after {new.shape[1]} of {new_tokens} tokens")
        return new


def build(name: str, parts: Parts) -> System:
    check_names([name])
    return BUILDERS[name](parts)


def check_names(wanted: Sequence[str]) -> None:
    """Raises ConfigError for names of systems that do not exist."""
    unknown = [name for name in wanted if name not in BUILDERS]
    if unknown:
        raise ConfigError(f"unknown system {names(map(repr, unknown))}; known are {names(BUILDERS, 20)}")


def _base(parts: Parts) -> System:
    return System("base", parts.own_base(), cached=True, exact=False)


def _peft(parts: Parts) -> System:
    from peft import XLoraConfig, get_peft_model

    base = parts.own_base()
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=architecture.hidden_size(base, gated=False),
        # PEFT names experts by position; any other key fails at its first forward
        adapters={str(i): folder for i, folder in enumerate(parts.expert_folders.values())},
        layerwise_scalings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(base, config).eval()
        except (ValueError, KeyError, IndexError) as error:
            raise UnsupportedArchitectureError(
                f"PEFT's X-LoRA cannot be built on {type(base).__name__} ({error}); leave the system 'peft' out"
            ) from error
    classifier = model.base_model.internal_xlora_classifier
    _set_head([layer for layer in classifier.layers if isinstance(layer, nn.Linear)], parts)
    return System("peft", model, cached=False, exact=True)


def _xloom(parts: Parts) -> System:
    model = XLoraForCausalLM.from_experts(parts.own_base(), parts.expert_folders, layerwise_scalings=True)
    _set_head(model.head.linears, parts)
    return System("xloom", model, cached=True, exact=True)


def _early_gate(parts: Parts) -> System:
    """Gated after a third of the layers, by the running mean: the form that the quality figures speak of."""
    base = parts.own_base()
    model = XLoraForCausalLM.from_experts(
        base,
        parts.expert_folders,
        layerwise_scalings=True,
        head_input="running_mean",
        gate_at_layer=base.config.get_text_config(decoder=True).num_hidden_layers // 3,
        drop_sites_below_gate=True,
    )
    return System("xloom-early-gate", model, cached=True, exact=False)


BUILDERS: dict[str, Callable[[Parts], System]] = {
    "base": _base,
    "peft": _peft,
    "xloom": _xloom,
    "xloom-early-gate": _early_gate,
}


def _set_head(linears: Sequence[nn.Linear], parts: Parts) -> None:
    (linear,) = linears
    with torch.no_grad():
        linear.weight.copy_(parts.head_weight)
        linear.bias.copy_(parts.head_bias)

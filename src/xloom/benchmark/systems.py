"""The systems that are compared: one base, the same experts and the same head in each.

    base               transformers' generate, with its cache: no experts
    peft               PEFT's X-LoRA: two passes over the whole sequence for every token, no cache
    xloom              two passes with one cache
    xloom-early-gate   one pass: the head reads what enters layer L//3, experts act from there on

A system gives tokens for tokens; it knows nothing of clocks or tables. Weights of the base are shared, not copied.
Letters: B batch  T tokens  D hidden size  S sites  N experts  I in-features  O out-features  R rank
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xloom import architecture
from xloom.errors import BaseMismatchError, ConfigError, UnsupportedArchitectureError, names
from xloom.experts import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from xloom.files import new_folder, write_json, write_tensors
from xloom.model import XLoraForCausalLM
from xloom.suite.base_model import resolve_base

RANDOM = "random"
SEED = 0
STRENGTH = 0.2  # size of an expert's change to a weight, relative to that weight
OPINION = 4.0  # the head's weights times this: scalings that differ visibly from token to token


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


@dataclass(frozen=True)
class Parts:
    """What every system is made of. The head is one Linear, with a row per site and expert (as PEFT lays it out)."""

    base: PreTrainedModel
    expert_folders: Mapping[str, str]
    head_weight: Tensor
    head_bias: Tensor

    def own_base(self) -> PreTrainedModel:
        """A base to put modules into, with the very tensors of `base`, and nothing that stops generation early."""
        kept: dict[int, Any] = {id(t): t for t in [*self.base.parameters(), *self.base.buffers()]}
        model: PreTrainedModel = copy.deepcopy(self.base, kept)
        model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        model.config.eos_token_id = None
        return model


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
        hidden_size=architecture.hidden_size(base),
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


def make_parts(base: PreTrainedModel, folder: Path, *, experts: int, rank: int) -> Parts:
    """Random experts on every linear of the decoder, written below `folder` as PEFT does, and a random head."""
    if experts < 1 or rank < 1:
        raise ConfigError(f"experts and rank must be at least 1, found experts={experts}, rank={rank}")
    generator = torch.Generator().manual_seed(SEED)
    linears = _linears(base)
    folders = {f"expert{i}": str(folder / str(i)) for i in range(experts)}
    for path in folders.values():
        _write_expert(Path(path), linears, rank, generator)
    width = architecture.hidden_size(base)
    bound = 1 / math.sqrt(width)
    weight = OPINION * bound * (2 * torch.rand(len(linears) * experts, width, generator=generator) - 1)
    bias = bound * (2 * torch.rand(len(linears) * experts, generator=generator) - 1)
    return Parts(base, folders, weight, bias)


def load_base(base: str | Path | PreTrainedModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A loaded base as it is, or one by path, hub id or the name of the built-in base. Raises XLoomError."""
    if isinstance(base, PreTrainedModel):
        architecture.check_base(base)
        return base.to(device=device, dtype=dtype).eval()
    model, _ = architecture.load_base(resolve_base(str(base)), {"dtype": dtype})
    return model.to(device).eval()


def random_base(dtype: torch.dtype, device: str, *, layers: int, hidden: int, vocab: int) -> PreTrainedModel:
    """A Llama with SmolLM2-135M's proportions (30 layers, hidden 576, vocabulary 49152) and random weights."""
    if min(layers, hidden, vocab) < 1:
        raise ConfigError(f"layers, hidden and vocab must be at least 1, found {layers}, {hidden} and {vocab}")
    heads = next((n for n in (9, 8, 4, 2, 1) if hidden % n == 0 and (hidden // n) % 2 == 0), None)
    if heads is None:
        raise ConfigError(f"hidden must be even (rotary positions come in pairs), found {hidden}")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3 if heads == 9 else heads // 2),
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=1 / math.sqrt(hidden),  # SmolLM2's 0.0417 at 576
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    return model.to(device=device, dtype=dtype).eval()


def _linears(base: PreTrainedModel) -> dict[str, nn.Linear]:
    output = base.get_output_embeddings()
    found = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not output}
    if not found:
        raise BaseMismatchError(f"{type(base).__name__}: the benchmark puts its experts on nn.Linear, found none")
    return found


def _write_expert(folder: Path, linears: Mapping[str, nn.Linear], rank: int, generator: torch.Generator) -> None:
    tensors = {}
    for name, linear in linears.items():
        weight = linear.weight.detach()
        outputs, inputs = weight.shape
        # alpha/r is 2, so the change 2 B A has STRENGTH times the weight's spread
        spread = STRENGTH / 2 * float(weight.float().std()) * math.sqrt(inputs / rank)
        A_RI = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        B_OR = torch.randn(outputs, rank, generator=generator) * spread
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A_RI.to(weight.dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B_OR.to(weight.dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    with new_folder(folder) as fresh:
        write_json(fresh / CONFIG_FILE, config)
        write_tensors(fresh / WEIGHTS_FILE, tensors)


def _set_head(linears: Sequence[nn.Linear], parts: Parts) -> None:
    (linear,) = linears
    with torch.no_grad():
        linear.weight.copy_(parts.head_weight)
        linear.bias.copy_(parts.head_bias)

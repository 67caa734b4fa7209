"""What the compared systems are made of: a base, random experts on disk, and the weights of a head.

Knows nothing of how a system mixes them.
Letters: S sites  N experts  D hidden size  I in-features  O out-features  R rank
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xloom import architecture, wrapping
from xloom.benchmark.settings import RANDOM
from xloom.errors import BaseMismatchError, ConfigError, names
from xloom.experts import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from xloom.hub.base_model import resolve_base
from xloom.hub.files import new_folder, read_tensors, write_json, write_tensors
from xloom.model import XLoraForCausalLM

SEED = 0
STRENGTH = 0.2  # size of an expert's change to a weight, relative to that weight
_HEAD = "head.safetensors"
OPINION = 4.0  # the head's weights times this: scalings that differ visibly from token to token


@dataclass(frozen=True)
class Parts:
    """What every system is made of. The head is one Linear, with a row per site and expert (as PEFT lays it out)."""

    base: PreTrainedModel
    expert_folders: Mapping[str, str]
    head_weight: Tensor
    head_bias: Tensor

    def own_base(self) -> PreTrainedModel:
        """A base to put modules into, with the very tensors of `base`, and nothing that stops generation early."""
        model = wrapping.plain(self.base)
        model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        model.config.eos_token_id = None
        return model

    def first(self, experts: int) -> "Parts":
        """The same with the first experts alone."""
        every = len(self.expert_folders)
        folders = dict(list(self.expert_folders.items())[:experts])
        kept = [row for row in range(len(self.head_bias)) if row % every < experts]  # a row per site and expert
        return Parts(self.base, folders, self.head_weight[kept], self.head_bias[kept])


def make_parts(
    base: PreTrainedModel, folder: Path, *, experts: int, rank: int, targets: Collection[str] | None = None
) -> Parts:
    """Random experts, written below `folder` as PEFT does, and a random head.

    Args:
        targets: last words of the names of the modules they adapt; default: every linear of the decoder.
    """
    if experts < 1 or rank < 1:
        raise ConfigError(f"experts and rank must be at least 1, found experts={experts}, rank={rank}")
    generator = torch.Generator().manual_seed(SEED)
    linears = _linears(base, targets)
    folders = {f"expert{i}": str(folder / str(i)) for i in range(experts)}
    for path in folders.values():
        _write_expert(Path(path), linears, rank, generator)
    return Parts(base, folders, *_random_head(base, len(linears) * experts, generator))


def parts_of(model: XLoraForCausalLM, folder: Path) -> Parts:
    """Base and experts of a model, which are written below `folder`, with a random head of one layer."""
    model.save_pretrained(folder / "model")
    folders = {name: str(folder / "model" / "experts" / name) for name in model.experts}
    generator = torch.Generator().manual_seed(SEED)
    base = model.plain_base()
    outputs = len(model.sites) * len(model.experts)
    return Parts(base, folders, *_random_head(base, outputs, generator))


def _random_head(base: PreTrainedModel, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = architecture.hidden_size(base, gated=False)
    bound = 1 / math.sqrt(width)
    weight = OPINION * bound * (2 * torch.rand(outputs, width, generator=generator) - 1)
    return weight, bound * (2 * torch.rand(outputs, generator=generator) - 1)


def write_parts(parts: Parts, folder: Path) -> None:
    """Leaves in `folder` what `read_parts` needs beside the base and the experts: the head's weights."""
    write_tensors(folder / _HEAD, {"weight": parts.head_weight, "bias": parts.head_bias})


def read_parts(base: PreTrainedModel, folder: Path, expert_folders: Mapping[str, str]) -> Parts:
    """The same parts in another process."""
    head = read_tensors(folder / _HEAD)
    return Parts(base, expert_folders, head["weight"], head["bias"])


Shape = tuple[int | None, int | None, int | None]


def open_base(
    base: str | Path | PreTrainedModel, dtype: torch.dtype, device: str, shape: Shape
) -> tuple[PreTrainedModel, str]:
    """A base by path, hub id or built-in name, one that is loaded, or a random one; and what to call it.

    Args:
        shape: layers, hidden size and vocabulary of the random one; None is SmolLM2-135M's.

    Raises:
        ConfigError: a shape for a base that has its own.
        XLoomError: the base cannot be loaded.
    """
    if isinstance(base, str) and base == RANDOM:
        layers, hidden, vocab = (u if g is None else g for g, u in zip(shape, (30, 576, 49_152), strict=True))
        model = random_base(dtype, device, layers=layers, hidden=hidden, vocab=vocab)
        return model, f"random Llama, {layers} layers, hidden {hidden}, vocabulary {vocab}"
    if any(given is not None for given in shape):
        raise ConfigError(f"layers, hidden and vocab shape base='random'; {base} has its own")
    return load_base(base, dtype, device), str(base) if isinstance(base, str | Path) else type(base).__name__


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


def _linears(base: PreTrainedModel, targets: Collection[str] | None = None) -> dict[str, nn.Linear]:
    output = base.get_output_embeddings()
    found = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not output}
    found = {n: m for n, m in found.items() if targets is None or n.rpartition(".")[2] in targets}
    if not found:
        what = "nn.Linear" if targets is None else f"nn.Linear called {names(targets)}"
        raise BaseMismatchError(f"{type(base).__name__}: the benchmark puts its experts on {what}, found none")
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

"""Tiny random base models of many architectures, and LoRA adapters for them made by PEFT itself."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7},
    "starcoder2": {"sliding_window": 6},
    "cohere": {},
    "stablelm": {},
    "bloom": {"n_head": 4, "n_layer": 3},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
    },
}


def tiny_base(kind: str, dtype: torch.dtype = torch.float32, spread: float = 0.25, **changes: Any) -> PreTrainedModel:
    """A random model of an architecture, with weights large enough that greedy text varies."""
    torch.manual_seed(7)
    settings = _SMALL | ARCHITECTURES.get(kind, {}) | changes
    config = AutoConfig.for_model(kind, **settings)
    # the fused experts of mixture-of-experts models have no grouped product in float64
    eager = {"experts_implementation": "eager"} if "moe" in kind or kind == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def make_expert(base: PreTrainedModel, folder: Path, seed: int = 0, scale: float = 0.3, **lora: Any) -> str:
    """A random adapter, written by PEFT. `lora` are fields of PEFT's LoraConfig."""
    torch.manual_seed(100 + seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**({"task_type": "CAUSAL_LM"} | lora)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0.0, scale)
    model.save_pretrained(folder)
    return str(folder)


def make_experts(base: PreTrainedModel, folder: Path, **lora: Any) -> dict[str, str]:
    """Three experts with different ranks, alphas and targets on a Llama-shaped base."""
    return {
        "chem": make_expert(base, folder / "chem", 0, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **lora),
        "mech": make_expert(base, folder / "mech", 1, r=2, lora_alpha=2, target_modules="all-linear", **lora),
        "prot": make_expert(
            base, folder / "prot", 2, r=3, lora_alpha=5, target_modules=["down_proj", "q_proj"], **lora
        ),
    }


def prompt(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, tokens), generator=generator)

"""Make a small random Mistral with three experts, xloom's export of it for mistral.rs, and xloom's own greedy text.

    python scripts/make_mistralrs_example.py FOLDER

writes FOLDER/base, FOLDER/export (with ordering.json) and FOLDER/expected.json, the inputs of check_mistralrs.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from xloom import Expert, XLoraForCausalLM

HIDDEN, LAYERS, NEW_TOKENS = 64, 3, 32
PROMPTS = ("Low rank adapters", "A protein unfolds when", "Mix the experts", "Silver is a metal and")
TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "mlp.gate_proj": (HIDDEN, 2 * HIDDEN),
}


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    made.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def base(vocab: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    return model


def expert(seed: int, rank: int, alpha: int, layers: range, **config: Any) -> Expert:
    """A random adapter; together they differ in rank, alpha, rsLoRA and in which layers they adapt."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for name, (inputs, outputs) in TARGETS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(rank, inputs, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(outputs, rank, generator=generator)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS), **config}
    return Expert.from_tensors(settings, tensors, source=f"expert {seed}")


@torch.no_grad()
def main(folder: Path) -> None:
    words = tokenizer()
    plain = base(len(words))
    plain.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    experts = {
        "chem": expert(1, 4, 8, range(LAYERS)),
        "mech": expert(2, 2, 3, range(LAYERS), use_rslora=True),
        "prot": expert(3, 3, 3, range(1, LAYERS)),
    }
    model = XLoraForCausalLM.from_experts(
        plain, experts, layerwise_scalings=True, xlora_depth=2, xlora_size=48, softmax_temperature=0.5
    )
    model.config.base_model_name_or_path = "base"
    model.save_pretrained(folder / "export", format="mistralrs")
    rows = []
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, ids.shape[1] :]
        top = [step[0].topk(2).values.tolist() for step in out.logits]
        rows.append({"prompt": prompt, "text": words.decode(new), "token_ids": new.tolist(), "top_logits": top})
    (folder / "expected.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {folder}/base, {folder}/export and {folder}/expected.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

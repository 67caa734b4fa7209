"""Memory of a long generation whose trace goes to disk: resident memory of the process, every 1,000 tokens.

    python benchmarks/trace_memory.py                 tiny model, 10,000 tokens
    python benchmarks/trace_memory.py --hold          the same with the trace in memory: what the folder saves
    python benchmarks/trace_memory.py --window 0      attention to all tokens: the cache grows, and is told apart

The model is a tiny random Mistral with many sites and experts, so that a trace is large beside everything else; its
sliding window keeps the cache of keys and values at one size.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Cache, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from xloom import XLoraForCausalLM
from xloom.benchmark.parts import make_parts
from xloom.seeing import trace_text
from xloom.trace.folder import PART_TOKENS

VOCAB = 128
WARM_UP = 200  # tokens after which libraries have what they need


def make_model(folder: Path, *, layers: int, experts: int, window: int, tokens: int) -> XLoraForCausalLM:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=tokens + 64, sliding_window=window or None, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    parts = make_parts(MistralForCausalLM(config).eval(), folder, experts=experts, rank=1)
    return XLoraForCausalLM.from_experts(parts.own_base(), parts.expert_folders, layerwise_scalings=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")


def resident() -> int:
    """Bytes of this process in memory, now (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def cached() -> int:
    """Bytes of all caches of keys and values."""
    caches = [one for one in gc.get_objects() if issubclass(type(one), Cache)]
    layers = {id(layer): layer for cache in caches for layer in cache.layers if layer.is_initialized}
    found = [tensor.untyped_storage() for layer in layers.values() for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def measure(tokens: int, every: int, *, layers: int, experts: int, window: int, hold: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "experts", layers=layers, experts=experts, window=window, tokens=tokens)
        tokenizer, folder, rows, written = make_tokenizer(), Path(name) / "trace", [], 0
        one = 2 * len(model.sites) * len(model.experts)

        def on_step(_: object) -> None:
            nonlocal written
            written += 1
            if written == WARM_UP or written % every == 0:
                gc.collect()
                disk = sum(path.stat().st_size for path in folder.glob("part-*")) if folder.is_dir() else 0
                row = {
                    "tokens": written,
                    "resident_mb": resident() / 1e6,
                    "cache_mb": cached() / 1e6,
                    "trace_mb": written * one / 1e6,
                    "disk_mb": disk / 1e6,
                }
                rows.append(row)
                print("  ".join(f"{key} {value:.2f}".removesuffix(".00") for key, value in row.items()), flush=True)

        place = None if hold else folder
        trace = trace_text(
            model, tokenizer, "w1 w2 w3", max_new_tokens=tokens, folder=place, on_step=on_step, do_sample=True
        )
        assert int(trace.tokens.answer.sum()) == tokens
    first, last = rows[1], rows[-1]
    return {
        "tokens": tokens,
        "layers": layers,
        "sites": len(model.sites),
        "experts": experts,
        "window": window,
        "in_memory": hold,
        "part_mb": PART_TOKENS * one / 1e6,
        "growth_mb": last["resident_mb"] - first["resident_mb"],
        "cache_growth_mb": last["cache_mb"] - first["cache_mb"],
        "trace_growth_mb": last["trace_mb"] - first["trace_mb"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--window", type=int, default=64, help="tokens that attention sees; 0 for all")
    parser.add_argument("--hold", action="store_true", help="keep the trace in memory instead")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    asked = parser.parse_args()
    found = measure(
        asked.tokens, asked.every, layers=asked.layers, experts=asked.experts, window=asked.window, hold=asked.hold
    )
    where = "in memory" if asked.hold else f"on disk; a part of {found['part_mb']:.1f} MB is held"
    print(
        f"from {found['rows'][1]['tokens']:,} to {found['tokens']:,} tokens: resident memory {found['growth_mb']:+.1f} "
        f"MB, of it cache {found['cache_growth_mb']:+.1f} MB; trace {found['trace_growth_mb']:+.1f} MB {where}"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write the small X-LoRA checkpoints under tests/data that show what PEFT's own files look like.

Two steps, two interpreters (float32, CPU, seeded; PEFT's generated README files are removed):

    python scripts/make_peft019_fixture.py write       # needs peft==0.19.1: tests/data/peft_0_19_1/
    python scripts/make_peft019_fixture.py resave      # a newer peft:       tests/data/peft_0_21_2/xlora/

`write` makes base/, experts/0, experts/1, xlora/ (depth 2, layerwise), xlora_depth1/, expected.safetensors.
`resave` reads these into its own PEFT, checks the logits, and saves xlora/: PEFT >= 0.20 drops head tensors.
Paths inside the saved JSON are relative to the folder that holds xlora/.
"""

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
EXPERTS = (
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
)
XLORA = {
    "xlora": {"xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True},
    "xlora_depth1": {"xlora_depth": 1},
}
KEY_PREFIX = "base_model.internal_xlora_classifier."


def make_base(path: Path) -> None:
    """A random Llama of two layers, with weights large enough for scalings to show in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)


def load_base(path: str) -> PreTrainedModel:
    """The base as PEFT's X-LoRA wants it: float32, no KV cache."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base.config.use_cache = False
    return base


def make_expert(index: int, base: str, path: Path) -> None:
    """A random LoRA expert (B is not zero) as a PEFT folder."""
    torch.manual_seed(1 + index)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **EXPERTS[index])
    get_peft_model(load_base(base), config).save_pretrained(path)


def build_xlora(base: str, experts: str, options: dict[str, Any]) -> PeftModel:
    """PEFT's X-LoRA over both experts, in eval mode, with a seeded head whose scalings vary by token."""
    model_base = load_base(base)
    adapters = {str(index): f"{experts}/{index}" for index in range(len(EXPERTS))}
    hidden_size = model_base.config.hidden_size
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden_size, adapters=adapters, **options)
    model = get_peft_model(model_base, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in head(model).parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def head(model: PeftModel) -> torch.nn.Module:
    """PEFT's scaling head."""
    return model.base_model.internal_xlora_classifier


@torch.no_grad()
def evaluate_base(input_ids: Tensor) -> Tensor:
    """Logits [B,T,V] of the base alone."""
    return load_base("base").eval()(input_ids).logits.clone()


@torch.no_grad()
def evaluate(model: PeftModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B,T,V] and scalings [B,T,L,N]."""
    logits = model(input_ids=input_ids).logits
    return logits.clone(), model.get_latest_scalings().clone()


def save_xlora(model: PeftModel, path: Path) -> None:
    """PEFT's save, less its README and the 0/ 1/ folders, which hold base weights rather than the experts."""
    model.save_pretrained(path)
    for leftover in path.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
    (path / "README.md").unlink(missing_ok=True)


def write() -> None:
    """The whole PEFT 0.19.1 fixture."""
    if peft.__version__ != "0.19.1":
        raise SystemExit(f"`write` needs peft 0.19.1, later ones drop head tensors; found {peft.__version__}")
    root = DATA / "peft_0_19_1"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    with contextlib.chdir(root):
        make_base(Path("base"))
        for index in range(len(EXPERTS)):
            make_expert(index, "base", Path(f"experts/{index}"))
            Path(f"experts/{index}/README.md").unlink(missing_ok=True)
        torch.manual_seed(11)
        input_ids = torch.randint(3, 64, (2, 9))
        expected = {"input_ids": input_ids, "base.logits": evaluate_base(input_ids)}
        for name, options in XLORA.items():
            model = build_xlora("base", "experts", options)
            expected[f"{name}.logits"], expected[f"{name}.scalings"] = evaluate(model, input_ids)
            save_xlora(model, Path(name))
        versions = f"peft {peft.__version__}, transformers {transformers.__version__}"
        save_file(expected, "expected.safetensors", metadata={"versions": versions})
    for name in XLORA:
        print(name, sorted(load_file(root / name / "adapter_model.safetensors")))


def resave() -> None:
    """Check that the installed PEFT computes the expected logits from the 0.19.1 files; keep its own save."""
    source, root = DATA / "peft_0_19_1", DATA / "peft_0_21_2"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    expected = load_file(source / "expected.safetensors")
    with contextlib.chdir(root):
        for name, options in XLORA.items():
            model = build_xlora(f"../{source.name}/base", f"../{source.name}/experts", options)
            saved = load_file(source / name / "adapter_model.safetensors")
            with torch.no_grad():
                for parameter in head(model).parameters():
                    parameter.zero_()
            head(model).load_state_dict({key.removeprefix(KEY_PREFIX): value for key, value in saved.items()})
            logits, scalings = evaluate(model, expected["input_ids"])
            for what, found in (("logits", logits), ("scalings", scalings)):
                gap = (found - expected[f"{name}.{what}"]).abs().max().item()
                print(f"peft {peft.__version__} {name} {what}: largest difference {gap:.1e}")
                if gap > 1e-5:
                    raise SystemExit(f"{name}: {what} differ from the 0.19.1 fixture by {gap}")
            if name == "xlora":
                save_xlora(model, Path(name))
                kept = load_file(Path(name) / "adapter_model.safetensors")
                print("missing from the save:", sorted(saved.keys() - kept.keys()))


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("step", choices=("write", "resave"))
    {"write": write, "resave": resave}[parser.parse_args().step]()

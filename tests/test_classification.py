"""X-LoRA with a score head: what the base and PEFT compute, padding on either side, training, and there and back."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft import XLoraConfig as PeftXLoraConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tiny import ARCHITECTURES, make_expert, make_experts, prompt, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM, XLoraForSequenceClassification, errors, routers
from xloom.hub.files import read_tensors, write_tensors

FIELDS = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0}
KINDS = [kind for kind in ARCHITECTURES if kind not in {"granite", "cohere"}]  # transformers has no such class for them
PAD = 0  # of the tiny bases


def classifier(kind: str = "llama", labels: int = 3, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """The tiny base of a kind with a score head on its decoder."""
    causal = tiny_base(kind, dtype, **changes)
    config = copy.deepcopy(causal.config)
    config.num_labels = labels
    eager = {"experts_implementation": "eager"} if "moe" in kind or kind == "mixtral" else {}
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, **eager)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.5)
    return model.eval()


def seq_cls_expert(base: PreTrainedModel, folder: Path, seed: int = 0, **lora) -> str:
    """An adapter for classification with a score head of its own, written by PEFT."""
    torch.manual_seed(200 + seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", r=2, **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base() -> PreTrainedModel:
    return classifier()


@pytest.fixture
def model(base, expert_paths) -> XLoraForSequenceClassification:
    """Experts of the causal model of the same base."""
    return opinionated(XLoraForSequenceClassification.from_experts(base, expert_paths, **FIELDS))


def opinionated(model: XLoraForSequenceClassification) -> XLoraForSequenceClassification:
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(3)
    return model


def padded(rows: list[torch.Tensor], side: str, fill: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


# --- against the base and PEFT ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fields", [{}, {"top_k_lora": 2, "enable_softmax_topk": True}, {"scaling_pass_value": 0.375}], ids=str
)
@torch.no_grad()
def test_equals_pefts_xlora(tmp_path, dtype, fields):
    """PEFT's works in memory for adapters without a score head of their own; it does not train `score`."""
    base = classifier(dtype=dtype)
    paths = list(make_experts(tiny_base("llama", dtype), tmp_path).values())
    theirs_base = copy.deepcopy(base)
    theirs_base.config.use_cache = False
    options = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16} | fields
    config = PeftXLoraConfig(
        task_type="SEQ_CLS", hidden_size=32, adapters={str(i): p for i, p in enumerate(paths)}, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(theirs_base, config).eval().to(dtype)
    ours = XLoraForSequenceClassification.from_experts(base, {f"e{i}": p for i, p in enumerate(paths)}, **options)
    layers = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    for mine, layer in zip(ours.head.linears, layers, strict=True):
        layer.weight.mul_(4)
        mine.weight.copy_(layer.weight)
        mine.bias.copy_(layer.bias)
    ids, mask = padded([prompt(1, 9)[0], prompt(1, 6)[0]], "right")
    labels = torch.tensor([2, 0])
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    found = ours(ids, attention_mask=mask, labels=labels)
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=atol)
    with ours.routing(routers.BaseOnly()):
        assert (ours(ids, attention_mask=mask).logits - expected.logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"gate_at_layer": 1, "drop_sites_below_gate": True}], ids=["two", "gate"])
@torch.no_grad()
def test_every_base(tmp_path, kind, fields):
    """BaseOnly is the base bit for bit; the mixture is the same for a row alone and padded on either side."""
    base = classifier(kind)
    targets = ["q_proj", "v_proj"] if kind in {"mixtral", "qwen3_moe"} else "all-linear"
    expert = make_expert(tiny_base(kind), tmp_path / "e", r=2, target_modules=targets)
    other = make_expert(tiny_base(kind), tmp_path / "f", 1, r=3, target_modules=targets)
    plain = copy.deepcopy(base)
    options = {"layerwise_scalings": True, "head_input": ["token", "running_mean"], **fields}
    model = opinionated(XLoraForSequenceClassification.from_experts(base, {"a": expert, "b": other}, **options))
    rows = [prompt(1, 9)[0], prompt(1, 5, seed=4)[0]]
    labels = torch.tensor([1, 2])
    alone = torch.cat([model(row[None]).logits for row in rows])
    assert alone.shape == (2, 3)
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        with model.routing(routers.BaseOnly()):
            found = model(ids, attention_mask=mask, labels=labels)
            expected = plain(ids, attention_mask=mask, labels=labels)
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.loss, expected.loss)
        positions = model.positions(mask) if side == "left" else {}  # learned positions start at the first token
        out = model(ids, attention_mask=mask, **positions)
        torch.testing.assert_close(out.logits, alone, rtol=0, atol=2e-5)
        assert out.scalings.shape == (2, 9, len(model.sites), 2)
    assert (alone - expected.logits).abs().max() > 1e-2


@torch.no_grad()
def test_padding_is_what_the_mask_leaves_out(model):
    """A tokenizer may pad with another id than the base's config knows."""
    rows = [prompt(1, 7)[0], prompt(1, 4, seed=4)[0]]
    expected = model(*padded(rows, "right")).logits
    for side in ("right", "left"):
        ids, mask = padded(rows, side, fill=5)
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(model(padded(rows, "right", fill=5)[0]).logits[1], expected[1])


def test_rows_without_a_pad_token(base, expert_paths):
    base.config.pad_token_id = None
    model = XLoraForSequenceClassification.from_experts(base, expert_paths)
    assert model(prompt(1, 5)).logits.shape == (1, 3)
    with pytest.raises(errors.ConfigError, match=r"2 rows.*pad_token_id=tokenizer\.pad_token_id"):
        model(prompt(2, 5))
    model.unload()
    model = XLoraForSequenceClassification.from_experts(base, expert_paths, pad_token_id=PAD)
    assert model(prompt(2, 5)).logits.shape == (2, 3)


# --- shared with the causal model ---


@torch.no_grad()
def test_it_routes_as_the_causal_model_does(model, llama, expert_paths):
    causal = XLoraForCausalLM.from_experts(llama, expert_paths, **FIELDS)
    causal.head.load_state_dict(model.head.state_dict())
    ids = prompt(2, 6)
    with model.logging_scalings() as log:
        out = model(ids)
    assert torch.equal(out.scalings, causal(ids, use_cache=False).scalings)
    assert torch.equal(log.tokens(), out.scalings)
    assert (model.experts, model.sites) == (causal.experts, causal.sites)
    with model.routing(routers.Single("mech")):
        assert model(ids).scalings.mean(dim=(0, 1, 2)).tolist() == [0.0, 1.0, 0.0]
    assert out.past_key_values is None
    assert len(model(ids, return_dict=False)) == 2


@pytest.mark.parametrize("fields", [{}, {"gate_at_layer": 1, "drop_sites_below_gate": True}], ids=["two", "gate"])
@torch.no_grad()
def test_head_states_known_beforehand(base, expert_paths, fields):
    model = XLoraForSequenceClassification.from_experts(base, expert_paths, head_input=["token", "ema:3"], **fields)
    ids, mask = padded([prompt(1, 8)[0], prompt(1, 5)[0]], "right")
    states = model.compute_head_states(ids, mask)
    whole, again = model(ids, mask), model(ids, mask, head_states=states)
    torch.testing.assert_close(again.logits, whole.logits, rtol=0, atol=1e-6)
    assert not torch.allclose(model(ids, mask, head_states=states + 1).logits, whole.logits, atol=1e-4)
    with pytest.raises(errors.ConfigError, match="use_cache"):
        model(ids, head_states=states, use_cache=True)


@torch.no_grad()
def test_with_a_cache(model):
    ids = prompt(2, 7)
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(ids).logits, rtol=0, atol=1e-5)


def test_only_head_and_score_have_gradients(base, expert_paths):
    model = XLoraForSequenceClassification.from_experts(base.double(), expert_paths, **FIELDS).train()
    ids, labels = prompt(3, 7), torch.tensor([0, 2, 1])
    trained = {f"head.{name}" for name, _ in model.head.named_parameters()} | {"base.score.weight"}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        graded = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert set(graded) == trained
        assert all(gradient.abs().max() > 0 for gradient in graded.values())
        gradients.append(graded)
    for name in trained:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=1e-12)


def test_unload_gives_the_base_back(base, expert_paths):
    ids = prompt(2, 6)
    expected = base(ids).logits
    made = XLoraForSequenceClassification.from_experts(base, expert_paths, gate_at_layer=1, drop_sites_below_gate=True)
    made(ids)
    assert made.unload() is base
    assert torch.equal(base(ids).logits, expected)


# --- labels ---

PROBLEMS = {
    "regression": (1, torch.tensor([0.3, -2.0])),
    "single_label_classification": (3, torch.tensor([2, 0])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("said", [True, False])
def test_losses(expert_paths, problem, said, tmp_path):
    """The base's own loss of the mixture's logits; and what kind of problem it is, is kept."""
    count, labels = PROBLEMS[problem]
    options = {"problem_type": problem} if said else {}
    base = classifier(labels=count)
    base.save_pretrained(tmp_path / "base")
    model = XLoraForSequenceClassification.from_experts(tmp_path / "base", expert_paths, **options)
    out = model(prompt(2, 6), labels=labels)
    logits = out.logits.detach()
    expected = {
        "regression": lambda: nn.functional.mse_loss(logits[:, 0], labels),
        "single_label_classification": lambda: nn.functional.cross_entropy(logits, labels),
        "multi_label_classification": lambda: nn.functional.binary_cross_entropy_with_logits(logits, labels),
    }[problem]()
    torch.testing.assert_close(out.loss.detach(), expected)
    assert model.config.problem_type == problem
    model.save_pretrained(tmp_path / "one")
    again = XLoraForSequenceClassification.from_pretrained(tmp_path / "one")
    assert again.config.problem_type == again.base.config.problem_type == problem
    assert again.config.num_labels == count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_labels": 0}, "at least 1, found 0"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels=3.*names 2"),
        ({"id2label": {1: "a", 2: "b"}}, "each number from 0 on"),
        ({"id2label": ["a", "b"]}, "each number from 0 on"),
        ({"problem_type": "guessing"}, "regression, single_label.*'guessing'"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "two labels or more"),
        ({"num_lables": 2}, "num_lables"),
    ],
)
def test_labels_that_contradict_each_other(tmp_path, base, expert_paths, options, words):
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(errors.ConfigError, match=words):
        XLoraForSequenceClassification.from_experts(tmp_path / "base", expert_paths, **options)


def test_labels_of_a_loaded_base(base, expert_paths):
    with pytest.raises(errors.ConfigError, match="num_labels=5.*has 3"):
        XLoraForSequenceClassification.from_experts(base, expert_paths, num_labels=5)
    id2label = {0: "x", 1: "y", 2: "z"}
    model = XLoraForSequenceClassification.from_experts(base, expert_paths, id2label=id2label)
    assert model.config.id2label == base.config.id2label == id2label
    assert model.config.label2id == base.config.label2id == {"x": 0, "y": 1, "z": 2}


def test_labels_belong_to_classification(llama, expert_paths):
    with pytest.raises(errors.ConfigError, match="num_labels"):
        XLoraForCausalLM.from_experts(llama, expert_paths, num_labels=2)


# --- bases ---


def test_the_score_head_of_a_base_given_by_name(tmp_path, llama, base, expert_paths):
    """The base's own where it has one for as many labels, a fresh one otherwise."""
    make = XLoraForSequenceClassification.from_experts
    base.save_pretrained(tmp_path / "base")
    llama.save_pretrained(tmp_path / "causal")
    own = make(tmp_path / "base", expert_paths)
    assert torch.equal(own.score.weight, base.score.weight)
    assert own.base.get_submodule("model.norm").weight.equal(base.model.norm.weight)
    assert make(tmp_path / "base", expert_paths, num_labels=3).score.weight.equal(base.score.weight)
    for where in ("base", "causal"):
        fresh = make(tmp_path / where, expert_paths, num_labels=5)
        assert fresh.score.weight.shape == (5, 32)
        assert fresh(prompt(1, 4)).logits.shape == (1, 5)
        assert fresh.base.model.norm.weight.equal(base.model.norm.weight)


def test_bases_that_cannot_be_classified_with(tmp_path, llama, base, expert_paths):
    make = XLoraForSequenceClassification.from_experts
    with pytest.raises(errors.UnsupportedArchitectureError, match="LlamaForCausalLM.*sequence classification"):
        make(llama, expert_paths)
    with pytest.raises(errors.UnsupportedArchitectureError, match="LlamaForSequenceClassification.*causal"):
        XLoraForCausalLM.from_experts(base, expert_paths)
    bert = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    with pytest.raises(errors.UnsupportedArchitectureError, match="BertForSequenceClassification.*`score`"):
        make(AutoModelForSequenceClassification.from_config(bert), expert_paths)
    tiny_base("cohere").save_pretrained(tmp_path / "cohere")
    with pytest.raises(errors.UnsupportedArchitectureError, match="cohere"):
        make(tmp_path / "cohere", expert_paths)
    base.save_pretrained(tmp_path / "cut")
    weights = read_tensors(tmp_path / "cut" / "model.safetensors")
    write_tensors(tmp_path / "cut" / "model.safetensors", {k: v for k, v in weights.items() if "layers.1.mlp" not in k})
    with pytest.raises(errors.UnsupportedArchitectureError, match=r"missing or of another shape.*layers\.1\.mlp"):
        make(tmp_path / "cut", expert_paths)


def test_a_base_that_no_test_covers_is_tried(base, expert_paths):
    base.config.model_type = "llama-like"
    assert XLoraForSequenceClassification.from_experts(base, expert_paths)(prompt(1, 4)).logits.shape == (1, 3)


# --- experts with a score head of their own ---


@pytest.fixture
def brought(tmp_path, base) -> dict[str, str]:
    return {
        "a": seq_cls_expert(base, tmp_path / "a", 0, target_modules=["q_proj", "v_proj"]),
        "b": seq_cls_expert(base, tmp_path / "b", 1, target_modules="all-linear"),
    }


@torch.no_grad()
def test_an_expert_alone_with_its_score_is_pefts_model(base, brought):
    ids, mask = padded([prompt(1, 8)[0], prompt(1, 5)[0]], "right")
    for name, path in brought.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftModel.from_pretrained(copy.deepcopy(base), path).eval()
        model = XLoraForSequenceClassification.from_experts(copy.deepcopy(base), brought, score_from=name)
        with model.routing(routers.Single(name)):
            found = model(ids, mask).logits
        torch.testing.assert_close(found, theirs(input_ids=ids, attention_mask=mask).logits, rtol=0, atol=1e-5)
    assert XLoraForSequenceClassification.from_experts(base, brought).score.weight.equal(classifier().score.weight)


def test_score_from_says_how_many_labels(tmp_path, llama, base, brought):
    llama.save_pretrained(tmp_path / "causal")
    model = XLoraForSequenceClassification.from_experts(tmp_path / "causal", brought, score_from="b")
    assert model.config.num_labels == 3
    assert not model.score.weight.equal(base.score.weight)


def test_what_score_from_refuses(base, brought, expert_paths):
    make = XLoraForSequenceClassification.from_experts
    with pytest.raises(errors.UnknownExpertError, match=r"'c'.*a, b"):
        make(base, brought, score_from="c")
    with pytest.raises(errors.ConfigError, match="'chem'.*no score head; a does"):
        make(base, {"chem": expert_paths["chem"], "a": brought["a"]}, score_from="chem")
    with pytest.raises(errors.ConfigError, match=r"expert 'a'.*\(3, 32\).*\(2, 32\)"):
        make(other := classifier(labels=2), brought, score_from="a", num_labels=2)
    assert not any(type(module).__name__ == "Site" for module in other.modules())


def test_experts_that_do_not_fit(tmp_path, llama, base, brought):
    with pytest.raises(errors.ModulesToSaveError, match="'a'.*score head.*XLoraForSequenceClassification"):
        XLoraForCausalLM.from_experts(llama, brought)
    on_score = make_expert(base, tmp_path / "s", r=2, target_modules=["q_proj", "score"], task_type=None)
    with pytest.raises(errors.UnsupportedLoraError, match="'s'.*score head.*target_modules"):
        XLoraForSequenceClassification.from_experts(base, {"s": on_score})
    more = seq_cls_expert(base, tmp_path / "m", target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(errors.ModulesToSaveError, match="norm"):
        XLoraForSequenceClassification.from_experts(base, {"m": more})
    file = Path(brought["a"]) / "adapter_model.safetensors"
    tensors = read_tensors(file)
    tensors["base_model.model.score.weight"][0, 0] = torch.nan
    write_tensors(file, tensors)
    with pytest.raises(errors.NonFiniteError, match=r"score\.weight"):
        XLoraForSequenceClassification.from_experts(base, brought)


# --- there and back ---


@torch.no_grad()
def assert_same(one: XLoraForSequenceClassification, two: XLoraForSequenceClassification) -> None:
    ids, mask = padded([prompt(1, 8)[0], prompt(1, 5)[0]], "left")
    first, second = one(ids, mask), two(ids, mask)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.scalings, second.scalings)
    assert (one.config.id2label, one.config.problem_type) == (two.config.id2label, two.config.problem_type)
    assert one.base.config.pad_token_id == two.base.config.pad_token_id


def saved(tmp_path: Path, paths: dict[str, str], dtype=torch.float32, **options) -> XLoraForSequenceClassification:
    """Saved to `one`: with a score head that differs from the base's, as after training."""
    tiny_base("llama", dtype).save_pretrained(tmp_path / "base")
    options = {"id2label": {0: "bad", 1: "fair", 2: "good"}} | options
    model = opinionated(XLoraForSequenceClassification.from_experts(tmp_path / "base", paths, **FIELDS | options))
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path / "one")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [{}, {"gate_at_layer": 1, "drop_sites_below_gate": True}, {"head_input": "ema:3", "null_expert": True}],
    ids=str,
)
def test_round_trip(tmp_path, expert_paths, dtype, fields):
    model = saved(tmp_path, expert_paths, dtype, **fields)
    model.base.config.pad_token_id = 9
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert isinstance(again, XLoraForSequenceClassification)
    assert again.base.config.pad_token_id == 9
    assert again.config.id2label == again.base.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert_same(model, again)
    assert not again.training
    assert again.score.weight.requires_grad
    again.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["config.json", "experts", "head.safetensors", "score.safetensors"]


def test_round_trip_on_another_base(tmp_path, expert_paths, base):
    """The checkpoint's score head counts, whatever the base has."""
    model = saved(tmp_path, expert_paths)
    classifier(labels=7).save_pretrained(tmp_path / "seven")
    load = XLoraForSequenceClassification.from_pretrained
    assert_same(model, load(tmp_path / "one", base=tmp_path / "seven"))
    assert_same(model, load(tmp_path / "one", base=base))
    with pytest.raises(errors.ConfigError, match="num_labels=3.*has 7"):
        load(tmp_path / "one", base=classifier(labels=7))


def test_round_trip_with_the_base_inside(tmp_path, expert_paths):
    model = saved(tmp_path, expert_paths)
    model.save_pretrained(tmp_path / "one", include_base=True)
    shutil.rmtree(tmp_path / "base")
    assert_same(model, XLoraForSequenceClassification.from_pretrained(tmp_path / "one"))


def test_round_trip_of_experts_with_score_heads(tmp_path, brought):
    """They are saved as they came, so that PEFT loads them."""
    model = saved(tmp_path, brought)
    assert_same(model, XLoraForSequenceClassification.from_pretrained(tmp_path / "one"))
    for name, path in brought.items():
        source = read_tensors(Path(path) / "adapter_model.safetensors")
        written = read_tensors(tmp_path / "one" / "experts" / name / "adapter_model.safetensors")
        assert written.keys() == source.keys()
        assert all(torch.equal(written[key], source[key]) for key in source)


def test_the_wrong_class(tmp_path, expert_paths, llama):
    saved(tmp_path, expert_paths)
    llama.save_pretrained(tmp_path / "base")
    XLoraForCausalLM.from_experts(tmp_path / "base", expert_paths).save_pretrained(tmp_path / "causal")
    for load in (XLoraForCausalLM, AutoModelForCausalLM):
        with pytest.raises(
            errors.CheckpointError, match=r"not XLoraForCausalLM.*XLoraForSequenceClassification\.from_pre"
        ):
            load.from_pretrained(tmp_path / "one")
    for load in (XLoraForSequenceClassification, AutoModelForSequenceClassification):
        with pytest.raises(
            errors.CheckpointError, match=r"not XLoraForSequenceClassification.*XLoraForCausalLM\.from_pre"
        ):
            load.from_pretrained(tmp_path / "causal")
    file = tmp_path / "one" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["XLoraForDreams"]}))
    with pytest.raises(errors.CheckpointError, match=r"config\.json.*XLoraForDreams"):
        XLoraForSequenceClassification.from_pretrained(tmp_path / "one")


def test_damaged_score_heads(tmp_path, expert_paths):
    saved(tmp_path, expert_paths)
    file = tmp_path / "one" / "score.safetensors"
    good = read_tensors(file)
    for tensors, error, words in (
        ({}, errors.MissingTensorsError, r"score\.safetensors: the score head lacks weight"),
        (
            {"weight": torch.ones(3, 16)},
            errors.CheckpointError,
            r"score.*weight has shape \(3, 16\), expected \(3, 32\)",
        ),
        ({"weight": good["weight"] * torch.nan}, errors.CheckpointError, "weight holds NaN"),
        (good | {"bias": torch.ones(3)}, errors.CheckpointError, "bias"),
    ):
        write_tensors(file, tensors)
        with pytest.raises(error, match=words):
            XLoraForSequenceClassification.from_pretrained(tmp_path / "one")
    file.unlink()
    with pytest.raises(errors.NotFoundError, match=r"score\.safetensors"):
        XLoraForSequenceClassification.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("format", ["peft", "xlora", "mistralrs"])
def test_formats_that_have_no_score_head(model, tmp_path, format):
    with pytest.raises(errors.NotExportableError, match=f"'{format}'.*XLoraForSequenceClassification"):
        model.save_pretrained(tmp_path / "one", format=format)
    assert not (tmp_path / "one").exists()


def test_a_causal_model_over_a_classifier(tmp_path, expert_paths):
    saved(tmp_path, expert_paths)
    XLoraForCausalLM.from_experts(tmp_path / "base", expert_paths).save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "score.safetensors").exists()
    XLoraForCausalLM.from_pretrained(tmp_path / "one")


# --- with transformers' own tools ---


def toy_task(count: int) -> list[dict]:
    """Words of letters that end in a digit, and of digits that end in a letter: the last token alone says little."""
    tokenizer = tiny_tokenizer()
    texts = [("bcdefgh", 0, "1"), ("1234567", 1, "b")]
    rows = []
    for i in range(count):
        letters, label, end = texts[i % 2]
        text = "".join(letters[(i * 3 + j * j) % 7] for j in range(4 + i % 4)) + end
        rows.append({"input_ids": tokenizer(text)["input_ids"], "labels": label})
    return rows


def trained(model: XLoraForSequenceClassification, tmp_path: Path, steps: int, **arguments) -> Trainer:
    settings = {"per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1, "seed": 0} | arguments
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=toy_task(32),
        eval_dataset=toy_task(8),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        compute_metrics=lambda told: {"right": float((told.predictions.argmax(-1) == told.label_ids).mean())},
    )
    trainer.train()
    return trainer


def test_trainer(tmp_path, brought):
    model = XLoraForSequenceClassification.from_experts(classifier(labels=2), brought, **FIELDS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trained(model, tmp_path, 20)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) / 3 < 0.6 * losses[0]
    assert trainer.evaluate()["eval_right"] > 0.9
    assert trainer.predict(toy_task(6)).predictions.shape == (6, 2), "the logits alone, without the scalings"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"head.{name}" for name, _ in model.head.named_parameters()} | {"base.score.weight"}
    trainer.save_model(tmp_path / "saved")
    again = XLoraForSequenceClassification.from_pretrained(tmp_path / "saved", base=classifier(labels=2))
    assert_same(model.eval(), again)


def test_gradients_are_accumulated_as_a_mean(tmp_path, brought):
    """Trainer takes a model whose forward has **kwargs for one that normalises over the whole step by itself."""
    rates = []
    for batch in (8, 2):
        torch.manual_seed(0)
        model = XLoraForSequenceClassification.from_experts(classifier(labels=2), brought, **FIELDS)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "optim": "sgd"}
        trained(model, tmp_path, 2, lr_scheduler_type="constant", max_grad_norm=0.0, **options)
        rates.append(model.score.weight.detach().clone())
    torch.testing.assert_close(rates[0], rates[1], rtol=0, atol=1e-5)
    assert not torch.allclose(rates[0], classifier(labels=2).score.weight, atol=1e-3)


@torch.no_grad()
def test_pipeline(model, caplog):
    tokenizer = tiny_tokenizer()
    model.base.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model._note_labels()
    texts = ["abc", "12345"]
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=2)(texts)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = model(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1).max(-1)
    assert [answer["label"] for answer in answers] == [model.config.id2label[int(i)] for i in expected.indices]
    assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_the_example_in_the_docs(tmp_path, monkeypatch, llama, expert_paths):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    examples = [
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SequenceClassification" in code
    ]
    assert len(examples) == 1, "docs/training.md shows how to train a classifier"
    llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, expert in zip(("materials", "peptides"), expert_paths.values(), strict=False):
        shutil.copytree(expert, tmp_path / "experts" / name)
    monkeypatch.chdir(tmp_path)
    told: dict = {}
    exec(examples[0], told)
    assert_same(told["model"].eval(), XLoraForSequenceClassification.from_pretrained("classifier"))

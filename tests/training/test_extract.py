"""Fine-tunes made by hand, so that what an extraction must find is known."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, errors
from xloom.experts import Expert
from xloom.modules import dense_weight
from xloom.routers import Single
from xloom.training import extract
from xloom.training.extract import Extraction, extract_expert, target_sites, truncated_svd

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "extraction.json"]


def add_low_rank(model: PreTrainedModel, targets: Any = "all-linear", rank: int = 3, size: float = 0.1) -> None:
    """Changes the targeted modules' weights in place by a random matrix of that rank."""
    generator = torch.Generator().manual_seed(5)
    for site in target_sites(model, targets):
        module = model.get_submodule(site)
        rows, columns = module.weight.shape
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        module.weight.data += size * (B @ A).to(module.weight)


def fine_tune(base: PreTrainedModel, folder: Path, **change: Any) -> tuple[Path, Path, PreTrainedModel]:
    """base/ and tuned/ on disk, and the tuned model."""
    tuned = copy.deepcopy(base)
    add_low_rank(tuned, **change)
    return *save(folder, base, tuned), tuned


def save(folder: Path, base: PreTrainedModel, tuned: PreTrainedModel) -> tuple[Path, Path]:
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def logits_of(base: Path, expert: Path) -> tuple[Tensor, Tensor]:
    """Of base and expert as PEFT has them, and as a mixture of the expert alone has them."""
    ids = prompt(2, 9)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), expert).eval()
    ours = XLoraForCausalLM.from_experts(base, {"tuned": expert}).eval()
    with torch.no_grad(), ours.routing(Single("tuned")):
        return peft(ids).logits, ours(ids).logits


def as_read(found: Extraction) -> Any:
    return json.loads(json.dumps(found.as_json()))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "lm_head"]),
        ("llama", ["layers.1.mlp.up_proj"]),
        ("llama", ["embed_tokens", "v_proj"]),
        ("gemma3_text", ["embed_tokens", "v_proj"]),
        ("gpt2", "all-linear"),
        ("gpt2", ["c_attn", "lm_head"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning", "ignore:.*tie:UserWarning")
def test_a_difference_of_low_rank_comes_back_whole(tmp_path: Path, kind: str, targets: Any) -> None:
    untied = {"tie_word_embeddings": False}
    base, tuned, model = fine_tune(tiny_base(kind, **untied), tmp_path, targets=targets)
    found = extract_expert(tuned, base, tmp_path / "out", rank=3, targets=targets)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert found.error < 1e-5 and all(fit.error < 1e-5 for fit in found.sites)
    assert found.unchanged == () and found.warnings() == []
    assert [fit.site for fit in found.sites] == target_sites(model, targets)
    assert {fit.rank for fit in found.sites} == {3}
    with torch.no_grad():
        wanted = model(prompt(2, 9)).logits
    for logits in logits_of(base, tmp_path / "out"):
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # a test of the test: the base alone is far away
        assert relative(AutoModelForCausalLM.from_pretrained(base)(prompt(2, 9)).logits, wanted) > 0.1


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3"])
def test_all_linear_means_what_it_means_to_peft(kind: str) -> None:
    base = tiny_base(kind)
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {name.partition(".lora_A")[0] for name, _ in peft.base_model.model.named_modules() if ".lora_A" in name}
    assert set(target_sites(base, "all-linear")) == theirs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_higher_rank_the_best_part_is_kept(tmp_path: Path, kind: str) -> None:
    start = tiny_base(kind)
    base, tuned, model = fine_tune(start, tmp_path, rank=12)
    found = extract_expert(tuned, base, tmp_path / "out", rank=4)
    squares = [0.0, 0.0]
    for fit in found.sites:
        D = (dense_weight(model.get_submodule(fit.site)) - dense_weight(start.get_submodule(fit.site))).double()
        s = torch.linalg.svdvals(D)
        best = (s[4:].norm() / s.norm()).item()
        assert best > 0.1
        assert fit.error == pytest.approx(best, rel=1e-4)
        assert fit.energy == pytest.approx(1 - best**2, rel=1e-4)
        assert fit.norm == pytest.approx(D.norm().item(), rel=1e-6)
        weight = dense_weight(start.get_submodule(fit.site))
        assert (fit.out_features, fit.in_features) == tuple(weight.shape)
        assert fit.change == pytest.approx(fit.norm / weight.norm().item(), rel=1e-6)
        squares = [squares[0] + s[4:].square().sum().item(), squares[1] + s.square().sum().item()]
    assert found.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


def test_the_errors_are_those_of_the_factors_on_disk(tmp_path: Path) -> None:
    start = tiny_base("llama")
    base, tuned, model = fine_tune(start, tmp_path, rank=12)
    found = extract_expert(tuned, base, tmp_path / "out", rank=4)
    expert = Expert.from_pretrained(tmp_path / "out")
    assert set(expert.modules) == {fit.site for fit in found.sites}
    for fit in found.sites:
        low = expert.modules[fit.site]
        assert low.scale == 1 and low.A_RI.dtype == low.B_OR.dtype == torch.float32
        torch.testing.assert_close(low.A_RI.norm(dim=1), low.B_OR.norm(dim=0))  # the singular values are split evenly
        D = model.get_submodule(fit.site).weight - start.get_submodule(fit.site).weight
        assert relative(low.B_OR @ low.A_RI, D.detach()) == pytest.approx(fit.error, rel=1e-4)
    record = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert record == as_read(found)
    assert record["error"] == found.error and len(record["rows"]) == len(found.sites)
    assert f"{found.error:.4g}" in (tmp_path / "out" / "README.md").read_text()


def test_ranks_larger_than_a_module_has(tmp_path: Path) -> None:
    """Full-rank differences at k_proj (16 x 32) and up_proj, a rank-3 difference elsewhere, and rank 24 asked for."""
    start = tiny_base("llama")
    tuned_model = copy.deepcopy(start)
    add_low_rank(tuned_model, ["o_proj"], rank=3)
    add_low_rank(tuned_model, ["k_proj", "up_proj"], rank=40)
    base, tuned = save(tmp_path, start, tuned_model)
    found = extract_expert(tuned, base, tmp_path / "out", rank=24)
    ranks = {fit.site.rpartition(".")[2]: fit.rank for fit in found.sites}
    assert ranks == {"k_proj": 16, "o_proj": 3, "up_proj": 24}
    exact = {fit.site.rpartition(".")[2]: fit.error < 1e-5 for fit in found.sites}
    assert exact == {"k_proj": True, "o_proj": True, "up_proj": False}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 24
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {16, 3}
    peft, ours = logits_of(base, tmp_path / "out")
    torch.testing.assert_close(peft, ours, rtol=1e-4, atol=1e-4)


def test_unchanged_modules_are_not_targeted(tmp_path: Path) -> None:
    changed = ["layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]
    base, tuned, model = fine_tune(tiny_base("llama"), tmp_path, targets=changed)
    found = extract_expert(tuned, base, tmp_path / "out", rank=3)
    assert [fit.site for fit in found.sites] == [f"model.{name}" for name in changed]
    assert len(found.unchanged) == 7 * 3 - 2 and "model.layers.1.self_attn.q_proj" in found.unchanged
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.{name}" for name in changed]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    adapted = {name.partition(".lora_A")[0] for name, _ in peft.base_model.model.named_modules() if ".lora_A" in name}
    assert adapted == {f"model.{name}" for name in changed}
    with torch.no_grad():
        wanted = model(prompt(2, 9)).logits
    for logits in logits_of(base, tmp_path / "out"):
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_what_no_adapter_carries_is_measured_and_said(tmp_path: Path) -> None:
    start = tiny_base("llama", tie_word_embeddings=True)
    tuned_model = copy.deepcopy(start)
    add_low_rank(tuned_model)
    layers = tuned_model.model.layers
    layers[1].input_layernorm.weight.data *= 1.5
    tuned_model.model.embed_tokens.weight.data *= 1.25
    base, tuned = save(tmp_path, start, tuned_model)
    found = extract_expert(tuned, base, tmp_path / "out", rank=3)
    left = {group.group: group for group in found.left_out}
    sizes = [layer.input_layernorm.weight.norm().item() for layer in start.model.layers]
    wanted = 0.5 * sizes[1] / sum(size**2 for size in sizes) ** 0.5
    assert left["model.layers.*.input_layernorm.weight"].change == pytest.approx(wanted, rel=1e-5)
    assert left["model.layers.*.input_layernorm.weight"].tensors == 3
    assert left["model.embed_tokens.weight"].change == pytest.approx(0.25, rel=1e-5)
    assert left["model.norm.weight"].change == 0
    assert "lm_head.weight" not in left  # tied: the embedding again
    (line,) = found.warnings()
    assert "input_layernorm" in line and "embed_tokens.weight (0.25)" in line and "model.norm" not in line
    assert line in (tmp_path / "out" / "README.md").read_text()


def test_fused_experts_of_a_mixture_of_experts_are_left_out_and_said(tmp_path: Path) -> None:
    start = tiny_base("mixtral")
    tuned_model = copy.deepcopy(start)
    add_low_rank(tuned_model)
    tuned_model.model.layers[1].mlp.experts.down_proj.data *= 1.1
    found = extract_expert(*reversed(save(tmp_path, start, tuned_model)), tmp_path / "out", rank=3)
    assert {fit.site.rpartition(".")[2] for fit in found.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert ["model.layers.*.mlp.experts.down_proj" in line for line in found.warnings()] == [True]


def test_a_tied_head_can_be_carried_and_the_embedding_is_still_reported(tmp_path: Path) -> None:
    base, tuned, _ = fine_tune(tiny_base("llama", tie_word_embeddings=True), tmp_path, targets=["lm_head"])
    found = extract_expert(tuned, base, tmp_path / "out", rank=3, targets=["lm_head"])
    assert found.error < 1e-5
    assert "model.embed_tokens.weight" in found.warnings()[0]


def test_settings_and_dtypes_that_differ_are_said(tmp_path: Path) -> None:
    start = tiny_base("llama")
    base, tuned, model = fine_tune(start, tmp_path)
    model.config.rms_norm_eps = 1e-3
    model.config.use_cache, model.config.attention_dropout = False, 0.3  # of no matter
    model.to(torch.bfloat16).save_pretrained(tuned)
    found = extract_expert(tuned, base, tmp_path / "out", rank=3)
    assert found.settings == {"rms_norm_eps": (start.config.rms_norm_eps, 1e-3)}
    assert any("rms_norm_eps" in line for line in found.warnings())
    assert any("base stored as float32, tuned as bfloat16" in line for line in found.warnings())
    assert 1e-4 < found.error < 0.1  # bfloat16's rounding is no low rank


def test_sixteen_bits_are_subtracted_in_float32(tmp_path: Path) -> None:
    start = tiny_base("llama", dtype=torch.bfloat16)
    base, tuned, model = fine_tune(start, tmp_path, rank=3, size=0.003)
    found = extract_expert(tuned, base, tmp_path / "out", rank=32)
    site = found.sites[0].site
    low = Expert.from_pretrained(tmp_path / "out").modules[site]
    D = model.get_submodule(site).weight.float() - start.get_submodule(site).weight.float()
    assert low.A_RI.dtype == torch.float32
    torch.testing.assert_close(low.B_OR @ low.A_RI, D.detach(), rtol=0, atol=1e-6)


def test_a_large_matrix_is_sampled_and_nearly_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(n, 300))[0] for n in (320, 480))
    D = (U * torch.linspace(2, 0.2, 300)) @ V.T  # a flat spectrum, where sampling is at its worst
    s = torch.linalg.svdvals(D.double())
    best = s[8:].norm().item()

    def error(rank: int = 8) -> float:
        A, B = truncated_svd(D, rank)
        assert A.shape == (rank, 480) and B.shape == (320, rank)
        return (D - B @ A).double().norm().item()

    assert error() == pytest.approx(best, rel=1e-6)
    monkeypatch.setattr(extract, "EXACT_UP_TO", 64)
    sampled = error()
    assert best < sampled < 1.01 * best and sampled != pytest.approx(best, rel=1e-6)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert error() == sampled  # whatever the caller's seed
    assert torch.equal(torch.random.get_rng_state(), state)
    assert error(150) == pytest.approx(s[150:].norm().item(), rel=1e-6)  # a rank near full is computed in full
    low = (U[:, :5] * torch.tensor([3.0, 2, 2, 1, 0.5])) @ V[:, :5].T
    A, B = truncated_svd(low, 8)
    assert len(A) == 5 and relative(B @ A, low) < 1e-5


def test_sampled_sites_report_the_error_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "EXACT_UP_TO", 8)
    monkeypatch.setattr(extract, "OVERSAMPLING", 2)
    start = tiny_base("llama")
    base, tuned, model = fine_tune(start, tmp_path, rank=30)
    found = extract_expert(tuned, base, tmp_path / "out", rank=4)
    expert = Expert.from_pretrained(tmp_path / "out")
    for fit in found.sites:
        D = (model.get_submodule(fit.site).weight - start.get_submodule(fit.site).weight).detach()
        low = expert.modules[fit.site]
        assert fit.error == pytest.approx(relative(low.B_OR @ low.A_RI, D), rel=1e-4)


def test_progress_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    base, tuned, _ = fine_tune(tiny_base("llama"), tmp_path)
    out, calls = tmp_path / "out", []
    extract_expert(tuned, base, out, rank=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 21) for i in range(1, 22)]
    (out / "stale.json").write_text("{}")
    found = extract_expert(tuned, base, out, rank=5, targets=["q_proj"])
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert json.loads((out / "extraction.json").read_text()) == as_read(found)
    assert set(Expert.from_pretrained(out).modules) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}


def test_fan_in_fan_out_follows_the_modules(tmp_path: Path) -> None:
    base, tuned, model = fine_tune(tiny_base("gpt2"), tmp_path)
    found = extract_expert(tuned, base, tmp_path / "out", rank=3)
    assert all(isinstance(model.get_submodule(fit.site), Conv1D) for fit in found.sites)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    fit = next(fit for fit in found.sites if fit.site.endswith("c_attn"))
    assert (fit.in_features, fit.out_features) == (32, 96)


# --- refusals ---


def refusal(tmp_path: Path, kind: type[Exception], tuned: Any, base: Any, **options: Any) -> str:
    """The one line that is said; nothing is written."""
    out = options.pop("output", tmp_path / "refused")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        extract_expert(tuned, base, out, **{"rank": 3} | options)
    assert caught.type is kind
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """base/ and tuned/ of a tiny Llama."""
    folder = tmp_path_factory.mktemp("pair")
    base, tuned, _ = fine_tune(tiny_base("llama"), folder)
    return base, tuned


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("mistral", {}), ["model_type", "'llama'", "'mistral'"]),
        (("llama", {"vocab_size": 65}), ["vocab_size", "64", "65"]),
        (("llama", {"num_hidden_layers": 2}), ["num_hidden_layers", "expected 3, found 2"]),
        (("llama", {"hidden_size": 64}), ["hidden_size", "expected 32, found 64"]),
        (("llama", {"attention_bias": True}), ["self_attn.q_proj.bias", "expected None, found (32,)"]),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, pair: Any, other: Any, words: list[str]) -> None:
    kind, changes = other
    tiny_base(kind, **changes).save_pretrained(tmp_path / "other")
    said = refusal(tmp_path, errors.BaseMismatchError, tmp_path / "other", pair[0])
    assert all(word in said for word in words), said


def test_another_tensor_shape_is_refused(tmp_path: Path) -> None:
    tiny_base("gpt2").save_pretrained(tmp_path / "base")
    tiny_base("gpt2", n_inner=64).save_pretrained(tmp_path / "tuned")
    said = refusal(tmp_path, errors.BaseMismatchError, tmp_path / "tuned", tmp_path / "base")
    assert "shape of transformer.h.0.mlp.c_fc.weight: expected (32, 48), found (32, 64)" in said


def test_nothing_to_extract_is_refused(tmp_path: Path, pair: Any) -> None:
    base, _ = pair
    assert "found the same weights" in refusal(tmp_path, errors.ExpertError, base, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data *= 2
    model.save_pretrained(tmp_path / "norm")
    said = refusal(tmp_path, errors.ExpertError, tmp_path / "norm", base)
    assert "a difference only in model.norm.weight" in said


def test_ranks_and_targets_are_checked(tmp_path: Path, pair: Any) -> None:
    base, tuned = pair
    assert "expected at least 1, found 0" in refusal(tmp_path, errors.ConfigError, tuned, base, rank=0)
    assert "targets" in refusal(tmp_path, errors.ConfigError, tuned, base, targets=[])
    said = refusal(tmp_path, errors.NoMatchingSiteError, tuned, base, targets=["q_proj", "w_proj"])
    assert "found w_proj" in said and "q_proj, k_proj" in said
    assert "proj" in refusal(tmp_path, errors.NoMatchingSiteError, tuned, base, targets=["proj"])  # no ending of a name
    said = refusal(tmp_path, errors.NoMatchingSiteError, tuned, base, targets=["norm"])
    assert "found model.norm (LlamaRMSNorm)" in said


def test_embeddings_of_positions_are_refused(tmp_path: Path) -> None:
    base, tuned, _ = fine_tune(tiny_base("gpt2"), tmp_path)
    said = refusal(tmp_path, errors.NoMatchingSiteError, tuned, base, targets=["wpe"])
    assert "the token embedding, found transformer.wpe (Embedding)" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, pair: Any, value: float) -> None:
    base, tuned = pair
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = value
    model.save_pretrained(tmp_path / "broken")
    said = refusal(tmp_path, errors.NonFiniteError, tmp_path / "broken", base)
    assert said.startswith("tuned") and "model.layers.1.post_attention_layernorm.weight" in said
    assert refusal(tmp_path, errors.NonFiniteError, tuned, tmp_path / "broken").startswith("base")


def test_models_that_are_not_there_are_refused(tmp_path: Path, pair: Any) -> None:
    base, tuned = pair
    said = refusal(tmp_path, errors.NotFoundError, tmp_path / "nowhere", base)
    assert said.startswith("tuned") and "nowhere" in said
    assert refusal(tmp_path, errors.NotFoundError, tuned, tmp_path / "nowhere").startswith("base")
    adapter = make_expert(tiny_base("llama"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    assert "PEFT adapter" in refusal(tmp_path, errors.UnsupportedArchitectureError, adapter, base)


def test_models_that_are_not_whole_are_refused(tmp_path: Path, pair: Any) -> None:
    """A checkpoint saved through torch.compile: transformers finds none of its names and makes up the weights."""
    base, tuned = pair
    for name in ("renamed", "cut", "picky"):
        shutil.copytree(tuned, tmp_path / name)
    weights = load_file(tuned / "model.safetensors")
    renamed = {f"_orig_mod.{key}": value for key, value in weights.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", metadata={"format": "pt"})
    said = refusal(tmp_path, errors.MissingTensorsError, tmp_path / "renamed", base)
    assert said.startswith("tuned") and "model." in said
    whole = (tuned / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refusal(tmp_path, errors.CheckpointError, tmp_path / "cut", base)
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, tmp_path / "picky" / "model.safetensors", metadata={"format": "pt"})
    assert "cannot be loaded" in refusal(tmp_path, errors.CheckpointError, tmp_path / "picky", base)


def test_quantised_weights_are_refused(tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair
    load = AutoModelForCausalLM.from_pretrained

    def quantised(*args: Any, **options: Any) -> Any:
        model, report = load(*args, **options)
        model.config.quantization_config = {"quant_method": "x"}
        return model, report

    monkeypatch.setattr(extract.AutoModelForCausalLM, "from_pretrained", quantised)
    assert "found quantised" in refusal(tmp_path, errors.UnsupportedArchitectureError, tuned, base)


def test_an_output_with_other_files_is_refused_before_anything_is_loaded(tmp_path: Path, pair: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    said = refusal(tmp_path, errors.ConfigError, "nowhere", "nowhere", output=tmp_path / "mine")
    assert "found other files in" in said and "extraction.json" in said
    file = tmp_path / "mine" / "notes.txt"
    assert "found a file" in refusal(tmp_path, errors.ConfigError, "nowhere", "nowhere", output=file)
    said = refusal(tmp_path, errors.ConfigError, pair[1], pair[0], output=pair[1])  # over the tuned model itself
    assert "found other files in" in said


# --- the command ---


def test_the_command_prints_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xloom.cli.extract import extract as command

    monkeypatch.setenv("COLUMNS", "160")
    start = tiny_base("llama")
    model = copy.deepcopy(start)
    add_low_rank(model, rank=12)
    model.model.norm.weight.data *= 1.5
    base, tuned = save(tmp_path, start, model)
    capsys.readouterr()
    command(
        str(tuned), str(base), tmp_path / "out", rank=4, targets=["q_proj", "up_proj"], json_path=tmp_path / "x.json"
    )
    out, _ = capsys.readouterr()
    record = json.loads((tmp_path / "x.json").read_text())
    assert record == json.loads((tmp_path / "out" / "extraction.json").read_text())
    lines = out.splitlines()
    for kind in ("q_proj", "up_proj"):
        errors_here = sorted(row["error"] for row in record["rows"] if row["site"].endswith(kind))
        (line,) = [line for line in lines if line.split()[:1] == [kind]]
        assert line.split()[1:3] == ["3", "4"]
        assert f"{errors_here[1]:.3g}" in line and f"{errors_here[2]:.3g}" in line
    worst = sorted(record["rows"], key=lambda row: -row["error"])
    shown = [line.split()[0] for line in lines if line.startswith("model.layers.") and "*" not in line]
    assert shown == [row["site"] for row in worst[:5]]
    assert any(line.split()[0:3] == ["model.norm.weight", "1", "0.5"] for line in lines)
    assert any(line.startswith("note: left out") and "model.norm.weight (0.5)" in line for line in lines)
    assert (
        lines[-1].startswith(f"expert written to {tmp_path / 'out'}: 6 sites") and f"{record['error']:.3g}" in lines[-1]
    )


def test_errors_of_all_sites_weigh_by_size() -> None:
    fits = tuple(extract.SiteFit("s", 2, 2, 1, norm, 1.0, error) for norm, error in ((3.0, 0.0), (4.0, 1.0)))
    found = Extraction(Path("o"), "t", "b", 1, "all-linear", fits, (), (), {}, ("float32", "float32"))
    assert found.error == pytest.approx(0.8)
    assert found.energy == pytest.approx(0.36)
    assert found.parameters == 8

"""Sites against their slow reference, PEFT with one adapter, and merged weights; bases left as they were."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from torch.nn.utils import prune

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom import site as site_module
from xloom.call import Asked, Call
from xloom.errors import ConfigError, NoMatchingSiteError, ScalingsShapeError
from xloom.experts import Expert, LowRank
from xloom.fused import frozen_mix, narrow_mix, spread_over_ranks
from xloom.mixture import Mixture
from xloom.modules import dense_weight
from xloom.routers import SiteRouter
from xloom.site import Site, dora_gain

F64 = torch.float64


class Given(SiteRouter):
    """The same scalings [..., N] at every site."""

    def __init__(self, scalings: torch.Tensor) -> None:
        self.given = scalings

    def scalings(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        return self.given


class PerSite(SiteRouter):
    """Scalings that differ at every token, site and expert, and are the same again for the same site."""

    def __init__(self, batch: int, tokens: int, experts: int, dtype: torch.dtype = F64) -> None:
        self.shape, self.dtype = (batch, tokens, experts), dtype

    def scalings(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(site.index)
        return torch.randn(self.shape, generator=generator, dtype=F64).to(self.dtype)


def routed(mixture: Mixture, router: SiteRouter):
    """Every site asks the router inside the block."""
    nothing = torch.zeros(1, 1, len(mixture.sites), len(mixture.expert_names))
    return mixture.current.running(Call().with_asked(nothing, (Asked(router.scalings, None),)))


class Reference:
    """Every site adds `delta_reference` instead of `delta` inside the block."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __enter__(self):
        for site in self.mixture.sites:
            site.delta = site.delta_reference

    def __exit__(self, *_):
        for site in self.mixture.sites:
            del site.delta


def low(rank: int, inputs: int, outputs: int, seed: int, *, bias=False, dora=False, embedding=False) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    return LowRank(
        rand(rank, inputs), rand(outputs, rank), 0.5 + seed % 3, rand(outputs) if bias else None,
        rand(outputs).abs() + 0.5 if dora else None, embedding,
    )  # fmt: skip


def one_site(base: nn.Module, experts: list[LowRank | None], **options) -> tuple[Mixture, Site]:
    model = nn.Sequential()
    model.add_module("it", base)
    made = {
        f"e{n}": Expert(f"e{n}", {}, {"it": e} if e else {"nothing": low(1, 1, 1, 0)}) for n, e in enumerate(experts)
    }
    mixture = Mixture(model, made, dtype=F64, **options)
    return mixture, mixture.sites[0]


# --- delta == delta_reference ---


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    base_bias=st.booleans(),
    biases=st.integers(0, 31),
    doras=st.integers(0, 31),
    seed=st.integers(0, 50),
    leading=st.sampled_from([(1, 1), (2, 3), (1, 7)]),
    flat=st.booleans(),
)
def test_delta_means_its_reference(ranks, inputs, outputs, base_bias, biases, doras, seed, leading, flat):
    """Ranks that differ or are missing, some experts with lora_bias, some with DoRA, tokens flattened or not."""
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=base_bias, dtype=F64)
    experts = [
        low(r, inputs, outputs, seed + n, bias=bool(biases >> n & 1), dora=bool(doras >> n & 1)) if r else None
        for n, r in enumerate(ranks)
    ]
    mixture, site = one_site(base, experts)
    x = torch.randn(*leading, inputs, dtype=F64)
    scalings = torch.randn(*leading, len(ranks), dtype=F64)
    x = x.flatten(0, 1) if flat else x
    y = base(x)
    expected = torch.zeros_like(y)
    for n, e in enumerate(experts):  # the formula once more, from the weights that went in
        if e is None:
            continue
        gain = torch.ones(outputs, dtype=F64)
        if e.magnitude_O is not None:
            gain = e.magnitude_O / (base.weight + e.scale * e.B_OR @ e.A_RI).norm(dim=1)
        part = (gain - 1) * (x @ base.weight.T) + gain * e.scale * (x @ e.A_RI.T @ e.B_OR.T)
        part = part + (e.scale * e.bias_O if e.bias_O is not None else 0)
        expected = expected + (scalings.flatten(0, 1) if flat else scalings)[..., n, None] * part
    with torch.no_grad():
        torch.testing.assert_close(site.delta_reference(x, scalings, y), expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(site.delta(x, scalings, y), expected, rtol=1e-8, atol=1e-8)
        with routed(mixture, Given(scalings)):
            torch.testing.assert_close(mixture.base.it(x), y + expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_embedding(dora, scale):
    base = nn.Embedding(7, 4, dtype=F64)
    if scale is not None:
        base.embed_scale = torch.tensor(scale, dtype=F64)
        plain = base.forward
        base.forward = lambda ids: plain(ids) * base.embed_scale
    experts = [low(2, 7, 4, 1, dora=dora, embedding=True), None, low(3, 7, 4, 2, embedding=True)]
    _, site = one_site(base, experts)
    ids, scalings = torch.randint(7, (2, 5)), torch.randn(2, 5, 3, dtype=F64)
    y = base(ids)
    found = site.delta(ids, scalings, y)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, site.delta_reference(ids, scalings, y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("trainable", "dora"), [(False, False), (False, True), (True, False)])
def test_gradients_mean_the_reference(dora, trainable):
    """To the scalings, to the input, and to the factors where they are parameters."""
    base = nn.Linear(4, 3, dtype=F64).requires_grad_(False)
    experts = [low(2, 4, 3, 1, bias=True), low(3, 4, 3, 2, dora=dora)]
    _, site = one_site(base, experts, trainable=trainable)
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    scalings = torch.randn(2, 3, 2, dtype=F64, requires_grad=True)
    wanted = [x, scalings, *site.parameters(recurse=False)]
    assert len(wanted) == (5 if trainable else 2)
    if not trainable:
        assert torch.autograd.gradcheck(lambda x, s: site.delta(x, s, base(x)), (x, scalings))
    weights = torch.randn(2, 3, 3, dtype=F64)
    answers = []
    for function in (site.delta, site.delta_reference):
        loss = (weights * function(x, scalings, base(x))).sum()
        answers.append(torch.autograd.grad(loss, wanted))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_dora_expert_cannot_be_trained_in_a_mixture():
    """Its gain is worked out once, from the factors as they were."""
    base = nn.Linear(4, 3, dtype=F64)
    with pytest.raises(ConfigError, match="it: a DoRA expert cannot be trained"):
        one_site(base, [low(2, 4, 3, 2), low(2, 4, 3, 1, dora=True)], trainable=True)


def test_a_refusal_leaves_the_base_as_it_was():
    """The second of two modules cannot be adapted: the first must not stay behind with a site around it."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64))
    before = list(model)
    expert = Expert("e", {}, {"0": low(2, 4, 4, 1), "1": low(2, 4, 4, 2, dora=True)})
    with pytest.raises(ConfigError, match="DoRA"):
        Mixture(model, {"e": expert}, trainable=True)
    assert all(now is then for now, then in zip(model, before, strict=True))


KINDS = {
    "mixed ranks and targets": ("llama", [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 3, "target_modules": ["down_proj"], "use_rslora": True},
    ]),
    "flattened tokens and lora_bias": ("opt", [
        {"r": 2, "target_modules": ["fc1", "fc2", "q_proj"], "lora_bias": True},
        {"r": 3, "target_modules": ["fc1"]},
    ]),
    "DoRA": ("qwen2", [
        {"r": 3, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    ]),
    "DoRA on Conv1D": ("gpt2", [
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ]),
    "DoRA on embeddings": ("llama", [
        {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"r": 2, "target_modules": ["embed_tokens"]},
    ]),
    "scaled embeddings": ("gemma3_text", [
        {"r": 3, "target_modules": ["embed_tokens"]},
        {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ]),
    "lm_head": ("llama", [
        {"r": 3, "target_modules": ["lm_head"]},
        {"r": 2, "target_modules": ["lm_head", "q_proj"]},
    ]),
}  # fmt: skip


def whole(name: str, tmp_path: Path) -> XLoraForCausalLM:
    kind, adapters = KINDS[name]
    base = tiny_base(kind, F64)
    paths = {f"e{i}": make_expert(base, tmp_path / f"e{i}", i, **lora) for i, lora in enumerate(adapters)}
    return XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_whole_model_means_the_reference(name, tmp_path):
    """A batch of 2 through real attention and real MLPs, with scalings that differ everywhere."""
    model = whole(name, tmp_path)
    ids = prompt(2, 5)
    with model.routing(PerSite(2, 5, len(model.experts))):
        fast = model(ids, use_cache=False).logits
        with Reference(model.mixture):
            slow = model(ids, use_cache=False).logits
    with model.routing(routers.BaseOnly()):
        assert (model(ids, use_cache=False).logits - slow).abs().max() > 0.1
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_generate_with_an_expert_on_lm_head(tmp_path):
    """transformers asks for the last position's logits only: the head then sees fewer tokens than were gated."""
    model = whole("lm_head", tmp_path)
    ids = prompt(1, 5)
    expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(ids, use_cache=False, logits_to_keep=1).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1], expected[0, -1].argmax())


# --- one expert alone is PEFT's own model ---

ALONE = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "lora_bias": ("opt", {"r": 2, "target_modules": ["q_proj", "fc1", "fc2"], "lora_bias": True}),
    "DoRA": ("llama", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "DoRA with biases": ("qwen2", {"r": 3, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "DoRA embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens"]}),
    "scaled embedding": ("gemma3_text", {"r": 3, "target_modules": ["embed_tokens"]}),
    "scaled DoRA embedding": ("gemma3_text", {"r": 3, "target_modules": ["embed_tokens"], "use_dora": True}),
    "Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "DoRA Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "lm_head": ("llama", {"r": 3, "target_modules": ["lm_head"]}),
}


def with_a_bystander(name: str, tmp_path: Path) -> tuple[XLoraForCausalLM, nn.Module, str]:
    kind, lora = ALONE[name]
    base = tiny_base(kind, F64)
    path = make_expert(base, tmp_path / "one", 1, **lora)
    other = make_expert(base, tmp_path / "two", 2, **(lora | {"r": 5}))
    return XLoraForCausalLM.from_experts(copy.deepcopy(base), {"two": other, "one": path}), base, path


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_single_is_peft_with_that_adapter(name, tmp_path):
    model, base, path = with_a_bystander(name, tmp_path)
    ids = prompt(2, 6)
    plain = base(ids).logits
    theirs = PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).eval().to(F64)
    expected = theirs(input_ids=ids).logits
    assert (plain - expected).abs().max() > 0.05
    with model.routing(routers.Single("one")):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ALONE if name not in {"scaled embedding", "scaled DoRA embedding"}])
@torch.no_grad()
def test_fixed_one_hot_is_the_merged_model(name, tmp_path):
    """(Gemma ties its embeddings: merging there changes the language-model head too.)"""
    model, base, path = with_a_bystander(name, tmp_path)
    if base.config.tie_word_embeddings and "embed" in name:
        pytest.fail("choose an untied base")
    merged = PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).eval().to(F64).merge_and_unload()
    ids = prompt(2, 6)
    with model.routing(routers.Fixed({"one": 1.0})):
        torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=0, atol=1e-9)


# --- in and out again ---


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_install_and_remove_leave_the_base_as_it_was(kind, tmp_path):
    base = tiny_base(kind)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "embed_tokens", "lm_head"]
    expert = Expert.from_pretrained(make_expert(base, tmp_path / "e", r=2, target_modules=targets))
    state = {key: value.clone() for key, value in base.state_dict().items()}
    modules = [(name, id(module)) for name, module in base.named_modules()]
    pointers = {name: p.data_ptr() for name, p in base.named_parameters()}
    ids = prompt(2, 6)
    before = base(ids).logits

    mixture = Mixture(base, {"a": expert})
    assert torch.equal(base(ids).logits, before), "no call: the base alone"
    with routed(mixture, Given(torch.ones(2, 6, 1))):
        assert not torch.equal(base(ids).logits, before)
    assert mixture.current.call is None
    mixture.remove()
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert {name: p.data_ptr() for name, p in base.named_parameters()} == pointers
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert torch.equal(base(ids).logits, before)


@torch.no_grad()
def test_unload_gives_the_base_back(llama, expert_paths):
    ids = prompt(1, 5)
    before, names = llama(ids).logits, [name for name, _ in llama.named_modules()]
    model = XLoraForCausalLM.from_experts(
        llama, expert_paths, gate_at_layer=1, drop_sites_below_gate=True, layerwise_scalings=True
    )
    model(ids)
    model.generate(ids, max_new_tokens=2)
    back = model.unload()
    assert back is llama
    assert [name for name, _ in back.named_modules()] == names
    assert torch.equal(back(ids).logits, before)


def test_experts_come_out_as_they_went_in(tmp_path):
    """Also those without lora_bias or DoRA beside ones that have them: no bias of zeros is invented."""
    base = tiny_base("opt")
    read = {
        "biased": make_expert(base, tmp_path / "1", 1, r=2, target_modules=["q_proj"], lora_bias=True),
        "dora": make_expert(base, tmp_path / "2", 2, r=3, target_modules=["q_proj", "fc1"], use_dora=True),
        "plain": make_expert(base, tmp_path / "3", 3, r=4, target_modules=["q_proj", "k_proj"]),
    }
    experts = {name: Expert.from_pretrained(path) for name, path in read.items()}
    mixture = Mixture(base, experts)
    for found, expert in zip(mixture.experts_of_sites(), experts.values(), strict=True):
        assert found.keys() == expert.modules.keys()
        for module, expected in expert.modules.items():
            one = found[module]
            assert one.scale == expected.scale
            assert one.is_embedding == expected.is_embedding
            for field in ("A_RI", "B_OR", "bias_O", "magnitude_O"):
                mine, theirs = getattr(one, field), getattr(expected, field)
                assert (mine is None) == (theirs is None), f"{module} {field}"
                assert mine is None or torch.equal(mine, theirs)


def test_experts_are_buffers_unless_trained(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head"}
    model = XLoraForCausalLM.from_experts(llama, expert_paths, use_trainable_adapters=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    assert sorted(trained) == sorted(f"base.{site}.{part}" for site in model.sites for part in ("A_RI", "B_OR"))


# --- quantised bases ---


def int8(base: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda m, name: type(m) is nn.Linear and "lm_head" not in name)
    return base


def four_bit(base: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.float32,
            quant_type="nf4",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        if linear.bias is not None:
            new.bias = linear.bias
        return new.to("cpu")

    return replace_linears(base, make)


def eight_bit(base: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
        )
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    return replace_linears(base, make)


def replace_linears(base: nn.Module, make) -> nn.Module:
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, make(module))
    return base


QUANTISED = {"torchao int8": int8, "bitsandbytes nf4": four_bit, "bitsandbytes int8": eight_bit}


def quantised(name: str, dtype: torch.dtype = torch.float32, kind: str = "llama") -> nn.Module:
    base = tiny_base(kind, dtype, hidden_size=64, intermediate_size=64)
    plain = base(prompt(1, 4)).logits
    try:
        base = QUANTISED[name](base).eval()  # bitsandbytes multiplies otherwise in training
        moved = (base(prompt(1, 4)).logits - plain).abs().max()
    except Exception as error:
        pytest.skip(f"{name} does not run here: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert moved > 0, "the base is not quantised"
    return base


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTISED)
@torch.no_grad()
def test_over_a_quantised_base(name, dtype, dora, tmp_path):
    """The quantised module is called as it is; the experts' share is added, DoRA's from the dequantised weight."""
    plain = tiny_base("llama", dtype, hidden_size=64, intermediate_size=64)
    paths = {
        f"e{i}": make_expert(plain, tmp_path / f"e{i}", i, r=3, target_modules=targets, use_dora=dora)
        for i, targets in enumerate((["q_proj", "down_proj"], ["q_proj", "up_proj"]))
    }
    base = quantised(name, dtype)
    ids = prompt(2, 5)
    before = base(ids).logits
    model = XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True)
    with model.routing(routers.BaseOnly()):
        assert torch.equal(model(ids).logits, before)
    with model.routing(PerSite(2, 5, 2, dtype)):
        fast = model(ids, use_cache=False).logits
        with Reference(model.mixture):
            slow = model(ids, use_cache=False).logits
    assert (slow - before).abs().max() > 0.1
    if dtype == torch.float32:
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-4)
    else:
        assert (fast - slow).float().abs().mean() < 0.05 * (slow - before).float().abs().mean()
    model.unload()
    assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTISED)
@torch.no_grad()
def test_dense_weight_is_what_the_module_multiplies_by(name, dtype):
    base = quantised(name, dtype, "qwen2")  # its q_proj has a bias, which is no part of the weight
    module = base.model.layers[0].self_attn.q_proj
    assert module.bias.abs().max() > 0.05
    weight = dense_weight(module)
    assert weight.shape == (64, 64)
    assert weight.dtype == torch.float32
    x = torch.randn(5, 64)
    allowed = 0.02 if dtype == torch.float32 and name != "bitsandbytes int8" else 0.1
    torch.testing.assert_close(x @ weight.T + module.bias.float(), module(x.to(dtype)).float(), rtol=0, atol=allowed)
    original = tiny_base("qwen2", dtype, hidden_size=64, intermediate_size=64).model.layers[0].self_attn.q_proj.weight
    assert 0 < (weight - original.float()).abs().max() < 0.3, "dequantised: near the original, and not it"
    adapter = low(2, 64, 64, 1, dora=True)
    norm = torch.linalg.norm(weight + adapter.scale * (adapter.B_OR @ adapter.A_RI).float(), dim=1)
    torch.testing.assert_close(dora_gain(adapter, weight), adapter.magnitude_O.float() / norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dense_weight_of_what_is_dense(dtype):
    from transformers.pytorch_utils import Conv1D

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    linear, embedding = nn.Linear(3, 5, dtype=dtype), nn.Embedding(7, 4, dtype=dtype)
    conv, square = Conv1D(5, 3).to(dtype), Conv1D(4, 4).to(dtype)
    for module, expected in [
        (linear, linear.weight),
        (embedding, embedding.weight.T),
        (conv, conv.weight.T),
        (square, square.weight.T),
    ]:
        found = dense_weight(module)
        assert found.dtype == wide
        assert not found.requires_grad
        assert torch.equal(found, expected.to(wide))


# --- what a router may not answer ---


def test_wrong_number_of_experts(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    with model.routing(Given(torch.ones(1, 4, 2))), pytest.raises(ScalingsShapeError) as caught:
        model(prompt(1, 4))
    text = str(caught.value)
    assert "2 scalings" in text
    assert "3 experts" in text
    assert model.sites[0] in text


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 4, 3), (4, 3), (1, 1, 3)])
def test_wrong_tokens(llama, expert_paths, shape):
    """Nothing is broadcast over tokens in silence."""
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    with model.routing(Given(torch.ones(shape))), pytest.raises(ScalingsShapeError) as caught:
        model(prompt(1, 4), use_cache=False)
    text = str(caught.value)
    assert str(tuple(shape[:-1])) in text
    assert "(1, 4)" in text


def test_no_experts_here():
    with pytest.raises(NoMatchingSiteError, match="none|no module"):
        Mixture(nn.Sequential(nn.Linear(2, 2)), {"a": Expert("a", {}, {"9": low(1, 2, 2, 0)})})


def test_routing_is_left_behind_after_an_error(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    with pytest.raises(ScalingsShapeError):
        with model.routing(Given(torch.ones(1, 4, 2))):
            model(prompt(1, 4))
    assert isinstance(model.router, routers.XLora)
    assert model.mixture.current.call is None


def test_what_sites_were_answered(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    found = model(prompt(1, 4), routing=Given(torch.full((1, 4, 3), 0.25))).scalings
    assert torch.equal(found, torch.full((1, 4, len(model.sites), 3), 0.25))


def test_json_of_an_expert_survives(tmp_path, llama):
    path = make_expert(llama, tmp_path / "e", r=2, target_modules=["q_proj"])
    model = XLoraForCausalLM.from_experts(llama, {"a": path})
    assert model.expert_configs["a"] == json.loads((Path(path) / "adapter_config.json").read_text())


# --- the fused form of a frozen linear site ---


@pytest.mark.parametrize("leading", [(2, 5), (7,)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_site_is_the_plain_one(leading, bias):
    torch.manual_seed(0)
    o = {"dtype": torch.float64}
    x, s = torch.randn(*leading, 6, **o, requires_grad=True), torch.rand(*leading, 3, **o, requires_grad=True)
    W, A, B, spread = (torch.randn(*shape, **o) for shape in ((4, 6), (7, 6), (4, 7), (3, 7)))
    b = torch.randn(4, **o) if bias else None
    assert torch.autograd.gradcheck(frozen_mix, (x, s, W, b, A, B, spread))
    plain = torch.nn.functional.linear(x, W, b) + ((x @ A.T) * (s @ spread)) @ B.T
    torch.testing.assert_close(frozen_mix(x, s, W, b, A, B, spread), plain)
    with torch.no_grad():
        torch.testing.assert_close(frozen_mix(x, s, W, b, A, B, spread), plain)


def test_when_a_site_is_fused(llama, expert_paths, monkeypatch):
    calls = []
    monkeypatch.setattr(site_module, "frozen_mix", lambda *args: (calls.append(1), frozen_mix(*args))[1])
    model = XLoraForCausalLM.from_experts(llama, expert_paths, layerwise_scalings=True)
    ids = torch.arange(5)[None]

    def fused() -> int:
        calls.clear()
        model(ids)
        return len(calls)

    assert fused() == len(model.sites)
    expected = model(ids).logits
    handle = model.mixture.sites[0].base.register_forward_hook(lambda *_: None)
    assert fused() == len(model.sites) - 1, "whoever listens to the base module's output still hears it"
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    model.mixture.sites[0].base.weight.requires_grad_(True)
    assert fused() == len(model.sites) - 1
    with model.routing(routers.BaseOnly()):
        assert fused() == 0
    model.unload()
    model = XLoraForCausalLM.from_experts(llama, expert_paths, use_trainable_adapters=True)
    assert fused() == 0


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    same=st.booleans(),
    most=st.integers(1, 3) | st.none(),
    seed=st.integers(0, 2**16),
)
def test_spread_over_ranks_at_once_is_site_by_site(tokens, ranks, same, most, seed):
    torch.manual_seed(seed)
    o = {"dtype": F64}
    ranks = [ranks[0]] * len(ranks) if same else ranks
    sites, experts, R = 3, len(ranks), sum(ranks)
    scalings = torch.rand(tokens, sites, experts, **o)
    if most is not None:
        scalings *= torch.rand(scalings.shape, **o).argsort(-1) < most
    spread = torch.zeros(experts, R, **o)
    starts = [sum(ranks[:n]) for n in range(experts)]
    for n, start in enumerate(starts):
        spread[n, start : start + ranks[n]] = n + 0.5
    W, A, B = (torch.randn(*shape, **o) for shape in ((4, 6), (R, 6), (4, R)))
    x = torch.randn(1, tokens, 6, **o)
    found = spread_over_ranks(scalings, spread, ranks, most)
    used = int((scalings != 0).any(dim=0).sum(dim=1).max())
    assert (found.rows_SR is not None) == (len(set(ranks)) == 1 and 4 * used <= experts)
    for s, weights in enumerate(found.weights_SMR):
        rows = None if found.rows_SR is None else found.rows_SR[s]
        assert rows is None or len(rows) == used * ranks[0], "no more is read than the tokens need"
        expected = frozen_mix(x, scalings[None, :, s], W, None, A, B, spread)
        torch.testing.assert_close(narrow_mix(x, weights, rows, W, None, A, B.t()), expected)


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("targets", [("all-linear", "all-linear"), ("all-linear", ["q_proj"])])
def test_a_model_without_gradients_is_the_same_as_with(llama, tmp_path, top_k, targets, monkeypatch):
    """With gradients every site spreads its own scalings; without, all at once, where they have the same experts."""
    paths = {
        f"e{n}": make_expert(llama, tmp_path / f"{n}", n, r=2, target_modules=where) for n, where in enumerate(targets)
    }
    options = {"layerwise_scalings": True, "top_k_lora": top_k, "global_scaling_weight": 0.7}
    model = XLoraForCausalLM.from_experts(llama, paths, **options)
    calls = []
    monkeypatch.setattr(site_module, "narrow_mix", lambda *args: (calls.append(1), narrow_mix(*args))[1])
    ids = torch.arange(5)[None]
    expected = model(ids).logits.detach()
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids[:, :1]).logits, expected[:, :1], rtol=1e-5, atol=1e-5)
    assert len(calls) == (2 * len(model.sites) if targets[0] == targets[1] else 0)


@pytest.mark.parametrize("router", [routers.Uniform(), routers.XLora(top_k=4)])
def test_a_router_that_ignores_top_k_keeps_all_its_experts(llama, tmp_path, router):
    paths = {f"e{n}": make_expert(llama, tmp_path / f"{n}", n, r=2, target_modules="all-linear") for n in range(4)}
    model = XLoraForCausalLM.from_experts(llama, paths, layerwise_scalings=True, top_k_lora=1)
    ids = torch.arange(1)[None]
    with model.routing(router):
        expected = model(ids).logits.detach()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_replay_keeps_nothing_of_the_model_that_it_was_used_with(llama, tmp_path):
    paths = {f"e{n}": make_expert(llama, tmp_path / f"{n}", n, r=2, target_modules="all-linear") for n in range(2)}
    model = XLoraForCausalLM.from_experts(llama, paths, layerwise_scalings=True)
    ids = torch.arange(3)[None]
    with torch.no_grad():
        scalings = model(ids).scalings.clone()
        replay = routers.Precomputed(scalings)
        for weight in (1.0, 2.0):
            model.config.global_scaling_weight = weight
            with model.routing(replay):
                found = model(ids).logits
            with model.routing(routers.Precomputed(scalings)):
                torch.testing.assert_close(found, model(ids).logits)
        scalings.mul_(0.5)
        with model.routing(replay):
            assert not torch.allclose(model(ids).logits, found)


def test_replaced_tensors_are_seen_at_once(llama, tmp_path):
    """What a site found once is found again when one of its tensors, or its base, is another."""
    paths = {f"e{n}": make_expert(llama, tmp_path / f"{n}", n, r=2, target_modules="all-linear") for n in range(2)}
    model = XLoraForCausalLM.from_experts(llama, paths, layerwise_scalings=True)
    ids, site = torch.arange(4)[None], model.mixture.sites[0]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            fast = model(ids).logits
        torch.testing.assert_close(fast, model(ids).logits.detach(), rtol=1e-5, atol=1e-5)
        return fast

    before = logits()
    site.B_OR = site.B_OR * 50
    changed = logits()
    assert not torch.allclose(changed, before, atol=1e-3)
    site.B_OR.data = site.B_OR / 50
    torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-4)
    factors = weakref.ref(site.A_RI)
    model.to(torch.float64)
    assert factors() is None, "the old tensors are let go"
    prune.identity(site.base, "weight")  # leaves a module without the parameter
    torch.testing.assert_close(logits().float(), before, rtol=1e-3, atol=1e-3)


def test_rearranged_tokens_are_refused_with_and_without_gradients(llama, tmp_path):
    paths = {f"e{n}": make_expert(llama, tmp_path / f"{n}", n, r=2, target_modules="all-linear") for n in range(2)}
    model = XLoraForCausalLM.from_experts(llama, paths, layerwise_scalings=True)
    site = model.mixture.sites[0]
    scalings = torch.rand(2, 3, len(model.sites), 2)
    turned = torch.randn(3, 2, site.in_features)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), model.mixture.current.running(model.mix(Call(), model.routing_of(None), scalings)):
            with pytest.raises(ScalingsShapeError, match="rearranged"):
                site(turned)

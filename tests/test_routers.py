"""Who gives the scalings: every router against what it promises, and caches that belong to another."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tiny import make_expert, prompt
from xloom import XLoraForCausalLM, routers
from xloom.errors import CacheError, ConfigError, ScalingsShapeError, UnknownExpertError

NAMES = ["chem", "mech", "prot"]


def mixed(base: PreTrainedModel, paths, **fields) -> XLoraForCausalLM:
    model = XLoraForCausalLM.from_experts(copy.deepcopy(base), paths, **({"layerwise_scalings": True} | fields))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    return mixed(llama, expert_paths)


# --- the base alone ---


@pytest.mark.parametrize(
    "fields", [{}, {"gate_at_layer": 1, "drop_sites_below_gate": True}, {"head_input": "ema"}], ids=str
)
@torch.no_grad()
def test_base_only_is_the_base(llama, expert_paths, fields):
    model = mixed(llama, expert_paths, **fields)
    ids = prompt(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mixture = model(ids, attention_mask=mask).logits
    with model.routing(routers.BaseOnly()):
        out, expected = model(ids, attention_mask=mask, labels=ids), llama(ids, attention_mask=mask, labels=ids)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.scalings, torch.zeros(2, 7, len(model.sites), 3))
        for options in (
            {"do_sample": False},
            {"num_beams": 2, "do_sample": False},
            {"do_sample": False, "use_cache": False},
        ):
            options |= {"attention_mask": mask, "max_new_tokens": 8}
            assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))
    assert (mixture - expected.logits).abs().max() > 0.1
    assert torch.equal(model(ids, attention_mask=mask).logits, mixture)


# --- the same everywhere ---


@torch.no_grad()
def test_uniform(model):
    ids = prompt(2, 5)
    with model.routing(routers.Uniform()):
        out = model(ids)
    torch.testing.assert_close(out.scalings, torch.full((2, 5, len(model.sites), 3), 1 / 3))
    with model.routing(routers.Fixed(dict.fromkeys(NAMES, 1 / 3))):
        torch.testing.assert_close(model(ids).logits, out.logits)


@torch.no_grad()
def test_fixed_goes_by_name(model):
    ids = prompt(1, 5)
    with model.routing(routers.Fixed({"prot": 0.25, "chem": -1})):
        scalings = model(ids).scalings
    assert torch.equal(scalings, torch.tensor([-1.0, 0.0, 0.25]).expand_as(scalings))
    with model.routing(routers.Fixed({})):
        with_none = model(ids).logits
    with model.routing(routers.BaseOnly()):
        torch.testing.assert_close(model(ids).logits, with_none)


@torch.no_grad()
def test_single(model):
    ids, answers = prompt(1, 5), []
    for name in NAMES:
        with model.routing(routers.Single(name)):
            out = model(ids)
        assert out.scalings[0, 0, 0].tolist() == [float(n == name) for n in NAMES]
        answers.append(out.logits)
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(answers, 2))


@pytest.mark.parametrize("router", [routers.Uniform(), routers.Fixed({"mech": 0.7}), routers.Single("prot")])
@torch.no_grad()
def test_one_pass_routers_generate_with_a_cache(model, router):
    ids = prompt(2, 6)
    with model.routing(router):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize(
    "router", [routers.Fixed({"cem": 1.0}), routers.Single("cem"), routers.XLora(only=["cem"]),
               routers.XLora(without=["cem"]), routers.XLora(bias={"cem": 1.0})],
)  # fmt: skip
def test_unknown_names(model, router):
    with model.routing(router), pytest.raises(UnknownExpertError) as caught:
        model(prompt(1, 3))
    assert "'cem'" in str(caught.value)
    assert "chem, mech, prot" in str(caught.value)


# --- a replay ---


@torch.no_grad()
def test_precomputed_replays_the_head(model):
    ids = prompt(2, 6)
    out = model(ids)
    with model.routing(routers.Precomputed(out.scalings)):
        again = model(ids)
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.scalings, out.scalings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[0], ["[B, T, S, N]"]),
        (lambda s: s[:, :, :-1], ["13 sites", "14"]),
        (lambda s: s[:, :-1], ["(2, 5)", "(2, 6)"]),
        (lambda s: s[:1], ["(1, 6)", "2 rows"]),
        (lambda s: s[..., :2], ["2 scalings", "3 experts"]),
    ],
)
def test_precomputed_that_does_not_fit(model, change, words):
    ids = prompt(2, 6)
    sites = len(model.sites)
    words = [word.replace("13", str(sites - 1)).replace("14", str(sites)) for word in words]
    scalings = change(torch.ones(2, 6, sites, 3))
    with pytest.raises(ScalingsShapeError) as caught:
        with model.routing(routers.Precomputed(scalings)):
            model(ids)
    assert all(word in str(caught.value) for word in words), caught.value


# --- the head ---


@torch.no_grad()
def test_the_head_by_hand(model, llama):
    """Scalings are softmax(head(last hidden state of the base)), per token and per site."""
    ids = prompt(2, 6)
    hidden = llama.model(ids).last_hidden_state
    logits = (hidden @ model.head.linears[0].weight.T + model.head.linears[0].bias).unflatten(-1, (-1, 3))
    torch.testing.assert_close(model(ids).scalings, torch.softmax(logits, dim=-1))
    assert model(ids).scalings.std() > 0.05


@torch.no_grad()
def test_masks_at_run_time(model):
    ids = prompt(2, 6)
    free = model(ids).scalings
    for router in (routers.XLora(only=["chem", "prot"]), routers.XLora(without=["mech"])):
        with model.routing(router):
            masked = model(ids).scalings
        assert (masked[..., 1] == 0).all()
        torch.testing.assert_close(masked, free.clone().index_fill_(-1, torch.tensor(1), 0) / (1 - free[..., 1:2]))
    with model.routing(routers.XLora(only=["mech"])):
        only = model(ids)
    with model.routing(routers.Single("mech")):
        torch.testing.assert_close(only.logits, model(ids).logits)
    with model.routing(routers.XLora(only=NAMES)):
        assert torch.equal(model(ids).scalings, free)


@torch.no_grad()
def test_bias_at_run_time(model):
    ids = prompt(2, 6)
    free = model(ids).scalings
    with model.routing(routers.XLora(bias={"prot": 2.0})):
        biased = model(ids).scalings
    expected = torch.softmax(free.log() + torch.tensor([0.0, 0.0, 2.0]), dim=-1)
    torch.testing.assert_close(biased, expected)


@torch.no_grad()
def test_masks_and_generate(model):
    ids = prompt(1, 6)
    with model.routing(routers.XLora(without=["chem"])), model.logging_scalings() as log:
        cached = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert log.shares()["chem"] == 0
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), cached)


@pytest.mark.parametrize(
    "router", [routers.XLora(only=[]), routers.XLora(without=NAMES), routers.XLora(only=["chem"], without=["chem"])]
)
def test_no_expert_is_left(model, router):
    with model.routing(router), pytest.raises(ConfigError, match="leaves none.*chem, mech, prot"):
        model(prompt(1, 3))


@torch.no_grad()
def test_null_expert_keeps_its_share(llama, expert_paths):
    model = mixed(llama, expert_paths, null_expert=True)
    scalings = model(prompt(2, 6)).scalings
    assert scalings.shape[-1] == 3
    assert (scalings.sum(-1) < 1).all()
    with model.routing(routers.XLora(only=["chem"])):
        alone = model(prompt(2, 6)).scalings
    assert (alone[..., 1:] == 0).all()
    assert ((alone[..., 0] > 0) & (alone[..., 0] < 1)).all()


@torch.no_grad()
def test_global_weight_scales_what_is_added(llama, expert_paths):
    weights = dict(zip(NAMES, (0.2, 0.5, -0.3), strict=True))
    model = mixed(llama, expert_paths, global_scaling_weight=2.0)
    plain = mixed(llama, expert_paths)
    with model.routing(routers.Fixed(weights)), plain.routing(routers.Fixed({n: 2 * w for n, w in weights.items()})):
        torch.testing.assert_close(model(prompt(1, 5)).logits, plain(prompt(1, 5)).logits)
        assert model(prompt(1, 5)).scalings[0, 0, 0].tolist() == pytest.approx(list(weights.values()))


# --- `routing` ---


def test_nested_routing_restores(model):
    first = model.router
    assert isinstance(first, routers.XLora)
    one, two = routers.Uniform(), routers.BaseOnly()
    with model.routing(one):
        with model.routing(two):
            assert model.router is two
        assert model.router is one
        with pytest.raises(KeyError):
            with model.routing(two):
                raise KeyError
        assert model.router is one
    assert model.router is first


# --- caches ---

SWITCHES = [
    (routers.XLora(), routers.BaseOnly()),
    (routers.BaseOnly(), routers.XLora()),
    (routers.XLora(), routers.Uniform()),
    (routers.Single("chem"), routers.XLora()),
]


@pytest.mark.parametrize("fields", [{}, {"head_input": ["token", "ema:4"]}], ids=str)
@pytest.mark.parametrize(("before", "after"), SWITCHES)
@torch.no_grad()
def test_another_router_in_the_middle_of_a_cache(llama, expert_paths, before, after, fields):
    model = mixed(llama, expert_paths, **fields)
    with model.routing(before):
        cache = model(prompt(1, 5), use_cache=True).past_key_values
    with model.routing(after), pytest.raises(CacheError, match="under another router") as caught:
        model(prompt(1, 1), past_key_values=cache)
    assert "5 tokens" in str(caught.value)


@torch.no_grad()
def test_the_same_kind_of_router_may_go_on(model):
    """Masks may change while a text grows: older tokens keep what they had."""
    ids = prompt(1, 6)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with model.routing(routers.XLora(only=["chem"])):
        out = model(ids[:, 5:], past_key_values=cache)
    assert out.scalings[0, 0, 0].tolist() == [1.0, 0.0, 0.0]


@torch.no_grad()
def test_a_pool_with_a_gap(llama, expert_paths):
    """With an early gate there is one stack; its length says nothing of the pools, which must have seen every token."""
    model = mixed(llama, expert_paths, gate_at_layer=1, drop_sites_below_gate=True, head_input="running_mean")
    ids = prompt(1, 8)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(CacheError, match="router"):
        with model.routing(routers.BaseOnly()):
            model(ids[:, 3:6], past_key_values=cache, use_cache=True)
        model(ids[:, 6:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("fields", [{}, {"head_input": "ema"}], ids=str)
@torch.no_grad()
def test_a_cache_of_the_base_alone(llama, expert_paths, fields):
    model = mixed(llama, expert_paths, **fields)
    cache = DynamicCache(config=llama.config)
    with pytest.raises(CacheError) as caught:
        model(prompt(1, 4), past_key_values=cache)
    text = str(caught.value)
    expected = 6 + len(fields)
    assert f"{expected} layers" in text
    assert "2 stacks of 3" in text
    assert "found 3" in text
    assert "\n" not in text


@torch.no_grad()
def test_a_filled_cache_of_the_base(model, llama):
    cache = llama(prompt(1, 4), use_cache=True).past_key_values
    with pytest.raises(CacheError, match="found 3"):
        model(prompt(1, 1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_without_a_config(model):
    ids = prompt(1, 6)
    cache = DynamicCache()
    first = model(ids[:, :4], past_key_values=cache, use_cache=True)
    assert len(cache.layers) == 6
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(ids, use_cache=False).logits[:, 4:], rtol=0, atol=1e-4)


def test_an_offloaded_cache(model):
    cache = DynamicCache(config=model.config, offloading=True)
    with pytest.raises(CacheError, match="offloaded"):
        model(prompt(1, 4), past_key_values=cache)


# --- Arrow ---


def test_arrow_prototypes_are_top_right_singular_vectors(model):
    for site in model.mixture.sites:
        for low in filter(None, site.experts()):
            expected = torch.linalg.svd(low.B_OR.double() @ low.A_RI.double()).Vh[0]
            found = routers.arrow(low)
            assert abs(abs(found @ expected).item() - 1) < 1e-9


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_arrow_weighs_by_likeness_and_leaves_absent_experts_out(model, top_k):
    arrow, x = routers.Arrow(temperature=0.5, top_k=top_k), torch.randn(2, 5, 32)
    for site in model.mixture.sites:
        if site.A_RI.shape[1] != 32:
            continue
        scalings = arrow.scalings(site, x)
        there = [low for low in site.experts() if low is not None]
        likeness = torch.stack([(x @ routers.arrow(low).float()).abs() for low in there], dim=-1) / 0.5
        if top_k is not None:
            lowest = likeness.topk(min(top_k, len(there)), dim=-1).values[..., -1:]
            likeness = torch.where(likeness < lowest, -torch.inf, likeness)
        expected = torch.softmax(likeness, dim=-1)
        torch.testing.assert_close(scalings[..., [low is not None for low in site.experts()]], expected)
        torch.testing.assert_close(scalings.sum(dim=-1), torch.ones(2, 5))


def test_arrow_is_peft_s_arrow(llama, tmp_path, monkeypatch):
    from peft import ArrowConfig, create_arrow_model
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    rounds = ArrowLoraLinearLayer.top_right_singular_vec_from_BA
    # random factors have close singular values: 15 rounds of power iteration would leave theirs far off
    monkeypatch.setattr(
        ArrowLoraLinearLayer,
        "top_right_singular_vec_from_BA",
        lambda self, A, B: rounds(self, A.double(), B.double(), iters=3000),
    )
    paths = {n: make_expert(llama, tmp_path / n, i, r=3, target_modules="all-linear") for i, n in enumerate("abc")}
    ids = prompt(2, 6)
    config = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1)
    theirs = create_arrow_model(copy.deepcopy(llama), list(paths.values()), config)
    ours = XLoraForCausalLM.from_experts(llama, paths)
    with torch.no_grad():
        expected = theirs(ids).logits
        with ours.routing(routers.Arrow(temperature=0.7, top_k=2)):
            torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-3)
        with ours.routing(routers.Arrow(temperature=0.7, top_k=1)):
            assert (ours(ids).logits - expected).abs().max() > 0.1


def test_arrow_runs_on_embeddings_too(llama, tmp_path):
    path = make_expert(llama, tmp_path / "e", r=2, target_modules=["embed_tokens", "q_proj"])
    model = XLoraForCausalLM.from_experts(llama, {"a": path, "b": path})
    with model.routing(routers.Arrow()):
        scalings = model(prompt(1, 4)).scalings
    torch.testing.assert_close(scalings, torch.full_like(scalings, 0.5))

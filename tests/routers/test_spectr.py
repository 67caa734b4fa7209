"""SpectR by QR against the norms written out, token by token; SEQR's choice; calibration."""

import pytest
import torch

from tiny import make_expert, make_experts, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.errors import ConfigError, ScalingsShapeError, UnknownExpertError

NAMES = ["chem", "mech", "prot"]


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    return XLoraForCausalLM.from_experts(llama, expert_paths)


def slow_norms(site, x):
    """scale |B A x| of each expert for one token; None where it lacks the site."""
    return [None if low is None else (low.scale * (low.B_OR @ (low.A_RI @ x))).norm().item() for low in site.experts()]


def slow_weights(scores, temperature, top_k):
    there = [n for n, score in enumerate(scores) if score is not None]
    kept = sorted(there, key=lambda n: -scores[n])[:top_k]
    weights = torch.zeros(len(scores))
    weights[kept] = torch.softmax(torch.tensor([scores[n] for n in kept]) / temperature, dim=0)
    return weights


@pytest.mark.parametrize("top_k", [None, 1, 2])
@torch.no_grad()
def test_it_is_the_softmax_of_the_norms(model, top_k):
    router = routers.SpectR(temperature=2.0, top_k=top_k)
    lacking = 0
    for site in model.mixture.sites:
        x = torch.randn(2, 3, site.A_RI.shape[1])
        found = router.scalings(site, x)
        expected = torch.stack([torch.stack([slow_weights(slow_norms(site, t), 2.0, top_k) for t in row]) for row in x])
        torch.testing.assert_close(found, expected)
        lacking += sum(low is None for low in site.experts())
        assert all((found[..., n] == 0).all() for n, low in enumerate(site.experts()) if low is None)
    assert lacking > 5
    with model.routing(router):
        assert model(prompt(1, 4)).scalings.std() > 0.05


@torch.no_grad()
def test_the_fast_norms_are_the_slow_ones(llama, tmp_path):
    paths = make_experts(llama, tmp_path)
    paths["wide"] = make_expert(
        llama, tmp_path / "wide", 3, r=40, lora_alpha=80, target_modules=["v_proj", "embed_tokens"]
    )
    paths["root"] = make_expert(
        llama, tmp_path / "root", 4, r=4, use_rslora=True, lora_alpha=-3, target_modules=["v_proj"]
    )
    model = XLoraForCausalLM.from_experts(llama, paths)
    norms = routers.factors.ExpertNorms()
    assert any(site.is_embedding for site in model.mixture.sites)
    for site in model.mixture.sites:
        x = prompt(2, 5) if site.is_embedding else torch.randn(10, site.A_RI.shape[1])
        torch.testing.assert_close(norms(site, x), routers.norms_reference(site, x), rtol=1e-5, atol=1e-5)
        if not site.is_embedding:
            there = [0.0 if v is None else v for v in slow_norms(site, x[3])]
            assert routers.norms_reference(site, x)[3].tolist() == pytest.approx([abs(v) for v in there], rel=1e-4)


@torch.no_grad()
def test_seqr_chooses_as_spectr_s_singular_values_do(model):
    """SpectR's own form, |S V^T x|, and the QR form have the same largest expert at every token and site."""
    seqr = routers.SpectR(top_k=1)
    for site in model.mixture.sites:
        x = torch.randn(50, site.A_RI.shape[1])
        by_svd = torch.full((50, 3), -1.0)
        for n, low in enumerate(site.experts()):
            if low is not None:
                svd = torch.linalg.svd(low.scale * low.B_OR @ low.A_RI, full_matrices=False)
                by_svd[:, n] = (x @ (svd.S[:, None] * svd.Vh).T).norm(dim=-1)
        found = seqr.scalings(site, x)
        assert torch.equal(found.argmax(dim=-1), by_svd.argmax(dim=-1))
        assert torch.equal(found.sort(dim=-1).values, torch.tensor([0.0, 0.0, 1.0]).expand(50, -1))


@torch.no_grad()
def test_where_alpha_ends_and_b_begins_does_not_matter(llama, tmp_path):
    path = make_expert(llama, tmp_path / "a", 0, r=4, lora_alpha=8, target_modules=["q_proj"])
    folded = XLoraForCausalLM.from_experts(llama, {"a": path}).mixture.sites[0].experts()[0]
    site = XLoraForCausalLM.from_experts(tiny_base("llama"), {"a": path}).mixture.sites[0]
    x = torch.randn(3, 32)
    torch.testing.assert_close(
        routers.norms_reference(site, x)[:, 0], (x @ folded.A_RI.T @ (2.0 * folded.B_OR).T).norm(dim=-1)
    )


@torch.no_grad()
def test_factors_that_change_or_move_are_seen(model):
    router, site = routers.SpectR(), model.mixture.sites[0]
    x = torch.randn(4, site.A_RI.shape[1])
    before = router.scalings(site, x)
    site.B_OR[:, : site.ranks[0]] *= 3
    assert (router.scalings(site, x) - before).abs().max() > 0.1
    model.double()
    torch.testing.assert_close(router.scalings(site, x.double()), routers.SpectR().scalings(site, x.double()))


@pytest.mark.parametrize("router", [routers.SpectR(temperature=3.0), routers.SpectR(top_k=1)], ids=["all", "seqr"])
@torch.no_grad()
def test_cached_and_padded(model, router):
    ids, row = prompt(2, 6), prompt(1, 4, seed=8)
    with model.routing(router):
        whole = model(ids, use_cache=False)
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(rest.logits, whole.logits[:, 4:], rtol=0, atol=1e-4)
        torch.testing.assert_close(rest.scalings, whole.scalings[:, 4:], rtol=0, atol=1e-5)
        padded = torch.cat([torch.zeros_like(row[:, :2]), row], dim=1)
        mask = (torch.arange(6) >= 2).long()[None]
        together = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        torch.testing.assert_close(together.logits[:, 2:], model(row).logits, rtol=0, atol=1e-4)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(expert_paths, dtype):
    model = XLoraForCausalLM.from_experts(tiny_base("llama").to(dtype), expert_paths)
    exact = XLoraForCausalLM.from_experts(tiny_base("llama"), expert_paths)
    with model.routing(routers.SpectR(temperature=5.0)), exact.routing(routers.SpectR(temperature=5.0)):
        found, expected = model(prompt(1, 4)), exact(prompt(1, 4))
    assert found.logits.dtype == dtype
    atol = 1e-4 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(found.scalings.double(), expected.scalings.double(), rtol=0, atol=atol)


# --- calibration ---


def inputs_of_sites(model, texts):
    """What enters each site in the base, token by token [tokens, I], recorded by hooks."""
    seen = {site.index: [] for site in model.mixture.sites}
    hooks = [
        site.register_forward_pre_hook(lambda m, args: seen[m.index].append(args[0].flatten(0, -2)))
        for site in model.mixture.sites
    ]
    with model.routing(routers.BaseOnly()), torch.no_grad():
        for ids in texts:
            model(ids[None])
    for hook in hooks:
        hook.remove()
    return {index: torch.cat(rows) for index, rows in seen.items()}


def texts_of(*lengths):
    return [prompt(1, length, seed=length)[0] for length in lengths]


@torch.no_grad()
def test_statistics_are_those_of_the_norms_in_the_base(model):
    texts = texts_of(5, 3, 7)
    found = routers.NormStatistics.of(model, texts)
    inputs = inputs_of_sites(model, texts)
    for site in model.mixture.sites:
        norms = routers.norms_reference(site, inputs[site.index]).double()
        assert len(norms) == 15
        for n, low in enumerate(site.experts()):
            mean, std = (
                (norms[:, n].mean(), norms[:, n].std(correction=0)) if low else (torch.zeros(()), torch.ones(()))
            )
            torch.testing.assert_close(found.mean_SN[site.index, n], mean.double(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.std_SN[site.index, n], std.double(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_statistics_of_each_expert_on_its_own_texts(model):
    texts = {"prot": texts_of(4, 9), "chem": texts_of(6), "mech": texts_of(3, 5)}
    found = routers.NormStatistics.of(model, texts)
    for n, name in enumerate(NAMES):
        alone = routers.NormStatistics.of(model, texts[name])
        torch.testing.assert_close(found.mean_SN[:, n], alone.mean_SN[:, n])
        torch.testing.assert_close(found.std_SN[:, n], alone.std_SN[:, n])
    assert (found.mean_SN[:, 1] - routers.NormStatistics.of(model, texts["chem"]).mean_SN[:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_calibrated_scores_are_standardised(model):
    texts = texts_of(5, 8)
    router = routers.SpectR.calibrated(model, texts, temperature=0.7, top_k=2)
    stats = router.statistics
    for site in model.mixture.sites:
        x = torch.randn(2, 3, site.A_RI.shape[1])
        found = router.scalings(site, x)
        for b in range(2):
            for t in range(3):
                norms = slow_norms(site, x[b, t])
                scores = [
                    None if v is None else ((v - stats.mean_SN[site.index, n]) / stats.std_SN[site.index, n]).item()
                    for n, v in enumerate(norms)
                ]
                torch.testing.assert_close(found[b, t], slow_weights(scores, 0.7, 2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_large_expert_wins_everywhere_without_calibration_only(llama, tmp_path):
    small = make_expert(llama, tmp_path / "small", 0, r=4, lora_alpha=4, target_modules=["q_proj"])
    large = make_expert(llama, tmp_path / "large", 1, r=4, lora_alpha=400, target_modules=["q_proj"])
    model = XLoraForCausalLM.from_experts(llama, {"small": small, "large": large})
    texts = texts_of(30, 40, 50)
    wins = {}
    for name, router in {
        "raw": routers.SpectR(top_k=1),
        "seqr": routers.SpectR.calibrated(model, texts, top_k=1),
    }.items():
        inputs = inputs_of_sites(model, texts)
        found = [router.scalings(site, inputs[site.index])[..., 1] for site in model.mixture.sites]
        wins[name] = torch.cat(found).mean().item()
    assert wins["raw"] == 1.0
    assert 0.3 < wins["seqr"] < 0.7


# --- refusals ---


def test_what_is_out_of_range(model):
    for wrong in ({"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}):
        for kind in (routers.SpectR, routers.Arrow):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                kind(**wrong)
    with pytest.raises(UnknownExpertError, match="'cem'"):
        routers.NormStatistics.of(model, {"cem": texts_of(3)})
    with pytest.raises(ConfigError, match="two tokens.*found fewer for mech, prot"):
        routers.NormStatistics.of(model, {"chem": texts_of(3), "mech": texts_of(1)})
    with pytest.raises(ConfigError, match="chem, mech, prot"):
        routers.NormStatistics.of(model, [])


def test_statistics_of_another_model(model, llama, tmp_path):
    other = XLoraForCausalLM.from_experts(
        tiny_base("llama"), {"a": make_expert(tiny_base("llama"), tmp_path / "a", target_modules=["q_proj"])}
    )
    router = routers.SpectR.calibrated(other, texts_of(4))
    with model.routing(router), pytest.raises(ScalingsShapeError, match=r"\(3, 1\).*\(21, 3\)"):
        model(prompt(1, 3))

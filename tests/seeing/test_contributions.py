"""Norms of what experts add are those of the formula, at the places that wrote the tokens."""

import pytest
import torch
from planted import tiny_model

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.seeing import contributions, norms, recording_contributions


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path)


def direct(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, S, N] and [T, S] of all places, from what enters each site in the mixed pass."""
    entered: dict[int, torch.Tensor] = {}
    hooks = [
        site.register_forward_pre_hook(lambda site, given: entered.update({site.index: given[0]}))
        for site in model.mixture.sites
    ]
    with torch.no_grad():
        scalings = model(ids, use_cache=False).scalings[0]
        for hook in hooks:
            hook.remove()
        alone = torch.zeros(scalings.shape)
        whole = torch.zeros(scalings.shape[:2])
        for site in model.mixture.sites:
            x = entered[site.index][0]
            y = site.base(x)
            total = torch.zeros_like(y)
            for n, low in enumerate(site.experts()):
                if low is not None:
                    delta = scalings[:, site.index, n, None] * low.scale * (x @ low.A_RI.T @ low.B_OR.T)
                    alone[:, site.index, n] = delta.norm(dim=-1) / y.norm(dim=-1)
                    total += delta
            whole[:, site.index] = total.norm(dim=-1) / y.norm(dim=-1)
    return alone, whole


@pytest.mark.parametrize("piece", [3, 256])
def test_norms_are_those_of_the_formula(model, monkeypatch, piece: int):
    monkeypatch.setattr(norms, "READ_AT_ONCE", piece)
    ids = prompt(1, 9)
    before = model(ids).logits
    found = contributions(model, ids[0])
    alone, whole = direct(model, ids)
    assert alone.amax() > 0.1
    torch.testing.assert_close(found.relative_TSN[1:], alone[:-1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.total_TS[1:], whole[:-1], rtol=1e-3, atol=1e-5)
    assert found.relative_TSN[0].isnan().all()
    assert found.total_TS[0].isnan().all()
    assert (found.total_TS[1:] <= found.relative_TSN[1:].sum(dim=-1) + 1e-5).all()
    assert torch.equal(model(ids).logits, before)
    assert not any(site._forward_hooks for site in model.mixture.sites)


def test_what_adds_nothing(model):
    ids = prompt(1, 5)[0]
    with model.routing(routers.BaseOnly()):
        found = contributions(model, ids)
    assert torch.equal(found.relative_TSN[1:], torch.zeros(4, len(model.sites), 3))
    with model.routing(routers.XLora(without=["mech"])):
        found = contributions(model, ids)
    mech = model.experts.index("mech")
    assert torch.equal(found.relative_TSN[1:, :, mech], torch.zeros(4, len(model.sites)))
    with model.routing(routers.Single("mech")):
        found = contributions(model, ids)
    torch.testing.assert_close(found.relative_TSN[1:, :, mech], found.total_TS[1:])
    assert contributions(model, ids[:1]).total_TS.isnan().all()


def test_the_scaling_pass_is_not_recorded(tmp_path):
    """Where experts act in it, too: what counts is the mixed pass."""
    model = tiny_model(tmp_path, scaling_pass_value=0.5)
    ids = prompt(1, 6)
    alone, _ = direct(model, ids)
    torch.testing.assert_close(contributions(model, ids[0]).relative_TSN[1:], alone[:-1], rtol=1e-3, atol=1e-5)


def test_dora_and_embeddings(tmp_path):
    base = tiny_base("llama")
    experts = {
        "dora": make_expert(base, tmp_path / "dora", 0, r=2, use_dora=True, target_modules=["q_proj"]),
        "words": make_expert(base, tmp_path / "words", 1, r=2, target_modules=["embed_tokens", "q_proj"]),
    }
    model = XLoraForCausalLM.from_experts(base, experts)
    ids = prompt(1, 4)
    site = next(site for site in model.mixture.sites if site.name.endswith("layers.0.self_attn.q_proj"))
    seen = []
    hook = site.register_forward_hook(lambda site, given, out: seen.append((given[0], out)))
    with torch.no_grad(), model.routing(routers.Single("dora")), recording_contributions(model) as record:
        model(ids)
    hook.remove()
    x, out = seen[-1]
    expected = (out - site.base(x)).norm(dim=-1) / site.base(x).norm(dim=-1)
    torch.testing.assert_close(record.relative_MSN[:, site.index, 0], expected[0], rtol=1e-3, atol=1e-5)
    with torch.no_grad(), model.routing(routers.Uniform()), recording_contributions(model) as record:
        model(prompt(2, 3))
    assert record.relative_MSN.shape == (6, len(model.sites), 2)
    words = [at for at, name in enumerate(model.sites) if name.endswith("embed_tokens")]
    assert (record.relative_MSN[:, words, 1] > 0).all()
    assert (record.relative_MSN[:, words, 0] == 0).all()


def test_a_block_without_a_forward(model):
    with recording_contributions(model) as record:
        pass
    with pytest.raises(RuntimeError, match="no forward"):
        record.relative_MSN

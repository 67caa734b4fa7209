"""Centroids of prompts, against the formula written out; batches, padding, what is refused."""

import math

import pytest
import torch

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.errors import ConfigError, UnknownExpertError

NAMES = ["chem", "mech", "prot"]


def some(seed, *lengths, low=2, high=64):
    """Prompts whose tokens come from a part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=generator) for length in lengths]


PROMPTS = {
    "prot": some(1, 6, 9, 4, low=45),
    "chem": some(2, 8, 5, high=20),
    "mech": some(3, 7, 7, 3, 11, low=22, high=43),
}


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    return XLoraForCausalLM.from_experts(llama, expert_paths)


@pytest.mark.parametrize("layer", [-1, 0, 1])
@pytest.mark.parametrize("top_k", [None, 2])
@torch.no_grad()
def test_the_formula(model, llama, layer, top_k):
    found = routers.Centroid.fit(model, PROMPTS, layer=layer, temperature=0.3, top_k=top_k)

    def states(ids):
        out = llama(ids[None], output_hidden_states=True)
        return out.hidden_states[layer][0].double()

    if layer == -1:
        last = llama.model(PROMPTS["chem"][0][None]).last_hidden_state[0]
        torch.testing.assert_close(states(PROMPTS["chem"][0]), last.double())
    tokens = {name: torch.cat([states(ids) for ids in PROMPTS[name]]) for name in NAMES}
    mean = sum(t.mean(0) for t in tokens.values()) / 3
    std = (sum((t**2).mean(0) for t in tokens.values()) / 3 - mean**2).sqrt()
    centroids = [sum((states(i).mean(0) - mean) / std for i in PROMPTS[n]) / len(PROMPTS[n]) for n in NAMES]
    for ids in some(9, 5, 12):
        z = (states(ids).mean(0) - mean) / std
        cosines = [(z @ c / (z.norm() * c.norm())).item() for c in centroids]
        kept = sorted(range(3), key=lambda n: -cosines[n])[:top_k]
        total = sum(math.exp(cosines[n] / 0.3) for n in kept)
        expected = [math.exp(cosines[n] / 0.3) / total if n in kept else 0.0 for n in range(3)]
        assert found.weights(model, ids[None])[0].tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_it_finds_whose_prompt_it_is(model):
    ranges = {"chem": {"high": 20}, "mech": {"low": 22, "high": 43}, "prot": {"low": 45}}
    prompts = {name: some(n, 30, 30, 30, **ranges[name]) for n, name in enumerate(NAMES)}
    centroid = routers.Centroid.fit(model, prompts, layer=0)  # what a random base's layers do says little of the text
    assert centroid.experts == tuple(NAMES)
    for n, name in enumerate(NAMES):
        held_out = torch.stack(some(50 + n, 30, 30, 30, 30, **ranges[name]))
        assert (centroid.weights(model, held_out).argmax(dim=-1) == n).all()


@torch.no_grad()
def test_padded_is_single_and_the_router_goes_by_row(model):
    centroid = routers.Centroid.fit(model, PROMPTS, top_k=1)
    rows = [some(7, 4, high=20)[0], some(8, 7, low=45)[0]]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 7 - len(tokens) :] = tokens
        mask[row, 7 - len(tokens) :] = 1
    together = routers.Centroid.fit(model, PROMPTS, temperature=1.0).weights(model, ids, mask)
    alone = [routers.Centroid.fit(model, PROMPTS, temperature=1.0).weights(model, tokens[None]) for tokens in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert (routers.Centroid.fit(model, PROMPTS, temperature=1.0).weights(model, ids) - together).abs().max() > 1e-3
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with model.routing(centroid.router(model, ids, mask)):
        found = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, use_cache=False, **options), found)
    chosen = [NAMES[n] for n in centroid.weights(model, ids, mask).argmax(dim=-1)]
    with model.routing(routers.Oracle(chosen)):
        assert torch.equal(model.generate(ids, **options), found)


@torch.no_grad()
def test_what_is_in_charge_does_not_matter(llama, expert_paths):
    """The plain base is read: an early gate, another router or a scaling pass with experts change nothing."""
    import copy

    plain = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths)
    odd = XLoraForCausalLM.from_experts(llama, expert_paths, gate_at_layer=1, drop_sites_below_gate=True)
    first = routers.Centroid.fit(plain, PROMPTS)
    with odd.routing(routers.Uniform()):
        second = routers.Centroid.fit(odd, PROMPTS)
        assert torch.equal(first.centroids_ND, second.centroids_ND)
        assert torch.equal(first.weights(plain, prompt(2, 5)), second.weights(odd, prompt(2, 5)))


def test_refusals(model):
    fit = routers.Centroid.fit
    with pytest.raises(UnknownExpertError, match="'cem'"):
        fit(model, PROMPTS | {"cem": some(1, 3)})
    with pytest.raises(ConfigError, match="every expert, found none for chem, prot"):
        fit(model, {"mech": some(1, 3), "prot": []})
    with pytest.raises(ConfigError, match="prompt of expert 'chem' without any"):
        fit(model, PROMPTS | {"chem": [torch.tensor([], dtype=torch.long)]})
    with pytest.raises(ConfigError, match="layer: expected -4 to 3, found 4"):
        fit(model, PROMPTS, layer=4)
    with pytest.raises(ConfigError, match="temperature"):
        fit(model, PROMPTS, temperature=0.0)
    centroid = fit(model, PROMPTS)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ConfigError, match="padding alone"):
        centroid.weights(model, prompt(2, 3), mask)


def test_other_experts(model, expert_paths):
    centroid = routers.Centroid.fit(model, PROMPTS)
    other = XLoraForCausalLM.from_experts(tiny_base("llama"), {"chem": expert_paths["chem"]})
    with pytest.raises(ConfigError, match="chem, mech, prot.*the model has chem"):
        centroid.weights(other, prompt(1, 3))


@torch.no_grad()
def test_padding_where_positions_are_absolute(tmp_path):
    base = tiny_base("gpt2")
    paths = {n: make_expert(base, tmp_path / n, i, target_modules=["c_fc"]) for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(base, paths)
    centroid = routers.Centroid.fit(model, {"a": some(1, 5, 6), "b": some(2, 7)}, temperature=1.0)
    row = prompt(1, 4)
    ids, mask = torch.cat([prompt(1, 3), row], dim=1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    found = centroid.weights(model, ids, mask)
    torch.testing.assert_close(found, centroid.weights(model, row), rtol=0, atol=1e-5)

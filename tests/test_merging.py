"""Merged experts against PEFT's merging on the whole model, against TIES by hand, and against the mixture."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.errors import BaseMismatchError, ConfigError, NoMatchingSiteError, UnknownExpertError, UnsupportedLoraError
from xloom.experts import Expert
from xloom.merging import merge_experts, on_deltas

METHODS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"]
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.1}


@pytest.fixture
def alike(llama, tmp_path) -> dict[str, str]:
    """Three experts of rank 3 with different alphas; the last adapts fewer modules."""
    paths = {
        name: make_expert(llama, tmp_path / name, i, r=3, lora_alpha=2 + 3 * i, target_modules=["q_proj", "down_proj"])
        for i, name in enumerate("ab")
    }
    return paths | {"c": make_expert(llama, tmp_path / "c", 2, r=3, lora_alpha=1, target_modules=["q_proj"])}


def delta(low) -> torch.Tensor:
    return low.scale * (low.B_OR @ low.A_RI)


def logits(base, folder):
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(prompt(2, 5)).logits


@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_peft_does_on_the_whole_model(llama, alike, method, tmp_path):
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama), alike["a"], adapter_name="a")
    for name in "bc":
        theirs.load_adapter(alike[name], adapter_name=name)
    torch.manual_seed(5)
    theirs.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "merged", combination_type=method, density=0.4, svd_full_matrices=False
    )
    theirs.set_adapter("merged")
    merge_experts(llama, alike, method, weights=WEIGHTS, density=0.4, seed=5, output=tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits(llama, tmp_path / "out"), theirs(prompt(2, 5)).logits, rtol=0, atol=1e-4)
        assert (logits(llama, tmp_path / "out") - llama(prompt(2, 5)).logits).abs().max() > 0.1


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_exact_ones_are_the_mixture(llama, expert_paths, tmp_path, method):
    """Experts of ranks 4, 2 and 3, of which each adapts other modules."""
    weights = {"chem": 0.5, "mech": -0.3, "prot": 1.2}
    options = {"rank": 9} if method == "svd" else {}
    merged = merge_experts(llama, expert_paths, method, weights=weights, output=tmp_path / "out", **options)
    expected = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths)
    ours = XLoraForCausalLM.from_experts(copy.deepcopy(llama), {"merged": merged})
    with torch.no_grad(), expected.routing(routers.Fixed(weights)), ours.routing(routers.Single("merged")):
        wanted = expected(prompt(2, 5)).logits
        torch.testing.assert_close(ours(prompt(2, 5)).logits, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(llama, tmp_path / "out"), wanted, rtol=0, atol=1e-4)
    again = Expert.from_pretrained(tmp_path / "out")
    if method == "cat":
        ranks = {m.rpartition(".")[2]: low.rank for m, low in again.modules.items()}
        assert ranks == {
            "q_proj": 9,
            "v_proj": 6,
            "down_proj": 5,
            "k_proj": 2,
            "o_proj": 2,
            "up_proj": 2,
            "gate_proj": 2,
        }
    assert all(torch.equal(low.A_RI, merged.modules[m].A_RI) for m, low in again.modules.items())


def ties_by_hand(deltas, weights, density):
    kept = []
    for d in deltas:
        order = d.abs().flatten().argsort(descending=True)[: int(density * d.numel())]
        mask = torch.zeros(d.numel()).index_fill(0, order, 1.0).view_as(d)
        kept.append(d * mask)
    elected = torch.where(sum(kept) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for d, w in zip(kept, weights, strict=True):
        agrees = d.sign() == elected
        total, count = total + w * d * agrees, count + agrees
    return total / count.clamp(min=1)


def test_ties_on_the_deltas(llama, expert_paths):
    read = {name: Expert.from_pretrained(path) for name, path in expert_paths.items()}
    merged = merge_experts(llama, expert_paths, "ties_svd", density=0.3, rank=48)
    for module, low in merged.modules.items():
        deltas = [delta(e.modules[module]) for e in read.values() if module in e.modules]
        expected = ties_by_hand(deltas, [1.0] * len(deltas), 0.3)
        torch.testing.assert_close(delta(low), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "share"), [("linear", 0.5), ("svd", 0.5), ("ties", 1.0), ("dare_ties_svd", 1.0)])
def test_default_weights(llama, alike, method, share):
    two = {name: alike[name] for name in "ab"}
    found, expected = (
        merge_experts(llama, two, method),
        merge_experts(llama, two, method, weights={"a": share, "b": share}),
    )
    for module, low in found.modules.items():
        assert torch.equal(delta(low), delta(expected.modules[module]))


def test_a_cut_is_the_best_of_its_rank(llama, expert_paths):
    whole = merge_experts(llama, expert_paths, "cat")
    cut = merge_experts(llama, expert_paths, "svd", rank=2)
    for module, low in cut.modules.items():
        values = torch.linalg.svdvals(delta(whole.modules[module]))
        assert low.rank <= 2
        error = (delta(low) - delta(whole.modules[module])).norm()
        assert error.item() == pytest.approx(values[2:].norm().item(), abs=1e-4)


def test_rank_stabilised_experts_keep_their_size(llama, tmp_path):
    """PEFT hands the option on to the merged adapter, whose scale is then alpha/sqrt(r) and not 1."""
    paths = {
        n: make_expert(llama, tmp_path / n, i, r=4, use_rslora=True, target_modules=["q_proj"])
        for i, n in enumerate("ab")
    }
    merged = merge_experts(llama, paths, "cat")
    read = [Expert.from_pretrained(path) for path in paths.values()]
    for module, low in merged.modules.items():
        torch.testing.assert_close(delta(low), sum(0.5 * delta(e.modules[module]) for e in read), rtol=0, atol=1e-5)


def test_ranks_that_differ_within_an_expert(llama, tmp_path):
    paths = {
        n: make_expert(llama, tmp_path / n, i, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"],
                       rank_pattern={"v_proj": 5}, alpha_pattern={"layers.0.self_attn.q_proj": 7})
        for i, n in enumerate("ab")
    }  # fmt: skip
    read = [Expert.from_pretrained(path) for path in paths.values()]
    merged = merge_experts(llama, paths, "svd", rank=10)
    for module, low in merged.modules.items():
        torch.testing.assert_close(delta(low), sum(0.5 * delta(e.modules[module]) for e in read), rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedLoraError, match=r"one rank, found a 2/5, b 2/5; 'ties_svd' takes any"):
        merge_experts(llama, paths, "ties")


def test_embeddings_and_bases_with_other_linear_modules(tmp_path):
    base = tiny_base("gpt2")
    paths = {n: make_expert(base, tmp_path / n, i, r=2, target_modules=["c_attn", "wte"]) for i, n in enumerate("ab")}
    merge_experts(base, paths, "cat", weights={"a": 1.0, "b": -0.5}, output=tmp_path / "out")
    mixed = XLoraForCausalLM.from_experts(copy.deepcopy(base), paths)
    with torch.no_grad(), mixed.routing(routers.Fixed({"a": 1.0, "b": -0.5})):
        torch.testing.assert_close(logits(base, tmp_path / "out"), mixed(prompt(2, 5)).logits, rtol=0, atol=1e-4)


def test_the_base_s_weights_are_not_needed(llama, alike, tmp_path):
    llama.config.save_pretrained(tmp_path / "config-only")
    merged = merge_experts(tmp_path / "config-only", alike, "svd")
    for module, low in merge_experts(llama, alike, "svd").modules.items():
        assert torch.equal(delta(low), delta(merged.modules[module]))
    assert merged.config["base_model_name_or_path"] == str(tmp_path / "config-only")


def test_the_form_that_takes_experts_of_any_ranks():
    assert [on_deltas(method) for method in METHODS] == [
        "svd", "cat", "svd", "ties_svd", "ties_svd", "dare_linear_svd", "dare_linear_svd", "dare_ties_svd",
        "dare_ties_svd",
    ]  # fmt: skip


def test_the_random_choice_has_a_seed_of_its_own(llama, alike, monkeypatch):
    def seeded(seed):
        pytest.fail("the generators of other devices are nobody's business here")

    torch.manual_seed(1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    state = torch.random.get_rng_state()
    first, again, other = (merge_experts(llama, alike, "dare_linear", seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    module = next(iter(first.modules))
    assert torch.equal(delta(first.modules[module]), delta(again.modules[module]))
    assert (delta(first.modules[module]) - delta(other.modules[module])).abs().max() > 1e-3


def test_the_record(llama, alike, tmp_path):
    merge_experts(llama, alike, "dare_ties", weights={"a": 1.0, "c": 2.0}, seed=9, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["weights"] == {"a": 1.0, "c": 2.0}
    assert (record["method"], record["density"], record["seed"]) == ("dare_ties", 0.5, 9)
    assert set(record["experts"]) == {"a", "c"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "merge.json",
    ]  # fmt: skip


def test_density_of_one_prunes_nothing(llama, alike, recwarn):
    merged = merge_experts(llama, alike, "dare_linear", density=1.0)
    plain = merge_experts(llama, alike, "linear")
    for module, low in merged.modules.items():
        torch.testing.assert_close(delta(low), delta(plain.modules[module]))
    assert not [w for w in recwarn if "density" in str(w.message)]


def test_refusals(llama, alike, expert_paths, tmp_path):
    for options, words in [
        ({"method": "mean"}, "unknown method 'mean'"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"rank": 2}, "rank.*'ties'"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"weights": {"a": 1.0}}, "at least two experts, found a"),
    ]:
        with pytest.raises(ConfigError, match=words):
            merge_experts(llama, alike, **({"method": "ties"} | options))
    with pytest.raises(ConfigError, match="found none"):
        merge_experts(llama, {}, "cat")
    with pytest.raises(UnknownExpertError, match="'z'"):
        merge_experts(llama, alike, "cat", weights={"a": 1.0, "z": 1.0})
    with pytest.raises(UnsupportedLoraError, match="one rank, found chem 4, mech 2, prot 3; 'svd' takes any"):
        merge_experts(llama, expert_paths, "linear")
    for name, lora in {"DoRA": {"use_dora": True}, "a LoRA bias": {"lora_bias": True}}.items():
        odd = make_expert(llama, tmp_path / name, 7, r=3, target_modules=["q_proj"], **lora)
        with pytest.raises(UnsupportedLoraError, match=f"'odd'.*{name} cannot"):
            merge_experts(llama, alike | {"odd": odd}, "cat")
    other = tiny_base("llama", hidden_size=16, intermediate_size=48)
    with pytest.raises(BaseMismatchError, match="'a'.*made for another base"):
        merge_experts(other, alike, "cat")
    with pytest.raises(NoMatchingSiteError):
        merge_experts(tiny_base("gpt2"), alike, "cat")
    assert not list(tmp_path.glob("out*"))

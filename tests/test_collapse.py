"""A mixture with constant scalings is its collapsed LoRA; a cut has the error it says; what is lost is measured."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from tiny import make_expert, prompt, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom import XLoraForCausalLM, routers
from xloom.collapse import collapse, cut, mean_loss, mean_scalings, split, static_expert, write_collapsed
from xloom.errors import ConfigError, DataError, NotExportableError
from xloom.experts import Expert
from xloom.training.data import Example, read_examples
from xloom.training.rows import Source


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    torch.manual_seed(1)
    return XLoraForCausalLM.from_experts(llama, expert_paths, layerwise_scalings=True)


@pytest.fixture
def rows(tmp_path) -> list[Example]:
    path = write_rows(tmp_path / "rows.jsonl", toy_rows("up", 12) + toy_rows("down", 11))
    return read_examples({None: [Source(path)]}, tiny_tokenizer(), 128).items


def make_constant(model: XLoraForCausalLM) -> None:
    """The head answers its bias alone: other scalings at every site, the same for every token."""
    with torch.no_grad():
        model.head.linears[-1].weight.zero_()
        model.head.linears[-1].bias.normal_(0, 2)


def logits(base, folder):
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(prompt(2, 6)).logits


@pytest.mark.parametrize(
    "fields", [{}, {"global_scaling_weight": 1.7}, {"top_k_lora": 2, "enable_softmax": True}], ids=str
)
@torch.no_grad()
def test_constant_scalings_lose_nothing(llama, expert_paths, rows, tmp_path, fields):
    model = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths, layerwise_scalings=True, **fields)
    make_constant(model)
    expected = model(prompt(2, 6))
    found = collapse(model, *split([rows], 100))
    assert found.losses["collapsed"] == pytest.approx(found.losses["dynamic"], abs=1e-5)
    assert abs(found.losses["base"] - found.losses["dynamic"]) > 0.05
    assert found.error == 0
    torch.testing.assert_close(found.scalings_SN.float(), expected.scalings[0, 0], rtol=0, atol=1e-6)
    assert expected.scalings.std(dim=2).max() > 0.05, "a test of the test: sites differ"
    write_collapsed(found, tmp_path / "out", source="model", data=["rows.jsonl"])
    torch.testing.assert_close(logits(llama, tmp_path / "out"), expected.logits, rtol=0, atol=1e-5)
    ours = XLoraForCausalLM.from_experts(llama, {"one": tmp_path / "out"})
    with ours.routing(routers.Single("one")):
        torch.testing.assert_close(ours(prompt(2, 6)).logits, expected.logits, rtol=0, atol=1e-5)
    assert torch.equal(model(prompt(2, 6)).logits, expected.logits), "the model is as it was"


@torch.no_grad()
def test_the_mean_is_over_real_tokens(model, rows):
    """Row by row without padding, against batches of rows of several lengths."""
    with torch.no_grad():
        model.head.linears[-1].weight.mul_(3)
    tokens = torch.cat([model(torch.tensor([row.input_ids])).scalings[0] for row in rows])
    assert len({len(row.input_ids) for row in rows}) > 3
    torch.testing.assert_close(mean_scalings(model, rows, batch=4).float(), tokens.mean(dim=0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_losses_are_per_completion_token(model, rows, llama):
    total, count = 0.0, 0
    with model.routing(routers.Single("mech")):
        for row in rows:
            ids = torch.tensor([row.input_ids])
            labels = ids.clone()
            labels[:, : row.completion_start] = -100
            total += model(ids, labels=labels).loss.item() * row.completion_tokens
            count += row.completion_tokens
        assert mean_loss(model, rows, batch=5) == pytest.approx(total / count, abs=1e-5)


@torch.no_grad()
def test_what_varies_is_lost_and_measured(model, rows):
    with torch.no_grad():
        model.head.linears[-1].weight.mul_(8)
    fit, held = split([rows], 100)
    found = collapse(model, fit, held, rank=2)
    assert abs(found.losses["collapsed"] - found.losses["dynamic"]) > 1e-3
    with model.routing(routers.BaseOnly()):
        assert found.losses["base"] == pytest.approx(mean_loss(model, held), abs=1e-6)
    assert found.losses["dynamic"] == pytest.approx(mean_loss(model, held), abs=1e-6)
    ours = XLoraForCausalLM.from_experts(tiny_base("llama"), {"one": found.expert})
    with ours.routing(routers.Single("one")):
        assert found.losses["collapsed"] == pytest.approx(mean_loss(ours, held), abs=1e-6)


@torch.no_grad()
def test_any_router_can_be_collapsed(model, rows, expert_paths):
    fit, held = split([rows], 100)
    found = collapse(model, fit, held, routing=routers.Single("prot"))
    prot = Expert.from_pretrained(expert_paths["prot"])
    assert set(found.expert.modules) == set(prot.modules)
    for module, low in found.expert.modules.items():
        torch.testing.assert_close(low.A_RI, prot.modules[module].A_RI)
        torch.testing.assert_close(low.B_OR, prot.modules[module].B_OR * prot.modules[module].scale)
    with model.routing(routers.BaseOnly()), pytest.raises(ConfigError, match="nothing to collapse"):
        collapse(model, fit, held)


def test_a_cut_has_the_error_it_says(model, llama, tmp_path):
    scalings_SN = torch.rand(len(model.sites), 3, dtype=torch.float64)
    whole, no_error = static_expert(model, scalings_SN)
    found, error = static_expert(model, scalings_SN, rank=3)
    assert no_error == 0
    lost = norm = best = 0.0
    for module, low in found.modules.items():
        assert low.rank <= 3
        D = (whole.modules[module].B_OR @ whole.modules[module].A_RI).double()
        lost += (D - (low.B_OR @ low.A_RI).double()).norm().item() ** 2
        best += torch.linalg.svdvals(D)[3:].square().sum().item()
        norm += D.norm().item() ** 2
    assert error == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
    assert lost == pytest.approx(best, rel=1e-4)
    assert 0.05 < error < 0.9
    exact, none = static_expert(model, scalings_SN, rank=9)
    assert none < 1e-9
    for module, low in exact.modules.items():
        torch.testing.assert_close(low.B_OR @ low.A_RI, whole.modules[module].B_OR @ whole.modules[module].A_RI)


def test_cut_takes_ranks_above_both_sides():
    A, B = torch.randn(20, 6, dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    a, b, lost, norm = cut(A, B, 30)
    assert a.shape[0] == b.shape[1] == 5
    torch.testing.assert_close(b @ a, B @ A)
    assert (lost, norm) == (0.0, pytest.approx((B @ A).norm().item()))
    torch.testing.assert_close(a.norm(), b.norm())


@torch.no_grad()
def test_an_early_gate(llama, expert_paths, rows, tmp_path):
    model = XLoraForCausalLM.from_experts(
        copy.deepcopy(llama), expert_paths, gate_at_layer=1, drop_sites_below_gate=True, layerwise_scalings=True
    )
    make_constant(model)
    expected = model(prompt(2, 6)).logits
    found = collapse(model, *split([rows], 20))
    assert found.losses["collapsed"] == pytest.approx(found.losses["dynamic"], abs=1e-5)
    write_collapsed(found, tmp_path / "out", source="m", data=["d"])
    torch.testing.assert_close(logits(llama, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(prompt(2, 6)).logits, expected)


@torch.no_grad()
def test_half_precision(expert_paths, rows, tmp_path):
    model = XLoraForCausalLM.from_experts(tiny_base("llama", torch.bfloat16), expert_paths, layerwise_scalings=True)
    make_constant(model)
    found = collapse(model, *split([rows], 20))
    assert all(low.A_RI.dtype == torch.float32 for low in found.expert.modules.values())
    assert found.losses["collapsed"] == pytest.approx(found.losses["dynamic"], abs=0.05)


def test_embeddings_and_other_linear_modules(rows, tmp_path):
    base = tiny_base("gpt2")
    paths = {
        n: make_expert(base, tmp_path / n, i, r=2 + i, target_modules=["c_attn", "wte"]) for i, n in enumerate("ab")
    }
    model = XLoraForCausalLM.from_experts(copy.deepcopy(base), paths, layerwise_scalings=True)
    make_constant(model)
    with torch.no_grad():
        expected = model(prompt(2, 6)).logits
        found = collapse(model, *split([rows], 20))
    write_collapsed(found, tmp_path / "out", source="m", data=["d"])
    torch.testing.assert_close(logits(base, tmp_path / "out"), expected, rtol=0, atol=1e-4)


# --- rows ---


def example(*ids: int) -> Example:
    return Example(ids, 1)


def test_split():
    rows = [example(i, 0) for i in range(100)]
    fit, held = split([rows], 20)
    assert [row.input_ids[0] for row in held] == [20, 45, 70, 95]
    assert len(fit) == 16
    assert {r.input_ids for r in fit}.isdisjoint({r.input_ids for r in held})
    assert [len(part) for part in split([rows, rows[:7]], 50)] == [39 + 6, 11]  # row 4 is held
    with pytest.raises(DataError, match="at least 5 rows.*found 4"):
        split([rows, rows[:4]], 50)
    with pytest.raises(ConfigError, match="rows.*found 4"):
        split([rows], 4)


def test_a_copy_of_a_held_row_takes_no_part():
    rows = [example(1, 0), example(5, 0), example(3, 0), example(4, 0), example(5, 0)]
    fit, held = split([rows], 10)
    assert [row.input_ids[0] for row in fit] == [1, 3, 4]
    assert [row.input_ids[0] for row in held] == [5]


# --- refusals ---


def test_experts_that_a_plain_lora_cannot_carry(llama, rows, tmp_path):
    for name, lora in {"DoRA": {"use_dora": True}, "a LoRA bias": {"lora_bias": True}}.items():
        base = tiny_base("llama")
        path = make_expert(base, tmp_path / name, 0, target_modules=["q_proj"], **lora)
        model = XLoraForCausalLM.from_experts(base, {"a": path, "b": path})
        with pytest.raises(NotExportableError, match=name):
            collapse(model, rows[:10], rows[10:])


def test_what_is_out_of_range(model, rows):
    with pytest.raises(ConfigError, match="rank"):
        collapse(model, rows[:10], rows[10:], rank=0)
    with pytest.raises(DataError, match="found 3, 0"):
        collapse(model, rows[:3], [])


def test_what_is_written(model, rows, tmp_path):
    found = collapse(model, *split([rows], 20))
    write_collapsed(found, tmp_path / "out", source="runs/mix", data=["data/rows.jsonl"])
    record = json.loads((tmp_path / "out" / "collapse.json").read_text())
    assert record["losses"] == dict(found.losses)
    assert (record["rows"], record["held_rows"], record["rank"]) == (16, 4, 9)
    assert record["scalings"][model.sites[2]] == pytest.approx(found.scalings_SN[2].tolist())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"dynamic {found.losses['dynamic']:.4f}" in card
    assert "`rows.jsonl`" in card
    write_collapsed(found, tmp_path / "out", source="runs/mix", data=["data/rows.jsonl"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="other files"):
        write_collapsed(found, tmp_path / "other", source="m", data=[])

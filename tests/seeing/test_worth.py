"""What an expert is worth, against forwards and generations of every variant, one row at a time."""

import pytest
import torch
from planted import letters, tiny_model

from tiny import make_expert, tiny_base
from toy import toy_rows
from xloom import XLoraForCausalLM, routers
from xloom.errors import DataError, PromptError
from xloom.seeing import Variant, worth
from xloom.training.data import tokenise
from xloom.training.rows import Row

ROUTERS = {
    "mixed": routers.XLora(),
    "base": routers.BaseOnly(),
    "without chem": routers.XLora(without=["chem"]),
    "without mech": routers.XLora(without=["mech"]),
    "without prot": routers.XLora(without=["prot"]),
    "only chem": routers.XLora(only=["chem"]),
    "only mech": routers.XLora(only=["mech"]),
    "only prot": routers.XLora(only=["prot"]),
}

NEW = 3


def rows() -> list[Row]:
    """Of different lengths, and one of plain text."""
    some = [*toy_rows("up", 2), *toy_rows("down", 1)]
    made = [Row(one["messages"][:1], one["messages"][1:], f"rows:{n}") for n, one in enumerate(some)]
    return [*made, Row("abc", "de", "rows:3")]


@torch.no_grad()
def direct(model, tokenizer, row: Row, new: int) -> tuple[float, list[int]]:
    """Loss of the given answer, and the greedy one."""
    ids, start = tokenise(row, tokenizer)
    whole = torch.tensor([ids])
    labels = whole.clone()
    labels[:, :start] = -100
    out = model.generate(
        whole[:, :start], attention_mask=torch.ones(1, start, dtype=torch.long), max_new_tokens=new, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return model(whole, labels=labels).loss.item(), out[0, start:].tolist()


@pytest.mark.parametrize("fields", [{"null_expert": True}, {"gate_at_layer": 0, "head_input": "running_mean"}])
def test_every_variant_against_one_row_at_a_time(tmp_path, fields: dict):
    # experts of little effect, so that some answers stay
    model, tokenizer = tiny_model(tmp_path, global_scaling_weight=0.1, **fields), letters()
    found = worth(model, tokenizer, rows(), max_new_tokens=NEW, write_changed=True, batch_tokens=120)
    assert [str(variant) for variant in found.variants] == list(ROUTERS)
    assert found.rows == tuple(f"rows:{n}" for n in range(4))
    greedy: list[list[int]] = []
    for q, router in enumerate(ROUTERS.values()):
        for r, row in enumerate(rows()):
            with model.routing(router):
                loss, written = direct(model, tokenizer, row, NEW)
            assert found.losses_QR[q, r].item() == pytest.approx(loss, abs=1e-4)
            if q == 0:
                greedy.append(written)
                assert found.answers[r] == tokenizer.decode(written, skip_special_tokens=True)
            assert bool(found.changed_QR[q, r]) == (written != greedy[r])
            if found.changed_QR[q, r]:
                text = tokenizer.decode(written, skip_special_tokens=True)
                assert found.changed_answers[found.variants[q], r] == text
    assert found.changed_QR[1:].any()
    assert not found.changed_QR[1:].all(), "a test of the test: some answers stay"


def test_tables(tmp_path):
    model, tokenizer = tiny_model(tmp_path), letters()
    found = worth(model, tokenizer, rows(), max_new_tokens=2)
    table = found.table()
    assert [row["variant"] for row in table] == list(ROUTERS)
    assert table[0] | {"loss": 0} == {
        "variant": "mixed", "kind": "mixed", "expert": None, "rows": 4, "loss": 0, "change": 0, "low": 0, "high": 0,
        "changed": 0,
    }  # fmt: skip
    for row, losses in zip(table, found.losses_QR, strict=True):
        assert row["loss"] == pytest.approx(losses.mean().item())
        assert row["change"] == pytest.approx((losses - found.losses_QR[0]).mean().item())
        assert row["low"] <= row["change"] <= row["high"]
    flat = found.by_row()
    assert len(flat) == 8 * 4
    assert {row["row"] for row in flat} == set(found.rows)
    for row in flat:
        assert row["changed"] == (row["answer"] is None), "changed answers were not written"
    assert found.changed_answers == {}


def test_a_single_expert(tmp_path):
    base = tiny_base("llama")
    model = XLoraForCausalLM.from_experts(base, {"one": make_expert(base, tmp_path, target_modules=["q_proj"])})
    found = worth(model, letters(), rows()[:1], max_new_tokens=2)
    assert found.variants == (Variant("mixed"), Variant("base"), Variant("only", "one"))
    assert torch.equal(found.losses_QR[0], found.losses_QR[2])


def test_what_cannot_be_measured(tmp_path):
    model = tiny_model(tmp_path)
    with pytest.raises(DataError, match="found none"):
        worth(model, letters(), [])
    with pytest.raises(PromptError, match="no room|room for an answer"):
        worth(model, letters(), [Row("a" * 512, "b", "rows:1")])

"""The beginning that rows share is computed once: the same loss, gradients and trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from tiny import ARCHITECTURES, make_expert, tiny_base
from toy import toy_rows, write_rows
from xloom.hub.files import read_tensors
from xloom.training.data import Example, collate
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.loop import row_losses
from xloom.training.recipe import ExpertRecipe, HeadRecipe
from xloom.training.sharing import can_share, common_beginning, shared_outputs

BEGINNING = tuple(range(5, 15))
ROWS = [Example((*BEGINNING, *rest), len(BEGINNING) + start) for rest, start in (
    ((20, 21, 22, 23, 24), 3), ((30, 31, 32), 2), ((20, 41, 42, 43, 44, 45, 46, 47), 4), ((50, 51), 1)
)]  # fmt: skip


def whole_length(rows: list[tuple[int, ...]]) -> int:
    """Position by position."""
    size = 0
    while all(len(row) > size for row in rows) and len({row[size] for row in rows}) == 1:
        size += 1
    return size


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=14), st.integers(1, 14)), min_size=2),
)
def test_the_common_beginning_ends_before_the_last_prompt_token(start: list[int], rests: list[Any]):
    rows = [(tuple(start + rest), min(cut, len(rest) - 1) + len(start)) for rest, cut in rests]
    expected = whole_length([ids[: cut - 1] for ids, cut in rows])
    assert common_beginning([Example(*row) for row in rows]) == (expected if expected >= 8 else 0)


def test_one_row_shares_nothing():
    assert common_beginning(ROWS[:1]) == 0
    assert common_beginning(ROWS) == len(BEGINNING)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2", "cohere", "stablelm", "mixtral"]
)
def test_loss_and_gradients_are_those_of_whole_rows(kind: str):
    model = tiny_base(kind, dtype=torch.float64)
    assert can_share(model.config)
    batch = collate(ROWS, 0) | {"shared": len(BEGINNING)}
    wanted = ("input_ids", "attention_mask", "position_ids")

    def gradients(out: Any) -> list[torch.Tensor]:
        losses_B, _ = row_losses(out.logits, batch["labels"])
        return [losses_B.detach(), *torch.autograd.grad(losses_B.sum(), list(model.parameters()), allow_unused=True)]

    whole = gradients(model(**{k: batch[k] for k in wanted}, logits_to_keep=batch["keep"], use_cache=False))
    shared = gradients(shared_outputs(lambda _, inputs: model(**inputs, use_cache=True), batch, model.config))
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)  # norms are computed in float32


def test_sliding_windows_do_not_share():
    assert not can_share(AutoConfig.for_model("mistral", **ARCHITECTURES["mistral"]))
    assert can_share(AutoConfig.for_model("llama"))


def padded_rows(path: Path, domain: str, count: int, start: int = 0) -> str:
    """Toy rows that begin alike."""
    rows = toy_rows(domain, count, start)
    for row in rows:
        row["messages"][0]["content"] = "tell me what this is: " + row["messages"][0]["content"]
    return str(write_rows(path, rows))


def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xloom.training.loop.common_beginning", lambda examples: 0)


def counting_shared(monkeypatch: pytest.MonkeyPatch, place: str) -> list[int]:
    sizes: list[int] = []

    def count(forward: Any, batch: dict[str, Any], config: Any) -> Any:
        sizes.append(batch["shared"])
        return shared_outputs(forward, batch, config)

    monkeypatch.setattr(f"xloom.training.{place}.shared_outputs", count)
    return sizes


def test_an_expert_trains_alike(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def weights(name: str) -> dict[str, torch.Tensor]:
        rows = padded_rows(tmp_path / "rows.jsonl", "up", 24)
        recipe = ExpertRecipe(
            base=str(base_folder), output=str(tmp_path / name), train=rows, valid=rows, max_steps=6, batch_size=4
        )
        return read_tensors(train_expert(recipe, progress=False) / "adapter_model.safetensors")

    sizes = counting_shared(monkeypatch, "loop")
    shared = weights("shared")
    assert len(sizes) > 6
    assert min(sizes) >= 20
    unshared(monkeypatch)
    whole = weights("whole")
    for name in (name for name in whole if "lora_A" in name):
        # AdamW makes whole steps of gradients that are rounding alone: entries may differ, their product may not
        mine, its = (found[name.replace("lora_A", "lora_B")] @ found[name] for found in (shared, whole))
        assert (mine - its).norm() <= 1e-3 * its.norm()


@pytest.mark.parametrize("head", [
    {}, {"head_input": "running_mean", "null_expert": True}, {"gate_at_layer": 1, "head_input": ["token", "ema:4"]}
])  # fmt: skip
def test_a_head_trains_alike(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: dict[str, Any]):
    experts = {
        name: make_expert(tiny_base("llama"), tmp_path / name, i, r=2, layers_to_transform=[1, 2])
        for i, name in enumerate(("up", "down"))
    }

    def weights(name: str) -> dict[str, torch.Tensor]:
        recipe = HeadRecipe(
            base=str(base_folder),
            output=str(tmp_path / "out" / name),
            experts=experts,
            data={d: {"files": padded_rows(tmp_path / f"{d}.jsonl", d, 24)} for d in experts},
            valid={d: [padded_rows(tmp_path / f"{d}-valid.jsonl", d, 6, 50)] for d in experts},
            max_steps=6,
            batch_size=4,
            head={"layerwise_scalings": True} | head,
            init="random",
        )
        return read_tensors(train_head(recipe, progress=False) / "head.safetensors")

    sizes = counting_shared(monkeypatch, "head_trainer")
    shared = weights("shared")
    assert len(sizes) > 6
    unshared(monkeypatch)
    whole = weights("whole")
    for name, tensor in whole.items():
        assert (shared[name] - tensor).norm() <= 1e-4 * tensor.norm()


def test_gradient_checkpointing_does_not_share(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = counting_shared(monkeypatch, "loop")
    recipe = ExpertRecipe(
        base=str(base_folder), output=str(tmp_path / "out"), train=padded_rows(tmp_path / "rows.jsonl", "up", 24),
        max_steps=2, batch_size=4, gradient_checkpointing=True,
    )  # fmt: skip
    train_expert(recipe, progress=False)
    assert sizes == []

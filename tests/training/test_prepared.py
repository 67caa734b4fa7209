"""What is computed once per row and kept: the right values, whatever the cache held before; room, damage, eviction."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tiny import make_experts
from xloom import XLoraForCausalLM, routers
from xloom.training.data import Example, collate
from xloom.training.objective import token_losses
from xloom.training.prepared import BASE, ExpertLosses, HeadStates, base_fingerprint
from xloom.training.store import TensorStore, row_key

ROWS = [Example(tuple(range(4, 4 + n)), start) for n, start in [(9, 6), (4, 3), (12, 2), (6, 5), (9, 2)]]
IDS = {"chem": "c1", "mech": "m1", "prot": "p1"}


@pytest.fixture
def model(llama: PreTrainedModel, tmp_path: Path) -> XLoraForCausalLM:
    return XLoraForCausalLM.from_experts(llama, make_experts(llama, tmp_path / "e"))


# --- the store ---


def test_a_store_keeps_what_it_was_given(tmp_path: Path) -> None:
    store = TensorStore({"a": 1}, tmp_path)
    tensors = {name: torch.randn(n, 3) for n, name in enumerate("abc", start=1)}
    for name, tensor in tensors.items():
        store.add(name, tensor)
        assert torch.equal(store[name], tensor)
    assert store.missing(["b", "x", "x"]) == ["x"]
    assert TensorStore({"a": 1}, tmp_path).missing("abc") == ["a", "b", "c"], "nothing is written before flush"
    store.flush()
    again = TensorStore({"a": 1}, tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert TensorStore({"a": 2}, tmp_path).missing("abc") == ["a", "b", "c"]
    assert {p.suffix for p in again.folder.iterdir()} == {".safetensors", ".json"}


def test_a_store_keeps_a_tensor_as_it_was_when_added(tmp_path: Path) -> None:
    store, whole = TensorStore({}, tmp_path), torch.zeros(2, 3)
    store.add("first", whole[0])
    store.add("second", whole[1])
    whole += 1
    store.flush()
    assert not TensorStore({}, tmp_path)["second"].any()


def test_a_full_shard_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xloom.training.store._SHARD_BYTES", 100)
    store = TensorStore({}, tmp_path)
    store.add("a", torch.zeros(20))
    assert "a" not in TensorStore({}, tmp_path)
    store.add("b", torch.zeros(20))
    other = TensorStore({}, tmp_path)
    assert "a" in other
    store.add("c", torch.zeros(1))
    store.flush()
    assert "c" not in other
    other.refresh()
    assert "c" in other


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    store = TensorStore({}, tmp_path)
    store.add("a", torch.zeros(20))
    store.flush()
    (shard,) = store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:30])
    assert "a" not in TensorStore({}, tmp_path)


def filled(root: Path, age: float, *names: str, **about: int) -> TensorStore:
    """A store with 4 kB of each name, last used so many seconds ago."""
    store = TensorStore(about, root)
    for name in names:
        store.add(name, torch.zeros(1000))
        store.flush()
    os.utime(store.folder, (time.time() - age, time.time() - age))
    return store


def test_room_is_made_by_removing_the_stores_longest_unused(tmp_path: Path) -> None:
    stores = [filled(tmp_path, age, "a", n=n) for n, age in enumerate([3000, 2000, 1000, 5])]

    def there() -> list[bool]:
        return [store.folder.exists() for store in stores]

    new = TensorStore({"n": "new"}, tmp_path)
    assert new.make_room([], 1000, 30_000)
    assert there() == [True] * 4
    assert not new.make_room([], 10_000, 9000), "it cannot be"
    assert not new.make_room([], 10**18, 10**19), "more than the disk has"
    assert there() == [True] * 4, "and then nothing goes"
    assert new.make_room([], 4000, 18_000)
    assert there() == [False, True, True, True]
    assert new.make_room([], 4000, 10_000)
    assert there() == [False, False, False, True], "the last is in use"


def test_room_is_made_by_removing_own_rows_that_nobody_wants(tmp_path: Path) -> None:
    store = filled(tmp_path, 0, "a", "b", "c", n=1)
    assert not store.make_room("abcd", 4000, 13_000)
    assert store.make_room("bd", 4000, 13_000)
    assert "b" in store
    assert len(store.missing("abc")) == 1
    assert TensorStore({"n": 1}, tmp_path).missing("abc") == store.missing("abc")


def test_a_store_that_somebody_removed_is_made_anew(tmp_path: Path) -> None:
    store = filled(tmp_path, 0, "a", n=1)
    shutil.rmtree(store.folder)
    store.add("b", torch.ones(3))
    store.flush()
    store.refresh()
    assert torch.equal(store["b"], torch.ones(3))


def test_rows_have_names_of_their_own() -> None:
    assert len({row_key(ids, name) for ids in [(1, 23), (12, 3), (1, 2, 3)] for name in ("", "base")}) == 6


# --- what is kept ---


@pytest.mark.parametrize("fields", [{}, {"scaling_pass_value": 0.5}, {"gate_at_layer": 1}])
def test_states_are_those_of_the_model(llama: PreTrainedModel, tmp_path: Path, fields: dict[str, object]) -> None:
    paths = make_experts(llama, tmp_path / "e")
    model = XLoraForCausalLM.from_experts(llama, paths, drop_sites_below_gate=True, **fields)
    states = HeadStates(model, "base", IDS, tmp_path)
    assert states.bytes_of([*ROWS, ROWS[0]]) == sum(len(e.input_ids) for e in ROWS[:4]) * 32 * 4
    ticks: list[int] = []
    states.fill([*ROWS, ROWS[0]], 2, 0, lambda: ticks.append(1))
    assert len(ticks) == len(ROWS) - 1, "the last has the tokens of the first"
    assert states.bytes_of(ROWS) == 0
    for row in ROWS:
        expected = model.compute_head_states(torch.tensor([row.input_ids]))[0]
        assert torch.equal(states[row], expected)
    batch = collate(ROWS, 0)
    mask = batch["attention_mask"].bool()
    whole = model.compute_head_states(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(states.batch(ROWS)[mask], whole[mask], rtol=1e-4, atol=1e-4)
    assert not states.batch(ROWS)[~mask].any()


def test_states_do_not_depend_on_what_the_cache_held(model: XLoraForCausalLM, tmp_path: Path) -> None:
    at_once, in_parts = HeadStates(model, "b", IDS, tmp_path / "1"), HeadStates(model, "b", IDS, tmp_path / "2")
    at_once.fill(ROWS, 4, 0)
    in_parts.fill(ROWS[2:3], 4, 0)
    in_parts.fill(ROWS[::-1], 4, 0)
    assert all(torch.equal(at_once[row], in_parts[row]) for row in ROWS)


def test_states_of_other_settings_lie_elsewhere(llama: PreTrainedModel, tmp_path: Path) -> None:
    paths = make_experts(llama, tmp_path / "e")
    mixing = {"scaling_pass_value": 0.5}
    folders = set()
    for fields in (
        {}, {"top_k_lora": 1}, {"gate_at_layer": 1}, {"gate_at_layer": 2},
        mixing, mixing | {"top_k_lora": 1}, mixing | {"global_scaling_weight": 3.0},
        mixing | {"top_k_lora": 1, "enable_softmax_topk": True},
    ):  # fmt: skip
        model = XLoraForCausalLM.from_experts(llama, paths, drop_sites_below_gate=True, **fields)
        for ids in (IDS, IDS | {"chem": "other"}):
            folders.add(HeadStates(model, "b", ids, tmp_path).store.folder)
        model.unload()
    # other experts, and what becomes of their weights, matter where the scaling pass uses them, and there alone
    assert len(folders) == 3 + 2 * 4


def test_losses_are_those_of_each_expert_alone(model: XLoraForCausalLM, tmp_path: Path) -> None:
    losses = ExpertLosses(model, "base", IDS, tmp_path)
    for name in (BASE, *model.experts):
        losses.fill(ROWS, name, 2, 0)
    for row in ROWS:
        ids = torch.tensor([row.input_ids])
        for name in (BASE, *model.experts):
            with torch.no_grad(), model.routing(routers.Single(name) if name else routers.BaseOnly()):
                logits = model(ids, use_cache=False).logits
            expected = token_losses(logits, ids)[0, row.completion_start - 1 :]
            torch.testing.assert_close(losses.of(row, name), expected, rtol=1e-4, atol=1e-5)
    changed = ExpertLosses(model, "base", IDS | {"chem": "trained anew"}, tmp_path)
    ticks: list[int] = []
    for name in (BASE, *model.experts):
        changed.fill(ROWS, name, 2, 0, lambda: ticks.append(1))
    assert len(ticks) == len(ROWS), "only the expert that changed is computed again"


def test_the_fingerprint_is_the_base_s_alone(llama: PreTrainedModel, tmp_path: Path) -> None:
    paths = make_experts(llama, tmp_path / "e")
    found = []
    for names, fields in ((["chem", "mech"], {}), (["prot"], {}), (["mech"], {"gate_at_layer": 1})):
        experts = {name: paths[name] for name in names}
        model = XLoraForCausalLM.from_experts(llama, experts, drop_sites_below_gate=True, **fields)
        found.append(base_fingerprint(model))
        assert len(model.mixture.sites) > 0
        model.unload()
    assert len(set(found)) == 1
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    model = XLoraForCausalLM.from_experts(llama, paths)
    assert base_fingerprint(model) != found[0]
    changed, before = model.base.config, base_fingerprint(model)
    changed.rms_norm_eps *= 10
    assert base_fingerprint(model) != before

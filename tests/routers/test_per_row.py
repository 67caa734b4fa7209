"""A decision per row of the batch: each row is as it would be alone under its own weights."""

import pytest
import torch

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.errors import ScalingsShapeError, UnknownExpertError

NAMES = ["chem", "mech", "prot"]
WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, -0.3], [0.0, 0.0, 0.0]])


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    return XLoraForCausalLM.from_experts(llama, expert_paths)


@torch.no_grad()
def test_every_row_is_as_alone(model):
    ids = prompt(3, 6)
    with model.routing(routers.PerRow(WEIGHTS)):
        together = model(ids)
    torch.testing.assert_close(together.scalings, WEIGHTS[:, None, None].expand_as(together.scalings))
    for row in range(3):
        with model.routing(routers.Fixed(dict(zip(NAMES, WEIGHTS[row].tolist(), strict=True)))):
            torch.testing.assert_close(together.logits[row], model(ids[row : row + 1]).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_oracle_is_each_expert_alone(model):
    ids, right = prompt(3, 6), ["prot", "chem", "prot"]
    with model.routing(routers.Oracle(right)):
        together = model.generate(ids, max_new_tokens=8, do_sample=False)
    alone = []
    for row, name in enumerate(right):
        with model.routing(routers.Single(name)):
            alone.append(model.generate(ids[row : row + 1], max_new_tokens=8, do_sample=False))
    assert torch.equal(together, torch.cat(alone))
    with model.routing(routers.Oracle(["chem"] * 3)):
        assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), together)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_beams_keep_the_weights_of_their_row(model, options):
    ids = prompt(3, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = options | {"max_new_tokens": 6, "do_sample": False}
    with model.routing(routers.PerRow(WEIGHTS)):
        together = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), together)
    alone = []
    for row in range(3):
        with model.routing(routers.PerRow(WEIGHTS[row : row + 1])):
            alone.append(model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options))
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_a_base_that_flattens_its_tokens(tmp_path):
    """Some hand their MLP [B*T, I]; a row's tokens stay together there."""
    base = tiny_base("opt")
    paths = {n: make_expert(base, tmp_path / n, i, target_modules=["q_proj", "fc1"]) for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(base, paths)
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.6]])
    ids = prompt(2, 5)
    with model.routing(routers.PerRow(weights)):
        together = model(ids).logits
    with model.routing(routers.Fixed({"a": 0.3, "b": 0.6})):
        torch.testing.assert_close(together[1], model(ids[1:]).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_at_an_embedding(llama, tmp_path):
    paths = {n: make_expert(llama, tmp_path / n, i, target_modules=["embed_tokens"]) for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(llama, paths)
    ids = prompt(2, 4)
    with model.routing(routers.Oracle(["b", "a"])):
        together = model(ids).logits
    with model.routing(routers.Single("b")):
        torch.testing.assert_close(together[0], model(ids[:1]).logits[0], rtol=0, atol=1e-4)


def test_refusals(model):
    for wrong in (torch.ones(3), torch.ones(1, 2, 3), torch.ones(0, 3)):
        with pytest.raises(ScalingsShapeError, match=r"\[B, N\]"):
            routers.PerRow(wrong)
    with pytest.raises(ScalingsShapeError, match="name of an expert"):
        routers.Oracle("chem")
    with pytest.raises(ScalingsShapeError, match="name of an expert"):
        routers.Oracle([])
    for rows, router in [(3, routers.PerRow(WEIGHTS[:2])), (1, routers.Oracle(["chem", "mech"]))]:
        with model.routing(router), pytest.raises(ScalingsShapeError, match=f"2 rows.*batch of {rows}"):
            model(prompt(rows, 4))
    with (
        model.routing(routers.PerRow(WEIGHTS[:, :2])),
        pytest.raises(ScalingsShapeError, match="expected 3 weights.*found 2"),
    ):
        model(prompt(3, 4))
    with model.routing(routers.Oracle(["chem", "cem"])), pytest.raises(UnknownExpertError, match="'cem'"):
        model(prompt(2, 4))

import copy
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from tiny import make_expert, tiny_base
from toy import tiny_tokenizer, toy_rows, write_rows
from xloom import XLoraForCausalLM, routers
from xloom.architecture import decoder_layers
from xloom.errors import BaseMismatchError, CheckpointError, ConfigError, RecipeError
from xloom.hub.files import read_tensors, write_tensors
from xloom.routers.routing import Head
from xloom.training import head as training_head
from xloom.training import head_trainer, objective, start
from xloom.training.data import Example, collate, read_examples
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.recipe import ExpertRecipe, HeadRecipe
from xloom.training.start import fit_to_arrow, fit_to_labels, states_of, statistics


@pytest.fixture(scope="session")
def experts(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two experts, each trained on its own toy domain; in the upper layers alone, so that a gate can sit below."""
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for name in ("up", "down"):
        recipe = ExpertRecipe(
            base=str(base_folder),
            output=str(folder / name),
            train=str(write_rows(folder / f"{name}.jsonl", toy_rows(name, 24))),
            max_steps=15,
            batch_size=4,
            learning_rate=1e-2,
            lora={"layers_to_transform": [1, 2]},
        )
        made[name] = str(train_expert(recipe, progress=False))
    return made


def head_recipe(project: Path, experts: dict[str, str], **changes: Any) -> HeadRecipe:
    settings: dict[str, Any] = {
        "base": str(project / "base"),
        "output": str(project / "model"),
        "experts": experts,
        "data": {name: [str(project / f"{name}.jsonl")] for name in ("up", "down")},
        "valid": {name: [str(project / f"{name}-valid.jsonl")] for name in ("up", "down")},
        "max_steps": 40,
        "batch_size": 4,
        "save_every": 20,
        "learning_rate": 3e-2,
    }
    return HeadRecipe(**(settings | changes))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def test_a_head_learns_to_route_and_nothing_else_changes(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[XLoraForCausalLM, dict[str, torch.Tensor]]] = []
    made = XLoraForCausalLM.from_experts

    def watch(*args: Any, **kwargs: Any) -> XLoraForCausalLM:
        model = made(*args, **kwargs)
        seen.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    monkeypatch.setattr(XLoraForCausalLM, "from_experts", watch)
    folder = train_head(head_recipe(project, experts, eval_every=20), progress=False)
    model, before = seen[-1]  # the first was the trial on the meta device
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.layers.0.weight", "head.layers.0.bias"}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.layers.0.weight", "head.layers.0.bias"}

    record = record_of(folder)
    losses = [loss for _, loss in record["losses"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert record["validation"]["routing_accuracy"] == 1.0
    assert set(record["validation"]) == {"loss", "loss_up", "loss_down", "routing_accuracy"}
    assert [log["step"] for log in record["validations"]] == [20, 40]
    assert record["validations"][0]["loss"] > record["validation"]["loss"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    loaded = XLoraForCausalLM.from_pretrained(folder)
    ids = torch.arange(4, 12)[None]
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_dict().keys() == made(project / "base", experts).config.to_dict().keys()
    assert not (project / "model.work").exists()


def accuracy(project: Path, experts: dict[str, str], **changes: Any) -> float:
    folder = train_head(head_recipe(project, experts, **changes), progress=False)
    return record_of(folder)["validation"]["routing_accuracy"]


@pytest.mark.parametrize(
    "head",
    [
        {"top_k_lora": 1},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
        {"head_input": ["token", "running_mean"], "scaling_pass_value": None},
        {"head_input": "ema:4", "gate_at_layer": 1, "null_expert": True},
    ],
)
def test_the_routing_term_works_with_every_kind_of_head(
    project: Path, experts: dict[str, str], head: dict[str, Any]
) -> None:
    assert accuracy(project, experts, head=head, init="zero" if "top_k_lora" in head else "random") >= 0.9


def right_share(folder: Path, project: Path) -> float:
    """Mean scaling of the right expert over the validation rows of both domains."""
    model = XLoraForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    shares = []
    for index, name in enumerate(model.experts):
        for example in read_examples({name: [project / f"{name}-valid.jsonl"]}, tokenizer, 512).items:
            with torch.no_grad():
                shares.append(model(torch.tensor([example.input_ids])).scalings[..., index].mean().item())
    return sum(shares) / len(shares)


def test_the_routing_term_moves_the_share_of_the_right_expert_up(project: Path, experts: dict[str, str]) -> None:
    shares = {}
    for weight in (0.0, 10.0):
        recipe = head_recipe(project, experts, routing_weight=weight, output=str(project / f"w{weight}"))
        shares[weight] = right_share(train_head(recipe, progress=False), project)
    assert shares[10.0] > shares[0.0] + 0.03, shares


def test_experts_change_when_asked(project: Path, experts: dict[str, str]) -> None:
    folder = train_head(head_recipe(project, experts, experts_learning_rate=1e-3), progress=False)
    for name, path in experts.items():
        before = read_tensors(Path(path) / "adapter_model.safetensors")
        after = read_tensors(folder / "experts" / name / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "head", [{}, {"head_input": "running_mean", "xlora_depth": 2}, {"use_trainable_adapters": True}]
)
def test_a_run_that_was_broken_off_ends_as_an_unbroken_one(
    project: Path, experts: dict[str, str], head: dict[str, Any], breaking: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "head": head,
        "max_steps": 10,
        "save_every": 4,
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "experts_learning_rate": 1e-3 if "use_trainable_adapters" in head else None,
    }
    whole = train_head(head_recipe(project, experts, **changes, output=str(project / "whole")), progress=False)
    recipe = head_recipe(project, experts, **changes)
    breaking(6)
    with pytest.raises(RuntimeError, match="power cut"):
        train_head(recipe, progress=False)
    breaking(None)
    kept = read_tensors(project / "model.work" / "checkpoint-4" / "trained.safetensors")
    assert all(name.startswith("head.") or name.endswith(("A_RI", "B_OR")) for name in kept)
    capsys.readouterr()
    folder = train_head(recipe)
    assert "going on from step 4" in capsys.readouterr().err
    files = ["head.safetensors", "experts/up/adapter_model.safetensors", "experts/down/adapter_model.safetensors"]
    for file in files:
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert record_of(folder)["validation"] == record_of(whole)["validation"]


def test_a_finished_head_comes_back_at_once(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = head_recipe(project, experts, max_steps=2)
    folder = train_head(recipe, progress=False)
    monkeypatch.setattr(training_head, "train", lambda *_: pytest.fail("trained again"))
    assert train_head(recipe) == folder
    assert "trained already" in capsys.readouterr().err


@pytest.mark.parametrize("gate_at_layer", [None, 1])
def test_statistics_are_those_of_what_the_head_reads(
    project: Path, experts: dict[str, str], gate_at_layer: int | None
) -> None:
    model = XLoraForCausalLM.from_experts(
        project / "base", experts, head_input="running_mean", gate_at_layer=gate_at_layer
    )
    rows = [Example(tuple(range(4, 4 + n)), 1) for n in (5, 9, 3)]
    seen: list[torch.Tensor] = []
    features = model.head.features
    model.head.features = lambda hidden, keep, past: (seen.append(hidden[keep]), features(hidden, keep, past))[1]
    for row in rows:
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
    states_ND = torch.cat(seen).double()
    mean_D, std_D = statistics(states_of(model, rows, pad_id=0, batch_size=2))
    torch.testing.assert_close(mean_D, states_ND.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std_D, states_ND.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)
    assert len(decoder_layers(model.base)[1]) == 3


def test_what_does_not_fit_is_named_before_training(project: Path, experts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="adapts 7 modules below gate_at_layer=2"):
        train_head(head_recipe(project, experts, head={"gate_at_layer": 2}), progress=False)
    recipe = head_recipe(project, experts, head={"gate_at_layer": 2}, drop_sites_below_gate=True, max_steps=2)
    assert all(".2." in site for site in XLoraForCausalLM.from_pretrained(train_head(recipe, progress=False)).sites)


# --- without labels, and the other terms ---


def unlabelled(project: Path) -> dict[str, Any]:
    return {name: {"files": [str(project / f"{name}.jsonl")], "expert": None} for name in ("up", "down")}


@pytest.mark.parametrize("soft_labels", ["row", "token"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_experts_own_losses_teach_the_head_where_nobody_labelled_rows(
    project: Path, experts: dict[str, str], soft_labels: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels turned round on purpose turn the routing round: it is they that teach, not the next-token loss."""
    if turned:
        monkeypatch.setattr(head_trainer, "posterior", lambda *args: objective.posterior(*args).flip(-1))
    changes = {"data": unlabelled(project), "routing_weight": 10.0, "soft_labels": soft_labels}
    use = record_of(train_head(head_recipe(project, experts, **changes), progress=False))["use"]
    right = {name: use[name][name] for name in ("up", "down")}
    assert max(right.values()) < 0.5 if turned else min(right.values()) > 0.55, use


def test_soft_labels_are_the_experts_posterior(project: Path, experts: dict[str, str]) -> None:
    made: list[head_trainer.HeadTrainer] = []
    recipe = head_recipe(project, experts, data=unlabelled(project), max_steps=1, head={"null_expert": True})
    original = head_trainer.HeadTrainer.prepare

    def watch(self: head_trainer.HeadTrainer, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_trainer.HeadTrainer, "prepare", watch)
        train_head(recipe, progress=False)
    (trainer,) = made
    model, example = trainer.model, trainer.seen[0]
    ids, start = torch.tensor([example.input_ids]), example.completion_start
    sums = []
    for router in (routers.Single("up"), routers.Single("down"), routers.BaseOnly()):
        with torch.no_grad(), model.routing(router):
            logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
        sums.append(-torch.log_softmax(logits, dim=-1).gather(1, ids[0, start:, None]).sum())
    likelihood = torch.exp(-torch.stack(sums))
    torch.testing.assert_close(
        trainer.soft[example.input_ids, example.completion_start], likelihood / likelihood.sum(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["balance", "entropy"])
def test_a_term_moves_what_it_is_about(project: Path, experts: dict[str, str], kind: str) -> None:
    """One-sided rows: the routing term alone leaves the other expert unused, and the scalings sharp or flat."""
    found = {}
    for weight in (0.0, 20.0):
        changes = {"data": {"up": str(project / "up.jsonl")}, "valid": {"up": str(project / "up-valid.jsonl")}}
        changes |= {f"{kind}_weight": weight, "output": str(project / f"w{weight}"), "max_steps": 20}
        if kind == "entropy":
            changes |= {"routing_weight": 0.0}
        found[weight] = record_of(train_head(head_recipe(project, experts, **changes), progress=False))
    use, entropy = ({w: r[key]["up"] for w, r in found.items()} for key in ("use", "entropy"))
    if kind == "balance":
        assert use[20.0]["down"] > use[0.0]["down"] + 0.1, use
    else:
        assert entropy[20.0] < 0.75 * entropy[0.0], entropy
    assert [kind in found[w]["parts"] for w in found] == [False, True]


def test_the_parts_add_up_to_the_loss(project: Path, experts: dict[str, str]) -> None:
    changes = {"balance_weight": 0.5, "entropy_weight": 0.5, "max_steps": 5, "gradient_accumulation": 2}
    record = record_of(train_head(head_recipe(project, experts, **changes), progress=False))
    assert set(record["parts"]) == {"cross_entropy", "routing", "balance", "entropy"}
    for number, (step, loss) in enumerate(record["losses"]):
        parts = [values[number] for values in record["parts"].values()]
        assert {at for at, _ in parts} == {step}
        assert loss == pytest.approx(sum(value for _, value in parts), rel=1e-4)


def test_the_softmax_cools_down_to_the_model_s_own_temperature(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heats: list[float | None] = []
    decide = Head.scalings
    monkeypatch.setattr(Head, "scalings", lambda self, *args: (heats.append(self.temperature), decide(self, *args))[1])
    changes = {"start_temperature": 8.0, "head": {"softmax_temperature": 2.0}, "max_steps": 3, "valid": {}}
    train_head(head_recipe(project, experts, **changes), progress=False)
    assert heats == pytest.approx([8.0, 4.0, 2.0])


def test_experts_learn_at_their_own_rate(project: Path, experts: dict[str, str]) -> None:
    folders = {
        rate: train_head(
            head_recipe(project, experts, experts_learning_rate=rate, max_steps=1, output=str(project / f"{rate}")),
            progress=False,
        )
        for rate in (1e-4, 1e-2)
    }
    moved = {}
    for rate, folder in folders.items():
        before = read_tensors(Path(experts["up"]) / "adapter_model.safetensors")
        after = read_tensors(folder / "experts" / "up" / "adapter_model.safetensors")
        moved[rate] = max((after[key] - before[key]).abs().max().item() for key in before)
    assert moved[1e-4] == pytest.approx(1e-4, rel=0.05)  # the first step of AdamW
    assert moved[1e-2] == pytest.approx(1e-2, rel=0.05)
    heads = [read_tensors(folder / "head.safetensors")["layers.0.weight"] for folder in folders.values()]
    assert torch.equal(*heads)


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_head_that_starts_from_arrow_routes_as_arrow_does(
    project: Path, experts: dict[str, str], layerwise: bool, depth: int
) -> None:
    fields = {"layerwise_scalings": layerwise, "xlora_depth": depth, "xlora_size": 64}
    model = XLoraForCausalLM.from_experts(project / "base", experts, **fields)
    rows = read_examples({None: [project / "up.jsonl", project / "down.jsonl"]}, tiny_tokenizer(), 512).items
    fit_to_arrow(model, rows, pad_id=0, batch_size=8)
    ids = torch.tensor([rows[3].input_ids])
    with torch.no_grad():
        ours = model(ids).scalings
        with model.routing(routers.Arrow()):
            theirs = model(ids).scalings
    if not layerwise:
        logits = theirs.log().mean(dim=2, keepdim=True)
        theirs = torch.softmax(logits, dim=-1).expand_as(ours)
    error, spread = (ours - theirs).abs().mean(), (theirs - theirs.mean()).abs().mean()
    assert error < 0.5 * spread, (error, spread)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_head_that_starts_from_labels_is_one_trained_on_the_routing_term_alone(
    project: Path, experts: dict[str, str], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site is trained and copied; the slow way trains them all."""
    monkeypatch.setattr(start, "_LABEL_EPOCHS", 1)
    monkeypatch.setattr(start, "_LABEL_STEPS", 1)
    fields = {
        "layerwise_scalings": True,
        "xlora_depth": depth,
        "xlora_size": 16,
        "null_expert": True,
        "xlora_dropout_p": 0.0,
    }
    torch.manual_seed(0)
    model = XLoraForCausalLM.from_experts(project / "base", experts, **fields, head_input=["token", "running_mean"])
    sources = {name: [project / f"{name}.jsonl"] for name in ("up", "down")}
    rows = random.Random(0).sample(read_examples(sources, tiny_tokenizer(), 512).items, 48)
    batches = [rows[at : at + 4] for at in range(0, len(rows), 4)]

    def collated(examples: Sequence[Example]) -> dict[str, Any]:
        right = torch.zeros(len(examples), 3)
        for target, example in zip(right, examples, strict=True):
            target[model.experts.index(example.domain or "")] = 1.0
        batch = collate(examples, 0)
        return batch | {"row_targets": right, "token_targets": torch.zeros(len(examples), batch["keep"] - 1, 3)}

    model.head.zero_init_()
    slow = copy.deepcopy(model.head).train()
    monkeypatch.setattr(XLoraForCausalLM, "forward", lambda *_, **__: pytest.fail("a pass with experts"))
    fit_to_labels(model, batches, collated, seed=5)

    shared, sites = slow.linears[:-1], slow.linears[-1]
    groups = [{"params": list(sites.parameters()), "eps": 1e-8 / slow.num_sites}]  # each has that share of the gradient
    groups += [{"params": list(layer.parameters())} for layer in shared]
    optimizer = torch.optim.AdamW(groups, lr=start._LABEL_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, start._LABEL_WARMUP, len(batches))
    for examples in random.Random(5).sample(batches, len(batches)):
        batch = collated(examples)
        mask = batch["attention_mask"].bool()
        features, _ = slow.features(model.compute_head_states(batch["input_ids"], mask), mask, [None])
        shares = torch.softmax(slow(features), dim=-1)
        mean = torch.stack([row[real].mean(dim=(0, 1)) for row, real in zip(shares, mask, strict=True)])
        (-(batch["row_targets"] * mean.log()).sum() / len(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    features = torch.randn(1, 5, features.shape[-1])
    torch.testing.assert_close(model.head.eval()(features), slow.eval()(features), rtol=1e-3, atol=1e-4)
    assert model.head(features).std() > 1e-3


def test_a_start_from_labels_routes_before_the_first_step(project: Path, experts: dict[str, str]) -> None:
    changes = {"max_steps": 12, "learning_rate": 1e-9, "routing_weight": 0.0, "head": {"head_input": "running_mean"}}
    found = {
        init: accuracy(project, experts, init=init, output=str(project / init), **changes)
        for init in ("zero", "labels")
    }
    assert found["zero"] <= 0.6
    assert found["labels"] == 1.0


def test_a_start_from_labels_may_see_more_rows_than_the_steps(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        head_trainer,
        "fit_to_labels",
        lambda model, batches, *rest: seen.append(len({e.input_ids for b in batches for e in b})),
    )
    few = {"max_steps": 2, "batch_size": 2, "init": "labels", "output": str(project / "few")}
    train_head(head_recipe(project, experts, **few), progress=False)
    train_head(
        head_recipe(project, experts, **few | {"label_steps": 6, "output": str(project / "more")}), progress=False
    )
    assert seen[0] <= 4 < seen[1] <= 12


def test_rows_can_be_the_bases_own(project: Path, experts: dict[str, str]) -> None:
    """Domain `down` has an expert here, but is said to be the base's."""
    folder = train_head(
        head_recipe(
            project,
            experts,
            data={"up": str(project / "up.jsonl"), "down": {"files": str(project / "down.jsonl"), "expert": "base"}},
            head={"null_expert": True, "head_input": "running_mean"},
            init="labels",
            learning_rate=1e-9,
            routing_weight=0.0,
            max_steps=12,
        ),
        progress=False,
    )
    use = record_of(folder)["use"]
    assert use["up"]["up"] > 0.5
    # all rows begin alike, and there the head cannot know
    assert sum(use["down"].values()) < sum(use["up"].values()) - 0.3


def test_only_the_first_rows_of_a_domain_are_taken(project: Path, experts: dict[str, str]) -> None:
    data = {"up": {"files": str(project / "up.jsonl"), "rows": 5}, "down": str(project / "down.jsonl")}
    folder = train_head(head_recipe(project, experts, data=data, max_steps=2), progress=False)
    assert record_of(folder)["rows"]["train"]["domains"] == {"up": 5, "down": 24}


def test_without_a_state_cache_the_head_comes_out_the_same(project: Path, experts: dict[str, str]) -> None:
    heads = []
    for room in (0.0, 1e-9, 10.0):
        changes = {"state_cache_gb": room, "head": {"head_input": ["token", "running_mean"]}}
        recipe = head_recipe(project, experts, **changes, max_steps=5, output=str(project / f"gb{room}"))
        heads.append(read_tensors(train_head(recipe, progress=False) / "head.safetensors"))
    for name, tensor in heads[0].items():
        assert torch.equal(heads[1][name], tensor)
        torch.testing.assert_close(heads[2][name], tensor, rtol=1e-3, atol=1e-4)


def test_the_states_are_computed_once_for_all_runs(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_head(head_recipe(project, experts, max_steps=20))
    assert "head states: " in capsys.readouterr().err
    monkeypatch.setattr(XLoraForCausalLM, "compute_head_states", lambda *_: pytest.fail("computed again"))
    train_head(head_recipe(project, experts, max_steps=20, learning_rate=1e-2, output=str(project / "again")))


def test_a_weight_draws_rows_more_often(project: Path, experts: dict[str, str]) -> None:
    data = {"up": {"files": str(project / "up.jsonl"), "weight": 3.0}, "down": str(project / "down.jsonl")}
    made: list[int] = []
    plan = head_trainer.HeadTrainer.plan

    def watch(self: head_trainer.HeadTrainer, train: Any, settings: Any) -> list[int]:
        order = plan(self, train, settings)
        made.extend(train[i].domain == "up" for i in order)
        return order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_trainer.HeadTrainer, "plan", watch)
        train_head(head_recipe(project, experts, data=data, max_steps=10, valid={}), progress=False)
    assert len(made) == 40
    assert 29 <= sum(made) <= 31


def test_what_the_record_tells(project: Path, experts: dict[str, str]) -> None:
    record = record_of(train_head(head_recipe(project, experts, valid_rows=4, eval_every=20), progress=False))
    assert record["kind"] == "head"
    assert record["rows"]["valid"]["items"] == 8
    assert set(record["references"]) == {"base", "uniform", "single:up", "single:down"}
    assert set(record["references"]["single:up"]) == {"loss", "loss_up"}
    for use in record["use"].values():
        assert sum(use.values()) == pytest.approx(1.0, abs=1e-5)
    assert set(record["entropy"]) == {"up", "down"}
    assert (project / "model" / "report.html").is_file()
    assert "| domain | base | uniform | own expert | this model |" in (project / "model" / "report.md").read_text()


def test_what_does_not_fit_shows_before_the_base_is_loaded(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_base("llama", hidden_size=48, intermediate_size=64)
    other.save_pretrained(project / "other")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the base was loaded"))
    monkeypatch.setattr(training_head, "read_data", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(BaseMismatchError, match=r"expert 'up' .*: made for another base: module .* maps 32 to 32"):
        train_head(head_recipe(project, experts, base=str(project / "other")), progress=False)
    assert not (project / "model.work").exists()


# --- what makes a run another one ---


@pytest.mark.parametrize("change", ["order of experts", "order of data", "null", "base"])
def test_a_run_that_means_something_else_is_not_the_same(
    project: Path, experts: dict[str, str], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "base", project / "own")
    recipe = head_recipe(project, experts, max_steps=2, valid={}, base=str(project / "own"))
    train_head(recipe, progress=False)
    train_head(recipe)
    assert "trained already" in capsys.readouterr().err
    other = recipe.model_dump(exclude_unset=True)
    if change == "base":
        weights = read_tensors(project / "own" / "model.safetensors")
        write_tensors(project / "own" / "model.safetensors", {k: v * 1.1 for k, v in weights.items()})
    elif change == "null":
        other["data"]["up"]["expert"] = None
    else:
        key = change.removeprefix("order of ")
        other[key] = dict(reversed(other[key].items()))
    folder = train_head(HeadRecipe(**other))
    shown = capsys.readouterr().err
    assert "training again, for what changed" in shown
    if change == "order of experts":
        assert XLoraForCausalLM.from_pretrained(folder).experts == ("down", "up")


def test_an_output_that_would_swallow_something_is_refused(project: Path, experts: dict[str, str]) -> None:
    up = shutil.copytree(experts["up"], project / "up")
    with pytest.raises(RecipeError, match=r"output: expected another folder than that of experts.up"):
        train_head(head_recipe(project, experts | {"up": str(up)}, output=str(up)), progress=False)
    with pytest.raises(RecipeError, match=r"output: expected a new folder, or one of an earlier head, found an expert"):
        train_head(head_recipe(project, experts, output=str(up)), progress=False)
    with pytest.raises(RecipeError, match=r"output: expected a folder, found the file .*up.jsonl"):
        train_head(head_recipe(project, experts, output=str(project / "up.jsonl")), progress=False)
    assert (up / "adapter_model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_named(
    project: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "file").write_text("")
    monkeypatch.setenv("XLOOM_CACHE", str(project / "file" / "x"))
    with pytest.raises(CheckpointError, match=r"file/x/rows: cannot be written: Not a directory \(see XLOOM_CACHE"):
        train_head(head_recipe(project, experts), progress=False)


def test_the_same_text_with_another_completion_has_losses_of_its_own(project: Path, experts: dict[str, str]) -> None:
    found = []
    for number, cut in enumerate((3, 6, 3)):
        text = "abcdefghij"
        write_rows(project / "cut.jsonl", [{"prompt": text[:cut], "completion": text[cut:]}])
        changes = {"valid": {"up": str(project / "cut.jsonl")}, "max_steps": 1, "output": str(project / f"m{number}")}
        found.append(record_of(train_head(head_recipe(project, experts, **changes), progress=False))["references"])
    assert found[0] == found[2]
    assert found[0]["base"]["loss"] != pytest.approx(found[1]["base"]["loss"], rel=1e-3)


def test_a_head_without_softmax_has_no_entropy(project: Path, experts: dict[str, str]) -> None:
    folder = train_head(head_recipe(project, experts, head={"enable_softmax": False}, max_steps=3), progress=False)
    assert record_of(folder)["entropy"] == {}
    assert "NaN" not in (folder / "training.json").read_text()


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}])
def test_experts_of_different_kinds_are_trained_together(
    project: Path, experts: dict[str, str], kind: dict[str, bool]
) -> None:
    base = tiny_base("llama")
    other = make_expert(base, project / "other", r=2, target_modules=["q_proj"], **kind)
    for name, paths in (("a", {"up": experts["up"], "down": other}), ("b", {"up": other, "down": experts["down"]})):
        folder = train_head(head_recipe(project, paths, max_steps=2, output=str(project / name)), progress=False)
        assert XLoraForCausalLM.from_pretrained(folder).experts == ("up", "down")


def test_a_quantised_base_comes_back_quantised(project: Path, experts: dict[str, str]) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra 'quantised'")
    folder = train_head(head_recipe(project, experts, quantisation="4bit", max_steps=4), progress=False)
    model = XLoraForCausalLM.from_pretrained(folder)
    assert "Linear4bit" in {type(site.base).__name__ for site in model.mixture.sites}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums = [0.0, 0]
    for name in ("up", "down"):
        for example in read_examples({name: [project / f"{name}-valid.jsonl"]}, tokenizer, 512).items:
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                losses = objective.token_losses(model(ids, use_cache=False).logits, ids)
            sums[0] += losses[0, example.completion_start - 1 :].sum().item()
            sums[1] += example.completion_tokens
    assert sums[0] / sums[1] == pytest.approx(record_of(folder)["validation"]["loss"], rel=2e-3)

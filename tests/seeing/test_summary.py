"""A summary by layer, kind and class against direct means; and of a planted router, whose numbers are known."""

import math

import pytest
import torch
from planted import Planted, tiny_model

from random_traces import EXPERTS, SITES, random_tokens, random_trace
from toy import tiny_tokenizer
from xloom.errors import TraceError, TraceMismatchError
from xloom.seeing import Place, places, statistics, summarise, summarise_by, trace_text, trajectory
from xloom.trace import About, Trace


def test_places_of_sites():
    found = places(
        ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.down_proj", "lm_head", "model.embed_tokens"]
    )
    assert found == [Place(0, "q_proj"), Place(12, "down_proj"), Place(None, "lm_head"), Place(None, "embed_tokens")]
    assert places(["transformer.h.3.attn.c_proj", "transformer.h.3.mlp.c_proj", "transformer.h.3.mlp.c_fc"]) == [
        Place(3, "attn.c_proj"), Place(3, "mlp.c_proj"), Place(3, "c_fc"),
    ]  # fmt: skip
    assert places(["0", "1"]) == [Place(0, ""), Place(1, "")], "sites of a log are numbers"


@pytest.mark.parametrize("total", [1.0, 0.6, 2.5])
def test_every_grouping_is_a_mean_over_its_cells(total: float):
    trace = random_trace(30, seed=4, answer=9, total=total)
    summary = summarise(trace)
    assert summary.columns == (*EXPERTS, "base")
    shares = statistics.shares(trace.scalings[1:])
    classes = summary_classes(trace)
    torch.testing.assert_close(summary.share().values[0], shares.mean(dim=(0, 1)))
    torch.testing.assert_close(summary.dominance().values[0], statistics.dominance(shares))
    torch.testing.assert_close(summary.weight().values[0], trace.scalings[1:].double().mean(dim=(0, 1)))
    for of, chosen in classes.items():
        assert summary.tokens(of) == len(chosen)
        some = shares[chosen]
        for layer in range(3):
            here = summary.share("layer", of)
            torch.testing.assert_close(here.values[layer], some[:, 2 * layer : 2 * layer + 2].mean(dim=(0, 1)))
            assert here[str(layer), "mech"] == here.values[layer, 1].item()
            mixed = summary.mixedness("layer", of)[str(layer), "entropy"]
            assert mixed == pytest.approx(statistics.entropy(some[:, 2 * layer : 2 * layer + 2]).mean().item())
        kinds = summary.share("kind", of)
        assert kinds.rows == ("q_proj", "down_proj")
        torch.testing.assert_close(kinds.values[1], some[:, 1::2].mean(dim=(0, 1)))
        sites = summary.share("site", of)
        assert sites.rows == SITES
        torch.testing.assert_close(sites.values, some.mean(dim=0))
        diversity = summary.diversity("layer", of).values[1, 0].item()
        assert diversity == pytest.approx(math.exp(statistics.entropy(some[:, 2:4].mean(dim=(0, 1))).item()))
        torch.testing.assert_close(summary.co_use(of).values, statistics.co_use(some))
        torch.testing.assert_close(summary.co_use(of, within="token").values, statistics.co_use(some.mean(dim=1)))
    table = summary.by_class()
    assert set(table.rows) == set(classes)
    for of, values in zip(table.rows, table.values, strict=True):
        torch.testing.assert_close(values, shares[classes[of]].mean(dim=(0, 1)))


def summary_classes(trace: Trace) -> dict[str, list[int]]:
    """Places of the tokens of each class among those with scalings."""
    found: dict[str, list[int]] = {"all": list(range(len(trace) - 1))}
    for at in range(1, len(trace)):
        special, answer = bool(trace.tokens.special[at]), bool(trace.tokens.answer[at])
        found.setdefault("special" if special else "answer" if answer else "prompt", []).append(at - 1)
    assert set(found) == {"all", "special", "answer", "prompt"}
    return found


def test_several_traces_count_token_by_token(monkeypatch):
    """Whatever the blocks are that they are read in."""
    traces = [random_trace(count, seed=count) for count in (9, 20, 33)]
    whole = summarise(traces)
    monkeypatch.setattr(Trace, "blocks", lambda trace, tokens=4: (trace[i : i + 4] for i in range(0, len(trace), 4)))
    pieces = summarise(iter(traces))
    scalings = torch.cat([trace.scalings[1:] for trace in traces])
    torch.testing.assert_close(whole.share().values[0], statistics.shares(scalings).mean(dim=(0, 1)))
    for name, means in whole.classes.items():
        for one, other in zip(means, pieces.classes[name], strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_classes_of_ones_own():
    trace = random_trace(10, seed=2)
    summary = summarise(trace, classes=lambda trace: ["even" if at % 2 == 0 else None for at in range(len(trace))])
    assert set(summary.classes) == {"all", "even"}
    assert summary.tokens("even") == 4
    expected = statistics.shares(trace.scalings[[2, 4, 6, 8]]).mean(dim=(0, 1))
    torch.testing.assert_close(summary.share(of="even").values[0], expected)
    with pytest.raises(TraceError, match="for each of 10 tokens, found 1"):
        summarise(trace, classes=lambda trace: ["a"])
    with pytest.raises(TraceError, match="no class of tokens named 'odd'; there are all, even"):
        summary.share(of="odd")
    with pytest.raises(TraceError, match="by: expected one of layer, kind, site"):
        summary.share("depth")


def test_by_metadata():
    traces = [random_trace(8, seed=seed, domain=domain) for seed, domain in enumerate("aab")]
    found = summarise_by(traces, "domain")
    assert {name: summary.tokens() for name, summary in found.items()} == {"a": 14, "b": 7}
    with pytest.raises(TraceError, match="'split' of every trace, found domain"):
        summarise_by(traces, "split")


def test_what_does_not_go_together():
    other = Trace(random_tokens(4), torch.zeros(4, 6, 2), About(SITES, ("a", "b")))
    with pytest.raises(TraceMismatchError):
        summarise([random_trace(), other])
    with pytest.raises(TraceError, match="found none"):
        summarise([])
    alone = summarise(random_trace(1))
    assert alone.tokens() == 0
    assert alone.by_class().values.shape == (0, 4)


def test_json_is_json():
    import json

    value = summarise(random_trace(12)).as_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["classes"]["all"]["layer"]["share"]["rows"] == ["0", "1", "2"]


def test_a_planted_router(tmp_path):
    """Three parts: chem alone; then mech, with prot at layer 0; then the base with a quarter of prot."""

    def plan(place: int, layer: int) -> list[float]:
        if place < 10:
            return [1.0, 0.0, 0.0]
        if place < 26:
            return [0.0, 0.75, 0.25] if layer == 0 else [0.0, 1.0, 0.0]
        return [0.0, 0.0, 0.25]

    model = tiny_model(tmp_path)
    with model.routing(Planted(plan)):
        trace = trace_text(model, tiny_tokenizer(), "abcdefghijklmnopqrst", max_new_tokens=21)
    assert len(trace) == 41  # 40 places: 10, 16 and 14 of each part
    summary = summarise(trace)
    layer_0 = sum(place.layer == 0 for place in places(trace.sites)) / len(trace.sites)
    share = summary.share()
    assert share["all", "chem"] == pytest.approx(10 / 40)
    assert share["all", "mech"] == pytest.approx(16 / 40 * (1 - layer_0 / 4))
    assert share["all", "prot"] == pytest.approx(16 / 40 * layer_0 / 4 + 14 / 40 / 4)
    assert share["all", "base"] == pytest.approx(14 / 40 * 3 / 4)
    assert summary.dominance().values[0].tolist() == pytest.approx([10 / 40, 16 / 40, 0, 14 / 40])
    assert summary.share("layer")["0", "prot"] == pytest.approx(16 / 40 / 4 + 14 / 40 / 4)
    assert summary.share("layer")["1", "mech"] == pytest.approx(16 / 40)
    assert summary.co_use()["mech", "prot"] == pytest.approx(16 / 40 * layer_0 * 0.75 * 0.25)
    assert summary.co_use()["chem", "mech"] == 0
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert summary.mixedness("layer")["1", "entropy"] == pytest.approx(14 / 40 * quarter)
    segments = trajectory(trace)
    assert [(one.start, one.stop, one.leader) for one in segments] == [
        (1, 11, "chem"),
        (11, 27, "mech"),
        (27, 41, "base"),
    ]
    torch.testing.assert_close(segments[2].share_C, torch.tensor([0, 0, 0.25, 0.75], dtype=torch.float64))

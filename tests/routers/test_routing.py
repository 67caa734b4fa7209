"""`Routing`: a value with a line for each row; rows of different kinds share a batch and are as they are alone."""

import copy
import dataclasses
import itertools

import pytest
import torch

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, routers
from xloom.errors import ConfigError, ScalingsShapeError, UnknownExpertError
from xloom.routers import Routing

NAMES = ("chem", "mech", "prot")
FORMS = {
    "two passes": {"global_scaling_weight": 1.3},
    "pooled": {"head_input": ["token", "ema:4"], "null_expert": True},
    "early gate": {"gate_at_layer": 1, "head_input": "running_mean", "drop_sites_below_gate": True},
}
KINDS = {
    "head": routers.XLora(),
    "masked": routers.XLora(without=["chem"]),
    "biased": routers.XLora(bias={"prot": 2.0}),
    "cold": routers.XLora(temperature=0.3, global_weight=0.5),
    "top 2": routers.XLora(top_k=2),
    "top 2, renormalised": routers.XLora(top_k=2, renormalise=True),
    "base": routers.BaseOnly(),
    "single": routers.Single("mech"),
    "fixed": routers.Fixed({"chem": 0.5, "prot": -1.0}),
    "arrow": routers.Arrow(),
    "spectr": routers.SpectR(top_k=1),
}


@pytest.fixture(params=FORMS)
def model(request, llama, expert_paths) -> XLoraForCausalLM:
    made = XLoraForCausalLM.from_experts(llama, expert_paths, layerwise_scalings=True, **FORMS[request.param])
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.normal_(0, 0.5)
    return made


@torch.no_grad()
def check_rows(model: XLoraForCausalLM, kinds: list[routers.Router], tolerance: float = 1e-4) -> None:
    """Logits and scalings of every row in one batch, left-padded, are those of the row alone."""
    ids, mask = prompt(len(kinds), 7), torch.ones(len(kinds), 7, dtype=torch.long)
    for row in range(len(kinds)):
        mask[row, : row % 3] = 0
    together = model(ids, attention_mask=mask, routing=kinds, **model.positions(mask))
    for row, kind in enumerate(kinds):
        start = row % 3
        alone = model(ids[row : row + 1, start:], routing=kind)
        torch.testing.assert_close(together.logits[row, start:], alone.logits[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(together.scalings[row, start:], alone.scalings[0], rtol=0, atol=1e-5)


def test_every_pair_of_kinds_in_one_batch(model):
    for one, other in itertools.combinations(KINDS.values(), 2):
        check_rows(model, [one, other])


def test_all_kinds_in_one_batch(model):
    check_rows(model, [*KINDS.values(), *reversed(KINDS.values())])


@pytest.mark.parametrize("kind", ["opt", "gpt2", "falcon", "qwen3_moe"])
def test_in_other_architectures(kind, tmp_path):
    """opt hands its MLP [B*T, I]."""
    base = tiny_base(kind)
    targets = {"opt": ["q_proj", "fc1"], "qwen3_moe": ["q_proj", "v_proj"]}.get(kind, "all-linear")
    paths = {n: make_expert(base, tmp_path / n, i, r=2, target_modules=targets) for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True, global_scaling_weight=0.8)
    kinds = [routers.XLora(), routers.Arrow(), routers.Single("b"), routers.BaseOnly(), routers.SpectR()]
    check_rows(model, kinds, tolerance=1e-3)
    arrow = model.routing_of(routers.Arrow())
    check_rows(model, [arrow.weighed(0.5), arrow, arrow.weighed(2.0)], tolerance=1e-3)


@torch.no_grad()
def test_texts_of_rows_that_differ(model):
    """Greedy, by beams and in several answers; the cache of each row goes on as it would alone."""
    kinds = list(KINDS.values())
    ids = prompt(len(kinds), 6)
    for options in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        options = options | {"max_new_tokens": 6, "do_sample": False}
        together = model.generate(ids, routing=kinds, **options)
        alone = [model.generate(ids[i : i + 1], routing=kind, **options) for i, kind in enumerate(kinds)]
        assert torch.equal(together, torch.cat(alone))


def test_gradients_of_the_head_flow_from_its_own_rows(model):
    ids = prompt(3, 6)

    def gradient(rows: list[int], routing) -> torch.Tensor:
        model.zero_grad()
        out = model(ids[rows], routing=routing, use_cache=False)
        out.logits.logsumexp(-1).square().sum().backward()
        return model.head.linears[0].weight.grad.clone()

    expected = gradient([0], routers.XLora()) + gradient([2], routers.XLora(without=["mech"]))
    found = gradient([0, 1, 2], [routers.XLora(), routers.Single("chem"), routers.XLora(without=["mech"])])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- the value ---


def test_lines_are_taken_joined_and_repeated(model):
    one = model.routing_of([routers.XLora(), routers.Single("chem"), routers.Arrow()])
    assert len(one) == 3
    assert one[[2, 0]].lines == (one.lines[2], one.lines[0])
    assert one[1:].lines == one.lines[1:]
    assert Routing.cat([one[:1], one[1:]]) == one
    assert one.repeat(2).lines == tuple(line for line in one.lines for _ in range(2))
    assert one.for_rows(3) is one
    assert one[1] == one[1:2] and [*one] == [one[0], one[1], one[2]]
    single = model.routing_of(routers.Uniform())
    assert single.for_rows(7) is single
    assert model.routing_of(one) is one
    assert copy.deepcopy(one) is one
    assert one.reads_head and not one[1:].reads_head
    assert model.routing_of(routers.Fixed({"chem": 0.0})).adds_nothing


def test_lines_compare_by_what_they_say(model):
    def of(router: routers.Router) -> Routing:
        return model.routing_of(router)

    assert of(routers.Single("chem")) == of(routers.Fixed({"chem": 1.0})) == of(routers.Oracle(["chem"]))
    assert of(routers.XLora(without=["mech"])) == of(routers.XLora(only=["chem", "prot"]))
    assert of(routers.Single("chem")) != of(routers.Single("mech"))
    assert of(routers.XLora()) != of(routers.XLora(top_k=1))
    assert len({of(routers.BaseOnly()), of(routers.BaseOnly()), of(routers.Uniform())}) == 2
    with pytest.raises(AttributeError):
        of(routers.Uniform()).lines = ()


def test_what_is_refused(model):
    ids = prompt(2, 4)
    for wrong, said in [
        (["chem", "mech"], "row 0: expected a router.*'chem'"),
        ("chem", "expected a router.*'chem'"),
        (3, "expected a router.*found 3"),
        ([routers.PerRow(torch.eye(3))], "row 0: expected one line, found 3"),
        ([], "at least one line, found none"),
    ]:
        with pytest.raises(ConfigError, match=said):
            model(ids, routing=wrong)
    with pytest.raises(ScalingsShapeError, match="3 rows.*batch of 2"):
        model(ids, routing=[routers.XLora()] * 3)
    with pytest.raises(UnknownExpertError, match="'cem'.*chem, mech, prot"):
        model.generate(ids, routing=[routers.XLora(), routers.Single("cem")], max_new_tokens=2)
    with pytest.raises(UnknownExpertError, match="'cem'"):
        model.stream(ids[:1], routing=routers.XLora(only=["cem"]))
    nan = float("nan")
    for setting in (
        {"top_k": 0}, {"top_k": 1.5}, {"temperature": 0.0}, {"temperature": "x"}, {"temperature": nan},
        {"global_weight": nan}, {"global_weight": "x"}, {"bias": {"chem": None}}, {"bias": {"chem": nan}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(setting))):
            routers.XLora(**setting)
    for wrong in ({"chem": nan}, {"chem": "x"}, ["chem"]):
        with pytest.raises(ConfigError, match="Fixed: "):
            routers.Fixed(wrong)
    for wrong in ([[1, 0, 0]], torch.tensor([[nan, 0, 0]])):
        with pytest.raises(ConfigError, match="PerRow: "):
            routers.PerRow(wrong)
    with pytest.raises(ConfigError, match="expected a router.*'chem'"), model.routing("chem"):
        pass
    for wrong in ({"without": "chem"}, {"only": "chem"}):
        with pytest.raises(ConfigError, match="expected a list of experts' names, found 'chem'"):
            routers.XLora(**wrong)
    with pytest.raises(ConfigError, match="router: no such argument; expected routing="):
        model(ids, router=routers.Uniform())
    with pytest.raises(ConfigError, match="generator: expected do_sample=True, found False"):
        model.stream(ids[:1], generator=torch.Generator(), max_new_tokens=2)
    with pytest.raises(UnknownExpertError, match="'chm'.*did you mean 'chem'"):
        model(ids, routing=routers.Single("chm"))


def test_a_routing_of_another_model(model, expert_paths):
    two = {name: path for name, path in expert_paths.items() if name != "prot"}
    other = XLoraForCausalLM.from_experts(model.plain_base(), two)
    for router in (routers.Uniform(), routers.XLora(without=["chem"]), routers.XLora(bias={"chem": 1.0})):
        for routing in (other.routing_of(router), [other.routing_of(router)]):
            with pytest.raises(ConfigError, match="model of 2 experts, this one has 3"):
                model(prompt(1, 3), routing=routing)


def test_a_routing_of_several_rows_is_no_stream(model):
    with pytest.raises(ScalingsShapeError, match="2 rows.*batch of 1"):
        list(model.stream(prompt(1, 4), routing=[routers.XLora()] * 2, max_new_tokens=2))


@dataclasses.dataclass
class Alike(routers.SiteRouter):
    number: int

    def scalings(self, site, x):
        return None


def test_a_site_router_equals_itself_alone(model):
    with pytest.raises(ConfigError, match="router Alike.*eq=False"):
        model(prompt(1, 4), routing=Alike(1))


class Odd(routers.SiteRouter):
    def __init__(self, experts: int) -> None:
        self.experts = experts

    def scalings(self, site, x):
        return torch.ones(*x.shape[:-1], self.experts)


def test_a_router_that_answers_for_others(model):
    for routing in (Odd(2), [Odd(2), routers.XLora()]):
        with pytest.raises(ScalingsShapeError, match=r"site .*: 2 scalings per token for 3 experts"):
            model(prompt(2, 4), routing=routing)
    for answer in (torch.ones(3), torch.ones(1, 1, 3), torch.ones(2, 3, 3)):
        for routing in (Says(answer), [Says(answer), routers.XLora()]):
            with pytest.raises(ScalingsShapeError, match=r"site .*: scalings for .*tokens"):
                model(prompt(2, 4), routing=routing)
    with pytest.raises(ScalingsShapeError, match="as a tensor"):
        model(prompt(2, 4), routing=Says(0.5))


class Says(routers.SiteRouter):
    def __init__(self, answer) -> None:
        self.answer = answer

    def scalings(self, site, x):
        return self.answer


@torch.no_grad()
def test_reported_scalings_are_not_rounded_by_a_neighbour(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(copy.deepcopy(llama).bfloat16(), expert_paths, layerwise_scalings=True)
    ids = prompt(2, 5)
    alone = model(ids[:1]).scalings
    together = model(ids, routing=[routers.XLora(), routers.Arrow()]).scalings
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


# --- the head's settings are those of the config ---


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"top_k": 2}, {"top_k_lora": 2}),
        ({"top_k": 2, "renormalise": True}, {"top_k_lora": 2, "enable_softmax_topk": True}),
        ({"temperature": 0.4}, {"softmax_temperature": 0.4}),
        ({"global_weight": 0.6}, {"global_scaling_weight": 0.6}),
    ],
)
@torch.no_grad()
def test_settings_are_those_of_the_config(llama, expert_paths, setting, field):
    plain = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths, layerwise_scalings=True)
    other = XLoraForCausalLM.from_experts(copy.deepcopy(llama), expert_paths, layerwise_scalings=True, **field)
    other.head.load_state_dict(plain.head.state_dict())
    ids = prompt(2, 6)
    found, expected = plain(ids, routing=routers.XLora(**setting)), other(ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.scalings, expected.scalings)
    assert not torch.equal(plain(ids).logits, found.logits)


@torch.no_grad()
def test_a_top_k_beyond_the_experts_keeps_all(model):
    ids = prompt(1, 5)
    assert torch.equal(model(ids, routing=routers.XLora(top_k=99)).scalings, model(ids).scalings)


@torch.no_grad()
def test_the_head_s_logits(model):
    ids = prompt(2, 5)
    assert model(ids).head_logits is None
    out = model(ids, output_head_logits=True)
    columns = 3 + model.config.null_expert
    assert out.head_logits.shape == (2, 5, len(model.sites), columns)
    torch.testing.assert_close(out.head_logits.softmax(-1)[..., :3], out.scalings)
    assert model(ids, output_head_logits=True, routing=routers.Uniform()).head_logits is None

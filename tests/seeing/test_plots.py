"""Pictures show the numbers of the traces they are made from; the same trace gives the same bytes."""

import pytest
import torch

from xloom.errors import ConfigError, TraceError
from xloom.seeing import BASE, curve, plots, summarise, trajectory
from xloom.trace import About, Tokens, Trace

EXPERTS = ("chem", "mech", "words")
SITES = tuple(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qv")


@pytest.fixture
def trace() -> Trace:
    torch.manual_seed(3)
    texts = ["Hello", " $x_1$ wor", "ld\nand ", "a very long piece of text " * 5, "<end>", "yes"]
    scalings = torch.rand(6, len(SITES), len(EXPERTS)).softmax(-1) * 0.9
    scalings[0] = torch.nan
    roles = ["user"] * 4 + ["assistant"] * 2
    tokens = Tokens.make(range(6), texts, answer=[False] * 4 + [True] * 2, turns=[0] * 4 + [1] * 2, roles=roles)
    return Trace(tokens, scalings, About(SITES, EXPERTS))


def test_maps_hold_the_shares(trace: Trace):
    summary = summarise(trace)
    for figure, table in (
        (plots.layers(summary), summary.share("layer")),
        (plots.kinds(summary, of="answer"), summary.share("kind", "answer")),
    ):
        axes = figure.axes[0]
        shown = torch.tensor(axes.images[0].get_array().tolist(), dtype=torch.float64)
        torch.testing.assert_close(shown, table.values.T)
        assert [label.get_text() for label in axes.get_yticklabels()] == [*EXPERTS, BASE]
        assert [label.get_text() for label in axes.get_xticklabels()] == list(table.rows)


def test_bars_and_areas_are_the_shares(trace: Trace):
    summary = summarise(trace)
    bars = plots.groups({"one": summary, "two": summarise(trace[2:])}).axes[0].patches
    assert [round(bar.get_width(), 6) for bar in bars[:4]] == [round(v, 6) for v in summary.share().values[0].tolist()]
    areas = plots.timeline(trace).axes[0].patches
    tops = torch.tensor([area.get_data().values.tolist() for area in areas], dtype=torch.float64)
    torch.testing.assert_close(tops, curve(trace).nan_to_num(0.0).cumsum(dim=1).T)
    assert len(areas) == len(EXPERTS) + 1
    cuts = list(plots.timeline(trace, trajectory(trace, penalty=0.0, minimum=1)).axes[0].lines)
    assert len(cuts) == 4 + 2  # five tokens have scalings, and there are two turns


def test_depth_is_between_one_and_the_number_of_experts(trace: Trace):
    mixed, used = (line.get_ydata() for line in plots.depth(summarise(trace)).axes[0].lines)
    assert all(1 <= a <= b <= len(EXPERTS) + 1 for a, b in zip(mixed, used, strict=True))


def test_co_use_has_a_disc_for_everyone_and_a_line_for_every_pair(trace: Trace):
    axes = plots.co_use(summarise(trace)).axes[0]
    assert len(axes.patches) == len(EXPERTS) + 1
    assert len(axes.lines) == 6


def test_the_ribbon_is_the_text(trace: Trace):
    axes = plots.ribbon(trace).axes[0]
    shown = "".join(text.get_text() for text in axes.texts)
    assert " " not in shown, "SVG leaves out spaces at the ends of a text"
    assert shown.replace("\u00a0", " ") == trace.text.replace("\n", "")
    for text in axes.texts:
        assert text.get_position()[0] + len(text.get_text()) <= 92
    assert axes.texts[0].get_text() == "Hello"
    assert len(axes.patches) == len(axes.texts) - 1  # the first token was written by nobody


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_saved_twice_is_the_same(trace: Trace, tmp_path, ending: str):
    for number in (1, 2):
        plots.save(plots.ribbon(trace), tmp_path / f"{number}" / f"a{ending}")
    assert (tmp_path / "1" / f"a{ending}").read_bytes() == (tmp_path / "2" / f"a{ending}").read_bytes()
    if ending == ".svg":
        assert "Hello" in (tmp_path / "1" / "a.svg").read_text()


def test_looks_differ():
    many = [f"e{i}" for i in range(20)]
    looks = {(look["facecolor"], look["hatch"]) for look in (plots.look(name, many) for name in [*many, BASE])}
    assert len(looks) == 21


def test_refusals(trace: Trace, tmp_path):
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        plots.save(plots.ribbon(trace), tmp_path / "a.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        plots.save(plots.ribbon(trace), tmp_path / "file" / "a.png")
    with pytest.raises(TraceError, match="summaries to draw, found none"):
        plots.groups({})

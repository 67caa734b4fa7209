"""What notebooks show of traces and steps: what it says is what the trace holds, and no text of a model is markup."""

import math
from html.parser import HTMLParser

import pytest
import torch

from random_traces import EXPERTS, SITES, random_trace
from xloom.decoding import Step
from xloom.trace import About, Tokens, Trace
from xloom.trace.html import SHOWN
from xloom.trace.shares import BLOCKS, DIGITS, bands, bars, leaders, shares

NASTY = [
    "<script>alert(1)</script>",
    "</div><img src=x onerror=y>",
    "&amp;",
    '" onmouseover="z',
    "a\x1b[31mb",
    "\ud800",
]


class Reader(HTMLParser):
    """Tags, attributes and text, as a browser would have them; void tags are refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.tags[-1][1], data))


def trace_of(texts: list[str], experts=EXPERTS, **about) -> Trace:
    torch.manual_seed(1)
    scalings = torch.randn(len(texts), len(SITES), len(experts)).softmax(dim=-1)
    scalings[0] = torch.nan
    logprobs = [math.nan] + [-0.5] * (len(texts) - 1)
    return Trace(Tokens.make(range(len(texts)), texts, logprobs=logprobs), scalings, About(SITES, experts, **about))


def check_plain(page: str, nasty_in: str) -> Reader:
    """Only tags and attributes of ours, and the texts as they are."""
    read = Reader(page)
    assert {tag for tag, _ in read.tags} <= {"div", "span", "table", "tr", "td", "b"}
    assert {name for _, attributes in read.tags for name in attributes} <= {"style", "title", "class"}
    shown = "".join(text for _, text in read.text)
    for text in NASTY[:4]:
        assert text in shown + "".join(str(a.get("title")) for _, a in read.tags), nasty_in
    page.encode("utf-8")  # a lone surrogate could not be
    assert "\x1b" not in page
    return read


def test_texts_and_names_are_escaped():
    page = trace_of(["x", *NASTY])._repr_html_()
    read = check_plain(page, "texts")
    assert [text for attributes, text in read.text if "title" in attributes][:4] == NASTY[:4]
    check_plain(trace_of(["x", "y", "z"], experts=tuple(NASTY))._repr_html_(), "experts")
    check_plain(trace_of(["x", "y"], model=" ".join(NASTY))._repr_html_(), "model")
    step = Step(3, "".join(NASTY), -0.5, torch.rand(4, 3).softmax(-1), True, tuple(NASTY[:3]))
    assert NASTY[0] not in step._repr_html_()
    check_plain(step._repr_html_() + Step(3, "".join(NASTY), -0.5, torch.rand(4, 3), True)._repr_html_(), "a step")


def test_it_brings_its_own_colours_only_and_loads_nothing():
    """No colour of text and no opaque ground: those are the notebook's, dark or light."""
    page = random_trace(30)._repr_html_()
    for _, attributes in Reader(page).tags:
        for rule in filter(None, str(attributes.get("style") or "").split(";")):
            name, _, value = rule.partition(":")
            assert name != "color" or value == "inherit"
            if name == "background":
                assert value == "none" or len(value) == len("#rrggbbaa")
    (table,) = (attributes["style"] for tag, attributes in Reader(page).tags if tag == "table")
    assert "color:inherit" in table and "font:inherit" in table, "or a page without a doctype shows it black"
    assert not any(word in page for word in ("http", "url(", "<style", "<script", "src="))


def test_titles_say_what_the_trace_holds():
    trace = random_trace(40, seed=3)
    read = Reader(trace._repr_html_())
    titled = [attributes for tag, attributes in read.tags if "title" in attributes]
    mean_TC = shares(trace.scalings).mean(dim=1)
    assert len(titled) == 39, "the first token was not predicted"
    for place, attributes in enumerate(titled, 1):
        leader = int(leaders(mean_TC[place]))
        title = str(attributes["title"])
        assert title.startswith(f"{EXPERTS[leader]} {mean_TC[place, leader]:.0%}")
        assert title.endswith(f"probability {math.exp(trace.tokens.logprobs[place]):.0%}")
    shown = "".join(text for _, text in read.text)
    led = leaders(mean_TC[1:])
    for at, expert in enumerate(EXPERTS):
        assert f"{mean_TC[1:, at].mean():.0%}, leads {(led == at).double().mean():.0%}" in shown
        assert expert in shown
    assert "base" not in shown, "a softmax leaves nothing to it"
    assert "base" in "".join(text for _, text in Reader(random_trace(9, total=0.5)._repr_html_()).text)


def test_long_and_short_texts(tmp_path):
    random_trace(5000).save(tmp_path / "t", part_tokens=700)
    trace = Trace.load(tmp_path / "t")
    page = trace._repr_html_()
    assert f"… {5000 - 2 * SHOWN:,} tokens …" in page
    assert page.count("title=") == 2 * SHOWN - 1
    assert len(page) < 100_000
    share_C = shares(trace.scalings[1:]).mean(dim=(0, 1))
    assert all(f"{share:.0%}, leads" in page for share in share_C[:3].tolist()), "the lines are of all tokens"
    assert "tokens …" not in random_trace(2 * SHOWN)._repr_html_()
    for count in (0, 1):
        assert f"{count} tokens" in random_trace(count, answer=0)._repr_html_()


def test_short_words():
    torch.manual_seed(0)
    step = Step(7, " the", -0.25, torch.tensor([[0.7, 0.2, 0.1]] * 6), False, EXPERTS)
    assert repr(step) == "Step(' the', id 7, logprob -0.250, 6 x 3 scalings: chem leads with 70%)"
    assert step == (7, " the", -0.25, step.scalings, False, EXPERTS)
    nameless = Step(7, "", -0.25, torch.zeros(6, 3), True)
    assert repr(nameless).endswith("base leads with 100%, from a draft)")
    assert "expert 2" in Step(7, "", -0.25, torch.rand(6, 3), True)._repr_html_()
    assert len(repr(random_trace(500).tokens)) < 120
    assert len(repr(random_trace(500))) < 160


def test_more_experts_than_colours_are_told_apart():
    experts = tuple(f"e{n}" for n in range(20))
    read = Reader(trace_of(["x"] * 9, experts=experts)._repr_html_())
    lines = {text: attributes["style"] for attributes, text in read.text if text in experts}
    assert len(set(lines.values())) == 20


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        ([1.0, 2.0, 3.0], 3, [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], 9, [1.0, 2.0, 3.0]),
        ([1.0, 3.0, 5.0, 7.0], 2, [2.0, 6.0]),
        ([1.0, 3.0, 5.0, 7.0, 9.0], 3, [2.0, 6.0, 9.0]),
        ([1.0, 3.0, 5.0], 1, [3.0]),
        ([1.0, 3.0], 0, [2.0]),
    ],
)
def test_bands(rows, most: int, expected):
    assert bands(torch.tensor(rows)[:, None], most)[:, 0].tolist() == expected


def test_bars():
    assert bars([0, 0.5, 1, 2, -1, math.nan], 1.0) == "·▄██··"
    assert bars([0, 0.25, 0.5], 0.5, DIGITS) == ".49"
    assert bars([0.0, 0.0], 0.0) == "··"
    assert len(BLOCKS) == 9, "eight heights, and nothing"

"""The page's numbers are those of the traces, and nothing in it is anything but the page's own."""

import base64
import hashlib
import json
import math
import re
import sys

import pytest
import torch
from pages import EXPERTS, HOSTILE, SITES, findings, random_tokens, random_trace, unpacked

import xloom.report.html as html
from xloom.errors import ConfigError, MissingExtraError, TraceError, TraceMismatchError
from xloom.report import Findings, write_report
from xloom.report.maps import PRECISION, as_bytes, bands, share_map, slim
from xloom.report.numbers import page_data, title_of
from xloom.seeing import difference, shares, summarise
from xloom.trace import About, Trace

SHIPPED = [
    f"model.layers.{layer}.{kind}_proj" for layer in range(30) for kind in ("q", "k", "v", "o", "up", "gate", "down")
]


# --- maps ---


def test_maps_are_means_over_sites():
    trace = random_trace(total=0.7)
    found = share_map(trace)
    assert bands(trace.sites) == ("all", "0", "1", "2")
    share_TSC = shares(trace.scalings)
    for t in range(1, len(trace)):
        for k, sites in enumerate([range(6), (0, 1), (2, 3), (4, 5)]):
            expected = sum(share_TSC[t, s] for s in sites) / len(sites)
            torch.testing.assert_close(found[t, k].double(), expected, rtol=0, atol=1e-6)
    assert found[0].isnan().all()
    assert (as_bytes(found)[1:].double() / 255 - found[1:].double()).abs().max() <= PRECISION + 1e-7
    assert not as_bytes(found)[0].any()


@pytest.mark.parametrize("total", [0.6, 1.0, 1.5])
def test_slim_traces_differ_as_whole_ones_do(total):
    first, second = random_trace(40, 1, total=total), random_trace(30, 2, total=total)
    whole, thin = difference(first, second), difference(*(slim(share_map(one), one) for one in (first, second)))
    for name in whole.shares:
        for a, b in zip(whole.shares[name], thin.shares[name], strict=True):
            assert a == pytest.approx(b, abs=1.5e-3)


# --- numbers ---


@pytest.mark.parametrize("total", [1.0, 0.6])
def test_numbers_are_those_of_the_traces(total):
    given = findings(total=total, against=True)
    data, maps = page_data(given)
    columns = [*EXPERTS, *(["base"] if total < 1 else [])]
    assert data["columns"] == columns
    json.dumps(data, allow_nan=False)
    everything = [*given.traces, *given.against]
    assert [text["model"] for text in data["texts"]] == [0, 0, 0, 1, 1, 1]
    for text, trace in zip(data["texts"], everything, strict=True):
        size = len(trace) * 4 * len(columns)
        mine = torch.frombuffer(bytearray(maps[text["at"] : text["at"] + size]), dtype=torch.uint8)
        found = mine.view(len(trace), 4, len(columns)).double() / 255
        expected = share_map(trace)[..., : len(columns)].double()
        assert (found - expected)[1:].abs().max() <= PRECISION + 1e-6
        assert text["unknown"] == [0]
        assert tuple(text["tokens"]) == trace.tokens.texts
        for mine, logprob in zip(text["logprobs"], trace.tokens.logprobs.tolist(), strict=True):
            assert mine is None if math.isnan(logprob) else abs(mine - logprob) <= 0.0005 + 1e-6
    assert len(maps) == sum(len(trace) for trace in everything) * 4 * len(columns)
    summary = summarise(given.traces)
    for name in ("all", "prompt", "answer", "special"):
        found = torch.tensor(data["classes"][name]["layer"]["values"])
        expected = summary.share("layer", name).values[:, : len(columns)]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert set(data["differences"]) == {"0-1", "0-2", "1-2", "0-3", "1-4", "2-5"}
    expected = difference(given.traces[0], given.traces[2], resamples=1000)
    for column, one in zip(columns, data["differences"]["0-2"], strict=True):
        assert one == pytest.approx(expected.shares[column], abs=2e-3)
    assert data["groups"]["rows"] == ["a", "b"]
    change = given.worth.losses_QR[2, 1] - given.worth.losses_QR[0, 1]
    assert data["texts"][1]["worth"][1]["change"] == pytest.approx(float(change), abs=1e-4)
    assert data["texts"][1]["worth"][1]["variant"] == "without chem"


def test_experts_beyond_the_colours_have_patterns():
    names = tuple(f"e{n}" for n in range(9))
    about = About(SITES, names)
    trace = Trace(random_tokens(5), torch.full((5, len(SITES), 9), 1 / 9), about)
    looks = page_data(Findings([trace]))[0]["looks"]
    assert [look["pattern"] for look in looks] == [""] * 7 + ["/"] * 2
    assert len({(look["colour"], look["pattern"]) for look in looks}) == 9


def test_titles():
    trace = random_trace()
    assert title_of(trace.with_metadata(name="a\n b"), 3) == "3. a b"
    assert title_of(trace.with_metadata(name="x" * 99), 3) == f"3. {'x' * 59}…"
    assert title_of(trace, 1).startswith("1. ")


# --- the file ---


def page(tmp_path, given=None, **options) -> str:
    write_report(given or findings(), tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_hostile_words_are_words(tmp_path):
    text = page(tmp_path, command=f"xloom report '{HOSTILE}'", notes=[HOSTILE])
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;{{ 7 * 7 }}") == 2
    assert text.count("<script") == 4
    assert HOSTILE in unpacked(text, "data").decode()


def test_the_page_asks_for_nothing(tmp_path):
    text = page(tmp_path)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", text)
    assert "@import" not in text and "url(" not in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    policy = policy.replace("&#39;", "'")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-eval" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    for one in (script.encode(), unpacked(text, "plotly")):
        assert base64.b64encode(hashlib.sha256(one).digest()).decode() in policy


def test_the_same_findings_give_the_same_bytes(tmp_path):
    assert page(tmp_path) == page(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "page.html"]


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    text = page(tmp_path, Findings([random_trace()]), notes=["Not measured."])
    assert 'id="worth"' not in text and 'href="#worth"' not in text and 'id="chart-groups"' not in text
    assert "<li>Not measured.</li>" in text
    assert 'id="chart-worth"' in page(tmp_path)


def test_paths_of_the_machine_stay_out(tmp_path):
    trace = random_trace()
    about = About(SITES, EXPERTS, "/home/me/models/mine", "XLora", {"base_model_name_or_path": "/home/me/base"})
    text = page(tmp_path, Findings([Trace(trace.tokens, trace.scalings, about)]))
    assert "/home/me" not in text and "<dd>mine</dd>" in text and "<dd>base</dd>" in text


@pytest.mark.slow
def test_fifty_texts_of_the_shipped_size_stay_below_six_megabytes(tmp_path):
    about = About(tuple(SHIPPED), tuple(f"expert {n}" for n in range(7)))
    generator = torch.Generator().manual_seed(0)
    traces = []
    for seed in range(50):  # random shares are the worst case: they do not get smaller when packed
        scalings = (2 * torch.randn(180, len(SHIPPED), 7, generator=generator)).softmax(dim=-1)
        traces.append(Trace(random_tokens(180, seed, 60), scalings, about))
    assert len(page(tmp_path, Findings(traces)).encode()) < 6e6


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(TraceError, match="found none"):
        write_report(Findings([]), tmp_path / "page.html")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(findings(), tmp_path / "no" / "page.html")
    other = Trace(random_tokens(5), torch.zeros(5, 1, 3), About(("lm_head",), EXPERTS))
    with pytest.raises(TraceMismatchError, match="same sites and experts"):
        write_report(Findings([random_trace(), other]), tmp_path / "page.html")
    html._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xloom\[report\]"'):
        write_report(findings(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())

"""The page in a browser, Debian's Chromium: what a person sees, and reaches with the keyboard.

Needs the packages playwright and plotly, and Chromium; skipped where one of them is missing. Playwright's
`wait_for_function` evaluates strings, which the page's own policy forbids, so only selectors are waited for.
"""

import os
import random
import shutil

import pytest
from pages import EXPERTS, HOSTILE, findings

from xloom.report import write_report
from xloom.report.maps import PRECISION, share_map
from xloom.seeing import difference

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if os.environ.get("XLOOM_BROWSER_TESTS") == "required":  # what is missing fails, and is not skipped
    import playwright.sync_api as sync_api
    import plotly  # noqa: F401

    assert CHROMIUM is not None, "XLOOM_BROWSER_TESTS=required: expected Chromium, found none; apt-get install chromium"
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytest.importorskip("plotly", reason="needs plotly: pip install 'xloom[report]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

WAIT = 600_000  # milliseconds, on a busy machine
FOUND = findings(texts=3, tokens=40, against=True)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page, and what happened meanwhile: errors, messages of the console, requests, dialogs."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(FOUND, path, command="xloom report prompts.jsonl -o report.html")
    happened: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: happened.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: happened.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (happened.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: happened.append(f"request: {request.url}"))
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_selector("html[data-ready]")
        yield page, happened, path
        browser.close()


@pytest.fixture
def page(opened):
    page, _, _ = opened
    page.emulate_media(media="screen", color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("() => { delete document.documentElement.dataset.theme; }")
    return page


def token(page, place: int):
    return page.locator(f'#ribbon [data-token="{place}"]')


def shown_map(page) -> dict[tuple[str, str], float]:
    """Every cell of the map that is shown, by band and expert, as its title has it; checked against its text."""
    cells = page.locator("#token .map tbody tr").evaluate_all(
        "rows => rows.map(row => [row.cells[0].textContent, "
        "...[...row.cells].slice(1).map(cell => [cell.title, cell.textContent])])"
    )
    found = {}
    for band, *values in cells:
        for title, text in values:
            expert, value = title.split(", ")[0], float(title.split(": ")[1].removesuffix("%")) / 100
            found[band, expert] = value
            assert abs((float(text) if text else 0.0) - 100 * value) <= 0.56, "what is written is what the title says"
    return found


def test_nothing_is_asked_for_and_nothing_goes_wrong(opened):
    page, happened, path = opened
    assert happened == [f"request: {path.as_uri()}"]
    assert page.locator("#failed").is_hidden()
    assert page.locator("img").count() == 0
    assert HOSTILE[:20] in page.locator("#text option").first.text_content()
    assert token(page, 4).text_content() == HOSTILE


def test_the_map_of_a_token_is_that_of_the_trace(page):
    drawn = random.Random(0)
    for place in (0, 2, 1):
        page.select_option("#text", str(place))
        trace = FOUND.traces[place]
        expected = share_map(trace)
        for number in drawn.sample(range(1, len(trace)), 4):
            token(page, number).hover()
            assert f"token {number + 1} of {len(trace)}" in page.locator("#token").text_content()
            found = shown_map(page)
            assert len(found) == 4 * len(EXPERTS)
            for (band, expert), value in found.items():
                true = float(expected[number, ["all", "0", "1", "2"].index(band), EXPERTS.index(expert)])
                assert abs(value - true) <= PRECISION + 0.0005 + 1e-6
            logprob = float(trace.tokens.logprobs[number])
            assert f"(logprob {logprob:.2f})" in page.locator("#token").text_content()
            leader = EXPERTS[int(expected[number, 0, :-1].argmax())]
            assert f"led by {leader}" in page.locator("#token").text_content()
    token(page, 0).hover()
    assert "not mixed" in page.locator("#token").text_content()
    assert page.locator("#token .map").count() == 0


def test_the_keyboard_reaches_every_token(page):
    page.select_option("#text", "1")
    page.focus("#next")
    page.keyboard.press("Tab")
    here = "() => [document.activeElement.getAttribute('role'), document.activeElement.dataset.token]"
    role, start = page.evaluate(here)
    assert role == "option"
    for key, expected in (("ArrowRight", int(start) + 1), ("ArrowLeft", int(start)), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.evaluate(here)[1] == str(expected)
        assert page.locator('#ribbon [aria-selected="true"]').get_attribute("data-token") == str(expected)
        assert f"token {expected + 1} of" in page.locator("#token").text_content()
    page.keyboard.press("End")
    assert page.evaluate(here)[1] == str(len(FOUND.traces[1]) - 1)
    assert page.locator('#ribbon [tabindex="0"]').count() == 1
    assert "led by" in token(page, 5).get_attribute("aria-label")
    page.keyboard.press("Tab")
    assert page.evaluate(here)[0] != "option", "one stop of the tab key"


def test_charts_have_words_and_tables(page):
    figures = page.locator("figure.chart")
    assert figures.count() == 11
    for number in range(figures.count()):
        figure = figures.nth(number)
        name = figure.get_attribute("id")
        assert figure.locator(".main-svg").count() > 0, name
        assert figure.locator('[role="img"][aria-label]').count() == 1, name
        assert name == "chart-worth" or figure.locator("details table tbody tr").count() > 0, name
    assert page.locator("#worth-table tbody tr").count() == 5
    for place in ("#worth-table", "#text-worth .scroll"):
        assert page.locator(place).evaluate("node => getComputedStyle(node).maxHeight") == "none", "all rows are seen"


def test_the_comparison(page):
    page.select_option("#left", "2")
    page.select_option("#right", "0")
    expected = difference(FOUND.traces[2], FOUND.traces[0], resamples=1000)
    rows = page.locator("#chart-difference details tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.replace('−', '-')))"
    )
    assert [row[0] for row in rows] == list(EXPERTS)
    for name, _, _, value, low, high in rows:
        for found, true in zip((value, low, high), expected.shares[name], strict=True):
            assert (
                abs(float(found) / 100 - true) <= 0.012 if found != value else abs(float(found) / 100 - true) <= 0.002
            )
    assert page.locator("#left-title").text_content().startswith("3. ")
    assert page.locator("#right-text .token").count() == len(FOUND.traces[0])


def lightness(page, selector: str = "body") -> float:
    rgb = page.locator(selector).first.evaluate("node => getComputedStyle(node).backgroundColor")
    return sum(map(float, rgb[rgb.index("(") + 1 : -1].split(",")[:3]))


def test_dark_and_light(page):
    assert lightness(page) > 700
    page.emulate_media(color_scheme="dark")
    assert lightness(page) < 100
    assert page.locator("#theme").text_content() == "Light"
    page.click("#theme")
    assert lightness(page) > 700, "the button outweighs the system"
    page.click("#theme")
    assert lightness(page) < 100


CONTRAST = """() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const luminance = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255);
    const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const found = [];
  for (const colour of COLOURS) {
    const node = document.querySelector("#ribbon .token:not(.unknown):not(.special)").cloneNode(true);
    node.style.setProperty("--colour", colour);
    node.style.setProperty("--strength", 1);
    document.querySelector("#ribbon").append(node);
    const style = getComputedStyle(node);
    const [a, b] = [luminance(paper, style.backgroundColor), luminance(style.color)];
    found.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    node.remove();
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_readable_on_every_colour(page, scheme):
    from xloom.seeing.plots import COLOURS, GREY

    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(CONTRAST.replace("COLOURS", str([*COLOURS, GREY])))
    assert min(found) >= 4.5, dict(zip([*COLOURS, GREY], found, strict=True))


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_the_page_is_no_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(500)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_print(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert lightness(page) > 700, "paper is white"
    assert page.locator("nav").is_hidden()
    page.emulate_media(media="screen")
    assert page.pdf().startswith(b"%PDF")
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    widths = page.locator(".plot .main-svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert max(widths) <= 720
    page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("nav").is_visible()

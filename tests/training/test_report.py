"""The report of a run: what it warns of, what it says, and that its pages hold together whatever the record lacks."""

import copy
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from xloom.training.findings import Facts
from xloom.training.plots import Chart, draw, key, thin
from xloom.training.report import charts_of, summary_of, warnings_of, write_report

DOMAINS = ("alloys", "proteins", "salts")


def head_record() -> dict[str, Any]:
    """A head run in which nothing is wrong."""
    losses = [[step, 1 + 2 / step] for step in range(1, 61)]
    measured = {"loss": 1.0, "loss_alloys": 0.8, "loss_proteins": 1.2, "loss_salts": 0.9, "routing_accuracy": 0.9}
    singles = {
        f"single:{name}": {f"loss_{d}": measured[f"loss_{d}"] if d == name else 4.0 for d in DOMAINS}
        for name in DOMAINS
    }
    return {
        "kind": "head",
        "recipe": {
            "base": "some/base",
            "output": "out/mix",
            "max_steps": 60,
            "experts": {name: f"experts/{name}" for name in DOMAINS},
            "data": {name: {"files": [f"{name}.jsonl"], "expert": None, "weight": None} for name in DOMAINS},
            "valid": {name: [f"{name}-valid.jsonl"] for name in DOMAINS},
        },
        "meaning": {"right_experts": {name: name for name in DOMAINS}},
        "versions": {"xloom": "0.9.1", "torch": "2.0"},
        "machine": {"device": "cpu", "processes": 1},
        "seconds": 123.4,
        "tokens": 45678,
        "tokens_per_second": 370.1,
        "steps": 60,
        "stopped_early": False,
        "best_step": None,
        "rows": {
            "train": {"items": 297, "empty": 1, "too_long": 2, "duplicates": 4, "domains": dict.fromkeys(DOMAINS, 99)},
            "valid": {"items": 60, "empty": 0, "too_long": 0, "duplicates": 0, "domains": dict.fromkeys(DOMAINS, 20)},
            "overlap": 0,
        },
        "losses": losses,
        "parts": {"cross_entropy": [[s, v - 0.2] for s, v in losses], "routing": [[s, 0.2] for s, _ in losses]},
        "learning_rates": [[step, 1e-3 * (1 - step / 60)] for step in range(1, 61)],
        "validations": [{"step": s, **{k: v * 60 / s for k, v in measured.items()}} for s in (20, 40, 60)],
        "validation": measured,
        "references": {
            "base": {"loss": 3.0, **{f"loss_{d}": 3.0 for d in DOMAINS}},
            "uniform": {"loss": 2.0, **{f"loss_{d}": 2.0 for d in DOMAINS}},
            **singles,
        },
        "use": {d: {name: 0.9 if name == d else 0.05 for name in DOMAINS} for d in DOMAINS},
        "entropy": dict.fromkeys(DOMAINS, 0.4),
    }


def expert_record() -> dict[str, Any]:
    losses = [[step, 1 + 2 / step] for step in range(1, 101)]
    return {
        "kind": "expert",
        "recipe": {"output": "alloys", "base": "b", "train": ["a.jsonl"], "valid": ["v.jsonl"], "lora": {"r": 8}},
        "steps": 100,
        "losses": losses,
        "parts": {"cross_entropy": losses},
        "validations": [{"step": 50, "loss": 1.2}, {"step": 100, "loss": 1.1}],
        "validation": {"loss": 1.1},
        "references": {"base": {"loss": 3.0}},
    }


def minimal() -> dict[str, Any]:
    return {"recipe": {"base": "b", "output": "o", "valid": ["v"]}, "steps": 2, "losses": [[1, 2.0], [2, 1.0]]}


def without(record: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    record = copy.deepcopy(record)
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return record


def changed(record: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A copy with values in nested dicts replaced: `use={"alloys": {...}}` leaves the other domains."""
    record = copy.deepcopy(record)
    for name, value in parts.items():
        if isinstance(value, dict) and isinstance(record.get(name), dict):
            record[name] = changed(record[name], **value)
        else:
            record[name] = value
    return record


def only_warning(record: dict[str, Any]) -> str:
    found = warnings_of(record)
    assert len(found) == 1, found
    return found[0]


def pages(record: dict[str, Any], folder: Path) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    write_report(record, folder)
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


# --- warnings ---


@pytest.mark.parametrize("record", [head_record(), expert_record(), minimal()], ids=["head", "expert", "minimal"])
def test_a_good_run_has_no_warnings(record: dict[str, Any]) -> None:
    assert warnings_of(record) == []


def everywhere(value: dict[str, float]) -> dict[str, Any]:
    return dict.fromkeys(DOMAINS, value)


def use_of(salts: float, alloys: float | None = None) -> dict[str, Any]:
    """Use with one value for "salts" in every domain, and one for "alloys" or most of the rest."""
    first = 1 - salts - 0.05 if alloys is None else alloys
    return everywhere({"alloys": first, "proteins": 1 - salts - first, "salts": salts})


def test_an_expert_that_is_never_used() -> None:
    warning = only_warning(changed(head_record(), use=use_of(0.0196, alloys=0.5)))
    assert "'salts' is hardly ever used: at most 2.0 %" in warning
    assert "routing_weight" in warning
    assert "drop it" in warning
    assert warnings_of(changed(head_record(), use=use_of(0.0204, alloys=0.5))) == []
    once = changed(head_record(), use={d: use_of(0.0)[d] for d in DOMAINS[:2]})
    assert warnings_of(once) == [], "used in one domain is used"
    both = changed(head_record(), use=everywhere({"alloys": 0.1, "proteins": 0.01, "salts": 0.004}))
    assert "'proteins', 'salts' are hardly ever used: at most 1.0 %" in warnings_of(both)[0]


def test_an_expert_that_takes_all() -> None:
    taken = changed(head_record(), use=use_of(0.03, alloys=0.92))
    assert "'alloys' takes all: at least 92 %" in only_warning(taken)
    assert warnings_of(changed(head_record(), use=use_of(0.05, alloys=0.89))) == []
    small = everywhere({"alloys": 0.46, "proteins": 0.02, "salts": 0.02})
    assert "takes all: at least 92 %" in only_warning(changed(head_record(), use=small)), "the null expert is no use"
    one_domain = taken | {"use": {"alloys": taken["use"]["alloys"]}}
    assert warnings_of(one_domain) == []


def test_scalings_that_are_no_shares_are_not_judged_as_such() -> None:
    wild = everywhere({"alloys": 1.5, "proteins": -1.0, "salts": 0.001})
    record = changed(head_record(), use=wild, entropy=dict.fromkeys(DOMAINS, 1.09))
    assert warnings_of(record) == []


def test_a_flat_gate() -> None:
    flat = changed(head_record(), entropy=dict.fromkeys(DOMAINS, 0.96 * math.log(3)))
    assert "stayed flat: its entropy is at least 96 %" in only_warning(flat)
    assert warnings_of(changed(flat, entropy={"salts": 0.94 * math.log(3)})) == [], "everywhere, or it is not flat"


def test_routing_near_chance() -> None:
    record = changed(head_record(), validation={"routing_accuracy": 0.49})
    assert re.search(r"49 % .* chance is 33 %", only_warning(record))
    assert warnings_of(changed(head_record(), validation={"routing_accuracy": 0.51})) == []


def test_a_domain_worse_than_the_base() -> None:
    record = changed(head_record(), validation={"loss_salts": 3.1})
    assert "In domain 'salts' the model is worse than the base model alone: loss 3.100 against 3.000" in only_warning(
        record
    )
    assert "The model is worse than the base" in only_warning(changed(expert_record(), validation={"loss": 3.2}))
    same = changed(head_record(), validation={"loss_salts": 3.00001}, references={"single:salts": {"loss_salts": 3.0}})
    assert warnings_of(same) == [], "what the table does not show is no difference"


def test_a_domain_worse_than_its_own_expert() -> None:
    """The gap is 3.0 - 0.9 = 2.1, so a fifth of it ends at 1.32."""
    warning = only_warning(changed(head_record(), validation={"loss_salts": 1.35}))
    assert "clearly worse than the domain's own expert 'salts': loss 1.350 against 0.900, 79 %" in warning
    assert warnings_of(changed(head_record(), validation={"loss_salts": 1.30})) == []


@pytest.mark.parametrize("own", [3.0, 3.5, 2.999])
def test_no_gap_is_no_share_of_it(own: float, tmp_path: Path) -> None:
    record = changed(head_record(), validation={"loss_salts": 2.995}, references={"single:salts": {"loss_salts": own}})
    assert warnings_of(record) == []
    assert re.search(r"^\| salts \| 3.000 .* 2.995 \| – \|$", pages(record, tmp_path)[0], re.M)
    assert "mean of 2 domains" in summary_of(record)


def test_the_own_expert_is_the_one_that_the_record_names() -> None:
    record = changed(head_record(), meaning={"right_experts": {"salts": "alloys"}})
    standing = {s.domain: s for s in Facts(record).standings}["salts"]
    assert (standing.expert, standing.own) == ("alloys", 4.0)
    nobody = changed(head_record(), meaning={"right_experts": {"salts": None}})
    assert {s.domain: s.own for s in Facts(nobody).standings}["salts"] is None


def validations(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def test_validation_that_rises() -> None:
    record = head_record() | {"steps": 60, "validations": validations(2, 1.5, 1.0, 1.1, 1.2, 1.3)}
    assert "rose at each of the last 3 validations, from 1.000 to 1.300" in only_warning(record)
    assert "early_stopping" in only_warning(record)
    assert warnings_of(record | {"stopped_early": True}) == [], "what would be advised was done"
    assert warnings_of(record | {"steps": 80, "validations": validations(9, 8, 7, 6, 5, 1, 1.1, 1.2)}) == []


def test_a_best_step_long_before_the_end() -> None:
    record = head_record() | {"steps": 60, "validations": validations(2, 1.0, 1.2, 1.1, 1.15, 1.1)}
    assert "best at step 20 of 60: 1.000, against 1.100" in only_warning(record)
    assert "best at step 20 of 60" in only_warning(record | {"best_step": 20})
    nearly = head_record() | {"steps": 60, "validations": validations(2, 1.0, 1.005, 1.001, 1.002, 1.001)}
    assert warnings_of(nearly) == [], "as good as the best"


def test_no_validation_rows() -> None:
    record = without(minimal(), ("recipe", "valid"))
    assert "no validation rows" in only_warning(record)
    assert "no validation rows" in only_warning(minimal() | {"rows": {"valid": {"items": 0}}})
    assert warnings_of(record | {"rows": {"valid": {"items": 5}}}) == []


def test_rows_in_both_or_left_out() -> None:
    assert "3 of 60 validation rows are among the training rows" in only_warning(
        changed(head_record(), rows={"overlap": 3})
    )
    many = changed(head_record(), rows={"train": {"items": 890, "too_long": 100, "empty": 10}})
    assert "110 of 1,000 training rows (11 %) were left out: 100 too long, 10 empty" in only_warning(many)
    assert warnings_of(changed(many, rows={"train": {"items": 1000}})) == []


def test_a_loss_that_does_not_go_down() -> None:
    flat = minimal() | {"losses": [[s, 1.0 + (s % 2) / 10] for s in range(40)]}
    assert "did not go down: 1.050 in the first quarter of the steps, 1.050 in the last" in only_warning(flat)
    assert warnings_of(minimal() | {"losses": [[1, 1.0]]}) == [], "one step has no direction"


# --- words ---


def test_the_summary_says_what_came_out() -> None:
    text = summary_of(changed(head_record(), validation={"loss_salts": 1.32}))
    for words in (
        "mixes 3 experts (alloys, proteins, salts) on the base model some/base",
        "60 steps on 297 rows of 3 domains in 2 min 3 s (cpu, 370 tokens per second)",
        "1.000, against 3.000 of the base",
        "closes 93 % of the gap",
        "least in salts, 80 %",
        "90 % of the labelled validation rows go to their own expert (chance: 33 %)",
    ):
        assert words in text
    assert summary_of(minimal()) == "A LoRA expert on the base model b was trained for 2 steps."


def test_both_pages_tell_the_same_in_the_same_order(tmp_path: Path) -> None:
    markdown, html = pages(head_record(), tmp_path)
    titles = [
        "Warnings", "Curves", "Validation loss by domain", "Use of the experts", "Entropy of the gate", "Rows",
        "Settings", "Versions",
    ]  # fmt: skip
    assert re.findall(r"^## (.*)$", markdown, re.M) == titles
    assert re.findall(r"<h2>(.*)</h2>", html) == titles
    assert markdown.startswith("# mix\n")
    assert "<h1>mix</h1>" in html
    assert "| alloys | 3.000 | 2.000 | 0.800 | 0.800 | 100 % |" in markdown
    assert "| alloys | 90.0 % | 5.0 % | 5.0 % |" in markdown
    assert "log 3 = 1.099 = all alike" in markdown
    assert "| training | 300 | 1 | 2 | 297 | 4 |" in markdown
    assert "| Training loss: total | 3 (step 1) | 1.065 (step 31) | 1.033 (step 60) |" in markdown
    assert "output: out/mix\n" in markdown
    for cell in re.findall(r"^\| alloys \| (.*) \|$", markdown, re.M):
        for word in cell.split(" | "):
            assert f">{word}</td>" in html


def test_what_the_null_expert_took_has_a_column(tmp_path: Path) -> None:
    record = changed(head_record(), use={"salts": {"salts": 0.5}})
    markdown, _ = pages(record, tmp_path)
    assert "| domain | alloys | proteins | salts | no expert |" in markdown
    assert "| salts | 5.0 % | 5.0 % | 50.0 % | 40.0 % |" in markdown
    assert "no expert" not in pages(head_record(), tmp_path)[0]


def test_the_title_is_the_output_and_not_a_temporary_folder(tmp_path: Path) -> None:
    first, second = pages(head_record(), tmp_path / "tmp1"), pages(head_record(), tmp_path / "tmp2")
    assert first == second
    assert pages(minimal() | {"recipe": {}}, tmp_path / "here")[0].startswith("# here\n")


# --- pages ---


def test_the_same_record_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_report import *; write_report(head_record(), Path(sys.argv[1]))"
    )
    here = pages(head_record(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "b"), str(Path(__file__).parent)]
    subprocess.run(command, check=True, timeout=120)
    assert tuple((tmp_path / "b" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")) == here


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    _, html = pages(head_record(), tmp_path)
    assert not re.search(r"https?:|<script|<link|<img|@import|javascript:", html)
    assert set(re.findall(r"""(?:src|href)=["'](.)""", html)) == {"#"}
    assert set(re.findall(r"url\((.)", html)) == {"#"}


class Tags(HTMLParser):
    """Tags, ids, references and text of a page; fails where tags do not nest."""

    EMPTY = {"meta", "br"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            self.links |= set(re.findall(r"^#(.*)|url\(#(.*)\)", value or "")) - {("", "")}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_ids_are_unique_over_all_plots_and_links_end_somewhere(tmp_path: Path) -> None:
    page = Tags(pages(head_record(), tmp_path)[1])
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {a or b for a, b in page.links} <= set(page.ids)


def renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {renamed(k, old, new): renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, old, new) for v in value]
    return value.replace(old, new) if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["<b>", '"><script>x</script>', "a|b", "$x_1$", "{{ 7 * 7 }}", "```", "двa\n# three"])
def test_odd_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    record = renamed(head_record(), "salts", name)
    markdown, html = pages(record, tmp_path)
    page, plain = Tags(html), Tags(pages(head_record(), tmp_path)[1])
    assert page.tags == plain.tags
    assert name in page.text
    table = [line for line in markdown.splitlines() if line.startswith("| alloys | 3.000")]
    assert len(table) == 1
    outside, _, settings = markdown.partition("\n## Settings\n\n")
    assert not re.search(r"(?<!\\)<", outside)
    assert re.findall(r"^#+ ", outside, re.M) == ["# "] + ["## "] * 6
    cells = [re.split(r"(?<!\\)\|", line) for line in outside.splitlines() if "90.0 %" in line]
    assert [len(row) for row in cells] == [6, 6, 6]
    ticks, yaml_text, rest = re.split("^(?:`+)(?:yaml)?$", settings, maxsplit=2, flags=re.M)
    assert ticks == ""
    assert yaml.safe_load(yaml_text) == record["recipe"]
    assert "## Versions" in rest


def paths_of(record: dict[str, Any], depth: int = 3) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in record.items():
        if name not in {"recipe", "steps", "losses"}:
            found.append((name,))
            if isinstance(value, dict) and depth > 1:
                found += [(name, *rest) for rest in paths_of(value, depth - 1)]
    return found


@pytest.mark.parametrize("empty", ["missing", "null", "empty"])
def test_whatever_is_missing_leaves_the_rest_standing(empty: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("xloom.training.report.draw", lambda chart: "")  # drawn in the tests above
    for path in paths_of(head_record()):
        record = without(head_record(), path)
        if empty != "missing":
            inner = record
            for name in path[:-1]:
                inner = inner[name]
            was = head_record()
            for name in path:
                was = was[name]
            inner[path[-1]] = None if empty == "null" else type(was)()
        markdown, html = pages(record, tmp_path)
        assert "None\n" not in markdown.replace("None.\n", ""), path
        assert "nan" not in markdown.partition("## Settings")[0], path
        assert Tags(html).tags, path


@pytest.mark.parametrize("losses", [[], [[1, 2.0]], [[1, math.nan], [2, None]]])
def test_almost_nothing_is_a_report_too(losses: list[Any], tmp_path: Path) -> None:
    markdown, html = pages(minimal() | {"losses": losses}, tmp_path)
    assert re.findall(r"^## (.*)$", markdown, re.M) == ["Warnings", "Settings"]
    assert "<svg" not in html


def test_settings_cannot_end_their_own_fence(tmp_path: Path) -> None:
    record = minimal() | {"recipe": {"base": "b", "note": "a\n```\n# b"}}
    markdown = pages(record, tmp_path)[0]
    longest = max(re.findall("`+", markdown), key=len)
    assert markdown.count(longest) == 2
    assert len(longest) == 4


def test_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    record = changed(head_record(), validation={"loss_salts": math.nan, "routing_accuracy": math.inf})
    record["losses"] = [[1, 2.0], [2, math.nan], [3, 1.0]]
    markdown = pages(record, tmp_path)[0]
    assert not re.search(r"\b(nan|inf)\b", markdown)
    assert re.search(r"^\| salts \| 3.000 .* – \| – \|$", markdown, re.M)


# --- curves ---


def test_the_parts_of_a_loss_are_drawn_if_there_are_some() -> None:
    names = {chart.title: list(chart.lines) for chart in charts_of(head_record())}
    assert names["Training loss"] == ["total", "cross entropy", "routing"]
    assert names["Validation loss"] == [*DOMAINS, "all rows"]
    assert {chart.title: list(chart.lines) for chart in charts_of(expert_record())} == {
        "Training loss": ["total"],
        "Validation loss": ["all rows"],
    }


def test_a_plot_describes_itself_and_keeps_its_text() -> None:
    svg = draw(Chart("Loss", {"<a>": [(1, 3.0), (2, 2.0)]}))
    assert 'role="img"' in svg
    assert 'aria-label="Loss: &lt;a&gt; from 3 at step 1 to 2 at step 2"' in svg
    assert "<title>Loss: &lt;a&gt; from 3" in svg
    assert ">step</text>" in svg
    assert "<style" not in svg


def test_a_plot_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(Chart("Loss", {"a": [(1, 3.0), (2, 2.0)]}, noisy=True))
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys; from xloom.training.plots import *; assert 'matplotlib' not in sys.modules;"
        "draw(Chart('x', {'a': [(1, 2), (2, 3)]})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_thinning_leaves_no_step_out() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 20)
    assert len(few) == 20
    assert sum(y for _, y in few) / 20 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:20], 20) == points[:20]
    assert len(thin(points[:30], 20)) == 20


def test_lines_can_be_told_apart() -> None:
    assert len({key(i) for i in range(18)}) == 18

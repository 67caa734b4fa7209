"""`evaluate`: what it finds, that it goes on where it was stopped, and when it starts anew."""

import json

import pytest
import torch
from worlds import DOMAINS, tiny_model, write_domains

from toy import chat, tiny_tokenizer, write_rows
from xloom.errors import ConfigError, DataError, NotFoundError, PromptError
from xloom.evaluation import Watch, evaluate, find_systems, load_tasks
from xloom.evaluation.bench import Bench
from xloom.evaluation.report import costs, markdown, tables
from xloom.evaluation.results import lead
from xloom.evaluation.store import AnswerFile, Kept, file_name, folder_digest, model_digest

NAMES = ["constant", "base", "single:chem", "oracle", "xlora"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model(folder)
    return model, write_domains(folder / "data", model), folder


@pytest.fixture
def go(world):
    """Evaluates; gives the evaluation and how many answers each system lacked."""
    model, sources, _ = world

    def run(output=None, names=NAMES, tasks=None, **options):
        asked = {}
        watch = Watch(lambda system, missing: asked.update({system.name: missing}))
        tasks = load_tasks(sources) if tasks is None else tasks
        found = evaluate(
            model, tiny_tokenizer(), tasks, find_systems(names, model), output=output, watch=watch, **options
        )
        return found, asked

    return run


def test_rows(go):
    found, _ = go(against="xlora", loss=True)
    rows = found.rows()
    assert found.domains == DOMAINS
    by = {(r["router"], r["domain"], r["task"], r["metric"]): r for r in rows}
    assert len(by) == len(rows), "no row twice"
    for row in rows:
        assert {"router", "domain", "metric", "score", "low", "high", "oracle_normalised", "items"} <= set(row)
        assert row["low"] is None or row["low"] - 1e-6 <= row["score"] <= row["high"] + 1e-6
    outcome = {o.system: o for o in found.outcomes}
    for domain in DOMAINS:
        column = outcome["single:chem"].columns[domain]
        row = by["single:chem", domain, None, "score"]
        assert row["score"] == pytest.approx(column.scores.mean(), abs=1e-6)
        assert row["items"] == len(column.kept) == 4
        assert by["single:chem", domain, "t0", "score"]["items"] == 2
        oracle = by["oracle", domain, None, "score"]["score"]
        assert row["oracle_normalised"] == pytest.approx(row["score"] / oracle, abs=1e-5)
        assert by["oracle", domain, None, "routing_accuracy"]["score"] == 1
        assert by["xlora", domain, None, "loss"]["score"] > 0
        assert ("constant", domain, None, "loss") not in by
    means = [by["single:chem", domain, None, "score"]["score"] for domain in DOMAINS]
    assert by["single:chem", "mean", None, "score"]["score"] == pytest.approx(sum(means) / 3, abs=1e-5)
    assert by["single:chem", "mean", None, "score"]["items"] == 12
    assert by["oracle", "mean", None, "score"]["oracle_normalised"] == 1
    assert by["xlora", "mean", None, "difference"]["score"] == 0
    difference = by["oracle", "mean", None, "difference"]
    assert difference["against"] == "xlora"
    both = [by[name, "mean", None, "score"]["score"] for name in ("oracle", "xlora")]
    assert difference["score"] == pytest.approx(both[0] - both[1], abs=1e-5)
    assert not [r for r in rows if r["router"] == "base" and r["metric"] == "routing_accuracy"]
    json.dumps(found.as_json(), allow_nan=False)
    assert {s["router"] for s in found.as_json()["systems"]} == set(NAMES)


def test_routing_accuracy_is_that_of_the_mean_scalings(go, world):
    model, sources, _ = world
    tasks = load_tasks(sources)
    found, _ = go(names=["xlora"])
    hits = []
    for task in tasks:
        for question in task.questions:
            ids = tiny_tokenizer().apply_chat_template(
                question.row.prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            kept = found.outcomes[0].columns[task.name].kept[task.questions.index(question)]
            with model.logging_scalings() as log, torch.no_grad():
                model.generate(
                    ids, max_new_tokens=kept.tokens, do_sample=False, pad_token_id=0,
                    eos_token_id=tiny_tokenizer().eos_token_id,
                )  # fmt: skip
            mean = log.tokens()[0, ids.shape[1] - 1 :].mean(dim=(0, 1))
            hits.append(model.experts[int(mean.argmax())] == task.name)
    row = next(r for r in found.rows() if r["metric"] == "routing_accuracy" and r["domain"] == "mean")
    assert row["score"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert 0 < sum(hits) < len(hits), "not all the same"


def test_it_goes_on_after_a_cut(go, tmp_path):
    whole, asked = go(tmp_path)
    assert asked == dict.fromkeys(NAMES, 12)
    path = tmp_path / "answers" / "xlora.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # killed in the middle of a line
    assert [next(iter(json.loads(line))) for line in lines[:3]] == ["identity", "setting", "key"]
    path.write_bytes(b"".join(lines[:7]) + lines[7][: len(lines[7]) // 2])
    again, asked = go(tmp_path)
    assert asked == {name: {"xlora": 7, "constant": 12}.get(name, 0) for name in NAMES}
    assert again.rows() == whole.rows()
    assert all(json.loads(line) for line in path.read_text().splitlines()), "and no broken line is left"
    _, asked = go(tmp_path)
    assert asked == {name: 12 if name == "constant" else 0 for name in NAMES}


def test_more_questions_ask_only_for_those(go, world, tmp_path):
    sources = world[1]
    go(tmp_path, tasks=load_tasks(sources, limit=2))
    _, asked = go(tmp_path)
    assert asked == {name: 12 if name == "constant" else 6 for name in NAMES}


def test_a_limit_does_not_change_how_long_answers_may_be(go, tmp_path):
    """The longest right answer comes after the limit, and the answers before it are those of the whole run."""
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"ab{i}", "c" * (1 + 5 * (i == 3))) for i in range(4)])
    names, output = ["base", "xlora"], tmp_path / "out"
    some, _ = go(output, names, load_tasks({"mine": rows}, limit=2))
    assert all(len(column.kept) == 2 for o in some.outcomes for column in o.columns.values())
    whole, asked = go(output, names, load_tasks({"mine": rows}))
    assert asked == {"base": 2, "xlora": 2}, "what was kept is not asked again"
    fresh, _ = go(None, names, load_tasks({"mine": rows}))
    assert whole.rows() == fresh.rows()


def test_speed_and_memory_are_those_of_the_setting(go, world, tmp_path):
    output, names = tmp_path, ["base", "constant"]
    before = go(output, names)[0].outcomes[0]
    assert before.tokens_per_second > 0
    assert before.rows_per_second > 0
    other, asked = go(output, names, batch_tokens=64)
    assert asked["base"] == 0
    assert (other.outcomes[0].tokens_per_second, other.outcomes[0].rows_per_second) == (None, None)
    assert other.outcomes[0].peak_mb is None
    assert other.as_json()["systems"][0]["tokens_per_second"] is None
    cells = {str(column.header): next(iter(column.cells)) for column in costs(other).columns}
    assert (cells["tokens/s"], cells["rows/s"], cells["peak MB"]) == ("-", "-", "-")
    again = go(output, names)[0].outcomes[0]
    assert again.tokens_per_second == before.tokens_per_second
    assert again.peak_mb == before.peak_mb


def test_the_setting_says_what_it_was_measured_on(world):
    model, sources, _ = world
    tasks = tuple(load_tasks(sources))
    setting = Bench(model, tiny_tokenizer(), tasks, batch_tokens=77).setting
    assert (setting["batch_tokens"], setting["dtype"]) == (77, "float32")
    assert setting["threads"] == torch.get_num_threads()
    assert setting["device"]


def test_the_share_of_answers_that_are_cut_short(go, world, tmp_path):
    model = world[0]
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(5, 64, 6))
    try:
        found, _ = go(tmp_path, ["base", "constant"])
        again, asked = go(tmp_path, ["base", "constant"])
    finally:
        model.generation_config.eos_token_id = ends
    kept = [k for column in found.outcomes[0].columns.values() for k in column.kept]
    assert 0 < found.outcomes[0].cut < 1
    assert found.outcomes[0].cut == sum(k.cut for k in kept) / len(kept)
    assert again.outcomes[0].cut == found.outcomes[0].cut, "it is kept"
    assert asked["base"] == 0
    assert found.outcomes[1].cut is None, "a constant is not written"
    assert [system["cut"] for system in found.as_json()["systems"]] == [round(found.outcomes[0].cut, 6), None]
    cells = {str(column.header): list(column.cells) for column in costs(found).columns}
    assert cells["cut short, %"] == [f"{100 * found.outcomes[0].cut:.1f}", "-"]
    assert f"| {100 * found.outcomes[0].cut:.1f} |" in markdown(found, "x").partition("## Speed and memory")[2]


def test_what_is_chosen_on_the_questions_is_never_the_best(go, world, tmp_path):
    rows = write_rows(tmp_path / "orphan.jsonl", [chat(f"ab{i}", "qq") for i in range(3)])
    tasks = load_tasks({**world[1], "orphan": rows})
    found, _ = go(names=["constant", "base"], tasks=tasks)
    assert found.score("constant", "orphan").value == 1.0 > found.score("base", "orphan").value
    note = "constant: chosen on the test questions of orphan: the best of the 50 commonest answers to them"
    assert found.notes == (note,)
    assert [system["borrowed"] for system in found.as_json()["systems"]] == [["orphan"], []]
    scores = markdown(found, "x").partition("## Scores")[2].partition("##")[0]
    lines = {line.split(" | ")[0]: line.split(" | ") for line in scores.splitlines() if line.startswith("| ")}
    assert not lines["| constant"][-1].startswith("**")
    assert lines["| base"][-1].startswith("**")
    assert f"- {note}" in markdown(found, "x")
    bold = {}
    for table in tables(found):
        for column in table.columns[1:]:
            bold[str(column.header)] = [cell.style == "bold" for cell in column.cells]
    assert bold["orphan"] == [False, True]
    fair, _ = go(names=["constant", "base"])
    assert fair.notes == ()
    assert fair.best({"constant": fair.score("constant"), "base": fair.score("base")}, fair.means)


def test_a_mean_over_what_was_chosen_on_the_questions_is_not_the_best(go, tmp_path):
    rows = write_rows(tmp_path / "orphan.jsonl", [chat(f"ab{i}", "qq") for i in range(3)])
    found, _ = go(names=["constant", "base", "oracle"], tasks=load_tasks({"chem": rows, "mech": rows}))
    values = {name: found.score(name) for name in ("constant", "base", "oracle")}
    assert values["constant"].value == 1.0
    assert found.best(values, found.means) == {"base"}


def test_the_kept_answers_are_those_of_a_fresh_run(go, tmp_path):
    fresh, _ = go()
    kept, _ = go(tmp_path)
    again, _ = go(tmp_path)
    assert fresh.rows() == kept.rows() == again.rows()


def test_another_head_starts_anew_what_reads_it(go, world, tmp_path):
    model = world[0]
    before, _ = go(tmp_path, names=["xlora", "base"])
    digest = model_digest(model, head=True)
    with torch.no_grad():
        model.head.linears[-1].weight[0, 0] += 0.5
        assert model_digest(model, head=True) != digest
        found, asked = go(tmp_path, names=["xlora", "base"])
        model.head.linears[-1].weight[0, 0] -= 0.5
    assert asked == {"xlora": 12, "base": 0}
    assert "xlora: answered anew, as it differs from what was kept in: model" in found.notes
    assert (tmp_path / "answers" / "xlora.jsonl.old").is_file(), "hours of answers are not thrown away"
    assert len(before.outcomes) == 2


def test_other_experts_start_everything_anew(go, world, tmp_path):
    model = world[0]
    go(tmp_path, names=["xlora", "base"])
    weights = next(tensor for name, tensor in sorted(model.state_dict().items()) if name.endswith("A_RI"))
    with torch.no_grad():
        weights.view(-1)[0] += 0.5
        _, asked = go(tmp_path, names=["xlora", "base"])
        weights.view(-1)[0] -= 0.5
    assert asked == {"xlora": 12, "base": 12}


def test_the_heads_settings_count_for_what_reads_it(world):
    model = world[0]
    digests = {head: model_digest(model, head=head) for head in (True, False)}
    temperature = model.config.softmax_temperature
    model.config.softmax_temperature = 2 * temperature
    try:
        assert model_digest(model, head=True) != digests[True]
        assert model_digest(model, head=False) == digests[False]
    finally:
        model.config.softmax_temperature = temperature


def test_an_experts_scale_counts(world):
    """It is in no tensor that a model saves."""
    model = world[0]
    before, site = model_digest(model, head=False), model.mixture.sites[0]
    site.scales[0] *= 2
    try:
        assert model_digest(model, head=False) != before
    finally:
        site.scales[0] /= 2


def test_the_experts_that_a_folder_names_elsewhere_count(world, tmp_path):
    model = world[0]
    for name in model.experts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "experts.json").write_text(json.dumps({name: f"../{name}" for name in model.experts}))
    before = folder_digest(tmp_path / "model")
    (tmp_path / model.experts[0] / "adapter_config.json").write_text('{"r": 4}')
    assert folder_digest(tmp_path / "model") != before


def test_equal_rows_of_two_tasks_have_grades_of_their_own(world, tmp_path):
    model = world[0]
    rows = write_rows(tmp_path / "rows.jsonl", [chat("abc", "d")])
    tasks = [
        *load_tasks({"never": rows}, scorer=lambda a, r: 0.0),
        *load_tasks({"always": rows}, scorer=lambda a, r: 1.0),
    ]
    found = evaluate(model, tiny_tokenizer(), tasks, find_systems(["base"], model))
    assert [column.scores.mean() for column in found.outcomes[0].columns.values()] == [0.0, 1.0]


def test_the_mixtures_weight_is_not_the_experts(go, world):
    model = world[0]
    names = ["single:chem", "oracle", "uniform", "xlora"]
    before = {o.system: [k.text for c in o.columns.values() for k in c.kept] for o in go(names=names)[0].outcomes}
    model.config.global_scaling_weight = 3.0
    try:
        after = {o.system: [k.text for c in o.columns.values() for k in c.kept] for o in go(names=names)[0].outcomes}
    finally:
        model.config.global_scaling_weight = 1.0
    assert after.pop("xlora") != before.pop("xlora")
    assert after == before


def test_a_system_that_cannot_be_made_is_named(go, world, tmp_path):
    rows = {"chem": write_rows(tmp_path / "chem.jsonl", [chat("abc", "d")])}  # no training rows
    tasks = load_tasks(rows)
    with pytest.raises(DataError, match="^centroid: training rows for"):
        go(names=["base", "centroid"], tasks=tasks)
    with pytest.raises(DataError, match="^centroid: training rows for"):
        go(names=["centroid", "few-shot", "base"], tasks=tasks, optional={"few-shot", "base"})
    optional = {"centroid", "few-shot"}
    found, _ = go(names=["base", "centroid", "few-shot", "uniform"], tasks=tasks, optional=optional)
    assert [o.system for o in found.outcomes] == ["base", "uniform"]
    assert found.notes[0].startswith("centroid: left out: training rows for")
    assert found.notes[1].startswith("few-shot: left out: expected what it needs for one task of chem at least")
    with pytest.raises(DataError, match="^few-shot: expected what it needs"):
        go(names=["few-shot"], tasks=tasks)


def test_numbers_have_mae_and_r2(go, tmp_path):
    row = {"domain": "chem", "task": "gap", "scorer": "number", "options": {"tolerance": 0.5}}
    asked = [{**chat(f"ab{i}", right), **row} for i, right in enumerate(["1", "2", "4"])]
    train = [{**chat(f"ba{i}", "2"), **row} for i in range(3)]
    (tmp_path / "chem").mkdir()
    write_rows(tmp_path / "chem" / "test.jsonl", asked)
    write_rows(tmp_path / "chem" / "train.jsonl", train)
    found, _ = go(names=["constant"], tasks=load_tasks({"chem": tmp_path / "chem"}))
    by = {r["metric"]: r for r in found.rows() if r["domain"] == "chem"}
    assert by["score"]["score"] == pytest.approx(1 / 3, abs=1e-6)
    assert by["mae"]["score"] == pytest.approx(1.0)
    assert by["mae"]["task"] == "gap"
    assert by["r2"]["score"] == pytest.approx(1 - (1 + 0 + 4) / (14 / 3), abs=1e-5)
    assert by["mae"]["low"] is None


def test_a_prompt_beyond_the_window(go, world, tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [chat("a", "b"), chat("ab" * 600, "b")])
    with pytest.raises(PromptError, match=r"base: .*long\.jsonl:2: 12\d\d tokens and 4 new ones .* window of 1024"):
        go(names=["base"], tasks=load_tasks({"long": long}))


def test_what_makes_no_sense(go, world, tmp_path):
    with pytest.raises(ConfigError, match="at least one task"):
        go(tasks=[])
    with pytest.raises(ConfigError, match="against='oracle'"):
        go(names=["base"], against="oracle")
    tasks = load_tasks(world[1])
    with pytest.raises(ConfigError, match="must differ"):
        go(tasks=[tasks[0], tasks[0]])


# --- tasks ---


def test_rows_bring_their_scorer_or_take_the_default(tmp_path):
    rows = [chat("a", "1"), {**chat("b", "2"), "scorer": "exact", "task": "t"}]
    (task,) = load_tasks({"mine": write_rows(tmp_path / "mine.jsonl", rows)}, scorer="number")
    assert [q.scorer.name for q in task.questions] == ["number", "exact"]
    assert [q.task for q in task.questions] == ["mine", "t"]
    assert [q.experts for q in task.questions] == [("mine",), ("mine",)]
    assert task.parts == ("mine", "t")
    assert task.train == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({**chat("a", "b"), "scorer": "nonsense"}, ":2: no scorer named 'nonsense'"),
        ({**chat("a", "b"), "scorer": "os:getcwd"}, ":2: scorer: expected a scorer's name"),
        ({**chat("a", "b"), "scorer": "number"}, ":2: scorer number: expected a number as the right answer"),
        ({**chat("a", "1"), "scorer": "number", "options": [1]}, ":2: options: expected an object, found list"),
        ({**chat("a", "1"), "scorer": "number", "options": {"tolerance": -1}}, ":2: .*tolerance"),
        ({**chat("a", "1"), "domain": 3}, ":2: domain: expected a name, found 3"),
        ({**chat("a", "blue"), "scorer": "contains", "options": {"any": ["red"]}}, ":2: scorer contains: .*'blue'.* 0"),
        ({"prompt": "a"}, ":2: expected 'messages'"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, line, says):
    path = write_rows(tmp_path / "mine.jsonl", [chat("a", "b"), line])
    with pytest.raises(DataError, match=rf"mine\.jsonl{says}"):
        load_tasks({"mine": path})


def test_every_row_is_tried_where_that_is_cheap(tmp_path):
    good = {**chat("a", "red"), "scorer": "contains", "options": {"any": ["red"]}}
    path = write_rows(tmp_path / "mine.jsonl", [good, good, {**good, **chat("a", "blue")}, good])
    says = r"mine\.jsonl:3: scorer contains: expected a right answer of score 1, found 'blue', of score 0"
    with pytest.raises(DataError, match=says):
        load_tasks({"mine": path})
    parts = {"scorer": "parts", "options": {"parts": [{"answer": "x"}, {"answer": "y"}]}}
    half = write_rows(tmp_path / "half.jsonl", [{**chat("a", "x; z"), **parts}])
    with pytest.raises(DataError, match=r"half\.jsonl:1: scorer parts: .* of score 0\.5"):
        load_tasks({"half": half})
    (task,) = load_tasks({"mine": write_rows(tmp_path / "own.jsonl", [chat("a", "b")])}, scorer=lambda a, r: 0.0)
    assert len(task.questions) == 1, "what a function of the user's says is the user's affair"


def test_a_limit_keeps_the_other_rows_for_measuring(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [chat(f"a{i}", "b") for i in range(5)])
    (task,) = load_tasks({"mine": path}, limit=2)
    assert [len(task.questions), len(task.beyond)] == [2, 3]
    assert [q.key[-2:] for q in (*task.questions, *task.beyond)] == [":1", ":2", ":3", ":4", ":5"]
    (task,) = load_tasks({"mine": path}, limit=9)
    assert [len(task.questions), len(task.beyond)] == [5, 0]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere\.jsonl: expected a file of rows"):
        load_tasks({"a": tmp_path / "nowhere.jsonl"})
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: expected a file of rows that ends in \.jsonl"):
        load_tasks({"a": tmp_path / "a.csv"})
    with pytest.raises(DataError, match="expected rows with a right answer, found none"):
        load_tasks({"a": write_rows(tmp_path / "a.jsonl", [chat("a", " ")])})
    with pytest.raises(NotFoundError, match=r"test\.jsonl"):
        load_tasks({"a": tmp_path})


# --- answers on the disk ---


def test_an_answer_file(tmp_path):
    path = tmp_path / "deep" / file_name("single:a/b")
    assert path.name == "single%3Aa%2Fb.jsonl"
    kept = {"k": Kept("text", 3, {"a": 0.25, "b": 0.75}, 0.5, True)}
    file = AnswerFile(path, {"model": "x"})
    file.add(kept)
    file.add_losses({"k": 1.5})
    file.add_peak(10.0)
    file.add_peak(7.0)
    again = AnswerFile(path, {"model": "x"})
    assert again.answers == kept
    assert again.losses == {"k": 1.5}
    assert again.peak_mb == 10.0
    assert again.replaced == ()
    other = AnswerFile(path, {"model": "y", "extra": 1})
    assert other.answers == {}
    assert other.replaced == ("model", "extra")
    assert AnswerFile(path.with_name(f"{path.name}.old"), {"model": "x"}).answers == kept


def test_systems_of_different_names_have_different_files():
    several = ["xlora:top1", "xlora-top1", "xlora/top1", "xlora%3Atop1", "fixed:a=1,b=0", "fixed:a=1.b=0", "a b", "a-b"]
    assert len({file_name(name) for name in several}) == len(several)
    assert file_name("few-shot") == "few-shot.jsonl"
    assert file_name("fixed:a=0.5,b=-1") == "fixed%3Aa=0.5,b=-1.jsonl"


def test_seconds_and_memory_count_in_their_setting_alone(tmp_path):
    path, slow, fast = tmp_path / "a.jsonl", {"device": "one", "threads": 1}, {"device": "two", "threads": 1}
    first = AnswerFile(path, {"m": 1}, slow)
    first.add({"a": Kept("x", 2, {}, 8.0, False)})
    first.add({"b": Kept("x", 2, {}, 4.0, False)})
    first.add_peak(900.0)
    second = AnswerFile(path, {"m": 1}, fast)
    assert [kept.seconds for kept in second.answers.values()] == [None, None]
    assert second.peak_mb is None
    assert {key: kept.text for key, kept in second.answers.items()} == {"a": "x", "b": "x"}, "the answers are as good"
    second.add({"c": Kept("x", 2, {}, 0.5, True)})
    second.add_peak(70.0)
    assert second.peak_mb == 70.0
    for setting, seconds, peak in ((slow, [8.0, 4.0, None], 900.0), (fast, [None, None, 0.5], 70.0)):
        again = AnswerFile(path, {"m": 1}, setting)
        assert [kept.seconds for kept in again.answers.values()] == seconds
        assert again.peak_mb == peak
        assert again.replaced == ()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["setting"] for line in lines if "setting" in line] == [slow, fast], "said once for many answers"


def test_answers_without_a_setting_or_an_end_are_read(tmp_path):
    """As they were kept before these were noted."""
    path = tmp_path / "a.jsonl"
    answer = {"key": "k", "answer": "text", "tokens": 3, "weights": {"a": 1.0}, "seconds": 0.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"identity": {"m": 1}}, answer, {"peak_mb": 5.0})))
    file = AnswerFile(path, {"m": 1}, {"device": "cpu"})
    assert file.answers == {"k": Kept("text", 3, {"a": 1.0}, None, None)}
    assert file.peak_mb is None
    assert file.replaced == ()


def test_damaged_answers_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"identity": {"m": 1}}\nnonsense\n')
    with pytest.raises(ConfigError, match="remove it"):
        AnswerFile(path, {"m": 1})
    with pytest.raises(ConfigError, match="cannot be written"):
        AnswerFile(path / "below" / "b.jsonl", {"m": 1})


def test_digests(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "training.json").write_text("1")
    first = folder_digest(tmp_path / "a")
    (tmp_path / "a" / "training.json").write_text("2")
    assert folder_digest(tmp_path / "a") == first
    (tmp_path / "a" / "config.json").write_text("{ }")
    assert folder_digest(tmp_path / "a") != first


def test_the_lead():
    assert lead({"a": 0.2, "b": 0.7}) == "b"
    assert lead({"a": 0.0}) is None
    assert lead({}) is None

"""Every system answers as a model set up by hand does, and leaves the bench's model as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import DOMAINS, encode, tiny_model, write_domains

from tiny import make_expert, tiny_base
from toy import chat, tiny_tokenizer, write_rows
from xloom import XLoraForCausalLM
from xloom.collapse import static_expert
from xloom.errors import ConfigError, DataError, UnknownExpertError
from xloom.evaluation import evaluate, find_systems, load_tasks
from xloom.evaluation.answers import Prompt, answers
from xloom.evaluation.bench import Bench, right_experts
from xloom.evaluation.registry import all_names, check_words
from xloom.evaluation.shots import Constants, best_constant, solved
from xloom.evaluation.store import question_key
from xloom.merging import merge_experts
from xloom.routers import Arrow, BaseOnly, Centroid, Fixed, PerRow, Single, SpectR, Uniform, XLora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    model = tiny_model(folder)
    tasks = load_tasks(write_domains(folder / "data", model))
    return model, tasks, folder


def answers_of(world, name, tasks=None, **options):
    """Texts by column, as `evaluate` gives them."""
    model, all_tasks, _ = world
    tasks = all_tasks if tasks is None else tasks
    found = evaluate(model, tiny_tokenizer(), tasks, find_systems([name], model, **options))
    return {column: [kept.text for kept in c.kept] for column, c in found.outcomes[0].columns.items()}


def by_hand(model, tasks, router=None):
    """One prompt at a time, with `model.routing`."""
    bench, tokenizer = Bench(model, tiny_tokenizer(), tuple(tasks)), tiny_tokenizer()
    out = {}
    for task in tasks:
        out[task.name] = []
        for question in task.questions:
            ids = encode(question.row.prompt[0]["content"])
            with model.routing(router(ids) if callable(router) else router or model.router):
                (batch,) = answers(model, tokenizer, [Prompt(ids, bench.budget(question))])
            out[task.name].append(batch[0].text)
    return out


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("base", BaseOnly()),
        ("uniform", Uniform()),
        ("single:mech", Single("mech")),
        ("fixed:chem=0.5,prot=-1", Fixed({"chem": 0.5, "prot": -1.0})),
        ("arrow", Arrow()),
        ("arrow:top2", Arrow(top_k=2)),
        ("arrow:top2,temperature=0.5", Arrow(top_k=2, temperature=0.5)),
        ("xlora:without=mech", XLora(without=["mech"])),
        ("spectr", SpectR()),
        ("spectr:top1", SpectR(top_k=1)),
        ("xlora", XLora()),
    ],
)
def test_routers(world, name, router):
    model, tasks, _ = world
    assert answers_of(world, name) == by_hand(model, tasks, router)


def test_systems_differ(world):
    """A test of the tests above: on this model, different routers do give different answers."""
    names = ["base", "uniform", "single:mech", "single:chem", "arrow", "xlora", "xlora:top1", "merge:linear"]
    found = [json.dumps(answers_of(world, name)) for name in names]
    assert len(set(found)) == len(found)


def test_the_oracle_takes_the_right_expert(world):
    model, tasks, _ = world
    found = answers_of(world, "oracle")
    for domain in DOMAINS:
        assert found[domain] == answers_of(world, f"single:{domain}")[domain]
    right = evaluate(model, tiny_tokenizer(), tasks, find_systems(["oracle"], model))
    # the right answers are what the experts say: the world is made so
    assert all(column.scores.mean() > 0.7 for column in right.outcomes[0].columns.values())


def test_the_oracle_weighs_several_right_experts_alike(world, tmp_path):
    model, tasks, _ = world
    rows = [{**chat("abcd efgh", "a; b"), "domain": "chem+prot"}, {**chat("hgfe", "b; c"), "domain": "prot+chem"}]
    joined = load_tasks({"joined": write_rows(tmp_path / "joined.jsonl", rows)})
    assert right_experts(joined[0].questions[0], model.experts) == ("chem", "prot")
    assert answers_of(world, "oracle", joined) == by_hand(model, joined, Fixed({"chem": 0.5, "prot": 0.5}))
    strange = load_tasks({"odd": write_rows(tmp_path / "odd.jsonl", [{**chat("abc", "d"), "domain": "chem+zoo"}])})
    assert right_experts(strange[0].questions[0], model.experts) == ()
    with pytest.raises(DataError, match="^oracle: expected what it needs for one task of odd at least, found none"):
        evaluate(model, tiny_tokenizer(), strange, find_systems(["oracle"], model))
    both = evaluate(model, tiny_tokenizer(), [*tasks, *strange], find_systems(["oracle"], model))
    assert set(both.outcomes[0].columns) == set(DOMAINS)
    assert both.notes == ("oracle: lacks what it needs for odd",)
    assert both.rows(), "a column that nobody answered is left out"


@pytest.mark.parametrize("top_k", [None, 1])
def test_centroid(world, top_k):
    model, tasks, _ = world
    samples = {task.name: [encode(q.row.prompt[0]["content"]) for q in task.train] for task in tasks}
    centroid = Centroid.fit(model, samples, top_k=top_k)
    name = "centroid" if top_k is None else "centroid:top1"
    assert answers_of(world, name) == by_hand(
        model, tasks, lambda ids: PerRow(centroid.weights(model, torch.tensor([ids])))
    )


def test_seqr(world):
    model, tasks, _ = world
    samples = {task.name: [encode(q.row.prompt[0]["content"]) for q in task.train] for task in tasks}
    assert answers_of(world, "seqr") == by_hand(model, tasks, SpectR.calibrated(model, samples, top_k=1))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("xlora:top1", {"top_k_lora": 1}),
        ("xlora:top2-renormalised", {"top_k_lora": 2, "enable_softmax_topk": True}),
    ],
)
def test_the_same_head_cut_to_its_best(world, name, fields):
    model, tasks, folder = world
    model.save_pretrained(folder / "saved")
    saved = json.loads((folder / "saved" / "config.json").read_text())
    (folder / "saved" / "config.json").write_text(json.dumps(saved | fields))
    other = XLoraForCausalLM.from_pretrained(folder / "saved")
    assert other.config.top_k_lora == fields["top_k_lora"]
    assert answers_of(world, name) == by_hand(other, tasks)
    assert model.config.top_k_lora is None, "the model is as before"
    assert model.config.enable_softmax_topk is False


def test_merged_experts(world):
    model, tasks, folder = world
    paths = {name: folder / "experts" / name for name in DOMAINS}
    merged = merge_experts(str(folder / "base"), paths, "svd")  # ranks differ: by deltas
    other = XLoraForCausalLM.from_experts(str(folder / "base"), {"merged": merged})
    before = model.sites
    assert answers_of(world, "merge:linear") == by_hand(other, tasks, Single("merged"))
    assert model.sites == before
    assert answers_of(world, "uniform") == by_hand(model, tasks, Uniform()), "its own sites are back"


def test_collapse_is_an_adapter_on_the_base(world):
    _, _, folder = world
    assert answers_of(world, "collapse", collapse=folder / "experts" / "chem") == answers_of(world, "single:chem")


def test_without_a_folder_collapse_takes_the_mean_over_training_prompts(world):
    model, tasks, _ = world
    prompts = [encode(q.row.prompt[0]["content"]) for task in tasks for q in task.train]
    total, tokens = 0.0, 0
    for ids in prompts:
        with torch.no_grad():
            scalings = model(torch.tensor([ids])).scalings[0].double()
        total, tokens = total + scalings.sum(dim=0), tokens + len(scalings)
    adapter, _ = static_expert(model, total / tokens)
    static = XLoraForCausalLM.from_experts(model.plain_base(), {"adapter": adapter})
    expected = by_hand(static, tasks, Single("adapter"))
    assert answers_of(world, "collapse") == expected


def test_an_adapter_leaves_nothing_behind(world, tmp_path):
    """Not even at a module that no expert of the model adapts."""
    model, _, _ = world
    before, embedding = answers_of(world, "base"), model.get_input_embeddings()
    base = model.plain_base()
    folder = make_expert(base, tmp_path / "odd", 3, scale=2.0, r=2, target_modules=["embed_tokens"])
    assert answers_of(world, "collapse", collapse=Path(folder)) != before
    assert answers_of(world, "base") == before
    assert model.get_input_embeddings() is embedding


def test_another_model(world):
    model, _, folder = world
    model.save_pretrained(folder / "other")
    assert answers_of(world, "twin", models={"twin": folder / "other"}) == answers_of(world, "xlora")


def test_another_model_is_put_onto_the_base_that_was_given(world, tmp_path):
    model, tasks, folder = world
    model.save_pretrained(folder / "other")
    (twin,) = find_systems(["twin"], model, models={"twin": folder / "other"})
    base = tiny_base("llama", max_position_embeddings=1024)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(-1)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    moved = XLoraForCausalLM.from_pretrained(folder / "other", base=tmp_path / "base")
    systems = [twin, *find_systems(["xlora"], moved)]
    found = evaluate(moved, tiny_tokenizer(), tasks, systems, base=tmp_path / "base")
    its, own = ([k.text for c in o.columns.values() for k in c.kept] for o in found.outcomes)
    assert its == own
    assert own != [text for some in answers_of(world, "xlora").values() for text in some], "the base matters"
    benches = [Bench(moved, tiny_tokenizer(), tuple(tasks), base=given) for given in (None, tmp_path / "base")]
    assert twin.settings(benches[0]) != twin.settings(benches[1]), "answers without it are not taken for its own"


def test_a_model_of_other_tokens_is_refused(world, tmp_path):
    model, tasks, _ = world

    def refused(name, says, kind="llama", tokenizer=None, **changes):
        base = tiny_base(kind, **{"max_position_embeddings": 1024, **changes})
        base.save_pretrained(tmp_path / name / "base")
        (tokenizer or tiny_tokenizer()).save_pretrained(tmp_path / name / "base")
        expert = make_expert(base, tmp_path / name / "expert", r=2, target_modules=["q_proj"])
        other = XLoraForCausalLM.from_experts(str(tmp_path / name / "base"), {"a": expert})
        other.save_pretrained(tmp_path / name / "model")
        systems = find_systems(["odd"], model, models={"odd": tmp_path / name / "model"})
        with pytest.raises(ConfigError, match=rf"^odd: .*{name}.*model: {says}"):
            evaluate(model, tiny_tokenizer(), tasks, systems)

    refused("vocabulary", "its base has vocab_size 65; expected 64", vocab_size=65)
    refused("window", "its base has max_position_embeddings 512; expected 1024", max_position_embeddings=512)
    refused("kind", "its base has model_type 'qwen2'; expected 'llama'", kind="qwen2")
    template = tiny_tokenizer()
    template.chat_template = template.chat_template.replace("assistant", "robot")
    refused("template", "its tokenizer or chat template gives other token ids .*test.jsonl:1", tokenizer=template)


def test_few_shot_sees_solved_rows_of_the_kind(world):
    model, tasks, _ = world
    bench = Bench(model, tiny_tokenizer(), tuple(tasks), few_shot=2)
    (system,) = find_systems(["few-shot"], model)
    questions = list(tasks[1].questions)
    for question, row in zip(questions, system.rows(bench, questions), strict=True):
        turns = row.row.prompt
        assert [t["role"] for t in turns] == ["user", "assistant"] * 2 + ["user"]
        assert turns[-1] == question.row.prompt[0]
        shown = {(t["content"], a["content"]) for t, a in zip(turns[0:4:2], turns[1:4:2], strict=True)}
        known = {(q.row.prompt[0]["content"], q.right) for q in tasks[1].train if q.task == question.task}
        assert shown <= known
    assert {q.task for q in questions} == {"t0", "t1"}
    again = system.rows(bench, questions[::-1])[::-1]
    assert [row.row.prompt for row in again] == [row.row.prompt for row in system.rows(bench, questions)]


def test_plain_text_shots(world, tmp_path):
    rows = [{"prompt": f"{word}: ", "completion": word[::-1]} for word in ("abc", "bcd", "cde", "def")]
    folder = tmp_path / "plain"
    folder.mkdir()
    write_rows(folder / "test.jsonl", rows[:1])
    write_rows(folder / "train.jsonl", rows[1:])
    tasks = load_tasks({"plain": folder})
    (system,) = find_systems(["few-shot"], world[0])
    (row,) = system.rows(Bench(world[0], tiny_tokenizer(), tuple(tasks), few_shot=3), tasks[0].questions)
    parts = row.row.prompt.split("\n\n")
    assert parts[-1] == "abc: "
    assert set(parts[:-1]) == {"bcd: dcb", "cde: edc", "def: fed"}


def test_a_plain_text_answer_ends_where_the_next_shot_would_begin(world, tmp_path):
    model, _, _ = world

    def bench_of(name, right):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{word}: ", "completion": right} for word in ("abc", "bcd", "cde", "def")]
        write_rows(tmp_path / name / "test.jsonl", rows[:2])
        write_rows(tmp_path / name / "train.jsonl", rows[2:])
        return Bench(model, tiny_tokenizer(), tuple(load_tasks({name: tmp_path / name})), few_shot=2)

    (few,), (base,) = find_systems(["few-shot"], model), find_systems(["base"], model)
    bench = bench_of("lines", "xy")
    questions = list(bench.tasks[0].questions)
    prompts = few.prompts(bench, few.rows(bench, questions))
    assert [prompt.stop for prompt in prompts] == ["\n\n", "\n\n"]
    assert [prompt.stop for prompt in base.prompts(bench, questions)] == [None, None]
    stopless = [replace(prompt, stop=None) for prompt in prompts]
    keys = {question_key(q, p) for q, p in zip(questions * 2, [*prompts, *stopless], strict=True)}
    assert len(keys) == 4, "an answer that went on is not taken for one that stopped"
    texts = bench_of("texts", "x\n\ny")
    rows = few.rows(texts, texts.tasks[0].questions)
    assert [prompt.stop for prompt in few.prompts(texts, rows)] == [None, None], "right answers have blank lines"
    chats = Bench(model, tiny_tokenizer(), tuple(world[1]))
    rows = few.rows(chats, world[1][0].questions)
    assert {prompt.stop for prompt in few.prompts(chats, rows)} == {None}, "an end token stands in the prompt"


def test_the_constant_is_the_best_of_the_training_answers(tmp_path):
    def task(name, test, train, **more):
        folder = tmp_path / name
        folder.mkdir()
        for split, right in (("test", test), ("train", train)):
            rows = [{**chat(f"{name} {i}", answer), **more} for i, answer in enumerate(right)]
            write_rows(folder / f"{split}.jsonl", rows)
        return load_tasks({name: folder})[0]

    words = task("words", ["no"] * 5, ["yes", "no", "yes"])
    assert best_constant(words.train) == "yes"
    numbers = task("numbers", ["1"], ["0", "0", "4", "5", "6"], scorer="number", options={"tolerance": 1})
    assert best_constant(numbers.train) == "5"  # the commonest is 0, but 5 is near three
    constants = Constants([*words.train, *numbers.train], [*words.questions, *numbers.questions])
    assert constants.answer(words.questions[0]) == "yes"
    assert constants.answer(numbers.questions[0]) == "5"
    assert not constants.borrowed(words.questions[0])
    orphan = Constants([], words.questions)
    assert orphan.answer(words.questions[0]) == "no"
    assert orphan.borrowed(words.questions[0])
    parts = [{"answer": "no"}, {"answer": "1"}]
    rows = [{**chat("both", "no; 1"), "domain": "words+numbers", "task": "words+numbers", "scorer": "parts"}]
    rows[0] |= {"options": {"parts": parts}, "parts_domains": ["words", "numbers"]}
    (joined,) = load_tasks({"joined": write_rows(tmp_path / "joined.jsonl", rows)})
    assert constants.answer(joined.questions[0]) == "yes; 5"
    assert not constants.borrowed(joined.questions[0]), "its parts have training rows"
    assert Constants(words.train, joined.questions).borrowed(joined.questions[0])
    assert len(solved(words.questions[0], words.train, 2)) == 2


def test_all_is_everything_that_the_model_can_show(world, tmp_path):
    model, _, _ = world
    found = all_names(model)
    assert found[:3] == ["constant", "base", "few-shot"]
    assert {f"single:{name}" for name in DOMAINS} <= set(found)
    assert {"oracle", "uniform", "merge:ties", "merge:dare", "arrow", "spectr", "centroid", "xlora:top1"} <= set(found)
    assert "collapse" in found
    assert all_names(model, models={"early": tmp_path})[-1] == "early"
    assert next(s.name for s in find_systems(["base", "all", "base"], model)) == "base"
    assert len({s.name for s in find_systems(["all"], model)}) == len(found)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nonsense", "unknown system 'nonsense'; expected all, constant, "),
        ("oracles", r"unknown system 'oracles' \(did you mean 'oracle'\?\)"),
        ("single:", "expected single:NAME"),
        ("base:x", "router 'base:x': expected base"),
        ("oracle:x", "router 'oracle:x': expected oracle"),
        ("constant:", "expected constant"),
        ("fixed:chem=a", "fixed:NAME=WEIGHT"),
        ("merge", "expected merge: and one of linear"),
        ("merge:nothing", "expected merge: and one of linear"),
        ("xlora:best", "xlora:topK"),
        ("xlora:top1-normalised", "xlora:topK"),
        ("arrow:top0", "expected arrow"),
        ("arrow:top_k=2", "expected arrow"),
        ("centroid:top1-renormalised", r"expected centroid\[:topK\]"),
        ("collapse:all", "expected collapse"),
        ("", "unknown system ''"),
    ],
)
def test_unknown_systems_are_found_without_a_model(world, word, says):
    for find in (lambda: find_systems(["base", word], world[0]), lambda: check_words(["base", word])):
        with pytest.raises(ConfigError, match=says):
            find()


def test_words_are_known_without_a_model(world, tmp_path):
    words = [*all_names(world[0]), "all", "fixed:a=1", "single:zoo", "arrow:top9", "twin", "merge:dare_ties_svd"]
    check_words(words, ["twin"])
    with pytest.raises(ConfigError, match="unknown system 'twin'"):
        check_words(words)
    for name in ("all", "base", "arrow:mine", "seqr"):
        with pytest.raises(ConfigError, match=f"--model {name}: .*choose another"):
            check_words(["base"], [name])


@pytest.mark.parametrize(
    ("word", "most"), [("xlora:top9", 3), ("xlora:top4-renormalised", 3), ("arrow:top4", 3), ("centroid:top4", 3)]
)
def test_more_than_there_are_cannot_be_kept(world, word, most):
    with pytest.raises(ConfigError, match=f"router '{word}': expected K of topK from 1 to {most}"):
        find_systems([word], world[0])


def test_names_that_are_taken(world, tmp_path):
    with pytest.raises(ConfigError, match="choose another"):
        find_systems(["base"], world[0], models={"base": tmp_path})
    with pytest.raises(UnknownExpertError, match="'zoo'"):
        find_systems(["single:zoo"], world[0])
    with pytest.raises(UnknownExpertError, match="'zoo'"):
        find_systems(["fixed:zoo=1"], world[0])

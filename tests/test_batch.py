"""A batch whose rows come and go: each text is that of `generate` alone."""

import dataclasses
import functools
import random

import pytest
import torch
from transformers import LogitsProcessor

from tiny import ARCHITECTURES, make_expert, prompt, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM, routers
from xloom.decoding import Batch, Request, write
from xloom.errors import ConfigError, RowError, UnknownExpertError

FORMS = {
    "two passes": {},
    "pooled": {"head_input": ["token", "ema:4"], "null_expert": True},
    "early gate": {"gate_at_layer": 1, "head_input": "running_mean", "drop_sites_below_gate": True},
}
ROUTERS = [
    routers.XLora(), routers.Single("a"), routers.XLora(without=["b"]), routers.BaseOnly(), routers.Arrow(),
    routers.Fixed({"b": 0.5}), routers.XLora(top_k=1), routers.Uniform(),
]  # fmt: skip


def mixed(kind: str, folder, **fields) -> XLoraForCausalLM:
    base = tiny_base(kind)
    paths = {n: make_expert(base, folder / n, i, r=2, target_modules="all-linear") for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True, **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.5)
    return model


def requests(count: int, seed: int = 0, **changes) -> list[Request]:
    """Of several lengths, routings and numbers of tokens."""
    draw = random.Random(seed)
    return [
        Request(
            tuple(prompt(1, draw.randint(1, 12), seed + i)[0].tolist()), draw.randint(1, 9),
            draw.choice(ROUTERS), **changes,
        )
        for i in range(count)
    ]  # fmt: skip


def alone(model: XLoraForCausalLM, request: Request) -> list[int]:
    """Slow and obvious: generate."""
    ids = torch.tensor([request.ids])
    options = {"do_sample": False, "pad_token_id": 0, **request.options}
    if request.generator is not None:
        options["generator"] = request.generator
    found = model.generate(ids, max_new_tokens=request.max_new_tokens, routing=request.routing, **options)
    return found[0, ids.shape[1] :].tolist()


def together(model: XLoraForCausalLM, some: list[Request], joins: list[int]) -> list[list[int]]:
    """Rows join before the steps of these numbers."""
    batch, found, places = Batch(model), [[] for _ in some], {}
    waiting = sorted(range(len(some)), key=lambda i: joins[i])
    step = 0
    while waiting or batch:
        while waiting and joins[waiting[0]] <= step:
            place = waiting.pop(0)
            places[batch.join(some[place])] = place
        for row, one, _ in batch.step():
            found[places[row]].append(one.token_id)
        step += 1
    return found


def seeds(of):
    """Requests whose generators start anew."""
    return [dataclasses.replace(r, generator=torch.Generator().manual_seed(i)) for i, r in enumerate(of)]


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_join_and_leave_at_any_token(form, tmp_path):
    model = mixed("llama", tmp_path, **FORMS[form])
    for seed in range(3):
        some = requests(10, seed)
        expected = [alone(model, request) for request in some]
        joins = [random.Random(seed + 100 + i).randint(0, 12) for i in range(10)]
        assert together(model, some, joins) == expected
        assert together(model, some, [0] * 10) == expected
    assert len({tuple(text[-2:]) for text in expected}) > 3, "texts that differ, so that a mix-up would show"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind, tmp_path):
    """Sliding windows are shorter than the texts."""
    if "moe" in kind or kind == "mixtral":
        pytest.skip("their experts see rearranged tokens, which all-linear experts of LoRA refuse")
    model = mixed(kind, tmp_path, head_input=["token", "ema:4"])
    for seed in (1, 2):
        some = requests(8, seed)
        expected = [alone(model, request) for request in some]
        assert together(model, some, [0, 0, 1, 2, 2, 5, 8, 9]) == expected


def test_drawn_rows_are_as_alone(tmp_path):
    model = mixed("llama", tmp_path)
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}
    some = requests(8, 3, options=options)
    expected = [alone(model, request) for request in seeds(some)]
    assert together(model, seeds(some), [0, 0, 0, 1, 2, 2, 5, 6]) == expected
    assert expected != [alone(model, dataclasses.replace(request, options={})) for request in some]


def test_settings_of_generate_are_each_row_s_own(tmp_path):
    model = mixed("llama", tmp_path)
    settings = [
        {}, {"repetition_penalty": 1.5}, {"min_new_tokens": 4, "eos_token_id": list(range(5, 40))},
        {"bad_words_ids": [[i] for i in range(30)]}, {"eos_token_id": list(range(2, 30))}, {"no_repeat_ngram_size": 1},
    ]  # fmt: skip
    some = [dataclasses.replace(r, options=o, max_new_tokens=9) for r, o in zip(requests(6, 4), settings, strict=True)]
    expected = [alone(model, request) for request in some]
    assert together(model, some, [0, 0, 1, 1, 2, 3]) == expected
    assert len({len(text) for text in expected}) > 1


def test_steps_say_what_streams_say(tmp_path):
    model, tokenizer = mixed("llama", tmp_path), tiny_tokenizer()
    some = requests(5, 5)
    found = [[] for _ in some]
    for place, step, _ in write(model, tokenizer, some):
        found[place].append(step)
    for request, steps in zip(some, found, strict=True):
        ids = torch.tensor([request.ids])
        options = {"max_new_tokens": request.max_new_tokens, "routing": request.routing, "do_sample": False}
        expected = list(model.stream(ids, tokenizer, **options))
        assert [s.token_id for s in steps] == [s.token_id for s in expected]
        assert [s.text for s in steps] == [s.text for s in expected]
        assert [s.logprob for s in steps] == pytest.approx([s.logprob for s in expected], abs=1e-4)
        for one, other in zip(steps, expected, strict=True):
            torch.testing.assert_close(one.scalings, other.scalings, rtol=0, atol=1e-5)


def test_why_rows_end(tmp_path):
    model, tokenizer = mixed("llama", tmp_path), tiny_tokenizer()
    ids = tuple(prompt(1, 5)[0].tolist())
    plain = [one for _, one, _ in write(model, tokenizer, [Request(ids, 8)])]
    text = "".join(step.text for step in plain)
    batch = Batch(model, tokenizer)
    batch.join(Request(ids, 8))
    batch.join(Request(ids, 8, options={"eos_token_id": plain[2].token_id}))
    batch.join(Request(ids, 8, stop=lambda so_far: so_far == text[:5]))
    batch.join(Request(ids, 8, options={"max_time": 1e-9}))
    ends, steps = {}, [0] * 4
    while batch:
        for row, _, end in batch.step():
            steps[row] += 1
            if end is not None:
                ends[row] = end
    first = next(i + 1 for i, step in enumerate(plain) if step.token_id == plain[2].token_id)
    assert ends == {0: "length", 1: "end", 2: "stop", 3: "stop"}
    assert steps[0] == 8 and steps[1] == first and steps[3] == 1
    assert not batch and batch.step() == []


def test_a_row_that_is_taken_out(tmp_path):
    model = mixed("llama", tmp_path)
    some = requests(4, 6)
    some = [dataclasses.replace(request, max_new_tokens=8) for request in some]
    expected = [alone(model, request) for request in some]
    batch, found = Batch(model), {}
    numbers = [batch.join(request) for request in some]
    batch.leave(numbers[3])  # before it was read
    for step in range(8):
        if step == 3:
            batch.leave(numbers[0])
            batch.leave(numbers[0])
        for row, one, _ in batch.step():
            found.setdefault(row, []).append(one.token_id)
    assert len(batch) == 0
    assert found == {0: expected[0][:3], 1: expected[1], 2: expected[2]}


def test_a_step_that_was_broken_off_is_not_gone_on_with(tmp_path):
    """The model has read a token that nobody was told of: what came next would be wrong."""
    model = mixed("llama", tmp_path)
    batch = Batch(model)
    batch.join(Request((5, 6), 5))
    batch.step()

    def break_off(*_):
        raise KeyboardInterrupt

    handle = model.mixture.sites[9].base.register_forward_pre_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    handle.remove()
    for call in (batch.step, lambda: batch.leave(0)):
        with pytest.raises(ConfigError, match="broken off"):
            call()


def test_a_batch_is_not_changed_from_within_a_step(tmp_path):
    model, batch = mixed("llama", tmp_path), None
    batch = Batch(model, tiny_tokenizer())
    batch.join(Request((5, 6), 3, stop=lambda text: batch.leave(1)))
    batch.join(Request((5, 6, 7), 3))
    with pytest.raises(RowError, match="row 0.*a step of this batch"):
        batch.step()
    assert [[row for row, *_ in batch.step()] for _ in range(3)] == [[1], [1], [1]] and not batch


def test_a_list_is_written_with_what_held_when_it_was_made(tmp_path):
    model = mixed("llama", tmp_path)
    with model.routing(routers.Single("a")):
        steps = write(model, None, [Request((5, 6, 7), 5)])
    assert [s.token_id for _, s, _ in steps] == alone(model, Request((5, 6, 7), 5, routers.Single("a")))


def test_guidance_reads_under_the_row_s_routing(tmp_path):
    model = mixed("llama", tmp_path)
    some = [Request((5, 6, 7), 6, routing, options={"guidance_scale": 2.0}) for routing in ROUTERS[:3]]
    expected = [alone(model, request) for request in some]
    for request, text in zip(some, expected, strict=True):
        with model.routing(request.routing):
            assert alone(model, dataclasses.replace(request, routing=None)) == text
        with model.routing(routers.BaseOnly()):
            assert alone(model, request) == text
            assert together(model, [request], [0]) == [text]
    assert len(set(map(tuple, expected))) > 1


class Fails(LogitsProcessor):
    """At the third token."""

    def __init__(self, prompt_tokens: int) -> None:
        self.last = prompt_tokens + 2

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.last:
            raise ValueError("it has had enough")
        return scores


def test_a_row_that_fails_takes_nobody_with_it(tmp_path):
    model = mixed("llama", tmp_path)
    some = [dataclasses.replace(request, max_new_tokens=6) for request in requests(5, 7)]
    expected = [alone(model, request) for request in some]
    some[1] = dataclasses.replace(some[1], options={"logits_processor": [Fails(len(some[1].ids))]})
    some[3] = dataclasses.replace(some[3], stop=lambda text: [][0])
    batch, found, failed = Batch(model, tiny_tokenizer()), [[] for _ in some], {}
    for request in some:
        batch.join(request)
    while batch:
        try:
            for row, step, _ in batch.step():
                found[row].append(step.token_id)
        except RowError as error:
            failed[error.row] = str(error)
    assert failed == {1: "row 1: ValueError: it has had enough", 3: "row 3: IndexError: list index out of range"}
    assert [found[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
    assert found[1] == expected[1][:2] and found[3] == []


def test_padding_goes_with_the_rows_that_needed_it(tmp_path):
    """A long row among short ones does not leave its length behind, or a batch would grow for ever."""
    for kind in ("llama", "mistral"):
        model = mixed(kind, tmp_path / kind, head_input="ema:4")
        batch = Batch(model)
        batch.join(Request(tuple(prompt(1, 40)[0].tolist()), 2, routers.Single("a")))
        batch.join(Request((5, 6), 20))
        for _ in range(6):
            batch.step()
        assert batch._written.mask_BT.shape == (1, 2 + 5)
        assert {layer.get_seq_length() for layer in batch._written.cache.layers} == {7}


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Of the token ids of every forward."""
    seen: list[tuple[int, ...]] = []
    plain = XLoraForCausalLM.forward

    @functools.wraps(plain)
    def forward(self, input_ids, **options):
        seen.append(tuple(input_ids.shape))
        return plain(self, input_ids, **options)

    monkeypatch.setattr(XLoraForCausalLM, "forward", forward)
    return seen


def test_prompts_are_read_within_the_bound(tmp_path, shapes):
    batch = Batch(mixed("llama", tmp_path), batch_tokens=12)
    for n in (5, 5, 2, 20):
        batch.join(Request(tuple(prompt(1, n)[0].tolist()), 1))
    assert len(batch.step()) == 4
    assert shapes == [(2, 5), (1, 2), (1, 20)]


@pytest.mark.parametrize(("kind", "first"), [("llama", [(2, 9), (6, 2)]), ("mistral", [(6, 11), (6, 1)])])
def test_what_a_prefix_saves(tmp_path, shapes, kind, first):
    """It is read once for each kind of routing, and never where a window would forget it."""
    start = tuple(prompt(1, 9)[0].tolist())
    some = [Request((*start, 2 + i, 5), 3, ROUTERS[i % 2]) for i in range(6)]
    model = mixed(kind, tmp_path)
    expected = [alone(model, request) for request in some]
    shapes.clear()
    found = [[] for _ in some]
    for place, step, _ in write(model, None, some):
        found[place].append(step.token_id)
    assert found == expected
    assert shapes[:2] == first


def test_what_is_refused(tmp_path):
    model = mixed("llama", tmp_path)
    batch = Batch(model)
    for wrong, said in [
        (Request((), 3), "ids: expected at least one token"),
        (Request((1, 2), 0), "max_new_tokens: expected at least 1, found 0"),
        (Request((1, 2), 3, [routers.XLora()] * 2), "one line for one request, found 2"),
        (Request((1, 2), 3, stop=lambda text: False), "stop: expected a tokenizer"),
        (
            Request((1, 2), 3, options={"num_beams": 2, "past_key_values": None}),
            "num_beams, past_key_values: not for a",
        ),
        (Request((5, 99), 3), "tokens from 0 to 63, found 5 to 99"),
        (Request((-1, 9), 3), "tokens from 0 to 63, found -1 to 9"),
        (Request((1.5, 2.0), 3), "ids: expected token ids of one prompt"),
        (Request(torch.ones(1, 3), 3), "ids: expected token ids of one prompt"),
        (Request("abc", 3), "ids: expected token ids of one prompt"),
        (Request((1, 2), 2.5), "max_new_tokens: expected at least 1, found 2.5"),
        (Request((1, 2), 3, generator=7), "generator: expected a torch.Generator, found 7"),
        (Request((1, 2), 3, routers.Precomputed(torch.ones(1, 2, 21, 2))), "a replay is for one forward"),
        (Request((1, 2), 3, options={"temprature": 2.0}), "options: temprature: not for a row"),
        (Request((1, 2), 3, options={"stop_strings": "a"}), "options: stop_strings: .*`stop`"),
        (Request((1, 2), 3, stop="a"), "stop: expected a function of the text so far, found 'a'"),
        (Request((1, 2), 3, generator=torch.Generator()), "generator: expected do_sample=True, found False"),
        ([1, 2], r"expected a Request, found \[1, 2\]"),
        (Request((1, 2), 127), "2 tokens and 127 new ones are more than the model's window of 128"),
    ]:
        with pytest.raises(ConfigError, match=said):
            batch.join(wrong)
        with pytest.raises(ConfigError, match=said):  # at once, not when its batch is reached
            write(model, None, [Request((5, 6), 3), wrong])
    with pytest.raises(UnknownExpertError, match="'c'"):
        batch.join(Request((1, 2), 3, routers.Single("c")))
    assert len(batch) == 0

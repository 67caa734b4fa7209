"""Speculation changes nothing but the number of forwards; `stream` shows what `generate` writes."""

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import xloom
from test_architectures import mixed
from tiny import ARCHITECTURES, prompt
from toy import tiny_tokenizer
from xloom import routers
from xloom.decoding.drafts import lookup
from xloom.decoding.joint import Joint
from xloom.decoding.loop import Chooser, Draft, Policy, Tally, write
from xloom.decoding.steppers import Stepped, Stepper
from xloom.errors import CacheError, ConfigError

NEW = 14
POOLED = {"head_input": ["token", "ema:4"]}
EARLY = {"gate_at_layer": 0, "head_input": "running_mean"}


def repeated(seed: int = 0) -> torch.Tensor:
    """A prompt in which something can be looked up."""
    return torch.cat([prompt(1, 5, seed=seed), prompt(1, 5, seed=seed), prompt(1, 2, seed=seed)], dim=1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_text_is_that_of_plain_decoding(kind: str, tmp_path):
    """Over windows of sliding attention, which are 6 tokens long, too."""
    model = mixed(kind, tmp_path, **POOLED)
    plain = {"max_new_tokens": NEW, "do_sample": False}
    for ids in (repeated(), prompt(1, 1, seed=3)):
        expected = model.generate(ids, **plain)
        for looked_up in (0, 6):
            fast = xloom.speculative(looked_up)
            assert torch.equal(model.generate(ids, custom_generate=fast, **plain), expected)
            assert fast.tally.tokens == NEW - 1
            assert fast.tally.drafted >= fast.tally.accepted
            # with nothing to look up, drafts come from a joint pass: not with bloom, nor beyond a sliding window
            joint = kind != "bloom" and (ids.shape[1] == 1 or not ARCHITECTURES[kind].get("sliding_window"))
            assert fast.tally.drafted > 0 or looked_up or not joint


@pytest.mark.parametrize("fields", [{}, POOLED, EARLY, {"scaling_pass_value": 0.5}, {"top_k_lora": 1}])
def test_every_kind_of_head(fields: dict, tmp_path):
    model = mixed("llama", tmp_path, **fields)
    model.config.global_scaling_weight = 1.3
    plain = {"max_new_tokens": 40, "do_sample": False}
    ids = repeated(1)
    expected = model.generate(ids, **plain)
    assert torch.equal(model.generate(ids, custom_generate=xloom.speculative(), **plain), expected)
    with torch.no_grad():  # scalings that change slowly, as trained ones do, so that drafts are right
        for parameter in model.head.parameters():
            parameter.mul_(0.05)
    fast = xloom.speculative()
    assert torch.equal(model.generate(ids, custom_generate=fast, **plain), model.generate(ids, **plain))
    assert fast.tally.accepted > 0 or "top_k_lora" in fields  # which jumps from token to token in a random model
    for router in (routers.Uniform(), routers.BaseOnly(), routers.XLora(only=["a"])):
        with model.routing(router):
            expected = model.generate(ids, **plain)
            assert torch.equal(model.generate(ids, custom_generate=xloom.speculative(), **plain), expected)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("fields", [POOLED, EARLY])
def test_the_cache_goes_on_as_if_nothing_had_been_drafted(kind: str, fields: dict, tmp_path):
    model = mixed(kind, tmp_path, **fields)
    ids = repeated(2)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, custom_generate=xloom.speculative(), **options)
    assert first.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    longer = torch.cat([first.sequences, prompt(1, 3, seed=9)], dim=1)
    want = model(longer, use_cache=False)
    rest = longer[:, first.past_key_values.get_seq_length() :]
    got = model(rest, past_key_values=first.past_key_values)
    torch.testing.assert_close(got.logits, want.logits[:, -rest.shape[1] :], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.scalings, want.scalings[:, -rest.shape[1] :], rtol=0, atol=1e-5)


def test_other_caches_and_padding(tmp_path):
    model = mixed("llama", tmp_path, **POOLED)
    ids = repeated()
    plain = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, **plain)
    options = plain | {"custom_generate": xloom.speculative()}
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    begun = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=begun)
    assert torch.equal(model.generate(ids, past_key_values=begun, **options), expected)
    padded = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], expected)
    with pytest.raises(CacheError, match="StaticSlidingWindowLayer"):
        mixed("mistral", tmp_path / "m").generate(ids, cache_implementation="static", **options)


def test_processors_and_criteria_hold(tmp_path):
    model = mixed("llama", tmp_path)
    ids = repeated()
    for options in (
        {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 5, "eos_token_id": 7},
        {"max_time": 100.0}, {"bad_words_ids": [[3], [9, 4]]},
    ):  # fmt: skip
        options = options | {"max_new_tokens": 25, "do_sample": False}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, custom_generate=xloom.speculative(), **options), expected), options
    # an end token within what was drafted ends the text
    text = model.generate(ids, max_new_tokens=25, do_sample=False)[0, ids.shape[1] :].tolist()
    for end in set(text):
        options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        got = model.generate(ids, custom_generate=xloom.speculative(), **options)
        assert got[0, ids.shape[1] :].tolist() == text[: text.index(end) + 1]


def test_scores_and_logits_are_those_of_plain_decoding(tmp_path):
    model = mixed("llama", tmp_path)
    options = {
        "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True, "repetition_penalty": 1.2,
    }  # fmt: skip
    expected = model.generate(repeated(), **options)
    found = model.generate(repeated(), custom_generate=xloom.speculative(), **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.scores), torch.cat(expected.scores))
    torch.testing.assert_close(torch.cat(found.logits).float(), torch.cat(expected.logits).float())


def test_drawn_text_has_the_distribution_of_plain_decoding(tmp_path):
    """Three tokens with top_k=2 from a hot model: eight texts, whose probabilities are computed one by one."""
    model = mixed("llama", tmp_path)
    ids, count = repeated(), 700
    options = {"do_sample": True, "top_k": 2, "temperature": 3.0, "max_new_tokens": 3}
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for text, weight in expected.items():
            whole = torch.cat([ids, torch.tensor([text], dtype=torch.long).reshape(1, -1)], dim=1)
            top = (model(whole).logits[0, -1].detach() / 3.0).topk(2)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                grown[*text, token] = weight * share
        expected = grown
    fast = xloom.speculative(generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    found = dict.fromkeys(expected, 0)
    for _ in range(count):
        found[tuple(model.generate(ids, custom_generate=fast, **options)[0, ids.shape[1] :].tolist())] += 1
    chi2 = sum((found[text] - count * share) ** 2 / (count * share) for text, share in expected.items())
    assert min(expected.values()) * count > 5
    assert 0.1 < fast.tally.acceptance < 0.97  # both ways are taken
    assert chi2 < 24.3  # 7 degrees of freedom, one in a thousand


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_draft_leaves_the_distribution_as_it_is(seed: int):
    """Drawn from q and then accepted or replaced: what comes out has probability p."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 5, generator=generator) * 1.5).softmax(-1)
    chooser = Chooser(lambda ids, logits: logits, sample=True, generator=generator)
    ids, counts, draws = torch.zeros(1, 1, dtype=torch.long), torch.zeros(5), 1500
    for _ in range(draws):
        draft = chooser.propose(ids, q.log()) if seed % 3 else Draft(seed % 5)
        counts[chooser.choose(ids, p.log(), draft)[0]] += 1
    spread = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 5 * spread + 1e-3).all()


class Scripted(Stepper):
    """A model that writes a known text, with windows exact as far as a script says and misled beyond."""

    def __init__(self, text: Sequence[int], exact: Sequence[int], wrong: Sequence[bool], start: int) -> None:
        self.text, self.exact, self.wrong, self.length = text, list(exact), list(wrong), start
        self.held: list[int] = []
        self.seen: list[int] = []
        self.mixed_exact = 0

    def step(self, window: Sequence[int], *, ahead: bool = True) -> Stepped:
        # at least what the last step has seen of this window is exact
        again = next((i for i, (a, b) in enumerate(zip(window, self.seen)) if a != b), min(len(window), len(self.seen)))
        self.window, self.seen = list(window), list(window)
        assert self.length + len(window) < len(self.text), "the last token of a text does not enter the model"
        exact = min(len(window), again + (self.exact.pop() if self.exact else 0))
        logits = torch.zeros(len(window), 10)
        for place in range(len(window)):
            at = self.length + place + 1
            right = self.text[at] if at < len(self.text) else 0
            misled = self.text[:at] != self.text[: self.length] + self.window[: place + 1]
            if place >= exact and (misled or (self.wrong.pop() if self.wrong else False)):
                right = (right + 1) % 10
            logits[place, right] = 1.0
        self.mixed_exact = exact
        shown = len(window) if ahead else exact
        return Stepped(logits[:shown], torch.zeros(shown, 1, 1), exact)

    def keep(self, window: int, count: int) -> None:
        assert window == len(self.window)
        assert count <= self.mixed_exact
        assert self.window[:count] == self.text[self.length : self.length + count]
        self.length += count
        self.seen = self.seen[count:]

    def close(self) -> None: ...


@given(
    text=st.lists(st.integers(0, 9), min_size=4, max_size=40),
    exact=st.lists(st.integers(0, 4), max_size=60),
    wrong=st.lists(st.booleans(), max_size=100),
    guesses=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=60),
    most=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_any_pattern_of_right_and_wrong_drafts(text, exact, wrong, guesses, most):
    stepper = Scripted(text, exact, wrong, start=1)
    tally, written = Tally(), list(text[:2])

    def guess(so_far: Sequence[int], count: int) -> list[int]:
        assert list(so_far[: len(written)]) == written
        assert count > 0 or not most
        return guesses.pop() if guesses else []

    loop = write(
        stepper, torch.tensor([text[:1]]), text[1], Chooser(lambda ids, logits: logits, sample=False),
        room=lambda: len(text) - len(written), policy=Policy(most, guess), tally=tally,
    )  # fmt: skip
    for one in loop:
        written.append(one.token)
        if len(written) >= len(text):
            break
    loop.close()
    assert written == text
    assert stepper.length == len(text) - 1
    assert tally.tokens == len(text) - 2


def test_looking_up_stays_within_bounds():
    again = [5, 6, 7, 8] * 4
    assert Policy(4).look_up(again, 99) == [5, 6, 7, 8]
    assert Policy(4).look_up(again, 2) == [5, 6]
    assert Policy(4).look_up(again, 0) == Policy(4).look_up(again, -1) == Policy(0).look_up(again, 99) == []
    assert Policy(2, lambda text, count: [1, 2, 3]).look_up(again, 99) == [1, 2]


def test_drafts_that_are_never_right_are_given_up_until_they_are():
    """Given up, they are asked for now and then, in forwards that see a token and not only in those that judge one."""
    policy, text = Policy(0), [0]
    taken, asked = [], []
    for step in range(120):
        right = step >= 60
        asked.append(policy.asks())
        taken.append(asked[-1] and policy.takes(len(text), 1 if right else 2))
        text.append(1)
        policy.watch(text)
    assert taken[0] and not any(taken[6:60])
    assert {step % 2 for step in range(20, 60) if asked[step]} == {0, 1}
    assert sum(asked[20:60]) < 8
    assert all(taken[-12:])


@pytest.mark.parametrize("fields", [{}, EARLY])
def test_a_text_may_end_where_the_base_has_no_more_positions(fields: dict, tmp_path):
    model = mixed("opt", tmp_path, **fields)  # 128 learned positions; the last token of a text needs none
    with torch.no_grad():  # drafts that are right
        for parameter in model.head.parameters():
            parameter.mul_(0.02)
    ids, options = prompt(1, 12).repeat(1, 10), {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=xloom.speculative(), **options), expected)


def test_a_head_that_jumps_takes_the_rows_of_two_passes(tmp_path, monkeypatch):
    """Where no draft is right, a token takes two forwards of one token, as plain decoding does, and an odd third."""
    model, ids = mixed("llama", tmp_path), prompt(1, 5)
    rows: list[int] = []
    real = Joint._forward

    def counted(self, window, exact, used_WSN, ahead):
        rows.append(exact + (len(window) - exact) * (1 + ahead))
        return real(self, window, exact, used_WSN, ahead)

    monkeypatch.setattr(Joint, "_forward", counted)
    monkeypatch.setattr(Chooser, "propose", lambda self, ids_1T, logits_V: Draft(int(logits_V.argmin())))
    way = xloom.speculative(0)
    text = model.generate(ids, custom_generate=way, max_new_tokens=80, do_sample=False)
    assert torch.equal(text, model.generate(ids, max_new_tokens=80, do_sample=False))
    assert way.tally.tokens == 79
    assert sum(rows[20:]) / len(rows[20:]) < 1.2


def test_lookup_takes_the_latest_of_the_longest_matches():
    assert lookup([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 2) == [8, 7]
    assert lookup([1, 2, 3, 9, 5, 3, 6, 1, 2, 3], 1) == [9]
    assert lookup([9, 2, 3, 8, 7, 6, 1, 2, 3], 8) == [8, 7]  # as many as match
    assert lookup([1, 2, 3], 4) == []
    assert lookup([4, 5, 4, 5, 4], 5) == [5, 4, 5]  # goes round
    assert lookup([1, 1], 0) == []
    assert lookup([], 3) == lookup([1], 3) == []


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 5), st.integers(1, 5))
def test_lookup_means_its_reference(tokens: list[int], most: int, longest: int):
    """Length by length from the longest on, from the latest place back."""
    end, expected = len(tokens), []
    for length in range(min(max(longest, most), end - 1), 0, -1):
        places = [p for p in range(length, end) if tokens[p - length : p] == tokens[end - length :]]
        if places:
            expected = [tokens[places[-1] + i % (end - places[-1])] for i in range(min(length, most))]
            break
    assert lookup(tokens, most, longest) == expected


def test_stream(tmp_path):
    model = mixed("llama", tmp_path)
    ids, tokenizer = repeated(), tiny_tokenizer()
    options = {"max_new_tokens": NEW, "do_sample": False}
    with model.logging_scalings() as log:
        expected = model.generate(ids, **options)[0]
    plain, fast = (list(model.stream(ids, tokenizer, speculative=s, **options)) for s in (False, True))
    for steps in (plain, fast):
        assert [step.token_id for step in steps] == expected[ids.shape[1] :].tolist()
        assert "".join(step.text for step in steps) == tokenizer.decode(
            expected[ids.shape[1] :], skip_special_tokens=True
        )
        logits = model(expected[None]).logits[0].detach().log_softmax(-1)
        for place, step in enumerate(steps):
            at = ids.shape[1] + place
            assert math.isclose(step.logprob, float(logits[at - 1, expected[at]]), abs_tol=1e-4)
            assert step.scalings.shape == (len(model.sites), len(model.experts))
            torch.testing.assert_close(step.scalings.cpu(), log.tokens()[0, at - 1], atol=1e-6, rtol=0)
    assert not any(step.from_draft for step in plain)
    assert any(step.from_draft for step in fast)
    with model.logging_scalings() as drafted:
        list(model.stream(ids, speculative=True, **options))
    torch.testing.assert_close(drafted.tokens(), log.tokens(), atol=1e-6, rtol=0)


def test_stop_strings(tmp_path):
    model, tokenizer = mixed("llama", tmp_path), tiny_tokenizer()
    ids = repeated()
    text = [step.text for step in model.stream(ids, tokenizer, max_new_tokens=NEW, do_sample=False)]
    stop = text[4].strip()
    for fast in (True, False):
        steps = model.stream(ids, tokenizer, speculative=fast, stop_strings=[stop], max_new_tokens=NEW, do_sample=False)
        written = [step.text for step in steps]
        assert written == text[: next(i for i, part in enumerate(text) if stop in part) + 1]
    with pytest.raises(ConfigError, match="expected a tokenizer"):
        list(model.stream(ids, stop_strings=["a"], max_new_tokens=2))


def test_what_it_cannot_do_is_refused(tmp_path):
    model = mixed("llama", tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False, "custom_generate": xloom.speculative()}
    for given_, match in (
        ({"inputs": prompt(2, 5)}, "1 row, found 2"),
        ({"inputs": prompt(1, 5), "num_beams": 2}, "num_beams=1, found 2"),
        ({"inputs": prompt(1, 5), "use_cache": False}, "use_cache=True"),
        ({"inputs": prompt(1, 5), "return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 5, 32, dtype=torch.float64)}, "input_ids, found inputs_embeds"),
    ):
        with pytest.raises(ConfigError, match=match):
            model.generate(**given_, **options)
    with pytest.raises(ConfigError, match="0 or more, found -1"):
        xloom.speculative(-1)


LEFT_OPEN = """
import sys, torch
sys.path[:0] = {path!r}
from pathlib import Path
import xloom
from test_architectures import mixed
from tiny import prompt
model = mixed("llama", Path({folder!r}))
[step.nothing for step in model.stream(prompt(1, 9), speculative=True, max_new_tokens=30)]
"""


def test_a_text_left_open_when_the_interpreter_ends(tmp_path):
    """An error nobody catches keeps the text until then; the process ends with that error and no crash."""
    script = tmp_path / "script.py"
    script.write_text(LEFT_OPEN.format(path=[path for path in sys.path if path], folder=str(tmp_path)))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.rstrip().splitlines()[-1] == "AttributeError: 'Step' object has no attribute 'nothing'"

"""Scalings that stay for a while: held against whole forwards with the scalings that were meant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import xloom
from test_architectures import mixed
from tiny import prompt
from xloom import routers
from xloom.decoding import Refreshing
from xloom.errors import ConfigError

NEW = 12
POOLED = {"head_input": ["token", "ema:4"]}


def written_slowly(model, ids: torch.Tensor, every: int | None, after: int, new: int = NEW) -> list[int]:
    """No cache: at every token a forward over the whole text, with the scalings that each token is to have."""
    text, start = ids, ids.shape[1]
    for _ in range(new):
        used = used_scalings(model(text, use_cache=False).scalings, start, text.shape[1], every, after)
        with model.routing(routers.Precomputed(used)):
            logits = model(text, use_cache=False).logits[0, -1]
        text = torch.cat([text, logits.argmax().view(1, 1)], dim=1)
    return text[0, start:].tolist()


def used_scalings(exact: torch.Tensor, start: int, stop: int, every: int | None, after: int) -> torch.Tensor:
    """What tokens from `start` to `stop` are to have, where each has `exact` [1, T, S, N] of its own."""
    used, newest = exact.clone(), exact[:, start - 1]
    for place in range(start, stop):
        written = place - start
        if written < after or (every is not None and (written - after) % every == 0):
            newest = exact[:, place]
        used[:, place] = newest
    return used


def hungry(kind: str, folder, **fields):
    """A model whose text depends on its scalings, which differ from token to token."""
    model = mixed(kind, folder, **fields)
    model.config.softmax_temperature, model.config.global_scaling_weight = 0.05, 3.0
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("every", [None, 1, 3])
def test_text_is_that_of_whole_forwards(kind: str, every: int | None, tmp_path):
    """Over windows of sliding attention, which are 6 tokens long, too."""
    model, ids = hungry(kind, tmp_path, **POOLED), prompt(1, 5, seed=4)
    for after in (0, 2):
        got = model.generate(ids, custom_generate=xloom.refreshing(every, after), max_new_tokens=NEW, do_sample=False)
        assert got[0, 5:].tolist() == written_slowly(model, ids, every, after)


@settings(max_examples=12, deadline=None)
@given(every=st.integers(1, 6) | st.none(), after=st.integers(0, 5), length=st.integers(1, 7), pad=st.integers(0, 3))
def test_any_rhythm(every, after, length, pad, llama_model):
    ids = prompt(1, length, seed=length)
    padded = torch.cat([torch.zeros(1, pad, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(length + pad) >= pad).long()[None]
    steps = llama_model.stream(
        padded, attention_mask=mask, custom_generate=xloom.refreshing(every, after), max_new_tokens=8, do_sample=False
    )
    assert [step.token_id for step in steps] == written_slowly(llama_model, ids, every, after, 8)


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory):
    return hungry("llama", tmp_path_factory.mktemp("refresh"), **POOLED)


def test_rhythms_differ_and_every_token_is_the_model_itself(llama_model):
    ids, plain = prompt(1, 5, seed=4), {"max_new_tokens": 24, "do_sample": False}
    texts = {
        every: llama_model.generate(ids, custom_generate=xloom.refreshing(every), **plain)[0].tolist()
        for every in (1, 4, None)
    }
    assert texts[1] == llama_model.generate(ids, **plain)[0].tolist()
    assert texts[4] != texts[1] != texts[None], "a model that this test can tell apart"
    frozen = list(llama_model.stream(ids, custom_generate=xloom.refreshing(), **plain))
    assert all(torch.equal(step.scalings, frozen[0].scalings) for step in frozen)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("every", [5, None])
def test_the_cache_goes_on(kind: str, every: int | None, tmp_path):
    """Keys of the mixed pass are those it wrote, scalings of what follows are exact."""
    model, ids = hungry(kind, tmp_path, **POOLED), prompt(1, 5, seed=4)
    cache = DynamicCache()  # an empty one, which is false
    options = {"max_new_tokens": NEW, "do_sample": False, "past_key_values": cache}
    text = model.generate(ids, custom_generate=xloom.refreshing(every), **options)
    assert cache.get_seq_length() == text.shape[1] - 1
    longer = torch.cat([text, prompt(1, 2, seed=9)], dim=1)
    found = model(longer[:, -3:], past_key_values=cache)
    exact = model(longer, use_cache=False).scalings
    torch.testing.assert_close(found.scalings, exact[:, -3:], rtol=0, atol=1e-5)
    with model.routing(routers.Precomputed(used_scalings(exact, 5, text.shape[1] - 1, every, 0))):
        expected = model(longer, use_cache=False).logits
    torch.testing.assert_close(found.logits, expected[:, -3:], rtol=0, atol=1e-4)


class Breaks(LogitsProcessor):
    """Raises when the text is so long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("how", [None, xloom.refreshing(1), xloom.refreshing(3), xloom.speculative()])
def test_a_cache_is_whole_after_an_interrupt(kind: str, how, tmp_path):
    """Its tokens are those that were written; with them the text goes on as it would have."""
    model, ids = hungry(kind, tmp_path, **POOLED), prompt(1, 5, seed=4)
    cache, written = DynamicCache(config=model.config), []
    options = {"do_sample": False, "past_key_values": cache, "logits_processor": LogitsProcessorList([Breaks(9)])}
    with pytest.raises(KeyboardInterrupt):
        for step in model.stream(ids, custom_generate=how, max_new_tokens=NEW, **options):
            written.append(step.token_id)
    text = torch.cat([ids, torch.tensor([written])], dim=1)[:, : cache.get_seq_length()]
    assert text.shape[1] in (7, 8)
    longer = torch.cat([text, prompt(1, 2, seed=9)], dim=1)
    found = model(longer[:, -2:], past_key_values=cache)
    exact = model(longer, use_cache=False).scalings
    rhythm = how.every if isinstance(how, Refreshing) else 1
    with model.routing(routers.Precomputed(used_scalings(exact, 5, text.shape[1], rhythm, 0))):
        expected = model(longer, use_cache=False).logits
    torch.testing.assert_close(found.logits, expected[:, -2:], rtol=0, atol=1e-4)


def test_scalings_are_logged_as_they_were_used(llama_model):
    ids = prompt(1, 5, seed=4)
    with llama_model.logging_scalings() as log:
        steps = list(llama_model.stream(ids, custom_generate=xloom.refreshing(4), max_new_tokens=NEW, do_sample=False))
    used = torch.stack([step.scalings for step in steps])
    torch.testing.assert_close(log.tokens()[0, -(NEW - 1) :], used[1:], rtol=0, atol=1e-6)


def test_what_it_cannot_do_is_refused(llama_model, tmp_path):
    ids, options = prompt(1, 5), {"max_new_tokens": 3, "do_sample": False}
    for bad in ({"every": 0}, {"after": -1}):
        with pytest.raises(ConfigError, match=f"found {next(iter(bad.values()))}"):
            xloom.refreshing(**bad)
    untouched = DynamicCache(config=llama_model.config)
    with llama_model.routing(routers.Uniform()), pytest.raises(ConfigError, match="two passes, found one"):
        llama_model.generate(ids, custom_generate=xloom.refreshing(), past_key_values=untouched, **options)
    assert untouched.get_seq_length() == 0
    early = mixed("llama", tmp_path, gate_at_layer=0)
    with pytest.raises(ConfigError, match="two passes, found one"):
        early.generate(ids, custom_generate=xloom.refreshing(2), **options)
    with pytest.raises(ConfigError, match="not both"):
        list(llama_model.stream(ids, speculative=True, custom_generate=xloom.refreshing(), **options))

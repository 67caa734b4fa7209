"""Fast greedy answers equal the plain ones: with a shared prefix, in any batches, under any router."""

import copy

import pytest
import torch

from tiny import ARCHITECTURES, make_expert, prompt, tiny_base
from toy import tiny_tokenizer
from xloom import XLoraForCausalLM
from xloom.decoding import batch
from xloom.decoding.batch import can_share_prefix, common_prefix, end_tokens, in_batches
from xloom.evaluation.answers import Prompt, answers, losses
from xloom.routers import BaseOnly, Fixed, PerRow, Single, Uniform, XLora

HEADS = (
    {},
    {"head_input": ["token", "ema:4"], "null_expert": True},
    {"gate_at_layer": 1, "head_input": "running_mean", "drop_sites_below_gate": True},
)
START = tuple(prompt(1, 9)[0].tolist())
RESTS = [3, 8, 5, 5, 1, 7]
PROMPTS = [Prompt(START + tuple(prompt(1, n, seed=n + i)[0].tolist()), 3 + i % 3) for i, n in enumerate(RESTS)]


@pytest.fixture
def model(llama, expert_paths):
    return XLoraForCausalLM.from_experts(llama, expert_paths, layerwise_scalings=True)


def all_answers(model, prompts=PROMPTS, routers=None, **options):
    found = {}
    for some in answers(model, tiny_tokenizer(), prompts, routers, **options):
        assert not found.keys() & some.keys()
        found |= some
    return [found[i] for i in range(len(prompts))]


def one_by_one(model, prompts=PROMPTS, routers=None):
    """Slow and obvious: generate, each prompt alone, without a shared prefix."""
    out = []
    tokenizer = tiny_tokenizer()
    for i, p in enumerate(prompts):
        with model.routing(routers[i] if routers else model.router), model.logging_scalings() as log:
            done = model.generate(
                torch.tensor([p.ids]), max_new_tokens=p.max_new_tokens, do_sample=False, pad_token_id=0,
                eos_token_id=end_tokens(model, tokenizer),
            )  # fmt: skip
        new = done[0, len(p.ids) :]
        weights = log.tokens()[0, len(p.ids) - 1 :].mean(dim=(0, 1)).tolist()
        out.append((tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), weights))
    return out


def same(found, expected):
    assert [a.text for a in found] == [text for text, *_ in expected]
    assert [a.tokens for a in found] == [count for _, count, _ in expected]
    for answer, (*_, weights) in zip(found, expected, strict=True):
        assert answer.weights == pytest.approx(weights, abs=1e-5)


@pytest.mark.parametrize("head", HEADS, ids=["paper", "pooled", "early gate"])
def test_answers_are_those_of_generate(llama, expert_paths, head):
    model = XLoraForCausalLM.from_experts(llama, expert_paths, layerwise_scalings=True, **head)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.5)
    expected = one_by_one(model)
    assert len({text for text, *_ in expected}) > 2, "answers that differ, so that a mix-up would show"
    for share in (True, False):
        for tokens in (1, 20, 4000):
            same(all_answers(model, batch_tokens=tokens, share_prefix=share), expected)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "opt", "bloom", "falcon", "gpt_neox", "mistral", "gemma3_text"])
def test_logits_with_a_shared_prefix_are_the_plain_ones(kind, tmp_path, monkeypatch):
    base = tiny_base(kind)
    experts = {n: make_expert(base, tmp_path / n, i, r=2, target_modules="all-linear") for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(copy.deepcopy(base), experts, layerwise_scalings=True)
    seen = []
    plain = batch._forward

    def spy(model, ids, *args):
        out = plain(model, ids, *args)
        seen.append((ids.shape, out.logits[:, -1].clone()))
        return out

    monkeypatch.setattr(batch, "_forward", spy)
    found = {}
    for share in (True, False):
        seen.clear()
        texts = [a.text for a in all_answers(model, share_prefix=share)]
        found[share] = (texts, list(seen))
    shared = can_share_prefix(model)
    assert shared == ("sliding_window" not in ARCHITECTURES[kind])
    assert found[True][0] == found[False][0]
    for (_, a), (_, b) in zip(found[True][1], found[False][1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1.0)
    longest = max(RESTS) + len(START)
    assert found[False][1][0][0][1] == longest
    assert found[True][1][0][0][1] == (longest - len(START) if shared else longest), "and it is shorter, too"


def test_rows_with_routers_of_their_own(model):
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0, 0], [0.2, 0.3, 0.4]])
    of_rows = [PerRow(row[None]) for row in weights]
    found = all_answers(model, routers=of_rows)
    same(found, one_by_one(model, routers=of_rows))
    for answer, row in zip(found, weights, strict=True):
        assert answer.weights == pytest.approx(row.tolist())


def test_kinds_of_routing_have_prefixes_of_their_own(model):
    """With one prefix for two routers, the second would read the first one's cache."""
    of_rows = [(Single("mech"), Fixed({"chem": 1.0, "prot": -1.0}), XLora())[i % 3] for i in range(len(PROMPTS))]
    found = all_answers(model, routers=of_rows)
    same(found, one_by_one(model, routers=of_rows))
    assert [a.text for a in all_answers(model, routers=of_rows[:1] * len(PROMPTS))] != [a.text for a in found]


def test_an_answer_ends_at_the_end_token(model):
    """Rows that end leave the batch; the others go on as if they were alone."""
    model.generation_config.eos_token_id = list(range(5, 64, 6))
    long = [Prompt(p.ids, 12) for p in PROMPTS]
    expected = one_by_one(model, long)
    counts = [count for _, count, _ in expected]
    assert len(set(counts)) > 2, "they end at different times"
    same(all_answers(model, long), expected)


def test_an_answer_without_an_end_token_is_cut(model):
    model.generation_config.eos_token_id = list(range(5, 64, 12))
    found = all_answers(model)
    cut = [answer.cut for answer in found]
    assert True in cut and False in cut
    assert all(answer.tokens == p.max_new_tokens for answer, p in zip(found, PROMPTS, strict=True) if answer.cut)
    longer = all_answers(model, [Prompt(p.ids, p.max_new_tokens + 1) for p in PROMPTS])
    for short, long in zip(found, longer, strict=True):
        assert short.cut == (long.tokens > short.tokens), "one more token changes those that are cut, and only those"


def test_an_answer_ends_at_a_text(model):
    """What stands before the text is the same as without; nothing after it is written."""
    whole = all_answers(model, [Prompt(p.ids, 12) for p in PROMPTS])
    stops = [answer.text[4] for answer in whole]
    found = all_answers(model, [Prompt(p.ids, 12, stop) for p, stop in zip(PROMPTS, stops, strict=True)])
    for answer, stop, full in zip(found, stops, whole, strict=True):
        assert answer.text == full.text.partition(stop)[0].rstrip()
        assert answer.tokens < 12
        assert not answer.cut
        assert full.cut
    never = all_answers(model, [Prompt(p.ids, 12, "no such text") for p in PROMPTS])
    assert [(a.text, a.cut) for a in never] == [(a.text, a.cut) for a in whole]


def test_blanks_before_an_answer_do_not_end_it():
    asked = Prompt((1,), 9, "\n\n")
    assert not asked.is_over("\n\n")
    assert not asked.is_over("\n\na\n")
    assert asked.is_over("\n\na\n\n")
    assert asked.answer("\n\na\n\nb") == "a"


@pytest.mark.parametrize("router", [None, BaseOnly(), Uniform()], ids=["xlora", "base", "uniform"])
def test_losses_are_those_of_the_rows_alone(model, router):
    rows = [(p.ids + tuple(prompt(1, 1 + i, seed=i)[0].tolist()), len(p.ids)) for i, p in enumerate(PROMPTS)]
    expected = []
    with model.routing(router or model.router), torch.no_grad():
        for ids, start in rows:
            logits = model(torch.tensor([ids])).logits[0]
            target = torch.tensor(ids[start:])
            expected.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], target).item())
    for tokens in (1, 40, 4000):
        found = losses(model, rows, router, batch_tokens=tokens)
        assert found == pytest.approx(expected, rel=1e-4)


def test_common_prefix():
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2), (1, 2)]) == 2
    assert common_prefix([(), (1,)]) == 0
    assert common_prefix([(3, 1), (2, 1)]) == 0


def test_batches_stay_within_their_tokens():
    cut = list(in_batches([4, 2, 0, 1, 3], [3, 5, 2, 9, 1], 6))
    assert cut == [[4, 2], [0], [1], [3]]
    assert sorted(i for batch in cut for i in batch) == [0, 1, 2, 3, 4]


def test_no_prompts(model):
    assert all_answers(model, []) == []

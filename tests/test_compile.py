"""A decoding step over a static cache is one graph: both passes, the head and the gate, with no break in between."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import CompileConfig, StaticCache

from test_architectures import mixed, tolerance
from tiny import prompt
from xloom import routers

POOLED = {"head_input": ["token", "ema:4"]}
FORMS = {
    "two passes": POOLED,
    "top 1": POOLED | {"top_k_lora": 1, "null_expert": True},
    "early gate": {"gate_at_layer": 0, "head_input": "running_mean"},
}
# One of each way to make masks and positions. Mixtral and the like hand tokens to experts by what the data says, which
# is no single graph in transformers itself.
KINDS = ("llama", "mistral", "gemma3_text", "gpt2", "bloom")


def check_steps(model, kind: str, **asked) -> None:
    """Steps 6 to 8 of a text, from the compiled forward, against the uncached whole."""
    torch.compiler.reset()
    ids = prompt(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        whole = model(ids, use_cache=False, **asked)
        model(ids[:, :6], past_key_values=cache, **asked)
        for place in range(6, 9):
            given = {"position_ids": torch.tensor([[place]]), "past_key_values": cache, "use_cache": True}
            out = step(input_ids=ids[:, place : place + 1], **given, **asked)
            torch.testing.assert_close(out.logits[:, -1], whole.logits[:, place], rtol=0, atol=tolerance(kind))
            torch.testing.assert_close(out.scalings[:, -1], whole.scalings[:, place], rtol=0, atol=tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_graph(kind: str, tmp_path):
    check_steps(mixed(kind, tmp_path, **POOLED), kind)


@pytest.mark.parametrize("form", FORMS)
def test_of_every_kind_of_head(form: str, tmp_path):
    check_steps(mixed("llama", tmp_path, **FORMS[form]), "llama")


def test_with_other_routers(tmp_path):
    model = mixed("llama", tmp_path, **POOLED)
    check_steps(model, "llama", routing=routers.XLora(without=["a"]))


def test_a_block_that_a_compiled_forward_cannot_see_is_an_error(tmp_path):
    """Before it is compiled and afterwards, in the block's thread and in others."""
    torch.compiler.reset()
    model, ids = mixed("llama", tmp_path), prompt(1, 3)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            with model.routing(routers.Uniform()):
                with pytest.raises(Exception, match="pass routing="):
                    step(ids)
                with ThreadPoolExecutor(1) as pool, pytest.raises(Exception, match="pass routing="):
                    pool.submit(step, ids).result()
            torch.testing.assert_close(step(ids).logits, model(ids).logits)


def test_compiled_before_anything_ran(tmp_path):
    """In a thread of its own, and again; with a list of routers as well."""
    torch.compiler.reset()
    model, ids = mixed("llama", tmp_path), prompt(2, 4)
    step = torch.compile(model.forward, backend="eager", dynamic=False)
    asked = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    some = [routers.XLora(), routers.Uniform()]

    @torch.no_grad()
    def logits(call, routing):
        return call(ids, routing=routing, **asked).logits

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            found = [pool.submit(logits, step, routing).result() for routing in (None, some)]
    for mine, routing in zip(found, (None, some), strict=True):
        torch.testing.assert_close(mine, logits(model, routing))


@pytest.mark.parametrize("form", FORMS)
def test_generate_compiles_its_steps(form: str, tmp_path):
    """As transformers does by itself on a GPU; here it is told to."""
    torch.compiler.reset()
    model, ids = mixed("llama", tmp_path, **FORMS[form]), prompt(1, 5)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    plain = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **plain)
    found = model.generate(ids, cache_implementation="static", compile_config=config, **plain)
    assert torch.equal(found, expected)
    assert hasattr(model, "_compiled_call"), "the steps were compiled"

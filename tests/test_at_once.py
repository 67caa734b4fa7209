"""Several calls of one model at once: every text is that of the same call alone."""

import asyncio
import contextvars
import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import xloom
from tiny import make_expert, prompt, tiny_base
from xloom import Expert, XLoraForCausalLM, routers
from xloom.decoding import Refreshing, Step

NEW = 8
FORMS = {
    "two passes": {},
    "pooled": {"head_input": ["token", "ema:4"], "null_expert": True},
    "early gate": {"gate_at_layer": 1, "head_input": "running_mean", "drop_sites_below_gate": True},
    "experts in the scaling pass": {"scaling_pass_value": None, "global_scaling_weight": 1.5},
}
ROUTERS: list[Callable[[], routers.Routed]] = [
    routers.XLora,
    lambda: routers.XLora(without=["chem"]),
    lambda: routers.XLora(bias={"prot": 3.0}, temperature=0.5),
    lambda: routers.XLora(top_k=1, global_weight=0.5),
    routers.BaseOnly,
    routers.Uniform,
    lambda: routers.Single("mech"),
    lambda: routers.Fixed({"chem": 0.5, "prot": -1.0}),
    routers.Arrow,
    lambda: routers.SpectR(top_k=1),
]


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=FORMS)
def model(request, llama, expert_paths) -> XLoraForCausalLM:
    return mixed(llama, expert_paths, **FORMS[request.param])


def mixed(base, paths, **fields) -> XLoraForCausalLM:
    made = XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True, **fields)
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.normal_(0, 0.5)
    return made


@pytest.fixture
def pooled(llama, expert_paths) -> XLoraForCausalLM:
    return mixed(llama, expert_paths, **FORMS["pooled"])


def at_once(calls: list[Callable[[], Any]], threads: int = 8) -> list[Any]:
    """What the calls give, each in a thread, all started together."""
    ready = threading.Barrier(threads)

    def work(some: list[tuple[int, Callable[[], Any]]]) -> list[tuple[int, Any]]:
        ready.wait(timeout=60)
        return [(place, call()) for place, call in some]

    numbered = list(enumerate(calls))
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(work, [numbered[start::threads] for start in range(threads)]))
    found = dict(pair for part in parts for pair in part)
    return [found[place] for place in range(len(calls))]


def check(calls: list[Callable[[], Any]]) -> list[Any]:
    """Each call at once gives what it gives alone; returns that."""
    alone = [call() for call in calls]
    assert at_once(calls) == alone
    return alone


def greedy(model: XLoraForCausalLM, seed: int, **options: Any) -> list[int]:
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(prompt(1, 5 + seed % 4, seed), **given)[0].tolist()


# --- threads ---


def test_texts_by_the_head(model):
    alone = check([lambda seed=seed: greedy(model, seed) for seed in range(16)])
    assert len({tuple(text[-6:]) for text in alone}) > 8, "texts that differ, so that a mix-up would show"


def test_texts_by_many_routers(model):
    def by_argument(number: int) -> list[int]:
        return greedy(model, number, routing=ROUTERS[number % len(ROUTERS)]())

    def by_block(number: int) -> list[int]:
        with model.routing(ROUTERS[number % len(ROUTERS)]()):
            return greedy(model, number)

    alone = check([lambda n=n: by_argument(n) for n in range(10)] + [lambda n=n: by_block(n) for n in range(10)])
    assert alone[:10] == alone[10:]
    assert greedy(model, 3) not in (greedy(model, 3, routing=router()) for router in ROUTERS[1:])


def test_drafts_and_texts_that_are_refreshed(model):
    ways: list[Callable[[], Any]] = [xloom.speculative, lambda: xloom.speculative(looked_up=0)]
    if model.config.gate_at_layer is None:
        ways += [lambda: xloom.refreshing(every=3)]

    def write(number: int) -> list[int]:
        way = ways[number % len(ways)]()
        router = ROUTERS[number % (4 if isinstance(way, Refreshing) else len(ROUTERS))]()
        return greedy(model, number, custom_generate=way, routing=router)

    check([lambda n=n: write(n) for n in range(12)])


def test_drafts_change_nothing(model):
    for number, make in enumerate(ROUTERS):
        ids, router = prompt(1, 6, number), make()
        plain = list(model.stream(ids, max_new_tokens=NEW, routing=router))
        fast = list(model.stream(ids, max_new_tokens=NEW, routing=router, speculative=True))
        assert [step.token_id for step in fast] == [step.token_id for step in plain]
        for one, other in zip(fast, plain, strict=True):
            torch.testing.assert_close(one.scalings, other.scalings, rtol=0, atol=1e-4)


def test_streams_logs_and_forwards(model):
    def streamed(number: int) -> list[tuple[int, float, list[float]]]:
        steps = model.stream(prompt(1, 6, number), max_new_tokens=NEW, routing=ROUTERS[number % len(ROUTERS)]())
        return [(step.token_id, step.logprob, step.scalings.flatten().tolist()) for step in steps]

    def logged(number: int) -> list[float]:
        with model.logging_scalings() as log:
            greedy(model, number, routing=ROUTERS[number % len(ROUTERS)]())
        return torch.cat([entry.flatten() for entry in log.entries]).tolist()

    def forward(number: int) -> list[float]:
        ids = prompt(2, 7, number)
        with torch.no_grad():
            out = model(ids, routing=ROUTERS[number % len(ROUTERS)]())
            states = model.compute_head_states(ids)
        return [*out.logits.flatten().tolist(), *states.flatten().tolist()]

    check([lambda n=n, call=call: call(n) for n in range(6) for call in (streamed, logged, forward)])


def test_drawn_texts_have_generators_of_their_own(pooled):
    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    def drawn(number: int) -> list[int]:
        return greedy(pooled, number, do_sample=True, temperature=1.5, top_k=20, generator=generator(number))

    def streamed(number: int) -> list[int]:
        ids = prompt(1, 5 + number % 4, number)
        options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "max_new_tokens": NEW}
        return [*ids[0].tolist(), *(s.token_id for s in pooled.stream(ids, generator=generator(number), **options))]

    alone = check([lambda n=n, call=call: call(n) for n in range(8) for call in (drawn, streamed)])
    assert alone[::2] == alone[1::2], "one seed, one text"
    assert drawn(0) != greedy(pooled, 0)


def test_a_model_that_is_saved_and_read_beside_requests(model, tmp_path):
    """Nobody's forward runs without sites while the base is written, or while a router reads it."""
    prompts = {name: [prompt(1, 6, i)[0]] for i, name in enumerate(model.experts)}
    centroid = routers.Centroid.fit(model, prompts)

    def save(number: int) -> str:
        model.save_pretrained(tmp_path / str(number), include_base=True)
        return "saved"

    def nearest(number: int) -> list[int]:
        return greedy(model, number, routing=centroid.router(model, prompt(1, 5 + number % 4, number)))

    def scaled(number: int) -> list[float]:
        with torch.no_grad():
            out = model(prompt(1, 6, number))
        return [*out.logits.flatten().tolist(), *out.scalings.flatten().tolist()]

    calls: list[Callable[[], Any]] = []
    for n in range(6):
        calls += [lambda n=n: save(n), lambda n=n: nearest(n), lambda n=n: scaled(n), lambda n=n: greedy(model, n)]
    check(calls)
    again = XLoraForCausalLM.from_pretrained(tmp_path / "3")
    assert greedy(again, 5) == greedy(model, 5)


@pytest.mark.parametrize("kind", ["opt", "gemma3_text", "falcon", "bloom"])
def test_other_architectures(kind, tmp_path):
    base = tiny_base(kind)
    paths = {n: make_expert(base, tmp_path / n, i, r=2, target_modules="all-linear") for i, n in enumerate("ab")}
    model = XLoraForCausalLM.from_experts(base, paths, layerwise_scalings=True)
    some = [routers.XLora(), routers.Single("a"), routers.BaseOnly(), routers.Arrow(), routers.XLora(only=["b"])]
    check([lambda n=n: greedy(model, n, routing=some[n % len(some)]) for n in range(16)])


# --- one thread ---


def test_streams_that_are_read_in_turn(model):
    """Under routers of their own, some of them in blocks that have ended."""

    def make(number: int) -> Iterator[Step]:
        options = {"max_new_tokens": NEW, "speculative": number % 2 == 1}
        if number % 3 == 0:
            with model.routing(ROUTERS[number % 4]()):
                return model.stream(prompt(1, 6, number), **options)
        return model.stream(prompt(1, 6, number), routing=ROUTERS[number % 4](), **options)

    alone = [[step.token_id for step in make(number)] for number in range(8)]
    streams = [make(number) for number in range(8)]
    found: list[list[int]] = [[] for _ in streams]
    with model.routing(routers.BaseOnly()):  # the reader's own
        for _ in range(NEW):
            for stream, text in zip(streams, found, strict=True):
                text.append(next(stream).token_id)
    assert found == alone
    assert len({tuple(text) for text in alone}) > 4


def test_a_stream_logs_where_it_was_made(pooled):
    with pooled.logging_scalings() as log:
        stream = pooled.stream(prompt(1, 6), max_new_tokens=4)
    with pooled.logging_scalings() as other:
        list(stream)
        greedy(pooled, 1)
    assert sum(entry.shape[1] for entry in log.entries) == 6 + 3
    assert other.entries[0].shape[1] == 6


def test_tasks_have_routers_of_their_own(pooled):
    """Between the tasks of one event loop a block is the task's, too."""

    async def write(number: int) -> list[int]:
        with pooled.routing(ROUTERS[number]()):
            await asyncio.sleep(0)
            text = greedy(pooled, number)
            await asyncio.sleep(0)
            assert greedy(pooled, number) == text
        return text

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*(write(number) for number in range(len(ROUTERS)))))

    assert asyncio.run(all_of_them()) == [greedy(pooled, n, routing=router()) for n, router in enumerate(ROUTERS)]


def test_a_thread_starts_without_the_block_of_another(pooled):
    with pooled.routing(routers.BaseOnly()), ThreadPoolExecutor(1) as pool:
        assert pool.submit(greedy, pooled, 2).result() == greedy(pooled, 2, routing=routers.XLora())
        assert greedy(pooled, 2) == greedy(pooled, 2, routing=routers.BaseOnly())


def test_a_block_in_a_generator_ends_wherever_it_is_read(pooled):
    def texts() -> Iterator[list[int]]:
        with pooled.routing(routers.Single("chem")):
            yield greedy(pooled, 1)
            yield greedy(pooled, 2)

    for contexts in itertools.product([contextvars.copy_context()], [contextvars.copy_context()], repeat=1):
        reader = texts()
        assert contexts[0].run(next, reader) == greedy(pooled, 1, routing=routers.Single("chem"))
        contexts[1].run(list, reader)
    assert isinstance(pooled.router, routers.XLora)


def test_what_is_made_of_the_base_beside_is_another_model(model):
    """Converted, unfrozen, changed and trained, it leaves the model as it is."""
    before, base = greedy(model, 3), model.plain_base()
    ids = prompt(1, 6)
    with torch.no_grad():
        assert torch.equal(base(ids).logits, model(ids, routing=routers.BaseOnly()).logits)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    theirs = model.base
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)
    base.requires_grad_(True).half()
    base.lm_head.weight = torch.nn.Parameter(torch.zeros_like(base.lm_head.weight))
    assert greedy(model, 3) == before
    assert not any(p.requires_grad for p in model.base.parameters()) and model.base.dtype == torch.float32


def test_gradient_checkpointing_of_a_copy(model):
    model.gradient_checkpointing_enable()
    ids = prompt(2, 6)
    for twin in (copy.deepcopy(model), model):
        twin.train()
        twin(ids, use_cache=False).logits.square().sum().backward()
        assert twin.head.linears[0].weight.grad.abs().max() > 0
    other = XLoraForCausalLM.from_experts(model.plain_base(), {"e": model_expert(model)})
    other.train()(ids, use_cache=False).logits.square().sum().backward()


def model_expert(model: XLoraForCausalLM) -> Expert:
    modules = model.mixture.experts_of_sites()[1]
    return Expert("e", model.expert_configs["mech"], modules)


def test_a_copy_is_another_model(pooled):
    with pooled.routing(routers.BaseOnly()):
        twin = copy.deepcopy(pooled)
        assert greedy(twin, 2) == greedy(pooled, 2, routing=routers.XLora())
    assert twin.mixture.current is not pooled.mixture.current
    assert all(site.current is twin.mixture.current for site in twin.mixture.sites)


def test_what_an_observer_sees_is_its_own_call(pooled):
    def watch(**options: Any) -> list[str]:
        seen: list[tuple[int, str]] = []
        with pooled.observing_sites(lambda site, *_: seen.append((threading.get_ident(), site.name))):
            greedy(pooled, 1, **options)
        assert {thread for thread, _ in seen} == {threading.get_ident()}
        return [name for _, name in seen]

    alone = check([watch, lambda: watch(routing=routers.Single("mech"))] * 4)
    assert [len(names) for names in alone] == [NEW * len(pooled.sites)] * 8
    assert set(watch(custom_generate=xloom.speculative())) == set(alone[0])
    with pytest.raises(ZeroDivisionError), pooled.observing_sites(lambda *_: 1 / 0):
        greedy(pooled, 1)
    assert greedy(pooled, 1) == greedy(pooled, 1, routing=routers.XLora())


# --- nothing is left behind ---


def test_nothing_of_a_model_changes_while_it_works(model):
    """Modules, hooks, settings and attributes are the same objects inside a forward as outside."""
    inside = []

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            found[name] = {
                key: (id(value), {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None)
                for key, value in vars(module).items()
                if key not in {"_frozen", "_previous_max_cache_length"}
            }
        config = model.base.config.to_dict(), model.config.to_dict(), model.base.config._attn_implementation
        return found | {"": [repr(config), found[""]]}

    first = model.mixture.sites[-1].base
    handle = first.register_forward_pre_hook(lambda *_: inside.append(state()))
    try:
        before = state()
        for router in (routers.XLora(), routers.Single("chem"), routers.Arrow()):
            greedy(model, 0, routing=router)
            greedy(model, 0, routing=router, custom_generate=xloom.speculative())
            list(model.stream(prompt(1, 5), max_new_tokens=3, routing=router))
            with torch.no_grad():
                model(prompt(2, 5), routing=[router, routers.BaseOnly()])
                states = model.compute_head_states(prompt(2, 5))
                model(prompt(2, 5), routing=router, head_states=states)
        model.plain_base()
        assert len(inside) > 20
        assert all(found == before for found in inside)
        assert state() == before
    finally:
        handle.remove()

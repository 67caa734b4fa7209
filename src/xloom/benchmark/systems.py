"""The systems that are compared: one base, the same experts and the same head in each.

    base               transformers' generate, with its cache: no experts
    peft               PEFT's X-LoRA: two passes over the whole sequence for every token, no cache
    xloom              two passes with one cache
    xloom-early-gate   one pass: the head reads what enters layer L//3, experts act from there on

A further word says who drafts:

    -lookup            transformers' prompt lookup
    -lagged            drafts of the joint pass alone (two passes only)
    -speculative       ours: drafts of the joint pass, where there are two, and prompt lookup

A system gives tokens for tokens, with the time they took; it knows nothing of rounds or tables. Weights of the base are
shared, not copied.
Letters: B batch  T tokens
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from xloom import architecture
from xloom.benchmark.parts import Parts
from xloom.benchmark.settings import PEFT
from xloom.decoding import Decoding, Tally, speculative
from xloom.errors import ConfigError, UnsupportedArchitectureError, names
from xloom.model import XLoraForCausalLM

LOOKED_UP = 8  # tokens of a prompt-lookup draft at most
SAMPLES = 5  # steps that stand for all steps of a long text; odd, for Simpson's rule
LOOKUP, LAGGED, SPECULATIVE = "lookup", "lagged", "speculative"


class Decoded(NamedTuple):
    """A text: its new tokens (none where its time is an estimate), and the time they took.

    Args:
        seconds: of the whole call, the prompt included.
        first_s: until the first tokens were there.
        s_per_token: of every token after those.
    """

    tokens: list[int]
    seconds: float
    first_s: float
    s_per_token: float
    tally: Tally | None = None


@dataclass(frozen=True)
class System:
    """A model that continues token ids greedily.

    Args:
        cached: it keeps keys and values from token to token.
        drafter: who drafts; None for nobody.
        way: makes what `generate` takes as `custom_generate`, in place of a drafter.
        same_as: the system whose tokens it must give.
    """

    name: str
    model: nn.Module
    cached: bool = True
    drafter: str | None = None
    same_as: str | None = None
    way: Callable[[], Decoding] | None = None

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Decoded:
        """The next token: one forward over the prompt that leaves its cache behind, where there is one."""
        mask, began = torch.ones_like(ids_BT), time.perf_counter()
        out = self.model(input_ids=ids_BT, attention_mask=mask, use_cache=self.cached, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        seconds = time.perf_counter() - began
        return Decoded([token], seconds, seconds, seconds)

    def decode(self, ids_1T: Tensor, new_tokens: int, *, stop: bool = False) -> Decoded:
        """The next `new_tokens` tokens, by the system's own `generate` from the prompt on.

        Args:
            stop: where the model ends its text, if that is earlier.
        """
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        options, tally = self._drafts()
        if not stop:
            options["eos_token_id"] = None
        clock, mask, began = _Clock(), torch.ones_like(ids_1T), time.perf_counter()
        whole = generate(
            input_ids=ids_1T, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=self.cached,
            stopping_criteria=StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
        tokens = whole[0, ids_1T.shape[1] :].tolist()
        ended = time.perf_counter()
        if len(tokens) != new_tokens and not stop:
            raise RuntimeError(f"{self.name} stopped after {len(tokens)} of {new_tokens} tokens")
        later = whole.shape[1] - clock.length
        pace = (ended - clock.first) / later if later else (ended - began) / len(tokens)
        return Decoded(tokens, ended - began, clock.first - began, pace, tally)

    def _drafts(self) -> tuple[dict[str, Any], Tally | None]:
        if self.way is not None:
            way = self.way()
            return {"custom_generate": way}, way.tally
        if self.drafter is None:
            return {}, None
        if self.drafter == LOOKUP:
            return {"prompt_lookup_num_tokens": LOOKED_UP}, None
        how = speculative(0 if self.drafter == LAGGED else LOOKED_UP)
        return {"custom_generate": how}, how.tally


class _Clock(StoppingCriteria):
    """Stops nothing: notes when the first tokens were there, and how long the text was then."""

    first, length = 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.length:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.first, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode_sampled(system: System, ids_1T: Tensor, new_tokens: int) -> Decoded:
    """What `decode` would take where every step costs what its length alone says, out of `SAMPLES` of its steps.

    A step of a system without a cache is a text of one token. Its cost is nearly a polynomial of second degree in the
    length, which Simpson's rule sums exactly. The text before a step is the prompt over and over.
    """
    length = ids_1T.shape[1]
    wanted = [length + round((new_tokens - 1) * i / (SAMPLES - 1)) for i in range(SAMPLES)]
    texts = [ids_1T.repeat(1, -(-count // length))[:, :count] for count in wanted]
    steps = [system.decode(text, 1).seconds for text in texts]
    weights = [1, *(4 if i % 2 else 2 for i in range(1, SAMPLES - 1)), 1]
    mean = sum(weight * step for weight, step in zip(weights, steps, strict=True)) / sum(weights)
    whole = new_tokens * mean
    return Decoded([], whole, steps[0], (whole - steps[0]) / max(1, new_tokens - 1))


def build(name: str, parts: Parts) -> System:
    """Raises ConfigError for an unknown name, XLoomError where the base does not suit."""
    return build_all([name], parts)[name]


def build_all(wanted: Sequence[str], parts: Parts) -> dict[str, System]:
    """Systems by name; those that differ by their drafts alone share a model. Raises as `build`."""
    check_names(wanted)
    models: dict[str, System] = {}
    built = {}
    for name in wanted:
        plain, drafter = NAMES[name]
        if plain not in models:
            models[plain] = BUILDERS[plain](parts)
        built[name] = models[plain] if drafter is None else _drafting(models[plain], drafter)
    return built


def check_names(wanted: Sequence[str], known: Sequence[str] | None = None) -> None:
    """Raises ConfigError for names of systems that do not exist."""
    known = list(NAMES) if known is None else known
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"unknown system {names(map(repr, unknown))}; known are {names(known, 20)}")


def of_models(models: Mapping[str, XLoraForCausalLM]) -> dict[str, System]:
    """Models as they are, without and with drafts, and the first one's base. They must have the same base."""
    base = System("base", next(iter(models.values())).plain_base())
    found = [base, _drafting(base, LOOKUP)]
    for name, model in models.items():
        system = System(name, model)
        found += [system, *(_drafting(system, drafter) for drafter in drafters(model))]
    return {system.name: system for system in found}


def drafters(model: XLoraForCausalLM) -> tuple[str, ...]:
    """Who can draft for a model; with one pass, all that is left to draft by is the text."""
    return _TWO_PASSES if model.config.gate_at_layer is None else _ONE_PASS


def _drafting(plain: System, drafter: str) -> System:
    return replace(plain, name=f"{plain.name}-{drafter}", drafter=drafter, same_as=plain.name)


def _base(parts: Parts) -> System:
    return System("base", parts.own_base())


def peft(parts: Parts) -> System:
    """PEFT's X-LoRA. Raises UnsupportedArchitectureError."""
    from peft import XLoraConfig, get_peft_model

    base = parts.own_base()
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=architecture.hidden_size(base, gated=False),
        # PEFT names experts by position; any other key fails at its first forward
        adapters={str(i): folder for i, folder in enumerate(parts.expert_folders.values())},
        layerwise_scalings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(base, config).eval()
        except (ValueError, KeyError, IndexError) as error:
            raise UnsupportedArchitectureError(
                f"PEFT's X-LoRA cannot be built on {type(base).__name__} ({error}); leave the system 'peft' out"
            ) from error
    classifier = model.base_model.internal_xlora_classifier
    _set_head([layer for layer in classifier.layers if isinstance(layer, nn.Linear)], parts)
    return System(PEFT, model, cached=False)


def _xloom(parts: Parts) -> System:
    model = XLoraForCausalLM.from_experts(parts.own_base(), parts.expert_folders, layerwise_scalings=True)
    _set_head(model.head.linears, parts)
    return System("xloom", model, same_as=PEFT)


def _early_gate(parts: Parts) -> System:
    """Gated after a third of the layers, by the running mean: the form that the quality figures speak of."""
    base = parts.own_base()
    model = XLoraForCausalLM.from_experts(
        base,
        parts.expert_folders,
        layerwise_scalings=True,
        head_input="running_mean",
        gate_at_layer=base.config.get_text_config(decoder=True).num_hidden_layers // 3,
        drop_sites_below_gate=True,
    )
    return System("xloom-early-gate", model)


BUILDERS: dict[str, Callable[[Parts], System]] = {
    "base": _base,
    PEFT: peft,
    "xloom": _xloom,
    "xloom-early-gate": _early_gate,
}
_TWO_PASSES, _ONE_PASS = (LOOKUP, LAGGED, SPECULATIVE), (LOOKUP, SPECULATIVE)
_DRAFTERS = {"base": (LOOKUP,), PEFT: (), "xloom": _TWO_PASSES, "xloom-early-gate": _ONE_PASS}
# every system -> the one without drafts, and who drafts
NAMES: dict[str, tuple[str, str | None]] = {
    name if drafter is None else f"{name}-{drafter}": (name, drafter)
    for name, some in _DRAFTERS.items()
    for drafter in (None, *some)
}


def _set_head(linears: Sequence[nn.Linear], parts: Parts) -> None:
    (linear,) = linears
    with torch.no_grad():
        linear.weight.copy_(parts.head_weight)
        linear.bias.copy_(parts.head_bias)

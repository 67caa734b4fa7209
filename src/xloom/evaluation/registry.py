"""Systems by name: the routers of `routers.words`, and what is no router.

    constant   few-shot   oracle   seqr   centroid[:topK]
    merge:linear|ties|dare or any method of `merging`   collapse
    xlora:topK[-renormalised]   and the names of further X-LoRA models

`all` is every one of them but `fixed`, as far as the model and the tasks have what it takes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast, get_args

from xloom.errors import ConfigError, names, near
from xloom.evaluation.systems import (
    Constant,
    FewShot,
    Nearest,
    OneAdapter,
    OtherModel,
    RightExpert,
    System,
    WithRouter,
    collapsed,
    fitting_method,
    merged,
)
from xloom.experts import Expert
from xloom.merging import Method
from xloom.model import XLoraForCausalLM
from xloom.routers import SpectR, XLora
from xloom.routers import words as router_words

ALL = "all"
ORACLE = "oracle"
HEAD = router_words.HEAD
MERGES: Mapping[str, Method] = {"linear": "linear", "ties": "ties", "dare": "dare_linear"}
_TOP = re.compile(r"top([1-9]\d*)(-renormalised)?")
_Make = Callable[[XLoraForCausalLM, Path | None], System]  # from the model and the folder of `collapse`


def find_systems(
    words: Sequence[str],
    model: XLoraForCausalLM,
    *,
    collapse: Path | None = None,
    models: Mapping[str, Path] | None = None,
) -> list[System]:
    """The systems that words name, each once, in their order; `all` stands for what this model can show.

    Args:
        collapse: a PEFT folder in which `xloom convert --collapse` wrote the head's average as one adapter; without it,
            "collapse" takes the average over training prompts.
        models: folders of further X-LoRA models, by the names under which they are asked for.

    Raises:
        ConfigError: no such system, or it lacks what it needs. UnknownExpertError: no such expert.
    """
    models = dict(models or {})
    check_words(words, models)
    found: dict[str, System] = {}
    for word in words:
        for name in all_names(model, models=models) if word == ALL else (word,):
            if name not in found:
                found[name] = OtherModel(name, models[name]) if name in models else _read(name)(model, collapse)
    return list(found.values())


def check_words(words: Iterable[str], models: Iterable[str] = ()) -> None:
    """Finds words that name no system, as far as it can be told without a model.

    Args:
        models: the names of further X-LoRA models.

    Raises:
        ConfigError: no such system, settings that it does not take, or a model with the name of a system.
    """
    models = tuple(models)
    for name in models:
        if name == ALL or name.partition(":")[0] in _KINDS:
            raise ConfigError(f"--model {name}: that name stands for a system of xloom's; choose another")
    for word in words:
        if word != ALL and word not in models:
            _read(word)


def all_names(model: XLoraForCausalLM, *, models: Mapping[str, Path] | None = None) -> list[str]:
    """What `all` stands for."""
    return list(_all(model, models or {}))


def _all(model: XLoraForCausalLM, models: Mapping[str, Path]) -> Iterator[str]:
    yield from ("constant", "base", "few-shot")
    yield from (f"single:{expert}" for expert in model.experts)
    yield from (ORACLE, "uniform")
    several = len(model.experts) > 1
    if several:
        yield from (f"merge:{method}" for method in MERGES)
        yield "collapse"
    yield from ("arrow", "arrow:top1", "spectr", "spectr:top1", "seqr", "centroid", "centroid:top1")
    yield HEAD
    if several and model.config.top_k_lora is None:
        yield from (f"{HEAD}:top{k}{how}" for k in (1, 2) for how in ("", "-renormalised"))
    yield from models


def _read(word: str) -> _Make:
    """How a system is made, out of its word alone."""
    kind, colon, rest = word.partition(":")
    if kind not in _KINDS:
        known = names([ALL, *(form for form, _ in _KINDS.values())], len(_KINDS) + 1)
        raise ConfigError(
            f"unknown system {word!r}{near(kind, _KINDS)}; expected {known}, or a name given with --model"
        )
    form, reader = _KINDS[kind]
    if colon and not rest:
        raise router_words.refused(word, form)
    return reader(word, rest)


# --- one function for each kind: (word, what stands after the colon) -> how it is made ---


def _router(word: str, rest: str) -> _Make:
    asked = router_words.read_router(word)

    def make(model: XLoraForCausalLM, collapse: Path | None) -> System:
        asked.check(model.experts)
        return WithRouter(
            word, asked.about, lambda bench: asked.make(), routes=asked.routes, reads_head=asked.reads_head
        )

    return make


def _head(word: str, rest: str) -> _Make:
    if not rest or rest.startswith("without="):
        return _router(word, rest)
    match = _TOP.fullmatch(rest)
    if match is None:
        raise router_words.refused(word, _KINDS[HEAD][0])
    k = int(match[1])
    fields = {"top_k_lora": k, "enable_softmax_topk": match[2] is not None}
    best = f"its {k} largest weights" if k > 1 else "its largest weight"
    about = f"the same head, {best}" + (", renormalised" if match[2] else "")

    def make(model: XLoraForCausalLM, collapse: Path | None) -> System:
        router_words.check_top_k(word, k, len(model.experts) + model.config.null_expert)
        router = XLora(top_k=k, renormalise=match[2] is not None)
        return WithRouter(word, about, lambda bench: router, routes=True, reads_head=True, fields=fields)

    return make


def _centroid(word: str, rest: str) -> _Make:
    match = _TOP.fullmatch(rest)
    if rest and (match is None or match[2]):
        raise router_words.refused(word, _KINDS["centroid"][0])
    top_k = int(match[1]) if match else None
    best = "" if top_k is None else f", its {top_k} best" if top_k > 1 else ", its best"
    about = f"likeness of the prompt to training prompts (after arXiv 2402.09997){best}"

    def make(model: XLoraForCausalLM, collapse: Path | None) -> System:
        router_words.check_top_k(word, top_k, len(model.experts))
        return Nearest(word, about, top_k)

    return make


def _merge(word: str, rest: str) -> _Make:
    known = tuple(dict.fromkeys([*MERGES, *get_args(Method)]))
    if rest not in known:
        raise router_words.refused(word, f"merge: and one of {names(known, len(known))}{near(rest, known)}")

    def make(model: XLoraForCausalLM, collapse: Path | None) -> System:
        method = fitting_method(model, MERGES[rest]) if rest in MERGES else cast(Method, rest)
        about = f"all experts merged into one adapter (PEFT, {method})"
        return OneAdapter(word, about, lambda bench: merged(bench, method))

    return make


def _plain(make: Callable[[str, Path | None], System], word: str, rest: str) -> _Make:
    """A system without settings, from its name and the folder of `collapse`."""
    if rest:
        raise router_words.refused(word, word.partition(":")[0])
    return lambda model, collapse: make(word, collapse)


def _constant(name: str, collapse: Path | None) -> System:
    return Constant(name, "the answer that does best on the task's training rows, always")


def _few_shot(name: str, collapse: Path | None) -> System:
    return FewShot(name, "the base model, solved training rows before the question")


def _oracle(name: str, collapse: Path | None) -> System:
    return RightExpert(name, "the right expert of each question")


def _seqr(name: str, collapse: Path | None) -> System:
    about = "SEQR (arXiv 2509.18093): the largest |B A x|, standardised on training prompts"
    return WithRouter(
        name, about, lambda bench: SpectR.calibrated(bench.model, bench.samples(), top_k=1), routes=True, fitted=True
    )


def _collapse(name: str, folder: Path | None) -> System:
    about = "the head's average scalings as one static adapter"
    if folder is not None:
        return OneAdapter(name, about, lambda bench: Expert.from_pretrained(folder), folder=folder)
    return OneAdapter(name, about, collapsed, reads_head=True, fitted=True)


# how each is spelt, and how it is read
_KINDS: Mapping[str, tuple[str, Callable[[str, str], _Make]]] = {
    "constant": ("constant", partial(_plain, _constant)),
    "few-shot": ("few-shot", partial(_plain, _few_shot)),
    ORACLE: (ORACLE, partial(_plain, _oracle)),
    **{kind: (form, _router) for kind, form in router_words.FORMS.items()},
    "seqr": ("seqr", partial(_plain, _seqr)),
    "centroid": ("centroid[:topK]", _centroid),
    "merge": ("merge:linear|ties|dare", _merge),
    "collapse": ("collapse", partial(_plain, _collapse)),
    HEAD: (f"{router_words.FORMS[HEAD]}, {HEAD}:topK[-renormalised]", _head),
}

"""Systems by name.

    constant   base   few-shot   single:NAME   uniform   fixed:NAME=WEIGHT,...   oracle
    arrow[:topK]   spectr[:topK]   seqr   centroid[:topK]
    merge:linear|ties|dare or any method of `merging`   collapse
    xlora[:topK[-renormalised]]   and the names of further X-LoRA models

`all` is every one of them but `fixed`, as far as the model and the tasks have what it takes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from xloom.errors import ConfigError, names
from xloom.evaluation.systems import (
    Constant,
    FewShot,
    Nearest,
    OneAdapter,
    OtherModel,
    RightExpert,
    Routed,
    System,
    collapsed,
    fitting_method,
    merged,
)
from xloom.experts import Expert
from xloom.merging import Method
from xloom.model import XLoraForCausalLM
from xloom.routers import Arrow, BaseOnly, Fixed, Single, SpectR, Uniform, XLora, check_known

ALL = "all"
ORACLE = "oracle"
HEAD = "xlora"
MERGES: Mapping[str, Method] = {"linear": "linear", "ties": "ties", "dare": "dare_linear"}
WORDS = (
    "all, constant, base, few-shot, single:NAME, uniform, fixed:NAME=WEIGHT,..., oracle, arrow[:topK], spectr[:topK], "
    "seqr, centroid[:topK], merge:linear|ties|dare, collapse, xlora[:topK[-renormalised]], or a name given with --model"
)
_TOP = re.compile(r"top([1-9]\d*)(-renormalised)?")


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
    for name in models:
        if name == ALL or _own(name.partition(":")[0]):
            raise ConfigError(f"--model {name}: that name stands for a system of xloom's; choose another")
    found: dict[str, System] = {}
    for word in words:
        if word == ALL:
            for name in all_names(model, models=models):
                found.setdefault(name, _find(name, model, collapse, models))
        else:
            found[word] = _find(word, model, collapse, models)
    return list(found.values())


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


def _own(kind: str) -> bool:
    return kind in {
        "constant", "base", "few-shot", "single", "uniform", "fixed", ORACLE, "arrow", "spectr", "seqr", "centroid",
        "merge", "collapse", HEAD,
    }  # fmt: skip


def _find(word: str, model: XLoraForCausalLM, collapse: Path | None, models: Mapping[str, Path]) -> System:
    if word in models:
        return OtherModel(word, models[word])
    kind, _, rest = word.partition(":")
    if kind == "single" and rest:
        check_known([rest], model.experts)
        return Routed(word, f"the expert {rest} alone", lambda bench: Single(rest))
    if kind == "fixed" and rest:
        return _fixed(word, rest, model)
    if kind == "merge" and rest:
        return _merge(word, rest, model)
    if kind == HEAD:
        return _head(word, rest, model)
    if kind in {"arrow", "spectr", "centroid"}:
        return _training_free(word, kind, _top_k(word, rest, model))
    if not rest and (found := _plain(kind, collapse)) is not None:
        return found
    raise ConfigError(f"unknown system {word!r}; expected {WORDS}")


def _plain(kind: str, collapse: Path | None) -> System | None:
    match kind:
        case "constant":
            return Constant(kind, "the answer that does best on the task's training rows, always")
        case "base":
            return Routed(kind, "the base model, no expert", lambda bench: BaseOnly())
        case "few-shot":
            return FewShot(kind, "the base model, solved training rows before the question")
        case "uniform":
            return Routed(kind, "every expert with weight 1/N", lambda bench: Uniform())
        case "oracle":
            return RightExpert(kind, "the right expert of each question")
        case "seqr":
            about = "SEQR (arXiv 2509.18093): the largest |B A x|, standardised on training prompts"
            return Routed(
                kind, about, lambda bench: SpectR.calibrated(bench.model, bench.samples(), top_k=1),
                routes=True, fitted=True,
            )  # fmt: skip
        case "collapse":
            about = "the head's average scalings as one static adapter"
            if (folder := collapse) is not None:
                return OneAdapter(kind, about, lambda bench: Expert.from_pretrained(folder), folder=folder)
            return OneAdapter(kind, about, collapsed, reads_head=True, fitted=True)
    return None


def _fixed(word: str, rest: str, model: XLoraForCausalLM) -> System:
    try:
        weights = {name: float(weight) for name, _, weight in (part.partition("=") for part in rest.split(","))}
    except ValueError:
        raise ConfigError(f"unknown system {word!r}; expected fixed:NAME=WEIGHT,NAME=WEIGHT,...") from None
    check_known(weights, model.experts)
    return Routed(word, "the same weights everywhere", lambda bench: Fixed(weights))


def _merge(word: str, rest: str, model: XLoraForCausalLM) -> System:
    known = dict.fromkeys([*MERGES, *get_args(Method)])
    if rest not in known:
        raise ConfigError(f"unknown system {word!r}; expected merge: and one of {names(known, 12)}")
    method = fitting_method(model, MERGES[rest]) if rest in MERGES else cast(Method, rest)
    about = f"all experts merged into one adapter (PEFT, {method})"
    return OneAdapter(word, about, lambda bench: merged(bench, method))


def _head(word: str, rest: str, model: XLoraForCausalLM) -> System:
    if not rest:
        return Routed(word, "the model's own head", lambda bench: XLora(), routes=True, reads_head=True)
    match = _TOP.fullmatch(rest)
    k = int(match[1]) if match else 0
    if match is None or k > len(model.experts) + model.config.null_expert:
        raise ConfigError(f"unknown system {word!r}; expected xlora, xlora:topK or xlora:topK-renormalised")
    fields = {"top_k_lora": k, "enable_softmax_topk": match[2] is not None}
    how = ", renormalised" if match[2] else ""
    about = f"the same head, its {k} largest weights{how}" if k > 1 else f"the same head, its largest weight{how}"
    return Routed(word, about, lambda bench: XLora(), routes=True, reads_head=True, fields=fields)


def _training_free(word: str, kind: str, top_k: int | None) -> System:
    of = "" if top_k is None else f", its {top_k} best" if top_k > 1 else ", its best"
    if kind == "arrow":
        about = f"Arrow (arXiv 2405.11157){of}"
        return Routed(word, about, lambda bench: Arrow(top_k=top_k), routes=True)
    if kind == "spectr":
        about = f"SpectR (arXiv 2504.03454){of}"
        return Routed(word, about, lambda bench: SpectR(top_k=top_k), routes=True)
    return Nearest(word, f"likeness of the prompt to training prompts (after arXiv 2402.09997){of}", top_k)


def _top_k(word: str, rest: str, model: XLoraForCausalLM) -> int | None:
    if not rest:
        return None
    match = _TOP.fullmatch(rest)
    if match is None or match[2] or int(match[1]) > len(model.experts):
        raise ConfigError(f"unknown system {word!r}; expected K of top-K from 1 to {len(model.experts)}")
    return int(match[1])

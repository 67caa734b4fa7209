"""Several LoRA experts merged into one that anyone can serve: PEFT's `add_weighted_adapter` without the base.

    svd, cat          the weighted sum of the experts' deltas: cut to a rank, or exact with the ranks added up
    linear            factors A and B added apart, as PEFT does it: a rough stand-in for that sum
    ties              only the largest entries, and of those the ones of the elected sign   (arXiv 2306.01708)
    dare_linear, ...  random entries dropped, the rest enlarged, before either             (arXiv 2311.03099)
    <method>_svd      on the deltas and not on the factors, cut to a rank: the papers' meaning, for experts of any ranks

PEFT works on stand-ins for the adapted modules that have their shape and no memory. Knows nothing of routers.
Letters: I in-features  O out-features  R rank
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xloom.architecture import fit_experts, meta_base
from xloom.checkpoints.saved import write_expert
from xloom.errors import ConfigError, UnsupportedLoraError, names
from xloom.experts import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Expert, LowRank
from xloom.hub.files import new_folder, write_json
from xloom.modules import check_fit
from xloom.routers import check_known

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
]  # fmt: skip
RECORD = "merge.json"
# methods on factors, for which experts must have one rank, and their forms on deltas
_ON_DELTAS: Mapping[Method, Method] = {
    "linear": "svd", "ties": "ties_svd", "dare_linear": "dare_linear_svd", "dare_ties": "dare_ties_svd",
}  # fmt: skip
_MEANS = {"ties", "ties_svd", "dare_ties", "dare_ties_svd"}  # they divide by the number of experts themselves


def merge_experts(
    base: str | Path | PreTrainedModel,
    experts: Mapping[str, str | Path | Expert],
    method: Method,
    *,
    weights: Mapping[str, float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
) -> Expert:
    """One expert of scale 1 in float32, made of several; `from_experts` takes it as any other.

    Args:
        base: what the experts were made for; of a path, hub id or built-in name only the config is read.
        experts: by name: PEFT LoRA folders, hub ids, or `Expert`s.
        weights: by name; those not named are left out. By default alike: 1/N each, or 1 each where the method takes a
            mean itself (ties).
        density: (ties, dare) share of entries that are kept, 0 < density <= 1.
        rank: (svd methods) of the result; the experts' largest, if None.
        seed: (dare) of the random choice.
        output: also written there, as a PEFT folder with `merge.json`.

    Raises:
        ConfigError: a method, density or rank out of range, fewer than two experts, or other files in the output.
        UnsupportedLoraError: experts of several ranks with a method on factors; DoRA, LoRA biases, score heads.
        UnknownExpertError: a weight for an expert that is not there.
        ExpertError: one of its children names what cannot be read or does not fit the base.
        CheckpointError: the output cannot be written.
    """
    _check_settings(method, density, rank)
    if output is not None:
        check_output(Path(output), RECORD)
    read = {n: e if isinstance(e, Expert) else Expert.from_pretrained(e) for n, e in experts.items()}
    if weights is None:
        weights = dict.fromkeys(read, 1.0 if method in _MEANS else 1.0 / max(len(read), 1))
    check_known(weights, list(read))
    model = base if isinstance(base, PreTrainedModel) else meta_base(base)
    fitted = fit_experts(model, {name: read[name] for name in weights}, None, drop=False)
    _check_experts(fitted, model, method)
    found = {module: low for expert in fitted.values() for module, low in expert.modules.items()}
    adapted = {module: found[module] for module, _ in model.named_modules() if module in found}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* no pruning")
        lows = _merged(list(fitted.values()), list(weights.values()), adapted, method, density, rank, seed)
    where = model.config._name_or_path or None if isinstance(base, PreTrainedModel) else str(base)
    merged = Expert(f"{method} of {names(weights)}", plain_config(lows, model, where), lows)
    if output is not None:
        record: dict[str, Any] = {"method": method, "weights": dict(weights)}
        record |= {"experts": {name: expert.source for name, expert in fitted.items()}}
        record |= {} if method in {"linear", "cat", "svd"} else {"density": density}
        record |= {"seed": seed} if method.startswith("dare") else {}
        with new_folder(Path(output), replaces=[CONFIG_FILE, WEIGHTS_FILE, RECORD]) as folder:
            write_expert(merged, folder)
            write_json(folder / RECORD, record)
    return merged


def on_deltas(method: Method) -> Method:
    """The form of a method that works on deltas and takes experts of any ranks: the method itself, where it is one."""
    return _ON_DELTAS.get(method, method)


def plain_config(modules: Mapping[str, LowRank], model: PreTrainedModel, base: str | None) -> dict[str, Any]:
    """An adapter_config.json for factors of scale 1, which names the adapted modules and no others.

    Endings of names where they say the same, as more tools read them; else full paths.
    """
    rank = max(low.rank for low in modules.values())
    lower = {module: low.rank for module, low in modules.items() if low.rank != rank}
    endings = {module.rpartition(".")[2] for module in modules}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": sorted(endings if meant == set(modules) else modules),
        "fan_in_fan_out": any(isinstance(model.get_submodule(module), Conv1D) for module in modules),
        "bias": "none",
        "inference_mode": True,
    }


def check_output(folder: Path, record: str) -> None:
    """Raises ConfigError if the folder holds files, and none called `record` that says they are such a result."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / record).is_file():
        raise ConfigError(f"{folder}: expected a new folder, or one with a {record} to replace, found other files")


def _merged(
    experts: Sequence[Expert],
    weights: Sequence[float],
    adapted: Mapping[str, LowRank],
    method: Method,
    density: float,
    rank: int | None,
    seed: int,
) -> dict[str, LowRank]:
    """Args: adapted: one expert's factors of every module, in the base's order: that of DARE's random numbers."""
    labels = [f"expert_{i}" for i in range(len(experts))]  # PEFT takes no dots in names
    peft = PeftModel(_stand_ins(adapted), _as_it_is(experts[0]), adapter_name=labels[0])
    for label, expert in zip(labels, experts, strict=True):
        if label != labels[0]:
            peft.add_adapter(label, _as_it_is(expert))
        plain = {module: low.to(dtype=torch.float32) for module, low in expert.modules.items()}
        left = set_peft_model_state_dict(peft, Expert("", {}, plain).tensors(), adapter_name=label).unexpected_keys
        assert not left, left
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device: all is on the CPU
    peft.base_model.add_weighted_adapter(
        labels, list(weights), "merged", combination_type=method, density=density, svd_rank=rank,
        svd_full_matrices=False,
    )  # fmt: skip
    tensors = get_peft_model_state_dict(peft, adapter_name="merged", save_embedding_layers=False)
    return {module: _read(tensors, module, low.is_embedding) for module, low in adapted.items()}


def _read(tensors: Mapping[str, Tensor], module: str, is_embedding: bool) -> LowRank:
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    A_RI, B_OR = (tensors[f"{PREFIX}{module}.{part}"].detach() for part in (a, b))
    used_R = (A_RI != 0).any(dim=1) & (B_OR != 0).any(dim=0)  # `cat` leaves room for experts that lack the module
    used_R[0] = True
    return LowRank(A_RI[used_R].clone(), B_OR[:, used_R].clone(), 1.0, is_embedding=is_embedding)


def _as_it_is(expert: Expert) -> LoraConfig:
    """PEFT's config with the ranks and scales that the expert has, module by module."""
    largest = max(low.rank for low in expert.modules.values())
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern={re.escape(module): low.rank for module, low in expert.modules.items()},
        alpha_pattern={re.escape(module): low.scale * low.rank for module, low in expert.modules.items()},
        target_modules=list(expert.modules),
    )


def _stand_ins(modules: Mapping[str, LowRank]) -> nn.Module:
    """A tree with the adapted modules in their places, whose weights are one number seen as a matrix."""
    root = nn.Module()
    for path, low in modules.items():
        *parents, name = path.split(".")
        home = root
        for parent in parents:
            if not hasattr(home, parent):
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        with torch.device("meta"):
            kind: Any = nn.Embedding if low.is_embedding else nn.Linear
            module = kind(low.A_RI.shape[1], low.B_OR.shape[0])
        module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape), requires_grad=False)
        module.bias = None
        home.add_module(name, module)
    return root


def _check_settings(method: str, density: float, rank: int | None) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"unknown method {method!r}; expected one of {names(get_args(Method), 9)}")
    if not 0 < density <= 1:
        raise ConfigError(f"density: expected more than 0 and at most 1, found {density}")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        raise ConfigError(f"rank: expected at least 1, with a method that ends in svd; found {rank} with {method!r}")


def _check_experts(experts: Mapping[str, Expert], model: PreTrainedModel, method: Method) -> None:
    if len(experts) < 2:
        raise ConfigError(f"merging takes at least two experts, found {names(experts) or 'none'}")
    for label, expert in experts.items():
        lows = expert.modules.values()
        kinds = {
            "DoRA": any(low.magnitude_O is not None for low in lows),
            "a LoRA bias": any(low.bias_O is not None for low in lows),
            "a score head": bool(expert.score),
        }
        if found := [kind for kind, there in kinds.items() if there]:
            raise UnsupportedLoraError(f"expert {label!r} ({expert.source}): {names(found)} cannot be merged")
        for module, low in expert.modules.items():
            check_fit(model.get_submodule(module), module, low, f"expert {label!r} ({expert.source})")
    ranks = {label: sorted({low.rank for low in expert.modules.values()}) for label, expert in experts.items()}
    if on_deltas(method) != method and len({rank for found in ranks.values() for rank in found}) > 1:
        found = [f"{label} {'/'.join(map(str, some))}" for label, some in ranks.items()]
        raise UnsupportedLoraError(
            f"method {method!r} takes experts of one rank, found {names(found)}; {on_deltas(method)!r} takes any"
        )

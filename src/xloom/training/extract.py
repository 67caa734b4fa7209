"""Any full fine-tune as an expert: what it changed at each linear module, by truncated SVD, in a PEFT LoRA folder.

    W_tuned - W_base = D ~ B A,   B = U sqrt(s),  A = sqrt(s) V^T,   of D's largest singular values s

What a LoRA at these modules cannot carry is measured and named. Knows nothing of data, recipes or mixing.
Letters: I in-features  O out-features  R rank
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xloom.architecture import check_base
from xloom.checkpoints.saved import write_expert
from xloom.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    ExpertError,
    MissingTensorsError,
    NoMatchingSiteError,
    NonFiniteError,
    NotFoundError,
    UnsupportedArchitectureError,
    names,
)
from xloom.experts import CONFIG_FILE, Expert, LowRank
from xloom.hub.base_model import resolve_base
from xloom.hub.files import new_folder, read_json, write_json
from xloom.merging import plain_config
from xloom.modules import dense_weight

RECORD = "extraction.json"
ALL_LINEAR = "all-linear"

EXACT_UP_TO = 1024  # smaller side of a matrix whose SVD is computed in full
OVERSAMPLING, POWER_ITERATIONS = 16, 4
NOTICEABLE = 1e-6  # a smaller relative change is rounding

_SHAPE_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size",
)  # fmt: skip
# Fields of a config that do not change what the weights compute without dropout.
_NO_MATTER = re.compile(
    r"_.*|architectures|auto_map|dtype|transformers_version|use_cache|initializer_range|tie_word_embeddings|"
    r"task_specific_params|\w+_token_id|\w*dropout\w*|\w+_pdrop|output_\w+|return_dict|id2label|label2id|problem_type"
)


@dataclass(frozen=True)
class SiteFit:
    """How well one module's difference D is carried.

    Args:
        rank: R or less, where D has no more.
        norm: Frobenius norm |D|.
        change: |D| / |W_base|; 1 where the base is zero.
        error: |D - BA| / |D|, of the float32 factors that are written.
    """

    site: str
    in_features: int
    out_features: int
    rank: int
    norm: float
    change: float
    error: float

    @property
    def energy(self) -> float:
        """Share of |D|^2 that is kept."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class LeftOut:
    """Tensors of one kind (layer numbers as *) that the adapter does not carry; `change` as in `SiteFit`."""

    group: str
    tensors: int
    change: float


@dataclass(frozen=True)
class Extraction:
    """What was extracted, how exactly, and what was not.

    Args:
        unchanged: targeted modules that are the same in both models; the adapter does not name them.
        left_out: every tensor outside the adapter, in groups.
        settings: fields of the models' configs that differ: [base's, tuned's].
        dtypes: in which base and tuned model are stored.
    """

    output: Path
    tuned: str
    base: str
    rank: int
    targets: str | tuple[str, ...]
    sites: tuple[SiteFit, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    settings: Mapping[str, tuple[Any, Any]]
    dtypes: tuple[str, str]

    @property
    def error(self) -> float:
        """|D - BA| / |D| over all sites as one matrix."""
        return math.hypot(*(fit.error * fit.norm for fit in self.sites)) / math.hypot(*(f.norm for f in self.sites))

    @property
    def energy(self) -> float:
        return 1.0 - self.error**2

    @property
    def parameters(self) -> int:
        return sum(fit.rank * (fit.in_features + fit.out_features) for fit in self.sites)

    def warnings(self) -> list[str]:
        """One line for each reason why base and expert are not the tuned model, beside the error of the rank."""
        lines = []
        lost = [f"{left.group} ({left.change:.2g})" for left in self.left_out if left.change > NOTICEABLE]
        if lost:
            lines.append(f"left out, though it differs (relative change): {names(lost, 10)}")
        if self.settings:
            differing = [f"{field} (base {was!r}, tuned {now!r})" for field, (was, now) in self.settings.items()]
            lines.append(f"settings differ, and no adapter carries them: {names(differing)}")
        if self.dtypes[0] != self.dtypes[1]:
            lines.append(
                f"base stored as {self.dtypes[0]}, tuned as {self.dtypes[1]}: rounding is part of the difference"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """One object with `rows`, a flat row per site."""
        return {
            "what": "extract-expert",
            **{field: value for field, value in asdict(self).items() if field not in {"output", "sites"}},
            "error": self.error,
            "energy": self.energy,
            "parameters": self.parameters,
            "rows": [asdict(fit) | {"energy": fit.energy} for fit in self.sites],
            "warnings": self.warnings(),
        }


def extract_expert(
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    rank: int,
    targets: str | Sequence[str] = ALL_LINEAR,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Writes the difference between two models of the same shape as a LoRA expert of scale 1.

    Args:
        tuned, base: folder, hub id, or the built-in base's name; both are held in memory, as they are stored.
        output: a new folder, or one of an earlier extraction, which is replaced.
        rank: R at most; a site whose difference has a lower rank takes that.
        targets: "all-linear" (all but the language-model head), or module names or endings of names, among which may
            be the language-model head and the token embedding.
        progress: called with sites done and sites in all.

    Raises:
        ConfigError: rank or targets are out of range, or the output holds other files.
        NotFoundError, UnsupportedArchitectureError: a model is not there, no causal model, or quantised.
        BaseMismatchError: the two have different shapes.
        NoMatchingSiteError: a target is no linear module of the base.
        NonFiniteError: a weight holds NaN or infinity.
        ExpertError: nothing differs that an adapter at these targets could carry.
        CheckpointError: a model's files are damaged or not whole, or the output cannot be written.
    """
    output = Path(output)
    _check_arguments(output, rank, targets)
    base_model, tuned_model = _load(base, "base"), _load(tuned, "tuned")
    pairs = _matching_tensors(base_model, tuned_model)
    sites = target_sites(base_model, targets)
    fitted: dict[str, tuple[LowRank, SiteFit]] = {}
    for done, site in enumerate(sites, 1):
        found = _fit(site, base_model.get_submodule(site), tuned_model.get_submodule(site), rank)
        if found is not None:
            fitted[site] = found
        if progress is not None:
            progress(done, len(sites))
    left_out = tuple(_left_out(pairs, {f"{site}.weight" for site in sites}))
    if not fitted:
        elsewhere = [left.group for left in left_out if left.change]
        said = f"a difference only in {names(elsewhere)}" if elsewhere else "the same weights"
        raise ExpertError(f"{tuned}: expected weights that differ from {base} at the targets, found {said}")
    result = Extraction(
        output=output,
        tuned=str(tuned),
        base=str(base),
        rank=rank,
        targets=targets if isinstance(targets, str) else tuple(targets),
        sites=tuple(fit for _, fit in fitted.values()),
        unchanged=tuple(site for site in sites if site not in fitted),
        left_out=left_out,
        settings=_differing_settings(base_model, tuned_model),
        dtypes=(str(base_model.dtype).removeprefix("torch."), str(tuned_model.dtype).removeprefix("torch.")),
    )
    old = [item.name for item in output.iterdir()] if output.is_dir() else []
    with new_folder(output, replaces=old) as folder:
        factors = {site: low for site, (low, _) in fitted.items()}
        write_expert(Expert(str(tuned), plain_config(factors, base_model, result.base), factors), folder)
        write_json(folder / RECORD, result.as_json())
        (folder / "README.md").write_text(_card(result), encoding="utf-8")
    return result


def target_sites(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Paths of the targeted modules, in the model's order. Raises NoMatchingSiteError."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]
    if targets == ALL_LINEAR:
        return [name for name in linear if modules[name] is not model.get_output_embeddings()]
    wanted = [targets] if isinstance(targets, str) else targets
    found = {word: [name for name in modules if f".{name}".endswith(f".{word}")] for word in wanted}
    if missing := [word for word, here in found.items() if not here]:
        known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
        raise NoMatchingSiteError(f"targets: expected names or endings of {names(known, 9)}, found {names(missing)}")
    chosen = {name for here in found.values() for name in here}
    # Other embeddings are not fed the tokens: what an expert adds there could not be weighed per token.
    fit = {*linear, *(name for name, module in modules.items() if module is model.get_input_embeddings())}
    if unfit := [f"{name} ({type(modules[name]).__name__})" for name in sorted(chosen - fit)]:
        raise NoMatchingSiteError(f"targets: expected linear modules or the token embedding, found {names(unfit, 2)}")
    return [name for name in modules if name in chosen]


def truncated_svd(D_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [R, I] and B [O, R] in float32 with BA the best approximation of D of that rank, or nearly so.

    Exact up to `EXACT_UP_TO` rows or columns, or where the rank is near full; beyond, a randomised SVD that always
    draws the same numbers. Singular values that are rounding of float32 are left out: R may be less than `rank`.
    """
    side, sampled = min(D_OI.shape), rank + OVERSAMPLING
    if side <= EXACT_UP_TO or 2 * sampled >= side:
        U_OR, s_R, Vt_RI = torch.linalg.svd(D_OI.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U_OR, s_R, V_IR = torch.svd_lowrank(D_OI, q=sampled, niter=POWER_ITERATIONS)
        Vt_RI = V_IR.T
    rounding = s_R[0] * torch.finfo(torch.float32).eps * max(D_OI.shape)
    kept = min(rank, max(1, int((s_R > rounding).sum())))
    root_R = s_R[:kept].sqrt()
    return (root_R[:, None] * Vt_RI[:kept]).float(), (U_OR[:, :kept] * root_R).float()


def _fit(site: str, base: nn.Module, tuned: nn.Module, rank: int) -> tuple[LowRank, SiteFit] | None:
    """The factors of one module and how well they do, or None if the module is unchanged."""
    W_OI = dense_weight(base)
    D_OI = dense_weight(tuned) - W_OI
    norm = _norm(D_OI)
    if norm == 0:
        return None
    A_RI, B_OR = truncated_svd(D_OI, rank)
    error = _norm(torch.addmm(D_OI, B_OR.to(D_OI), A_RI.to(D_OI), alpha=-1)) / norm
    low = LowRank(A_RI, B_OR, 1.0, is_embedding=isinstance(base, nn.Embedding))
    return low, SiteFit(site, D_OI.shape[1], D_OI.shape[0], low.rank, norm, _relative(norm, _norm(W_OI)), error)


def _left_out(pairs: Mapping[str, tuple[Tensor, Tensor]], carried: set[str]) -> Iterator[LeftOut]:
    """What is not at the targets, by tensor name with * for layer numbers; a tied tensor counts once."""
    groups: dict[str, list[tuple[float, float]]] = {}
    seen = set()
    for name, (was, now) in pairs.items():
        if name in carried or (id(was), id(now)) in seen:
            continue
        seen.add((id(was), id(now)))
        wide = torch.promote_types(torch.promote_types(was.dtype, now.dtype), torch.float32)
        change = _norm(now.detach().to(wide) - was.detach().to(wide))
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append((change, _norm(was)))
    for group, found in groups.items():
        changes, sizes = zip(*found, strict=True)
        yield LeftOut(group, len(found), _relative(math.hypot(*changes), math.hypot(*sizes)))


def _relative(change: float, size: float) -> float:
    return change / (size or change or 1.0)


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float64 some rows at a time: float32 sums of large matrices drift."""
    parts = torch.split(tensor.detach().reshape(tensor.shape or (1,)), 256)
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))


# --- the two models ---


def _load(source: str | Path, role: str) -> PreTrainedModel:
    where = f"{role} {source}"
    if (Path(source) / CONFIG_FILE).is_file():
        raise UnsupportedArchitectureError(f"{where}: expected a whole model, found a PEFT adapter")
    path = resolve_base(str(source))
    settings = Path(path) / "config.json"
    if settings.is_file() and read_json(settings).get("model_type") == "xlora":
        raise UnsupportedArchitectureError(f"{where}: expected a whole model, found an X-LoRA model of xloom")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = CheckpointError if Path(path).is_dir() else NotFoundError
        raise kind(f"{where}: cannot be loaded ({reason})") from None
    check_base(model)
    if report["missing_keys"]:  # transformers makes them up
        raise MissingTensorsError(f"{where}: expected every weight, found no {names(sorted(report['missing_keys']))}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedArchitectureError(f"{where}: expected weights in full precision, found quantised ones")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{where}: tensor {name} holds NaN or infinity")
    return model


def _matching_tensors(base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> tensors of base and tuned model. Raises BaseMismatchError at the first thing that differs in shape."""

    def refuse(what: str, expected: object, found: object) -> None:
        if expected != found:
            raise BaseMismatchError(f"tuned is no fine-tune of base: {what}: expected {expected!r}, found {found!r}")

    for field in _SHAPE_FIELDS:
        refuse(field, getattr(base.config, field, None), getattr(tuned.config, field, None))
    theirs, ours = tuned.state_dict(keep_vars=True), base.state_dict(keep_vars=True)
    for name in [*ours, *theirs]:
        shapes = [tuple(state[name].shape) if name in state else None for state in (ours, theirs)]
        refuse(f"shape of {name}", *shapes)
    return {name: (tensor, theirs[name]) for name, tensor in ours.items()}


def _differing_settings(base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    ours, theirs = base.config.to_dict(), tuned.config.to_dict()
    fields = [field for field in {**ours, **theirs} if not _NO_MATTER.fullmatch(field)]
    return {f: (ours.get(f), theirs.get(f)) for f in fields if ours.get(f) != theirs.get(f)}


def _check_arguments(output: Path, rank: int, targets: str | Sequence[str]) -> None:
    if rank < 1:
        raise ConfigError(f"rank: expected at least 1, found {rank}")
    if not targets:
        raise ConfigError(f"targets: expected {ALL_LINEAR!r} or names of modules, found none")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: expected a new folder, found a file {output}")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise ConfigError(f"output: expected a new folder, or one with {RECORD}, found other files in {output}")


# --- what is written ---


def _card(found: Extraction) -> str:
    lines = [
        f"---\nlibrary_name: peft\nbase_model: {found.base}\ntags: [lora, xloom]\n---\n",
        f"# {found.output.name}\n",
        f"What a fine-tuned model changed, as a LoRA expert (`xloom extract-expert`); errors per site: {RECORD}.\n",
        f"- base: `{found.base}` ({found.dtypes[0]})",
        f"- tuned: `{found.tuned}` ({found.dtypes[1]})",
        f"- adapter: rank {found.rank} at most, {len(found.sites)} sites, {found.parameters:,} parameters",
        f"- relative error of the difference: {found.error:.4g} ({found.energy:.2%} of its square kept)",
        *(f"- {line}" for line in found.warnings()),
    ]
    return "\n".join(lines) + "\n"

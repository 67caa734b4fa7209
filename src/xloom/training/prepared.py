"""What the head's training needs of the frozen parts, computed once per row and kept on disk.

    HeadStates     what the head reads: the scaling pass is never run twice over a row
    ExpertLosses   what every expert alone, and the base, lose on a row's completion: soft labels, and references

Several processes share the work. On a CPU rows are computed one by one: a row's tensors then do not depend on the rows
beside it, on the order, or on what an earlier run has left in the cache, to the last bit.
Letters: T tokens  D hidden size  K completion tokens
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xloom.architecture import hidden_size
from xloom.model import XLoraForCausalLM
from xloom.routers import BaseOnly, Router, Single, Uniform
from xloom.training import processes
from xloom.training.data import Example, collate
from xloom.training.objective import token_losses
from xloom.training.store import TensorStore, row_key

_NO_MATTER = {"transformers_version", "architectures", "use_cache"}  # of a config, to what the base computes
BASE, UNIFORM = "", "*"  # among experts' names, which are never these


def base_fingerprint(model: XLoraForCausalLM) -> str:
    """Tells bases apart: a hash over their settings, and their tensors' names, shapes, types, sums and first values.

    Any change by training changes it; exchanged values within one tensor may not.
    """
    found = hashlib.sha256()
    settings = model.base.config.to_dict()
    told = {k: v for k, v in settings.items() if not k.startswith("_") and k not in _NO_MATTER}
    found.update(json.dumps(told, sort_keys=True, default=str).encode())
    base = model.plain_base()
    tensors = [*base.named_parameters(), *base.named_buffers()]
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        values = flat.double() if not flat.is_complex() else torch.view_as_real(flat).double()
        sums = (values.sum().item(), values.square().sum().item(), values[:32].tolist())
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype), sums)).encode())
    return found.hexdigest()


class HeadStates:
    """Hidden states [T, D] that the head reads, by row.

    Args:
        model: whose base gives them; they do not depend on its head.
        base_id: fingerprint of the plain base.
        expert_ids: fingerprints of the experts, on which the states depend where the scaling pass uses them.
    """

    def __init__(
        self, model: XLoraForCausalLM, base_id: str, expert_ids: Mapping[str, str], root: Path | None = None
    ) -> None:
        config = model.config
        about = {
            "what": "head states",
            "base": base_id,
            "dtype": str(model.dtype),
            "gate_at_layer": config.gate_at_layer,
            "scaling_pass": None
            if config.scaling_pass_value == 0
            else {
                "value": config.scaling_pass_value,
                "top_k": config.top_k_lora,
                "softmax_topk": config.enable_softmax_topk,
                "weight": config.global_scaling_weight,
                "experts": list(expert_ids.values()),
            },
        }
        self.model = model
        self.store = TensorStore(about, root)

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those whose states are not here yet, each once."""
        return _missing(self.store, examples, _states_key)

    def make_room(self, examples: Sequence[Example], limit_bytes: int) -> bool:
        """False if the states of all these cannot be held within the limit."""
        return self.store.make_room(map(_states_key, examples), self.bytes_of(examples), limit_bytes)

    def bytes_of(self, examples: Sequence[Example]) -> int:
        """Room that those need which are not here yet."""
        tokens = sum(len(e.input_ids) for e in self.missing(examples))
        size = hidden_size(self.model.base, gated=self.model.config.gate_at_layer is not None)
        return tokens * size * int(self.model.dtype.itemsize)

    def fill(
        self, examples: Sequence[Example], batch_size: int, pad_id: int, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Computes what is not here yet; `tick` is called for every row."""
        self.model.eval()
        for rows, batch in _batches(self.store, examples, _states_key, batch_size, pad_id, self.model):
            states_BTD = self.model.compute_head_states(batch["input_ids"], batch["attention_mask"])
            for row, states_TD in zip(rows, states_BTD, strict=True):
                self.store.add(_states_key(row), states_TD[-len(row.input_ids) :])
                tick()

    def __getitem__(self, example: Example) -> Tensor:
        return self.store[_states_key(example)]

    def batch(self, examples: Sequence[Example]) -> Tensor:
        """[B, T, D], padded on the left with zeros, as `collate` pads tokens."""
        states = [self[example] for example in examples]
        longest = max(len(s) for s in states)
        return torch.stack([F.pad(s, (0, 0, longest - len(s), 0)) for s in states])


class ExpertLosses:
    """Loss of every completion token [K] by row and name: one expert alone, the base (`BASE`), all alike (`UNIFORM`).

    Args:
        expert_ids: fingerprints of the experts.
    """

    def __init__(
        self, model: XLoraForCausalLM, base_id: str, expert_ids: Mapping[str, str], root: Path | None = None
    ) -> None:
        about = {
            "what": "expert losses",
            "base": base_id,
            "dtype": str(model.dtype),
            "weight": model.config.global_scaling_weight,
            "gate_at_layer": model.config.gate_at_layer,  # which may have cut experts
        }
        self.model = model
        self.store = TensorStore(about, root)
        self._names = {name: f"expert {id}" for name, id in expert_ids.items()}
        self._names |= {BASE: "base", UNIFORM: f"uniform {sorted(expert_ids.values())}"}

    def fill(
        self,
        examples: Sequence[Example],
        name: str,
        batch_size: int,
        pad_id: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Computes what is not here yet; `tick` is called for every row."""
        self.model.eval()
        special: dict[str, Router] = {BASE: BaseOnly(), UNIFORM: Uniform()}
        router = special.get(name) or Single(name)
        for rows, batch in _batches(self.store, examples, lambda e: self._key(e, name), batch_size, pad_id, self.model):
            with torch.no_grad():
                logits_BKV = self.model(
                    batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    position_ids=batch["position_ids"],
                    logits_to_keep=batch["keep"],
                    use_cache=False,
                    routing=router,
                ).logits
            losses_BK = token_losses(logits_BKV, batch["labels"])
            for row, losses_K in zip(rows, losses_BK, strict=True):
                self.store.add(self._key(row, name), losses_K[-row.completion_tokens :])
                tick()

    def of(self, example: Example, name: str) -> Tensor:
        return self.store[self._key(example, name)]

    def _key(self, example: Example, name: str) -> str:
        return row_key(example.input_ids, f"{self._names[name]} from {example.completion_start}")


def _states_key(example: Example) -> str:
    return row_key(example.input_ids)


def _missing(store: TensorStore, examples: Sequence[Example], key: Callable[[Example], str]) -> list[Example]:
    by_key = {key(e): e for e in examples}
    return [by_key[name] for name in store.missing(by_key)]


def _batches(
    store: TensorStore,
    examples: Sequence[Example],
    key: Callable[[Example], str],
    batch_size: int,
    pad_id: int,
    model: XLoraForCausalLM,
) -> Iterator[tuple[Sequence[Example], Mapping[str, Any]]]:
    """Batches of what the store lacks, of similar lengths, shared among the processes; then the store is whole."""
    size = 1 if model.device.type == "cpu" else batch_size
    # One process decides what is missing: another run may be adding to the same store.
    missing = processes.first(lambda: sorted(_missing(store, examples, key), key=lambda e: len(e.input_ids)))
    shared = [missing[start : start + size] for start in range(0, len(missing), size)]
    for part in shared[processes.index() :: processes.count()]:
        batch = collate(part, pad_id)
        yield part, {key: v.to(model.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    store.flush()
    processes.gather(None)
    store.refresh()

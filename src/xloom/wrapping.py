"""What stands around a base's modules: the layers of an early gate, and a base in modules of its own.

Knows the structure of transformers' models, and nothing of scalings.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from xloom.call import Call, Current
from xloom.errors import UnsupportedArchitectureError
from xloom.site import Site


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder's layers."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise UnsupportedArchitectureError(f"{type(model).__name__}: found no list of its {depth} layers")


class GateLayer(nn.Module):
    """A decoder layer of a gated model: runs, or hands on what it gets, as the call that runs says.

    Args:
        number: of the layer.
        is_gate: whether the hidden state that enters it is what the head reads.
    """

    def __init__(self, layer: nn.Module, number: int, is_gate: bool, current: Current) -> None:
        super().__init__()
        self.layer = layer
        self.number, self.is_gate, self.current = number, is_gate, current

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.current.call
        if call is None:
            return self.layer(*args, **kwargs)
        if self.is_gate and call.at_gate is not None:
            replaced = call.at_gate(args[0] if args else kwargs["hidden_states"])
            if replaced is not None:
                args, kwargs = ((replaced, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": replaced})
        if self.number < call.first or (call.stop is not None and self.number >= call.stop):
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if call.in_tuples else hidden
        output = self.layer(*args, **kwargs)
        if call.layer_outputs is not None:
            call.layer_outputs.append(type(output))
        return output


class Gate:
    """An early gate: every decoder layer of the base in a `GateLayer`, until `remove`.

    Args:
        index: of the layer that the head's input enters.
    """

    def __init__(self, model: PreTrainedModel, index: int, current: Current) -> None:
        self.index = index
        self._model, self._current = model, current
        self._layers = decoder_layers(model)[1]
        self._in_tuples: bool | None = None
        for number, layer in enumerate(self._layers):
            self._layers[number] = GateLayer(layer, number, number == index, current)

    def remove(self) -> None:
        for number, layer in enumerate(self._layers):
            if isinstance(layer, GateLayer):
                self._layers[number] = layer.layer

    def gives_tuples(self) -> bool:
        """Whether this architecture's layers return tuples (falcon, bloom), found by asking them once."""
        if self._in_tuples is None:
            found: list[type] = []
            ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
            with torch.no_grad(), self._current.running(Call(layer_outputs=found)):
                self._model.base_model(ids, use_cache=False)
            self._in_tuples = issubclass(found[0], tuple)
        return self._in_tuples


def plain(base: PreTrainedModel) -> PreTrainedModel:
    """The base without sites and gate layers: modules and parameters of its own in the memory of `base`."""

    def bare(module: nn.Module) -> nn.Module:
        while isinstance(module, (Site, GateLayer)):
            module = module.base if isinstance(module, Site) else module.layer
        return module

    shell: PreTrainedModel = _shell(base, bare, lambda module: False, own_parameters=True)
    if any(getattr(module, "gradient_checkpointing", False) for module in shell.modules()):
        shell.gradient_checkpointing_disable()  # it is bound to the calls of the model around `base`
    return shell


def with_modules(
    base: PreTrainedModel, other: Mapping[nn.Module, nn.Module], attention: str | None = None
) -> PreTrainedModel:
    """The base with other modules in the places of some, for one call: modules of its own around the very tensors.

    Args:
        other: what stands in a module's place.
        attention: name of the attention to use (`transformers.AttentionInterface`).
    """
    kept = set(other.values())
    shell = _shell(
        base, lambda module: other.get(module, module), lambda module: isinstance(module, Site) or module in kept
    )
    if attention is not None:
        shell.config.get_text_config(decoder=True)._attn_implementation = attention
    return shell


def _shell(
    base: PreTrainedModel,
    swap: Callable[[nn.Module], nn.Module],
    as_it_is: Callable[[nn.Module], bool],
    own_parameters: bool = False,
) -> Any:
    """New modules around the parameters and buffers of a model; configs are copied.

    Args:
        swap: gives what stands in a module's place, mostly itself.
        as_it_is: whether a module is taken with all below it, and not copied.
        own_parameters: whether ordinary parameters are new ones in the same memory, which can be converted or unfrozen
            without a change to the model's.
    """
    memo: dict[int, Any] = {}

    def parameter(old: nn.Parameter | None) -> nn.Parameter | None:
        if type(old) is not nn.Parameter or not own_parameters:
            return old
        if id(old) not in memo:  # tied ones stay tied
            memo[id(old)] = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
        found: nn.Parameter = memo[id(old)]
        return found

    def own(name: str, value: Any, old: nn.Module, new: nn.Module) -> Any:
        if isinstance(value, PreTrainedConfig):
            return copy.deepcopy(value, memo)
        if name == "_parameters":
            return {key: parameter(one) for key, one in value.items()}
        if name in ("_buffers", "_non_persistent_buffers_set") or ("_hooks" in name and isinstance(value, dict)):
            return value.copy()
        # bound to the module, as methods are that accelerate has wrapped
        if isinstance(value, MethodType) and value.__self__ is old:
            return MethodType(value.__func__, new)
        if isinstance(value, partial) and any(arg is old for arg in value.args):
            return partial(value.func, *(new if arg is old else arg for arg in value.args), **value.keywords)
        return value

    def shell(module: nn.Module) -> nn.Module:
        module = swap(module)
        if as_it_is(module):
            return module
        if id(module) not in memo:
            new: nn.Module = object.__new__(type(module))
            memo[id(module)] = new
            new.__dict__.update({name: own(name, value, module, new) for name, value in module.__dict__.items()})
            new.__dict__["_modules"] = {name: child and shell(child) for name, child in module._modules.items()}
        found: nn.Module = memo[id(module)]
        return found

    return shell(base)

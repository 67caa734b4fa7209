"""What a site's name tells: which layer, and which kind of module. Knows nothing of traces or models.

model.layers.3.self_attn.q_proj    layer 3, q_proj
transformer.h.3.attn.c_proj        layer 3, attn.c_proj     as there is an mlp.c_proj as well
lm_head                            no layer, lm_head
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """The layer of a site, counted from 0 (None outside of the layers), and the kind of its module."""

    layer: int | None
    kind: str


def places(sites: Sequence[str]) -> list[Place]:
    """The place of each site."""
    words = [[word for word in site.split(".") if not word.isdigit()] for site in sites]
    homes: dict[str, set[str]] = {}
    for some in words:
        homes.setdefault(some[-1] if some else "", set()).add(".".join(some[-2:-1]))
    layers = [next((int(word) for word in site.split(".") if word.isdigit()), None) for site in sites]
    kinds = [".".join(some[-1:] if len(homes[some[-1]]) == 1 else some[-2:]) if some else "" for some in words]
    return [Place(layer, kind) for layer, kind in zip(layers, kinds, strict=True)]


class Groups(NamedTuple):
    """Sites in groups: what each is called, and which group [S] each site is in."""

    labels: tuple[str, ...]
    of_S: Tensor


def by_site(sites: Sequence[str]) -> Groups:
    """Every site is a group."""
    return Groups(tuple(sites), torch.arange(len(sites)))


def by_layer(sites: Sequence[str]) -> Groups:
    """Layers from the first to the last; sites outside of them by kind, in their order."""

    def key(place: Place) -> tuple[int, int, str]:
        return (0, place.layer, "") if place.layer is not None else (1, 0, place.kind)

    return _grouped(sites, lambda place: place.kind if place.layer is None else str(place.layer), key)


def by_kind(sites: Sequence[str]) -> Groups:
    """Kinds of modules, in the order in which they come first."""
    return _grouped(sites, lambda place: place.kind)


def _grouped(
    sites: Sequence[str], label: Callable[[Place], str], key: Callable[[Place], tuple[int, int, str]] | None = None
) -> Groups:
    found = places(sites)
    ordered = sorted(found, key=key) if key else found
    labels: Sequence[Hashable] = list(dict.fromkeys(label(place) for place in ordered))
    return Groups(tuple(map(str, labels)), torch.tensor([labels.index(label(place)) for place in found]))

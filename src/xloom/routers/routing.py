"""`Routing`: who decides the scalings of a batch, as a value that travels with a call: one line per row.

    Head      the model's head, through its gate with these settings         from the hidden states of the scaling pass
    Given     the same weights for every token at every site                 known beforehand
    Replay    the scalings of the very tokens of one forward                 known beforehand
    a `SiteRouter`                                                            asked at every site

A `Router` is what people write; the model makes lines of it. Rows with different lines share a batch, and each comes
out as it would alone. Knows nothing of hidden states, caches or files.
Letters: B batch  T tokens  S sites  N experts  C columns of the head (N, or N+1 with the null expert)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, final

import torch
from torch import Tensor

from xloom.call import Asked, SiteView
from xloom.config import XLoraConfig
from xloom.errors import ConfigError, ScalingsShapeError, UnknownExpertError, names, near
from xloom.gating import gate


class Router(ABC):
    """A way to decide on scalings, in the words of its user; the model it is used with turns it into a `Routing`."""

    @abstractmethod
    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> "Routing":
        """For a model with these experts and sites; one line stands for all rows of a batch.

        Raises:
            UnknownExpertError: it names an expert that the model does not have.
            ConfigError, ScalingsShapeError: it does not go with the model.
        """


class Fitted(Protocol):
    """What routers that are fitted to a model need of it."""

    base: Any

    @property
    def experts(self) -> tuple[str, ...]: ...

    @property
    def sites(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """`position_ids` [B, T] of left-padded rows as a keyword, or nothing where the base takes none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward."""


class SiteRouter(Router):
    """A router that is asked at every site, for the tokens that go through it."""

    def routing(self, experts: Sequence[str], sites: Sequence[str]) -> "Routing":
        return Routing((Line(self),))

    @abstractmethod
    def scalings(self, site: SiteView, x: Tensor) -> Tensor | None:
        """Weights of the experts at one site: [*leading, N], or None for "add nothing".

        Args:
            x: what enters the site: [*leading, I], with leading = B, T (or B*T where the base flattens its tokens);
                token ids [B, T] at an embedding.
        """


@final
@dataclass(frozen=True)
class Head:
    """The model's head decides. What is None is as the model's config says.

    Attributes:
        allowed: False for experts that must stay out; their share goes to the others.
        bias: added to the logits, by expert.
        top_k, renormalise, temperature: `top_k_lora`, `enable_softmax_topk`, `softmax_temperature` of the config.
    """

    allowed: tuple[bool, ...] | None = None
    bias: tuple[float, ...] | None = None
    top_k: int | None = None
    renormalise: bool | None = None
    temperature: float | None = None

    def most(self, config: XLoraConfig) -> int | None:
        return config.top_k_lora if self.top_k is None else self.top_k

    def scalings(self, logits_BTSC: Tensor, config: XLoraConfig) -> Tensor:
        return gate(
            logits_BTSC,
            config,
            allowed_N=None if self.allowed is None else torch.tensor(self.allowed, device=logits_BTSC.device),
            bias_N=None if self.bias is None else logits_BTSC.new_tensor(self.bias),
            top_k=self.top_k,
            renormalise=self.renormalise,
            temperature=self.temperature,
        )


@final
@dataclass(frozen=True)
class Given:
    """The same weights for every token at every site, by expert; none for "no expert at all"."""

    weights: tuple[float, ...] = ()

    @property
    def adds_nothing(self) -> bool:
        return not any(self.weights)


@final
@dataclass(frozen=True, eq=False)
class Replay:
    """Scalings [T, S, N] of the tokens of one forward."""

    scalings_TSN: Tensor


Decider = Head | Given | Replay | SiteRouter


@final
@dataclass(frozen=True)
class Line:
    """Who decides the scalings of one row, and what they are multiplied by; None: `global_scaling_weight`."""

    decider: Decider
    global_weight: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.decider, SiteRouter) and type(self.decider).__hash__ is not object.__hash__:
            name = type(self.decider).__name__
            raise ConfigError(f"router {name}: expected one that equals itself alone; for a dataclass, write eq=False")


@final
@dataclass(frozen=True)
class Routing:
    """Who decides the scalings of each row of a batch.

    Attributes:
        lines: one for every row; a single one stands for all rows of whatever batch.

    Raises:
        ConfigError: no line.
    """

    lines: tuple[Line, ...]
    # each decider with its rows; None for all rows
    _groups: tuple[tuple[Decider, list[int] | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lines:
            raise ConfigError("routing: expected at least one line, found none")
        found: dict[Any, tuple[Decider, list[int]]] = {}
        for row, line in enumerate(self.lines):
            key = Replay if isinstance(line.decider, Replay) else line.decider  # replays are stacked
            found.setdefault(key, (line.decider, []))[1].append(row)
        groups: list[tuple[Decider, list[int] | None]] = list(found.values())
        object.__setattr__(self, "_groups", tuple(groups) if len(groups) > 1 else ((groups[0][0], None),))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, rows: int | slice | Iterable[int]) -> "Routing":
        """The lines of a row, or of some rows."""
        if isinstance(rows, int):
            return Routing((self.lines[rows],))
        return Routing(self.lines[rows] if isinstance(rows, slice) else tuple(self.lines[row] for row in rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing of it changes

    @staticmethod
    def cat(some: Iterable["Routing"]) -> "Routing":
        """One batch of several."""
        return Routing(tuple(line for one in some for line in one.lines))

    def repeat(self, copies: int) -> "Routing":
        """Copies of every row, side by side."""
        return Routing(tuple(line for line in self.lines for _ in range(copies)))

    def weighed(self, global_weight: float | None) -> "Routing":
        """The same with another number that scalings are multiplied by."""
        return Routing(tuple(replace(line, global_weight=global_weight) for line in self.lines))

    def for_rows(self, count: int) -> "Routing":
        """With a line for each of `count` rows, or a single one for all.

        Raises:
            ScalingsShapeError: there are others.
        """
        replayed = next((one for one, _ in self._groups if isinstance(one, Replay)), None)
        if len(self.lines) == count or (len(self.lines) == 1 and replayed is None):
            return self
        if replayed is not None:
            found = (len(self.lines), len(replayed.scalings_TSN))
            raise ScalingsShapeError(f"scalings for a batch of {found} tokens, found {count} rows")
        raise ScalingsShapeError(
            f"routing for {len(self.lines)} rows, found a batch of {count}; expected one line, or {count}"
        )

    @property
    def reads_head(self) -> bool:
        """Whether the head has a part in it."""
        return any(isinstance(decider, Head) for decider, _ in self._groups)

    @property
    def adds_nothing(self) -> bool:
        """Whether it is the base alone, for all rows."""
        return all(isinstance(decider, Given) and decider.adds_nothing for decider, _ in self._groups)

    @property
    def asked(self) -> tuple[Asked, ...]:
        """Whom the sites have to ask, and for which rows."""
        found = ((decider, rows) for decider, rows in self._groups if isinstance(decider, SiteRouter))
        return tuple(Asked(router.scalings, rows) for router, rows in found)

    def global_B(self, config: XLoraConfig) -> tuple[float, ...]:
        """What the scalings of each row are multiplied by; a single number for all rows alike."""
        own = config.global_scaling_weight
        found = tuple(own if line.global_weight is None else line.global_weight for line in self.lines)
        return found[:1] if len(set(found)) == 1 else found

    def most(self, config: XLoraConfig) -> int | None:
        """How many experts of a token can have a scaling other than 0 at a site; None: any number."""
        found = [_most(decider, config) for decider, _ in self._groups]
        return None if None in found else max(count for count in found if count is not None)

    def decide(self, logits_BTSC: Tensor | None, tokens: tuple[int, int], config: XLoraConfig, like: Tensor) -> Tensor:
        """Scalings [B, T, S, N] before the global weight; 0 where sites are asked.

        Args:
            logits_BTSC: of the head, where it has a part in it.
            tokens: B and T.
            like: dtype and device of scalings that the head does not give.

        Raises:
            ScalingsShapeError: a replay of other tokens, sites or experts.
        """
        sites, experts = len(config.sites or ()), len(config.experts or ())
        out = None
        for decider, rows in self._groups:
            mine = self.lines if rows is None else [self.lines[row] for row in rows]
            count = tokens[0] if rows is None else len(rows)
            if isinstance(decider, Head):
                assert logits_BTSC is not None, "the head has been asked before"
                part = decider.scalings(logits_BTSC if rows is None else logits_BTSC[rows], config)
            elif isinstance(decider, Replay):
                part = _replayed(mine, tokens, sites, experts).to(like.device)
            elif isinstance(decider, Given) and not decider.adds_nothing:
                part = like.new_tensor(decider.weights).expand(count, tokens[1], sites, -1)
            else:
                part = like.new_zeros(()).expand(count, tokens[1], sites, experts)
            if rows is None:
                return part
            out = like.new_zeros(*tokens, sites, experts) if out is None else out
            out[rows] = part.to(out.dtype)
        assert out is not None
        return out


def _most(decider: Decider, config: XLoraConfig) -> int | None:
    if isinstance(decider, Head):
        return decider.most(config)
    return sum(weight != 0 for weight in decider.weights) if isinstance(decider, Given) else None


def _replayed(lines: Sequence[Line], tokens: tuple[int, int], sites: int, experts: int) -> Tensor:
    found = [line.decider.scalings_TSN for line in lines if isinstance(line.decider, Replay)]
    for scalings_TSN in found:
        count, its_sites, its_experts = scalings_TSN.shape
        if count != tokens[1]:
            raise ScalingsShapeError(f"scalings for a batch of {(tokens[0], count)} tokens, found one of {tokens}")
        if its_sites != sites:
            raise ScalingsShapeError(f"scalings for {its_sites} sites, the model has {sites}")
        if its_experts != experts:
            raise ScalingsShapeError(f"{its_experts} scalings per token for {experts} experts")
    return torch.stack(found)


def _experts_of(decider: Decider) -> int:
    """How many experts it speaks of; 0 where it does not say."""
    if isinstance(decider, Given):
        return len(decider.weights)
    return len(decider.allowed or decider.bias or ()) if isinstance(decider, Head) else 0


Routed = Router | Routing | Sequence[Router | Routing]


def as_routing(given: Routed, experts: Sequence[str], sites: Sequence[str]) -> Routing:
    """A router for all rows, a routing, or a list with one of them for every row, as a routing.

    Raises:
        ConfigError: something else; in a list, one that has several lines. Others as `Router.routing`.
    """
    if isinstance(given, Routing):
        for count in {_experts_of(decider) for decider, _ in given._groups} - {0, len(experts)}:
            raise ConfigError(f"routing: made for a model of {count} experts, this one has {len(experts)}")
        return given
    if isinstance(given, Router):
        return given.routing(experts, sites)
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"routing: expected a router, a Routing, or a list of them, found {given!r}")
    return Routing(tuple(_lines(given, experts, sites)))


def _lines(given: Sequence[Router | Routing], experts: Sequence[str], sites: Sequence[str]) -> Iterator[Line]:
    for row, one in enumerate(given):
        if not isinstance(one, (Router, Routing)):
            raise ConfigError(f"routing of row {row}: expected a router or a Routing, found {one!r}")
        lines = as_routing(one, experts, sites).lines
        if len(lines) != 1:
            raise ConfigError(f"routing of row {row}: expected one line, found {len(lines)}")
        yield lines[0]


def finite(value: object, what: str) -> float:
    """A setting as a number. Raises ConfigError for anything else, NaN and infinity among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what}: expected a finite number, found {value!r}")
    return float(value)


def check_known(wanted: Sequence[str] | Mapping[str, float], experts: Sequence[str]) -> None:
    """Raises UnknownExpertError for names that are not among the experts."""
    unknown = [name for name in wanted if name not in experts]
    if unknown:
        hint = near(unknown[0], experts)
        raise UnknownExpertError(
            f"no expert named {names(map(repr, unknown))}{hint}; the model has {names(experts, 10)}"
        )

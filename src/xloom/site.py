"""The experts at one module of the base as stacked matmuls, and whom the module asks for their scalings.

    y = W x + sum_n s_n * scale_n * (B_n (A_n x) + b_n)                              LoRA
    y = W x + sum_n s_n * ((m_n/c_n - 1) * W x + m_n/c_n * scale_n * B_n A_n x)      DoRA, c_n = |W + scale_n B_n A_n|

Two matmuls per site, whatever the number of experts, with the scalings between them where the tensor is narrowest.
The scalings s come from the `Call` that runs; without one, a site is its base module and nothing else.
Knows nothing of where scalings come from, of other sites, of caches, or of files.
Letters: B batch  T tokens  I in-features  O out-features  N experts  R sum of the experts' ranks
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xloom.call import Call, Current, Observer
from xloom.errors import ConfigError, ScalingsShapeError
from xloom.experts import LowRank
from xloom.fused import frozen_mix, narrow_mix
from xloom.modules import dense_weight


class _Frozen(NamedTuple):
    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    spread: Tensor


class Site(nn.Module):
    """A base module and what the experts add to it. Experts without factors here have rank 0 and add nothing.

    Args:
        name: module path in the base.
        index: position on the scalings' S axis.
        experts: one entry per expert; None where it lacks this site.
        current: which call runs.
        trainable: factors become parameters, not buffers.
    """

    A_RI: Tensor
    B_OR: Tensor
    spread_NR: Tensor
    bias_NO: Tensor | None
    dora_NO: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        name: str,
        index: int,
        experts: Sequence[LowRank | None],
        current: Current,
        *,
        dtype: torch.dtype,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.index = index
        self.current = current
        self.is_embedding = isinstance(base, nn.Embedding)
        self.ranks = [e.rank if e else 0 for e in experts]
        self.scales = [e.scale if e else 0.0 for e in experts]
        self._with_bias = [e is not None and e.bias_O is not None for e in experts]
        self._with_dora = [e is not None and e.magnitude_O is not None for e in experts]
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        experts = [e and e.to(**place) for e in experts]
        here = [e for e in experts if e]
        like_O = here[0].B_OR[:, 0]

        self._own("A_RI", torch.cat([e.A_RI for e in here], dim=0), trainable)
        # A row of memory for each rank: one token then reads B half as long again as fast, and experts can be left out.
        self._own("B_OR", torch.cat([e.B_OR.t() for e in here], dim=0).contiguous().t(), trainable)
        # Row n holds the scale of expert n at its own ranks: one product spreads scalings over ranks and scales them.
        spread = torch.zeros(len(experts), sum(self.ranks), dtype=torch.float64)
        for n, (start, stop) in enumerate(self._rank_spans()):
            spread[n, start:stop] = self.scales[n]
        self.register_buffer("spread_NR", spread.to(**place), persistent=False)
        bias = None
        if any(self._with_bias):
            bias = torch.stack([_or_zeros(e.bias_O if e else None, like_O) for e in experts]).to(**place)
        self._own("bias_NO", bias, trainable)
        magnitude = dora = None
        if any(self._with_dora):
            if trainable:
                raise ConfigError(
                    f"site {name}: a DoRA expert cannot be trained inside a mixture; train it alone, or "
                    "leave the experts frozen"
                )
            weight_OI = dense_weight(base)
            magnitude = torch.stack([_or_zeros(e.magnitude_O if e else None, like_O) for e in experts])
            gain = torch.stack([dora_gain(e, weight_OI) if e else weight_OI.new_ones(len(like_O)) for e in experts])
            magnitude, dora = magnitude.to(**place), (gain - 1).to(**place)
            spans = self._rank_spans()
            per_rank = [gain[n, :, None].expand(-1, stop - start) for n, (start, stop) in enumerate(spans)]
            self.register_buffer("B_dora_OR", self.B_OR * torch.cat(per_rank, dim=1).to(**place), persistent=False)
        self.register_buffer("magnitude_NO", magnitude)
        self.register_buffer("dora_NO", dora, persistent=False)
        self._frozen: _Frozen | None = None
        self._is_plain = not self.is_embedding and bias is None and dora is None

    def _own(self, name: str, tensor: Tensor | None, trainable: bool) -> None:
        if tensor is not None and trainable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def __getattr__(self, name: str) -> Any:
        """What a site does not have itself (`weight`, `in_features`, ...) it answers for its base module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = self.current.call
        if call is None:
            plain: Tensor = self.base(x, *args, **kwargs)
            return plain
        if call.observer is not None:
            return self._observed(call, call.observer, x, args, kwargs)
        known = call.weights
        if known is not None and not args and not kwargs and not torch.is_grad_enabled():
            weights_MR, rows_SR = known.weights_SMR[self.index], known.rows_SR
            frozen = self._frozen_parts(x, weights_MR)
            as_given = x.shape[:-1] == known.leading or (x.ndim == 2 and len(x) == len(weights_MR))
            if frozen is not None and as_given:
                rows_R = None if rows_SR is None else rows_SR[self.index]
                return narrow_mix(x, weights_MR, rows_R, frozen.W, frozen.b, frozen.A, frozen.B.t())
        scalings = call.scalings(self, x)
        if scalings is not None and not args and not kwargs and scalings.shape[:-1] == x.shape[:-1]:
            frozen = self._frozen_parts(x, scalings)
            if frozen is not None and not torch.is_autocast_enabled(x.device.type):
                return frozen_mix(x, scalings.to(x.dtype), frozen.W, frozen.b, frozen.A, frozen.B, frozen.spread)
        y: Tensor = self.base(x, *args, **kwargs)
        return y if scalings is None else y + self.delta(x, scalings, y).to(y.dtype)

    def _observed(
        self, call: Call, observer: Observer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        scalings = call.scalings(self, x)
        observer(self, x, y, scalings)
        return y if scalings is None else y + self.delta(x, scalings, y).to(y.dtype)

    def _frozen_parts(self, x: Tensor, weights: Tensor) -> "_Frozen | None":
        """What a frozen linear module of one dtype is made of, with nobody listening to its own output.

        Asked by every site for every token, so found once, and again when a tensor was replaced.
        """
        frozen = self._frozen
        base: Any = self._modules["base"]
        parameters, A = base._parameters, self._buffers.get("A_RI")
        if (
            frozen is None
            or frozen.A is not A
            or frozen.B is not self._buffers.get("B_OR")
            or frozen.W is not parameters.get("weight")
            or frozen.b is not parameters.get("bias")
            or type(base) is not nn.Linear
        ):
            frozen = self._frozen = self._find_frozen(base, A)
            if frozen is None:
                return None
        W, b = frozen.W, frozen.b
        if base._forward_hooks or base._forward_pre_hooks or W.requires_grad or (b is not None and b.requires_grad):
            return None
        return frozen if x.dtype == W.dtype == frozen.A.dtype and weights.device == x.device else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._frozen = None  # or tensors that move would stay alive where they were
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _find_frozen(self, base: Any, A: Tensor | None) -> "_Frozen | None":
        W, b = base._parameters.get("weight"), base._parameters.get("bias")
        B, spread = self._buffers.get("B_OR"), self._buffers.get("spread_NR")
        if not self._is_plain or type(base) is not nn.Linear or W is None or A is None or B is None or spread is None:
            return None
        return _Frozen(W, b, A, B, spread) if b is None or b.dtype == W.dtype else None

    def delta(self, x: Tensor, scalings: Tensor, y: Tensor) -> Tensor:
        """What all experts together add to the base's output `y` for input `x`."""
        A_RI = self.A_RI
        scalings = self._aligned(scalings, y).to(A_RI)
        if self._is_plain:
            return F.linear(F.linear(x.to(A_RI.dtype), A_RI) * (scalings @ self.spread_NR), self.B_OR)
        h = self._down(x, A_RI) * (scalings @ self.spread_NR)
        delta = self._scaled_like_base(F.linear(h, self.B_OR if self.dora_NO is None else self.B_dora_OR))
        if self.dora_NO is not None:
            delta = delta + (scalings @ self.dora_NO) * self._without_bias(y).to(delta.dtype)
        if self.bias_NO is not None:
            pairs = zip(self.scales, self._with_bias, strict=True)
            scale_N = scalings.new_tensor([scale if there else 0.0 for scale, there in pairs])
            delta = delta + (scalings * scale_N) @ self.bias_NO
        return delta

    def delta_reference(self, x: Tensor, scalings: Tensor, y: Tensor) -> Tensor:
        """The meaning of `delta`: one expert after the other, straight from the formulas above."""
        total = torch.zeros_like(y)
        for n, low in enumerate(self.experts()):
            if low is None:
                continue
            delta = low.scale * self._scaled_like_base(F.linear(self._down(x, low.A_RI), low.B_OR))
            if low.magnitude_O is not None:
                gain_O = dora_gain(low, dense_weight(self.base))
                delta = (gain_O - 1) * self._without_bias(y) + gain_O * delta
            if low.bias_O is not None:
                delta = delta + low.scale * low.bias_O
            total = total + self._aligned(scalings, y)[..., n, None] * delta
        return total

    def _down(self, x: Tensor, A_RI: Tensor) -> Tensor:
        if self.is_embedding:
            return F.embedding(x, A_RI.T)
        return F.linear(x.to(A_RI.dtype), A_RI)

    def _scaled_like_base(self, delta: Tensor) -> Tensor:
        """Gemma-3-like embeddings multiply their output; what experts add there is multiplied alike."""
        scale = getattr(self.base, "embed_scale", None) if self.is_embedding else None
        return delta if scale is None else delta * scale

    def _without_bias(self, y: Tensor) -> Tensor:
        bias = getattr(self.base, "bias", None)
        return y if bias is None else y - bias

    def _aligned(self, scalings: Tensor, y: Tensor) -> Tensor:
        """Scalings with the leading axes of `y`; some models flatten [B, T] to [B*T] before their MLP."""
        if scalings.shape[:-1] == y.shape[:-1]:
            return scalings
        if y.ndim == 2 and scalings.ndim == 3 and y.shape[0] == scalings.shape[0] * scalings.shape[1]:
            return scalings.flatten(0, 1)
        raise ScalingsShapeError(
            f"site {self.name}: scalings for {tuple(scalings.shape[:-1])} tokens, but the module was given "
            f"{tuple(y.shape[:-1])}; modules that see a rearranged part of the tokens cannot be mixed per token"
        )

    # --- parts ---

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    def experts(self) -> list[LowRank | None]:
        """Each expert's own factors here (views), or None where it lacks this site."""
        out: list[LowRank | None] = []
        for n, (start, stop) in enumerate(self._rank_spans()):
            if start == stop:
                out.append(None)
                continue
            bias = self.bias_NO[n] if self.bias_NO is not None and self._with_bias[n] else None
            magnitude = self.magnitude_NO[n] if self.magnitude_NO is not None and self._with_dora[n] else None
            A, B = self.A_RI[start:stop], self.B_OR[:, start:stop]
            out.append(LowRank(A, B, self.scales[n], bias, magnitude, self.is_embedding))
        return out

    def _rank_spans(self) -> list[tuple[int, int]]:
        stops = torch.tensor(self.ranks).cumsum(0).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))


def dora_gain(low: LowRank, weight_OI: Tensor) -> Tensor:
    """m / |W + scale B A|, per output feature [O]; 1 for an expert without DoRA (arXiv 2402.09353, eq. 5)."""
    if low.magnitude_O is None:
        return weight_OI.new_ones(weight_OI.shape[0])
    with torch.no_grad():
        A, B, m = (t.detach().to(weight_OI) for t in (low.A_RI, low.B_OR, low.magnitude_O))
        gain: Tensor = m / torch.linalg.norm(weight_OI + low.scale * (B @ A), dim=1)
        return gain


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor

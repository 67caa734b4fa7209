"""A frozen linear module and its frozen experts as one operation.

    y = W x + b + B ((A x) * (s @ spread))

One output instead of three: the experts' part is added into the base's own product, forward and backward. Of the
tokens, backward keeps A x, the narrowest there is, and s. Where no gradient is wanted and the scalings of all sites are
known, `spread_over_ranks` does their products with `spread` at once and leaves out experts that no token uses.
Knows nothing of routers; `Site.delta` is the reference.
Letters: M tokens, flattened  I in-features  O out-features  S sites  N experts  R sum of the experts' ranks
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def frozen_mix(
    x: Tensor, scalings: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, spread_NR: Tensor
) -> Tensor:
    """y [*leading, O] for x [*leading, I] and scalings [*leading, N]; gradients for x and scalings alone."""
    if torch.is_grad_enabled() and (x.requires_grad or scalings.requires_grad):
        y: Tensor = _FrozenMix.apply(x, scalings, W_OI, b_O, A_RI, B_OR, spread_NR)  # type: ignore[no-untyped-call]
        return y
    return _mixed(x, scalings, W_OI, b_O, A_RI, B_OR, spread_NR)[0]


class RankWeights(NamedTuple):
    """For every site, the weights [M, R] of its ranks; with `rows_SR`, of these ranks alone, the others have none.

    `leading` is the shape of the tokens, whose product is M.
    """

    weights_SMR: Sequence[Tensor]
    rows_SR: Sequence[Tensor] | None
    leading: torch.Size


def spread_over_ranks(scalings: Tensor, spread_NR: Tensor, ranks: Sequence[int], most: int | None) -> RankWeights:
    """What the ranks of every site are multiplied with.

    Args:
        scalings: [*leading, S, N].
        spread_NR: the same at all sites.
        ranks: of the experts.
        most: experts of a token that may have a scaling other than 0; None: all. On a CPU those that have are counted.
    """
    leading, scalings_MSN = scalings.shape[:-2], scalings.flatten(0, -3)
    weights_MSR = scalings_MSN.to(spread_NR.dtype) @ spread_NR
    experts, rank = len(ranks), ranks[0]
    used_SN = (scalings_MSN != 0).any(dim=0)
    if used_SN.device.type == "cpu" and not torch.compiler.is_compiling():
        used = int(used_SN.sum(dim=1).max())
    else:  # counting would stall a device, and break a graph in two
        used = len(scalings_MSN) * (most or experts)
    # gathering reads, writes and reads again, and is two operations more
    if 4 * used > experts or any(other != rank for other in ranks):
        return RankWeights(weights_MSR.unbind(1), None, leading)
    # Sites with fewer experts in use get some that have weight 0, so that all have as many.
    chosen_SU = used_SN.byte().topk(used, dim=-1).indices
    rows_SR = (chosen_SU[..., None] * rank + torch.arange(rank, device=chosen_SU.device)).flatten(1)
    weights_MSR = weights_MSR.gather(2, rows_SR.expand(len(weights_MSR), -1, -1))
    return RankWeights(weights_MSR.unbind(1), rows_SR.unbind(0), leading)


def narrow_mix(
    x: Tensor, weights_MR: Tensor, rows_R: Tensor | None, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_RO: Tensor
) -> Tensor:
    """What `frozen_mix` gives, without gradients."""
    x_MI = x.reshape(-1, x.shape[-1])
    if rows_R is not None:
        A_RI, B_RO = A_RI.index_select(0, rows_R), B_RO.index_select(0, rows_R)
    y_MO = F.linear(x_MI, W_OI, b_O).addmm_(F.linear(x_MI, A_RI).mul_(weights_MR), B_RO)
    return y_MO if x.ndim == 2 else y_MO.view(*x.shape[:-1], -1)


def _mixed(
    x: Tensor, s: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, spread_NR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s_MN, x_MI = s.reshape(-1, s.shape[-1]), x.reshape(-1, x.shape[-1])
    h_MR = F.linear(x_MI, A_RI)
    y_MO = F.linear(x_MI, W_OI, b_O).addmm_(h_MR * torch.mm(s_MN, spread_NR), B_OR.t())
    return y_MO.view(*x.shape[:-1], -1), h_MR, s_MN


class _FrozenMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, spread: Tensor
    ) -> Tensor:
        y, h_MR, s_MN = _mixed(x, s, W, b, A, B, spread)
        ctx.save_for_backward(h_MR, s_MN, W, A, B, spread)
        ctx.shapes = x.shape, s.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h_MR, s_MN, W_OI, A_RI, B_OR, spread_NR = ctx.saved_tensors
        x_shape, s_shape = ctx.shapes
        dy_MO = dy.reshape(-1, dy.shape[-1])
        d_MR = dy_MO @ B_OR
        ds = ((d_MR * h_MR) @ spread_NR.T).view(s_shape) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_MO @ W_OI).addmm_(d_MR * (s_MN @ spread_NR), A_RI).view(x_shape)
        return dx, ds, None, None, None, None, None

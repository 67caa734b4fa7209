"""What the mixture must know of a base's linear and embedding modules: their sizes, their dense weight, what fits.

Knows nothing of sites or of scalings.
Letters: I in-features  O out-features
"""

from typing import Any

import torch
from torch import Tensor, nn

from xloom.errors import BaseMismatchError, ConvolutionError
from xloom.experts import LowRank


def dense_weight(module: nn.Module) -> Tensor:
    """The weight [O, I] of a linear or embedding module in float32 (float64 stays), whatever it is stored as."""
    weight: Any = getattr(module, "weight", None)
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2:
        plain = _at_least_float32(weight.detach())
        return plain.T if isinstance(module, nn.Embedding) or _is_conv1d(module) else plain
    # A quantised weight says what it is by what it does: feed it the unit vectors.
    in_features, _ = _features(module)
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    with torch.no_grad():
        unit = torch.eye(in_features, device=device)
        out_IO: Tensor = module(unit).float()
        bias: Tensor | None = getattr(module, "bias", None)
        return (out_IO if bias is None else out_IO - bias.float()).T


def keep_as_stored(model: nn.Module) -> None:
    """bitsandbytes' 4-bit modules keep their weights in the form in which they are stored.

    On a CPU with AVX512-BF16 (0.50.2: `functional.has_avx512bf16`) the first forward without gradients repacks them:
    in place, so that two forwards at once spoil them; for sizes of whole blocks alone; and without a way back for the
    gradient of a later step. What that costs is in docs/LOG.md.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_fit(module: nn.Module, name: str, low: LowRank, who: str) -> None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ConvolutionError(f"{who}: {name} is a convolution, which has no token axis to mix along")
    if low.is_embedding != isinstance(module, nn.Embedding):
        wanted = "an Embedding" if low.is_embedding else "a linear module"
        raise BaseMismatchError(f"{who}: module {name}: expected {wanted}, found {type(module).__name__}")
    found = _features(module, f"{who}: module {name}")
    wanted_features = (low.A_RI.shape[1], low.B_OR.shape[0])
    if found != wanted_features:
        raise BaseMismatchError(
            f"{who}: made for another base: module {name} maps {wanted_features[0]} to {wanted_features[1]} features "
            f"in the expert, {found[0]} to {found[1]} in the base"
        )


def _features(module: Any, where: str = "base") -> tuple[int, int]:
    """In- and out-features of a module that can carry experts."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if _is_conv1d(module):
        return module.nx, module.nf
    try:
        return module.in_features, module.out_features
    except AttributeError:
        raise BaseMismatchError(
            f"{where}: a {type(module).__name__} is neither linear nor an embedding and cannot carry experts"
        ) from None


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear module that keeps its weight as [I, O]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

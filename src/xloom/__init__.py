"""xloom: X-LoRA, a mixture of LoRA experts weighed per token and per layer (arXiv 2402.07148).

The public names below are loaded on first use, so that `import xloom` costs nothing.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# What libraries say at import of kernels that they look for and do not find is no news to a user; a level that somebody
# has set stays.
for _chatty in ("torchao", "torch.utils._pytree", "bitsandbytes.backends"):
    if not logging.getLogger(_chatty).level:
        logging.getLogger(_chatty).setLevel(logging.ERROR)

_HOMES = {
    "XLoraConfig": "xloom.config",
    "Expert": "xloom.experts",
    "ScalingHead": "xloom.gating",
    "ScalingsLog": "xloom.trace",
    "Trace": "xloom.trace",
    "XLoraForCausalLM": "xloom.model",
    "XLoraForSequenceClassification": "xloom.classification",
    "errors": "xloom.errors",
    "refreshing": "xloom.decoding",
    "routers": "xloom.routers",
    "speculative": "xloom.decoding",
}

__all__ = [
    "Expert", "ScalingHead", "ScalingsLog", "Trace", "XLoraConfig", "XLoraForCausalLM",
    "XLoraForSequenceClassification", "errors", "refreshing", "routers", "speculative",
]  # fmt: skip

if TYPE_CHECKING:
    from xloom import errors, routers
    from xloom.classification import XLoraForSequenceClassification
    from xloom.config import XLoraConfig
    from xloom.decoding import refreshing, speculative
    from xloom.experts import Expert
    from xloom.gating import ScalingHead
    from xloom.model import XLoraForCausalLM
    from xloom.trace import ScalingsLog, Trace


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xloom' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if name == _HOMES[name].rpartition(".")[2] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

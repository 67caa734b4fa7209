"""What is shipped beside the code: the suite's trained experts, and models that mix them.

They lie in `experts/` and `models/` of a checkout; a wheel has neither. Knows only where things are, not what is in
them.
"""

from pathlib import Path

from xloom.errors import NotFoundError, names

_CHECKOUT = Path(__file__).resolve().parents[3]


def expert_folders() -> dict[str, Path]:
    """The LoRA folder of every shipped expert, by name and in that order. Raises NotFoundError if there are none."""
    return _inside("experts", "adapter_config.json")


def model_folders() -> dict[str, Path]:
    """The folder of every shipped model, by name and in that order. Raises NotFoundError if there are none."""
    return _inside("models", "config.json")


def model_folder(name: str) -> Path:
    """The folder of a shipped model. Raises NotFoundError naming those that there are."""
    known = model_folders()
    if name not in known:
        raise NotFoundError(f"no shipped model {name!r}; there are {names(known)}")
    return known[name]


def _inside(kind: str, marker: str) -> dict[str, Path]:
    root = _CHECKOUT / kind
    found = {file.parent.name: file.parent for file in sorted(root.glob(f"*/{marker}"))}
    if not found:
        raise NotFoundError(f"{root}: expected the shipped {kind} of a checkout of xloom, found none")
    return found

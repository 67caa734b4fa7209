"""What is shipped beside the code: the suite's trained experts, and models that mix them.

They lie in `experts/` and `models/` of a checkout, which a wheel has inside the package. Knows only where things are,
not what is in them.
"""

from pathlib import Path

from xloom.errors import NotFoundError, names

_HERE = Path(__file__).resolve()
_ROOTS = (_HERE.parents[1] / "shipped", _HERE.parents[3])  # of a wheel, of a checkout


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
    root = next((root for root in _ROOTS if (root / kind).is_dir()), _ROOTS[-1]) / kind
    files = sorted(root.glob(f"*/{marker}"))
    found = {file.parent.name: file.parent for file in files if not file.parent.name.startswith(".")}
    if not found:
        raise NotFoundError(f"{root}: expected the {kind} that are shipped with xloom, found none")
    return found

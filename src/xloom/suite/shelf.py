"""Every set of rows of the built-in suite under one kind of name, built when it is first asked for.

    suite:materials:train     suite:joined:test     suite:unseen:test     suite:general:valid

Knows nothing of what reads the rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from xloom.errors import NotFoundError, near
from xloom.hub.fetch import cache_dir
from xloom.suite.composite import FAMILIES, build_composite
from xloom.suite.domains import DOMAINS, DomainFiles, build_domain, build_suite
from xloom.suite.general import build_general
from xloom.suite.items import SPLITS
from xloom.suite.unseen import build_unseen

if TYPE_CHECKING:
    from rich.progress import Progress

PREFIX = "suite:"
SETS: tuple[str, ...] = (*DOMAINS, *FAMILIES, "unseen", "general")
_KEPT: dict[tuple[Path, str], DomainFiles] = {}  # what this process has found or built in the cache, by folder and name


def rows_of(name: str, folder: str | Path | None = None, progress: "Progress | None" = None) -> DomainFiles:
    """The files of a domain, of a family of composite tasks, of the unseen family or of the general questions.

    Args:
        folder: where the whole suite is kept, each set in a folder of its name; by default in the cache, where a
            process looks into each set once.

    Raises:
        NotFoundError: no such set.
        Others: as the builders say.
    """
    if name not in SETS:
        raise NotFoundError(f"no set of rows {name!r} in the suite{near(name, SETS)}; there are {', '.join(SETS)}")
    if folder is not None:
        return _built(name, Path(folder), progress)[name]
    root = cache_dir() / "suite"
    kept = _KEPT.get((root, name))
    if kept is None or not all(path.is_file() for path in (kept.train, kept.valid, kept.test, kept.card)):
        found = _built(name, root, progress)
        _KEPT.update({(root, other): files for other, files in found.items()})
        kept = found[name]
    return kept


def _built(name: str, root: Path, progress: "Progress | None") -> dict[str, DomainFiles]:
    """A set, and those that are built along with it, by name."""
    if name in DOMAINS:
        return {name: build_domain(name, root / name, progress=progress)}
    if name in FAMILIES:
        domains = build_suite(root, progress=progress)
        return domains | build_composite(domains, root)
    if name == "unseen":
        return {name: build_unseen(root / name, progress=progress)}
    return {name: build_general(root / name)}


def find_rows(word: str) -> Path:
    """The file that `suite:SET:SPLIT` means.

    Raises:
        NotFoundError: no such set or split, or the set has no rows in that split.
        Others: as the builders say.
    """
    name, _, split = word.removeprefix(PREFIX).partition(":")
    if split not in SPLITS:
        raise NotFoundError(f"{word}: expected {PREFIX}SET:SPLIT with a split of {', '.join(SPLITS)}, found {split!r}")
    path: Path = getattr(rows_of(name), split)
    if not path.stat().st_size:
        raise NotFoundError(f"{word}: this set has no {split} rows")
    return path

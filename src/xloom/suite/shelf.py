"""Every set of rows of the built-in suite under one kind of name, built when it is first asked for.

    suite:materials:train     suite:joined:test     suite:unseen:test     suite:general:valid

Knows nothing of what reads the rows.
"""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.errors import NotFoundError
from xloom.suite.composite import FAMILIES, build_composite
from xloom.suite.domains import DOMAINS, DomainFiles, build_domain, build_suite
from xloom.suite.fetch import cache_dir
from xloom.suite.general import build_general
from xloom.suite.items import SPLITS
from xloom.suite.unseen import build_unseen

if TYPE_CHECKING:
    from rich.progress import Progress

PREFIX = "suite:"
SETS: tuple[str, ...] = (*DOMAINS, *FAMILIES, "unseen", "general")


def rows_of(name: str, folder: str | Path | None = None, progress: "Progress | None" = None) -> DomainFiles:
    """The files of a domain, of a family of composite tasks, of the unseen family or of the general questions.

    Args:
        folder: where the whole suite is kept, each set in a folder of its name; by default in the cache.

    Raises:
        NotFoundError: no such set.
        Others: as the builders say.
    """
    root = Path(folder) if folder is not None else cache_dir() / "suite"
    if name in DOMAINS:
        return build_domain(name, root / name, progress=progress)
    if name in FAMILIES:
        return build_composite(build_suite(root, progress=progress), root)[name]
    if name == "unseen":
        return build_unseen(root / name, progress=progress)
    if name == "general":
        return build_general(root / name)
    raise NotFoundError(f"no set of rows {name!r} in the suite{_hint(name, SETS)}; there are {', '.join(SETS)}")


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


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

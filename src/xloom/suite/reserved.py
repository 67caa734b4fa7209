"""The reserved share of every table and generator: rows that no split may hold, so that they stay unseen.

Takes keys (canonical SMILES, reduced formula, sequence) or generator seeds. Knows nothing of tables or files.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

from xloom.errors import DataError

Row = TypeVar("Row")

FIRST_RESERVED_SEED = 9_000_000


def is_reserved(key: str) -> bool:
    """Whether the SHA-1 hex digest of the UTF-8 key ends in '7', which is one key in sixteen."""
    return hashlib.sha1(key.encode("utf-8"), usedforsecurity=False).hexdigest().endswith("7")


def drop_reserved(rows: Iterable[Row], key: Callable[[Row], str | tuple[str, ...]]) -> list[Row]:
    """The rows whose key (or, of several keys, every one) is not reserved, in their order."""

    def keys(row: Row) -> tuple[str, ...]:
        found = key(row)
        return (found,) if isinstance(found, str) else found

    return [row for row in rows if not any(map(is_reserved, keys(row)))]


def check_seed(seed: int) -> int:
    """The seed itself. Raises DataError if it lies in the reserved range of generated items."""
    if seed >= FIRST_RESERVED_SEED:
        raise DataError(f"seed {seed} is reserved: seeds of generated items must be below {FIRST_RESERVED_SEED}")
    return seed

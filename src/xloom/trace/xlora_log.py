"""The scalings logs of the original xlora: what its `flush_log_scalings(path)` wrote.

    path.npy                                 [n, B, T, S, N]: n forwards of one shape
    path-<k>.npy ...  path-mapping.json      the same by batch size k, and which forward each was

A log knows neither tokens nor names. Object arrays, which are pickles, are refused.
Letters: B batch  T tokens  S sites  N experts
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from xloom.errors import NotFoundError, TraceError, TruncatedFileError
from xloom.hub.files import read_json
from xloom.trace.tokens import NO_TOKEN, About, Tokens
from xloom.trace.trace import Trace

_AXES = 5


def read_xlora_log(path: Path | str) -> list[Tensor]:
    """The scalings [B, T, S, N] of every forward that was logged, in order, in float32.

    They are those before top-k, at the places of the tokens that went in.

    Args:
        path: as it was given to `flush_log_scalings`, or the file that it wrote.

    Raises:
        NotFoundError: no such log.
        TruncatedFileError: a file is cut off, or holds pickled objects.
        TraceError: an array of other axes, or a mapping that does not fit.
    """
    mapping = Path(f"{path}-mapping.json")
    if not mapping.is_file():
        file = next((one for one in (Path(path), Path(f"{path}.npy")) if one.is_file()), None)
        if file is None:
            raise NotFoundError(f"{path}: expected {Path(f'{path}.npy').name} or {mapping.name}, found neither")
        return list(_array(file))
    found: dict[int, Tensor] = {}
    for name, places in read_json(mapping).items():
        # the files are taken from where the mapping is, whatever the paths were when it was written
        some = list(_array(mapping.parent / Path(name).name))
        if not isinstance(places, list) or len(places) != len(some) or not all(isinstance(i, int) for i in places):
            raise TraceError(f"{mapping}: {name}: expected {len(some)} places, found {places!r:.60}")
        found |= dict(zip(places, some, strict=True))
    if sorted(found) != list(range(len(found))):
        raise TraceError(f"{mapping}: expected every forward's place once, from 0 on, found {sorted(found)!r:.60}")
    return [found[place] for place in range(len(found))]


def xlora_traces(
    path: Path | str, *, sites: Sequence[str] | None = None, experts: Sequence[str] | None = None
) -> list[Trace]:
    """One trace for every row of every forward of a log. Their tokens have no ids, texts or logprobs.

    What a log has at the place of a token is what the next token was written with: trace and log have equally many
    tokens, but those of the trace are one further.

    Args:
        sites, experts: names of the axes; numbers, if None.

    Raises:
        TraceError: another number of names. Others as `read_xlora_log`.
    """
    traces = []
    for number, scalings_BTSN in enumerate(read_xlora_log(path)):
        _, count, S, N = scalings_BTSN.shape
        axes = _names(sites, S, "sites", path), _names(experts, N, "experts", path)
        for row, scalings_TSN in enumerate(scalings_BTSN):
            about = About(*axes, metadata={"log": Path(path).name, "forward": number, "row": row})
            traces.append(Trace(Tokens.make([NO_TOKEN] * count), scalings_TSN, about))
    return traces


def _array(path: Path) -> Tensor:
    """[n, B, T, S, N] in float32."""
    try:
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file, though the log's mapping names it") from None
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TruncatedFileError(f"{path}: not a whole .npy file of numbers ({reason})") from None
    if not isinstance(found, np.ndarray) or found.ndim != _AXES or found.dtype.kind != "f":
        kind = f"{found.shape} {found.dtype}" if isinstance(found, np.ndarray) else type(found).__name__
        raise TraceError(f"{path}: expected floats [n, batch, tokens, sites, experts], found {kind}")
    return torch.from_numpy(found.astype(np.float32))


def _names(given: Sequence[str] | None, count: int, kind: str, path: Path | str) -> tuple[str, ...]:
    if given is None:
        return tuple(map(str, range(count)))
    if len(given) != count:
        raise TraceError(f"{path}: expected names of {count} {kind}, found {len(given)}")
    return tuple(given)

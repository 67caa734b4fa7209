"""A bounded log of scalings, keyed by site and expert name.

Knows nothing of models: it is handed tensors and keeps detached copies on the CPU.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from xloom.errors import UnknownExpertError, XLoomError, names


class ScalingsLog:
    """What every forward's scalings were, newest last; the oldest go when more than `max_tokens` are held.

    Args:
        sites, experts: names of the S and N axes.
        max_tokens: bound on batch rows times tokens held.
    """

    def __init__(self, sites: Sequence[str], experts: Sequence[str], max_tokens: int = 65_536) -> None:
        if max_tokens < 1:
            raise XLoomError(f"max_tokens must be at least 1, found {max_tokens}")
        self.sites = tuple(sites)
        self.experts = tuple(experts)
        self.max_tokens = max_tokens
        self.dropped_tokens = 0
        self._entries: deque[Tensor] = deque()
        self._held = 0

    def append(self, scalings_BTSN: Tensor) -> None:
        entry = scalings_BTSN.detach()
        if (count := entry.shape[0] * entry.shape[1]) > self.max_tokens:
            keep = max(1, self.max_tokens // entry.shape[0])
            self.dropped_tokens += count - entry.shape[0] * keep
            entry = entry[:, -keep:]
        self._entries.append(entry.to("cpu", copy=True).contiguous())
        self._held += entry.shape[0] * entry.shape[1]
        while self._held > self.max_tokens and len(self._entries) > 1:
            gone = self._entries.popleft()
            self._held -= gone.shape[0] * gone.shape[1]
            self.dropped_tokens += gone.shape[0] * gone.shape[1]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Tensor]:
        """One [B, T, S, N] per forward: the whole prompt first, then usually one token each."""
        return list(self._entries)

    def tokens(self) -> Tensor:
        """[B, T, S, N] over all forwards of one generation. Raises XLoomError if the batch size changed."""
        sizes = {entry.shape[0] for entry in self._entries}
        if len(sizes) != 1:
            raise XLoomError(f"the log holds forwards of batch sizes {sorted(sizes)}; read `entries` instead")
        return torch.cat(self.entries, dim=1)

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        """`log[site, expert]`: that expert's weight at that site, [B, T] over all forwards."""
        site, expert = key
        if site not in self.sites:
            raise UnknownExpertError(f"no site named {site!r}; the model has {names(self.sites, 3)}")
        if expert not in self.experts:
            raise UnknownExpertError(f"no expert named {expert!r}; the model has {names(self.experts)}")
        return self.tokens()[:, :, self.sites.index(site), self.experts.index(expert)]

    def shares(self) -> dict[str, float]:
        """Mean weight of every expert over all tokens and sites held."""
        if not self._entries:
            return dict.fromkeys(self.experts, 0.0)
        total = torch.stack([entry.double().sum(dim=(0, 1, 2)) for entry in self._entries]).sum(dim=0)
        mean = total / (self._held * len(self.sites))
        return dict(zip(self.experts, mean.tolist(), strict=True))

    def clear(self) -> None:
        self._entries.clear()
        self._held = self.dropped_tokens = 0

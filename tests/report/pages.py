"""Findings without a model, and what a page of them carries."""

import base64
import gzip
import re

import torch

from random_traces import EXPERTS, SITES, random_tokens, random_trace
from xloom.report import Findings
from xloom.seeing import Variant, Worth
from xloom.trace import Tokens, Trace

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def findings(texts: int = 3, tokens: int = 20, *, total: float = 1.0, against: bool = False) -> Findings:
    """Random texts of two groups; the first has a hostile name and a hostile token."""
    traces = [
        random_trace(tokens + 3 * n, n, total=total, group="ab"[n % 2], **({"name": HOSTILE} if n == 0 else {}))
        for n in range(texts)
    ]
    traces[0] = with_token(traces[0], 4, HOSTILE)
    variants = [Variant("mixed"), Variant("base"), *(Variant("without", name) for name in EXPERTS)]
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(len(variants), texts, generator=generator, dtype=torch.float64)
    changed = torch.rand(len(variants), texts, generator=generator) > 0.5
    changed[0] = False
    rows = tuple(f"line {n + 1}" for n in range(texts))
    found = Worth(tuple(variants), rows, losses, changed, ("x",) * texts, {})
    relative = torch.rand(len(SITES), len(EXPERTS), generator=generator, dtype=torch.float64)
    others = [Trace(one.tokens, one.scalings.flip(-1), one.about) for one in traces] if against else []
    models = ["one", "two"] if against else ["one"]
    return Findings(traces, others, relative, found, range(texts), [True] * texts, models)


def with_token(trace: Trace, place: int, text: str) -> Trace:
    tokens = trace.tokens
    texts = [text if at == place else one for at, one in enumerate(tokens.texts)]
    columns = {name: getattr(tokens, name) for name in ("ids", "logprobs", "special", "answer", "turns", "roles")}
    return Trace(Tokens(**columns, texts=tuple(texts)), trace.scalings, trace.about)


def unpacked(page: str, name: str) -> bytes:
    """What the page carries under a name."""
    found = re.search(rf'<script type="text/plain" id="packed-{name}">([^<]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1]))


__all__ = ["EXPERTS", "HOSTILE", "SITES", "findings", "random_tokens", "random_trace", "unpacked", "with_token"]

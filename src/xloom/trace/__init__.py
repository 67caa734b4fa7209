"""What the mixing was, token by token: traces in memory and on disk, and a bounded log of raw scalings.

    trace = Trace.load(folder)          one text: tokens, logprobs, scalings [T, S, N], turns and roles
    with TraceWriter(folder, about):    the same, written while it is made

Knows nothing of models: `xloom.seeing` makes traces with them.
"""

from xloom.trace.folder import TraceWriter, check_new
from xloom.trace.log import ScalingsLog
from xloom.trace.tokens import ROLES, About, Tokens
from xloom.trace.trace import Difference, Trace, Turn, compare, merge
from xloom.trace.xlora_log import read_xlora_log, xlora_traces

__all__ = [
    "ROLES", "About", "Difference", "ScalingsLog", "Tokens", "Trace", "TraceWriter", "Turn", "check_new", "compare",
    "merge", "read_xlora_log", "xlora_traces",
]  # fmt: skip

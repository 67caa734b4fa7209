"""Looking at the mixing: traces made with a model, statistics of them, and what the experts are worth.

    trace = trace_text(model, tokenizer, prompt)         and trace_conversation, trace_rows
    summary = summarise(trace)                           shares, dominance, mixedness, co-use; by layer, kind and class
    trajectory(trace), difference(trace, other)          where it changes; how two differ, with intervals
    contributions(model, trace.tokens.ids)               what the experts add, relative to what the base gives
    worth(model, tokenizer, rows)                        what is lost when an expert is turned off

Plots and reports read these; none of them knows of plots.
"""

from xloom.seeing.ablation import Variant, Worth, worth
from xloom.seeing.differences import Differences, difference
from xloom.seeing.intervals import Interval
from xloom.seeing.norms import Contributions, contributions, recording_contributions
from xloom.seeing.segments import Segment, change_points, curve, default_penalty, trajectory
from xloom.seeing.sites import Groups, Place, by_kind, by_layer, by_site, places
from xloom.seeing.statistics import leaders, mean_by_group, shares
from xloom.seeing.summary import BASE, Summary, Table, summarise, summarise_by, token_classes
from xloom.seeing.tracing import trace_conversation, trace_rows, trace_text

__all__ = [
    "BASE", "Contributions", "Differences", "Groups", "Interval", "Place", "Segment", "Summary", "Table", "Variant",
    "Worth", "by_kind", "by_layer", "by_site", "change_points", "contributions", "curve", "default_penalty",
    "difference", "leaders", "mean_by_group", "places", "recording_contributions", "shares", "summarise",
    "summarise_by", "token_classes", "trace_conversation", "trace_rows", "trace_text", "trajectory", "worth",
]  # fmt: skip

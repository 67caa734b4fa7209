"""What a run tells of itself, as functions of Trainer's `log_history`, which every checkpoint holds.

A run that was broken off and resumed therefore decides and reports as an unbroken one does.
Knows nothing of models, files or processes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

PART = "part_"  # before the name of a term of the loss
EVAL = "eval_"  # before the name of what a validation measured

History = Sequence[Mapping[str, Any]]


def validations(history: History) -> list[dict[str, Any]]:
    """`{"step": ..., "loss": ..., ...}` of every validation."""
    return [
        {"step": log["step"]} | {key.removeprefix(EVAL): log[key] for key in log if key.startswith(EVAL)}
        for log in history
        if f"{EVAL}loss" in log
    ]


def best_step(history: History) -> int | None:
    """The step whose validation loss is the lowest, the first of equals; None before the first validation."""
    losses = [(v["loss"], v["step"]) for v in validations(history)]
    return min(losses, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1] if losses else None


def stopped_early(history: History, patience: int | None) -> bool:
    """True if the last `patience` validations were none of them better than one before."""
    steps = [v["step"] for v in validations(history)]
    best = best_step(history)
    return patience is not None and best is not None and len(steps) - 1 - steps.index(best) >= patience


def record(history: History, patience: int | None) -> dict[str, Any]:
    """The run as training.json keeps it, but for its rows and its last validation.

    Returns:
        steps; seconds in the loop, validations and checkpoints included; tokens, the real ones of all rows; both add
        up over the parts of a resumed run. losses, learning_rates and every one of parts: [[step, value]].
    """
    steps = [log for log in history if "loss" in log]
    last = history[-1] if history else {}
    seconds, tokens = last.get("seconds", 0.0), last.get("num_input_tokens_seen", 0)
    names = dict.fromkeys(key for log in steps for key in log if key.startswith(PART))
    return {
        "steps": last.get("step", 0),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "stopped_early": stopped_early(history, patience),
        "best_step": best_step(history) if patience is not None else None,
        "losses": [[log["step"], log["loss"]] for log in steps],
        "parts": {key.removeprefix(PART): [[log["step"], log[key]] for log in steps if key in log] for key in names},
        "learning_rates": [[log["step"], log["learning_rate"]] for log in steps if "learning_rate" in log],
        "validations": validations(history),
    }

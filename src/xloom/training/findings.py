"""What a run's record holds, and what looks wrong in it.

    Facts(record)           its values, checked
    warnings_of(record)     what looks wrong, in plain words

All losses are per completion token, in nats. Knows nothing of models, of training, of pages or files.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NEVER_USED = 0.02  # mean scaling
TAKES_ALL = 0.9  # share of the use
FLAT = 0.95  # share of the largest entropy
TIMES_CHANCE = 1.5
CLOSED = 0.8  # share of the gap between the base and a domain's own expert
SMALLEST_GAP = 0.01  # nats; shares of a smaller gap say nothing
LEFT_OUT = 0.1  # share of the rows read
RISING = 3  # validations
BEST_BEFORE, PAST_BEST = 2 / 3, 1.01  # best step / last step; last loss / best loss
SEEN = 0.0005  # nats; what a table shows


# --- what a record holds ---


@dataclass(frozen=True)
class Standing:
    """Losses on the validation rows of a domain ("": of all); None where not measured. `expert` is the domain's own."""

    domain: str
    base: float | None
    uniform: float | None
    own: float | None
    model: float | None
    expert: str = ""

    @property
    def closed(self) -> float | None:
        """Share of the gap from the base to the own expert that the model closes; None where there is no gap."""
        if self.base is None or self.own is None or self.model is None or self.base - self.own < SMALLEST_GAP:
            return None
        return (self.base - self.model) / (self.base - self.own)


class Facts:
    """A record's values, checked: what is missing, null or not finite is None or empty here."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.recipe = mapping(record.get("recipe"))
        self.right_experts = mapping(mapping(record.get("meaning")).get("right_experts"))
        self.is_head = record.get("kind", "head" if "experts" in self.recipe else "expert") == "head"
        self.scalars = numbers(record)
        self.stopped_early = record.get("stopped_early") is True
        self.machine, self.versions = mapping(record.get("machine")), mapping(record.get("versions"))
        self.rows = mapping(record.get("rows"))
        self.losses, self.rates = _points(record.get("losses")), _points(record.get("learning_rates"))
        self.parts = {name: points for name, v in mapping(record.get("parts")).items() if (points := _points(v))}
        self.validations = [numbers(v) for v in record.get("validations") or []]
        self.end = numbers(record.get("validation"))
        self.references = {name: numbers(v) for name, v in mapping(record.get("references")).items()}
        self.use = {d: values for d, v in mapping(record.get("use")).items() if (values := numbers(v))}
        self.entropy = numbers(record.get("entropy"))
        used = [name for values in self.use.values() for name in values]
        self.experts = list(dict.fromkeys([*mapping(self.recipe.get("experts")), *used]))
        # Without softmax the scalings are no shares of a whole.
        self.shares = all(min(u.values()) >= 0 and sum(u.values()) <= 1.001 for u in self.use.values())

    def rows_of(self, part: str) -> dict[str, float]:
        """Counts of "train" or "valid": items (kept), empty, too_long, duplicates (among the kept)."""
        return numbers(self.rows.get(part))

    def curve(self, name: str) -> list[tuple[float, float]]:
        """One measure over all validations."""
        return [(v["step"], v[name]) for v in self.validations if "step" in v and name in v]

    @property
    def overall(self) -> Standing:
        return self._standing("", "loss", None)

    @property
    def standings(self) -> list[Standing]:
        """Every domain with a measured loss: those of the recipe in its order, then others."""
        data = mapping(self.recipe.get("data"))
        measured = [name for losses in [self.end, *self.references.values()] for name in losses]
        domains = dict.fromkeys(n.removeprefix("loss_") for n in measured if n.startswith("loss_"))
        order = [d for d in data if d in domains] + [d for d in domains if d not in data]
        return [self._standing(d, f"loss_{d}", self.right_experts.get(d)) for d in order]

    def _standing(self, domain: str, key: str, expert: str | None) -> Standing:
        routers = ("base", "uniform", f"single:{expert}")
        base, uniform, own = (self.references.get(router, {}).get(key) for router in routers)
        return Standing(domain, base, uniform, own, self.end.get(key), expert or "")


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is one, with words as keys; else nothing."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers among a mapping's values."""
    return {k: v for k, v in mapping(value).items() if _is_number(v)}


def _points(value: Any) -> list[tuple[float, float]]:
    return [(x, y) for x, y in value or [] if _is_number(x) and _is_number(y)]


# --- what looks wrong ---


def warnings_of(record: Mapping[str, Any]) -> list[str]:
    """What looks wrong in a run, in a sentence or two each, with the numbers. What was not measured is not judged."""
    facts = Facts(record)
    checks = (_about_rows, _about_losses, _about_overfitting, _about_domains, _about_use, _about_the_gate)
    return [warning for check in checks for warning in check(facts)]


def _about_rows(facts: Facts) -> Iterator[str]:
    valid = facts.rows_of("valid")
    if not facts.end and (valid.get("items") == 0 or ("items" not in valid and not facts.recipe.get("valid"))):
        yield "There were no validation rows, so nothing tells how well the model does on rows that it has not seen."
    overlap = numbers(facts.rows).get("overlap", 0)
    if overlap > 0:
        of = f" of {valid['items']:,.0f}" if "items" in valid else ""
        yield (
            f"{overlap:,.0f}{of} validation rows are among the training rows too, so the validation loss looks better "
            "than it is. Take them out of one of the two."
        )
    for part, name in (("train", "training"), ("valid", "validation")):
        rows = facts.rows_of(part)
        empty, long = rows.get("empty", 0), rows.get("too_long", 0)
        read = rows.get("items", 0) + empty + long
        if empty + long > LEFT_OUT * read:
            yield (
                f"{empty + long:,.0f} of {read:,.0f} {name} rows ({percent((empty + long) / read)}) were left out: "
                f"{long:,.0f} too long, {empty:,.0f} empty. Raise max_length or mend the rows."
            )


def _about_losses(facts: Facts) -> Iterator[str]:
    values = [value for _, value in facts.losses]
    if len(values) < 2:
        return
    size = max(1, len(values) // 4)
    first, last = sum(values[:size]) / size, sum(values[-size:]) / size
    if last >= first:
        yield (
            f"The training loss did not go down: {first:.3f} in the first quarter of the steps, {last:.3f} in the "
            "last. Try another learning_rate (lower if the curve jumps, higher if it is flat) or more steps."
        )


def _about_overfitting(facts: Facts) -> Iterator[str]:
    curve = facts.curve("loss")
    if facts.stopped_early or not curve:
        return
    advice = "The run goes on past its best: use early_stopping, fewer steps or more rows."
    lowest, best = min((loss, step) for step, loss in curve)
    best, last = facts.scalars.get("best_step", best), curve[-1][1]
    steps = facts.scalars.get("steps", curve[-1][0])
    tail = [loss for _, loss in curve[-RISING - 1 :]]
    if len(tail) > RISING and all(b > a for a, b in pairwise(tail)):
        yield (
            f"The validation loss rose at each of the last {RISING} validations, from {tail[0]:.3f} to {last:.3f}. "
            + advice
        )
    elif best <= BEST_BEFORE * steps and last > PAST_BEST * lowest:
        yield (
            f"The validation loss was best at step {best:g} of {steps:g}: {lowest:.3f}, against {last:.3f} at the last "
            f"validation. {advice}"
        )


def _about_domains(facts: Facts) -> Iterator[str]:
    more = "Give it more rows of that domain, or allow null_expert" if facts.is_head else "Try a lower learning_rate"
    flat = facts.overall
    if flat.model is not None and flat.uniform is not None and flat.model > flat.uniform - SEEN:
        yield (
            f"The head is no better than mixing all experts alike: loss {flat.model:.3f} against {flat.uniform:.3f}. "
            "Train longer, or see whether the experts differ on these rows at all."
        )
    for s in facts.standings or [facts.overall]:
        the = f"In domain {s.domain!r} the" if s.domain else "The"
        if s.model is not None and s.base is not None and s.model > s.base + SEEN:
            yield f"{the} model is worse than the base model alone: loss {s.model:.3f} against {s.base:.3f}. {more}."
        elif s.closed is not None and s.closed < CLOSED:
            yield (
                f"{the} model is clearly worse than the domain's own expert {s.expert!r}: loss {s.model:.3f} against "
                f"{s.own:.3f}, {percent(s.closed)} of the way from the base ({s.base:.3f}) to the expert. Train "
                "longer, give it more rows of that domain, or raise routing_weight."
            )


def _about_use(facts: Facts) -> Iterator[str]:
    if not facts.use or not facts.shares or len(facts.experts) < 2:
        return
    most = {name: max((u[name] for u in facts.use.values() if name in u), default=1.0) for name in facts.experts}
    idle = [name for name in facts.experts if most[name] < NEVER_USED]
    if idle:
        share, quoted = percent(max(most[name] for name in idle), 1), ", ".join(map(repr, idle))
        is_, own, them = ("is", "its", "it") if len(idle) == 1 else ("are", "their", "them")
        yield (
            f"Expert{'' if len(idle) == 1 else 's'} {quoted} {is_} hardly ever used: at most {share} "
            f"of the mixing in any domain. Add rows of {own} own, raise routing_weight, or drop {them}."
        )
    for name in facts.experts if len(facts.use) > 1 else []:
        least = min(u.get(name, 0) / (sum(u.values()) or 1) for u in facts.use.values())
        if least > TAKES_ALL:
            yield (
                f"Expert {name!r} takes all: at least {percent(least)} of the use in every domain, so the head does "
                "not choose. See that the rows of every domain name their expert, and raise routing_weight."
            )


def _about_the_gate(facts: Facts) -> Iterator[str]:
    count = len(facts.experts)
    if count < 2:
        return
    least = min(facts.entropy.values(), default=0.0) / math.log(count)
    if least > FLAT and facts.shares:
        yield (
            f"The gate stayed flat: its entropy is at least {percent(least)} of that of equal scalings in every "
            "domain, so all experts are mixed alike everywhere. Train longer, or raise learning_rate or routing_weight."
        )
    right = facts.end.get("routing_accuracy")
    if right is not None and right < TIMES_CHANCE / count:
        yield (
            f"Only {percent(right)} of the labelled validation rows go to their own expert; chance is "
            f"{percent(1 / count)}. Train longer, raise routing_weight, or see whether the domains can be told apart."
        )


def percent(share: float, digits: int = 0) -> str:
    """0.5 as "50 %"."""
    return f"{100 * share:.{digits}f} %"

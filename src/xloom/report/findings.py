"""What a report tells of: prompts answered and traced, what the experts add and what they are worth.

Knows nothing of pages. Letters: T tokens  S sites  N experts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloom.cache import new_cache
from xloom.errors import TraceMismatchError, names
from xloom.model import XLoraForCausalLM
from xloom.report.asks import Ask
from xloom.routers import Routed
from xloom.seeing import Worth, contributions, trace_conversation, trace_text, worth
from xloom.seeing.tracing import MAX_NEW_TOKENS, READ_AT_ONCE, about
from xloom.trace import Tokens, Trace
from xloom.training.rows import Row

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that a page is made of.

    Attributes:
        traces: of the same sites and experts, at least one.
        against: the same tokens as a second model mixes them; as many traces, or none.
        relative_SN: [S, N] norm of what each expert adds relative to what the base gives, mean over all tokens.
        worth: of the model's own head.
        worth_of: the trace that each of its rows belongs to.
        given: whether each of its rows has a right answer; the others have the model's own.
        models: what the model, and the second one, are called.
    """

    traces: Sequence[Trace]
    against: Sequence[Trace] = ()
    relative_SN: Tensor | None = None
    worth: Worth | None = None
    worth_of: Sequence[int] = ()
    given: Sequence[bool] = ()
    models: Sequence[str] = ()


def find(
    model: XLoraForCausalLM,
    tokenizer: Any,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    measure_worth: bool = True,
    models: Sequence[str] = (),
    routing: Routed | None = None,
    watch: Watch = lambda stage, done, total: None,
) -> Findings:
    """Answers every prompt greedily, and measures.

    Args:
        routing: who decides; None: as in the `with model.routing(...)` around, or the head.
        measure_worth: turn every expert off in turn, which takes a forward of each row for every variant.
        watch: is told the stage, and how much of it is done.

    Raises:
        PromptError, DataError: a prompt cannot be used.
    """
    traces: list[Trace] = []
    for number, ask in enumerate(asks):
        watch("answering", number, len(asks))
        traces.append(_answered(model, tokenizer, ask, max_new_tokens, routing))
    total = torch.zeros(len(model.sites), len(model.experts), dtype=torch.float64)
    for number, trace in enumerate(traces):
        watch("contributions", number, len(traces))
        total += contributions(model, trace.tokens.ids, routing=routing).relative_TSN[1:].double().sum(dim=0)
    relative_SN = total / max(sum(len(trace) - 1 for trace in traces), 1)
    rows = _rows(asks, traces) if measure_worth else {}
    found = None
    if rows:
        watch("worth", 0, 1)
        found = worth(model, tokenizer, list(rows.values()), max_new_tokens=max_new_tokens)
    given = [asks[place].answer is not None for place in rows]
    return Findings(traces, (), relative_SN, found, list(rows), given, tuple(models))


@torch.no_grad()
def read_again(
    model: XLoraForCausalLM,
    traces: Sequence[Trace],
    watch: Watch = lambda *_: None,
    routing: Routed | None = None,
) -> list[Trace]:
    """The same tokens as another model reads them, so that two models can be compared token by token.

    Raises:
        TraceMismatchError: other experts, or token ids that the model does not have.
    """
    found = []
    for number, trace in enumerate(traces):
        watch("reading", number, len(traces))
        ids = trace.tokens.ids
        if set(trace.experts) != set(model.experts):
            raise TraceMismatchError(
                f"expected a second model with the experts {names(trace.experts)}, found {names(model.experts)}"
            )
        if int(ids.max()) >= model.config.base_text_config.vocab_size:
            raise TraceMismatchError(f"expected a second model with the same tokens, found none of id {int(ids.max())}")
        order = [model.experts.index(expert) for expert in trace.experts]
        cache = new_cache(model.config)
        scalings = [torch.full((1, len(model.sites), len(model.experts)), torch.nan)]
        logprobs = [torch.full((1,), torch.nan)]
        for start in range(0, len(ids) - 1, READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, len(ids) - 1)
            part = ids[None, start:stop].to(model.device)
            out = model(part, past_key_values=cache, use_cache=True, routing=routing)
            scalings.append(out.scalings[0][..., order].float().cpu())
            next_T1 = ids[start + 1 : stop + 1, None].to(model.device)
            logprobs.append(out.logits[0].float().log_softmax(dim=-1).gather(-1, next_T1)[:, 0].cpu())
        said = about(model, trace.metadata, routing)
        columns = {
            name: getattr(trace.tokens, name) for name in ("ids", "special", "answer", "turns", "roles", "texts")
        }
        tokens = Tokens(logprobs=torch.cat(logprobs), **columns)
        found.append(Trace(tokens, torch.cat(scalings), type(said)(**{**vars(said), "experts": trace.experts})))
    return found


def _answered(model: XLoraForCausalLM, tokenizer: Any, ask: Ask, max_new_tokens: int, routing: Routed | None) -> Trace:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "metadata": ask.metadata, "speculative": True}
    options["routing"] = routing
    if ask.then:
        return trace_conversation(model, tokenizer, ask.questions, system=ask.system, **options)
    return trace_text(model, tokenizer, ask.prompt, **options)


def _rows(asks: Sequence[Ask], traces: Sequence[Trace]) -> dict[int, Row]:
    """What worth is measured on, by place: the right answer where there is one, the model's own elsewhere."""
    rows: dict[int, Row] = {}
    for place, (ask, trace) in enumerate(zip(asks, traces, strict=True)):
        answers = _answers(trace)
        answer = ask.answer or answers[-1]
        if not all(text.strip() for text in (*answers[:-1], answer)):
            continue
        where = f"line {ask.metadata.get('line', place + 1)}"
        if isinstance(ask.prompt, str):
            rows[place] = Row(ask.prompt, answer, where)
            continue
        said = list(ask.prompt)
        for text, question in zip(answers, ask.then):
            said += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
        rows[place] = Row(said, [{"role": "assistant", "content": answer}], where)
    return rows


def _answers(trace: Trace) -> list[str]:
    """What was written, turn by turn."""
    turns = [trace[turn.start : turn.stop] for turn in trace.turns]
    return [part.answer for part in turns if part.tokens.answer.any()] or [""]

"""The loop that writes: drafts go through the model in windows, and what the model would have written anyway stays.

A draft that is a likely token, drawn from q, is accepted with probability min(1, p / q) where p is what the model says,
and otherwise replaced by one drawn from what p has beyond q (Leviathan et al., arXiv 2211.17192): the text is
distributed as if no draft had been there. Greedy text is the model's greedy text. Knows nothing of caches.
Letters: W tokens of the window  V vocabulary  S sites  N experts
"""

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xloom.decoding.drafts import lookup
from xloom.decoding.steppers import Stepper

_WEIGHT = 0.25  # of the newest in a running mean
# forwards until drafts that were given up are asked for; odd, as forwards that see a token and that judge it take turns
_PROBE = 7
_WORTH = 0.4  # a joint pass costs 1.5 forwards of one token, and half as much again for each wrong draft

Process = Callable[[Tensor, Tensor], Tensor]  # token ids [1, T] and logits [1, V] -> scores [1, V]


@dataclass
class Tally:
    """What drafting did: forwards after the prompt, tokens written, drafts looked at and those that were right."""

    forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, *, drafted: bool, accepted: bool) -> None:
        self.tokens += 1
        self.drafted += drafted
        self.accepted += accepted

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Written(NamedTuple):
    """One token of the text, the logits [V] and scalings [S, N] it was written with, and whether it was a draft."""

    token: int
    logits_V: Tensor
    scores_V: Tensor
    scalings_SN: Tensor
    from_draft: bool


class Draft(NamedTuple):
    token: int
    q_V: Tensor | None = None  # what it was drawn from; None for a token that is simply put forward


Lookup = Callable[[Sequence[int], int], list[int]]  # the text so far and a count -> tokens that may follow


class Policy:
    """Which drafts a window gets: tokens looked up in the text, and the next one by the newest scalings, given up while
    such drafts are wrong (greedy text alone: drawn drafts go on). Now and then one is asked for and only held against
    the text.

    Args:
        most: bound on tokens that are looked up; 0 for none.
        extra: looks tokens up.
    """

    def __init__(self, most: int, extra: Lookup = lookup) -> None:
        self.most, self._extra = most, extra
        self._next: tuple[int, int] | None = None  # place and token of the last draft by the newest scalings
        self._right = 1.0  # running mean of such drafts that were right
        self._forwards = 0  # since they were given up

    def look_up(self, text: Sequence[int], room: int) -> list[int]:
        """Tokens to put forward after `text`."""
        count = min(self.most, room)
        return self._extra(text, count)[:count] if count > 0 else []

    def asks(self) -> bool:
        """Whether the next forward is to say what follows its window by the newest scalings."""
        self._forwards = 0 if self._right > _WORTH else self._forwards + 1
        return self._forwards % _PROBE == 0

    def takes(self, place: int, token: int) -> bool:
        """Whether a draft by the newest scalings for this place of the text is worth its rows."""
        self._next = place, token
        return self._right > _WORTH

    def watch(self, text: Sequence[int]) -> None:
        """The text has come so far."""
        if self._next is not None and len(text) > self._next[0]:
            place, token = self._next
            self._right += _WEIGHT * ((text[place] == token) - self._right)
            self._next = None


class Chooser:
    """Picks tokens from logits: the likeliest, or drawn."""

    def __init__(self, process: Process, sample: bool, generator: torch.Generator | None = None) -> None:
        self._process, self.samples, self._generator = process, sample, generator

    def propose(self, ids_1T: Tensor, logits_V: Tensor) -> Draft:
        """A likely next token, from logits that are nearly right."""
        scores_V = self._process(ids_1T, logits_V[None].float())[0]
        if not self.samples:
            return Draft(int(scores_V.argmax()))
        q_V = scores_V.softmax(-1)
        return Draft(self._draw(q_V), q_V)

    def choose(self, ids_1T: Tensor, logits_V: Tensor, draft: Draft | None) -> tuple[int, Tensor]:
        """The next token, and the scores [V] it was chosen by; it is the draft's where that may stay."""
        scores_V = self._process(ids_1T, logits_V[None].float())[0]
        if not self.samples:
            return int(scores_V.argmax()), scores_V
        p_V = scores_V.softmax(-1)
        if draft is None:
            return self._draw(p_V), scores_V
        q_V = draft.q_V if draft.q_V is not None else _certain(draft.token, p_V)
        if torch.rand((), generator=self._generator, device=p_V.device) * q_V[draft.token] < p_V[draft.token]:
            return draft.token, scores_V
        return self._draw((p_V - q_V).clamp(min=0)), scores_V

    def _draw(self, weights_V: Tensor) -> int:
        return int(torch.multinomial(weights_V, 1, generator=self._generator))


def _certain(token: int, like_V: Tensor) -> Tensor:
    q_V = torch.zeros_like(like_V)
    q_V[token] = 1.0
    return q_V


def write(
    stepper: Stepper,
    ids_1T: Tensor,
    first: int,
    chooser: Chooser,
    *,
    room: Callable[[], int],
    policy: Policy,
    tally: Tally,
) -> Generator[Written]:
    """Tokens after `first`, for ever; whoever has enough closes the iterator.

    Args:
        ids_1T: [1, T] the text before `first`.
        room: how many more tokens may be written at most; drafts do not go beyond.
        policy: puts tokens forward.
    """
    text = [*ids_1T[0].tolist(), first]
    drafts: list[Draft] = []
    while True:
        most = room() - 1  # the last token is chosen all the same, and its place may be beyond the base's positions
        drafts = drafts[: max(0, most)]
        policy.watch(text)
        more = policy.look_up([*text, *(draft.token for draft in drafts)], most - len(drafts))
        drafts += [Draft(token) for token in more]
        window = [text[-1], *(draft.token for draft in drafts)]
        asked = chooser.samples or policy.asks()
        out = stepper.step(window, ahead=asked)
        tally.forwards += 1

        right, rejected = 1, False  # tokens of the window that are the text's
        for i in range(out.exact):
            draft = drafts[i] if i < len(drafts) else None
            token, scores_V = chooser.choose(ids_1T.new_tensor([text]), out.logits_WV[i], draft)
            accepted = draft is not None and token == draft.token
            text.append(token)
            tally.count(drafted=draft is not None, accepted=accepted)
            try:
                yield Written(token, out.logits_WV[i], scores_V, out.scalings_WSN[i], accepted)
            except GeneratorExit:  # the last token stays out of the cache, as with `generate`
                if not sys.is_finalizing():
                    stepper.keep(len(window), i + 1)
                raise
            right += accepted
            rejected = not accepted
            if rejected:
                break
        stepper.keep(len(window), min(out.exact, right))
        drafts = [] if rejected else drafts[right - 1 :]
        if asked and not rejected:
            drafts = _revised(chooser, ids_1T, text, drafts, out.logits_WV[right - 1 :])
            if drafts and not chooser.samples and not policy.takes(len(text), drafts[0].token):
                drafts = []


def _revised(
    chooser: Chooser, ids_1T: Tensor, text: Sequence[int], drafts: Sequence[Draft], logits_WV: Tensor
) -> list[Draft]:
    """What logits that are nearly right say about drafts; what they contradict goes, and all that follows it.

    Args:
        logits_WV: those that each draft is judged by, and one more, which adds a draft.
    """
    found: list[Draft] = []
    for place, logits_V in enumerate(logits_WV):
        ids = ids_1T.new_tensor([[*text, *(draft.token for draft in found)]])
        found.append(chooser.propose(ids, logits_V))
        if place >= len(drafts) or found[-1].token != drafts[place].token:
            break
    return found

"""Speculation without loss: the same text in fewer forwards.

model.generate(ids, custom_generate=xloom.speculative(), max_new_tokens=200)
"""

from typing import final

import torch

from xloom.decoding import joint
from xloom.decoding.generating import Decoding
from xloom.decoding.steppers import Begun, OnePass, Stepper
from xloom.errors import ConfigError

MOST_LOOKED_UP = 8


@final
class Speculative(Decoding):
    """Greedy text is that of plain decoding (float32; in 16 bits near-ties may fall the other way); drawn text has the
    same distribution. Not so with `dynamic` rope, nor with `longrope` beyond its original length. One sequence at a
    time.

    Two-pass models draft with the newest scalings; all models with what followed the same words before (prompt lookup).

    Args:
        looked_up: tokens of a prompt-lookup draft at most; 0 turns it off.
        generator: draws the tokens; the global one by default.
    """

    def __init__(self, looked_up: int = MOST_LOOKED_UP, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if looked_up < 0:
            raise ConfigError(f"looked_up: expected 0 or more, found {looked_up}")
        self.looked_up = looked_up

    def stepper(self, begun: Begun) -> Stepper:
        return joint.Joint(begun) if joint.suits(begun) else OnePass(begun)


def speculative(looked_up: int = MOST_LOOKED_UP, generator: torch.Generator | None = None) -> Speculative:
    """`Speculative`, for `model.generate(..., custom_generate=xloom.speculative())`."""
    return Speculative(looked_up, generator)

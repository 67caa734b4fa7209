"""Writing text: token by token with the mixing that wrote each (`stream`), many texts at once (`batch`), and faster.

    stream        steps, with what wrote each token
    batch         rows that come and go                          request    what is asked for one of them
    generating    a way of writing one text                      loop       drafts, and what is kept of them
    speculation   the same text in fewer forwards                steppers   a window of tokens through the model
    refresh       scalings that stay for a while                 joint      both passes in one forward
    drawing       sampling with generators of one's own

Below `model.py`: knows the two passes and their cache, not how models are loaded.
"""

from xloom.decoding.batch import Batch, write
from xloom.decoding.drawing import generate_drawn
from xloom.decoding.generating import Decoding
from xloom.decoding.loop import Tally
from xloom.decoding.refresh import Refreshing, refreshing
from xloom.decoding.request import Request, RowStep
from xloom.decoding.speculation import Speculative, speculative
from xloom.decoding.stream import Step, steps

__all__ = [
    "Batch", "Decoding", "Refreshing", "Request", "RowStep", "Speculative", "Step", "Tally", "generate_drawn",
    "refreshing", "speculative", "steps", "write",
]  # fmt: skip

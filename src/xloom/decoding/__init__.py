"""Writing text: token by token with the mixing that wrote each (`stream`), and faster.

    stream        steps, with what wrote each token
    generating    a way of writing, as `generate` takes it       loop       drafts, and what is kept of them
    speculation   the same text in fewer forwards                steppers   a window of tokens through the model
    refresh       scalings that stay for a while                 joint      both passes in one forward

Below `model.py`: knows the two passes and their cache, not how models are loaded.
"""

from xloom.decoding.generating import Decoding
from xloom.decoding.loop import Tally
from xloom.decoding.refresh import Refreshing, refreshing
from xloom.decoding.speculation import Speculative, speculative
from xloom.decoding.stream import Step, steps

__all__ = ["Decoding", "Refreshing", "Speculative", "Step", "Tally", "refreshing", "speculative", "steps"]

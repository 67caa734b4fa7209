"""Writing text: token by token with the mixing that wrote each (`stream`), and faster without loss (`speculative`).

Below `model.py`: knows the two passes and their cache, not how models are loaded.
"""

from xloom.decoding.loop import Tally
from xloom.decoding.speculation import Speculative, speculative
from xloom.decoding.stream import Step, steps

__all__ = ["Speculative", "Step", "Tally", "speculative", "steps"]

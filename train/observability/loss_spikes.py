"""Scores each step's loss by its distance from the losses before it, so that spikes are found.

The score is (loss - median) / (1.4826 * MAD) over the losses of the last `WINDOW` steps before it; MAD is the median of
their absolute distances from the median, and 1.4826 makes it the standard deviation of normally distributed losses.
"""

import json
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np

WINDOW = 50
"""Steps before a step whose losses it is compared with."""
MIN_STEPS = 20
"""A step with fewer finite losses before it has no score."""
_MIN_SPREAD = 0.01
"""The spread (1.4826 * MAD) is at least this share of the median: nearly equal losses would make anything a spike."""


class LossSpikes:
    """Computes the scores of consecutive steps. They are equal on all ranks, as the losses are.

    Args:
        losses: of the steps before the first one; of a resumed run those that it has logged (`read_losses`).
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)

    def update(self, loss: float) -> dict[str, float]:
        """Adds a step; returns its score as `train/loss_spike_score`, or nothing where it has none."""
        if not math.isfinite(loss):
            return {}
        loss = float(f"{loss:.8g}")  # as it is logged: a resumed run computes the same scores
        score = self._score(loss) if len(self._losses) >= MIN_STEPS else None
        self._losses.append(loss)
        return {} if score is None else {"train/loss_spike_score": score}

    def _score(self, loss: float) -> float | None:
        losses = np.array(self._losses)
        median = float(np.median(losses))
        spread = max(1.4826 * float(np.median(np.abs(losses - median))), _MIN_SPREAD * abs(median))
        return (loss - median) / spread if spread else None


def read_losses(metrics: Path) -> list[float]:
    """Returns the last `WINDOW` finite losses in metrics.jsonl. `RunLog` has removed the steps that run again."""
    if not metrics.is_file():
        return []
    losses = deque[float](maxlen=WINDOW)
    with metrics.open() as file:
        for line in file:
            loss = json.loads(line).get("train/loss")
            if loss is not None:
                losses.append(loss)
    return list(losses)

"""In which order samples are met: (seed, epoch) → permutation, step → sample numbers.

Owns: that arithmetic; it knows neither ranks nor files.
Leaves: what the samples are to `mixture.py`, dealing a step's samples to ranks to the training side.

A run's place in its data is one integer, the step. Nothing is drawn, consumed or saved: a run that was
killed, or goes on with another number of ranks, asks for step k again and gets the same samples.
"""

from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of all samples in one epoch.

    Args:
        num_samples: how many there are.
        seed, epoch: non-negative.

    Returns:
        A permutation of 0 .. num_samples - 1, int64. Samples are sorted by 64 raw bits each from Philox,
        seeded by `SeedSequence([seed, epoch])`: NumPy promises those bits for ever (NEP 19), and does not
        promise `Generator.permutation`.
    """
    return _permutation(num_samples, seed, epoch).copy()


def num_steps(num_samples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a run: `ceil(round(num_samples * epochs) / batch_size)`.

    Batches straddle the ends of epochs; only the very last one may be smaller.

    Raises:
        ValueError: no samples, or a batch size or number of epochs that is not positive.
    """
    return ceil(_num_visits(num_samples, batch_size, epochs) / batch_size)


def samples_of_step(step: int, num_samples: int, batch_size: int, seed: int, epochs: float) -> npt.NDArray[np.int64]:
    """The sample numbers of optimizer step `step`, counted from 0; a pure function of its arguments.

    Returns:
        int64 [batch_size]; fewer for the last step.

    Raises:
        ValueError: as `num_steps`, or a step outside 0 .. num_steps - 1.
    """
    num_visits = _num_visits(num_samples, batch_size, epochs)
    first, last = step * batch_size, min((step + 1) * batch_size, num_visits)
    if step < 0 or first >= num_visits:
        raise ValueError(f"step {step} is outside 0 .. {ceil(num_visits / batch_size) - 1}")
    parts = []
    while first < last:
        epoch, start = divmod(first, num_samples)
        stop = min(num_samples, start + last - first)
        parts.append(_permutation(num_samples, seed, epoch)[start:stop])
        first += stop - start
    return np.concatenate(parts)


def visits_before(step: int, num_samples: int, batch_size: int, epochs: float) -> tuple[int, int]:
    """How much is met before step `step`: whole epochs, and samples of the one that it is in. Errors as `num_steps`."""
    return divmod(min(step * batch_size, _num_visits(num_samples, batch_size, epochs)), num_samples)


def _num_visits(num_samples: int, batch_size: int, epochs: float) -> int:
    """How many samples are met in the whole run, repetitions counted."""
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("epochs", epochs)):
        if value <= 0:
            raise ValueError(f"{name} is {value}, and must be positive")
    return max(1, round(num_samples * epochs))


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False  # it is shared by every caller
    return order

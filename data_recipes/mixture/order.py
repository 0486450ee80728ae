"""The order of samples in training, as a pure function of seed, epoch and step.

Nothing is drawn or saved at run time. A run that was interrupted, or continues with another number of ranks, requests
step k again and gets the same samples.
"""

from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Compute the order of all samples in one epoch.

    Args:
        num_samples: number of samples.
        seed, epoch: non-negative integers.

    Returns:
        A permutation of 0 .. num_samples - 1, int64 [num_samples]. Samples are sorted by 64 raw bits each from Philox,
        seeded with `SeedSequence([seed, epoch])`. NumPy guarantees this stream of bits (NEP 19), but not the results of
        `Generator.permutation`.
    """
    return _permutation(num_samples, seed, epoch).copy()


def num_steps(num_samples: int, batch_size: int, epochs: float) -> int:
    """Return the number of optimizer steps, `ceil(round(num_samples * epochs) / batch_size)`.

    Batches may extend over the end of an epoch; only the last batch may be smaller than `batch_size`.

    Raises:
        ValueError: an argument is not positive.
    """
    return ceil(_num_visits(num_samples, batch_size, epochs) / batch_size)


def samples_of_step(step: int, num_samples: int, batch_size: int, seed: int, epochs: float) -> npt.NDArray[np.int64]:
    """Return the indices of the samples of an optimizer step.

    Args:
        step: the step, counted from 0.
        num_samples, batch_size, epochs: see `num_steps`.
        seed: seed of the order.

    Returns:
        int64 [batch_size]; the last step may have fewer.

    Raises:
        ValueError: an argument is not positive, or the step is outside 0 .. num_steps - 1.
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
    """Return (number of complete epochs, number of samples of the current epoch) that precede a step.

    Raises:
        ValueError: an argument of `num_steps` is not positive.
    """
    return divmod(min(step * batch_size, _num_visits(num_samples, batch_size, epochs)), num_samples)


def _num_visits(num_samples: int, batch_size: int, epochs: float) -> int:
    """Return the total number of samples of a run, counting repetitions."""
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("epochs", epochs)):
        if value <= 0:
            raise ValueError(f"{name} is {value}, but must be positive")
    return max(1, round(num_samples * epochs))


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False  # the cached array is shared by all callers
    return order

"""Tests of the order of samples: a pure function of the step that visits each sample once per epoch."""

import numpy as np
import numpy.typing as npt
import pytest

from data_recipes.mixture.order import epoch_permutation, num_steps, samples_of_step

PINNED_0_0 = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
PINNED_17_3 = [6, 3, 1, 8, 2, 7, 5, 9, 0, 4]


def all_steps(num_samples: int, batch_size: int, seed: int, epochs: float) -> list[npt.NDArray[np.int64]]:
    """Return the samples of every step of a run."""
    steps = num_steps(num_samples, batch_size, epochs)
    return [samples_of_step(step, num_samples, batch_size, seed, epochs) for step in range(steps)]


@pytest.mark.parametrize("num_samples", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 64, 5000])
@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.3])
def test_each_sample_once_per_epoch(num_samples: int, batch_size: int, epochs: float) -> None:
    """The concatenated steps are permutations of all samples; only the last step is smaller."""
    batches = all_steps(num_samples, batch_size, 3, epochs)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= batch_size
    visits = np.concatenate(batches)
    assert visits.dtype == np.int64
    assert len(visits) == max(1, round(num_samples * epochs))
    for epoch in range(len(visits) // num_samples):
        part = visits[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(np.sort(part), np.arange(num_samples))
    assert len(np.unique(visits[len(visits) // num_samples * num_samples :])) == len(visits) % num_samples


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    """The batch size only splits the stream of samples."""
    streams = [np.concatenate(all_steps(100, batch_size, 5, 2.5)) for batch_size in (1, 7, 64)]
    assert all(np.array_equal(streams[0], stream) for stream in streams)


def test_batch_across_end_of_epoch() -> None:
    """A batch at the end of an epoch is filled from the next epoch."""
    batch = samples_of_step(1, num_samples=10, batch_size=8, seed=0, epochs=2)
    expected = [*epoch_permutation(10, 0, 0)[8:], *epoch_permutation(10, 0, 1)[:6]]
    assert batch.tolist() == expected


def test_a_step_is_a_pure_function() -> None:
    """The result does not depend on the order of calls or on changes to returned arrays."""
    expected = all_steps(50, 8, 9, 3)
    for step in (5, 0, 18, 5, 3):
        batch = samples_of_step(step, 50, 8, 9, 3)
        assert np.array_equal(batch, expected[step])
        batch[:] = -1
    epoch_permutation(50, 9, 0)[:] = -1
    assert np.array_equal(samples_of_step(0, 50, 8, 9, 3), expected[0])


def test_seeds_and_epochs_differ() -> None:
    """Each seed and epoch has its own order, and (1, 0) differs from (0, 1)."""
    orders = {tuple(epoch_permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes() -> None:
    """Pinned values, because a checkpoint must find the same samples with later versions of NumPy."""
    assert epoch_permutation(10, 0, 0).tolist() == PINNED_0_0
    assert epoch_permutation(10, 17, 3).tolist() == PINNED_17_3


def test_order_has_no_bias() -> None:
    """Over many seeds, every sample is first about equally often."""
    firsts = np.bincount([epoch_permutation(5, seed, 0)[0] for seed in range(2000)], minlength=5)
    assert firsts.min() > 320
    assert firsts.max() < 480


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 8, 1), "num_samples"), ((10, 0, 1), "batch_size"), ((10, 8, 0), "epochs")],
)
def test_invalid_arguments(arguments: tuple[int, int, float], message: str) -> None:
    """Arguments that are not positive raise an error with name and value."""
    with pytest.raises(ValueError, match=message):
        num_steps(*arguments)


def test_steps_out_of_range() -> None:
    """The first step is 0, the last num_steps - 1."""
    assert num_steps(10, 8, 2) == 3
    for step in (-1, 3):
        with pytest.raises(ValueError, match=rf"step {step} is outside 0 .. 2"):
            samples_of_step(step, 10, 8, 0, 2)

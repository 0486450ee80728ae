"""Tests of slow ranks and nodes: the rolling excess, and one warning for each that stays slow."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from train.observability.slow_ranks import WINDOW, ForwardTimer, SlowRanks

TWO_NODES = ["gpu1"] * 4 + ["gpu2"] * 4


class Logged:
    """Slow ranks with the messages that they have logged; rows make the times of all ranks differ in each step."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.messages: list[str] = []
        self.ranks = SlowRanks(hosts, self.messages.append)
        self._random = np.random.default_rng(0)

    def run(self, factors: Sequence[float], num_steps: int) -> dict[str, float]:
        """Adds steps in which the ranks take their factor of the usual time; returns the last metrics."""
        values: dict[str, float] = {}
        for _ in range(num_steps):
            rows = self._random.uniform(0.9, 1.1, len(factors))
            values = self.ranks.update((np.array(factors) * rows).tolist())
        return values


def test_a_slow_rank_is_named_once() -> None:
    """After a full window a warning names rank and host, and the metrics have both numbers."""
    logged = Logged(TWO_NODES)
    slow = [1.0, 1.0, 1.3, *[1.0] * 5]
    logged.run(slow, WINDOW - 1)
    assert logged.messages == []
    values = logged.run(slow, 3 * WINDOW)
    assert values["perf/slowest_rank"] == 2
    assert values["perf/slowest_excess"] == pytest.approx(0.3, abs=0.06)
    [message] = logged.messages
    assert message.startswith("rank 2 (gpu1) stays slow")


def test_another_one_is_named_again() -> None:
    """A second warning follows only if another rank is slow, or the same one after it had recovered."""
    logged = Logged(TWO_NODES)
    even = [1.0] * 8
    for factors in ([*even[:7], 1.5], [1.5, *even[:7]], [1.5, *even[:7]], even, [1.5, *even[:7]]):
        logged.run(factors, 2 * WINDOW)
    assert [message.split(" stays")[0] for message in logged.messages] == [
        "rank 7 (gpu2)",
        "rank 0 (gpu1)",
        "rank 0 (gpu1)",
    ]


def test_a_slow_node_is_named() -> None:
    """If all ranks of a node are slow, the node is named, not one of them."""
    logged = Logged(TWO_NODES)
    logged.run([*[1.0] * 4, *[1.25] * 4], 3 * WINDOW)
    assert [message.split(" stays")[0] for message in logged.messages] == ["node gpu2 (ranks 4 to 7)"]


def test_equal_ranks_are_not_named() -> None:
    """Different rows, and a pause of a rank in a few steps, are no reason for a warning."""
    logged = Logged(TWO_NODES)
    logged.run([1.0] * 8, 2 * WINDOW)
    logged.run([*[1.0] * 7, 30.0], 5)
    values = logged.run([1.0] * 8, 2 * WINDOW)
    assert logged.messages == []
    assert values["perf/slowest_excess"] < 0.1


def test_of_two_ranks_the_slower_is_compared_with_the_other() -> None:
    """The median of two ranks is the faster one; a single rank has no metrics."""
    assert SlowRanks(["a", "b"], print).update([1.0, 1.5]) == {"perf/slowest_rank": 1, "perf/slowest_excess": 0.5}
    assert SlowRanks(["a"], print).update([1.0]) == {}


def test_forward_passes_are_added_up() -> None:
    """The timer returns the time since the last reading."""
    timer = ForwardTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.measure():
            sum(range(100_000))
    assert timer.read() > 0
    assert timer.read() == 0

"""Finds ranks and nodes that stay slow: each step waits for its slowest rank.

What is compared is the time that a rank needs on its own, its data wait and its forward passes: in backward passes the
ranks wait for each other, so those times are nearly equal. At ZeRO-3 that holds for forward passes too, and mostly the
data wait shows a slow rank.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

WINDOW = 50
"""Steps of the rolling excess."""
_SLOW, _RECOVERED = 0.10, 0.05
"""A rank is slow above the first excess, until it is below the second."""


class ForwardTimer:
    """Measures the forward passes of a step: on a GPU with events, which do not synchronize, else by the clock.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Context manager around one forward pass."""
        if self._is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def read(self) -> float:
        """Returns the seconds since the last call. On a GPU the passes must have been waited for."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class SlowRanks:
    """Computes the rolling excess of the slowest rank, and logs a warning when a rank or a node stays slow.

    The excess of a rank in a step is its time over that of the median rank, minus 1; the rolling excess is its median
    over the last `WINDOW` steps, so a few steps with other rows or a short pause do not count.

    Args:
        hosts: host of each rank.
        info: logs a message.
    """

    def __init__(self, hosts: Sequence[str], info: Callable[[str], None]) -> None:
        self._hosts, self._info = list(hosts), info
        self._nodes = list(dict.fromkeys(hosts))
        self._ranks_of = [[rank for rank, host in enumerate(hosts) if host == node] for node in self._nodes]
        self._by_rank: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._by_node: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._warned: str | None = None

    def update(self, seconds: Sequence[float]) -> dict[str, float]:
        """Adds a step and returns `perf/slowest_rank` and `perf/slowest_excess`; nothing for a single rank.

        Args:
            seconds: time of each rank.
        """
        if len(self._hosts) < 2:
            return {}
        times = np.asarray(seconds)
        self._by_rank.append(_excess(times))
        self._by_node.append(_excess(np.array([times[ranks].mean() for ranks in self._ranks_of])))
        excess = np.median(self._by_rank, axis=0)
        slowest = int(excess.argmax())
        if len(self._by_rank) == WINDOW:
            self._warn(slowest, excess)
        return {"perf/slowest_rank": slowest, "perf/slowest_excess": float(excess[slowest])}

    def _warn(self, slowest: int, excess: np.ndarray) -> None:
        """Logs a warning if a rank or a node is slow and has not been named in the warning before."""
        by_node = np.median(self._by_node, axis=0)
        node = int(by_node.argmax())
        peers = excess[self._ranks_of[self._nodes.index(self._hosts[slowest])]]
        name, amount = None, max(float(excess[slowest]), float(by_node[node]))
        # A node is named where its ranks are alike, else the rank, which alone may raise the mean of its node.
        if by_node[node] > _SLOW and excess[slowest] - _lower_median(peers) <= _SLOW:
            name, amount = f"node {self._nodes[node]} (ranks {_list(self._ranks_of[node])})", float(by_node[node])
        elif excess[slowest] > _SLOW:
            name, amount = f"rank {slowest} ({self._hosts[slowest]})", float(excess[slowest])
        if name is not None and name != self._warned:
            self._info(
                f"{name} stays slow: over the last {WINDOW} steps its data wait and forward passes took {amount:.0%} "
                "longer than the median's, and every step waits for it. Compare that host's GPU clocks and temperature "
                "(nvidia-smi -q -d PERFORMANCE), load and disk with the others', or exclude it"
            )
        if name is not None or amount < _RECOVERED:
            self._warned = name


def _excess(times: np.ndarray) -> np.ndarray:
    """Returns by how much each time exceeds the median, as a share of it."""
    return times / max(_lower_median(times), 1e-9) - 1.0


def _lower_median(values: np.ndarray) -> float:
    """Returns the median, of an even number of values the lower of the middle ones: of two ranks the faster one."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _list(ranks: Sequence[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 2 else " and ".join(map(str, ranks))

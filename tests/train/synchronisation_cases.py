"""What ranks run in the test of device synchronisations: a step, with every read of a tensor's value by the host."""

import traceback
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.cases import _step, built
from train.config.schema import RunConfig

_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero")
"""Operators that return a value, or a shape that depends on values: on a GPU the host waits for all kernels before."""


class ValueReads(TorchDispatchMode):
    """Notes the reads inside it, each with the line of the program that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator."""
        if func.overloadpacket.__name__ in _READS:
            self.places.append(_place())
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line outside of torch."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.endswith("synchronisation_cases.py"):
            return f"{frame.filename.rpartition('/')[2]}:{frame.name}"
    return "torch"


def reads_of_a_step(config: RunConfig) -> tuple[int, list[str]]:
    """Runs three steps, the later ones after ZeRO-3 has recorded its order of modules, and returns the number of rows
    and the reads of the last one."""
    with built(config) as parts:
        for step in range(3):
            plan = parts.planner.plan(step)
            with ValueReads() as reads:
                _step(parts, plan)
        return len(plan.rows), reads.places

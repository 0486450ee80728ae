"""Steps and saves with faults, for ranks to run. The assertions are in the tests."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from tests.train.cases import Parts, Record, built, train_parts, weights
from train.config.schema import RunConfig

Fault = Literal["gradient", "loss", "memory"]
FAULTY_STEP = 1


@dataclass
class Seen:
    """Whether each step was applied and changed a weight; and the message that ended the run, if any."""

    applied: list[bool] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    ended: str = ""


def run_with_faulty_step(config: RunConfig, fault: Fault, num_skipped: int = 0) -> Seen:
    """Trains all steps; in step `FAULTY_STEP` rank 1 (or the only one) has the fault."""
    from train.data.loader import StepPlan, make_batches
    from train.observability.run_log import RunLog
    from train.observability.step_metrics import StepOutcome
    from train.supervision.step_errors import OutOfMemory, StepError
    from train.trainer import Trainer

    seen = Seen()
    with built(config) as parts:

        class Watched(Trainer):
            def train_step(self, plan: StepPlan) -> StepOutcome:
                before = weights(parts)
                has_it = plan.step == FAULTY_STEP and parts.world.rank == parts.world.size - 1
                with _faulty(parts, fault) if has_it else _sound():
                    outcome = super().train_step(plan)
                after = weights(parts)
                seen.applied.append(outcome.update.applied)
                seen.grad_norms.append(outcome.update.grad_norm)
                seen.changed.append(any(not np.array_equal(before[name], after[name]) for name in before))
                seen.updates += sorted({int(state["step"]) for state in self.engine.basic_optimizer.state.values()})
                return outcome

        num_steps = parts.planner.num_steps
        steps = range(num_steps)
        stream = make_batches(parts.planner, parts.mixture, parts.processor, steps, config.data, pin_memory=False)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        log = RunLog(config, is_main=parts.world.is_main, first_step=0, num_steps=num_steps)
        args = (config, parts.world, parts.engine, parts.planner, stream, log, parts.mixture)
        try:
            Watched(*args, frozen=parts.frozen, num_skipped=num_skipped).run(0, num_steps)
        except (StepError, OutOfMemory) as error:
            seen.ended = f"{type(error).__name__}: {error}"
        finally:
            log.close()
    return seen


def train_with_faulty_first_step(config: RunConfig, fault: Fault, stop_after: int | None = None) -> Record:
    """Trains; the last rank has a fault in step 0. `stop_after`: the run is stopped in that step, and saves."""
    from train.data.loader import StepPlan
    from train.observability.step_metrics import StepOutcome
    from train.trainer import Interrupted, Trainer

    train_step = Trainer.train_step
    with built(config) as parts:

        def faulty(self: Trainer, plan: StepPlan) -> StepOutcome:
            has_it = plan.step == 0 and parts.world.rank == parts.world.size - 1
            with _faulty(parts, fault) if has_it else _sound():
                return train_step(self, plan)

        seen: list[Record] = []
        with patch.object(Trainer, "train_step", faulty), suppress(Interrupted):
            train_parts(parts, 0, parts.planner.num_steps, stop_after=stop_after, seen=seen)
        return seen[0]


def start_again(config: RunConfig) -> tuple[int, int]:
    """The first step of a start from the run's checkpoint, and the steps before it that were left out."""
    with built(config, goes_on=True) as parts:
        return parts.first_step, parts.num_skipped


@contextmanager
def _sound() -> Iterator[None]:
    yield


@contextmanager
def _faulty(parts: Parts, fault: Fault) -> Iterator[None]:
    if fault == "gradient":
        parameter = next(parameter for parameter in parts.model.parameters() if parameter.requires_grad)
        handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
        yield
        handle.remove()
        return
    forward = type(parts.model).forward

    def spoiled(model: Any, batch: Any) -> Any:
        if fault == "memory":
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        total, by_source, tokens = forward(model, batch)
        return total, by_source + float("inf"), tokens  # its gradient is finite

    with patch.object(type(parts.model), "forward", spoiled):
        yield

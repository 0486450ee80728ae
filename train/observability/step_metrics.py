"""Computes the metrics that a finished step is logged with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config.hardware_files import peak_bf16_tflops
from train.data.loader import StepPlan
from train.distributed.world import StepState, World
from train.engine.step_guard import Update


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step.

    Attributes:
        agreement: losses and token counts by source, summed over the ranks.
        update: whether the update was applied, and the gradient norms.
        seconds: duration of the step on this rank.
        data_wait_s: seconds of it that this rank waited for its batches.
        verify_s: seconds of the computation that verified the step, not in `seconds`; 0 where there was none.
    """

    agreement: StepState
    update: Update
    seconds: float
    data_wait_s: float
    verify_s: float = 0.0


class StepMetrics:
    """Computes the metrics of a run's steps.

    Args:
        source_names: of the mixture, in the order of the losses.
        world: of the run.
    """

    def __init__(self, source_names: Sequence[str], world: World) -> None:
        self._source_names, self._world = source_names, world
        self._peak_tflops = peak_bf16_tflops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None

    def compute(self, plan: StepPlan, outcome: StepOutcome) -> dict[str, float]:
        """Returns the `train/` and `perf/` metrics by key.

        A source without a supervised token in this step has no key. `perf/mfu` needs a device whose peak rate is known.
        """
        values = self._compute_training(plan, outcome) | self._compute_performance(plan, outcome)
        if self._peak_tflops is not None:
            values["perf/mfu"] = values["perf/tflops_per_rank"] / self._peak_tflops
        return values

    def _compute_training(self, plan: StepPlan, outcome: StepOutcome) -> dict[str, float]:
        losses, tokens = outcome.agreement.sums.view(2, -1)
        update = outcome.update
        values = {"train/loss": float(losses.sum()) / plan.divisor, "train/grad_norm": update.grad_norm}
        values |= {f"train/grad_norm/{part}": norm for part, norm in update.by_part.items()}
        if not update.applied:
            values["train/left_out"] = 1.0
        by_source = zip(self._source_names, losses.tolist(), plan.divisors.tolist(), tokens.tolist(), strict=True)
        for name, loss, share, count in by_source:
            if count:
                values[f"train/loss/{name}"] = loss / share
                values[f"train/tokens/{name}"] = count
        return values | {
            "train/samples": float(len(plan.samples)),
            "train/supervised_tokens": float(plan.num_supervised),
            "train/input_tokens": float(plan.num_tokens),
            "train/tiles": float(plan.num_tiles),
        }

    def _compute_performance(self, plan: StepPlan, outcome: StepOutcome) -> dict[str, float]:
        values = {"perf/verify_s": outcome.verify_s} if outcome.verify_s else {}
        return values | {
            "perf/step_s": outcome.seconds,
            "perf/data_wait_s": outcome.data_wait_s,
            "perf/forward_backward_s": outcome.agreement.slowest_s,
            "perf/tokens_per_s": plan.num_tokens / outcome.seconds,
            "perf/samples_per_s": len(plan.samples) / outcome.seconds,
            "perf/tflops_per_rank": plan.flops / outcome.seconds / self._world.size / 1e12,
            "perf/balance": plan.balance,
            "perf/micro_steps": float(len(plan.rows)),
            "perf/max_memory_gib": max_memory_gib(self._world),
        }


def max_memory_gib(world: World) -> float:
    """Returns the peak memory of this rank in GiB: of the CUDA allocator, or the resident memory on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return float("nan")

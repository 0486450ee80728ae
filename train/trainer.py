"""The order of a step, and of a run. Read this first.

A step: set the rates, take this rank's rows, forward and backward each, step, let the ranks agree, log, save if due,
leave if asked. What a step computes is a function of its number; this file holds no other state.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import deepspeed
import numpy as np
import torch

from data_recipes.mixture import Mixture
from llava_next.batch import Batch
from llava_next.model import LossSums
from train import checkpoint
from train.config import RunConfig
from train.loader import Planner, StepPlan
from train.log import RunLog
from train.optim import schedule_factor, set_rates
from train.progress import Progress
from train.world import Agreement, World, agree

_MOST_NAMED = 16


class StepError(RuntimeError):
    """A step whose numbers cannot be right; it was not applied."""


class Interrupted(Exception):
    """The run was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class StepOutcome:
    """A finished step: losses per source summed over ranks, and where the time went."""

    agreement: Agreement
    grad_norm: float
    seconds: float
    data_wait_s: float


class Trainer:
    """Runs the steps of one stage.

    Args:
        config, world, engine, planner, log: the run's parts.
        batches: this rank's batches, from the step where the run starts.
        mixture: names the sources of the losses, and the samples of a step that cannot be right.
        progress: where this rank says how far it is.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: deepspeed.DeepSpeedEngine,
        planner: Planner,
        batches: Iterator[Batch],
        log: RunLog,
        mixture: Mixture,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.world, self.engine = config, world, engine
        self.planner, self.batches, self.log = planner, batches, log
        self.mixture, self.source_names = mixture, mixture.source_names
        self.progress = progress or Progress(None)
        self.stop_signal = StopSignal()

    def run(self, first_step: int, last_step: int) -> None:
        """Trains steps `first_step` to `last_step` - 1.

        Raises:
            Interrupted: asked to stop; saved.
            StepError: a loss or a count that cannot be right.
        """
        num_steps = self.planner.num_steps
        with self.stop_signal:
            for step in range(first_step, last_step):
                factor = schedule_factor(step, num_steps, self.config.stage)
                rates = set_rates(self.engine.optimizer.param_groups, factor)
                plan = self.planner.plan(step)
                outcome = self.train_step(plan)
                self.log.step(step, self._metrics(plan, outcome, rates))
                done = step + 1
                if outcome.agreement.stop or self._save_is_due(done, last_step):
                    self.save(done)
                if outcome.agreement.stop and done < last_step:
                    raise Interrupted(done)

    def train_step(self, plan: StepPlan) -> StepOutcome:
        """Forward and backward of this rank's rows, and the optimizer's step.

        The loss of a row is its sum divided by what the whole step counts; DeepSpeed averages over ranks, hence the
        factor. So ranks, rows and budgets have no say in the gradient.

        Raises:
            StepError: nothing is supervised, in all or in one of the sources, or a number cannot be right.
        """
        if plan.num_supervised < 1:
            raise StepError(f"step {plan.step}: none of its tokens is supervised. {self._samples(plan)}")
        started = time.monotonic()
        waited = 0.0
        num_sources = len(self.source_names)
        sums = torch.zeros(2 * num_sources, dtype=torch.float64, device=self.world.device)
        for number in range(len(plan.rows)):
            self.progress.enter("data", plan.step, number)
            before = time.monotonic()
            batch = next(self.batches).to(self.world.device)
            waited += time.monotonic() - before
            self.progress.enter("forward", plan.step, number)
            loss = LossSums(*self.engine(batch))
            self.progress.enter("backward", plan.step, number)
            self.engine.backward(loss.total * (self.world.size / plan.divisor))
            sums[:num_sources] += loss.by_source
            sums[num_sources:] += loss.tokens_by_source
        self.progress.enter("agree", plan.step)
        on_host = sums.cpu()
        agreement = agree(self.world, on_host, stop=self.stop_signal.asked, seconds=time.monotonic() - started - waited)
        self._check(plan, agreement)
        self.progress.enter("update", plan.step)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        grad_norm = float(norm) if norm is not None else float("nan")
        return StepOutcome(agreement, grad_norm, time.monotonic() - started, waited)

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps."""
        self.progress.enter("save", step - 1)
        state = checkpoint.run_state(step, self.planner.table.fingerprint, self.config, self.world)
        folder = self.config.run_dir / "checkpoints"
        checkpoint.save(self.engine, folder, state, self.world, keep=self.config.save.keep)

    def _save_is_due(self, done: int, last_step: int) -> bool:
        every = self.config.save.every
        return every > 0 and (done % every == 0 or done == last_step)

    def _check(self, plan: StepPlan, agreement: Agreement) -> None:
        num_sources = len(self.source_names)
        losses, tokens = agreement.sums[:num_sources], agreement.sums[num_sources:]
        for source in np.unique(self.planner.table.rows["source"][plan.samples]).tolist():
            if not tokens[source]:
                raise StepError(
                    f"step {plan.step}: no token of source {self.source_names[source]} was supervised; the step was "
                    f"not applied. {self._samples(plan, [source])}"
                )
        if int(tokens.sum()) != plan.num_supervised:
            raise StepError(
                f"step {plan.step}: {int(tokens.sum())} supervised tokens were seen, the length table counts "
                f"{plan.num_supervised}; the table is not this data's"
            )
        bad = torch.nonzero(~torch.isfinite(losses))[:, 0].tolist()
        if bad:
            names = ", ".join(self.source_names[source] for source in bad)
            raise StepError(
                f"step {plan.step}: the loss of {names} is not finite; the step was not applied. "
                f"{self._samples(plan, bad)}"
            )

    def _samples(self, plan: StepPlan, sources: Sequence[int] | None = None) -> str:
        """The step's samples, of all or some sources, by their ids."""
        rows = self.planner.table.rows[plan.samples]
        numbers = rows["sample"] if sources is None else rows["sample"][np.isin(rows["source"], sources)]
        texts = [self.mixture.text(int(number)) for number in numbers[:_MOST_NAMED]]
        more = f" and {len(numbers) - len(texts)} more" if len(numbers) > len(texts) else ""
        return "Its samples: " + ", ".join(f"{text.source} {text.id!r}" for text in texts) + more

    def _metrics(self, plan: StepPlan, outcome: StepOutcome, rates: dict[str, float]) -> dict[str, float]:
        num_sources = len(self.source_names)
        losses, tokens = outcome.agreement.sums[:num_sources], outcome.agreement.sums[num_sources:]
        values = {"train/loss": float(losses.sum()) / plan.divisor, "train/grad_norm": outcome.grad_norm}
        shares = plan.divisors.tolist()
        for name, loss, share, count in zip(self.source_names, losses.tolist(), shares, tokens.tolist(), strict=True):
            if count:
                values[f"train/loss/{name}"] = loss / share
                values[f"train/tokens/{name}"] = count
        values |= {f"lr/{part}": rate for part, rate in rates.items()}
        values |= {
            "train/samples": float(len(plan.samples)),
            "train/supervised_tokens": float(plan.num_supervised),
            "perf/step_s": outcome.seconds,
            "perf/data_wait_s": outcome.data_wait_s,
            "perf/forward_backward_s": outcome.agreement.slowest_s,
            "perf/tokens_per_s": plan.num_tokens / outcome.seconds,
            "perf/samples_per_s": len(plan.samples) / outcome.seconds,
            "perf/tflops_per_rank": plan.flops / outcome.seconds / self.world.size / 1e12,
            "perf/balance": plan.balance,
            "perf/micro_steps": float(len(plan.rows)),
            "perf/max_memory_gib": max_memory_gib(self.world),
        }
        return values


def max_memory_gib(world: World) -> float:
    """High-water mark of this rank: the device's allocator, or the process's resident memory on CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return float("nan")


class StopSignal:
    """Remembers that this process was asked to stop; a second request ends it at once.

    SIGTERM (a scheduler), SIGUSR1 (Slurm's warning) and Ctrl-C are one request: save at the next step and leave.
    Signals within `SAME_REQUEST_S` count as one: after Ctrl-C, torchrun sends its workers a SIGTERM too.
    """

    SAME_REQUEST_S = 3.0

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > self.SAME_REQUEST_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, now

"""The training loop. Read this first.

A step sets the learning rates, runs forward and backward on this rank's rows, all-reduces the step's state, applies the
update, logs, and evaluates, saves or stops where that is due. What a step computes depends only on its number.
"""

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import deepspeed
import torch

from data_recipes.mixture.mixture import Mixture
from llava_next.inputs.batch import Batch
from llava_next.model.llava_next import LossSums
from train.checkpoint import resume
from train.checkpoint.saver import Saver
from train.config.compose import to_yaml, with_absolute_paths
from train.config.schema import RunConfig
from train.data.loader import Planner, StepPlan
from train.distributed.device_copies import to_device, to_host
from train.distributed.world import (
    World,
    all_gather_objects,
    all_reduce_step_state,
    broadcast_from_main,
    is_out_of_memory,
)
from train.engine.deepspeed_engine import release_gathered
from train.engine.optimizer import schedule_factor, set_rates
from train.engine.step_guard import StepGuard
from train.observability.loss_spikes import LossSpikes, read_losses
from train.observability.profiler import StepProfiler
from train.observability.run_log import RunLog
from train.observability.slow_ranks import ForwardTimer, SlowRanks
from train.observability.step_metrics import StepMetrics, StepOutcome
from train.supervision.rank_progress import Progress
from train.supervision.step_errors import StepCheck, StepError
from train.supervision.step_verification import PassValues, StepVerifier
from train.supervision.stop_signal import StopSignal
from train.validation.held_out import HeldOutSet
from train.validation.live_answers import AnswerGenerator


class Interrupted(Exception):
    """The run was asked to stop or its time limit has passed; everything up to `step` is saved."""

    def __init__(self, step: int, cause: str = "") -> None:
        super().__init__(f"stopped after step {step}{cause}")
        self.step = step


class Trainer:
    """Runs the steps of one stage.

    Args:
        config, world, engine, planner, log: of the run.
        batches: this rank's batches, from the first step on.
        mixture: gives the names of sources, and of samples in error messages.
        progress: this rank's progress file.
        frozen: sha256 of the frozen parameters by part, for the checkpoints.
        num_skipped: earlier steps whose update was skipped.
        deadline_s: time on the monotonic clock, in seconds, after which the run saves and stops.
        held_out: samples whose loss is computed every `evaluate.every` steps; None to compute none.
        live_answers: questions that are answered at the same steps; None to ask none.
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
        *,
        frozen: dict[str, str] | None = None,
        num_skipped: int = 0,
        deadline_s: float = float("inf"),
        held_out: HeldOutSet | None = None,
        live_answers: AnswerGenerator | None = None,
    ) -> None:
        self.config, self.world, self.engine = config, world, engine
        self.planner, self.batches, self.log = planner, batches, log
        self.source_names = mixture.source_names
        self.progress = progress or Progress(None)
        self.stop_signal = StopSignal()
        self.guard = StepGuard(engine, config)
        self.check = StepCheck(config, world, planner, mixture, log.info, num_skipped)
        self.verifier = StepVerifier(config, world, engine, mixture.source_names)
        self.metrics = StepMetrics(mixture.source_names, world)
        self.forward_timer = ForwardTimer(world.device)
        self.saver = Saver(config.run_dir / "checkpoints", world, config.save)
        self.progress.last_write = self.saver.last_progress
        self._frozen, self._deadline_s = frozen or {}, deadline_s
        self._save_s = self._waited_s = 0.0
        self.held_out, self.live_answers = held_out, live_answers
        self.profiler = StepProfiler(config, world, log.info)

    def run(self, first_step: int, last_step: int) -> None:
        """Trains steps `first_step` to `last_step` - 1.

        Raises:
            Interrupted: the run was asked to stop or its time limit has passed; a checkpoint was saved.
            StepError: a step without supervised tokens, with a wrong count, with one non-finite number too many, with
                values that a second computation did not give, or with a loss spike where `on_spike` is stop.
            OutOfMemory: a row did not fit into memory.
            SaveError: a checkpoint could not be written.
        """
        num_steps = self.planner.num_steps
        seen = self.planner.count_seen(first_step)
        slow_ranks = SlowRanks(all_gather_objects(self.world, socket.gethostname()), self.log.info)
        if self.config.save.every:  # else the run waits for each save: there is no next step
            self.log.info(self.saver.write_in_background(self.engine))
        logged = partial(read_losses, self.config.run_dir / "metrics.jsonl")
        spikes = LossSpikes(broadcast_from_main(self.world, logged))
        with self.stop_signal, self._finish_save_on_error():
            for step in range(first_step, last_step):
                factor = schedule_factor(step, num_steps, self.config.stage)
                rates = set_rates(self.engine.optimizer.param_groups, factor)
                plan = self.planner.plan(step)
                self.profiler.begin_step(step)
                outcome = self.train_step(plan)
                done = step + 1
                seen = seen + plan.sizes
                self.profiler.end_step(step, is_last=outcome.agreement.stop or done == last_step)
                ends_early = outcome.agreement.stop and done < last_step
                evaluated = {} if ends_early else self._evaluate(done, last_step)
                values = self.metrics.compute(plan, outcome) | {f"lr/{part}": rate for part, rate in rates.items()}
                values |= spikes.update(values["train/loss"])
                values |= slow_ranks.update(outcome.agreement.local_s)
                values |= dict(zip(("seen/samples", "seen/tokens", "seen/tiles"), seen.tolist(), strict=True))
                if self._save_s:
                    values["perf/save_s"], self._save_s = self._save_s, 0.0  # of the save after the previous step
                self.log.log_step(step, values | evaluated)
                self.check.check_spike(plan, values)
                if outcome.agreement.sealed:
                    self.saver.commit()
                if outcome.agreement.stop or self._is_save_due(done, last_step):
                    self.save(done)
                if ends_early:
                    self.saver.wait()
                    raise Interrupted(done, "" if self.stop_signal.is_requested else self._describe_time_limit())
            self.saver.wait()

    def train_step(self, plan: StepPlan) -> StepOutcome:
        """Runs forward and backward on this rank's rows, then the optimizer step.

        The loss of a row is its loss sum divided by `plan.divisor`, which counts the whole step on all ranks, and the
        engine sums gradients over rows and ranks. The gradient therefore does not depend on the number of ranks, the
        rows or the budgets.

        Every `verify.every`-th step is computed twice on the same rows, the first time without its update.

        Raises:
            StepError: the step or one of its sources has no supervised token, a count differs from the length table, a
                number is non-finite and no more steps may be skipped, or the step was verified and values differ.
            OutOfMemory: a row did not fit into memory.
        """
        self.check.check_supervised(plan)
        started = time.monotonic()
        self._waited_s = verify_s = 0.0
        rows: Iterable[Batch] = self._read_rows(plan)
        first = second = None
        if self.verifier.is_due(plan.step):
            rows = list(rows)
            first, second = self._compute_without_update(plan, rows), PassValues()
            verify_s = time.monotonic() - started - self._waited_s
        sums = self._forward_backward(plan, rows, second)
        num_sources = len(self.source_names)
        self.progress.enter("agree", plan.step)
        host_sums = to_host(sums)
        agreement = all_reduce_step_state(
            self.world,
            host_sums,
            stop=self.stop_signal.is_requested or time.monotonic() > self._deadline_s,
            sealed=self.saver.is_ready_to_commit,
            seconds=time.monotonic() - started - verify_s - self._waited_s,
            local_s=self._waited_s + self.forward_timer.read(),
        )
        self.check.check_counts(plan, agreement.sums[num_sources:])
        non_finite = torch.nonzero(~torch.isfinite(agreement.sums[:num_sources]))[:, 0].tolist()
        self.progress.enter("update", plan.step)
        update = self.guard.step(refuse=bool(non_finite), shares=second.shares if second else None)
        if first and second:
            updated = time.monotonic()
            second.clip_factor = update.clip_factor
            self.verifier.compare(plan.step, first, second)
            verify_s += time.monotonic() - updated
        if not update.applied:
            self.check.record_skipped(plan, non_finite)
        return StepOutcome(agreement, update, time.monotonic() - started - verify_s, self._waited_s, verify_s)

    def save(self, step: int) -> None:
        """Saves a checkpoint after `step` steps.

        It is written beside the next steps and committed (`Saver.commit`) when the files of every rank are on the disk.

        Raises:
            SaveError: it could not be written.
        """
        self.progress.enter("save", step - 1)
        state = resume.make_run_state(
            step, self.planner.table.fingerprint, self.config, self.world, self.engine, self._frozen
        )
        self._save_s = self.saver.write(self.engine, state, to_yaml(with_absolute_paths(self.config)))

    def _compute_without_update(self, plan: StepPlan, rows: Sequence[Batch]) -> PassValues:
        """Computes a step whose update is refused, for `StepVerifier` to compare with the step itself."""
        self.verifier.check_replicas(plan.step)
        values = PassValues()
        self._forward_backward(plan, rows, values)
        self.progress.enter("update", plan.step)
        values.clip_factor = self.guard.step(refuse=True, shares=values.shares).clip_factor
        self.forward_timer.read()  # these passes do not count
        return values

    @contextmanager
    def _finish_save_on_error(self) -> Iterator[None]:
        """Waits for a checkpoint that is being written before an error that every rank raises ends the run. An error of
        a file is replaced by that of the save which has filled the disk."""
        try:
            yield
        except StepError:
            self.progress.enter("save", self.progress.current[0].step)  # which may take longer than a phase of a step
            self.saver.wait()
            raise
        except OSError as error:
            failure = self.saver.find_failure()
            if failure is not None:
                raise failure from error
            raise

    def _read_rows(self, plan: StepPlan) -> Iterator[Batch]:
        """Yields this rank's rows of a step; adds the seconds that it waits for them to `_waited_s`."""
        for micro_step in range(len(plan.rows)):
            self.progress.enter("data", plan.step, micro_step)
            before = time.monotonic()
            batch = next(self.batches)
            self._waited_s += time.monotonic() - before
            yield batch

    def _forward_backward(self, plan: StepPlan, rows: Iterable[Batch], values: PassValues | None) -> torch.Tensor:
        """Runs forward and backward on this rank's rows; `values` gets the losses and gradients, unless it is None.

        Returns:
            The loss sums, then the supervised tokens, of each source, float64 [2 * num_sources].
        """
        num_sources = len(self.source_names)
        sums = torch.zeros(2 * num_sources, dtype=torch.float64, device=self.world.device)
        with nullcontext() if values is None else values.watch(self.engine.module):
            for micro_step, batch in enumerate(rows):
                try:
                    loss = self._forward_backward_row(plan, micro_step, batch)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise self.check.make_out_of_memory_error(plan, micro_step, error) from error
                    raise
                sums[:num_sources] += loss.by_source
                sums[num_sources:] += loss.tokens_by_source
        if values is not None:
            values.losses = sums[:num_sources]
        return sums

    def _forward_backward_row(self, plan: StepPlan, micro_step: int, batch: Batch) -> LossSums:
        batch = to_device(batch, self.world.device)
        self.progress.enter("forward", plan.step, micro_step)
        with self.forward_timer.measure():
            loss = LossSums(*self.engine(batch))
        self.progress.enter("backward", plan.step, micro_step)
        self.engine.backward(loss.total / plan.divisor)
        return loss

    def _evaluate(self, done: int, last_step: int) -> dict[str, float]:
        """Computes held-out losses and live answers after `done` steps, where they are due. Changes no weight."""
        every = self.config.evaluate.every
        if self.held_out is None or every < 1 or (done % every and done != last_step):
            return {}
        enter = partial(self.progress.enter, "evaluate", done - 1)
        metrics = self.held_out.compute_metrics(self.engine, self.world, enter)
        losses = ", ".join(f"{key.split('/')[1]} {metrics[key]:.4f}" for key in metrics if key.startswith("eval/"))
        self.log.info(f"held-out loss after step {done}: {losses}")
        if self.live_answers is not None:
            started = time.monotonic()
            self.log.log_answers(done - 1, self.live_answers.generate(self.engine, self.world, enter))
            metrics["perf/evaluate_s"] += time.monotonic() - started
        release_gathered(self.engine)
        return metrics

    def _is_save_due(self, done: int, last_step: int) -> bool:
        every = self.config.save.every
        return every > 0 and (done % every == 0 or done == last_step)

    def _describe_time_limit(self) -> str:
        return f" (time_limit_min={self.config.time_limit_min:g} has passed)" if self.config.time_limit_min else ""

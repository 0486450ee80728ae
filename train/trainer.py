"""The order of a step, and of a run. Read this first.

A step: set the rates, take this rank's rows, forward and backward each, step, let the ranks agree, log, save if due,
leave if asked. What a step computes is a function of its number; this file holds no other state.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed
import torch

from data_recipes.mixture.mixture import Mixture
from llava_next.inputs.batch import Batch
from llava_next.model.llava_next import LossSums
from train.checkpoint import resume
from train.checkpoint.saver import Saver
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.data.loader import Planner, StepPlan
from train.distributed.world import World, all_reduce_step_state, is_out_of_memory
from train.engine.deepspeed_engine import release_gathered
from train.engine.optimizer import schedule_factor, set_rates
from train.engine.step_guard import StepGuard
from train.observability.profiler import StepProfiler
from train.observability.run_log import RunLog
from train.observability.step_metrics import StepMetrics, StepOutcome
from train.supervision.rank_progress import Progress
from train.supervision.step_errors import StepCheck, StepError
from train.supervision.stop_signal import StopSignal
from train.validation.held_out import HeldOut
from train.validation.live_answers import LiveAnswers


class Interrupted(Exception):
    """The run was asked to stop, or its time is over; everything up to `step` is saved."""

    def __init__(self, step: int, why: str = "") -> None:
        super().__init__(f"stopped after step {step}{why}")
        self.step = step


class Trainer:
    """Runs the steps of one stage.

    Args:
        config, world, engine, planner, log: the run's parts.
        batches: this rank's batches, from the step where the run starts.
        mixture: names the sources of the losses, and the samples of a step that cannot be right.
        progress: where this rank says how far it is.
        frozen: sums of the frozen parameters, for the checkpoints.
        num_skipped: steps that were left out before this start.
        deadline_s: on the monotonic clock: when it has passed, the run saves and leaves.
        held_out: what `evaluate.every` computes the loss of.
        live_answers: what the model is asked then.
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
        held_out: HeldOut | None = None,
        live_answers: LiveAnswers | None = None,
    ) -> None:
        self.config, self.world, self.engine = config, world, engine
        self.planner, self.batches, self.log = planner, batches, log
        self.source_names = mixture.source_names
        self.progress = progress or Progress(None)
        self.stop_signal = StopSignal()
        self.guard = StepGuard(engine, config)
        self.check = StepCheck(config, world, planner, mixture, log.say, num_skipped)
        self.metrics = StepMetrics(mixture.source_names, world)
        self.saver = Saver(config.run_dir / "checkpoints", world, config.save)
        self._frozen, self._deadline_s = frozen or {}, deadline_s
        self._save_s = 0.0
        self.held_out, self.live_answers = held_out, live_answers
        self.profiler = StepProfiler(config, world, log.say)

    def run(self, first_step: int, last_step: int) -> None:
        """Trains steps `first_step` to `last_step` - 1.

        Raises:
            Interrupted: asked to stop, or out of time; saved.
            StepError: a loss, a gradient or a count that cannot be right.
            OutOfMemory: a row did not fit.
            SaveError: a checkpoint could not be written.
        """
        num_steps = self.planner.num_steps
        seen = self.planner.seen(first_step)
        with self.stop_signal, self._saving_what_is_saved():
            for step in range(first_step, last_step):
                factor = schedule_factor(step, num_steps, self.config.stage)
                rates = set_rates(self.engine.optimizer.param_groups, factor)
                plan = self.planner.plan(step)
                self.profiler.before(step)
                outcome = self.train_step(plan)
                done = step + 1
                seen = seen + plan.sizes
                self.profiler.after(step, is_last=outcome.agreement.stop or done == last_step)
                evaluated = {} if outcome.agreement.stop else self._evaluate(done, last_step)
                values = self.metrics.of(plan, outcome) | {f"lr/{part}": rate for part, rate in rates.items()}
                values |= dict(zip(("seen/samples", "seen/tokens", "seen/tiles"), seen.tolist(), strict=True))
                if self._save_s:
                    values["perf/save_s"], self._save_s = self._save_s, 0.0  # of the save before this step
                self.log.step(step, values | evaluated)
                if outcome.agreement.sealed:
                    self.saver.finish()
                if outcome.agreement.stop or self._save_is_due(done, last_step):
                    self.save(done)
                if outcome.agreement.stop and done < last_step:
                    self.saver.wait()
                    raise Interrupted(done, "" if self.stop_signal.asked else self._why_out_of_time())
            self.saver.wait()

    def train_step(self, plan: StepPlan) -> StepOutcome:
        """Forward and backward of this rank's rows, and the optimizer's step.

        The loss of a row is its sum divided by what the whole step counts; DeepSpeed averages over ranks, hence the
        factor. So ranks, rows and budgets have no say in the gradient.

        Raises:
            StepError: nothing is supervised, in all or in one of the sources, or a number cannot be right and no
                more steps may be left out.
            OutOfMemory: a row did not fit.
        """
        self.check.before(plan)
        started = time.monotonic()
        waited = 0.0
        num_sources = len(self.source_names)
        sums = torch.zeros(2 * num_sources, dtype=torch.float64, device=self.world.device)
        for number in range(len(plan.rows)):
            self.progress.enter("data", plan.step, number)
            before = time.monotonic()
            batch = next(self.batches)
            waited += time.monotonic() - before
            try:
                loss = self._forward_backward(plan, number, batch)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise self.check.out_of_memory(plan, number, error) from error
                raise
            sums[:num_sources] += loss.by_source
            sums[num_sources:] += loss.tokens_by_source
        self.progress.enter("agree", plan.step)
        on_host = sums.cpu()
        agreement = all_reduce_step_state(
            self.world,
            on_host,
            stop=self.stop_signal.asked or time.monotonic() > self._deadline_s,
            sealed=self.saver.is_sealed,
            seconds=time.monotonic() - started - waited,
        )
        self.check.counts(plan, agreement.sums[num_sources:])
        bad = torch.nonzero(~torch.isfinite(agreement.sums[:num_sources]))[:, 0].tolist()
        self.progress.enter("update", plan.step)
        update = self.guard.step(refuse=bool(bad))
        if not update.applied:
            self.check.leave_out(plan, bad)
        return StepOutcome(agreement, update, time.monotonic() - started, waited)

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps. It has its name when every rank's files are on the disk, some steps later.

        Raises:
            SaveError: it could not be written.
        """
        self.progress.enter("save", step - 1)
        state = resume.run_state(
            step, self.planner.table.fingerprint, self.config, self.world, self.engine, self._frozen
        )
        self._save_s = self.saver.write(self.engine, state, to_yaml(self.config))

    @contextmanager
    def _saving_what_is_saved(self) -> Iterator[None]:
        """A checkpoint that is being brought to the disk is waited for, also after an error that every rank raises."""
        try:
            yield
        except StepError:
            self.saver.wait()
            raise

    def _forward_backward(self, plan: StepPlan, number: int, batch: Batch) -> LossSums:
        batch = batch.to(self.world.device)
        self.progress.enter("forward", plan.step, number)
        loss = LossSums(*self.engine(batch))
        self.progress.enter("backward", plan.step, number)
        self.engine.backward(loss.total * (self.world.size / plan.divisor))
        return loss

    def _evaluate(self, done: int, last_step: int) -> dict[str, float]:
        """Held-out losses and live answers after `done` steps, where they are due; nothing learned depends on them."""
        every = self.config.evaluate.every
        if self.held_out is None or every < 1 or (done % every and done != last_step):
            return {}
        enter = partial(self.progress.enter, "evaluate", done - 1)
        found = self.held_out.metrics(self.engine, self.world, enter)
        losses = ", ".join(f"{key.split('/')[1]} {found[key]:.4f}" for key in found if key.startswith("eval/"))
        self.log.say(f"held-out loss after step {done}: {losses}")
        if self.live_answers is not None:
            started = time.monotonic()
            self.log.answers(done - 1, self.live_answers.ask(self.engine, self.world, enter))
            found["perf/evaluate_s"] += time.monotonic() - started
        release_gathered(self.engine)
        return found

    def _save_is_due(self, done: int, last_step: int) -> bool:
        every = self.config.save.every
        return every > 0 and (done % every == 0 or done == last_step)

    def _why_out_of_time(self) -> str:
        return f" (time_limit_min={self.config.time_limit_min:g} is over)" if self.config.time_limit_min else ""

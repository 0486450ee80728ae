"""The order of a step, and of a run. Read this first.

A step: set the rates, take this rank's rows, forward and backward each, step, let the ranks agree, log, save if due,
leave if asked. What a step computes is a function of its number; this file holds no other state.
"""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import deepspeed
import numpy as np
import torch

from data_recipes.mixture import Mixture
from llava_next.batch import Batch
from llava_next.model import LossSums
from train import resume
from train.answers import LiveAnswers
from train.checkpoint import Saver
from train.compose import to_yaml
from train.config import RunConfig
from train.guard import StepGuard, Update
from train.heldout import HeldOut
from train.loader import Planner, StepPlan
from train.log import RunLog
from train.optim import schedule_factor, set_rates
from train.profiling import StepProfiler
from train.progress import Progress, sample_names
from train.rates import peak_tflops
from train.world import Agreement, World, agree, is_out_of_memory

_MOST_NAMED = 16


class StepError(RuntimeError):
    """A step whose numbers cannot be right; it was not applied."""


class OutOfMemory(RuntimeError):
    """A row did not fit into memory; the message says which, and what to change."""


class Interrupted(Exception):
    """The run was asked to stop, or its time is over; everything up to `step` is saved."""

    def __init__(self, step: int, why: str = "") -> None:
        super().__init__(f"stopped after step {step}{why}")
        self.step = step


@dataclass(frozen=True)
class StepOutcome:
    """A finished step: losses per source summed over ranks, what became of its gradient, and where the time went."""

    agreement: Agreement
    update: Update
    seconds: float
    data_wait_s: float


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
        self.mixture, self.source_names = mixture, mixture.source_names
        self.progress = progress or Progress(None)
        self.stop_signal = StopSignal()
        self.guard = StepGuard(engine, config)
        self.saver = Saver(config.run_dir / "checkpoints", world, config.save)
        self._frozen, self._num_skipped, self._deadline_s = frozen or {}, num_skipped, deadline_s
        self._save_s = 0.0
        self.held_out, self.live_answers = held_out, live_answers
        self.profiler = StepProfiler(config, world, log.say)
        self._peak_tflops = peak_tflops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None

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
                so_far = dict(zip(("seen/samples", "seen/tokens", "seen/tiles"), seen.tolist(), strict=True))
                self.log.step(step, self._metrics(plan, outcome, rates) | so_far | evaluated)
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
        if plan.num_supervised < 1:
            raise StepError(f"step {plan.step}: none of its tokens is supervised. {self._samples(plan)}")
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
                    raise OutOfMemory(self._about_row(plan, number, error)) from error
                raise
            sums[:num_sources] += loss.by_source
            sums[num_sources:] += loss.tokens_by_source
        self.progress.enter("agree", plan.step)
        on_host = sums.cpu()
        agreement = agree(
            self.world,
            on_host,
            stop=self.stop_signal.asked or time.monotonic() > self._deadline_s,
            sealed=self.saver.is_sealed,
            seconds=time.monotonic() - started - waited,
        )
        self._check(plan, agreement)
        bad = torch.nonzero(~torch.isfinite(agreement.sums[:num_sources]))[:, 0].tolist()
        self.progress.enter("update", plan.step)
        update = self.guard.step(refuse=bool(bad))
        if not update.applied:
            self._leave_out(plan, bad)
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
        return found

    def _save_is_due(self, done: int, last_step: int) -> bool:
        every = self.config.save.every
        return every > 0 and (done % every == 0 or done == last_step)

    def _check(self, plan: StepPlan, agreement: Agreement) -> None:
        num_sources = len(self.source_names)
        tokens = agreement.sums[num_sources:]
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

    def _leave_out(self, plan: StepPlan, bad: Sequence[int]) -> None:
        """Writes down a step that was not applied, and ends the run if it is one too many."""
        names = ", ".join(self.source_names[source] for source in bad)
        what = f"the loss of {names}" if bad else "the gradient"
        self._num_skipped += 1
        if self.world.is_main:
            samples = sample_names(self.planner, self.mixture, self.progress.now[0])
            with (self.config.run_dir / "non_finite.jsonl").open("a") as file:
                file.write(json.dumps({"step": plan.step, "what": what, "samples": samples}) + "\n")
        allowed = self.config.skip_non_finite
        told = f"step {plan.step}: {what} is not finite; the step was not applied"
        if self._num_skipped > allowed:
            raise StepError(
                f"{told}, and {allowed} such steps may be left out (skip_non_finite); non_finite.jsonl has all of its "
                f"samples. {self._samples(plan, bad or None)}"
            )
        self.log.say(f"{told} ({self._num_skipped} of at most {allowed}; its samples are in non_finite.jsonl)")

    def _about_row(self, plan: StepPlan, number: int, error: Exception) -> str:
        """Which row did not fit, and what to change; none of it changes what is learned."""
        rows = self.planner.table.rows[plan.rows[number]]
        tokens, tiles = rows["tokens"], rows["tiles"]
        packing = self.config.packing
        longest = f", the longest of {tokens.max():,} tokens" if len(rows) else ""
        return (
            f"step {plan.step}, micro-step {number}: a row of {tokens.sum():,} tokens and {tiles.sum():,} tiles "
            f"({len(rows)} samples{longest}) did not fit into memory. Lower packing.max_tokens ({packing.max_tokens}; "
            f"at least stage.max_length, {self.config.stage.max_length}) or packing.max_tiles ({packing.max_tiles}), "
            "set recompute=[language_model], or shard more (engine=zero3, or offload in the engine's dictionary): "
            f"nothing that is learned depends on them. It said: {str(error).splitlines()[0]}"
        )

    def _why_out_of_time(self) -> str:
        return f" (time_limit_min={self.config.time_limit_min:g} is over)" if self.config.time_limit_min else ""

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
        update = outcome.update
        values = {"train/loss": float(losses.sum()) / plan.divisor, "train/grad_norm": update.grad_norm}
        values |= {f"train/grad_norm/{part}": norm for part, norm in update.by_part.items()}
        if not update.applied:
            values["train/left_out"] = 1.0
        if self._save_s:
            values["perf/save_s"], self._save_s = self._save_s, 0.0  # of the save before this step
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
            "train/input_tokens": float(plan.num_tokens),
            "train/tiles": float(plan.num_tiles),
            "perf/tflops_per_rank": plan.flops / outcome.seconds / self.world.size / 1e12,
            "perf/balance": plan.balance,
            "perf/micro_steps": float(len(plan.rows)),
            "perf/max_memory_gib": max_memory_gib(self.world),
        }
        if self._peak_tflops is not None:
            values["perf/mfu"] = values["perf/tflops_per_rank"] / self._peak_tflops
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

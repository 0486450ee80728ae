"""Functions that ranks run in the test of the collective contract: the phases of a run on different rows, each
recorded.

The settings and the assertions are in `test_contract.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.train.cases import Array, Collective, Parts, built, recorded_collectives, weights
from train.config.schema import RunConfig

NUM_ROWS = 5
"""Rows of a step that hold samples; blank rows fill the micro-steps of the ranks."""
STEPS = ("first step", "learned trace", "another order of rows", "after an evaluation", "after a resume", "once more")
LAST_BEFORE_SAVE = 4


@dataclass
class Phase:
    """A phase of a run on one rank: the kinds of its rows, its collectives in order, and its values."""

    name: str
    kinds: list[str] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class Report:
    """All phases of a rank; the last one is incomplete if there is an `error`. `after`: weights, on rank 0."""

    phases: list[Phase] = field(default_factory=list)
    after: dict[str, Array] = field(default_factory=dict)
    before: dict[str, Array] = field(default_factory=dict)
    error: str = ""


def run_phases(config: RunConfig, resumed: RunConfig | None, timeout_s: int) -> Report:
    """Steps, an evaluation with answers, a step; a checkpoint, a new engine that resumes from it, steps.

    A collective that waits for `timeout_s` ends the phase: the report then shows where the ranks' sequences part.

    Args:
        config: of the run; its steps, not its stage, say what is trained on (see `STEPS`).
        resumed: the same run as it resumes, perhaps at another ZeRO stage; None: the first engine makes all steps.
        timeout_s: for a collective.
    """
    report = Report()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _timeout(timeout_s), patch("llava_next.model.loss.CHUNK_LOGITS", 16 * 520):
            _train(config, resumed, report)
    except RuntimeError:
        import traceback

        report.error = traceback.format_exc()
    return report


def reference(config: RunConfig) -> Report:
    """Runs the same steps on one rank with one engine."""
    return run_phases(config, None, 60)


def _train(config: RunConfig, resumed: RunConfig | None, report: Report) -> None:
    with built(config) as parts:
        if resumed is None:  # not otherwise: it would divide again what an engine starts with gathered
            report.before = weights(parts)
        step = _Stepper(parts, report)
        for number in range(LAST_BEFORE_SAVE):
            if number == LAST_BEFORE_SAVE - 1:
                step.evaluate("evaluation")
            step(number)
        step.evaluate("evaluation before a save")
        if resumed is None:
            for number in range(LAST_BEFORE_SAVE, len(STEPS)):
                step(number)
            step.evaluate("evaluation at the end")
            report.after = weights(parts)
            return
        with _recorded(report, "save"):
            _save(parts, LAST_BEFORE_SAVE)
    with _recorded(report, "resume"), built(resumed, goes_on=True) as parts:
        assert parts.first_step == LAST_BEFORE_SAVE
        step = _Stepper(parts, report)
        for number in range(LAST_BEFORE_SAVE, len(STEPS)):
            step(number)
        step.evaluate("evaluation at the end")
        report.after = weights(parts)  # gathered as the result's writers gather them


class _Stepper:
    """Trains steps of different rows with one trainer."""

    def __init__(self, parts: Parts, report: Report) -> None:
        from train.data.loader import RowDataset
        from train.engine.optimizer import set_rates
        from train.observability.run_log import RunLog
        from train.trainer import Trainer

        self._parts, self._report = parts, report
        self._encode = RowDataset(parts.mixture, parts.table, parts.processor, False, read_retries=0)
        log = RunLog(parts.config, is_main=False, first_step=0, num_steps=1)
        self._trainer = Trainer(parts.config, parts.world, parts.engine, parts.planner, iter(()), log, parts.mixture)
        set_rates(parts.engine.optimizer.param_groups, 1.0)

    def __call__(self, number: int) -> None:
        parts = self._parts
        rows = _rows(parts, number)
        mine = _deal(list(rows), parts.world.size, number)[parts.world.rank]
        samples = np.concatenate(list(rows.values()))
        supervised = int(parts.table.rows["supervised"][samples].sum())
        plan = replace(
            parts.planner.plan(0),
            step=number,
            samples=samples,
            rows=tuple(rows[kind] if kind else samples[:0] for kind in mine),
            num_supervised=supervised,
            divisor=float(supervised),
        )
        self._trainer.batches = (self._encode[row] for row in plan.rows)
        with _recorded(self._report, STEPS[number]) as phase:
            phase.kinds = [kind or "blank" for kind in mine]
            outcome = self._trainer.train_step(plan)
            num_sources = len(parts.mixture.source_names)
            sums = outcome.agreement.sums.tolist()
            phase.values = [sum(sums[:num_sources]) / plan.divisor, outcome.update.grad_norm]

    def evaluate(self, name: str) -> None:
        """Runs the trainer's evaluation, with answers of the live model."""
        from train.run import build_validation

        parts, trainer = self._parts, self._trainer
        config = parts.config
        trainer.held_out, trainer.live_answers = build_validation(
            config, parts.mixture, parts.backbone, parts.processor, parts.planner
        )
        answers: list[Any] = []
        trainer.log.log_answers = lambda _, output: answers.extend(output)  # type: ignore[method-assign, assignment]
        with _recorded(self._report, name) as phase:
            result = trainer._evaluate(config.evaluate.every, 0)
            phase.values = [result[key] for key in sorted(result) if key.startswith("eval/")]
            phase.values += [float(token) for answer in answers for token in answer.ids]


def _rows(parts: Parts, number: int) -> dict[str, Array]:
    """Returns the rows of a step by kind, as positions in the length table; each step has other samples."""
    table = parts.table.rows
    num_images = np.array([len(parts.mixture.text(int(sample)).sizes_hw) for sample in table["sample"]])
    text, image, images = (np.roll(np.flatnonzero(num_images == n), -3 * number) for n in (0, 1, 2))
    kinds = {
        "text": text[:1],
        "texts": text[1:4],
        "image": image[:1],
        "images": images[:1],
        "mixed": np.concatenate([image[1:3], text[4:5], images[1:2]]),
    }
    assert len(kinds) == NUM_ROWS
    return kinds


def _deal(kinds: list[str], num_ranks: int, shift: int) -> list[list[str | None]]:
    """Returns the kinds of each rank's rows, None for a blank one; in each step every rank begins with another kind."""
    num_micro_steps = -(-len(kinds) // num_ranks) if num_ranks == 1 else -(-(len(kinds) + 1) // num_ranks)
    cells: list[str | None] = [*kinds, *[None] * (num_micro_steps * num_ranks - len(kinds))]
    turned = cells[shift % len(cells) :] + cells[: shift % len(cells)]
    return [turned[rank::num_ranks] for rank in range(num_ranks)]


def _save(parts: Parts, step: int) -> None:
    from train.checkpoint.resume import make_run_state
    from train.checkpoint.saver import Saver
    from train.config.compose import to_yaml

    saver = Saver(parts.config.run_dir / "checkpoints", parts.world, parts.config.save)
    state = make_run_state(step, parts.table.fingerprint, parts.config, parts.world, parts.engine, parts.frozen)
    saver.write(parts.engine, state, to_yaml(parts.config))
    saver.wait()


@contextmanager
def _recorded(report: Report, name: str) -> Iterator[Phase]:
    """Records a phase, with its collectives even if it ends with an error. A phase inside another ends that."""
    phase = Phase(name)
    report.phases.append(phase)
    with recorded_collectives() as seen:
        try:
            yield phase
        finally:
            phase.collectives = seen


@contextmanager
def _timeout(seconds: int) -> Iterator[None]:
    """A collective of the default group waits that long; `train.distributed.world.start` gives the others the run's
    timeout."""
    from torch.distributed import distributed_c10d

    remaining: Callable[[timedelta], Any] = distributed_c10d._set_pg_timeout
    remaining(timedelta(seconds=seconds))
    try:
        yield
    finally:
        remaining(timedelta(seconds=600))

"""Runs in which one bit changes on one rank, for ranks to run. The assertions are in the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch

from tests.train.cases import Record, built, train_parts
from train.config.schema import RunConfig


@dataclass(frozen=True)
class Flip:
    """A bit of one value that changes on one rank.

    Attributes:
        where: `activation`: the output of the language model's first block at position 0, which other positions attend
            to. `gradient`: of a row, as the backward pass
            computes it. `buffer`: the same gradient after the verification has seen it, before it is reduced. `share`:
            a reduced gradient. `weight`, `moment`: of the last language model block, before the step.
        rank: on which it changes.
        bit: of an fp32 value: from 0 (the last of the mantissa) to 31 (the sign).
        in_pass: 1 or 2, the computation of the step in which it changes.
        step: from 0.
    """

    where: Literal["activation", "gradient", "buffer", "share", "weight", "moment"]
    rank: int
    bit: int = 0
    in_pass: int = 2
    step: int = 1


@dataclass
class Found:
    """The message of the error that ended the run, with its rank; steps that were finished."""

    message: str = ""
    rank: int | None = None
    num_steps: int = 0


def flip_bit(tensor: torch.Tensor, bit: int, index: int | None = None) -> None:
    """Flips one bit of an fp32 tensor, in place: of the value at `index`, by default of that with the largest
    magnitude."""
    with torch.no_grad():
        flat = tensor.detach().view(-1)
        index = int(flat.abs().argmax()) if index is None else index
        value = flat[index : index + 1].clone()
        value.view(torch.int32).bitwise_xor_(torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32))
        flat[index : index + 1] = value


def run_with_flip(config: RunConfig, flip: Flip) -> Found:
    """Trains all steps with a flip; every rank returns what it found."""
    from train.data.loader import StepPlan
    from train.observability.step_metrics import StepOutcome
    from train.supervision.step_errors import CorruptionError
    from train.trainer import Trainer

    found, train_step = Found(), Trainer.train_step

    def counted(self: Trainer, plan: StepPlan) -> StepOutcome:
        outcome = train_step(self, plan)
        found.num_steps += 1
        return outcome

    with (
        built(config) as parts,
        patch.object(Trainer, "train_step", counted),
        _Fault(parts.world.rank, parts.engine, flip).installed(),
    ):
        try:
            train_parts(parts, 0, parts.planner.num_steps)
        except CorruptionError as error:
            found.message, found.rank = str(error), error.rank
    return found


def run_program_with_flip(config: RunConfig, flip: Flip) -> int:
    """The program from its checked configuration on, with a flip of a gradient; returns the exit code."""
    from train.__main__ import execute
    from train.trainer import Trainer

    run = Trainer.run

    def faulty(self: Trainer, *steps: int) -> None:
        with _Fault(self.world.rank, self.engine, flip).installed():
            run(self, *steps)

    with patch.object(Trainer, "run", faulty):
        return execute(config)


class _Fault:
    """Changes one bit once, when a hook of `installed` is called in the step and the pass of the flip."""

    def __init__(self, rank: int, engine: Any, flip: Flip) -> None:
        self._rank, self._engine, self._flip = rank, engine, flip
        self._is_armed = False
        blocks = engine.module.get_submodule(engine.module.blocks["language_model"])
        self._first_block = blocks[0]
        self._parameter = blocks[-1].mlp.down_proj.weight

    def _begin(self, step: int, in_pass: int) -> None:
        flip = self._flip
        self._is_armed = self._rank == flip.rank and (step, in_pass) == (flip.step, flip.in_pass)
        if flip.where == "weight":
            self._flip_once(self._parameter.data)
        elif flip.where == "moment" and self._is_armed:
            self._flip_once(self._engine.basic_optimizer.state[self._parameter]["exp_avg_sq"])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Registers the hook of the flip, and learns from the trainer which step and which pass it is."""
        from train.data.loader import StepPlan
        from train.trainer import Trainer

        train_step, compute = Trainer.train_step, Trainer._compute_without_update

        def step(trainer: Trainer, plan: StepPlan) -> Any:
            self._begin(plan.step, in_pass=2)
            return train_step(trainer, plan)

        def first(trainer: Trainer, plan: StepPlan, rows: Any) -> Any:
            self._begin(plan.step, in_pass=1)
            values = compute(trainer, plan, rows)
            self._begin(plan.step, in_pass=2)
            return values

        with (
            self._hooked(),
            patch.object(Trainer, "train_step", step),
            patch.object(Trainer, "_compute_without_update", first),
        ):
            yield

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        from train.engine.gradient_checksums import watch_gradients

        @contextmanager
        def watch_then_flip(*args: Any) -> Iterator[None]:
            with watch_gradients(*args):
                handle = self._parameter.register_hook(self._flipped)  # called after those that watch
                yield
                handle.remove()

        where = self._flip.where
        if where == "activation":
            handle = self._first_block.register_forward_hook(lambda *args: self._flipped_output(args[-1]))
        elif where == "gradient":
            handle = self._parameter.register_hook(self._flipped)
        elif where == "share":
            handle = self._engine.basic_optimizer.register_step_pre_hook(lambda optimizer, *_: self._flip_share())
        else:
            watch = watch_then_flip if where == "buffer" else watch_gradients
            with patch("train.supervision.step_verification.watch_gradients", watch):
                yield
            return
        yield
        handle.remove()

    def _flipped(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        self._flip_once(gradient)
        return gradient

    def _flipped_output(self, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        self._flip_once(states, 0)
        return output

    def _flip_share(self) -> None:
        groups = self._engine.basic_optimizer.param_groups
        gradients = [each.grad for group in groups for each in group["params"] if each.grad is not None]
        self._flip_once(max(gradients, key=lambda gradient: gradient.numel()))

    def _flip_once(self, tensor: torch.Tensor, index: int | None = None) -> None:
        if self._is_armed:
            flip_bit(tensor, self._flip.bit, index)
            self._is_armed = False


def train_with_spike(config: RunConfig, step: int, factor: float) -> tuple[Record, str]:
    """Trains, with the loss of a step multiplied by a factor; steps have a score after two others. Returns the record
    and the message of the error that ended the run, if one did."""
    from llava_next.model.llava_next import LlavaNext
    from train.data.loader import StepPlan
    from train.supervision.step_errors import LossSpike
    from train.trainer import Trainer

    forward, train_step = LlavaNext.forward, Trainer.train_step
    factors = [1.0]

    def scaled(self: LlavaNext, batch: Any, **options: Any) -> Any:
        total, by_source, tokens = forward(self, batch, **options)
        return total * factors[0], by_source * factors[0], tokens

    def watched(self: Trainer, plan: StepPlan) -> Any:
        factors[0] = factor if plan.step == step else 1.0
        return train_step(self, plan)

    seen: list[Record] = []
    message = ""
    with (
        patch.object(LlavaNext, "forward", scaled),
        patch.object(Trainer, "train_step", watched),
        patch("train.observability.loss_spikes.MIN_STEPS", 2),
        built(config, goes_on=True) as parts,
    ):
        try:
            train_parts(parts, parts.first_step, parts.planner.num_steps, seen=seen)
        except LossSpike as error:
            message = str(error)
    return seen[0], message


def verified_and_not(config: RunConfig) -> list[Any]:
    """Trains the run without verification, then with a verification of every step; returns both records."""
    from train.config.schema import VerifyConfig

    records = []
    for name, every in (("plain", 0), ("verified", 1)):
        run = replace(config, name=name, verify=VerifyConfig(every))
        with built(run) as parts:
            record = train_parts(parts, 0, parts.planner.num_steps)
            states = parts.engine.basic_optimizer.state.values()
            records.append((record, sorted({int(state["step"]) for state in states if state})))
    return records

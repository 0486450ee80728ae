"""Finds values that a rank's memory, processor or network has changed without an error (`verify.every`).

Every `verify.every`-th step is computed twice on the same rows, first without its update. A step has no randomness,
since models with dropout are refused, so both passes must agree. Compared are

- before the step, the tensors that every rank holds (at ZeRO-3 the buffers only; at ZeRO-0 the moments too);
- in each rank, its loss sums by source, and the gradients of its own rows by part, before they are reduced;
- in each rank, the reduced gradients that its optimizer is given, by part: at ZeRO-0 all of them, else its partition.

Gradients are compared by a checksum of their bits where the kernels are deterministic: on a CPU, and on a GPU with
`deterministic=true`, except for kernels that do not obey it (flash_attention_2 and _3, liger). Elsewhere losses and
gradient norms may differ by `LOSS_TOLERANCE` and `NORM_TOLERANCE`, which hides smaller changes.

A value that is wrong in both passes is not found: a processor that repeats its error, or a changed value of which there
is one copy only (the partitions of weights at ZeRO-3, of fp32 weights and moments at ZeRO 1 to 3).
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from train.config.schema import RunConfig
from train.distributed.world import World, all_gather_objects
from train.engine.deepspeed_engine import zero_stage
from train.engine.gradient_checksums import GradientChecksum, GradientChecksums, watch_gradients
from train.engine.replica_checksums import outvoted_ranks, replicated_tensors, tensor_sums
from train.supervision.step_errors import CorruptionError

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 1e-2
"""Largest relative differences of losses and of gradient norms where the kernels are not deterministic."""
_CLIP_TOLERANCE = 1e-5
"""A rank whose reduced gradients differ by less has only been clipped differently, because of another rank's."""
_MAX_NAMED = 4


class PassValues:
    """What this rank has computed in one pass over a step.

    Attributes:
        losses: loss sum of each source in this rank's rows, float64 [num_sources].
        gradients: of this rank's rows, before they are reduced.
        shares: the reduced gradients that this rank's optimizer was given.
        clip_factor: what `shares` were divided by.
    """

    def __init__(self) -> None:
        self.losses = torch.zeros(0)
        self.gradients, self.shares = GradientChecksums(), GradientChecksums()
        self.clip_factor = 1.0

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Context manager around the forward and backward passes of all rows: adds their gradients."""
        with watch_gradients(model, self.gradients):
            yield


class StepVerifier:
    """Compares two passes over the same step, and the ranks' replicas. Every rank must make the same calls.

    Args:
        config, world, engine: of the run.
        source_names: of the mixture, in the order of the losses.
    """

    def __init__(
        self, config: RunConfig, world: World, engine: deepspeed.DeepSpeedEngine, source_names: Sequence[str]
    ) -> None:
        self._every, self._stage = config.verify.every, zero_stage(config)
        self._world, self._engine, self._source_names = world, engine, source_names
        self._is_exact = has_deterministic_kernels(config, world.device.type)

    def is_due(self, step: int) -> bool:
        """Whether this step, counted from 0, is computed twice."""
        return self._every > 0 and (step + 1) % self._every == 0

    def check_replicas(self, step: int) -> None:
        """Compares the tensors that every rank holds.

        Raises:
            CorruptionError: on every rank, with the ranks that differ from most, or all if there is no majority.
        """
        if self._world.size == 1:
            return
        tensors = replicated_tensors(self._engine.module)
        if self._stage == 0:
            tensors |= self._moments()
        gathered = all_gather_objects(self._world, (socket.gethostname(), tensor_sums(tensors.values()).tolist()))
        outvoted = outvoted_ranks([sums for _, sums in gathered])
        if outvoted:
            names = list(tensors)
            found = {rank: [names[position] for position in positions] for rank, positions in outvoted.items()}
            what = "holds other values than most ranks of a tensor that is equal on all"
            if len(found) == self._world.size:
                what = "differs from the others, and no majority shows which is right"
            raise _make_error(f"before step {step}", what, found, [host for host, _ in gathered])

    def compare(self, step: int, first: PassValues, second: PassValues) -> None:
        """Compares the two passes of this step on all ranks.

        Raises:
            CorruptionError: on every rank, with the ranks whose own values differ; if there is none, with those whose
                reduced gradients differ.
        """
        own = self._compare_losses(first.losses, second.losses)
        own += self._compare_gradients("gradient", first.gradients.read(), second.gradients.read())
        shares = [_unclipped(values) for values in (first, second)]
        reduced = self._compare_gradients("reduced gradient", *shares)
        is_clipped_alike = first.clip_factor == second.clip_factor
        is_larger = is_clipped_alike or any(_differ(*pair, _CLIP_TOLERANCE) for pair in _pair_norms(*shares))
        gathered = all_gather_objects(self._world, (socket.gethostname(), own, reduced, is_larger))
        hosts = [host for host, *_ in gathered]
        found = {rank: own for rank, (_, own, _, _) in enumerate(gathered) if own}
        when = f"step {step} was computed twice on the same rows"
        if found:
            raise _make_error(when, "computed other values the second time", found, hosts)
        found = {rank: reduced for rank, (_, _, reduced, _) in enumerate(gathered) if reduced}
        # A change that alters the norm of all gradients alters what every rank's are divided by.
        found = {rank: reduced for rank, reduced in found.items() if gathered[rank][3]} or found
        if found:
            what = (
                "holds other reduced gradients the second time, although the gradients of every rank's own rows were "
                "equal, so they changed there, on the network or in a buffer of another rank"
            )
            raise _make_error(when, what, found, hosts)

    def _moments(self) -> dict[str, torch.Tensor]:
        """The moments of every parameter at ZeRO-0; empty before the first update."""
        states = self._engine.basic_optimizer.state
        return {
            f"{key} of {name}": value
            for name, parameter in self._engine.module.named_parameters()
            for key, value in states.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def _compare_losses(self, first: torch.Tensor, second: torch.Tensor) -> list[str]:
        tolerance = 0.0 if self._is_exact else LOSS_TOLERANCE
        return [
            f"loss sum of {name} {a:.9g}, then {b:.9g}"
            for name, a, b in zip(self._source_names, first.tolist(), second.tolist(), strict=True)
            if _differ(a, b, tolerance)
        ]

    def _compare_gradients(
        self, what: str, first: Mapping[str, GradientChecksum], second: Mapping[str, GradientChecksum]
    ) -> list[str]:
        """Describes the parts whose gradients differ; a part that only one pass has counts as different."""
        differences = []
        for part in dict.fromkeys([*first, *second]):
            a, b = first.get(part, _ABSENT), second.get(part, _ABSENT)
            differs = a.bits != b.bits if self._is_exact else _differ(a.norm, b.norm, NORM_TOLERANCE)
            if differs or (part in first) != (part in second):
                bits = "" if a.norm != b.norm else " with other bits"
                differences.append(f"{what} of {part} of norm {a.norm:.9g}, then {b.norm:.9g}{bits}")
        return differences


_ABSENT = GradientChecksum(0, float("nan"))


def has_deterministic_kernels(config: RunConfig, device_type: str) -> bool:
    """Whether a step that is computed again gives the same bits.

    Args:
        config: of the run.
        device_type: "cpu" or "cuda".
    """
    if device_type == "cpu":
        return True
    return config.deterministic and not config.liger and not config.attention.startswith("flash_attention")


def _unclipped(values: PassValues) -> dict[str, GradientChecksum]:
    """The shares with their norms before clipping; the bits are those after it."""
    factor = values.clip_factor
    return {part: GradientChecksum(bits, factor * norm) for part, (bits, norm) in values.shares.read().items()}


def _pair_norms(
    first: Mapping[str, GradientChecksum], second: Mapping[str, GradientChecksum]
) -> Iterator[tuple[float, float]]:
    for part in {*first, *second}:
        yield first.get(part, _ABSENT).norm, second.get(part, _ABSENT).norm


def _differ(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers differ by more than a share of the larger one. NaN equals NaN only."""
    if a == b or (a != a and b != b):
        return False
    return not abs(a - b) <= tolerance * max(abs(a), abs(b)) < float("inf")


def _make_error(when: str, what: str, found: Mapping[int, Sequence[str]], hosts: Sequence[str]) -> CorruptionError:
    """Returns the error for these ranks.

    Args:
        when: the step.
        what: what is wrong with each of the ranks.
        found: what differs, by rank.
        hosts: of all ranks.
    """
    names = ", ".join(f"{rank} ({hosts[rank]})" for rank in found)
    first, details = next(iter(found.items()))
    more = f" and {len(details) - _MAX_NAMED} more" if len(details) > _MAX_NAMED else ""
    fix = f"exclude its host (Slurm: --exclude={hosts[first]})" if len(found) == 1 else "test these hosts"
    return CorruptionError(
        f"{when}: rank{'s' if len(found) > 1 else ''} {names} {what}: {', '.join(details[:_MAX_NAMED])}{more} (on rank "
        f"{first}). Memory, a processor or the network has changed data: {fix} and run the same command again, which "
        "continues from the newest checkpoint",
        rank=first,
        host=hosts[first],
    )

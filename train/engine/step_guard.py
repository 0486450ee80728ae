"""Applies the optimizer's step unless loss or gradient is non-finite, and computes gradient norms.

At ZeRO 1 to 3 DeepSpeed skips a step with non-finite gradients; at ZeRO 0 it would apply it, and computes no norm. So
at ZeRO 0 norm and clipping are computed here, in a hook before the optimizer's step, and at any stage the hook can skip
the step.
"""

from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from train.config.schema import RunConfig
from train.distributed.device_copies import to_host
from train.engine.deepspeed_engine import zero_stage
from train.engine.gradient_checksums import GradientChecksums

_NUM_AT_ONCE = 2**18
"""Largest number of values in one norm: a CPU sums in fp32, which is inaccurate for hundreds of millions of values."""


class Update(NamedTuple):
    """The result of a step.

    Attributes:
        applied: whether the optimizer has changed weights and moments.
        grad_norm: the norm of all gradients before clipping.
        by_part: the norm of each trained part's gradients before clipping; NaN in a step that DeepSpeed has skipped.
        clip_factor: what DeepSpeed has divided the gradients by before the optimizer's step; 1 if it has not clipped.
    """

    applied: bool
    grad_norm: float
    by_part: dict[str, float]
    clip_factor: float = 1.0


class StepGuard:
    """Steps an engine's optimizer, through hooks before and after the optimizer's own step.

    Args:
        engine: of the run.
        config: of the run; its ZeRO stage and clip norm are read.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> None:
        self._engine = engine
        self._clips_here = zero_stage(config) == 0
        self._clip_norm = config.stage.clip_norm or float("inf")
        self._refuse = self._skipped = False
        self._norm = float("nan")
        self._squares: dict[str, torch.Tensor] = {}
        self._shares: GradientChecksums | None = None
        self._removed_gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        engine.basic_optimizer.register_step_pre_hook(self._before)
        engine.basic_optimizer.register_step_post_hook(self._after)

    def step(self, *, refuse: bool, shares: GradientChecksums | None = None) -> Update:
        """Runs the engine's step. Every rank must call it.

        Args:
            refuse: change neither weights nor moments.
            shares: gets the reduced gradients that this rank's optimizer is given: all of them at ZeRO 0, else its
                partition, after DeepSpeed has clipped it.
        """
        self._refuse, self._skipped, self._squares, self._shares = refuse, False, {}, shares
        self._engine.step()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        total_norm = self._norm if self._clips_here else self._engine.get_global_grad_norm()
        if isinstance(total_norm, torch.Tensor):
            total_norm = to_host(total_norm)
        norm = float(total_norm) if total_norm is not None else float("nan")
        # DeepSpeed's hook sees clipped gradients; its formula is inverted.
        factor = 1.0 if self._clips_here else max(1.0, (norm + 1e-6) / self._clip_norm)
        return Update(not (self._skipped or overflow), norm, self._norms_by_part(factor), factor)

    def _norms_by_part(self, factor: float) -> dict[str, float]:
        """Each part's norm before clipping, with one collective and one device synchronisation."""
        parts = list(dict.fromkeys(group["part"] for group in self._engine.optimizer.param_groups))
        unknown = torch.full((), float("nan"), device=self._engine.device)
        squares = torch.stack([self._squares.get(part, unknown) for part in parts])
        if not self._clips_here and dist.get_world_size() > 1:  # under ZeRO gradients are partitioned
            dist.all_reduce(squares)
        return {part: factor * square**0.5 for part, square in zip(parts, to_host(squares).tolist(), strict=True)}

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._add_squares(optimizer)
        if self._clips_here:
            norm = torch.stack(list(self._squares.values())).sum() ** 0.5
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
            self._norm = float(to_host(norm))
        if self._refuse or (self._clips_here and not self._norm < float("inf")):
            self._skipped = True
            # AdamW skips parameters without a gradient. DeepSpeed's buffers are restored afterwards.
            self._removed_gradients = [
                (parameter, parameter.grad) for parameter in parameters if parameter.grad is not None
            ]
            for parameter, _gradient in self._removed_gradients:
                parameter.grad = None

    def _add_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the squared norms of an optimizer call's gradients to those of their parts.

        DeepSpeed calls the optimizer for all groups, for each group or for pieces of one, with whole parameters or flat
        partitions of them.
        """
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                pieces = [piece for gradient in gradients for piece in gradient.flatten().split(_NUM_AT_ONCE)]
                square = torch.nn.utils.get_total_norm(pieces).to(self._engine.device) ** 2
                self._squares[group["part"]] = self._squares.get(group["part"], 0) + square
            if self._shares is not None:
                for gradient in gradients:
                    self._shares.add(group["part"], gradient)

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._removed_gradients:
            parameter.grad = gradient
        self._removed_gradients = []

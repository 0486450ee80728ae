"""The optimizer's step, unless loss or gradient is non-finite; and the gradient's norm, of all parts and of each.

DeepSpeed leaves out a step whose gradients are not finite at ZeRO 1 to 3; at ZeRO 0 it would apply it, and knows no
norm. So there the norm and the clipping are done here, just before the optimizer; and at any stage the optimizer can be
told to do nothing.
"""

from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from train.config.schema import RunConfig
from train.engine.deepspeed_engine import zero_stage

_NUM_AT_ONCE = 2**18
"""Numbers that one norm takes: a CPU adds up in fp32, which hundreds of millions of them are too many for."""


class Update(NamedTuple):
    """Whether the optimizer was applied; the norm of all gradients before clipping, and that of each trained part's.

    The parts' are not known of a step that DeepSpeed has left out (nan).
    """

    applied: bool
    grad_norm: float
    by_part: dict[str, float]


class StepGuard:
    """Stands before the optimizer of an engine.

    Args:
        engine: of the run.
        config: of the run: ZeRO stage and clipping.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> None:
        self._engine = engine
        self._clips_here = zero_stage(config) == 0
        self._clip_norm = config.stage.clip_norm or float("inf")
        self._refuse = self._left_out = False
        self._norm = float("nan")
        self._squares: dict[str, torch.Tensor] = {}
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        engine.basic_optimizer.register_step_pre_hook(self._before)
        engine.basic_optimizer.register_step_post_hook(self._after)

    def step(self, *, refuse: bool) -> Update:
        """The engine's step; `refuse` lets it do everything but change weights and moments."""
        self._refuse, self._left_out, self._squares = refuse, False, {}
        self._engine.step()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        known = self._norm if self._clips_here else self._engine.get_global_grad_norm()
        norm = float(known) if known is not None else float("nan")
        return Update(not (self._left_out or overflow), norm, self._by_part(norm))

    def _by_part(self, norm: float) -> dict[str, float]:
        """Each part's norm before clipping, in one message and one wait for the device. Every rank must ask."""
        parts = list(dict.fromkeys(group["part"] for group in self._engine.optimizer.param_groups))
        unknown = torch.full((), float("nan"), device=self._engine.device)
        squares = torch.stack([self._squares.get(part, unknown) for part in parts])
        if not self._clips_here and dist.get_world_size() > 1:  # under ZeRO a rank holds a share of the gradients
            dist.all_reduce(squares)
        # By DeepSpeed's formula, which brings clipped gradients.
        clipped = 1.0 if self._clips_here else max(1.0, (norm + 1e-6) / self._clip_norm)
        return {part: clipped * square**0.5 for part, square in zip(parts, squares.tolist(), strict=True)}

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._add_squares(optimizer)
        if self._clips_here:
            norm = torch.stack(list(self._squares.values())).sum() ** 0.5
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
            self._norm = float(norm)
        if self._refuse or (self._clips_here and not self._norm < float("inf")):
            self._left_out = True
            # AdamW passes over what has no gradient. DeepSpeed's own buffers are put back afterwards.
            self._kept = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            for parameter, _gradient in self._kept:
                parameter.grad = None

    def _add_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed calls the optimizer once for all groups, for each, or for pieces of each, with whole parameters or
        flat shares of them: whatever it brings is the group's part's."""
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                pieces = [piece for gradient in gradients for piece in gradient.flatten().split(_NUM_AT_ONCE)]
                square = torch.nn.utils.get_total_norm(pieces).to(self._engine.device) ** 2
                self._squares[group["part"]] = self._squares.get(group["part"], 0) + square

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []

"""The optimizer's step, unless a number in it is none.

DeepSpeed leaves out a step whose gradients are not finite at ZeRO 1 to 3; at ZeRO 0 it would apply it, and knows no
norm. So there the norm and the clipping are done here, just before the optimizer; and at any stage the optimizer can be
told to do nothing.
"""

from typing import Any, NamedTuple

import deepspeed
import torch

from train.config import RunConfig
from train.engine import zero_stage


class Update(NamedTuple):
    """Whether the optimizer was applied, and the norm of all gradients before clipping."""

    applied: bool
    grad_norm: float


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
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        engine.basic_optimizer.register_step_pre_hook(self._before)
        engine.basic_optimizer.register_step_post_hook(self._after)

    def step(self, *, refuse: bool) -> Update:
        """The engine's step; `refuse` lets it do everything but change weights and moments."""
        self._refuse, self._left_out = refuse, False
        self._engine.step()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        norm = self._norm if self._clips_here else self._engine.get_global_grad_norm()
        return Update(not (self._left_out or overflow), float(norm) if norm is not None else float("nan"))

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._clips_here:
            self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm))
        if self._refuse or (self._clips_here and not self._norm < float("inf")):
            self._left_out = True
            # AdamW passes over what has no gradient. DeepSpeed's own buffers are put back afterwards.
            self._kept = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            for parameter, _gradient in self._kept:
                parameter.grad = None

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []

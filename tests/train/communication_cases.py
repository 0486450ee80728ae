"""Functions that ranks run in the tests of how gradients are summed, and where a start at ZeRO-3 allocates."""

import zlib
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.train.cases import Array, _step, built, recorded_collectives
from train.config.schema import RunConfig


def reduction_dtypes(config: RunConfig) -> set[str]:
    """The data types that a step reduces; `Double` is that of the step's own sums."""
    with built(config) as parts:
        with recorded_collectives() as seen:
            _step(parts, parts.planner.plan(0))
        return {dtype for each in seen if "reduce" in each.kind for dtype in each.dtypes}


def gradients(config: RunConfig, rows: str, num_micro_steps: int) -> dict[str, Array]:
    """The whole gradients of one step before the update, by parameter, on rank 0.

    Args:
        rows: "equal": every micro-step of every rank has the same row, and the same gradients before the reduction,
            which are drawn, because products in bf16 may differ in bits from process to process; "different": each rank
            has another row.
    """
    from deepspeed.utils import safe_get_full_grad

    from train.data.loader import RowDataset

    with built(config) as parts:
        encode = RowDataset(parts.mixture, parts.table, parts.processor, False, read_retries=0)
        samples = np.flatnonzero(np.asarray(parts.table.rows["tiles"]) > 0)
        number = parts.world.rank if rows == "different" else 0
        if rows == "equal":
            for name, parameter in parts.model.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(partial(_drawn, zlib.crc32(name.encode())))
        for _ in range(num_micro_steps):
            total, *_ = parts.engine(encode[samples[number : number + 1]])
            parts.engine.backward(total / 100.0)
        whole = {}
        for name, parameter in parts.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                whole[name] = gradient.float().cpu().numpy().copy()
        return whole if parts.world.is_main else {}


def _drawn(seed: int, gradient: torch.Tensor) -> torch.Tensor:
    values = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed))
    return (values / 1000).to(gradient.dtype)


def materialized_on(config: RunConfig) -> set[str]:
    """The devices on which a start at ZeRO-3 allocates parameters that this rank receives; the rank's is `cpu:0`."""
    from unittest.mock import patch

    import torch

    from train.engine import deepspeed_engine
    from train.engine.sharded_model import materialize

    devices = set()

    def watched(module: Any, device: torch.device, replaced: dict[Any, Any]) -> None:
        num_before = len(replaced)
        materialize(module, device, replaced)
        if len(replaced) > num_before:
            devices.add(str(device))

    with (
        patch.object(deepspeed_engine, "materialize", watched),
        patch("train.distributed.world.choose_device", lambda *_: torch.device("cpu", 0)),
        built(config),
    ):
        return devices

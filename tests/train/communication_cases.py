"""Functions that ranks run in the tests of what a step communicates and of how exactly gradients are summed."""

import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.train.cases import Array, Collective, Parts, _step, built, recorded_collectives
from train.config.schema import RunConfig


@dataclass
class Sizes:
    """What a rank's step has sent, and the elements of its model; `steps`: collectives of each step."""

    steps: list[list[Collective]]
    num_parameters: int
    num_trained: int
    num_backward: int
    num_persistent: int


def communicated(config: RunConfig, num_micro_steps: int, num_steps: int = 4) -> Sizes:
    """Runs steps of `num_micro_steps` rows on each rank; returns the collectives of each."""
    with built(config) as parts:
        steps: list[list[Collective]] = []
        for _ in range(num_steps):
            with recorded_collectives() as seen:
                _step(parts, _plan(parts, num_micro_steps))
            steps.append(seen)
        sizes = {name: getattr(each, "ds_numel", each.numel()) for name, each in parts.model.named_parameters()}
        named = dict(parts.model.named_parameters())
        return Sizes(
            steps,
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if named[name].requires_grad),
            sum(size for name, size in sizes.items() if _is_gathered_in_backward(name, config.stage.rates)),
            sum(size for name, size in sizes.items() if getattr(named[name], "ds_persist", False)),
        )


def _is_gathered_in_backward(name: str, trained: Collection[str]) -> bool:
    """Whether the output of the parameter's module has a gradient."""
    if "vision_tower" in name:
        return "vision_tower" in trained
    return "embed_tokens" not in name or "language_model" in trained


def _plan(parts: Parts, num_micro_steps: int) -> Any:
    """A plan whose micro-steps all have the same row, a sample with an image, on every rank."""
    sample = np.flatnonzero(np.asarray(parts.table.rows["tiles"]) > 0)[:1]
    count = num_micro_steps * parts.world.size
    supervised = int(parts.table.rows["supervised"][sample].sum()) * count
    return replace(
        parts.planner.plan(0),
        samples=np.repeat(sample, count),
        rows=(sample,) * num_micro_steps,
        num_supervised=supervised,
        divisor=float(supervised),
    )


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

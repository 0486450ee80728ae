"""Functions that ranks run in the tests of the planner: what DeepSpeed communicates and saves in a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.train.cases import Collective, _step, built, recorded_collectives
from train.config.schema import RunConfig


@dataclass
class Recorded:
    """The collectives of one step on one rank: of each forward and backward pass, and of the update."""

    micro_steps: list[list[Collective]]
    update: list[Collective]


def step_collectives(config: RunConfig, num_micro_steps: int) -> Recorded:
    """Records the third step, after ZeRO-3 has recorded its order of modules in the first two."""
    from train.data.loader import RowDataset

    with _own_groups(), built(config) as parts:
        encode = RowDataset(parts.mixture, parts.table, parts.processor, False, read_retries=0)
        rows = [encode[row] for row in parts.planner.plan(0).rows]
        engine: Any = parts.engine
        for _ in range(3):
            micro_steps = []
            for number in range(num_micro_steps):
                with recorded_collectives() as seen:
                    loss, *_ = engine(rows[number % len(rows)].to(parts.world.device))
                    engine.backward(loss)
                micro_steps.append(seen)
            with recorded_collectives() as update:
                engine.step()
        return Recorded(micro_steps, update)


def saved_bytes(config: RunConfig) -> int:
    """Writes a checkpoint after a step, which makes the moments; returns the bytes of the engine's files."""
    import torch.distributed as dist

    with built(config) as parts:
        _step(parts, parts.planner.plan(0))
        folder = config.run_dir / "saved"
        parts.engine.save_checkpoint(str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True)
        dist.barrier()
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _own_groups() -> Iterator[None]:
    """Inside, DeepSpeed makes new groups for hpZ, whose size is that of the first engine of a process otherwise."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    try:
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

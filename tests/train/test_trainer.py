"""Owns the proofs about training itself: the number of ranks, ZeRO and the row budget change nothing that is learned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.train import cases
from tests.train.cases import Record, aligning, relative_difference, with_stage, zero
from train.config import PackingConfig, RunConfig

StartRanks = Callable[[int], Ranks]
WIDE = PackingConfig(max_tokens=4096, max_tiles=64)
_FINISHED: dict[tuple[int, int, bool], Record] = {}


def finished(start_ranks: StartRanks, config: RunConfig, size: int, stage: int, *, wide: bool = False) -> Record:
    """Rank 0's record of the run on `size` ranks; each run is trained once and serves every test."""
    key = (size, stage, wide)
    if key not in _FINISHED:
        root = str(Path(config.root) / f"{size}_{stage}_{wide}")
        chosen = replace(config, root=root, engine=zero(stage), packing=WIDE if wide else config.packing)
        records = start_ranks(size).run(cases.train, chosen)
        for record in records[1:]:
            assert record.losses == records[0].losses
            assert record.samples == records[0].samples
        _FINISHED[key] = records[0]
    return _FINISHED[key]


def test_x(start_ranks: StartRanks, run_config: RunConfig) -> None:
    for size, stage, wide in ((1,2,False),(2,2,False),(2,3,False),(1,2,True),(1,0,False),(2,0,False),(2,1,False)):
        import time
        t=time.time()
        r = finished(start_ranks, run_config, size, stage, wide=wide)
        print(size, stage, wide, r.losses, r.rows, r.grad_norms, time.time()-t)
        print(relative_difference(r.after, finished(start_ranks, run_config, 1, 2).after))

"""The input bench's last part: batches through the real loader, also from a file system that is slow to answer.

Owns: the delay of reads, the trainer that takes batches, the workers' memory meanwhile. What is read is
`input_materials.py`'s, the program `input.py`'s.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from input_materials import open_mixture, pictures, processor, write_mixture
from results import memory_mib, table

from llava_next.model.flops import StepCosts
from train.config.schema import DataConfig, PackingConfig, StageConfig
from train.data.length_table import open_table
from train.data.loader import Planner, batches

READ_DELAY_S = 0.005

Result = dict[str, Any]


@contextmanager
def slow_reads(delay_s: float) -> Iterator[None]:
    """Adds a delay to every read of a picture, here and in the workers forked meanwhile."""
    real = os.pread

    def slow(descriptor: int, num_bytes: int, position: int) -> bytes:
        time.sleep(delay_s)
        return real(descriptor, num_bytes, position)

    os.pread = slow if delay_s else real
    try:
        yield
    finally:
        os.pread = real


def measure_loader(num_pictures: int, folder: Path) -> Result:
    """Batches per wall second, the trainer taking them as fast as it can; then its wait when a step takes a while."""
    # With more workers than cores: they wait for reads, not for a core.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    write_mixture(folder, "pictures", num_pictures, [picture for _, picture in pictures(num_pictures)])
    mixture, ours = open_mixture(folder, "pictures"), processor()
    lengths = open_table(mixture, ours, folder / "lengths", is_writer=True, num_workers=1, show_progress=False)
    stage = StageConfig("finetune", {"projector": 1e-3}, batch_size=16, max_length=4096, epochs=3.0)
    packing, costs = PackingConfig(max_tokens=8192, max_tiles=48), StepCosts(tile=30.0, token=1.0, pair=4e-5)

    def run(num_workers: int, delay_s: float, step_s: float) -> Result:
        planner = Planner(lengths, stage, packing, costs, 0, 0, 1, num_sources=1)
        data = DataConfig(store_root="", workers=num_workers)
        with slow_reads(delay_s):
            steps = range(planner.num_steps)
            return consume(batches(planner, mixture, ours, steps, data, pin_memory=False), step_s)

    found: Result = {"num_pictures": num_pictures, "rows_of_tokens": packing.max_tokens}
    for num_workers in (0, 2, 4):
        found[f"workers_{num_workers}"] = quickest(partial(run, num_workers, step_s=0.0))
    step_s = 1.5 / found["workers_0"]["plain"]["batches_per_s"]
    waits = quickest(partial(run, 2, step_s=step_s))
    return found | {"step_s": step_s, "waiting_trainer": waits}


def quickest(run: Callable[[float], Result], rounds: int = 3) -> Result:
    """Reads as they are and with the delay, in turn; of each its quickest round (other programs use the machine)."""
    both = [(run(0.0), run(READ_DELAY_S)) for _ in range(rounds)]
    plain, slow = (max(runs, key=lambda result: float(result["batches_per_s"])) for runs in zip(*both, strict=True))
    return {"plain": plain, "slow_reads": slow}


def consume(stream: Iterator[Any], step_s: float) -> Result:
    """Takes all batches, a pause of `step_s` after each; counted from the second on, when the workers are there."""
    next(stream)
    workers = active_children()
    first_mib = sum(memory_mib("RssAnon", worker.pid or 0) for worker in workers)
    last_mib, waited, num, started = first_mib, 0.0, 0, time.monotonic()
    before = started
    for _ in stream:
        num, waited = num + 1, waited + time.monotonic() - before
        time.sleep(step_s)
        alive = [memory_mib("RssAnon", worker.pid or 0) for worker in workers if worker.is_alive()]
        last_mib = sum(alive) if len(alive) == len(workers) else last_mib
        before = time.monotonic()
    return {
        "num_batches": num,
        "batches_per_s": num / (time.monotonic() - started),
        "wait_s": waited / num,
        "workers_grew_mib": last_mib - first_mib,
    }


def show_loader(found: Result) -> str:
    """The tables of the loader's part."""
    lines = []
    for num_workers in (0, 2, 4):
        plain, slow = (found[f"workers_{num_workers}"][kind]["batches_per_s"] for kind in ("plain", "slow_reads"))
        lines.append([f"{num_workers} workers", f"{plain:.2f}", f"{slow:.2f}", f"{slow / plain:.2f}"])
    waits = [found["waiting_trainer"][kind]["wait_s"] for kind in ("plain", "slow_reads")]
    header = ["batches per second (wall)", "reads as they are", "5 ms more each", "share"]
    grew = found["workers_2"]["plain"]
    return (
        f"{table(header, lines)}\n"
        f"a trainer whose steps take {found['step_s']:.2f} s waits {1000 * waits[0]:.1f} ms for a batch of 2 workers, "
        f"{1000 * waits[1]:.1f} ms with 5 ms more for each read\n"
        f"over {grew['num_batches']} batches the memory of 2 workers grew by {grew['workers_grew_mib']:.0f} MiB\n"
    )

"""Batches through the loader of a run, with reads as they are and with a delay, and the memory of its workers."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from input_path.real_images import encode_noise_images, open_mixture, processor, write_mixture
from measuring.processes import memory_mib
from measuring.result_files import table

from llava_next.model.flops import StepCosts
from train.config.schema import DataConfig, PackingConfig, StageConfig
from train.data.length_table import open_table
from train.data.loader import Planner, make_batches

READ_DELAY_S = 0.005

Result = dict[str, Any]


@contextmanager
def slow_reads(delay_s: float) -> Iterator[None]:
    """Adds a delay to every read of an image, in this process and in workers that are forked meanwhile."""
    real = os.pread

    def slow(descriptor: int, num_bytes: int, position: int) -> bytes:
        time.sleep(delay_s)
        return real(descriptor, num_bytes, position)

    os.pread = slow if delay_s else real
    try:
        yield
    finally:
        os.pread = real


def measure_loader(num_images: int, folder: Path) -> Result:
    """Batches per wall second for a trainer that does nothing else; then the wait of one whose steps take time."""
    # Torch warns of more workers than cores; here they wait for reads.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    write_mixture(folder, "pictures", num_images, [image for _, image in encode_noise_images(num_images)])
    mixture, ours = open_mixture(folder, "pictures"), processor()
    lengths = open_table(mixture, ours, folder / "lengths", is_writer=True, num_workers=1, show_progress=False)
    stage = StageConfig("finetune", {"projector": 1e-3}, batch_size=16, max_length=4096, epochs=3.0)
    packing, costs = PackingConfig(max_tokens=8192, max_tiles=48), StepCosts(tile=30.0, token=1.0, pair=4e-5)

    def run(num_workers: int, delay_s: float, step_s: float) -> Result:
        planner = Planner(lengths, stage, packing, costs, 0, 0, 1, num_sources=1)
        data = DataConfig(store_root="", workers=num_workers)
        with slow_reads(delay_s):
            steps = range(planner.num_steps)
            return consume(make_batches(planner, mixture, ours, steps, data, pin_memory=False), step_s)

    results: Result = {"num_pictures": num_images, "rows_of_tokens": packing.max_tokens}
    for num_workers in (0, 2, 4):
        results[f"workers_{num_workers}"] = quickest(partial(run, num_workers, step_s=0.0))
    step_s = 1.5 / results["workers_0"]["plain"]["batches_per_s"]
    waits = quickest(partial(run, 2, step_s=step_s))
    return results | {"step_s": step_s, "waiting_trainer": waits}


def quickest(run: Callable[[float], Result], rounds: int = 3) -> Result:
    """The quickest round with reads as they are and with the delay, since other programs may use the machine."""
    both = [(run(0.0), run(READ_DELAY_S)) for _ in range(rounds)]
    plain, slow = (max(runs, key=lambda result: float(result["batches_per_s"])) for runs in zip(*both, strict=True))
    return {"plain": plain, "slow_reads": slow}


def consume(stream: Iterator[Any], step_s: float) -> Result:
    """Takes all batches with a pause of `step_s` after each; counted from the second on, when all workers run."""
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


def loader_table(results: Result) -> str:
    """The table and two sentences."""
    lines = []
    for num_workers in (0, 2, 4):
        plain, slow = (results[f"workers_{num_workers}"][kind]["batches_per_s"] for kind in ("plain", "slow_reads"))
        lines.append([f"{num_workers} workers", f"{plain:.2f}", f"{slow:.2f}", f"{slow / plain:.2f}"])
    waits = [results["waiting_trainer"][kind]["wait_s"] for kind in ("plain", "slow_reads")]
    header = ["batches per second (wall)", "reads as they are", "5 ms more each", "share"]
    grew = results["workers_2"]["plain"]
    return (
        f"{table(header, lines)}\n"
        f"a trainer with steps of {results['step_s']:.2f} s waits {1000 * waits[0]:.1f} ms for a batch of 2 workers, "
        f"{1000 * waits[1]:.1f} ms with 5 ms more for each read\n"
        f"over {grew['num_batches']} batches the memory of 2 workers grew by {grew['workers_grew_mib']:.0f} MiB\n"
    )

"""Measures how long saves stall training: written beside the next steps, and written while training waits.

    python scripts/bench/save.py [--ranks 2] [--every 2 6]

Trains a model with random weights by this project's program on CPU ranks (gloo), once for each interval and each way,
from the same weights on the same samples. Fails if a background save at the longest interval stalls training for more
than its copy to host memory and half a second, or if losses differ between the ways. A save that falls due while the
previous one is being written waits for it: that is the column `waited s`. Results: scripts/bench/results/save.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from measuring.result_files import RESULTS, columns_table, save
from saving.one_run import SavingRun
from training_step.competitors import BenchError, vicuna_tokenizer
from training_step.job import Job
from training_step.materials import SHAPES, Shape, prepared

from data_recipes.schema.arguments import ArgumentParser

ALLOWANCE_S = 0.5
SHAPE = Shape(1024, 6, 16, 2752, 24, 3, 3, window=(30, 400), tile=28, patch=7, shrink=12)
"""142 million parameters, most of them in a few wide layers: 2.3 GB of checkpoint, and steps of a few seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if the stalls are within the limit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    job = Job(options.ranks, options.steps, threads=1, max_tokens=400, engine=2)
    results: dict[str, dict[str, Any]] = {}
    try:
        with prepared(SHAPES["tiny"] if options.tiny else SHAPE, options.tokenizer or vicuna_tokenizer(), job) as given:
            for every in options.every:
                for background in (True, False):
                    way = "background" if background else "blocking"
                    results[f"{way}, every {every}"] = measure(given, way, every, options.ranks)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(columns_table(COLUMNS, results), flush=True)
    longest = results[f"background, every {max(options.every)}"]
    blocking = results[f"blocking, every {max(options.every)}"]
    over_s = longest["over_copy_s"]
    same = len({tuple(values["losses"]) for values in results.values()}) == 1
    print(
        f"a background save stalls training for at most its copy and {over_s:.2f} s (limit {ALLOWANCE_S} s), "
        f"{blocking['stall_s'] / longest['stall_s']:.1f} times less than a blocking one; losses are "
        f"{'equal' if same else 'DIFFERENT'}"
    )
    content = {"limit_over_copy_s": ALLOWANCE_S, "losses_equal": same, "cases": results}
    save("save", "save.py", words, content, options.out)
    return 0 if over_s <= ALLOWANCE_S and same else 1


def measure(given: Job, way: str, every: int, num_ranks: int) -> dict[str, Any]:
    """Runs one way at one interval; its folder is removed.

    Raises:
        BenchError: the run failed.
    """
    folder = Path(given.folder)
    name = f"{way}_{every}"
    run = SavingRun(replace(given), name, every, way == "background", str(folder / f"{name}.json"))
    settings = folder / f"{name}_settings.json"
    settings.write_text(json.dumps(asdict(run)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if subprocess.run([*torchrun, "-m", "saving.one_run", str(settings)], env=environment, check=False).returncode:
        raise BenchError(f"the run {name} failed")
    times = json.loads(Path(run.result).read_text())
    run_dir = folder / "outputs" / name / "finetune"
    losses = [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run_dir)
    over_s = [
        stall - wait - copy
        for stall, wait, copy in zip(times["stall_s"], times["wait_s"], times["copy_s"], strict=False)
    ]
    return {
        "save_gb": times["save_bytes"] / 1e9,
        "saves": len(times["stall_s"]),
        "stall_s": mean(times["stall_s"]),
        "longest_stall_s": max(times["stall_s"]),
        "waited_s": mean(times["wait_s"][: len(times["stall_s"])]),
        "copy_s": mean(times["copy_s"]),
        "over_copy_s": max(over_s),
        "written_s": mean(times["written_s"]),
        "step_s": median(times["step_s"]),
        "losses": losses,
        "times": times,
    }


COLUMNS = (
    ("save_gb", "GB", ".2f"),
    ("saves", "saves", "d"),
    ("stall_s", "stall s", ".2f"),
    ("longest_stall_s", "longest", ".2f"),
    ("waited_s", "waited s", ".2f"),
    ("copy_s", "copy s", ".2f"),
    ("written_s", "written after s", ".2f"),
    ("step_s", "step s", ".2f"),
)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("save.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks on this host (default 2)")
    parser.add_argument("--steps", type=int, default=12, help="of each run (default 12)")
    parser.add_argument("--every", type=int, nargs="+", default=[2, 6], help="steps between saves (default 2 6)")
    parser.add_argument("--tokenizer", type=Path, help="directory; default: Vicuna's, fetched if it is absent")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())

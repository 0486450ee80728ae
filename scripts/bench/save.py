"""What a checkpoint costs the training: the stall, against DeepSpeed's own save, and what sealing would add to it.

    python scripts/bench/save.py [--millions 100] [--repetitions 3] [--folder DISK]

A stack of linear layers under DeepSpeed (ZeRO 1, fp32, one process on CPU) is trained and saved. *DeepSpeed's own* is
`engine.save_checkpoint` alone. *Ours* writes the same and goes on; files are brought to the disk and summed up (sha256)
while the next steps run, and only then has the checkpoint its name. *Waited for* is ours if nothing overlapped. The
disk's buffers are emptied before each. Seconds are wall seconds. Results: scripts/bench/results/save.json.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results import RESULTS, machine_facts, save, table

WIDTH = 2048
STEPS = 5
"""Of which the seconds of a step without a save are the mean."""


class Subject:
    """A model under DeepSpeed and a folder for its checkpoints.

    Args:
        millions: of parameters, about.
        folder: on the disk that is measured.
    """

    def __init__(self, millions: int, folder: Path) -> None:
        import deepspeed
        import torch

        from train.distributed.world import World

        layers = max(1, round(millions * 1e6 / WIDTH**2))
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
            dist_init_required=False,
        )
        self.folder = folder
        self.world = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
        self.inputs = torch.randn(64, WIDTH)

    def step(self) -> float:
        """One step; its seconds."""
        started = time.monotonic()
        self.engine.backward(self.engine(self.inputs).square().mean())
        self.engine.step()
        return time.monotonic() - started

    def save_by_deepspeed(self) -> dict[str, float]:
        """The engine's own save, and the size of its files."""
        seconds = timed(lambda: self.engine.save_checkpoint(str(self.folder / "own"), tag="own"))
        size = sum(path.stat().st_size for path in (self.folder / "own").rglob("*") if path.is_file())
        shutil.rmtree(self.folder / "own")
        return {"deepspeed_s": seconds, "gib": size / 2**30}

    def save_by_ours(self, number: int) -> dict[str, float]:
        """A save while steps go on: the stall, the seconds until it has its name, the steps meanwhile."""
        saver, started = self._saver(), time.monotonic()
        stall = saver.write(self.engine, self._state(number), "")
        steps = []
        while not saver.is_sealed:
            steps.append(self.step())
        saver.finish()
        return {
            "stall_s": stall,
            "named_s": time.monotonic() - started,
            "steps": float(len(steps)),
            "step_meanwhile_s": statistics.mean(steps) if steps else 0.0,
        }

    def save_and_wait(self, number: int) -> dict[str, float]:
        """The same save with nothing beside it."""
        saver, started = self._saver(), time.monotonic()
        saver.write(self.engine, self._state(number), "")
        saver.wait()
        return {"waited_s": time.monotonic() - started}

    def _saver(self) -> Any:
        from train.checkpoint.saver import Saver
        from train.config.schema import SaveConfig

        return Saver(self.folder / "ours", self.world, SaveConfig(keep=1))

    def _state(self, number: int) -> Any:
        from train.checkpoint.saver import RunState

        return RunState(number, "", {}, "float32", [], number, {}, {})


def timed(action: Callable[[], object]) -> float:
    """Seconds of an action."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def measure(subject: Subject, repetitions: int) -> dict[str, float]:
    """The median of each number over the repetitions.

    A first save of each kind is not timed, and every other repetition goes the other way round: ours makes the same
    call as DeepSpeed's own, and whichever came first would pay for fresh memory and fresh blocks of the disk.
    """
    subject.step()
    subject.save_by_deepspeed()
    subject.save_and_wait(0)
    found: dict[str, list[float]] = {}
    for number in range(repetitions):
        parts: list[Callable[[], dict[str, float]]] = [
            lambda: {"step_s": statistics.mean(subject.step() for _ in range(STEPS))},
            subject.save_by_deepspeed,
            partial(subject.save_by_ours, 2 * number + 1),
            partial(subject.save_and_wait, 2 * number + 2),
        ]
        for part in parts if number % 2 == 0 else reversed(parts):
            os.sync()
            for key, value in part().items():
                found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100, help="of parameters")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; the system's for temporary files by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed

    from train.distributed.quiet_libraries import quiet_libraries
    from train.engine import deepspeed_ops

    quiet_libraries(on_cpu=True)
    deepspeed_ops.ensure_built()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    with TemporaryDirectory(dir=args.folder) as folder:
        subject = Subject(args.millions, Path(folder))
        found = measure(subject, args.repetitions)
    slower = found["steps"] * (found["step_meanwhile_s"] - found["step_s"])
    rows = [
        ["DeepSpeed's own save", f"{found['deepspeed_s']:.2f}", "not brought to the disk, not summed up"],
        ["ours: the stall", f"{found['stall_s']:.2f}", f"complete after {found['named_s']:.2f} s"],
        ["ours, waited for", f"{found['waited_s']:.2f}", "if nothing overlapped"],
        ["a step", f"{found['step_s']:.2f}", ""],
        ["a step meanwhile", f"{found['step_meanwhile_s']:.2f}", f"{found['steps']:.0f} steps, {slower:.2f} s more"],
    ]
    print(f"{subject.num_parameters / 1e6:.0f} M parameters, {found['gib']:.2f} GiB a checkpoint")
    print(table(["", "seconds", ""], rows))
    command = ["python", "scripts/bench/save.py", *sys.argv[1:]]
    save("save", command, machine_facts(), {"num_parameters": subject.num_parameters, **found}, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs competitors, each in a process of its own, and holds their answers against one another.

Owns who can compete and what makes a comparison void. Which of them run, how often and what for is step.py's and
gpu.py's.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from job import Job, Outcome

from llava_next.kernels.cpu.compile import cache_root

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ORACLE_PYTHON = cache_root() / "oracle_env" / "bin" / "python"

SAME_LOSS = 1.0e-4
"""Relative difference of first losses up to which two competitors have done the same work, in fp32."""


class BenchError(RuntimeError):
    """The bench has no result: a competitor failed, or did other work."""


@dataclass(frozen=True)
class Competitor:
    """One line of the table: a program, and how it differs from the others' jobs (`changes` to the Job's fields)."""

    name: str
    program: str
    batch: int = 0
    trains_tower: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lacks(self) -> str | None:
        """What it needs and is not here, with the way out; None if it can run."""
        if self.program == "authors" and not (ORACLE_PYTHON.parents[1] / ".ready").is_file():
            return f"there is no {ORACLE_PYTHON.parents[1]}; ./scripts/oracles.sh makes it"
        if self.program == "stock" and importlib.util.find_spec("accelerate") is None:
            return "accelerate is not installed; ./scripts/setup.sh --extras bench does it"
        return None

    def run(self, job: Job) -> Outcome:
        """Runs the job in a process of its own and waits for it.

        Raises:
            BenchError: it failed; with its last words.
        """
        place = Path(job.folder)
        result = place / "outcome.json"
        result.unlink(missing_ok=True)
        own = replace(job, result=str(result), batch=self.batch, trains_tower=self.trains_tower, **self.changes)
        own.write(place / "job.json")
        python = str(ORACLE_PYTHON) if self.program == "authors" else sys.executable
        inherited = "" if self.program == "authors" else os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), inherited])),
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            "LLAVA_NEXT_CACHE": str(cache_root()),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        if job.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, str(HERE / f"{self.program}.py"), str(place / "job.json")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise BenchError(f"{self.name} ended with exit code {done.returncode}:\n{words}")
        return Outcome.read(result)


def run_all(competitors: Iterable[Competitor], job: Job) -> dict[str, Outcome]:
    """Each in turn, with a line on the terminal.

    Raises:
        BenchError: as `Competitor.run`.
    """
    outcomes = {}
    for competitor in competitors:
        started = time.monotonic()
        outcome = outcomes[competitor.name] = competitor.run(job)
        wall_s, cpu_s = (sum(values[1:]) / len(values[1:]) for values in (outcome.seconds, outcome.cpu_seconds))
        print(
            f"  {competitor.name:<14} step {wall_s:7.2f} s (processor {cpu_s:7.2f} s)   first loss "
            f"{outcome.losses[0]:.6f}   peak {outcome.peak_gib:.2f} GiB   ({time.monotonic() - started:.0f} s in all)",
            flush=True,
        )
    return outcomes


def check_same_work(outcomes: Mapping[str, Outcome], tolerance: float = SAME_LOSS) -> None:
    """All competitors started from the same weights on the same samples: their first losses say so.

    Raises:
        BenchError: two of them differ, in the loss or in the tokens that it is a mean of.
    """
    (reference, expected), *others = outcomes.items()
    for name, outcome in others:
        pairs = list(
            zip(outcome.num_supervised, expected.num_supervised, strict=False)
        )  # a profiled step is not counted
        if any(theirs != counted for theirs, counted in pairs):
            raise BenchError(
                f"{name} supervised {outcome.num_supervised} tokens in the steps, {reference} {expected.num_supervised}"
            )
        difference = abs(outcome.losses[0] - expected.losses[0]) / abs(expected.losses[0])
        if not difference <= tolerance:
            raise BenchError(
                f"the first loss of {name} is {outcome.losses[0]:.6f}, that of {reference} {expected.losses[0]:.6f}: "
                f"relative difference {difference:.1e}, allowed {tolerance:.0e}; they did not do the same work"
            )


def samples_per_s(outcome: Outcome, samples_per_step: int) -> float:
    """Over the timed steps: all but the first."""
    return samples_per_step * len(outcome.seconds[1:]) / sum(outcome.seconds[1:])


def vicuna_tokenizer() -> Path:
    """Vicuna's tokenizer in the cache, fetched if it is not there."""
    folder = cache_root() / "tokenizer_vicuna"
    if not folder.is_dir():
        assets = ROOT / "scripts" / "quickstart" / "assets.py"
        command = [sys.executable, str(assets), "--cache", str(cache_root()), "--set", "tokenizers"]
        if subprocess.run(command, check=False).returncode:
            raise BenchError(f"the tokenizers could not be fetched; name one with --tokenizer DIR ({folder})")
    return folder

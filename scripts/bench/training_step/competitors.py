"""Runs competitors, each in a process of its own, and checks that they have done the same work."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training_step.job import Job, Outcome

from llava_next.cache_root import cache_root

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parents[1]
ORACLE_PYTHON = cache_root() / "oracle_env" / "bin" / "python"

SAME_LOSS = 1.0e-4
"""Relative difference of first losses up to which two competitors have done the same work, in fp32."""


class BenchError(RuntimeError):
    """There is no result: a competitor has failed, or has done other work than the others."""


@dataclass(frozen=True)
class Competitor:
    """One line of the table.

    Attributes:
        program: ours, stock or authors: the module competitor_<program>.
        changes: to the fields of the Job.
    """

    name: str
    program: str
    batch: int = 0
    trains_tower: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing_requirement(self) -> str | None:
        """What is not installed, with the command that installs it; None if the competitor can run."""
        if self.program == "authors" and not (ORACLE_PYTHON.parents[1] / ".ready").is_file():
            return f"there is no {ORACLE_PYTHON.parents[1]}; make it with ./scripts/oracles.sh"
        if self.program == "stock" and importlib.util.find_spec("accelerate") is None:
            return "accelerate is not installed; install it with ./scripts/setup.sh --extras bench"
        modules = ["flash_attn"] if self.changes.get("attention") == "flash_attention_2" else []
        modules += ["liger_kernel"] if self.changes.get("liger") else []
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if self.program == "stock" and missing:
            return f"the package {' or '.join(missing)} is not installed"
        return None

    def run(self, job: Job) -> Outcome:
        """Runs the job in a process of its own and waits for it.

        Raises:
            BenchError: it failed; with the end of its output.
        """
        folder = Path(job.folder)
        result = folder / "outcome.json"
        result.unlink(missing_ok=True)
        changes = {"batch": self.batch, "trains_tower": self.trains_tower, **self.changes}
        replace(job, result=str(result), **changes).write(folder / "job.json")
        python = str(ORACLE_PYTHON) if self.program == "authors" else sys.executable
        inherited = "" if self.program == "authors" else os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCH), str(ROOT), inherited])),
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            "LLAVA_NEXT_CACHE": str(cache_root()),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        if job.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, "-m", f"training_step.competitor_{self.program}", str(folder / "job.json")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            output = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise BenchError(f"{self.name} ended with exit code {done.returncode}:\n{output}")
        return Outcome.read(result)


def run_all(competitors: Iterable[Competitor], job: Job) -> dict[str, Outcome]:
    """Runs them one after the other and prints a line for each.

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
    """Checks that all competitors trained the same weights on the same samples, by their first losses.

    Args:
        tolerance: relative difference of the losses.

    Raises:
        BenchError: the first losses or the numbers of supervised tokens differ.
    """
    (reference, expected), *others = outcomes.items()
    for name, outcome in others:
        # A profiled step is not counted, so one list may be shorter.
        if any(a != b for a, b in zip(outcome.num_supervised, expected.num_supervised, strict=False)):
            raise BenchError(
                f"{name} supervised {outcome.num_supervised} tokens in the steps, {reference} {expected.num_supervised}"
            )
        difference = abs(outcome.losses[0] - expected.losses[0]) / abs(expected.losses[0])
        if not difference <= tolerance:
            raise BenchError(
                f"the first loss of {name} is {outcome.losses[0]:.6f}, that of {reference} {expected.losses[0]:.6f}: "
                f"relative difference {difference:.1e}, allowed {tolerance:.0e}; they did not do the same work"
            )


def head_shares(ours: Outcome) -> dict[str, float]:
    """Shares of a step's FLOPs that the language model's head takes: at supervised positions, at every position.

    Args:
        ours: of this project's trainer, which counts its FLOPs.
    """
    head, flops = sum(ours.head_flops), sum(ours.flops)
    counts = zip(ours.head_flops, ours.num_tokens, ours.num_supervised, strict=True)
    everywhere = sum(each * tokens / supervised for each, tokens, supervised in counts)
    return {"head_share": head / flops, "head_share_at_every_position": everywhere / (flops - head + everywhere)}


def describe_head(shares: Mapping[str, Any]) -> str:
    """The shares of `head_shares` as a sentence."""
    return (
        f"the language model's head: {shares['head_share']:.1%} of the FLOPs of our step, which runs it at supervised "
        f"positions; {shares['head_share_at_every_position']:.1%} of a step that runs it at every position"
    )


def samples_per_s(outcome: Outcome, samples_per_step: int) -> float:
    """Rate over the timed steps: all but the first."""
    return samples_per_step * len(outcome.seconds[1:]) / sum(outcome.seconds[1:])


def vicuna_tokenizer() -> Path:
    """Vicuna's tokenizer in the cache, fetched if it is absent."""
    folder = cache_root() / "tokenizer_vicuna"
    if not folder.is_dir():
        assets = ROOT / "scripts" / "quickstart" / "assets.py"
        command = [sys.executable, str(assets), "--cache", str(cache_root()), "--set", "tokenizers"]
        if subprocess.run(command, check=False).returncode:
            raise BenchError(f"the tokenizers could not be fetched; name one with --tokenizer DIR ({folder})")
    return folder

"""The planner against the truth: memory and step time, predicted and measured.

    python scripts/bench/plan.py [--quick]
    python scripts/bench/plan.py --device cuda --hardware h100_80g
    python scripts/bench/plan.py --of scripts/bench/results/gpu_h200.json --hardware h100_80g   needs no GPU

Runs the project's own trainer on drawn samples, as the step bench does, each setting in a process of its own, and plans
the same settings from the same length table. On a CPU memory is the process's high-water mark above its level before
the model, for a model of more than 1 GB of state, in a run of its own in which malloc gives back what is freed (else it
is kept for the next row, train/distributed/malloc.py: `kept GiB`); on a GPU the allocator's. The planner's margin is
left out of both. Fails where memory is further off than 15 % (on a GPU 10 %). Step times are planned with the hardware
file's shares and, on a CPU, the rate of a large product measured in the same process; with --strict-time they are held
to the same.

--of plans what gpu.py has measured (its first variant) and writes no file.

Owns the settings and the comparison. Materials and trainer are the step bench's.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from gpu import VARIANTS
from job import Job, Outcome
from materials import SHAPES, Shape, open_data, prepared, run_config
from results import RESULTS, machine_facts, save, table
from runs import BenchError, Competitor, vicuna_tokenizer

from llava_next.model.build import read_backbone
from train.config.schema import CONFIG_DIR
from train.data.loader import stage_processor
from train.plan.hardware import Hardware, check_hardware
from train.plan.hours import step_time
from train.plan.memory import memory_of
from train.plan.model_facts import model_facts
from train.plan.rows import draw_steps, largest_seen
from train.plan.sample_lengths import Population
from train.plan.setting import setting_of

GOALS = {"cpu": 0.15, "cuda": 0.10}
SHAPE = Shape(640, 6, 10, 1728, 192, 6, 3, window=(1000, 2000))
"""73 million parameters: 1.5 to 1.8 GB of state in fp32; short samples, since two cores run it."""


@dataclass(frozen=True)
class Case:
    """A setting to plan and to run."""

    name: str
    engine: int
    recompute: bool = False
    compile: bool = False


CPU_CASES = (
    Case("zero2", 2),
    Case("zero2, recompute", 2, recompute=True),
    Case("zero0", 0),
    Case("zero1", 1),
    Case("zero3", 3),
)
GPU_CASES = (
    Case("zero2", 2),
    Case("zero2, recompute", 2, recompute=True),
    Case("zero3", 3),
    Case("zero2, compiled", 2, compile=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if memory is predicted as well as it should be."""
    options = _options(arguments)
    if options.of:
        values = measured_before(options.of, read_hardware(options.hardware), options.tokenizer or vicuna_tokenizer())
        print(results_table({options.of.stem: values}))
        return 0
    on_gpu = options.device == "cuda"
    cases = GPU_CASES if on_gpu else CPU_CASES[:2] if options.quick else CPU_CASES
    hardware = read_hardware(options.hardware or ("h100_80g" if on_gpu else "cpu"))
    job, shape = _job_and_shape(options)
    found: dict[str, dict[str, Any]] = {}
    try:
        with prepared(shape, options.tokenizer or vicuna_tokenizer(), job) as given:
            for case in cases:
                found[case.name] = _measure(case, given, hardware)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(results_table(found), flush=True)
    goal = GOALS[options.device]
    worst = max(abs(values["memory_ratio"] - 1) for values in found.values())
    worst_time = max(abs(values["time_ratio"] - 1) for values in found.values())
    print(f"memory is at most {worst:.1%} off (goal {goal:.0%}), step times {worst_time:.1%}")
    command = ["python", "scripts/bench/plan.py", *(arguments if arguments is not None else sys.argv[1:])]
    facts = machine_facts(device=torch.cuda.get_device_name() if on_gpu else "CPU")
    name = "plan_gpu" if on_gpu else "plan"
    save(name, command, facts, {"goal": goal, "worst": worst, "worst_time": worst_time, "cases": found}, options.out)
    return 0 if worst <= goal and (not options.strict_time or worst_time <= goal) else 1


def read_hardware(name: str) -> Hardware:
    """One GPU, or one process, of a hardware file."""
    values = yaml.safe_load((CONFIG_DIR / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    return replace(check_hardware(values), gpus_per_node=1)


def measured_before(path: Path, hardware: Hardware, tokenizer: Path) -> dict[str, Any]:
    """What gpu.py has written, planned: the same model, samples and setting, without weights."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    name, found = next(iter(results["competitors"].items()))
    job = Job(
        folder="",
        result="",
        batch=0,
        samples_per_step=results["samples"],
        num_steps=results["steps"],
        trains_tower=True,
        threads=2,
        max_tokens=results["max_tokens"],
        device="cuda",
        workers=results["workers"],
        engine=results["engine"],
        recompute=results["recompute"],
    )
    job = replace(job, **VARIANTS[results["variants"][0]])
    shape = Shape(**{**results["model"], "window": tuple(results["model"]["window"])})
    with prepared(shape, tokenizer, job, weights=False) as given:
        return compare(given, Outcome(**found["steps"]), hardware, name)


def _job_and_shape(options: argparse.Namespace) -> tuple[Job, Shape]:
    """What the cases share: the model and the samples."""
    on_gpu = options.device == "cuda"
    job = Job(
        folder="",
        result="",
        batch=0,
        samples_per_step=16 if on_gpu else 2,
        num_steps=4 if on_gpu else 2,
        trains_tower=True,
        threads=options.threads,
        max_tokens=8192 if on_gpu else 2000,
        device=options.device,
        workers=8 if on_gpu else 0,
    )
    if options.tiny:
        return replace(job, max_tokens=400), SHAPES["tiny"]
    return job, replace(SHAPES["large"], layers=options.layers) if on_gpu else SHAPE


def _measure(case: Case, given: Job, hardware: Hardware) -> dict[str, Any]:
    job = replace(given, engine=case.engine, recompute=case.recompute, compile=case.compile)
    competitor = Competitor(case.name, "ours")
    outcome = competitor.run(job)
    kept_gib = outcome.peak_gib
    if job.device == "cpu":
        with _memory_given_back():
            outcome.peak_gib = competitor.run(job).peak_gib
    return {**compare(job, outcome, hardware, case.name), "kept_gib": kept_gib}


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """For processes started inside, malloc gives back what is freed: slower, and what they hold is what they need."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def compare(job: Job, outcome: Outcome, hardware: Hardware, name: str) -> dict[str, Any]:
    """The job planned, beside what it measured."""
    config = run_config(Path(job.folder), job)
    backbone = read_backbone(config.model)
    _, lengths = open_data(config, stage_processor(backbone, config.stage))
    population = Population.counted(lengths, "the bench's own")
    facts, setting = model_facts(backbone, config), setting_of(config, 1)
    steps = draw_steps(
        population, config.packing, facts.costs, num_ranks=1, batch_size=job.samples_per_step, seed=config.seed,
        count=job.num_steps,
    )  # fmt: skip
    half = job.device == "cuda"
    row = largest_seen(steps)
    planned = memory_of(facts, setting, row, num_ranks=1, half=half, on_gpu=half, margin=False)
    gib = planned.total / 2**30
    if job.device == "cpu":
        hardware = replace(hardware, fp32_tflops=outcome.gemm_tflops)
    time = step_time(facts, setting, steps, hardware, half=half, workers=job.workers, save_every=0)
    seconds = median(outcome.seconds[1:])
    state = sum(planned.kinds[kind] for kind in ("weights", "gradients", "optimizer"))
    print(f"  {name}: {gib:.2f} GiB planned, {outcome.peak_gib:.2f} measured", flush=True)
    return {
        "parameters": facts.num_parameters,
        "state_gib": state / 2**30,
        "planned_gib": gib,
        "measured_gib": outcome.peak_gib,
        "memory_ratio": gib / outcome.peak_gib,
        "peak_in": planned.peak,
        "kinds_gib": {kind: value / 2**30 for kind, value in planned.kinds.items()},
        "planned_s": time.total,
        "measured_s": seconds,
        "time_ratio": time.total / seconds,
        "gemm_tflops": outcome.gemm_tflops,
        "tower_s": median(outcome.tower_seconds[1:]),
        "tower_tflop": median(outcome.tower_flops[1:]) / 1e12,
        "tflop": median(outcome.flops[1:]) / 1e12,
        "planned_kinds_s": time.kinds,
    }


def results_table(found: dict[str, dict[str, Any]]) -> str:
    """One line for each setting."""
    columns = (
        ("state_gib", "state GiB", ".2f"),
        ("planned_gib", "planned GiB", ".2f"),
        ("measured_gib", "measured GiB", ".2f"),
        ("memory_ratio", "ratio", ".3f"),
        ("kept_gib", "kept GiB", ".2f"),
        ("planned_s", "planned s", ".2f"),
        ("measured_s", "measured s", ".2f"),
        ("time_ratio", "ratio", ".2f"),
    )
    shown = [column for column in columns if all(column[0] in values for values in found.values())]
    rows = [[name, *(format(values[key], form) for key, _, form in shown)] for name, values in found.items()]
    return table(["", *(title for _, title, _ in shown)], rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hardware", help="a file of configs/hardware (default: cpu; with --device cuda h100_80g)")
    parser.add_argument("--quick", action="store_true", help="the first two settings only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to exercise the program: nothing is proved")
    parser.add_argument("--strict-time", action="store_true", help="also fail where step times are too far off")
    parser.add_argument("--of", type=Path, metavar="FILE", help="a result of gpu.py, with --hardware: plan that")
    parser.add_argument("--layers", type=int, default=5, help="of the language model on a GPU (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the host")
    parser.add_argument("--tokenizer", type=Path, help="a directory (default: Vicuna's, from the cache)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.of and not options.hardware:
        parser.error("--of wants the card's --hardware")
    return options


if __name__ == "__main__":
    raise SystemExit(main())

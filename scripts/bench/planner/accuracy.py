"""Memory and step time of a run, as planned by train.plan and as measured.

    python scripts/bench/plan.py accuracy [--quick]
    python scripts/bench/plan.py accuracy --device cuda --hardware h100_80g
    python scripts/bench/plan.py accuracy --of scripts/bench/results/gpu_h200.json --hardware h200_141g   needs no GPU

Runs this project's trainer on drawn samples, each setting in a process of its own, and plans the same settings from the
same length table. Memory is the process's peak above its level before the model, on a GPU the allocator's. On a CPU,
for a model of more than 1 GB of state, it is measured in a separate run in which malloc returns freed memory to the
system (otherwise some is kept for the next row: the column `kept GiB`). The planner's
margin is excluded. Fails if memory is wrong by more than 15 % (on a GPU 10 %). Step times are planned with the shares
of the hardware file and, on a CPU, the rate of a large product in the same process; --strict-time holds them to the
same limit.

--of plans the first variant of a result of `step.py gpu` and writes no file. Results: scripts/bench/results/plan.json,
plan_gpu.json.
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
from measuring.result_files import RESULTS, columns_table, machine_facts, save
from training_step.competitors import BenchError, Competitor, vicuna_tokenizer
from training_step.job import Job, Outcome
from training_step.materials import SHAPES, Shape, open_data, prepared, run_config
from training_step.on_gpu import VARIANTS

from data_recipes.schema.arguments import ArgumentParser
from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.model.build import read_backbone
from train.data.loader import build_processor
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware, check_hardware
from train.plan.hours import estimate_step_time
from train.plan.memory import estimate_memory
from train.plan.model_facts import count_model
from train.plan.sample_lengths import Population
from train.plan.simulated_steps import draw_steps, largest_drawn_row

GOALS = {"cpu": 0.15, "cuda": 0.10}
SHAPE = Shape(640, 6, 10, 1728, 192, 6, 3, window=(1000, 2000))
"""73 million parameters: 1.5 to 1.8 GB of state in fp32; short samples, because it must run on two cores."""


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
    """The program; 0 if the planned memory is within the limit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    if options.of:
        values = plan_measured(options.of, read_hardware(options.hardware), options.tokenizer or vicuna_tokenizer())
        print(columns_table(COLUMNS, {options.of.stem: values}))
        return 0
    on_gpu = options.device == "cuda"
    cases = GPU_CASES if on_gpu else CPU_CASES[:2] if options.quick else CPU_CASES
    hardware = read_hardware(options.hardware or ("h100_80g" if on_gpu else "cpu"))
    job, shape = _job_and_shape(options)
    results: dict[str, dict[str, Any]] = {}
    try:
        with prepared(shape, options.tokenizer or vicuna_tokenizer(), job) as given:
            for case in cases:
                results[case.name] = _measure(case, given, hardware)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(columns_table(COLUMNS, results), flush=True)
    goal = GOALS[options.device]
    worst = max(abs(values["memory_ratio"] - 1) for values in results.values())
    worst_time = max(abs(values["time_ratio"] - 1) for values in results.values())
    print(f"memory is wrong by at most {worst:.1%} (goal {goal:.0%}), step times {worst_time:.1%}")
    facts = machine_facts(device=torch.cuda.get_device_name() if on_gpu else "CPU")
    content = {"goal": goal, "worst": worst, "worst_time": worst_time, "cases": results}
    save("plan_gpu" if on_gpu else "plan", "plan.py accuracy", words, content, options.out, facts)
    return 0 if worst <= goal and (not options.strict_time or worst_time <= goal) else 1


def read_hardware(name: str) -> Hardware:
    """A hardware file, with one GPU or one process per node."""
    values = yaml.safe_load((CONFIG_DIR / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    return replace(check_hardware(values), gpus_per_node=1)


def plan_measured(path: Path, hardware: Hardware, tokenizer: Path) -> dict[str, Any]:
    """Plans the run of a result of `step.py gpu`: the same model, samples and setting, without weights."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    name, measured = next(iter(results["competitors"].items()))
    job = Job(
        results["samples"],
        results["steps"],
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
        return compare(given, Outcome(**measured["steps"]), hardware, name)


def _job_and_shape(options: argparse.Namespace) -> tuple[Job, Shape]:
    """The model and the samples of all cases."""
    on_gpu = options.device == "cuda"
    job = Job(
        16 if on_gpu else 2,
        4 if on_gpu else 2,
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
        with _freed_memory_returned():
            outcome.peak_gib = competitor.run(job).peak_gib
    return {**compare(job, outcome, hardware, case.name), "kept_gib": kept_gib}


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """In processes started inside, malloc returns freed memory to the system: slower, and the peak is the need."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def compare(job: Job, outcome: Outcome, hardware: Hardware, name: str) -> dict[str, Any]:
    """The planned and the measured memory and time of a job."""
    config = run_config(Path(job.folder), job)
    backbone = read_backbone(config.model)
    _, lengths = open_data(config, build_processor(backbone, config.stage))
    population = Population.from_table(lengths, "drawn for the benchmark")
    facts = count_model(backbone, config)
    setting = read_settings(config, 1).with_bucket_sizes(1, facts.num_parameters, facts.num_trained)
    steps = draw_steps(
        population, config.packing, facts.costs, num_ranks=1, batch_size=job.samples_per_step, seed=config.seed,
        count=job.num_steps,
    )  # fmt: skip
    half = job.device == "cuda"
    row = largest_drawn_row(steps)
    planned = estimate_memory(facts, setting, row, num_ranks=1, half=half, on_gpu=half, margin=False)
    gib = planned.total / 2**30
    if job.device == "cpu":
        hardware = replace(hardware, fp32_tflops=outcome.gemm_tflops)
    time = estimate_step_time(facts, setting, steps, hardware, half=half, workers=job.workers)
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


COLUMNS = (
    ("state_gib", "state GiB", ".2f"),
    ("planned_gib", "planned GiB", ".2f"),
    ("measured_gib", "measured GiB", ".2f"),
    ("memory_ratio", "ratio", ".3f"),
    ("kept_gib", "kept GiB", ".2f"),
    ("planned_s", "planned s", ".2f"),
    ("measured_s", "measured s", ".2f"),
    ("time_ratio", "ratio", ".2f"),
)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "plan.py accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hardware", help="a file of configs/hardware (default: cpu; with --device cuda h100_80g)")
    parser.add_argument("--quick", action="store_true", help="the first two settings only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to exercise the program")
    parser.add_argument("--strict-time", action="store_true", help="also fail if step times are wrong by more")
    parser.add_argument("--of", type=Path, metavar="FILE", help="plan a result of step.py gpu; needs --hardware")
    parser.add_argument("--layers", type=int, default=5, help="of the language model on a GPU (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the host")
    parser.add_argument("--tokenizer", type=Path, help="a directory (default: Vicuna's, from the cache)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.of and not options.hardware:
        parser.error("--of needs the --hardware of the card")
    return options

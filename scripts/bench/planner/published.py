"""The planner's formula of communication against published timings of training on several nodes.

    python scripts/bench/plan.py published

Each timing is planned from another one of the same source, which gives the seconds of computation: the same model on
one node, or with more tokens between two gathers. The planner's formula (train/plan/communication.py) adds what the
nodes communicate, once with overlap 0.7 and once with none, and the two results are compared with the timing. Sharded
runs gather bf16 weights by block and reduce bf16 gradients, as their sources say; InternLM all-reduces bf16 gradients
once per step. A second table compares single collectives. Nothing is run. Results:
scripts/bench/results/published.json.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from measuring.result_files import RESULTS, columns_table, save

from data_recipes.schema.arguments import ArgumentParser
from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.schema import PackingConfig
from train.plan.communication import OVERLAP, Collectives, estimate_communication, estimate_ring, list_collectives
from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware, check_hardware
from train.plan.model_facts import TensorSizes

FMS = "github.com/foundation-model-stack/fms-fsdp README.md, commits 6dc80d2 (larger batch) and 4ffb9bd, FSDP"
MOSAIC = "github.com/mosaicml/llm-foundry scripts/train/benchmarking/README.md, commit 061f2c7, FSDP"
INTERNLM = "github.com/InternLM/InternLM doc/en/train_performance.md, commit 20fe5ac"
STAS = "github.com/stas00/ml-engineering network/README.md, commit 0030e63, nccl-tests all_reduce_perf"
GIST = "gist.github.com/jacobkahn (1fb3977e, a92f4425, 3150a1a3), nccl-tests all_reduce_perf, p3dn.24xlarge with EFA"


@dataclass(frozen=True)
class Model:
    """Elements of a model and its number of blocks."""

    elements: float
    blocks: int


@dataclass(frozen=True)
class Timing:
    """A published speed.

    Attributes:
        nodes: of eight GPUs.
        tokens: of a GPU in a micro-step.
        tokens_per_s: of a GPU.
        micro_steps: per optimizer step.
    """

    nodes: int
    tokens: int
    tokens_per_s: float
    micro_steps: int = 1

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.tokens * self.micro_steps / self.tokens_per_s


@dataclass(frozen=True)
class Series:
    """Timings of one source, of which the first gives the seconds of computation.

    Attributes:
        hardware: a file of configs/hardware.
        network_gb_s: of a node in one direction.
        method: fsdp, zero1 (optimizer states over all ranks) or zero1_node (over those of a node).
    """

    source: str
    name: str
    hardware: str
    network_gb_s: float
    model: Model
    base: Timing
    timings: tuple[Timing, ...]
    method: str = "fsdp"


_MPT_7B, _MPT_3B, _MPT_1B = Model(6_658_859_008, 32), Model(2_651_837_440, 32), Model(1_315_950_592, 24)
_MPT_70B = Model(64_862_437_376, 80)
_LLAMA_34B, _LLAMA_70B = Model(33.74e9, 48), Model(68.98e9, 80)
_INTERNLM_7B = Model(7.32e9, 32)

SERIES = (
    Series(FMS, "34B, A100", "a100_80g", 50, _LLAMA_34B, Timing(16, 8 * 4096, 772), (Timing(16, 2 * 4096, 700),)),
    Series(FMS, "70B, A100", "a100_80g", 50, _LLAMA_70B, Timing(16, 6 * 4096, 380), (Timing(16, 2 * 4096, 370),)),
    Series(FMS, "34B, H100", "h100_80g", 100, _LLAMA_34B, Timing(12, 8 * 4096, 1700), (Timing(12, 2 * 4096, 1550),)),
    Series(FMS, "70B, H100", "h100_80g", 100, _LLAMA_70B, Timing(12, 6 * 4096, 850), (Timing(12, 2 * 4096, 800),)),
    Series(
        MOSAIC, "MPT-7B, A100 40 GB", "a100_40g", 200, _MPT_7B, Timing(1, 12 * 2048, 3679, 4),
        (Timing(2, 16 * 2048, 3645), Timing(4, 18 * 2048, 3725), Timing(8, 18 * 2048, 3665),
         Timing(16, 18 * 2048, 3623)),
    ),
    Series(
        MOSAIC, "MPT-3B, A100 40 GB", "a100_40g", 200, _MPT_3B, Timing(1, 5 * 2048, 10_065, 8),
        (Timing(2, 5 * 2048, 9750), Timing(4, 6 * 2048, 9914), Timing(8, 6 * 2048, 9736), Timing(16, 6 * 2048, 9538)),
    ),
    Series(
        MOSAIC, "MPT-1B, A100 40 GB", "a100_40g", 200, _MPT_1B, Timing(1, 8 * 2048, 19_271, 8),
        (Timing(2, 8 * 2048, 19_085), Timing(4, 10 * 2048, 15_555), Timing(8, 10 * 2048, 19_001),
         Timing(16, 10 * 2048, 18_647)),
    ),
    Series(
        MOSAIC, "MPT-70B, A100 40 GB", "a100_40g", 200, _MPT_70B, Timing(16, 4 * 2048, 376),
        (Timing(8, 2 * 2048, 276),),
    ),
    Series(
        INTERNLM, "InternLM-7B, zero1=8", "a100_80g", 50, _INTERNLM_7B, Timing(1, 2 * 2048, 4078, 4),
        (Timing(2, 2 * 2048, 3939, 4), Timing(4, 2 * 2048, 3919, 4), Timing(16, 2 * 2048, 3928, 4),
         Timing(64, 2 * 2048, 3084, 2), Timing(128, 2 * 2048, 3625, 4), Timing(128, 2 * 2048, 2346, 1)),
        "zero1_node",
    ),
    Series(
        INTERNLM, "InternLM-7B, zero1=-1", "a100_80g", 50, _INTERNLM_7B, Timing(1, 2 * 2048, 4062, 4),
        (Timing(2, 2 * 2048, 3842, 4), Timing(4, 2 * 2048, 3752, 4), Timing(16, 2 * 2048, 3571, 4),
         Timing(128, 2 * 2048, 2271, 4)),
        "zero1",
    ),
)  # fmt: skip

ALL_REDUCES = (
    # source, hardware, GB/s of the network, of a link, nodes, bytes, measured microseconds
    (STAS, "eight A100", 200.0, 300.0, 1, 2**15, 43.83),
    (STAS, "eight A100", 200.0, 300.0, 1, 2**26, 684.6),
    (STAS, "eight A100", 200.0, 300.0, 1, 2**30, 8203.9),
    (STAS, "eight A100", 200.0, 300.0, 1, 2**34, 127_997.0),
    (GIST, "V100, 100 Gb/s", 12.5, 150.0, 2, 8, 163.4),
    (GIST, "V100, 100 Gb/s", 12.5, 150.0, 4, 8, 319.4),
    (GIST, "V100, 100 Gb/s", 12.5, 150.0, 8, 8, 631.3),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    rows = {
        f"{each.name}, {timing.nodes} x 8{_micro_steps(timing)}": compare(each, timing) for each, timing in _timings()
    }
    print(columns_table(COLUMNS, rows, "training"), end="\n\n")
    collectives = {f"{row[1]}, {row[4]} x 8, {row[5]:,} bytes": compare_all_reduce(*row) for row in ALL_REDUCES}
    print(columns_table(COLLECTIVE_COLUMNS, collectives, "all-reduce"), end="\n\n")
    summary = {
        "timings": len(rows),
        "in_the_bracket": sum(values["inside"] for values in rows.values()),
        "median_error_overlap": median(abs(values["error"]) for values in rows.values()),
        "median_error_without_overlap": median(abs(values["error_without_overlap"]) for values in rows.values()),
    }
    print(
        f"{summary['in_the_bracket']} of {summary['timings']} timings are inside the bracket; median error "
        f"{summary['median_error_overlap']:.1%} with overlap {OVERLAP:g}, "
        f"{summary['median_error_without_overlap']:.1%} without"
    )
    for source in dict.fromkeys([*(each.source for each in SERIES), *(row[0] for row in ALL_REDUCES)]):
        print(f"source: {source}")
    save(
        "published", "plan.py published", words, {"training": rows, "all_reduces": collectives, **summary}, options.out
    )
    return 0


def _timings() -> Iterator[tuple[Series, Timing]]:
    for each in SERIES:
        for timing in each.timings:
            yield each, timing


def _micro_steps(timing: Timing) -> str:
    return f", {timing.micro_steps} micro-steps" if timing.micro_steps > 1 else ""


def compare(series: Series, timing: Timing) -> dict[str, Any]:
    """Plans a timing from the base of its series."""
    hardware = replace(read_hardware(series.hardware), network_gb_s=series.network_gb_s)
    planned = [plan_step(series, timing, hardware, overlap) for overlap in (OVERLAP, 0.0)]
    errors = [seconds / timing.step_s - 1 for seconds in planned]
    every = estimate_communication(list_of(series, timing), hardware, timing.nodes, 0.0, overlap=0.0)
    return {
        "source": series.source,
        "network_gb_s": series.network_gb_s,
        "communication_s": every.total_s,
        "measured_s": timing.step_s,
        "planned_s": planned[0],
        "planned_s_without_overlap": planned[1],
        "error": errors[0],
        "error_without_overlap": errors[1],
        "inside": errors[0] <= 0 <= errors[1],
    }


def plan_step(series: Series, timing: Timing, hardware: Hardware, overlap: float) -> float:
    """Returns the planned seconds of a step."""
    base, work = series.base, timing.tokens * timing.micro_steps / (series.base.tokens * series.base.micro_steps)
    compute_s = remove_communication(base.step_s, list_of(series, base), hardware, base.nodes, overlap) * work
    return (
        compute_s
        + estimate_communication(list_of(series, timing), hardware, timing.nodes, compute_s, overlap=overlap).exposed_s
    )


def remove_communication(
    step_s: float, collectives: Sequence[Collectives], hardware: Hardware, nodes: int, overlap: float
) -> float:
    """Returns the seconds of computation of a step that takes `step_s` with its exposed communication."""
    waiting_s = estimate_communication(
        [each for each in collectives if not each.overlaps], hardware, nodes, 0.0, overlap=0.0
    ).exposed_s
    overlapping_s = estimate_communication(collectives, hardware, nodes, 0.0, overlap=0.0).exposed_s - waiting_s
    if overlapping_s <= overlap * (step_s - waiting_s):
        return step_s - waiting_s
    return (step_s - waiting_s - overlapping_s) / (1 - overlap)


def list_of(series: Series, timing: Timing) -> tuple[Collectives, ...]:
    """Returns the collectives of a step."""
    elements, blocks = series.model.elements, series.model.blocks
    if series.method == "fsdp":
        block = int(elements / blocks)
        zero = {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": block,
            "stage3_max_live_parameters": block,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": block,
            "stage3_param_persistence_threshold": 0,
        }
        engine = {"zero_optimization": zero, "communication_data_type": "bf16"}
        settings = ExecutionSettings(engine, (), PackingConfig(timing.tokens, 1), timing.nodes)
        tensors = TensorSizes(*((block,) * blocks,) * 3, 1)
        return tuple(list_collectives(tensors, settings, 8, timing.micro_steps, half=True))
    num_bytes, buckets = 2 * elements, -(-elements // 2**29)
    return (
        Collectives("gradients", 2 * buckets, 2 * num_bytes, across=True, overlaps=True),
        Collectives("updated weights", 1, num_bytes, across=series.method == "zero1", overlaps=False),
    )


def compare_all_reduce(
    source: str, _: str, network_gb_s: float, link_gb_s: float, nodes: int, num_bytes: int, measured_us: float
) -> dict[str, Any]:
    """Compares one all-reduce: a reduce-scatter and an all-gather."""
    hardware = replace(read_hardware("a100_80g"), network_gb_s=network_gb_s, link_gb_s=link_gb_s)
    planned_us = 2e6 * estimate_ring(num_bytes, hardware, nodes)
    return {
        "source": source,
        "measured_us": measured_us,
        "planned_us": planned_us,
        "error": planned_us / measured_us - 1,
    }


def read_hardware(name: str) -> Hardware:
    """A hardware file."""
    return check_hardware(yaml.safe_load((CONFIG_DIR / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")))


COLUMNS = (
    ("network_gb_s", "GB/s per node", "g"),
    ("communication_s", "communication s", ".2f"),
    ("measured_s", "published s", ".2f"),
    ("planned_s", "planned s", ".2f"),
    ("error", "error", "+.1%"),
    ("planned_s_without_overlap", "without overlap", ".2f"),
    ("error_without_overlap", "error", "+.1%"),
)
COLLECTIVE_COLUMNS = (
    ("measured_us", "published us", ",.0f"),
    ("planned_us", "planned us", ",.0f"),
    ("error", "error", "+.1%"),
)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "plan.py published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)

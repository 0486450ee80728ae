"""The phases that measure links, speed and saving, write the hardware file, and run the export."""

import json
import shutil
import sys
from datetime import UTC, datetime
from statistics import median
from typing import Any

from train.acceptance.check_report import PhaseResult
from train.acceptance.child_runs import run_children
from train.acceptance.compare_runs import read_metrics
from train.acceptance.measured_hardware import convert_links, write_hardware
from train.acceptance.phase_context import NotRun, PhaseContext
from train.checkpoint.saver import checkpoint_name

HARDWARE_NAME = "measured"
_SLICE = "slice"
_SAVED_STEP, _SLICE_STEPS = 5, 6


def run_export(context: PhaseContext) -> PhaseResult:
    """Runs `python -m train.export` on a checkpoint, on rank 0's host; the program verifies tensors and logits."""
    if context.checkpoint is None:
        raise NotRun("there is no checkpoint of a resumed run")
    checkpoint, target = context.checkpoint, context.out / "export"
    command = [sys.executable, "-m", "train.export", str(checkpoint), "--out", str(target)]
    logs = context.out / "logs" / "export"
    remaining_s = context.get_remaining_s()
    result = run_children(context.ranks, command, num_ranks=1, limit_s=min(300.0, remaining_s), logs=logs)
    if result.timed_out and remaining_s < 300.0:
        raise NotRun("--minutes passed while the checkpoint was exported")
    if not result.succeeded:
        return PhaseResult(problem=f"exit codes {result.codes}\n{result.tail}")

    def read_log() -> PhaseResult:
        lines = [line.strip() for line in (logs / "rank_000.log").read_text().splitlines() if line.strip()]
        unverified = [line for line in lines if "NOT " in line]
        summary = f"{checkpoint.name} of {context.ranks.size} ranks was exported and verified"
        return PhaseResult(summary, {"lines": lines}, problem="\n".join(unverified))

    return context.ranks.on_main(read_log)


def measure_speed(context: PhaseContext) -> PhaseResult:
    """Trains a few blocks and measures the rate; a checkpoint is saved for the next phase."""
    more = (f"max_steps={_SLICE_STEPS}", f"save.every={_SAVED_STEP}", "save.keep=1")
    precision = ("precision=bf16",) if context.device.is_gpu else ()
    result = context.train_slice(_SLICE, *more, *precision, limit_s=600.0)
    if not result.succeeded:
        return PhaseResult(problem=context.describe_failure(result, _SLICE))
    context.slice_ok = True

    def read_rates() -> PhaseResult:
        lines = read_metrics(context.run_dir(_SLICE))[1:_SAVED_STEP]
        keys = ("perf/mfu", "perf/tflops_per_rank", "perf/tokens_per_s", "perf/balance", "perf/max_memory_gib")
        numbers: dict[str, Any] = {
            key.partition("/")[2]: median(line[key] for line in lines) for key in keys if key in lines[0]
        }
        numbers["model"] = vars(context.model_slice) | {}
        mfu = f"MFU {numbers['mfu']:.1%}" if "mfu" in numbers else "MFU unknown (the device's peak rate is unknown)"
        tflops = f"{numbers['tflops_per_rank']:.4g} TFLOP/s per rank"
        return PhaseResult(
            f"{mfu}, {tflops}, hidden {context.model_slice.width}, {context.model_slice.layers} blocks", numbers
        )

    return context.ranks.on_main(read_rates)


def measure_save(context: PhaseContext) -> PhaseResult:
    """Measures the checkpoint of the speed phase, and removes its files, which may have many GB."""
    if not context.slice_ok:
        raise NotRun("the run of the speed phase did not succeed")
    result, disk_gb_s = context.ranks.on_main(lambda: _measure_checkpoint(context))
    context.disk_gb_s = disk_gb_s
    return result


def _measure_checkpoint(context: PhaseContext) -> tuple[PhaseResult, float]:
    """Returns the result and the rate to the disk of one node, in GB/s."""
    run_dir = context.run_dir(_SLICE)
    stall_s = read_metrics(run_dir)[_SAVED_STEP]["perf/save_s"]
    # The last checkpoint is the only one that is kept; it is as large as the timed one.
    checkpoint = run_dir / "checkpoints" / checkpoint_name(_SLICE_STEPS)
    num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    # Training continues when run_state.json is written; sums.json is the last file before the folder is renamed.
    background_s = (checkpoint / "sums.json").stat().st_mtime - (checkpoint / "run_state.json").stat().st_mtime
    shutil.rmtree(run_dir / "checkpoints")
    total_s = stall_s + max(0.0, background_s)
    gb_s = num_bytes / context.ranks.num_nodes / total_s / 1e9
    numbers = {"bytes": num_bytes, "stall_s": stall_s, "total_s": total_s, "gb_s_of_a_node": gb_s}
    return PhaseResult(f"{num_bytes / 1e9:.3g} GB in {total_s:.2f} s, ranks wait {stall_s:.2f} s", numbers), gb_s


def measure_links(context: PhaseContext) -> PhaseResult:
    """Runs `interconnect` on all ranks."""
    out = context.out / "links.json"
    result = context.run(
        "links", ["train.acceptance.interconnect", "--out", str(out)], context.ranks.size, limit_s=300.0
    )
    if not result.succeeded:
        return PhaseResult(problem=context.describe_failure(result, "links"))
    context.links = context.ranks.on_main(lambda: json.loads(out.read_text()))
    parts = []
    for group, values in context.links["groups"].items():
        rates = ", ".join(f"{name} {values[name][-1]['gb_s']:.3g} GB/s" for name in ("all_gather", "reduce_scatter"))
        parts.append(f"{group.replace('_', ' ')}: {rates}")
    return PhaseResult("; ".join(parts), context.links)


def write_hardware_file(context: PhaseContext, *, base: str) -> PhaseResult:
    """Writes the hardware file and checks that the planner accepts it."""
    if context.links is None:
        raise NotRun("the links were not measured")
    per_node = context.ranks.count_ranks_on_host(0, context.ranks.size)
    measured = convert_links(context.links) | {"gpus_per_node": per_node}
    if context.device.is_gpu:
        measured |= {"memory_gib": round(context.device.memory_gib, 1)}
    if context.disk_gb_s is not None:
        measured["disk_gb_s"] = float(f"{context.disk_gb_s:.4g}")
    path = context.out / "configs" / "hardware" / f"{HARDWARE_NAME}.yaml"
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    description = (
        f"{per_node} x {context.device.name} on {context.ranks.num_nodes} node(s), measured by train.accept on {when}."
    )

    def write() -> PhaseResult:
        from train.plan.__main__ import list_stages

        write_hardware(path, base, measured, description)
        list_stages([f"hardware={HARDWARE_NAME}", "--config-dir", str(context.out / "configs")])
        arguments = f"hardware={HARDWARE_NAME} --config-dir {context.out / 'configs'}"
        return PhaseResult(f"python -m train.plan {arguments}", {"measured": measured, "base": base})

    return context.ranks.on_main(write)

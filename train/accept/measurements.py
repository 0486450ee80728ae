"""The phases that measure: links, the hardware file, speed, saving; and the export, which verifies itself."""

import json
import shutil
import sys
from datetime import UTC, datetime
from statistics import median
from typing import Any

from train.accept.bench import Bench, NotRun
from train.accept.child_runs import run_children
from train.accept.compare import read_metrics
from train.accept.measured_hardware import measured_keys, write_hardware
from train.accept.outcome import Finding
from train.checkpoint.saver import place_name

HARDWARE_NAME = "measured"
_SLICE = "slice"
_SAVED_STEP, _SLICE_STEPS = 5, 6


def export(bench: Bench) -> Finding:
    """`python -m train.export` of a checkpoint, on rank 0's host; it compares tensors and logits itself."""
    if bench.checkpoint is None:
        raise NotRun("no resumed run has left a checkpoint")
    place, target = bench.checkpoint, bench.out / "export"
    command = [sys.executable, "-m", "train.export", str(place), "--out", str(target)]
    logs = bench.out / "logs" / "export"
    left_s = bench.left_s()
    ended = run_children(bench.ranks, command, num_ranks=1, limit_s=min(300.0, left_s), logs=logs)
    if ended.timed_out and left_s < 300.0:
        raise NotRun("the time was over while the checkpoint was exported")
    if not ended.succeeded:
        return Finding(problem=f"exit codes {ended.codes}\n{ended.tail}")

    def said() -> Finding:
        lines = [line.strip() for line in (logs / "rank_000.log").read_text().splitlines() if line.strip()]
        unverified = [line for line in lines if "NOT " in line]
        summary = f"{place.name} of {bench.ranks.size} ranks exported; the program has verified it"
        return Finding(summary, {"lines": lines}, problem="\n".join(unverified))

    return bench.ranks.on_main(said)


def speed(bench: Bench) -> Finding:
    """Rate of a few blocks, with a save in the middle for the next phase."""
    more = (f"max_steps={_SLICE_STEPS}", f"save.every={_SAVED_STEP}", "save.keep=1")
    precision = ("precision=bf16",) if bench.device.is_gpu else ()
    ended = bench.train_slice(_SLICE, *more, *precision, limit_s=600.0)
    if not ended.succeeded:
        return Finding(problem=bench.problem_of(ended, _SLICE))
    bench.slice_ok = True

    def rates() -> Finding:
        lines = read_metrics(bench.run_dir(_SLICE))[1:_SAVED_STEP]
        keys = ("perf/mfu", "perf/tflops_per_rank", "perf/tokens_per_s", "perf/balance", "perf/max_memory_gib")
        numbers: dict[str, Any] = {
            key.partition("/")[2]: median(line[key] for line in lines) for key in keys if key in lines[0]
        }
        numbers["model"] = vars(bench.slice) | {}
        mfu = f"MFU {numbers['mfu']:.1%}" if "mfu" in numbers else "MFU not known (the device's peak rate is not)"
        tflops = f"{numbers['tflops_per_rank']:.4g} TFLOP/s a rank"
        return Finding(f"{mfu}, {tflops}, hidden {bench.slice.width}, {bench.slice.layers} blocks", numbers)

    return bench.ranks.on_main(rates)


def save(bench: Bench) -> Finding:
    """The checkpoint that the slice's run saved. Its files are removed afterwards: on a GPU they are many GB."""
    if not bench.slice_ok:
        raise NotRun("the slice's run did not succeed")
    found, disk_gb_s = bench.ranks.on_main(lambda: _saved(bench))
    bench.disk_gb_s = disk_gb_s
    return found


def _saved(bench: Bench) -> tuple[Finding, float]:
    run_dir = bench.run_dir(_SLICE)
    stall_s = read_metrics(run_dir)[_SAVED_STEP]["perf/save_s"]
    place = run_dir / "checkpoints" / place_name(_SLICE_STEPS)  # the only one that is kept; as large as the timed one
    num_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    # Training goes on when the state file is written; the sums are the last file before the checkpoint has its name.
    behind_s = (place / "sums.json").stat().st_mtime - (place / "run_state.json").stat().st_mtime
    shutil.rmtree(run_dir / "checkpoints")
    total_s = stall_s + max(0.0, behind_s)
    gb_s = num_bytes / bench.ranks.num_nodes / total_s / 1e9
    numbers = {"bytes": num_bytes, "stall_s": stall_s, "total_s": total_s, "gb_s_of_a_node": gb_s}
    return Finding(f"{num_bytes / 1e9:.3g} GB in {total_s:.2f} s, ranks wait {stall_s:.2f} s", numbers), gb_s


def bandwidth(bench: Bench) -> Finding:
    """`interconnect.py` on all ranks."""
    out = bench.out / "links.json"
    ended = bench.run("links", ["train.accept.interconnect", "--out", str(out)], bench.ranks.size, limit_s=300.0)
    if not ended.succeeded:
        return Finding(problem=bench.problem_of(ended, "links"))
    bench.links = bench.ranks.on_main(lambda: json.loads(out.read_text()))
    parts = []
    for group, values in bench.links["groups"].items():
        rates = ", ".join(f"{name} {values[name][-1]['gb_s']:.3g} GB/s" for name in ("all_gather", "reduce_scatter"))
        parts.append(f"{group.replace('_', ' ')}: {rates}")
    return Finding("; ".join(parts), bench.links)


def hardware(bench: Bench, *, base: str) -> Finding:
    """The hardware file, read back by the planner."""
    if bench.links is None:
        raise NotRun("the links were not measured")
    per_node = bench.ranks.ranks_on_host(0, bench.ranks.size)
    measured = measured_keys(bench.links) | {"gpus_per_node": per_node}
    if bench.device.is_gpu:
        measured |= {"memory_gib": round(bench.device.memory_gib, 1)}
    if bench.disk_gb_s is not None:
        measured["disk_gb_s"] = float(f"{bench.disk_gb_s:.4g}")
    path = bench.out / "configs" / "hardware" / f"{HARDWARE_NAME}.yaml"
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    about = f"{per_node} x {bench.device.name} on {bench.ranks.num_nodes} node(s), measured by train.accept on {when}."

    def written() -> Finding:
        from train.plan.__main__ import planned_stages

        write_hardware(path, base, measured, about)
        planned_stages([f"hardware={HARDWARE_NAME}", "--config-dir", str(bench.out / "configs")])
        use = f"hardware={HARDWARE_NAME} --config-dir {bench.out / 'configs'}"
        return Finding(f"python -m train.plan {use}", {"measured": measured, "base": base})

    return bench.ranks.on_main(written)

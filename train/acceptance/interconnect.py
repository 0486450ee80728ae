"""Measures bandwidth and latency between the ranks: all-gather and reduce-scatter for several message sizes.

A child run starts `python -m train.acceptance.interconnect --out FILE` on every rank. Two groups are timed: all ranks,
and the ranks of each host, with all hosts at the same time as in training. Rank 0 writes the results as JSON.
"""

import json
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_recipes.schema.arguments import ArgumentParser
from train.distributed.launch import read_launch
from train.distributed.world import set_environment

_LATENCY_BYTES = 2**13
"""Bytes per rank of the message that the latency is measured with."""
_SIZES = {"cuda": tuple(2**power for power in range(20, 31, 2)), "cpu": tuple(2**power for power in range(20, 26))}
_MAX_REPEATS, _MIN_REPEATS, _MEASURE_S = 20, 3, 1.0


def main() -> int:
    """Runs the program; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m train.acceptance.interconnect", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    options = parser.parse_args()
    launch = read_launch()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", launch.local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    set_environment(launch, device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))
    hosts: list[Any] = [None] * launch.size
    dist.all_gather_object(hosts, socket.gethostname())
    groups = {"all_ranks": measure(dist.group.WORLD, device)}
    names = list(dict.fromkeys(hosts))
    per_host = [[rank for rank, host in enumerate(hosts) if host == name] for name in names]
    if len(names) > 1 and min(map(len, per_host)) > 1:
        host_group = [dist.new_group(ranks) for ranks in per_host][names.index(hosts[launch.rank])]
        groups["one_host"] = measure(host_group, device)
    elif len(names) == 1:
        groups["one_host"] = groups["all_ranks"]
    if launch.is_main:
        options.out.write_text(json.dumps({"num_hosts": len(names), "groups": groups}, indent=1) + "\n")
    dist.destroy_process_group()
    return 0


def measure(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, Any]:
    """Measures both collectives of a group with all sizes.

    Returns:
        `num_ranks`; `latency_us` of one hop of a ring, from a small message; and for each collective a list with
        `bytes` (of the gathered tensor), `seconds` (of the slowest rank) and `gb_s`: (R - 1) / R of the bytes per
        second, which is the rate of each rank's link in one direction of a ring.
    """
    num_ranks = dist.get_world_size(group)

    def measure_s(name: str, num_bytes: int) -> float:
        full = torch.zeros(num_bytes // 4 // num_ranks * num_ranks, dtype=torch.float32, device=device)
        part = torch.zeros(len(full) // num_ranks, dtype=torch.float32, device=device)
        if name == "all_gather":
            return _measure_median_s(lambda: dist.all_gather_into_tensor(full, part, group=group), group, device)
        return _measure_median_s(lambda: dist.reduce_scatter_tensor(part, full, group=group), group, device)

    results: dict[str, Any] = {"num_ranks": num_ranks}
    small = [measure_s(name, _LATENCY_BYTES * num_ranks) for name in ("all_gather", "reduce_scatter")]
    results["latency_us"] = 1e6 * min(small) / max(1, num_ranks - 1)
    for name in ("all_gather", "reduce_scatter"):
        times = [(num_bytes, measure_s(name, num_bytes)) for num_bytes in _SIZES[device.type]]
        results[name] = [
            {"bytes": num_bytes, "seconds": time_s, "gb_s": (num_ranks - 1) / num_ranks * num_bytes / time_s / 1e9}
            for num_bytes, time_s in times
        ]
    return results


def _measure_median_s(collective: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Returns the median seconds of a collective, of the slowest rank of the group."""

    def timed_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed_s()
    first = torch.tensor([timed_s()], dtype=torch.float64, device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)  # so that all ranks use the same number of repetitions
    repeats = int(min(_MAX_REPEATS, max(_MIN_REPEATS, _MEASURE_S / max(first.item(), 1e-6))))
    median = torch.tensor([statistics.median(timed_s() for _ in range(repeats))], dtype=torch.float64, device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX, group=group)
    return float(median.item())


if __name__ == "__main__":
    raise SystemExit(main())

"""Compares the findings of all ranks at the start of a run; each check is one line of a table.

Every value is compared with rank 0's. A problem is one sentence with rank, host, the difference and the fix. This
module does not import torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from train.config.schema import ConfigError
from train.distributed.host_limits import HostLimits
from train.engine.node_sharding import KEY, ranks_per_copy

MAX_CLOCK_SKEW_S = 10.0
"""A larger difference between clocks is reported, since file times show whether a rank is alive."""
_MIN_FREE_SHARE = 0.5  # of a GPU's memory; with less, another process uses the GPU
_MIN_OPEN_FILES = 1024
_GIB = 2**30
_FIXES = {
    "run folder": "set `root=` to a folder that all nodes share and can write",
    "data": "fix it on that node, or exclude the node (Slurm: --exclude)",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU of a rank; `free` and `total` memory in bytes, as the driver reports it."""

    name: str
    uuid: str
    free: int
    total: int


@dataclass(frozen=True)
class Findings:
    """The findings of one rank.

    Attributes:
        versions: of packages and code, by name.
        config: the configuration as YAML.
        gpu: None on a CPU.
        stores: fingerprints by source.
        clock: seconds since the epoch, read by all ranks at the same time.
        errors: (name of the check, message) of what failed on this rank.
        limits: of its host.
        local_rank, ranks_per_node: as the launcher says; the second is 0 if it does not say it.
        ranks_per_copy: `zero_hpz_partition_size` of the engine; None means the ranks of a node, 1 that it is not used.
    """

    rank: int
    host: str
    versions: dict[str, str]
    config: str
    gpu: Gpu | None = None
    stores: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0
    errors: tuple[tuple[str, str], ...] = ()
    limits: HostLimits = field(default_factory=HostLimits)
    local_rank: int = 0
    ranks_per_node: int = 0
    ranks_per_copy: int | None = 1

    @property
    def rank_name(self) -> str:
        """Rank and host, as messages name them."""
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True)
class Check:
    """One line of the table: the name of the check, its result, and the problem if it has failed."""

    name: str
    result: str
    problem: str | None = None


def compare_findings(findings: Sequence[Findings]) -> list[Check]:
    """Returns the checks for the findings of all ranks, which are in the order of the ranks."""
    return [
        _compare_versions(findings),
        _compare_configs(findings),
        _compare_gpus(findings),
        _check_run_folder(findings),
        _compare_stores(findings),
        _compare_clocks(findings),
        _check_limits(findings),
        _check_nodes(findings),
    ]


def format_table(checks: Sequence[Check]) -> str:
    """Returns the checks as text, one line each."""
    rows = [("FAILED" if check.problem else "ok", check.name, check.problem or check.result) for check in checks]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _compare_versions(findings: Sequence[Findings]) -> Check:
    versions = findings[0].versions
    result = ", ".join(f"{name} {version}" for name, version in versions.items())
    for name, version in versions.items():
        other = _find_first(findings, lambda rank, name=name, own=version: rank.versions.get(name) != own)  # type: ignore[misc]
        if other is not None:
            value, fix = f"{name} {other.versions.get(name)}", "give every node the same environment"
            if name == "code":
                value, fix = f"other Python files ({other.versions.get(name)})", "give every node the same checkout"
            return _make_difference("versions", result, other, value, version, findings[0], fix)
    return Check("versions", result)


def _compare_configs(findings: Sequence[Findings]) -> Check:
    config = findings[0].config
    result = f"the same on {len(findings)} rank(s)"
    other = _find_first(findings, lambda rank: rank.config != config)
    if other is None:
        return Check("configuration", result)
    lines = zip([*config.splitlines(), ""], [*other.config.splitlines(), ""], strict=False)
    main_line, other_line = next(((a, b) for a, b in lines if a != b), ("", ""))
    fix = "start all ranks with the same command line and checkout"
    return _make_difference(
        "configuration", result, other, f"`{other_line.strip()}`", f"`{main_line.strip()}`", findings[0], fix
    )


def _compare_gpus(findings: Sequence[Findings]) -> Check:
    if findings[0].gpu is None:
        return Check("GPUs", "not used: this run computes on CPUs")
    owners: dict[str, Findings] = {}
    for rank in findings:
        if rank.gpu is None:
            continue
        owner = owners.setdefault(rank.gpu.uuid, rank)
        if owner is not rank:
            return Check(
                "GPUs",
                "",
                f"{owner.rank_name} and {rank.rank_name} have the same GPU, {rank.gpu.uuid}; "
                "assign one GPU to each rank",
            )
        if rank.gpu.free < _MIN_FREE_SHARE * rank.gpu.total:
            return Check(
                "GPUs",
                "",
                f"the GPU of {rank.rank_name}, {rank.gpu.uuid}, has only {rank.gpu.free / _GIB:.1f} of "
                f"{rank.gpu.total / _GIB:.1f} GiB free; end the other processes on it (`nvidia-smi` lists them), or "
                "exclude the node",
            )
    least = min(rank.gpu.free for rank in findings if rank.gpu)
    kinds = ", ".join(sorted({rank.gpu.name for rank in findings if rank.gpu}))
    return Check("GPUs", f"{len(owners)} ({kinds}), one per rank, at least {least / _GIB:.1f} GiB free")


def _check_run_folder(findings: Sequence[Findings]) -> Check:
    return _find_error("run folder", findings) or Check(
        "run folder", f"shared and writable for {len(findings)} rank(s)"
    )


def _compare_stores(findings: Sequence[Findings]) -> Check:
    stores = findings[0].stores
    result = f"{len(stores)} store(s), a sample of each read by every rank"
    failed = _find_error("data", findings)
    if failed is not None:
        return failed
    for name, fingerprint in stores.items():
        other = _find_first(findings, lambda rank, name=name, own=fingerprint: rank.stores.get(name) != own)  # type: ignore[misc]
        if other is not None:
            value = f"store {name} with fingerprint {other.stores.get(name, 'none')[:12]}"
            fix = "give every node the same files in data.store_root"
            return _make_difference("data", result, other, value, fingerprint[:12], findings[0], fix)
    return Check("data", result)


def _compare_clocks(findings: Sequence[Findings]) -> Check:
    first = min(findings, key=lambda rank: rank.clock)
    last = max(findings, key=lambda rank: rank.clock)
    skew_s = last.clock - first.clock
    result = f"{skew_s:.3f} s apart"
    if skew_s > MAX_CLOCK_SKEW_S:  # no problem: nothing that is learned depends on it
        result += f", {last.rank_name} before {first.rank_name}: times in logs and of late ranks are off by that much"
    return Check("clocks", result)


def _check_limits(findings: Sequence[Findings]) -> Check:
    """Open files of each rank, and the shared memory that the ranks of a host use together."""
    for rank in findings:
        if rank.limits.open_files is not None and rank.limits.open_files < _MIN_OPEN_FILES:
            problem = f"{rank.rank_name} may open at most {rank.limits.open_files} files and needs {_MIN_OPEN_FILES}"
            return Check("limits", "", f"{problem}: raise the hard limit, `ulimit -Hn 65536`")
        on_host = [other.limits.shared_memory_needed for other in findings if other.host == rank.host]
        free = rank.limits.shared_memory
        if free is not None and free < sum(on_host):
            return Check(
                "limits",
                "",
                f"{rank.rank_name}: /dev/shm has {free / _GIB:.2f} GiB free, and the workers of this host's "
                f"{len(on_host)} rank(s) may fill {sum(on_host) / _GIB:.2f}: give a container more (docker run "
                "--shm-size), or lower data.workers, data.prefetch or packing.max_tiles",
            )
    return Check("limits", "open files and shared memory suffice")


def _check_nodes(findings: Sequence[Findings]) -> Check:
    """Where every node has a copy of the weights: the ranks that share one are consecutive ranks of one node."""
    main = findings[0]
    if main.ranks_per_copy == 1:
        return Check("nodes", "not used: no copy of the weights in every node")
    fix = f"start the same number on every node, or set engine.zero_optimization.{KEY} or engine=zero3"
    if main.ranks_per_copy is None:
        other = _find_first(findings, lambda rank: rank.ranks_per_node != main.ranks_per_node)
        if other is not None:
            return _make_difference(
                "nodes", "", other, f"{other.ranks_per_node} rank(s) on its node", f"{main.ranks_per_node}", main, fix
            )
    try:
        size = ranks_per_copy({KEY: main.ranks_per_copy}, num_ranks=len(findings), ranks_per_node=main.ranks_per_node)
    except ConfigError as error:
        return Check("nodes", "", str(error))
    for rank in findings:
        first = findings[rank.rank - rank.rank % size]
        if (rank.host, rank.local_rank) != (first.host, first.local_rank + rank.rank - first.rank):
            return Check(
                "nodes",
                "",
                f"{first.rank_name} and {rank.rank_name} would share a copy of the weights, and are not consecutive "
                f"ranks of one node (local ranks {first.local_rank} and {rank.local_rank}); number the ranks node by "
                f"node (srun --distribution=block), or set engine.zero_optimization.{KEY} or engine=zero3",
            )
    copies = f"{len(findings) // size} copies of the weights" if size > 1 else "one node: no second copy of the weights"
    return Check("nodes", f"{copies}, {size} consecutive rank(s) each" if size > 1 else copies)


def _find_error(name: str, findings: Sequence[Findings]) -> Check | None:
    """Returns the failed check for the first error of that name."""
    for rank in findings:
        for check, message in rank.errors:
            if check == name:
                return Check(name, "", f"{rank.rank_name}: {message.rstrip('.')}; {_FIXES[name]}")
    return None


def _find_first(findings: Sequence[Findings], predicate: Callable[[Findings], bool]) -> Findings | None:
    return next((rank for rank in findings if predicate(rank)), None)


def _make_difference(
    name: str, result: str, other: Findings, other_value: str, main_value: str, main: Findings, fix: str
) -> Check:
    """Returns a failed check: `other` has another value than rank 0."""
    return Check(name, result, f"{other.rank_name} has {other_value}, {main.rank_name} has {main_value}; {fix}")

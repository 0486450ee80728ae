"""What the ranks of a run found about themselves at its start, compared: one line of a table for each thing.

Owns: the rules (what must be equal, what no two ranks may share) and their sentences: rank, host, what differs, the way
out. Everything is compared with rank 0's.
Leaves: looking, gathering and the verdict to `preflight.py`. Needs no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MOST_SKEW_S = 10.0
"""Clocks further apart are told: signs of life are read from the times of files."""
_LEAST_FREE = 0.5  # of a GPU's memory; below, somebody else computes on it
_GIB = 2**30
_TROUBLE_WAYS_OUT = {
    "run folder": "give `root=` a folder that every node can write and that all of them share",
    "data": "mend it on that node, or leave the node out (Slurm: --exclude)",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU that a rank has chosen; memory in bytes, free as its driver says."""

    name: str
    uuid: str
    free: int
    total: int


@dataclass(frozen=True)
class Findings:
    """What a rank found. `config` is its configuration as YAML, `clock` seconds since the epoch, taken by all at once.

    `stores` are fingerprints by name; `troubles` are (what was looked at, what was wrong with it).
    """

    rank: int
    host: str
    versions: dict[str, str]
    config: str
    gpu: Gpu | None = None
    stores: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0
    troubles: tuple[tuple[str, str], ...] = ()

    @property
    def who(self) -> str:
        """Rank and host, as sentences name them."""
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True)
class Check:
    """One line of the table: what was looked at, what was found, and a sentence if it may not stay so."""

    name: str
    found: str
    problem: str | None = None


def compare(findings: Sequence[Findings]) -> list[Check]:
    """The table's lines, from what all ranks found, in the order of ranks."""
    return [
        _compare_versions(findings),
        _compare_configs(findings),
        _compare_gpus(findings),
        _check_run_folder(findings),
        _compare_stores(findings),
        _compare_clocks(findings),
    ]


def format_table(checks: Sequence[Check]) -> str:
    """The checks as a person reads them, one line each."""
    return "\n".join(
        f"{'FAILED' if one.problem else 'ok':<8}{one.name:<15}{one.problem or one.found}" for one in checks
    )


def _compare_versions(findings: Sequence[Findings]) -> Check:
    own = findings[0].versions
    found = ", ".join(f"{name} {number}" for name, number in own.items())
    for name in own:
        other = _first(findings, lambda one, name=name: one.versions.get(name) != own[name])  # type: ignore[misc]
        if other is not None:
            what, way_out = f"{name} {other.versions.get(name)}", "give every node the same environment"
            if name == "code":
                what, way_out = f"other Python files ({other.versions.get(name)})", "give every node the same checkout"
            return _differs("versions", found, other, what, f"{own[name]}", findings[0], way_out)
    return Check("versions", found)


def _compare_configs(findings: Sequence[Findings]) -> Check:
    own = findings[0].config
    found = f"one configuration on {len(findings)} rank(s)"
    other = _first(findings, lambda one: one.config != own)
    if other is None:
        return Check("configuration", found)
    lines = zip([*own.splitlines(), ""], [*other.config.splitlines(), ""], strict=False)
    mine, theirs = next(((a, b) for a, b in lines if a != b), ("", ""))
    way_out = "start all ranks with one command line, from one checkout"
    return _differs("configuration", found, other, f"`{theirs.strip()}`", f"`{mine.strip()}`", findings[0], way_out)


def _compare_gpus(findings: Sequence[Findings]) -> Check:
    if findings[0].gpu is None:
        return Check("GPUs", "none: this run computes on CPUs")
    owners: dict[str, Findings] = {}
    for one in findings:
        if one.gpu is None:
            continue
        first = owners.setdefault(one.gpu.uuid, one)
        if first is not one:
            return Check("GPUs", "", f"{first.who} and {one.who} have the same GPU, {one.gpu.uuid}; give each its own")
        if one.gpu.free < _LEAST_FREE * one.gpu.total:
            return Check(
                "GPUs",
                "",
                f"the GPU of {one.who}, {one.gpu.uuid}, has only {one.gpu.free / _GIB:.1f} of "
                f"{one.gpu.total / _GIB:.1f} GiB free: end what else computes there (`nvidia-smi` tells), or leave the "
                "node out",
            )
    least = min(one.gpu.free for one in findings if one.gpu)
    kinds = ", ".join(sorted({one.gpu.name for one in findings if one.gpu}))
    return Check("GPUs", f"{len(owners)} ({kinds}), one a rank, at least {least / _GIB:.1f} GiB free")


def _check_run_folder(findings: Sequence[Findings]) -> Check:
    found = f"the same for {len(findings)} rank(s), and each can write to it"
    return _trouble("run folder", findings) or Check("run folder", found)


def _compare_stores(findings: Sequence[Findings]) -> Check:
    own = findings[0].stores
    found = f"{len(own)} store(s), a sample of each read by every rank"
    trouble = _trouble("data", findings)
    if trouble is not None:
        return trouble
    for name, fingerprint in own.items():
        other = _first(findings, lambda one, name=name, own=fingerprint: one.stores.get(name) != own)  # type: ignore[misc]
        if other is not None:
            what = f"store {name} with fingerprint {other.stores.get(name, 'none')[:12]}"
            way_out = "let data.store_root be the same files on every node"
            return _differs("data", found, other, what, fingerprint[:12], findings[0], way_out)
    return Check("data", found)


def _compare_clocks(findings: Sequence[Findings]) -> Check:
    first = min(findings, key=lambda one: one.clock)
    last = max(findings, key=lambda one: one.clock)
    skew = last.clock - first.clock
    found = f"{skew:.3f} s apart"
    if skew > MOST_SKEW_S:  # nothing that is learned depends on it
        found += f", {last.who} before {first.who}: times in logs, and who is said to be late, will be off by that"
    return Check("clocks", found)


def _trouble(name: str, findings: Sequence[Findings]) -> Check | None:
    for one in findings:
        for what, text in one.troubles:
            if what == name:
                return Check(name, "", f"{one.who}: {text.rstrip('.')}; {_TROUBLE_WAYS_OUT[name]}")
    return None


def _first(findings: Sequence[Findings], differs: Callable[[Findings], bool]) -> Findings | None:
    return next((one for one in findings if differs(one)), None)


def _differs(name: str, found: str, other: Findings, theirs: str, own: str, first: Findings, way_out: str) -> Check:
    return Check(name, found, f"{other.who} has {theirs}, {first.who} has {own}; {way_out}")

"""Tests of the comparison of the ranks' findings: what passes, and what each message contains."""

from dataclasses import replace

import pytest

from train.distributed.host_limits import HostLimits
from train.supervision.preflight_checks import Findings, Gpu, compare_findings, format_table

GIB = 2**30
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "code": "abc"}


def findings(rank: int) -> Findings:
    """Returns a rank without problems; two per host, each with its own GPU."""
    gpu = Gpu("H100", f"GPU-{rank}", 78 * GIB, 80 * GIB)
    stores = {"chats": "c" * 64, "pictures": "p" * 64}
    return Findings(
        rank,
        f"node{rank // 2}",
        VERSIONS,
        "seed: 0\nname: x\n",
        gpu,
        stores,
        clock=1e9 + rank / 1000,
        local_rank=rank % 2,
        ranks_per_node=2,
    )


ALL = [findings(rank) for rank in range(4)]


def test_ranks_without_problems_pass() -> None:
    """Without differences every check passes, and the table has the results."""
    checks = compare_findings(ALL)
    assert [item.problem for item in checks] == [None] * 8
    table = format_table(checks)
    assert table.count("\n") == 7
    assert all(line.startswith("ok ") for line in table.splitlines())
    for shown in ("torch 2.13.0", "4 (H100), one per rank, at least 78.0 GiB free", "2 store(s)", "0.003 s apart"):
        assert shown in table


@pytest.mark.parametrize(
    ("changes", "name", "named"),
    [
        (
            {"versions": {**VERSIONS, "torch": "2.12.0"}},
            "versions",
            ("torch 2.12.0", "rank 0 (node0) has 2.13.0", "same environment"),
        ),
        ({"versions": {**VERSIONS, "code": "abd"}}, "versions", ("other Python files (abd)", "same checkout")),
        ({"config": "seed: 0\nname: y\n"}, "configuration", ("`name: y`", "`name: x`", "same command line")),
        ({"config": "seed: 0\n"}, "configuration", ("`name: x`",)),
        (
            {"gpu": Gpu("H100", "GPU-1", 78 * GIB, 80 * GIB)},
            "GPUs",
            ("rank 1 (node0)", "same GPU, GPU-1", "one GPU to each rank"),
        ),
        ({"gpu": Gpu("H100", "GPU-3", 9 * GIB, 80 * GIB)}, "GPUs", ("9.0 of 80.0 GiB free", "nvidia-smi")),
        (
            {"stores": {"chats": "c" * 64, "pictures": "q" * 64}},
            "data",
            ("pictures", "qqqqqqqqqqqq", "pppppppppppp", "data.store_root"),
        ),
        ({"errors": (("data", "OSError: stale handle"),)}, "data", ("OSError: stale handle", "--exclude")),
        ({"errors": (("run folder", "OSError: no file"),)}, "run folder", ("OSError: no file", "`root=`")),
        ({"limits": HostLimits(open_files=256)}, "limits", ("256", "1024", "ulimit")),
        ({"limits": HostLimits(None, GIB // 16, GIB // 8)}, "limits", ("0.06 GiB", "0.12", "--shm-size")),
    ],
)
def test_a_rank_that_differs_is_named(changes: dict[str, object], name: str, named: tuple[str, ...]) -> None:
    """One rank of four differs in one value: only that check fails, with rank, host, values and the fix."""
    other = replace(ALL[3], **changes)  # type: ignore[arg-type]
    checks = compare_findings([*ALL[:3], other])
    failed = {item.name: item.problem for item in checks if item.problem}
    assert list(failed) == [name]
    for word in ("rank 3 (node1)", *named):
        assert word in (failed[name] or "")
    assert format_table(checks).count("FAILED") == 1


def test_clock_skew_is_reported_but_is_no_problem() -> None:
    """A large difference between clocks is reported with the two ranks, but is not a problem."""
    (clocks,) = [
        item for item in compare_findings([*ALL[:3], replace(ALL[3], clock=1e9 + 60)]) if item.name == "clocks"
    ]
    assert clocks.problem is None
    assert "60.000 s apart" in clocks.result
    assert "rank 3 (node1) before rank 0 (node0)" in clocks.result


def test_run_on_cpus_needs_no_gpu() -> None:
    """Without GPUs, the check says so."""
    checks = compare_findings([replace(item, gpu=None) for item in ALL])
    assert [item.problem for item in checks] == [None] * 8
    assert "computes on CPUs" in format_table(checks)


@pytest.mark.parametrize("size", [None, 2])
def test_nodes_with_a_copy_of_the_weights_pass(size: int | None) -> None:
    """Two nodes of two consecutive ranks; also where both have one host name, as simulated nodes have."""
    of_nodes = [replace(each, ranks_per_copy=size) for each in ALL]
    for ranks in (of_nodes, [replace(each, host="one") for each in of_nodes]):
        checks = compare_findings(ranks)
        assert [item.problem for item in checks] == [None] * 8
        assert "2 copies of the weights, 2 consecutive rank(s) each" in format_table(checks)


@pytest.mark.parametrize(
    ("size", "positions", "named"),
    [
        # srun --distribution=cyclic: neighbours are on different nodes.
        (None, [("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("b", 1, 2)], ("rank 0 (a) and rank 1 (b)", "block")),
        (None, [("one", 0, 2), ("one", 0, 2), ("one", 1, 2), ("one", 1, 2)], ("local ranks 0 and 0", "block")),
        (2, [("a", 0, 1), ("b", 0, 3), ("b", 1, 3), ("b", 2, 3)], ("rank 0 (a) and rank 1 (b)",)),
        (None, [("a", 0, 1), ("b", 0, 3), ("b", 1, 3), ("b", 2, 3)], ("3 rank(s) on its node", "engine=zero3")),
        (None, [("a", rank, 0) for rank in range(4)], ("launcher does not say",)),
        (3, [("a", rank, 4) for rank in range(4)], ("4 ranks are not a multiple of 3",)),
    ],
)
def test_nodes_that_cannot_have_a_copy_are_named(
    size: int | None, positions: list[tuple[str, int, int]], named: tuple[str, ...]
) -> None:
    """Ranks that are not consecutive, different numbers on the nodes, an unknown number, one that does not divide."""
    ranks = [
        replace(findings(rank), host=host, local_rank=local, ranks_per_node=on_node, ranks_per_copy=size, gpu=None)
        for rank, (host, local, on_node) in enumerate(positions)
    ]
    failed = {item.name: item.problem for item in compare_findings(ranks) if item.problem}
    assert list(failed) == ["nodes"]
    for word in named:
        assert word in (failed["nodes"] or "")

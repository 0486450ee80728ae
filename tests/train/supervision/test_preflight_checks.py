"""Owns the proofs about the comparison of what ranks found: what passes, and what each sentence names."""

from dataclasses import replace

import pytest

from train.supervision.preflight_checks import Findings, Gpu, compare, format_table

GIB = 2**30
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "code": "abc"}


def findings(rank: int) -> Findings:
    """A sound rank, two a host, each with a GPU of its own."""
    gpu = Gpu("H100", f"GPU-{rank}", 78 * GIB, 80 * GIB)
    stores = {"chats": "c" * 64, "pictures": "p" * 64}
    return Findings(rank, f"node{rank // 2}", VERSIONS, "seed: 0\nname: x\n", gpu, stores, clock=1e9 + rank / 1000)


ALL = [findings(rank) for rank in range(4)]


def test_sound_ranks_pass() -> None:
    """Nothing differs: a line for each thing, none with a problem, and the table says what was seen."""
    checks = compare(ALL)
    assert [one.problem for one in checks] == [None] * 6
    table = format_table(checks)
    assert table.count("\n") == 5
    assert all(line.startswith("ok ") for line in table.splitlines())
    for shown in ("torch 2.13.0", "4 (H100), one a rank, at least 78.0 GiB free", "2 store(s)", "0.003 s apart"):
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
        ({"config": "seed: 0\nname: y\n"}, "configuration", ("`name: y`", "`name: x`", "one command line")),
        ({"config": "seed: 0\n"}, "configuration", ("`name: x`",)),
        ({"gpu": Gpu("H100", "GPU-1", 78 * GIB, 80 * GIB)}, "GPUs", ("rank 1 (node0)", "same GPU, GPU-1", "its own")),
        ({"gpu": Gpu("H100", "GPU-3", 9 * GIB, 80 * GIB)}, "GPUs", ("9.0 of 80.0 GiB free", "nvidia-smi")),
        (
            {"stores": {"chats": "c" * 64, "pictures": "q" * 64}},
            "data",
            ("pictures", "qqqqqqqqqqqq", "pppppppppppp", "data.store_root"),
        ),
        ({"troubles": (("data", "OSError: stale handle"),)}, "data", ("OSError: stale handle", "--exclude")),
        ({"troubles": (("run folder", "OSError: no file"),)}, "run folder", ("OSError: no file", "`root=`")),
    ],
)
def test_a_rank_that_differs_is_named(changes: dict[str, object], name: str, named: tuple[str, ...]) -> None:
    """One rank of four differs in one thing: that line alone has a sentence, with rank, host, values, a way out."""
    other = replace(ALL[3], **changes)  # type: ignore[arg-type]
    checks = compare([*ALL[:3], other])
    failed = {one.name: one.problem for one in checks if one.problem}
    assert list(failed) == [name]
    for word in ("rank 3 (node1)", *named):
        assert word in (failed[name] or "")
    assert format_table(checks).count("FAILED") == 1


def test_clocks_are_told_and_refuse_nothing() -> None:
    """No learned number depends on a clock: a large difference is stated, with the two ranks."""
    (clocks,) = [one for one in compare([*ALL[:3], replace(ALL[3], clock=1e9 + 60)]) if one.name == "clocks"]
    assert clocks.problem is None
    assert "60.000 s apart" in clocks.found
    assert "rank 3 (node1) before rank 0 (node0)" in clocks.found


def test_a_run_on_cpus_wants_no_gpu() -> None:
    """Where no rank has one, the line says so."""
    checks = compare([replace(one, gpu=None) for one in ALL])
    assert [one.problem for one in checks] == [None] * 6
    assert "computes on CPUs" in format_table(checks)

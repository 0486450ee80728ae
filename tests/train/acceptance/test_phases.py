"""Tests of the phases: the generated order covers all kinds of rows and ends with a smaller step, phases that were not
run are reported so, and invalid command lines are rejected.
"""

from pathlib import Path

import pytest

from train.accept import _check_usage, _parse
from train.acceptance.check_report import has_passed
from train.acceptance.generated_inputs import compute_sizes
from train.acceptance.phase_context import Device, PhaseContext
from train.acceptance.phases import list_phases, run_phases
from train.acceptance.ranks import Ranks
from train.acceptance.row_coverage import count_kinds
from train.config.schema import ConfigError
from train.distributed.launch import Launch


class OneProcess(Ranks):
    """Rank 0 of several ranks that do not exist."""

    def on_main(self, action):  # type: ignore[no-untyped-def]
        return action()


def bench_of(num_ranks: int, out: Path) -> PhaseContext:
    """Returns a context whose deadline has passed."""
    ranks = OneProcess(Launch(0, 0, num_ranks), ["a"] * num_ranks, None, "127.0.0.1")  # type: ignore[arg-type]
    return PhaseContext(ranks, Device("CPU"), out, timeout_s=60, deadline_s=0.0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 40])
def test_different_rows_share_micro_steps(tmp_path: Path, num_ranks: int) -> None:
    """With several ranks, text-only rows and rows with images share micro-steps, and the smaller last step has blank
    rows."""
    bench = bench_of(num_ranks, tmp_path)
    bench.prepare()
    sizes = compute_sizes(num_ranks)
    assert len(bench.kinds) == 7
    assert {len(row) for step in bench.kinds for row in step} == {num_ranks}
    last = bench.kinds[-1][-1]
    assert sum(kind != "blank" for kind in last) <= sizes.last
    if num_ranks > 1:
        assert sizes.last < num_ranks
        assert "blank" in last
        assert set(last) != {"blank"}
        assert any({"text", "image"} <= set(row) for step in bench.kinds for row in step)
        assert count_kinds(bench.kinds).keys() == {"blank", "text", "image"}


@pytest.mark.parametrize("quick", [True, False])
def test_without_time_no_check_passes(tmp_path: Path, quick: bool) -> None:
    """Without remaining time, every check is reported and none as passed."""
    chosen = list_phases(2, quick=quick, base="cpu", user_overrides=["name=own"], user_ranks=1)
    checks = list(run_phases(bench_of(2, tmp_path), chosen))
    assert [check.name for check in checks] == [phase.name for phase in chosen]
    assert {check.status for check in checks} == {"not run"}
    assert not has_passed(checks)


def test_one_rank_has_no_links() -> None:
    """With one rank, the phases that need several are omitted."""
    names = {phase.name for phase in list_phases(1, quick=False, base="cpu", user_overrides=(), user_ranks=1)}
    assert {"one_rank", "zero3", "resume_zero2", "export", "speed", "save"} <= names
    assert not {"links", "hardware"} & names


@pytest.mark.parametrize(
    ("num_ranks", "num_nodes", "size"),
    [(2, 1, None), (4, 1, 2), (8, 1, 4), (4, 2, 2), (32, 4, 8), (4, 4, None), (5, 2, None)],
)
def test_a_copy_of_the_weights_in_every_node(num_ranks: int, num_nodes: int, size: int | None) -> None:
    """It is checked with the ranks of a node, or half of those of one node, if such groups have two or more ranks."""
    phases = list_phases(num_ranks, quick=False, base="cpu", user_overrides=(), user_ranks=1, num_nodes=num_nodes)
    texts = [phase.compared for phase in phases if phase.name == "zero3_node"]
    assert len(texts) == (size is not None)
    assert size is None or f"in every {size}," in texts[0]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--out", "{}"], "{}"),
        (["--out", "{}/something"], "something"),
        (["--out", "{}/new", "--hardware-base", "a1000"], "a1000"),
        (["--out", "{}/new", "--own-ranks", "3"], "3"),
        (["--out", "{}/new", "--minutes", "0"], "0"),
        (["--out", "{}/new", "--minutes", "nan"], "nan"),
        (["--out", "{}/something/new"], "something/new cannot be created"),
        (["--out", "{}/new", "max_steps=0", "mixture=lcs_558k"], "max_steps"),
        (["--out", "{}/new", "--", "experiment=nowhere"], "nowhere"),
    ],
)
def test_invalid_command_lines_are_errors(tmp_path: Path, words: list[str], value: str) -> None:
    """A non-empty folder, unknown names, and what `python -m train` rejects are errors; no folder is created."""
    (tmp_path / "something").touch()
    options = _parse([word.format(tmp_path) for word in words])
    with pytest.raises(ConfigError, match=value.format(tmp_path)):
        _check_usage(options, options.out, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_usable_command_makes_the_folder(tmp_path: Path) -> None:
    """An empty folder is accepted like a new one."""
    for name in ("new/folder", "new"):
        options = _parse(["--out", str(tmp_path / name), "--hardware-base", "a100_80g"])
        if name == "new":
            (tmp_path / "new" / "folder").rmdir()
        _check_usage(options, options.out, 2)
        assert options.out.is_dir()

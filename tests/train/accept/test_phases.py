"""Owns the proofs about what is checked: the generated order holds the rows that the checks are about and a last step
that is ragged; what did not run is reported as that; a mistake in the command line is refused.
"""

from pathlib import Path

import pytest

from train.accept.__main__ import _check_usage, _parse
from train.accept.bench import Bench, Device
from train.accept.generated_inputs import sizes_for
from train.accept.outcome import passed
from train.accept.phases import phases, run_phases
from train.accept.ranks import Ranks
from train.accept.row_coverage import count_kinds
from train.config.schema import ConfigError
from train.distributed.world import Launch


class OneProcess(Ranks):
    """Rank 0 of several, that has nobody to tell."""

    def on_main(self, action):  # type: ignore[no-untyped-def]
        return action()


def bench_of(num_ranks: int, out: Path) -> Bench:
    """A bench whose time is over."""
    ranks = OneProcess(Launch(0, 0, num_ranks), ["a"] * num_ranks, None, "127.0.0.1")  # type: ignore[arg-type]
    return Bench(ranks, Device("CPU"), out, timeout_s=60, deadline_s=0.0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 40])
def test_unlike_rows_meet(tmp_path: Path, num_ranks: int) -> None:
    """With several ranks: text-only rows beside rows with images, and blank rows in a last step of fewer samples."""
    bench = bench_of(num_ranks, tmp_path)
    bench.prepare()
    sizes = sizes_for(num_ranks)
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
def test_what_does_not_fit_is_not_passed(tmp_path: Path, quick: bool) -> None:
    """Without time left every check is reported, and none as passed."""
    chosen = phases(2, quick=quick, base="cpu", own=["name=own"], own_ranks=1)
    checks = list(run_phases(bench_of(2, tmp_path), chosen))
    assert [check.name for check in checks] == [phase.name for phase in chosen]
    assert {check.status for check in checks} == {"not run"}
    assert not passed(checks)


def test_one_rank_has_no_links() -> None:
    """What takes several ranks is no check of one."""
    names = {phase.name for phase in phases(1, quick=False, base="cpu", own=(), own_ranks=1)}
    assert {"one_rank", "zero3", "resume_zero2", "export", "speed", "save"} <= names
    assert not {"links", "hardware"} & names


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--out", "{}"], "{}"),
        (["--out", "{}/something"], "something"),
        (["--out", "{}/new", "--hardware-base", "a1000"], "a1000"),
        (["--out", "{}/new", "--own-ranks", "3"], "3"),
        (["--out", "{}/new", "--minutes", "0"], "0"),
        (["--out", "{}/new", "max_steps=0", "mixture=lcs_558k"], "max_steps"),
        (["--out", "{}/new", "--", "experiment=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, words: list[str], value: str) -> None:
    """A folder in use, names that are not there, and what `python -m train` would refuse; no folder is made."""
    (tmp_path / "something").touch()
    options = _parse([word.format(tmp_path) for word in words])
    with pytest.raises(ConfigError, match=value.format(tmp_path)):
        _check_usage(options, options.out, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_usable_command_makes_the_folder(tmp_path: Path) -> None:
    """An empty folder is as good as a new one."""
    for name in ("new/folder", "new"):
        options = _parse(["--out", str(tmp_path / name), "--hardware-base", "a100_80g"])
        if name == "new":
            (tmp_path / "new" / "folder").rmdir()
        _check_usage(options, options.out, 2)
        assert options.out.is_dir()

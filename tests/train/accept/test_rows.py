"""Owns the proof that the generated order holds the rows that the checks are about, and a last step that is ragged."""

from pathlib import Path

import pytest

from train.accept.bench import Bench, Device
from train.accept.materials import sizes_for
from train.accept.ranks import Ranks
from train.accept.rows import count_kinds
from train.world import Launch


class OneProcess(Ranks):
    """Rank 0 of several, that has nobody to tell."""

    def on_main(self, action):  # type: ignore[no-untyped-def]
        return action()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 40])
def test_unlike_rows_meet(tmp_path: Path, num_ranks: int) -> None:
    """With several ranks: text-only rows beside rows with images, and blank rows in a last step of fewer samples."""
    ranks = OneProcess(Launch(0, 0, num_ranks), ["a"] * num_ranks, None, "127.0.0.1")  # type: ignore[arg-type]
    bench = Bench(ranks, Device("CPU"), tmp_path, timeout_s=60, deadline_s=0.0)
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

"""Tests of `data.local_dir` in a run: one process of a node copies, the others wait, and all read the copy."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.sample import DataError
from data_recipes.store import local_copy
from train.config.schema import RunConfig
from train.data.local_stores import prepare_local_stores
from train.distributed.launch import Launch


def with_local_dir(config: RunConfig, folder: Path) -> RunConfig:
    """Returns the run with a local disk."""
    return replace(config, data=replace(config.data, local_dir=str(folder)))


def test_without_a_local_dir_nothing_is_copied(tiny_parts: RunConfig) -> None:
    """Without it, stores are read from their folder."""
    assert prepare_local_stores(tiny_parts, Launch(0, 0, 1)) == {}


def test_one_process_copies_and_the_others_wait(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Two processes of one node return the same paths, and only the first writes."""
    config = with_local_dir(tiny_parts, tmp_path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        second = pool.apply_async(prepare_local_stores, (config, Launch(1, 1, 2)))
        first = pool.apply_async(prepare_local_stores, (config, Launch(0, 0, 2)))
        places = first.get(60)
        assert second.get(60) == places
    assert set(places) == set(config.mixture.sources)
    here = Mixture.open(config.mixture, Path(config.data.store_root), places)
    there = Mixture.open(config.mixture, Path(config.data.store_root))
    assert here.fingerprint == there.fingerprint
    assert [here.sample(number) for number in range(9)] == [there.sample(number) for number in range(9)]


@pytest.mark.parametrize(("rank", "printed"), [(0, False), (8, True)])
def test_trouble_of_another_node_is_printed_there(
    tiny_parts: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    printed: bool,
) -> None:
    """Rank 0 prints only its own error, so a full disk on the second node is printed there."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_copy, "_copy_file", full)
    with pytest.raises(DataError, match=r"could not be copied to .*No space left.*data\.local_dir=null"):
        prepare_local_stores(with_local_dir(tiny_parts, tmp_path), Launch(rank, 0, 16))
    assert ("No space left" in capsys.readouterr().err) == printed

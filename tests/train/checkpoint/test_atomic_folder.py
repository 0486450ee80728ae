"""Owns the proofs about folders that many ranks write: every file is summed up by the rank that wrote it, and a folder
has its name only when all of them are there. What a checkpoint makes of it is test_checkpoint.py's."""

import json
from pathlib import Path

import pytest

from llava_next.formats.atomic import partial_path
from train.checkpoint import atomic_folder

FILES = {
    "config.yaml": 0,
    "engine/mp_rank_00_model_states.pt": 0,
    "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt": 0,
    "engine/zero_pp_rank_2_mp_rank_00_optim_states.pt": 2,
    "engine/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": 1,
    "engine/offloaded_tensors/rank12/exp_avg.bin": 12,
}
"""Names that DeepSpeed gives, with who writes them."""


def written(parent: Path) -> Path:
    """A folder with these files in it, whose own name looks like a rank's."""
    partial = partial_path(parent / "zero_pp_rank_5")
    for name in FILES:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(name)
    return partial


def test_each_file_is_summed_up_by_its_writer(tmp_path: Path) -> None:
    """The names inside of the folder say whose it is, not the folder's."""
    partial = written(tmp_path)
    for rank in range(13):
        atomic_folder.seal(partial, rank)
    for rank in range(13):
        sums = json.loads((partial / f"sums_rank_{rank:03d}.json").read_text())
        assert set(sums) == {name for name, owner in FILES.items() if owner == rank}


def test_whole_with_its_name_or_not_at_all(tmp_path: Path) -> None:
    """Without a rank's sums, or with a file that nobody wrote, there is no folder of that name; with all of them it
    takes the place of one from before, and holds one list of sums."""
    partial = written(tmp_path)
    for rank in range(12):
        atomic_folder.seal(partial, rank)
    with pytest.raises(OSError, match="sums_rank_012"):
        atomic_folder.commit(partial, 13)
    atomic_folder.seal(partial, 12)
    stray = partial / "engine" / "stray.bin"
    stray.write_text("whose?")
    with pytest.raises(ValueError, match=r"summed up, engine/stray\.bin"):
        atomic_folder.commit(partial, 13)
    assert not atomic_folder.place_of(partial).exists()
    stray.unlink()
    atomic_folder.place_of(partial).mkdir()
    (atomic_folder.place_of(partial) / "of an earlier run").write_text("")
    place = atomic_folder.commit(partial, 13)
    assert place == tmp_path / "zero_pp_rank_5"
    assert atomic_folder.is_complete(place)
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert names == {*FILES, "sums.json"}
    assert set(json.loads((place / "sums.json").read_text())) == set(FILES)


def test_damage_is_found_by_the_rank_whose_share_it_is(tmp_path: Path) -> None:
    """Ranks read disjoint shares that are all of it."""
    partial = written(tmp_path)
    for rank in range(13):
        atomic_folder.seal(partial, rank)
    place = atomic_folder.commit(partial, 13)
    assert [atomic_folder.corrupt_files(place, rank, 4) for rank in range(4)] == [""] * 4
    for name in FILES:
        (place / name).write_text(name[::-1])
        told = [atomic_folder.corrupt_files(place, rank, 4) for rank in range(4)]
        assert [text for text in told if text] == [f"{name} has other bytes than were written (sha256)"]
        (place / name).write_text(name)

"""Tests of folders that several ranks write: each rank seals the files that it has written, and a folder gets its name
when all of them are there. `test_saver.py` tests checkpoints."""

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
"""{file: rank that writes it}, with DeepSpeed's names."""


def write_files(parent: Path) -> Path:
    """Returns a folder with `FILES`; its name looks like that of a rank's file."""
    partial = partial_path(parent / "zero_pp_rank_5")
    for name in FILES:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(name)
    return partial


def test_files_are_sealed_by_their_rank(tmp_path: Path) -> None:
    """The rank follows from the file's name, not from that of the folder."""
    partial = write_files(tmp_path)
    for rank in range(13):
        atomic_folder.seal(partial, rank)
    for rank in range(13):
        sums = json.loads((partial / f"sums_rank_{rank:03d}.json").read_text())
        assert set(sums) == {name for name, owner in FILES.items() if owner == rank}


def test_commit_is_complete_or_refused(tmp_path: Path) -> None:
    """Without a rank's sums, or with a file of no rank, the folder is not renamed; with all of them it replaces an
    earlier folder and has one list of sums."""
    partial = write_files(tmp_path)
    for rank in range(12):
        atomic_folder.seal(partial, rank)
    with pytest.raises(OSError, match="sums_rank_012"):
        atomic_folder.commit(partial, 13)
    atomic_folder.seal(partial, 12)
    stray = partial / "engine" / "stray.bin"
    stray.write_text("unknown")
    with pytest.raises(ValueError, match=r"engine/stray\.bin"):
        atomic_folder.commit(partial, 13)
    assert not atomic_folder.final_path(partial).exists()
    stray.unlink()
    atomic_folder.final_path(partial).mkdir()
    (atomic_folder.final_path(partial) / "of an earlier run").write_text("")
    saved = atomic_folder.commit(partial, 13)
    assert saved == tmp_path / "zero_pp_rank_5"
    assert atomic_folder.is_complete(saved)
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert names == {*FILES, "sums.json"}
    assert set(json.loads((saved / "sums.json").read_text())) == set(FILES)


def test_each_changed_file_is_found_by_one_rank(tmp_path: Path) -> None:
    """The ranks' shares are disjoint and contain every file."""
    partial = write_files(tmp_path)
    for rank in range(13):
        atomic_folder.seal(partial, rank)
    saved = atomic_folder.commit(partial, 13)
    assert [atomic_folder.corrupt_files(saved, rank, 4) for rank in range(4)] == [""] * 4
    for name in FILES:
        (saved / name).write_text(name[::-1])
        messages = [atomic_folder.corrupt_files(saved, rank, 4) for rank in range(4)]
        assert [text for text in messages if text] == [f"{name} has other bytes than were written (sha256)"]
        (saved / name).write_text(name)

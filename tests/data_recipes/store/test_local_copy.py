"""Owns the proofs about copies of stores on a local disk: whole, proved, made once, made again when they are not."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.store import local_copy
from data_recipes.store.local_copy import LocalCopy, copy_stores, num_bytes_to_move
from data_recipes.store.reader import Store
from tests.data_recipes.raw_folders import conversation, make_store, picture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A store of three pictures."""
    path = tmp_path / "stores" / "s"
    make_store(path, [conversation(str(number), picture(number)) for number in range(3)])
    return path


def copied(source: Path, root: Path) -> LocalCopy:
    """The copy, made; what was announced is what was moved."""
    copy, moved, announced = LocalCopy.of(source, root), [0], 0
    announced = num_bytes_to_move([copy])
    copy_stores([copy], lambda num: moved.append(num), lambda: None)
    assert sum(moved) == announced
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copy_is_the_store(source: Path, tmp_path: Path) -> None:
    """It opens as the store it is, with the same fingerprint; a mixture reads it and has the same fingerprint too."""
    copy = copied(source, tmp_path / "scratch" / "deep")
    assert copy.is_there
    assert copy.place.name == f"s-{Store.open(source).fingerprint[:16]}"
    there, here = contents(source), contents(copy.place)
    assert here == {name: data for name, data in there.items() if name != "inputs.json"}
    mixture = MixtureConfig("m", 0, {"s": SourceShare(2)})
    far, near = Mixture.open(mixture, source.parent), Mixture.open(mixture, source.parent, {"s": copy.place})
    assert near.fingerprint == far.fingerprint
    shutil.rmtree(source)
    assert near.sample(1).pictures[0] in {picture(number) for number in range(3)}


def test_copy_is_made_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start moves no byte."""
    copied(source, tmp_path / "scratch")
    monkeypatch.setattr(local_copy, "_copy_file", lambda *_: pytest.fail("it was copied again"))
    assert num_bytes_to_move([copied(source, tmp_path / "scratch")]) == 0


def test_manifest_lists_every_file_of_the_tables(source: Path) -> None:
    """Size and sha256 of each, so that a copy is compared with what was prepared and not with what was read."""
    files = json.loads((source / "manifest.json").read_text())["files"]
    assert set(files) == set(contents(source)) - {"manifest.json", "inputs.json"}
    assert all(files[name]["bytes"] == (source / name).stat().st_size for name in files)


def test_interrupted_copy_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was whole when the copy was stopped is not copied again; there is no copy before it is all there."""
    copy_file, names = local_copy._copy_file, []

    def stopped(copy: LocalCopy, name: str, on_bytes: Any) -> None:
        if name == "manifest.json":
            raise KeyboardInterrupt
        copy_file(copy, name, on_bytes)

    monkeypatch.setattr(local_copy, "_copy_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        copied(source, tmp_path / "scratch")
    copy = LocalCopy.of(source, tmp_path / "scratch")
    assert not copy.is_there
    assert not copy.place.exists()
    (copy.partial / "manifest.json.unverified").write_text("{")

    def counted(copy: LocalCopy, name: str, on_bytes: Any) -> None:
        names.append(name)
        copy_file(copy, name, on_bytes)

    monkeypatch.setattr(local_copy, "_copy_file", counted)
    assert copied(source, tmp_path / "scratch").is_there
    assert names == ["manifest.json"]


def test_damaged_store_is_not_copied(source: Path, tmp_path: Path) -> None:
    """A store whose bytes are not those of its manifest stops the run, with the file and the way out."""
    damaged = next((source / "pictures").glob("*.arrow"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"data-00000\.arrow is not what its store's manifest says .* prepare it again"):
        copied(source, tmp_path / "scratch")
    assert not LocalCopy.of(source, tmp_path / "scratch").is_there


def test_failing_disk_is_found_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that read back otherwise than they were written are no copy."""
    fsync = os.fsync

    def rotten(descriptor: int) -> None:
        fsync(descriptor)
        os.pwrite(descriptor, b"\0\1\2", 0)

    monkeypatch.setattr(os, "fsync", rotten)
    with pytest.raises(DataError, match="the disk is failing"):
        copied(source, tmp_path / "scratch")


def test_room_is_checked_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is one sentence with both numbers, before a byte is written."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(DataError, match=r"data\.local_dir=.* has 0\.00 GiB free, and the stores need 0\.00 GiB"):
        copied(source, tmp_path / "scratch")
    assert not LocalCopy.of(source, tmp_path / "scratch").partial.exists()


def test_another_preparation_is_copied_anew(source: Path, tmp_path: Path) -> None:
    """A source that was prepared again has another fingerprint: its old copy is not read any more."""
    old = copied(source, tmp_path / "scratch")
    make_store(source, [conversation("0", picture(9))])
    new = LocalCopy.of(source, tmp_path / "scratch")
    assert not new.is_there
    assert copied(source, tmp_path / "scratch").place != old.place


def test_copy_that_lost_something_is_made_again(source: Path, tmp_path: Path) -> None:
    """A file that was cut short, or removed by a cleaner of old files, makes the copy none."""
    copy = copied(source, tmp_path / "scratch")
    next((copy.place / "pictures").glob("*.arrow")).write_bytes(b"")
    assert not copy.is_there
    assert copied(source, tmp_path / "scratch").is_there


def test_absent_store_is_named(tmp_path: Path) -> None:
    """No store, no copy: the sentence is the one that says how to prepare it."""
    with pytest.raises(DataError, match=r"no complete store at .*python -m data_recipes\.prepare --source s"):
        LocalCopy.of(tmp_path / "stores" / "s", tmp_path / "scratch")

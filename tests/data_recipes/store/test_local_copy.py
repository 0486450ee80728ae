"""Tests of local copies of stores: verification, resumption and replacement."""

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
from data_recipes.store.local_copy import LocalCopy, copy_stores, count_copy_bytes
from data_recipes.store.reader import Store
from tests.data_recipes.raw_folders import make_image, make_sample, make_store
from tests.permissions import public_folder, unprivileged


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A store of three images."""
    path = tmp_path / "stores" / "s"
    make_store(path, [make_sample(str(number), make_image(number)) for number in range(3)])
    return path


def make_copy(source: Path, root: Path) -> LocalCopy:
    """Make a copy, and check that the announced number of bytes was processed."""
    copy, moved, announced = LocalCopy.from_store(source, root), [0], 0
    announced = count_copy_bytes([copy])
    copy_stores([copy], lambda num: moved.append(num), lambda: None)
    assert sum(moved) == announced
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copy_is_the_store(source: Path, tmp_path: Path) -> None:
    """The copy opens with the same fingerprint, and a mixture reads it after the store was removed."""
    copy = make_copy(source, tmp_path / "scratch" / "deep")
    assert copy.is_complete
    assert copy.path.name == f"s-{Store.open(source).fingerprint[:16]}"
    there, here = contents(source), contents(copy.path)
    assert here == {name: data for name, data in there.items() if name != "inputs.json"}
    mixture = MixtureConfig("m", 0, {"s": SourceShare(2)})
    far, near = Mixture.open(mixture, source.parent), Mixture.open(mixture, source.parent, {"s": copy.path})
    assert near.fingerprint == far.fingerprint
    shutil.rmtree(source)
    assert near.sample(1).images[0] in {make_image(number) for number in range(3)}


def test_copy_is_made_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call copies nothing."""
    make_copy(source, tmp_path / "scratch")
    monkeypatch.setattr(local_copy, "_copy_file", lambda *_: pytest.fail("it was make_copy again"))
    assert count_copy_bytes([make_copy(source, tmp_path / "scratch")]) == 0


def test_manifest_lists_every_file_of_the_tables(source: Path) -> None:
    """The manifest has size and sha256 of each file, so that a copy is compared with the prepared store."""
    files = json.loads((source / "manifest.json").read_text())["files"]
    assert set(files) == set(contents(source)) - {"manifest.json", "inputs.json"}
    assert all(files[name]["bytes"] == (source / name).stat().st_size for name in files)


def test_interrupted_copy_is_resumed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete files of an interrupted copy are kept, and the copy is published at the end only."""
    copy_file, names = local_copy._copy_file, []

    def stopped(copy: LocalCopy, name: str, on_bytes: Any) -> None:
        if name == "manifest.json":
            raise KeyboardInterrupt
        copy_file(copy, name, on_bytes)

    monkeypatch.setattr(local_copy, "_copy_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_copy(source, tmp_path / "scratch")
    copy = LocalCopy.from_store(source, tmp_path / "scratch")
    assert not copy.is_complete
    assert not copy.path.exists()
    (copy.partial / "manifest.json.unverified").write_text("{")

    def counted(copy: LocalCopy, name: str, on_bytes: Any) -> None:
        names.append(name)
        copy_file(copy, name, on_bytes)

    monkeypatch.setattr(local_copy, "_copy_file", counted)
    assert make_copy(source, tmp_path / "scratch").is_complete
    assert names == ["manifest.json"]


def test_damaged_store_is_not_copied(source: Path, tmp_path: Path) -> None:
    """A file that differs from the manifest is reported."""
    damaged = next((source / "pictures").glob("*.arrow"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"data-00000\.arrow has sha256 .* prepare it again"):
        make_copy(source, tmp_path / "scratch")
    assert not LocalCopy.from_store(source, tmp_path / "scratch").is_complete


def test_failing_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that reads back differently is reported."""
    fsync = os.fsync

    def rotten(descriptor: int) -> None:
        fsync(descriptor)
        os.pwrite(descriptor, b"\0\1\2", 0)

    monkeypatch.setattr(os, "fsync", rotten)
    with pytest.raises(DataError, match="the disk is failing"):
        make_copy(source, tmp_path / "scratch")


def test_disk_space_is_checked_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little disk space is reported with both numbers before anything is written."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(DataError, match=r"data\.local_dir=.* has 0\.00 GiB free, and the stores need 0\.00 GiB"):
        make_copy(source, tmp_path / "scratch")
    assert not LocalCopy.from_store(source, tmp_path / "scratch").partial.exists()


def test_new_preparation_is_copied(source: Path, tmp_path: Path) -> None:
    """A new preparation has another fingerprint and another copy."""
    old = make_copy(source, tmp_path / "scratch")
    make_store(source, [make_sample("0", make_image(9))])
    new = LocalCopy.from_store(source, tmp_path / "scratch")
    assert not new.is_complete
    assert make_copy(source, tmp_path / "scratch").path != old.path


def test_incomplete_copy_is_made_again(source: Path, tmp_path: Path) -> None:
    """A copy with a truncated or missing file is made again."""
    copy = make_copy(source, tmp_path / "scratch")
    next((copy.path / "pictures").glob("*.arrow")).write_bytes(b"")
    assert not copy.is_complete
    assert make_copy(source, tmp_path / "scratch").is_complete


def test_missing_store(tmp_path: Path) -> None:
    """The message for a missing store says how to prepare it."""
    with pytest.raises(DataError, match=r"no complete store at .*python -m data_recipes\.prepare --source s"):
        LocalCopy.from_store(tmp_path / "stores" / "s", tmp_path / "scratch")


def test_copies_of_another_user_are_used() -> None:
    """Complete copies are used although nothing can be written beside them; an incomplete one is one sentence with the
    folder, its owner and the key."""
    with public_folder() as folder:
        source, root = folder / "stores" / "s", folder / "scratch"
        make_store(source, [make_sample("a", make_image(1))])
        copy = make_copy(source, root)
        for path in (root, root / ".lock"):
            path.chmod(path.stat().st_mode & ~0o222)
        with unprivileged():
            copy_stores([copy], lambda _: None, lambda: None)
        (copy.path / "manifest.json").unlink()
        with pytest.raises(DataError, match=rf"{root}.*owner {root.owner()}.*data\.local_dir=null"), unprivileged():
            copy_stores([copy], lambda _: None, lambda: None)

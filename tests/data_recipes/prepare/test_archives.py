"""Tests of preparation from archives: the store is byte for byte that of the unpacked files."""

import itertools
import shutil
from pathlib import Path

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.disk_space import estimate_space
from data_recipes.raw import packed_folders
from data_recipes.readers import llava_json
from data_recipes.schema.source import scan_raw_folder
from data_recipes.store.reader import Store, read_manifest
from tests.data_recipes.archive_files import files_of, pack, split
from tests.data_recipes.prepare.program import arguments, contents, failure, run
from tests.data_recipes.raw_folders import llava_record, make_image, write_file, write_llava

TALK = {
    "reader": "llava_json",
    "root": "llava",
    "options": {"annotations": "mix.json", "image_root": "images"},
    "max_reject_share": 0.5,
}
FORMS = [("images.zip", "1"), ("images.tar", "2"), ("images.tar.gz", "1"), ("split images.zip", "2")]


def make_workspace(folder: Path, num_samples: int = 40) -> Path:
    """Create the source `talk`, with invalid images, and a file that its record names by another extension."""
    extra = [
        llava_record(100, "cover.jpg"),
        llava_record(101, "CASE.png"),
        llava_record(102, "broken.png"),
        llava_record(103, "../secret.png"),
        llava_record(104, "wrong.png"),
    ]
    root = write_llava(folder / "raw" / "llava", num_samples, extra)
    write_file(root / "images" / "cover.gif", make_image(100, kind="GIF"))
    write_file(root / "images" / "case.png", make_image(101))
    write_file(root / "images" / "broken.png", make_image(102, 64, 64)[:-500])
    write_file(root / "images" / "wrong.png", make_image(104, kind="JPEG"))
    write_file(folder / "configs" / "source" / "talk.yaml", yaml.safe_dump(TALK))
    packed_folders._printed.clear()
    return folder


def pack_images(workspace: Path, form: str, prefix: str = "") -> Path:
    """Replace the folder of images by an archive."""
    folder = workspace / "raw" / "llava" / "images"
    files = {prefix + name: data for name, data in files_of(folder).items()}
    shutil.rmtree(folder)
    path = pack(folder.with_name(form.removeprefix("split ")), files)
    return split(path, 3)[0] if form.startswith("split") else path


def prepare_talk(workspace: Path, *more: str, stores: str = "stores") -> None:
    """Prepare the source `talk`."""
    assert prepare.main(arguments(workspace, "--source", "talk", *more, stores=stores)) == 0


@pytest.mark.parametrize(("form", "workers"), FORMS)
def test_store_is_that_of_the_files(
    tmp_path: Path, form: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte of the store is that of the unpacked files, also with worker processes. The use is printed once."""
    workspace = make_workspace(tmp_path)
    prepare_talk(workspace, stores="from_files")
    unpacked = scan_raw_folder(workspace / "raw" / "llava", workspace / "stores")
    archive = pack_images(workspace, form, "images/" if workers == "2" else "")
    assert scan_raw_folder(workspace / "raw" / "llava", workspace / "stores").digest != unpacked.digest
    capsys.readouterr()
    prepare_talk(workspace, "--workers", workers)
    expected = contents(workspace / "from_files" / "talk")
    found = contents(workspace / "stores" / "talk")
    assert found == expected
    manifest = read_manifest(workspace / "stores" / "talk") or {}
    assert manifest["repairs"] == {"found_by_other_case": 1, "found_by_other_extension": 1, "wrong_extension": 1}
    assert manifest["rejects"] == {"path_outside_root": 1, "picture_truncated": 1}
    out = capsys.readouterr().out
    assert out.count(f"{archive}: read in place of {workspace / 'raw/llava/images'}/") == 1
    assert ("of copies from archives, no longer needed" in out) == ("gz" in form)


def test_slices_and_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slices that are prepared before and after unpacking fit together, because the records are the same."""
    workspace = make_workspace(tmp_path)
    prepare_talk(workspace, stores="whole")
    prepare_talk(workspace, "--slice", "1/2")
    pack_images(workspace, "images.tar.gz")
    prepare_talk(workspace, "--slice", "2/2")
    prepare_talk(workspace, "--merge", "2")
    assert Store.open(workspace / "stores/talk").fingerprint == Store.open(workspace / "whole/talk").fingerprint
    capsys.readouterr()
    prepare_talk(workspace, stores="whole")  # the raw folder has other files, so it is prepared again
    assert "already prepared" not in capsys.readouterr().out
    prepare_talk(workspace, stores="whole")
    assert "already prepared" in capsys.readouterr().out


def test_space_is_that_of_the_files(tmp_path: Path) -> None:
    """The estimate counts the sizes of the unpacked images."""
    root = make_workspace(tmp_path) / "raw" / "llava"
    estimates = []
    for _ in range(2):
        records = itertools.islice(llava_json.samples(root, "mix.json", "images"), 40)
        estimates.append(estimate_space({"talk": "talk"}, ((None, record) for record in records), lambda: 0))
        if not (root / "images.zip").exists():
            pack_images(tmp_path, "images.zip")
    assert estimates[0] == estimates[1]
    assert estimates[0][0].num_bytes > 40 * 400 + (1 << 20) + 30 * 500


def test_interrupted_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated archive is one sentence with exit code 2, and no store."""
    workspace = make_workspace(tmp_path)
    archive = pack_images(workspace, "images.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    code, message = failure(workspace, capsys, "--source", "talk")
    assert code == 2
    assert "images.zip is incomplete or damaged" in message
    assert not (workspace / "stores" / "talk").exists()


def test_cache_folder_has_complete_files(tmp_path: Path) -> None:
    """The program in its own process reads the archive too, and leaves only complete files in its cache folder."""
    workspace = make_workspace(tmp_path, 60)
    pack_images(workspace, "images.tar.gz")
    code, out, _ = run(workspace, "--source", "talk", "--workers", "2")
    assert code == 0, out
    names = [path.name for path in (workspace / "stores" / ".archives").iterdir()]
    assert len([name for name in names if name.endswith(".index")]) == 1
    assert len([name for name in names if name.endswith(".content")]) == 1
    assert not [name for name in names if name.endswith(".partial")]

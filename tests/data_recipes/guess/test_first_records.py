"""Tests of what `guess` finds where the first records do not show it: image folders, names of columns, kept records."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.guess import __main__ as guess
from data_recipes.guess import trial
from data_recipes.guess.folder_look import FolderLook, look_at
from data_recipes.prepare import __main__ as prepare
from data_recipes.store.reader import Store
from tests.data_recipes.prepare.program import arguments
from tests.data_recipes.raw_folders import llava_record, make_image, write_file
from tests.data_recipes.readers.test_image_text_readers import write_lines

TEXTS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
IMAGE = make_image(1)


def look_at_file(path: Path) -> FolderLook:
    """Look at the folder of a file, with this file only."""
    look = look_at(path.parent)
    look.keep_only(path.name)
    return look


def best(path: Path) -> trial.Trial:
    """Return the trial of the reader that fits a file."""
    found = trial.best_of(trial.try_readers(look_at_file(path), published=False))
    assert found is not None
    return found


def image_turns(name: str) -> list[dict[str, Any]]:
    """Build turns with an image in a part."""
    content = [{"type": "image", "image": name}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "A cup."}]


@pytest.mark.parametrize(
    ("folder", "image_root"), [("data", ".."), ("qwen/data", "../.."), ("a/b/c", "../../.."), ("a/b/c/d", None)]
)
def test_images_above_the_file(folder: str, image_root: str | None, tmp_path: Path) -> None:
    """The images of a file may be named from a folder around it, as in xtuner's and Qwen's examples."""
    raw = tmp_path / "raw"
    write_file(raw / folder / "mine.json", json.dumps([llava_record(1, "images/1.png")]))
    write_file(raw / "images" / "1.png", IMAGE)
    written = tmp_path / "configs" / "source" / "mine.yaml"
    words = [str(raw / folder / "mine.json"), "--raw", str(raw), "--write", str(written)]
    if image_root is None:
        assert guess.main(words) == 2
        return
    assert guess.main(words) == 0
    assert f"image_root: {image_root}}}" in written.read_text()
    assert prepare.main(arguments(tmp_path, "--source", "mine")) == 0
    assert Store.open(tmp_path / "stores" / "mine").sample(0).images == (IMAGE,)


def test_images_below_the_folder_come_first(tmp_path: Path) -> None:
    """A folder around the raw folder is only looked at if the images are not in it."""
    path = write_file(tmp_path / "mine" / "train.json", json.dumps([llava_record(1, "images/1.png")]))
    for folder in ("mine/other/images", "images"):
        write_file(tmp_path / folder / "1.png", IMAGE)
    assert best(path).candidate.options["image_root"] == "other"


def test_texts_before_images(tmp_path: Path) -> None:
    """The folder of the images is found although many records without an image come first."""
    records = [*[{"messages": TEXTS}] * 40, *[{"messages": image_turns("1.png")}] * 40]
    path = write_lines(tmp_path / "train.jsonl", records)
    write_file(tmp_path / "photos" / "1.png", IMAGE)
    found = best(path)
    assert found.candidate.options["image_root"] == "photos"
    assert (found.num_kept, found.num_records) == (trial.NUM_RECORDS, trial.NUM_RECORDS)


def test_rejected_records_before_others(tmp_path: Path) -> None:
    """A reader is tried on more records if it keeps none of the first ones, as of LLaMA-Factory's v1_sft_demo.jsonl."""
    unfilled = [TEXTS[0], {"role": "assistant", "content": "I am {{name}}."}]
    path = write_lines(tmp_path / "train.jsonl", [*[{"messages": unfilled}] * 60, *[{"messages": TEXTS}] * 5])
    found = best(path)
    assert (found.candidate.reader, found.num_kept, found.num_records) == ("messages_jsonl", 1, 61)
    write_lines(path, [{"messages": unfilled}] * 3000)
    tried = [each for each in trial.try_readers(look_at_file(path), published=False) if each.num_records]
    assert trial.best_of(tried) is None
    assert {each.num_records for each in tried} == {trial._MAX_RECORDS}


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ([image_turns("1.png")], {}),
        ({"version": 1, "data": [{"talk": image_turns("1.png"), "images": []}]}, {"columns": {"messages": "talk"}}),
        (
            {"version": 1, "data": [{"messages": TEXTS, "photo": "1.png"}]},
            {"columns": {"images": "photo"}},
        ),
    ],
)
def test_records_in_other_forms(content: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Images and columns are found in a list of lists of turns, and in a list under a key."""
    path = write_file(tmp_path / "train.json", json.dumps(content))
    write_file(tmp_path / "photos" / "1.png", IMAGE)
    found = best(path)
    assert found.candidate.options == {"annotations": "train.json", "image_root": "photos", **options}
    assert (found.num_kept, len(found.shown[0][1])) == (1, 1)

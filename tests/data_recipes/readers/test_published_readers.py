"""Tests of the readers of DocVQA, DVQA, AI2D, COCO captions, LAION-GPT-V and the parquet releases."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_recipes.raw import archives
from data_recipes.raw.image_files import load_image
from data_recipes.raw.questions import LETTER_ANSWER, OCR, SHORT_ANSWER, pick_by_hash
from data_recipes.readers import (
    ai2d,
    chartqa,
    coco_captions,
    docvqa,
    dvqa,
    laion_gpt4v,
    llava_parquet,
    messages_parquet,
    synthdog_parquet,
)
from data_recipes.schema.sample import ArchiveMember, DataError, Reason, Reject, Sample, check_sample
from tests.data_recipes import raw_folders
from tests.data_recipes.archive_files import files_of, pack
from tests.data_recipes.raw_folders import cell, docvqa_question, write_file, write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[None]:
    """Use a cache folder of the test's own."""
    with archives.archives_cached_in(tmp_path.parent / f"{tmp_path.name}_cache"):
        yield


def split(items: object) -> tuple[list[Sample], list[Reason]]:
    """Separate a reader's samples from the reasons of its rejects."""
    assert hasattr(items, "__iter__")
    items = list(items)
    return [i for i in items if isinstance(i, Sample)], [i.reason for i in items if isinstance(i, Reject)]


def texts(sample: Sample) -> list[str]:
    """Return the texts of a sample's turns."""
    return [message.text for message in sample.messages]


def test_docvqa_merges_by_page(tmp_path: Path) -> None:
    """One conversation per page, the first accepted answer, one format instruction."""
    samples, reasons = split(docvqa.samples(raw_folders.write_docvqa(tmp_path)))
    assert [sample.id for sample in samples] == ["docvqa_abcd0001_3", "docvqa_efgh0002_1"]
    assert texts(samples[0]) == [
        f"<image>\nWhat is in line 1?\n{SHORT_ANSWER}",
        "May 4, 1981",
        "What is in line 3?",
        "Smith",
    ]
    assert samples[0].images == (tmp_path / "documents/abcd0001_3.png",)
    assert reasons == []


def test_docvqa_invalid_records(tmp_path: Path) -> None:
    """Missing, empty and invalid answers, and a page outside the folder, are rejected."""
    bad = [
        docvqa_question(4, "abcd0001_3", None),
        docvqa_question(5, "abcd0001_3", [""]),
        {**docvqa_question(6, "abcd0001_3", ["x"]), "answers": [7]},
        {**docvqa_question(7, "abcd0001_3", ["x"]), "image": "../../etc/x.png"},
    ]
    samples, reasons = split(docvqa.samples(raw_folders.write_docvqa(tmp_path, bad)))
    assert len(samples) == 2
    assert reasons == [Reason.NO_ANSWER, Reason.EMPTY_ANSWER, Reason.NOT_A_STRING, Reason.PATH_OUTSIDE_ROOT]
    write_file(tmp_path / "other.json", "[]")
    with pytest.raises(DataError, match="no list under the key 'data'"):
        list(docvqa.samples(tmp_path, "other.json"))


@pytest.mark.parametrize("form", ["qas.zip", "qas folder", "flat qas.zip", "train.tar.gz"])
def test_docvqa_forms_of_the_publisher(tmp_path: Path, form: str) -> None:
    """Today's archives (questions with types, pages without a folder), unpacked or not, and those before 2023."""
    unpacked = raw_folders.write_docvqa(tmp_path / "unpacked")
    pages = files_of(unpacked / "documents")
    questions = (unpacked / "train_v1.0.json").read_bytes()
    expected, _ = split(docvqa.samples(unpacked))
    root = tmp_path / form
    if form == "train.tar.gz":
        documents = {f"train/documents/{name}": data for name, data in pages.items()}
        pack(
            root / "train.tar.gz", {"train/ocr_results/a.json": b"{}", "train/train_v1.0.json": questions, **documents}
        )
    else:
        pack(root / "spdocvqa_images.tar.gz", pages)
        pack(root / "spdocvqa_ocr.tar.gz", {"abcd0001_3.json": b"{}"})
        if form == "qas folder":
            write_file(root / "spdocvqa_qas" / "train_v1.0_withQT.json", questions)
        else:
            folder = "" if form == "flat qas.zip" else "spdocvqa_qas/"
            files = {f"{folder}train_v1.0_withQT.json": questions, f"{folder}val_v1.0_withQT.json": b"{}"}
            pack(root / "spdocvqa_qas.zip", files)
    samples, reasons = split(docvqa.samples(root))
    assert reasons == []
    assert [(sample.id, texts(sample)) for sample in samples] == [(sample.id, texts(sample)) for sample in expected]
    assert [[load_image(image).data for image in sample.images] for sample in samples] == [
        [load_image(image).data for image in sample.images] for sample in expected
    ]
    assert not list(archives.cache_folder().glob("*ocr*.content"))


def test_docvqa_without_files(tmp_path: Path) -> None:
    """The message names the file that is expected."""
    with pytest.raises(DataError, match=r"train_v1\.0\.json: no such file"):
        list(docvqa.samples(tmp_path))


@pytest.mark.parametrize("questions", ["qa.tar.gz", "qa folder", "dvqa.zip"])
def test_dvqa_forms_of_the_publisher(tmp_path: Path, questions: str) -> None:
    """Images as images.tar.gz with its folder, and the questions packed or in a folder of their own."""
    unpacked = raw_folders.write_dvqa(tmp_path / "unpacked")
    expected, _ = split(dvqa.samples(unpacked))
    root = tmp_path / questions
    pack(root / "images.tar.gz", {f"images/{name}": data for name, data in files_of(unpacked / "images").items()})
    data = (unpacked / "train_qa.json").read_bytes()
    if questions == "qa.tar.gz":
        pack(root / "qa.tar.gz", {"qa/train_qa.json": data, "qa/val_easy_qa.json": b"[]"})
    elif questions == "qa folder":
        write_file(root / "qa" / "train_qa.json", data)
    else:
        pack(root / "dvqa.zip", {"train_qa.json": data})
    samples, reasons = split(dvqa.samples(root))
    assert reasons == []
    assert [(sample.id, texts(sample)) for sample in samples] == [(sample.id, texts(sample)) for sample in expected]
    assert [load_image(sample.images[0]) for sample in samples] == [load_image(s.images[0]) for s in expected]


@pytest.mark.parametrize("form", ["ai2d-all.zip", "unpacked"])
def test_ai2d_forms_of_the_publisher(tmp_path: Path, form: str) -> None:
    """The published archive has a folder ai2d; the list of test diagrams is a file of its own, beside it or inside."""
    published = raw_folders.write_ai2d(tmp_path / "published")
    expected, _ = split(ai2d.samples(published))
    files = {f"ai2d/{name}": data for name, data in files_of(published).items()}
    test_ids = files.pop("ai2d/ai2d_test_ids.csv")
    root = tmp_path / form
    if form == "unpacked":
        for name, data in files.items():
            write_file(root / name, data)
        write_file(root / "ai2d" / "ai2d_test_ids.csv", test_ids)
    else:
        pack(root / "ai2d-all.zip", files)
        write_file(root / "ai2d_test_ids.csv", test_ids)
    samples, reasons = split(ai2d.samples(root))
    assert reasons == []
    assert [(sample.id, texts(sample)) for sample in samples] == [(sample.id, texts(sample)) for sample in expected]
    assert [load_image(sample.images[0]) for sample in samples] == [load_image(s.images[0]) for s in expected]


def test_archives_of_other_publishers(tmp_path: Path) -> None:
    """ChartQA's one archive, COCO's two, and the tar shards of img2dataset are read where they are."""
    writers = {
        "chartqa": (raw_folders.write_chartqa, chartqa.samples, {"ChartQA Dataset.zip": "ChartQA Dataset/"}),
        "coco": (
            raw_folders.write_coco_captions,
            coco_captions.samples,
            {"annotations_trainval2014.zip": "annotations/", "train2014.zip": "train2014/"},
        ),
        "laion": (
            raw_folders.write_laion_gpt4v,
            lambda root: laion_gpt4v.samples(root, ["Describe it."]),
            {"00000.tar": "00000/"},
        ),
    }
    for name, (write, read, packed) in writers.items():
        expected = list(read(write(tmp_path / f"{name}_files")))
        files = files_of(tmp_path / f"{name}_files")
        root = tmp_path / name
        for archive, folder in packed.items():
            inside = {file: data for file, data in files.items() if file.startswith(folder)}
            prefix = folder if name == "laion" else ""  # the shards have no folder
            pack(root / archive, {file.removeprefix(prefix): data for file, data in inside.items()})
            files = {file: data for file, data in files.items() if file not in inside}
        for file, data in files.items():
            write_file(root / file, data)
        found = list(read(root))
        assert [item.id for item in found] == [item.id for item in expected]
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, Sample) == isinstance(other, Sample)
            if isinstance(one, Sample) and isinstance(other, Sample):
                assert all(isinstance(image, ArchiveMember) for image in one.images)
                assert [load_image(image) for image in one.images] == [load_image(image) for image in other.images]


def test_dvqa_mixes_its_types(tmp_path: Path) -> None:
    """One conversation per chart, in an order that does not depend on that of the file."""
    root = raw_folders.write_dvqa(tmp_path)
    samples, reasons = split(dvqa.samples(root))
    assert [sample.id for sample in samples] == ["dvqa_bar_train_00000001", "dvqa_bar_train_00000002"]
    assert [sorted(texts(sample)[1::2]) for sample in samples] == [["9", "four", "sky"]] * 2
    assert reasons == []
    questions = json.loads((root / "train_qa.json").read_text())
    write_file(root / "train_qa.json", json.dumps(questions[::-1]))
    again, _ = split(dvqa.samples(root))
    assert {s.id: texts(s) for s in again} == {s.id: texts(s) for s in samples}


def test_ai2d_samples(tmp_path: Path) -> None:
    """Questions about texts have the diagram, those about letters its rendering; test diagrams are separate."""
    root = raw_folders.write_ai2d(tmp_path)
    samples, reasons = split(ai2d.samples(root))
    assert [sample.id for sample in samples] == ["ai2d_17", "ai2d_17_abc", "ai2d_18_abc"]
    assert reasons == []
    assert samples[0].images == (root / "images/17.png",)
    assert texts(samples[0]) == [
        f"<image>\nWhat does the owl eat?\nA. mice\nB. grass\nC. sun\nD. rock\n{LETTER_ANSWER}",
        "A",
    ]
    assert texts(samples[1])[1] == "B"  # correctAnswer is an index
    tested, _ = split(ai2d.samples(root, split="test"))
    assert [sample.id for sample in tested] == ["ai2d_19"]


def test_ai2d_rendering(tmp_path: Path) -> None:
    """The text's rectangle is white with black letters, other pixels are unchanged, and the result is deterministic."""
    root = raw_folders.write_ai2d(tmp_path)
    rendering = split(ai2d.samples(root))[0][1].images[0]
    assert isinstance(rendering, bytes)
    assert split(ai2d.samples(root))[0][1].images[0] == rendering
    drawn = np.asarray(Image.open(io.BytesIO(rendering)))
    before = np.asarray(Image.open(root / "images" / "17.png"))
    is_inside = np.zeros(before.shape[:2], dtype=bool)
    is_inside[8:29, 10:51] = True  # the rectangle [[10, 8], [50, 28]], its edges included
    assert (drawn[~is_inside] == before[~is_inside]).all()
    box = drawn[8:29, 10:51]
    assert (box == box[..., :1]).all()  # grey levels only
    assert (box[:2] == 255).all()
    assert (box == 255).all(axis=2).mean() > 0.5
    assert (box.max(axis=2) < 64).sum() > 10  # the letter fills its box


def test_ai2d_invalid_records(tmp_path: Path) -> None:
    """Broken files, invalid answers, missing annotations and damaged diagrams are rejected individually."""
    root = raw_folders.write_ai2d(tmp_path)
    plain = {"abcLabel": False, "answerTexts": ["a", "b"], "correctAnswer": 1, "questionId": "20-0"}
    asked = {"Good?": plain, "Bad?": {**plain, "correctAnswer": 2}, "Worse?": {"abcLabel": False}}
    write_file(root / "questions" / "21.png.json", json.dumps({"questions": asked}))
    write_file(root / "images" / "21.png", (root / "images" / "17.png").read_bytes())
    write_file(root / "questions" / "22.png.json", "{")
    (root / "annotations" / "17.png.json").unlink()
    write_file(root / "images" / "18.png", b"")
    samples, reasons = split(ai2d.samples(root))
    assert [sample.id for sample in samples] == ["ai2d_17", "ai2d_21"]
    assert texts(samples[1]) == [f"<image>\nGood?\nA. a\nB. b\n{LETTER_ANSWER}", "B"]
    assert reasons == [
        Reason.BROKEN_RECORD,  # 17: no annotations
        Reason.IMAGE_EMPTY,  # 18
        Reason.BROKEN_RECORD,  # 21, twice
        Reason.BROKEN_RECORD,
        Reason.BROKEN_RECORD,  # 22
    ]
    (root / "ai2d_test_ids.csv").unlink()
    with pytest.raises(DataError, match=r"ai2d_test_ids\.csv does not exist"):
        list(ai2d.samples(root))
    with pytest.raises(DataError, match="split: 'dev'"):
        list(ai2d.samples(root, split="dev"))


def test_coco_captions_one_of_five(tmp_path: Path) -> None:
    """One caption per image is selected by hash, independently of the order of the file."""
    root = raw_folders.write_coco_captions(tmp_path)
    samples, reasons = split(coco_captions.samples(root))
    assert [sample.id for sample in samples] == ["coco2014_caps_9", "coco2014_caps_25"]
    assert texts(samples[1]) == ["<image>\nProvide a one-sentence caption for the provided image.", "A giraffe."]
    assert reasons == []
    path = root / "annotations" / "captions_train2014.json"
    whole = json.loads(path.read_text())
    write_file(path, json.dumps({**whole, "annotations": whole["annotations"][::-1]}))
    assert texts(split(coco_captions.samples(root))[0][0]) == texts(samples[0])
    picks = {pick_by_hash(["a", "b", "c", "d", "e"], str(key)) for key in range(60)}
    assert len(picks) == 5


def test_coco_captions_invalid_records(tmp_path: Path) -> None:
    """An empty caption, a name outside the folder and a record without id are rejected."""
    root = raw_folders.write_coco_captions(tmp_path)
    path = root / "annotations" / "captions_train2014.json"
    whole = json.loads(path.read_text())
    whole["annotations"] += [{"image_id": 9, "caption": " "}, {"image_id": 9}]
    whole["images"][1]["file_name"] = "../x.jpg"
    whole["images"].append({"file_name": "a.jpg"})
    write_file(path, json.dumps(whole))
    samples, reasons = split(coco_captions.samples(root))
    assert [sample.id for sample in samples] == ["coco2014_caps_9"]
    assert reasons == [
        Reason.EMPTY_ANSWER,
        Reason.EMPTY_ANSWER,
        Reason.PATH_OUTSIDE_ROOT,
        Reason.NOT_A_STRING,
    ]


def test_laion_gpt4v_failed_downloads(tmp_path: Path) -> None:
    """A failed download is a reject with img2dataset's error; prompts are selected by hash."""
    root = raw_folders.write_laion_gpt4v(tmp_path)
    prompts = ["Describe it.", "What is it?"]
    items = list(laion_gpt4v.samples(root, prompts))
    assert [item.id for item in items] == [f"laion_gpt4v_{n:09d}" for n in range(3)]
    failed = items[1]
    assert isinstance(failed, Reject)
    assert (failed.reason, failed.detail) == (Reason.IMAGE_MISSING, "not fetched: HTTP Error 404: Not Found")
    assert isinstance(items[2], Sample)
    assert items[2].images == (root / "00000" / "000000002.jpg",)
    assert texts(items[2])[0].removeprefix("<image>\n") in prompts
    assert texts(items[2])[1] == "The image shows meadow 000000002."
    with pytest.raises(DataError, match="prompts: the list is empty"):
        list(laion_gpt4v.samples(root, []))


def test_release_in_parquet(tmp_path: Path) -> None:
    """Images are bytes, text-only records have none, and `data_source` is ignored."""
    samples, reasons = split(llava_parquet.samples(raw_folders.write_llava_parquet(tmp_path)))
    assert [sample.id for sample in samples] == ["000000000010", "VG_100K/7", "aB3xY_0"]
    assert samples[0].images == (cell(501)["bytes"],)
    assert samples[2].images == ()
    assert texts(samples[2]) == ["Hello.", "Hi."]
    assert reasons == []


def test_placeholders_and_prompts_in_parquet(tmp_path: Path) -> None:
    """`images_first` places the image of a record without `<image>`, and `suffix` follows the first question only."""
    asked = {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}
    placed = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Two cups."}
    rows: list[dict[str, Any]] = [
        {"id": "a", "conversations": [*asked, *asked], "image": cell(1)},
        {"id": "b", "conversations": list(placed), "image": cell(2)},
        {"id": "c", "conversations": list(asked), "image": None},
    ]
    write_parquet(tmp_path / "data" / "train-0.parquet", rows)
    rejects = [check_sample(sample) for sample in split(llava_parquet.samples(tmp_path))[0]]
    assert [reject.reason if reject else None for reject in rejects] == [Reason.PLACEHOLDER_MISMATCH, None, None]
    samples, reasons = split(llava_parquet.samples(tmp_path, images_first=True, suffix="Count them."))
    assert reasons == []
    assert [check_sample(sample) for sample in samples] == [None] * 3
    assert texts(samples[0]) == ["<image>\nHow many?\nCount them.", "Two.", "How many?", "Two."]
    assert texts(samples[1])[0] == "<image>\nCount them."
    assert texts(samples[2])[0] == "How many?\nCount them."
    assert [len(sample.images) for sample in samples] == [1, 1, 0]


def test_images_in_parquet_may_be_paths(tmp_path: Path) -> None:
    """A cell without bytes is a path below the image root."""
    rows = [
        {"id": str(number), "conversations": [{"from": "human", "value": "<image>?"}], "image": image}
        for number, image in enumerate([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "../a.png"}])
    ]
    write_parquet(tmp_path / "data" / "train-0.parquet", rows)
    samples, reasons = split(llava_parquet.samples(tmp_path, image_root="images"))
    assert [sample.images for sample in samples] == [(tmp_path / "images" / "a.png",)]
    assert reasons == [Reason.PATH_OUTSIDE_ROOT]


def test_synthdog_in_parquet(tmp_path: Path) -> None:
    """Ids contain shard and row; texts are read as in the generator's layout."""
    samples, reasons = split(synthdog_parquet.samples(raw_folders.write_synthdog_parquet(tmp_path)))
    assert len({sample.id for sample in samples}) == 6
    assert samples[5].id == "synthdog_en_train_00001_000002"
    assert texts(samples[5]) == [f"<image>\n{OCR}", "early morning 1 2"]
    assert samples[5].images == (cell(522)["bytes"],)
    assert reasons == []
    rows: list[dict[str, Any]] = [
        {"image": cell(1), "ground_truth": "{}"},
        {"image": None, "ground_truth": '{"gt_parse": {}}'},
    ]
    write_parquet(tmp_path / "data" / "validation-0.parquet", rows)
    samples, reasons = split(synthdog_parquet.samples(tmp_path, split="validation"))
    assert reasons == [Reason.BROKEN_RECORD, Reason.NOT_A_STRING]


def test_messages_in_parquet_with_parts(tmp_path: Path) -> None:
    """Parts have all keys, with null for absent ones, as in TRL's datasets."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "A cup."}]
    rows = [
        {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
            "images": [cell(3)],
        }
    ]
    write_parquet(tmp_path / "deep" / "own.parquet", rows)
    samples, reasons = split(messages_parquet.samples(tmp_path))
    assert texts(samples[0]) == ["<image>\nWhat is it?", "A cup."]
    assert samples[0].images == (cell(3)["bytes"],)
    assert samples[0].id == "own.parquet, row 1"
    assert reasons == []

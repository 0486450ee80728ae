"""Generates small raw folders in the published layouts, and stores. Nothing is copied from the real datasets."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_recipes.schema.sample import Message, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import Store
from data_recipes.writing.writer import write_store
from tests.data_recipes.merged_records import MERGED, coco, record

PROMPT = "<image>\nWhat is it?"


def make_image(number: int, height: int = 12, width: int = 16, kind: str = "PNG") -> bytes:
    """Return an encoded image of random noise; each number gives another one."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_file(path: Path, data: bytes | str) -> Path:
    """Write a file and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def llava_record(number: int, image: Any = None, **changes: Any) -> dict[str, Any]:
    """Build one record of LLaVA's conversation JSON."""
    prompt = "What is it?" if image is None else PROMPT
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"Thing {number}."}]
    record: dict[str, Any] = {"id": f"{number:09d}", "conversations": turns}
    if image is not None:
        record["image"] = image
    return record | changes


def write_llava(root: Path, num_samples: int = 20, extra: Sequence[dict[str, Any]] = ()) -> Path:
    """Write LLaVA JSON, `mix.json` and `images/`; every fourth record is text-only."""
    records = []
    for number in range(num_samples):
        name = None if number % 4 == 3 else f"{number:05d}.png"
        if name:
            write_file(root / "images" / name, make_image(number))
        records.append(llava_record(number, name))
    write_file(root / "mix.json", json.dumps([*records, *extra]))
    return root


def write_chartqa(root: Path) -> Path:
    """Write ChartQA with three charts: a human and an augmented question for the first, one for each of the others."""
    folder = root / "ChartQA Dataset" / "train"
    for number in range(3):
        write_file(folder / "png" / f"two_col_{number}.png", make_image(100 + number))
    human = [{"imgname": "two_col_0.png", "query": "Which year is highest?", "label": "2016"}]
    augmented = [
        {"imgname": "two_col_1.png", "query": "How many bars?", "label": "4"},
        {"imgname": "two_col_0.png", "query": "What is the value in 2016?", "label": "37.5"},
        {"imgname": "two_col_2.png", "query": "What colour is the line?", "label": ["Blue"]},
    ]
    write_file(folder / "train_human.json", json.dumps(human))
    write_file(folder / "train_augmented.json", json.dumps(augmented))
    return root


def write_synthdog(root: Path, num_pages: int = 3) -> Path:
    """Write the layout of the SynthDoG generator."""
    lines = []
    for number in range(num_pages):
        write_file(root / "train" / f"image_{number}.jpg", make_image(200 + number, kind="JPEG"))
        truth = json.dumps({"gt_parse": {"text_sequence": f"early  morning\nin harbour {number}"}})
        lines.append(json.dumps({"file_name": f"image_{number}.jpg", "ground_truth": truth}))
    write_file(root / "train" / "metadata.jsonl", "\n".join(lines) + "\n")
    return root


def write_easy_vqa(root: Path, num_images: int = 4, split: str = "train") -> Path:
    """Write easy-VQA with three questions per image, in blocks as in the package."""
    for number in range(num_images):
        write_file(root / "data" / split / "images" / f"{number}.png", make_image(300 + number))
    questions = [
        [f"{text}?", answer, number]
        for text, answer in [("what shape is it", "circle"), ("is it red", "yes"), ("what colour", "red")]
        for number in range(num_images)
    ]
    write_file(root / "data" / split / "questions.json", json.dumps(questions))
    return root


def write_records(root: Path, annotations: str, records: Sequence[dict[str, Any]], image_root: str = ".") -> Path:
    """Write LLaVA JSON of these records, with their images."""
    write_file(root / annotations, json.dumps(list(records)))
    images = [each["image"] for each in records if "image" in each]
    for number, name in enumerate(name for each in images for name in ([each] if isinstance(each, str) else each)):
        write_file(root / image_root / name, make_image(400 + number, kind="JPEG"))
    return root


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], rows_per_group: int = 2) -> Path:
    """Write rows to a shard; column types are inferred."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=rows_per_group)
    return path


def cell(number: int, kind: str = "JPEG") -> dict[str, Any]:
    """Build an image cell as `datasets` writes it to parquet."""
    return {"bytes": make_image(number, kind=kind), "path": f"{number}.jpg"}


def write_llava_parquet(root: Path, shard: str = "data/train-00000-of-00001.parquet", first_image: int = 501) -> Path:
    """Write the release's parquet form: embedded images, null for a text-only record, a constant `data_source`."""
    greeting = "Hello." if first_image == 501 else f"Hello {first_image}."
    described = record("000000000010", coco(10), [("What is the man doing?", "Mending a net.")])
    rows = [
        {**described, "data_source": "llava-next-instruct", "image": cell(first_image)},
        {**described, "data_source": "llava-next-instruct", "image": cell(first_image + 1), "id": "VG_100K/7"},
        {**record("aB3xY_0", None, [(greeting, "Hi.")]), "data_source": "llava-next-instruct", "image": None},
    ]
    write_parquet(root / shard, rows)
    return root


def write_synthdog_parquet(root: Path, num_shards: int = 2) -> Path:
    """Write the published SynthDoG-EN."""
    for shard in range(num_shards):
        truths = [json.dumps({"gt_parse": {"text_sequence": f"early  morning {shard} {row}"}}) for row in range(3)]
        rows = [{"image": cell(510 + 10 * shard + row), "ground_truth": truth} for row, truth in enumerate(truths)]
        write_parquet(root / "data" / f"train-{shard:05d}-of-{num_shards:05d}.parquet", rows)
    return root


def docvqa_question(number: int, page: str, answers: list[str] | None) -> dict[str, Any]:
    """Build one question of DocVQA."""
    question: dict[str, Any] = {
        "questionId": number,
        "question": f"What is in line {number}?",
        "image": f"documents/{page}.png",
        "docId": 11,
        "ucsf_document_id": page.split("_")[0],
        "ucsf_document_page_no": page.split("_")[1],
        "data_split": "train",
    }
    return question if answers is None else {**question, "answers": answers}


def write_docvqa(root: Path, more: Sequence[dict[str, Any]] = ()) -> Path:
    """Write DocVQA with two questions about one page, one with two accepted answers, and one about another page."""
    for page in ("abcd0001_3", "efgh0002_1"):
        write_file(root / "documents" / f"{page}.png", make_image(600 + len(page)))
    data = [
        docvqa_question(1, "abcd0001_3", ["May 4, 1981", "4 May 1981"]),
        docvqa_question(2, "efgh0002_1", ["$ 12"]),
        docvqa_question(3, "abcd0001_3", ["Smith"]),
        *more,
    ]
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "train"}
    write_file(root / "train_v1.0.json", json.dumps({**head, "data": data}))
    return root


def write_dvqa(root: Path) -> Path:
    """Write DVQA with questions of three types about two charts."""
    kinds = [
        ("structure", "How many bars are there?", "four"),
        ("data", "What is the label?", "sky"),
        ("reasoning", "Sum?", "9"),
    ]
    questions = [
        {
            "image": f"bar_train_{chart:08d}.png",
            "question": text,
            "answer": answer,
            "question_type": kind,
            "bbox_answer": [1, 2, 3, 4] if kind == "data" else [],
            "question_id": 10 * chart + number,
        }
        for number, (kind, text, answer) in enumerate(kinds)
        for chart in (1, 2)
    ]
    write_file(root / "train_qa.json", json.dumps(questions))
    for chart in (1, 2):
        write_file(root / "images" / f"bar_train_{chart:08d}.png", make_image(620 + chart))
    return root


def write_ai2d(root: Path) -> Path:
    """Write AI2D with diagram 17 (one question of each kind), 18 (letters only) and 19 (test)."""
    lettered = {
        "What feeds on B?": {
            "abcLabel": True,
            "answerTexts": ["A", "C", "D", "E"],
            "correctAnswer": 1,
            "questionId": "17.png-0",
        }
    }
    plain = {
        "What does the owl eat?": {
            "abcLabel": False,
            "answerTexts": ["mice", "grass", "sun", "rock"],
            "correctAnswer": 0,
            "questionId": "17.png-1",
        }
    }
    text = {"T0": {"id": "T0", "rectangle": [[10, 8], [50, 28]], "value": "owl", "replacementText": "B"}}
    for name, questions in (("17.png", {**lettered, **plain}), ("18.png", lettered), ("19.png", plain)):
        write_file(root / "questions" / f"{name}.json", json.dumps({"imageName": name, "questions": questions}))
        annotations = {"text": text, "blobs": {}, "arrows": {}, "relationships": {}}
        write_file(root / "annotations" / f"{name}.json", json.dumps(annotations))
        write_file(root / "images" / name, make_image(int(name[:2]), height=48, width=64))
    write_file(root / "categories.json", json.dumps({"17.png": "foodChainsWebs"}))
    write_file(root / "ai2d_test_ids.csv", "19\n20\n")
    return root


def write_coco_captions(root: Path) -> Path:
    """Write COCO 2014 with an image with five captions, one with a single caption and one without."""
    images = [
        {"license": 1, "file_name": f"COCO_train2014_{n:012d}.jpg", "id": n, "height": 12, "width": 16}
        for n in (9, 25, 30)
    ]
    annotations = [{"image_id": 9, "id": 90 + n, "caption": f"Caption number {n}. "} for n in range(5)]
    annotations.append({"image_id": 25, "id": 250, "caption": "A giraffe."})
    whole = {"info": {"year": 2014, "x": [1]}, "images": images, "licenses": [], "annotations": annotations}
    write_file(root / "annotations" / "captions_train2014.json", json.dumps(whole))
    for image in images:
        write_file(root / "train2014" / str(image["file_name"]), make_image(700, kind="JPEG"))
    return root


def write_laion_gpt4v(root: Path) -> Path:
    """Write img2dataset's output for LAION-GPT-V, with two images and one failed download."""
    rows = [
        {
            "url": f"https://example.org/{key}.png",
            "caption": f"The image shows meadow {key}.",
            "key": key,
            "status": "failed_to_download" if error else "success",
            "error_message": error,
            "width": None if error else 16,
            "sha256": None,
        }
        for key, error in (("000000000", None), ("000000001", "HTTP Error 404: Not Found"), ("000000002", None))
    ]
    write_parquet(root / "00000.parquet", rows)
    for key in ("000000000", "000000002"):
        write_file(root / "00000" / f"{key}.jpg", make_image(int(key) + 710, kind="JPEG"))
        write_file(root / "00000" / f"{key}.json", "{}")
    return root


def write_messages(root: Path, container: str = "own.jsonl") -> Path:
    """Write user data with and without an image, as JSON lines or parquet."""
    write_file(root / "photos" / "17.jpg", make_image(17, kind="JPEG"))
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "<image>\nWhat is it?"},
                {"role": "assistant", "content": "A cup."},
            ],
            "images": ["photos/17.jpg"],
        },
        {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}], "images": []},
    ]
    if container.endswith(".parquet"):
        write_parquet(root / container, rows)
    else:
        write_file(root / container, "\n".join(map(json.dumps, rows)))
    return root


LAYOUTS = {
    "ai2d": write_ai2d,
    "chartqa": write_chartqa,
    "coco_captions": write_coco_captions,
    "docvqa": write_docvqa,
    "dvqa": write_dvqa,
    "laion_gpt4v": write_laion_gpt4v,
    "synthdog": write_synthdog,
    "synthdog_parquet": write_synthdog_parquet,
}


def write_source(source: SourceInfo, raw_root: Path) -> Path:
    """Write the raw folder of a shipped source in its published layout; merged files with all components."""
    folder = raw_root / source.root
    options = source.options
    if source.reader == "llava_json":
        table = options.get("components")
        records = (
            [each for _, each in MERGED[table]] if table else [llava_record(1, "00453/a.jpg"), llava_record(2, "b.jpg")]
        )
        return write_records(folder, options["annotations"], records, options.get("image_root", "."))
    if source.reader == "llava_parquet":
        shards = options["shards"]
        for number, pattern in enumerate([shards] if isinstance(shards, str) else shards):
            write_llava_parquet(folder, pattern.replace("*", "00000-of-00001"), first_image=501 + 2 * number)
        return folder
    if source.reader == "easy_vqa":
        return write_easy_vqa(folder, split=options["split"])
    return LAYOUTS[source.reader](folder)


def make_sample(sample_id: str, *images: bytes | Path, answer: str = "A thing.") -> Sample:
    """Build a sample with one question about its images."""
    prompt = "<image>\n" * len(images) + "What is it?"
    return Sample(sample_id, (Message("user", prompt), Message("assistant", answer)), images)


def make_store(path: Path, samples: Iterable[Sample | Reject], **source: Any) -> Store:
    """Write and open a store that is named like its folder."""
    write_store(path, SourceInfo(name=path.name, reader="test", root=".", **source), samples)
    return Store.open(path)

"""SynthDoG as its generator writes it: `{split}/metadata.jsonl` beside the pictures.

Each line is {file_name, ground_truth}, and `ground_truth` is a JSON string, {"gt_parse": {"text_sequence":
"..."}}. `synthdog_parquet.py` reads the published shards.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import PictureError, inside
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import OCR, merge
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per page of `root/split/metadata.jsonl`, in file order.

    Raises:
        DataError: there is no such metadata file.
    """
    folder = root / split
    for place, record in iter_records(folder / "metadata.jsonl"):
        if isinstance(record, Reject):
            yield record
            continue
        name = record.get("file_name")
        if not isinstance(name, str):
            yield Reject(place, Reason.NOT_A_STRING, "`file_name` is not a string", place)
            continue
        sample_id = f"synthdog_en_{split}_{Path(name).stem}"
        try:
            yield page(sample_id, record.get("ground_truth"), inside(folder, name), place)
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, place)


def page(sample_id: str, ground_truth: object, picture: Path | bytes, place: str) -> Sample | Reject:
    """The sample of one page: read it aloud, with white space collapsed."""
    text = transcription(ground_truth)
    if text is None:
        return Reject(sample_id, Reason.BROKEN_RECORD, "`ground_truth` has no gt_parse.text_sequence", place)
    return merge(sample_id, [(OCR, text)], picture, place, suffix="")


def transcription(ground_truth: object) -> str | None:
    """The text of a page with its white space collapsed; None where the field does not hold one."""
    try:
        parsed = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        text = parsed["gt_parse"]["text_sequence"]  # type: ignore[index]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return " ".join(text.split()) if isinstance(text, str) else None

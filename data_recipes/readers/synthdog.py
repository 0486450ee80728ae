"""SynthDoG as its generator writes it: `{split}/metadata.jsonl` beside the pictures.

Each line is {file_name, ground_truth}, and `ground_truth` is a JSON string, {"gt_parse": {"text_sequence":
"..."}}. The published parquet shards have the same two fields (`image`, `ground_truth`) and want a reader of
their own, which can share `transcription` below.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_recipes.json_records import iter_records
from data_recipes.pictures import PictureError, inside
from data_recipes.sample import IMAGE_PLACEHOLDER, Reason, Reject, Sample, assemble

# The wording of the released LLaVA-NeXT set (recipe 4.3).
PROMPT = (
    "OCR this image section by section, from top to bottom, and left to right. Do not insert line breaks in "
    "the "
    "output text. If a word is split due to a line break in the image, use a space instead."
)


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
            picture = inside(folder, name)
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, place)
            continue
        text = transcription(record.get("ground_truth"))
        if text is None:
            yield Reject(sample_id, Reason.BROKEN_RECORD, "`ground_truth` has no gt_parse.text_sequence", place)
            continue
        yield assemble(sample_id, [("user", f"{IMAGE_PLACEHOLDER}\n{PROMPT}"), ("assistant", text)], [picture], place)


def transcription(ground_truth: object) -> str | None:
    """The text of a page with its white space collapsed; None where the field does not hold one."""
    try:
        parsed = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        text = parsed["gt_parse"]["text_sequence"]  # type: ignore[index]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return " ".join(text.split()) if isinstance(text, str) else None

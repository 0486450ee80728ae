"""Reader of SynthDoG in the layout of its generator: `{split}/metadata.jsonl` and the page images in the same folder.

Each line is {file_name, ground_truth}, where `ground_truth` is a JSON string, {"gt_parse": {"text_sequence": "..."}}.
`synthdog_parquet.py` reads the published shards.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import ImageError, resolve_image
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import OCR, make_conversation
from data_recipes.schema.sample import ImageReference, Reason, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per page of `root/split/metadata.jsonl`, in file order.

    Raises:
        DataError: the metadata file does not exist.
    """
    folder = root / split
    for location, record in iter_records(folder / "metadata.jsonl"):
        if isinstance(record, Reject):
            yield record
            continue
        name = record.get("file_name")
        if not isinstance(name, str):
            yield Reject(location, Reason.NOT_A_STRING, "`file_name` is not a string", location)
            continue
        sample_id = f"synthdog_en_{split}_{Path(name).stem}"
        try:
            yield make_page_sample(sample_id, record.get("ground_truth"), resolve_image(name, folder), location)
        except ImageError as error:
            yield Reject(sample_id, error.reason, error.detail, location)


def make_page_sample(sample_id: str, ground_truth: object, image: ImageReference, location: str) -> Sample | Reject:
    """Build the sample of one page: the OCR prompt and the page's text.

    Args:
        sample_id: id of the sample.
        ground_truth: the raw field, a JSON string or an object.
        image: the page.
        location: file and record number.
    """
    text = parse_transcription(ground_truth)
    if text is None:
        return Reject(sample_id, Reason.BROKEN_RECORD, "`ground_truth` has no gt_parse.text_sequence", location)
    return make_conversation(sample_id, [(OCR, text)], image, location, suffix="")


def parse_transcription(ground_truth: object) -> str | None:
    """Return the text of a page with white space collapsed, or None if the field has no valid text."""
    try:
        parsed = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        text = parsed["gt_parse"]["text_sequence"]  # type: ignore[index]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return " ".join(text.split()) if isinstance(text, str) else None

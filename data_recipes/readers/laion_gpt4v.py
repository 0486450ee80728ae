"""Reader of LAION-GPT-V: captions that GPT-4V wrote for images linked in LAION.

The published table contains links and captions, no images. The reader expects the output of img2dataset with
`output_format=files`: per shard a table `NNNNN.parquet` of {key, url, caption, status, error_message, ...} and a folder
`NNNNN/` with `KEY.jpg`, or, with `output_format=webdataset`, an archive `NNNNN.tar`. A link that could not be
downloaded is a `Reject`. The dataset has no prompts; the source's YAML lists some, and one of them is selected by hash
for each image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_recipes.raw.image_files import ImageError, resolve_image
from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.raw.questions import make_conversation, pick_by_hash
from data_recipes.schema.sample import DataError, Reason, Reject, Sample


def samples(root: Path, prompts: Sequence[str], extension: str = "jpg") -> Iterator[Sample | Reject]:
    """Yield one sample per downloaded image, shards sorted by name.

    Args:
        root: the output folder of img2dataset.
        prompts: prompts to select from.
        extension: file extension of the images (`encode_format` of img2dataset).

    Raises:
        DataError: there are no prompts or shards, or a shard lacks a required column.
    """
    if not prompts:
        raise DataError("prompts: the list is empty; add at least one sentence that asks for a description.")
    for shard in find_shards(root, "*.parquet"):
        for location, row in iter_rows(shard, ["key", "status", "caption"], optional=["error_message"]):
            yield row if isinstance(row, Reject) else _convert_row(row, shard, prompts, extension, location)


def _convert_row(
    row: dict[str, Any], shard: Path, prompts: Sequence[str], extension: str, location: str
) -> Sample | Reject:
    sample_id = f"laion_gpt4v_{row['key']}"
    if row["status"] != "success":
        detail = f"not fetched: {row.get('error_message') or row['status']}"
        return Reject(sample_id, Reason.IMAGE_MISSING, detail, location)
    if not isinstance(row["caption"], str):
        return Reject(sample_id, Reason.NOT_A_STRING, "`caption` is not a string", location)
    try:
        image = resolve_image(f"{row['key']}.{extension}", shard.with_suffix(""))
    except ImageError as error:
        return Reject(sample_id, error.reason, error.detail, location)
    return make_conversation(
        sample_id, [(pick_by_hash(prompts, sample_id), row["caption"])], image, location, suffix=""
    )

"""LAION-GPT-V: captions that GPT-4V wrote for links of LAION.

The publisher ships a table of links and captions without pictures. They are fetched with img2dataset, whose output
(`output_format=files`) is what is read here: a table `NNNNN.parquet` a shard, {key, url, caption, status,
error_message, ...}, beside the folder `NNNNN/` with `KEY.jpg`. Most losses are links that died: each is counted.

The set has no prompts; the source's YAML brings some, and one of them is chosen by hash for each picture.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_recipes.raw.image_files import PictureError, inside
from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.raw.questions import merge, pick_by_hash
from data_recipes.schema.sample import DataError, Reason, Reject, Sample


def samples(root: Path, prompts: Sequence[str], extension: str = "jpg") -> Iterator[Sample | Reject]:
    """Yield one sample per link that could be fetched, shards by name.

    Args:
        root: img2dataset's output folder.
        prompts: what may be asked for.
        extension: of the pictures (img2dataset's `encode_format`).

    Raises:
        DataError: no prompts, no shard, or a shard that lacks a column.
    """
    if not prompts:
        raise DataError("prompts: there is none; name at least one sentence that asks for a description.")
    for shard in find_shards(root, "*.parquet"):
        for place, row in iter_rows(shard, ["key", "status", "caption"], optional=["error_message"]):
            yield row if isinstance(row, Reject) else _sample(row, shard, prompts, extension, place)


def _sample(row: dict[str, Any], shard: Path, prompts: Sequence[str], extension: str, place: str) -> Sample | Reject:
    sample_id = f"laion_gpt4v_{row['key']}"
    if row["status"] != "success":
        detail = f"not fetched: {row.get('error_message') or row['status']}"
        return Reject(sample_id, Reason.PICTURE_MISSING, detail, place)
    if not isinstance(row["caption"], str):
        return Reject(sample_id, Reason.NOT_A_STRING, "`caption` is not a string", place)
    try:
        picture = inside(shard.with_suffix(""), f"{row['key']}.{extension}")
    except PictureError as error:
        return Reject(sample_id, error.reason, error.detail, place)
    return merge(sample_id, [(pick_by_hash(prompts, sample_id), row["caption"])], picture, place, suffix="")

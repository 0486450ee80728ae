"""Reader of LLaVA conversations in parquet: the released LLaVA-NeXT-Data and datasets in the same format.

The columns are `id`, `conversations` (a list of {from, value}) and `image` ({bytes, path}, null for text-only
conversations); others are not read. The release has no image folders in this form, so its components cannot be
separated; use `llava_json.py` with the raw form instead.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.readers.llava_json import convert_record
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, shards: str = "data/train-*.parquet", image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield one sample per row, shards sorted by name.

    Args:
        root: the source's raw folder.
        shards: glob pattern of the parquet files, relative to `root`.
        image_root: folder, relative to `root`, of images that are stored as paths instead of bytes.

    Raises:
        DataError: there is no shard, or a shard lacks a required column.
    """
    for shard in find_shards(root, shards):
        for location, row in iter_rows(shard, ["id", "conversations"], optional=["image"]):
            yield row if isinstance(row, Reject) else convert_record(row, root / image_root, location)

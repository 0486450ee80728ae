"""Reader of user data in parquet with columns `messages` and `images`, as written by the `datasets` library.

The records are those of `messages_jsonl.py`; `images` contains {bytes, path} or paths, and `id` is optional.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.readers.messages_jsonl import convert_record
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, shards: str = "**/*.parquet", image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield one sample per row, shards sorted by name.

    Args:
        root: the source's raw folder.
        shards: glob pattern of the parquet files, relative to `root`.
        image_root: folder, relative to `root`, of images that are stored as paths instead of bytes.

    Raises:
        DataError: there is no shard, or a shard has no column `messages`.
    """
    for shard in find_shards(root, shards):
        for location, row in iter_rows(shard, ["messages"], optional=["id", "images"]):
            yield row if isinstance(row, Reject) else convert_record(row, root / image_root, location)

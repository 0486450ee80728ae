"""One's own data in parquet, as `datasets` writes it for TRL and others: columns `messages` and `images`.

The records of `messages_jsonl.py`, where `images` holds {bytes, path} or paths; a column `id` is optional.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.readers.messages_jsonl import conversation
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, shards: str = "**/*.parquet", image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the rows of the shards, shards by name.

    Args:
        root: the source's raw folder.
        shards: the parquet files below `root`, as a pattern.
        image_root: where pictures are that have a path and no bytes.

    Raises:
        DataError: there is no such shard, or it has no column `messages`.
    """
    for shard in find_shards(root, shards):
        for place, row in iter_rows(shard, ["messages"], optional=["id", "images"]):
            yield row if isinstance(row, Reject) else conversation(row, root / image_root, place)

"""LLaVA's conversations in parquet: the released LLaVA-NeXT-Data, and sets that were published after it.

Columns `id`, `conversations` (a list of {from, value}) and `image` ({bytes, path}, empty for text-only chats); others
are not read. The release names no folders in it, so its parts cannot be told apart here: its raw form, which
`llava_json.py` reads, can.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.readers.llava_json import conversation
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, shards: str = "data/train-*.parquet", image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the rows of the shards, shards by name.

    Args:
        root: the source's raw folder.
        shards: the parquet files below `root`, as a pattern.
        image_root: where pictures are that have a path and no bytes.

    Raises:
        DataError: there is no such shard, or it lacks a column.
    """
    for shard in find_shards(root, shards):
        for place, row in iter_rows(shard, ["id", "conversations"], optional=["image"]):
            yield row if isinstance(row, Reject) else conversation(row, root / image_root, place)

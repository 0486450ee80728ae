"""SynthDoG-EN as it is published: parquet shards with `image` ({bytes, path}) and `ground_truth` (a JSON string).

What a page's `ground_truth` holds is `synthdog.py`'s.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import PictureError
from data_recipes.raw.parquet_records import find_shards, iter_rows, picture_of
from data_recipes.readers.synthdog import page
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per row of `root/data/{split}-*.parquet`, named after shard and row.

    Raises:
        DataError: there is no such shard, or it lacks a column.
    """
    for shard_number, shard in enumerate(find_shards(root, f"data/{split}-*.parquet")):
        for row_number, (place, row) in enumerate(iter_rows(shard, ["image", "ground_truth"])):
            if isinstance(row, Reject):
                yield row
                continue
            sample_id = f"synthdog_en_{split}_{shard_number:05d}_{row_number:06d}"
            try:
                yield page(sample_id, row["ground_truth"], picture_of(row["image"], root), place)
            except PictureError as error:
                yield Reject(sample_id, error.reason, error.detail, place)

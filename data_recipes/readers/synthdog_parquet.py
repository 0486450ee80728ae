"""Reader of the published SynthDoG-EN: parquet shards with `image` ({bytes, path}) and `ground_truth` (a JSON string).

`synthdog.py` describes the content of `ground_truth`.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import ImageError, resolve_image
from data_recipes.raw.parquet_records import find_shards, iter_rows
from data_recipes.readers.synthdog import make_page_sample
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per row of `root/data/{split}-*.parquet`; its id contains the shard and row numbers.

    Raises:
        DataError: there is no shard, or a shard lacks a required column.
    """
    for shard_number, shard in enumerate(find_shards(root, f"data/{split}-*.parquet")):
        for row_number, (location, row) in enumerate(iter_rows(shard, ["image", "ground_truth"])):
            if isinstance(row, Reject):
                yield row
                continue
            sample_id = f"synthdog_en_{split}_{shard_number:05d}_{row_number:06d}"
            try:
                yield make_page_sample(sample_id, row["ground_truth"], resolve_image(row["image"], root), location)
            except ImageError as error:
                yield Reject(sample_id, error.reason, error.detail, location)

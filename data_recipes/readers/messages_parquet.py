"""Reader of conversations in parquet, as the `datasets` library writes them: for example, `messages` and `images`.

The rows are the records of `messages_jsonl.py`; images are {bytes, path} or paths. `llava_parquet.py` differs in the
default of `shards` only.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_recipes.raw.conversation_keys import read_columns
from data_recipes.raw.conversation_record import convert_record
from data_recipes.raw.parquet_records import find_shards, iter_rows, list_columns
from data_recipes.schema.sample import Reject, Sample


def samples(
    root: Path,
    shards: str | Sequence[str] = "**/*.parquet",
    image_root: str = ".",
    columns: Mapping[str, str | None] | None = None,
    images_first: bool = False,
    suffix: str = "",
) -> Iterator[Sample | Reject]:
    """Yield one sample per row, the shards of a pattern sorted by name.

    Args:
        root: the source's raw folder.
        shards: glob pattern of the parquet files, relative to `root`, or a list of patterns.
        image_root: folder, relative to `root`, of images that are stored as paths instead of bytes.
        columns: {part of a record: column that holds it}, for columns other than the usual ones; see
            `conversation_keys.PARTS`.
        images_first, suffix: see `conversation_record.convert_record`.

    Raises:
        DataError: a pattern has no shard, a shard has no column of a conversation, or an option has an invalid value.
    """
    keys = read_columns(columns)
    for shard in find_shards(root, shards):
        names = list_columns(shard)
        keys.check_columns(names, str(shard))
        for location, row in iter_rows(shard, names):
            if isinstance(row, Reject):
                yield row
            else:
                images = root / image_root
                yield convert_record(row, images, location, keys, images_first=images_first, suffix=suffix)

"""Reader of parquet shards with images and texts in columns, as most vision-language datasets of the Hugging Face Hub.

The rows are those of `imagefolder.py`: `images` with `texts`, a list of {user, assistant} (The Cauldron, FineVision);
`image` with `question` and `answer` or `answers`, and possibly `options` (DocVQA, TextVQA, AI2D, ScienceQA and others
there); `image` with `text` or `caption`. Images are {bytes, path} or paths. Shards with `messages` or LLaVA's
`conversations` only have readers of their own, `messages_parquet.py` and `llava_parquet.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_recipes.raw.parquet_records import find_shards, iter_rows, list_columns
from data_recipes.readers.imagefolder import PROMPTS, RowLayout, convert_row
from data_recipes.schema.sample import Reject, Sample


def samples(
    root: Path,
    shards: str = "**/*.parquet",
    image_root: str = ".",
    columns: Mapping[str, str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    suffix: str = "",
) -> Iterator[Sample | Reject]:
    """Yield one sample per row, shards sorted by name.

    Args:
        root: the source's raw folder.
        shards: glob pattern of the parquet files, relative to `root`.
        image_root: folder, relative to `root`, of images that are stored as paths instead of bytes.
        columns, prompts, suffix: see `imagefolder.RowLayout`.

    Raises:
        DataError: there is no shard, or an option has an invalid value.
    """
    layout = RowLayout(columns or {}, prompts, suffix)
    for shard in find_shards(root, shards):
        for location, row in iter_rows(shard, [], optional=list_columns(shard)):
            yield row if isinstance(row, Reject) else convert_row(row, root / image_root, location, layout)

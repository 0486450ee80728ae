"""Reader of LLaVA conversations in parquet: the released LLaVA-NeXT-Data and datasets in the same format.

The columns are `id`, `conversations` (a list of {from, value}) and `image` ({bytes, path}, null for text-only
conversations); the other layouts of `messages_parquet.py` are read too. The release has no image folders in this form,
so its components cannot be separated; use `llava_json.py` with the raw form instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_recipes.readers import messages_parquet
from data_recipes.schema.sample import Reject, Sample


def samples(
    root: Path,
    shards: str | Sequence[str] = "data/train-*.parquet",
    image_root: str = ".",
    columns: Mapping[str, str | None] | None = None,
    images_first: bool = False,
    suffix: str = "",
) -> Iterator[Sample | Reject]:
    """Yield one sample per row; arguments, order and errors as for `messages_parquet.samples`."""
    yield from messages_parquet.samples(root, shards, image_root, columns, images_first, suffix)

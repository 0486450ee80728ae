"""Reader of conversations in JSON, in the layouts of TRL, ms-swift, LLaMA-Factory, OpenAI, Qwen, xtuner and LLaVA.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A
     cup."}], "images": ["photos/17.jpg"]}

The file is a list, one object or list of turns per line, objects over several lines, or one object that holds the list.
The layout of each record follows from its keys (`docs/data_layouts.md`). `llava_json.py` reads the same layouts, and
separates the parts of merged files; `messages_parquet.py` reads them from parquet.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_recipes.raw.conversation_keys import RecordKeys, read_columns
from data_recipes.raw.conversation_record import convert_record
from data_recipes.raw.dataset_info import FILE_NAME, read_dataset_info
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import DataError, Reject, Sample


def samples(
    root: Path,
    annotations: str,
    image_root: str = ".",
    columns: Mapping[str, str | None] | None = None,
    dataset: str | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: path of the JSON file, relative to `root`; or of LLaMA-Factory's `dataset_info.json`.
        image_root: folder that the records' image paths are relative to, itself relative to `root`.
        columns: {part of a record: key that holds it}, for keys other than the usual ones; see
            `conversation_keys.PARTS`.
        dataset: the entry of `dataset_info.json` to read.

    Raises:
        DataError: the annotations file does not exist, or an option has an invalid value.
    """
    path, keys = find_annotations(root / annotations, columns, dataset)
    for location, record in iter_records(path, (dict, list), record_keys=keys.record_keys()):
        yield record if isinstance(record, Reject) else convert_record(record, root / image_root, location, keys)


def find_annotations(path: Path, columns: object, dataset: str | None) -> tuple[Path, RecordKeys]:
    """Return the file with the records and the keys of their parts; arguments and errors as for `samples`."""
    if path.name == FILE_NAME:
        return read_dataset_info(path, dataset, columns)
    if dataset is not None:
        raise DataError(f"dataset: {dataset!r} is an entry of {FILE_NAME}, but `annotations` is {path.name!r}.")
    return path, read_columns(columns)

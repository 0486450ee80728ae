"""One's own data, as TRL, ms-swift and LLaMA-Factory read it: one object per line, `messages` and `images`.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A
     cup."}], "images": ["photos/17.jpg"]}

`content` may also be a list of parts, {"type": "text", "text": ...} and {"type": "image"}; an image is a path
or {"path": ...}. Where no message says where the images stand, they stand before the first question, as TRL and
ms-swift have it. `id` is optional: without one, a sample is named after its file and line. `messages_parquet.py`
reads the same columns from parquet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_recipes.raw.image_files import PictureError
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.parquet_records import picture_of
from data_recipes.readers.llava_json import record_id
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, Reason, Reject, Sample, assemble


def samples(root: Path, annotations: str, image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: the JSON-lines file (a JSON list is read too), below `root`.
        image_root: the folder, below `root`, that the paths in `images` start from.

    Raises:
        DataError: there is no such annotations file.
    """
    for place, record in iter_records(root / annotations):
        yield record if isinstance(record, Reject) else conversation(record, root / image_root, place)


def conversation(record: dict[str, Any], pictures_root: Path, place: str) -> Sample | Reject:
    """The sample of one record; a picture is a path below `pictures_root`, or a cell of parquet."""
    sample_id = record_id(record, place)
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return Reject(sample_id, Reason.BROKEN_RECORD, "`messages` is not a list of messages", place)
    cells = record.get("images")
    cells = [] if cells is None else cells if isinstance(cells, list) else [cells]
    try:
        pictures = [picture_of(cell, pictures_root) for cell in cells]
    except PictureError as error:
        return Reject(sample_id, error.reason, error.detail, place)
    turns = [(message.get("role"), _text(message.get("content"))) for message in messages]
    return assemble(sample_id, _placed(turns, len(pictures)), pictures, place)


def _placed(turns: list[tuple[Any, Any]], num_pictures: int) -> list[tuple[Any, Any]]:
    """The turns with a placeholder for each picture before the first question, where no turn has any."""
    if any(isinstance(text, str) and IMAGE_PLACEHOLDER in text for _, text in turns):
        return turns
    for number, (role, text) in enumerate(turns):
        if role == "user" and isinstance(text, str):
            placed = (role, f"{IMAGE_PLACEHOLDER}\n" * num_pictures + text)
            return [*turns[:number], placed, *turns[number + 1 :]]
    return turns


def _text(content: Any) -> Any:
    """`content` as one string, a placeholder for each image part; anything else as it is, to be rejected."""
    if not isinstance(content, list):
        return content
    lines: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            lines.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        else:
            return content
    return "\n".join(lines)

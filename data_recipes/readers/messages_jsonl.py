"""Reader of user data in the format of TRL, ms-swift and LLaMA-Factory: one JSON object per line.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A
     cup."}], "images": ["photos/17.jpg"]}

`content` may also be a list of parts, {"type": "text", "text": ...} and {"type": "image"}; an image is a path or
{"path": ...}. If no message contains a placeholder, all images are placed before the first question, as in TRL and
ms-swift. `id` is optional; the default is the file name and record number. `messages_parquet.py` reads the same columns
from parquet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_recipes.raw.image_files import ImageError, resolve_images
from data_recipes.raw.json_records import iter_records
from data_recipes.readers.llava_json import record_id
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, Reason, Reject, Sample, assemble


def samples(root: Path, annotations: str, image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: path of the JSON-lines file (or JSON list), relative to `root`.
        image_root: folder that the paths in `images` are relative to, itself relative to `root`.

    Raises:
        DataError: the annotations file does not exist.
    """
    for location, record in iter_records(root / annotations):
        yield record if isinstance(record, Reject) else convert_record(record, root / image_root, location)


def convert_record(record: dict[str, Any], image_root: Path, location: str) -> Sample | Reject:
    """Convert one record to a sample; arguments as in `llava_json.convert_record`."""
    sample_id = record_id(record, location)
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return Reject(sample_id, Reason.BROKEN_RECORD, "`messages` is not a list of messages", location)
    try:
        images = resolve_images(record.get("images"), image_root)
    except ImageError as error:
        return Reject(sample_id, error.reason, error.detail, location)
    turns = [(message.get("role"), _join_parts(message.get("content"))) for message in messages]
    return assemble(sample_id, _insert_placeholders(turns, len(images)), images, location)


def _insert_placeholders(turns: list[tuple[Any, Any]], num_images: int) -> list[tuple[Any, Any]]:
    """Insert all placeholders before the first question if no turn contains one."""
    if any(isinstance(text, str) and IMAGE_PLACEHOLDER in text for _, text in turns):
        return turns
    for number, (role, text) in enumerate(turns):
        if role == "user" and isinstance(text, str):
            turn = (role, f"{IMAGE_PLACEHOLDER}\n" * num_images + text)
            return [*turns[:number], turn, *turns[number + 1 :]]
    return turns


def _join_parts(content: Any) -> Any:
    """Join a list of parts to one string, with a placeholder per image part; return other content unchanged."""
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

"""One's own data, as TRL, ms-swift and LLaMA-Factory read it: one object per line, `messages` and `images`.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A
     cup."}], "images": ["photos/17.jpg"]}

`content` may also be a list of parts, {"type": "text", "text": ...} and {"type": "image"}; an image is a path
or {"path": ...}. `id` is optional: without one, a sample is named after its file and line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_recipes.json_records import iter_records
from data_recipes.pictures import PictureError, inside
from data_recipes.sample import IMAGE_PLACEHOLDER, Reason, Reject, Sample, assemble


def samples(root: Path, annotations: str, image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: the JSON-lines file (a JSON list is read too), below `root`.
        image_root: the folder, below `root`, that the paths in `images` start from.

    Raises:
        DataError: there is no such annotations file.
    """
    pictures_root = root / image_root
    for place, record in iter_records(root / annotations):
        if isinstance(record, Reject):
            yield record
            continue
        raw_id = record.get("id")
        sample_id = str(raw_id) if isinstance(raw_id, str | int) and raw_id != "" else place
        messages = record.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            yield Reject(sample_id, Reason.BROKEN_RECORD, "`messages` is not a list of messages", place)
            continue
        images = record.get("images")
        images = [] if images is None else images if isinstance(images, list) else [images]
        names: list[Any] = [image.get("path") if isinstance(image, dict) else image for image in images]
        if not all(isinstance(name, str) for name in names):
            yield Reject(sample_id, Reason.NOT_A_STRING, '`images` holds neither paths nor {"path": ...}', place)
            continue
        try:
            pictures = [inside(pictures_root, name) for name in names]
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, place)
            continue
        turns = ((message.get("role"), _text(message.get("content"))) for message in messages)
        yield assemble(sample_id, turns, pictures, place)


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

"""Writes LLaVA conversation JSON beside its pictures, the layout of the authors' stage 1 and stage 2 files.

Owns the records' form and how pictures are encoded. What they show and say comes from the drawing modules.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Turns = list[tuple[str, str]]  # question and answer, in order


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG, by the path's ending; pixels and Pillow's version settle the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        picture.save(path, compress_level=6)
    else:
        picture.convert("RGB").save(path, quality=90, subsampling=0)


@dataclass
class LlavaJson:
    """A list of LLaVA records and the folder that their `image` paths start from."""

    image_root: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, picture: Image.Image | Path | None, turns: Turns) -> None:
        """Add one record: a Path is copied byte by byte, a picture is saved as `name`, None is text only.

        `name` is the picture's path below the image root, or the id of a record without picture.
        """
        if isinstance(picture, Path):
            (self.image_root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.image_root / name).write_bytes(picture.read_bytes())
        elif picture is not None:
            save_picture(picture, self.image_root / name)
        record: dict[str, Any] = {"id": Path(name).stem if picture is not None else name}
        if picture is not None:
            record["image"] = name
        conversation: list[dict[str, str]] = []
        for row, (question, answer) in enumerate(turns):
            # The authors' files have the placeholder before or after the first question; both occur here too.
            if row == 0 and picture is not None:
                question = f"{question}\n<image>" if len(self.records) % 4 == 3 else f"<image>\n{question}"
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        self.records.append(record | {"conversations": conversation})

    def save(self, annotations: Path) -> None:
        """Write the records as one JSON list."""
        write_json_lines_list(annotations, self.records)


def write_json_lines_list(path: Path, records: list[dict[str, Any]]) -> None:
    """A JSON list with one record a line, so that it can be read by eye and by line tools."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

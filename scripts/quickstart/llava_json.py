"""Writes LLaVA conversation JSON and its images, in the layout of the authors' stage 1 and stage 2 files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Turns = list[tuple[str, str]]  # question and answer, in order


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG or JPEG, by the suffix of the path; the bytes depend on the pixels and Pillow's version alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image.save(path, compress_level=6)
    else:
        image.convert("RGB").save(path, quality=90, subsampling=0)


@dataclass
class LlavaJson:
    """A list of LLaVA records and the folder to which their `image` paths are relative."""

    image_root: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, image: Image.Image | Path | None, turns: Turns) -> None:
        """Adds one record.

        Args:
            name: path of the image below the image root, or the id of a record without an image.
            image: a Path is copied byte by byte, an image is written as `name`, None is text only.
        """
        if isinstance(image, Path):
            (self.image_root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.image_root / name).write_bytes(image.read_bytes())
        elif image is not None:
            save_image(image, self.image_root / name)
        record: dict[str, Any] = {"id": Path(name).stem if image is not None else name}
        if image is not None:
            record["image"] = name
        conversation: list[dict[str, str]] = []
        for row, (question, answer) in enumerate(turns):
            # As in the authors' files, the placeholder is before or after the first question.
            if row == 0 and image is not None:
                question = f"{question}\n<image>" if len(self.records) % 4 == 3 else f"<image>\n{question}"
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        self.records.append(record | {"conversations": conversation})

    def save(self, annotations: Path) -> None:
        """Writes the records as one JSON list."""
        write_json_lines_list(annotations, self.records)


def write_json_lines_list(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a JSON list with one record per line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

"""Generates the logs of a demo in the layout of the public LLaVA server."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data_recipes.raw_folders import write_file

DAY = "2024-02-03"
ADDRESS = "203.0.113.77"
TIME = 1706950000.1234


def photo(number: int, height: int = 96, width: int = 128, **saving: Any) -> bytes:
    """Return an encoded smooth image, which rescaling and re-encoding change little; each number gives another one."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    options: dict[str, Any] = {"format": "JPEG", "quality": 90}
    image.save(stream, **(options | saving))
    return stream.getvalue()


class Demo:
    """The log folder of a demo, filled step by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def save_image(self, data: bytes) -> str:
        """Save an image as the server does and return its MD5."""
        name = hashlib.md5(data).hexdigest()
        write_file(self.folder / "serve_images" / DAY / f"{name}.jpg", data)
        return name

    def line(self, kind: str, turns: list[str], ip: str = ADDRESS, **more: Any) -> None:
        """Add one record with alternating turns, with the placeholder where the server puts it."""
        roles = ["USER", "ASSISTANT"]
        messages = [[roles[number % 2], text] for number, text in enumerate(turns)]
        state = {"system": "A chat.", "roles": roles, "messages": messages, "offset": 0, "sep": " ", "sep2": "</s>"}
        times = {"tstamp": TIME, "start": TIME - 3, "finish": TIME} if kind == "chat" else {"tstamp": TIME}
        head = {**times, "type": kind, "model": "llava-v1.6-34b", "state": {**state, "template_name": "chatml_direct"}}
        self.lines.append(json.dumps({**head, "ip": ip, **more}))

    def ask(self, text: str, data: bytes | None = None, answer: str = "It is a thing.", **more: Any) -> None:
        """Add a chat with one question about an image."""
        images = [self.save_image(data)] if data else []
        self.line("chat", [f"{text}\n<image>" if data else text, answer], images=images, **more)

    def write(self, day: str = DAY) -> Path:
        """Write the added records as the log of a day, and start another log."""
        write_file(self.folder / f"{day}-conv.json", "\n".join(self.lines) + "\n")
        self.lines = []
        return self.folder

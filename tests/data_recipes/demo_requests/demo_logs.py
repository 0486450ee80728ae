"""The logs of a demo, made here in the layout of the public LLaVA server; the tests own what they prove with them."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data_recipes.raw_folders import put

DAY = "2024-02-03"
ADDRESS = "203.0.113.77"
TIME = 1706950000.1234


def photo(number: int, height: int = 96, width: int = 128, **saving: Any) -> bytes:
    """A smooth picture, so that scaling and saving change it little; another number, another picture."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    options: dict[str, Any] = {"format": "JPEG", "quality": 90}
    image.save(stream, **(options | saving))
    return stream.getvalue()


class Demo:
    """The folder that a demo logs to, while it is filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def picture(self, data: bytes) -> str:
        """Save a picture as the server does; returns its md5."""
        name = hashlib.md5(data).hexdigest()
        put(self.folder / "serve_images" / DAY / f"{name}.jpg", data)
        return name

    def line(self, kind: str, turns: list[str], ip: str = ADDRESS, **more: Any) -> None:
        """One line; turns alternate, the picture's mark stands where the server puts it."""
        roles = ["USER", "ASSISTANT"]
        messages = [[roles[number % 2], text] for number, text in enumerate(turns)]
        state = {"system": "A chat.", "roles": roles, "messages": messages, "offset": 0, "sep": " ", "sep2": "</s>"}
        times = {"tstamp": TIME, "start": TIME - 3, "finish": TIME} if kind == "chat" else {"tstamp": TIME}
        head = {**times, "type": kind, "model": "llava-v1.6-34b", "state": {**state, "template_name": "chatml_direct"}}
        self.lines.append(json.dumps({**head, "ip": ip, **more}))

    def ask(self, text: str, data: bytes | None = None, answer: str = "It is a thing.", **more: Any) -> None:
        """A chat of one question about a picture."""
        images = [self.picture(data)] if data else []
        self.line("chat", [f"{text}\n<image>" if data else text, answer], images=images, **more)

    def write(self, day: str = DAY) -> Path:
        """Write what was logged as the log of a day, and begin another one."""
        put(self.folder / f"{day}-conv.json", "\n".join(self.lines) + "\n")
        self.lines = []
        return self.folder

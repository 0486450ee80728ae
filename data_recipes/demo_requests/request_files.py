"""Requests to a stronger model and its answers, in the shape that batch services share; nothing is sent from here.

Owns: the lines of `requests_NNN.jsonl`, their files' limits, reading answers back and judging whether one is usable.
Leaves: which requests there are to `__main__.py`.

A request is {custom_id, method, url, body: {model, max_tokens, messages}}, an answer {custom_id, response:
{status_code, body: {choices: [{message: {content, refusal?}, finish_reason}]}}, error}.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.demo_requests.logs import Drop
from data_recipes.demo_requests.screen import private
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import Reject


@dataclass(frozen=True)
class Kept:
    """A request that was kept; `image` is its picture below the output folder."""

    id: str
    text: str
    image: str


@dataclass(frozen=True)
class BatchOptions:
    """How requests are written.

    Attributes:
        model: the name of the model that shall answer.
        max_tokens: of an answer.
        inline: pictures inside the lines as base64, or as paths.
        max_mib, max_requests: of one file.
    """

    model: str
    max_tokens: int
    inline: bool
    max_mib: int
    max_requests: int


class BatchWriter:
    """Writes requests into files `requests_000.jsonl`, ... of a limited size."""

    def __init__(self, folder: Path, options: BatchOptions) -> None:
        self._folder = folder
        self._options = options
        self._num_files = 0
        self._num_bytes = 0
        self._num_requests = 0
        folder.mkdir(parents=True)

    def write(self, kept: Kept, picture: bytes) -> None:
        """Append one request, to a new file where it would not fit."""
        line = json.dumps(self._request(kept, picture)).encode() + b"\n"
        full = self._num_bytes + len(line) > self._options.max_mib << 20
        if self._num_files == 0 or full or self._num_requests == self._options.max_requests:
            self._num_files += 1
            self._num_bytes = self._num_requests = 0
        with (self._folder / f"requests_{self._num_files - 1:03d}.jsonl").open("ab") as file:
            file.write(line)
        self._num_bytes += len(line)
        self._num_requests += 1

    def _request(self, kept: Kept, picture: bytes) -> dict[str, Any]:
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" if self._options.inline else kept.image
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": kept.text}]
        body = {
            "model": self._options.model,
            "max_tokens": self._options.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        return {"custom_id": kept.id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def read_answers(paths: Iterable[Path]) -> Iterator[tuple[str, str, str | Drop]]:
    """(place, custom_id, the answer or why it is none) of each line of the answer files."""
    for path in paths:
        for place, record in iter_records(path):
            if isinstance(record, Reject):
                yield place, "", Drop.BROKEN_RECORD
            else:
                yield place, str(record.get("custom_id")), _answer(record)


def _answer(record: dict[str, Any]) -> str | Drop:
    try:
        choice = record["response"]["body"]["choices"][0]
        status, message, finish = record["response"]["status_code"], choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Drop.ANSWER_FAILED
    if record.get("error") or status != 200:
        return Drop.ANSWER_FAILED
    if refusal or finish == "content_filter":
        return Drop.ANSWER_REFUSED
    if finish == "length":
        return Drop.ANSWER_CUT_OFF
    if not isinstance(text, str) or not text.strip():
        return Drop.ANSWER_EMPTY
    return private(text) or text.strip()

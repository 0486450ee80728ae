"""Writes requests and reads answers in the JSON-lines format of batch inference services. Nothing is sent.

A request is {custom_id, method, url, body: {model, max_tokens, messages}}, an answer {custom_id, response:
{status_code, body: {choices: [{message: {content, refusal?}, finish_reason}]}}, error}.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.demo_requests.logs import DropReason
from data_recipes.demo_requests.screen import find_personal_data
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import Reject


@dataclass(frozen=True)
class KeptRequest:
    """An accepted request, one line of `kept.jsonl`.

    Attributes:
        id: the `custom_id` of the request.
        text: the question.
        image: path of the image, relative to the output folder.
    """

    id: str
    text: str
    image: str


@dataclass(frozen=True)
class BatchOptions:
    """Options of the request files.

    Attributes:
        model: name of the answering model.
        max_tokens: maximum length of an answer.
        inline: include images as base64 instead of paths.
        max_mib, max_requests: maximum size of one file.
    """

    model: str
    max_tokens: int
    inline: bool
    max_mib: int
    max_requests: int


class BatchWriter:
    """Writes requests to files `requests_000.jsonl`, `requests_001.jsonl`, ... of limited size."""

    def __init__(self, folder: Path, options: BatchOptions) -> None:
        self._folder = folder
        self._options = options
        self._num_files = 0
        self._num_bytes = 0
        self._num_requests = 0
        folder.mkdir(parents=True)

    def write(self, request: KeptRequest, data: bytes) -> None:
        """Append one request; start a new file if the current one is full.

        Args:
            request: the request.
            data: its encoded image.
        """
        line = json.dumps(self._make_request(request, data)).encode() + b"\n"
        is_full = self._num_bytes + len(line) > self._options.max_mib << 20
        if self._num_files == 0 or is_full or self._num_requests == self._options.max_requests:
            self._num_files += 1
            self._num_bytes = self._num_requests = 0
        with (self._folder / f"requests_{self._num_files - 1:03d}.jsonl").open("ab") as file:
            file.write(line)
        self._num_bytes += len(line)
        self._num_requests += 1

    def _make_request(self, request: KeptRequest, data: bytes) -> dict[str, Any]:
        url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if self._options.inline else request.image
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.text}]
        body = {
            "model": self._options.model,
            "max_tokens": self._options.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        return {"custom_id": request.id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def read_answers(paths: Iterable[Path]) -> Iterator[tuple[str, str, str | DropReason]]:
    """Yield (location, custom_id, answer text or the reason why it is dropped) for each line of the answer files."""
    for path in paths:
        for location, record in iter_records(path):
            if isinstance(record, Reject):
                yield location, "", DropReason.BROKEN_RECORD
            else:
                yield location, str(record.get("custom_id")), _read_answer(record)


def _read_answer(record: dict[str, Any]) -> str | DropReason:
    try:
        choice = record["response"]["body"]["choices"][0]
        status, message, finish = record["response"]["status_code"], choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return DropReason.ANSWER_FAILED
    if record.get("error") or status != 200:
        return DropReason.ANSWER_FAILED
    if refusal or finish == "content_filter":
        return DropReason.ANSWER_REFUSED
    if finish == "length":
        return DropReason.ANSWER_CUT_OFF
    if not isinstance(text, str) or not text.strip():
        return DropReason.ANSWER_EMPTY
    return find_personal_data(text) or text.strip()

"""Reads user requests from the logs of a LLaVA demo server.

The server writes one file per day, `YYYY-MM-DD-conv.json`, with one object per line: {tstamp, type, model, state, ip}
and, if `type` is chat, {start, finish, images}. `state` is the conversation so far, {system, roles, messages, offset,
sep, sep2, template_name}; a message is [role, text] or [role, [text, image, mode]], and the first `offset` messages are
examples. `images` are MD5 sums; the images are in `serve_images/YYYY-MM-DD/MD5.jpg`.

A request is the first question of a conversation; later questions depend on answers that must not be trained on.
Address and time are used only to match a flag with its conversation, and are never returned: a location is "log 2,
record 17", with the logs numbered by name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, DataError, Reject

_MD5 = re.compile(r"[0-9a-f]{32}")
# The demo's answer to an input that its moderation rejects.
_MODERATION = "violates our content moderation guidelines"


class DropReason(StrEnum):
    """Why a request or answer was dropped. `left_out.jsonl` contains these values, so they do not change."""

    BROKEN_RECORD = "broken_record"
    LATER_TURN = "later_turn"
    NO_IMAGE = "no_picture"
    SEVERAL_IMAGES = "several_pictures"
    NO_TEXT = "no_text"
    FLAGGED = "flagged"
    UNSAFE = "unsafe"
    PRIVATE_EMAIL = "private_email"
    PRIVATE_PHONE = "private_phone"
    PRIVATE_CARD = "private_card"
    PRIVATE_ADDRESS = "private_network_address"
    PRIVATE_NUMBER = "private_id_number"
    IMAGE_MISSING = "picture_missing"
    IMAGE_UNUSABLE = "picture_unusable"
    NEAR_DUPLICATE = "near_duplicate"
    UNKNOWN_ID = "unknown_id"
    ANSWER_REPEATED = "answer_repeated"
    ANSWER_FAILED = "answer_failed"
    ANSWER_REFUSED = "answer_refused"
    ANSWER_CUT_OFF = "answer_cut_off"
    ANSWER_EMPTY = "answer_empty"
    UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Request:
    """One question about one image.

    Attributes:
        text: the question, without placeholder.
        image: path of the image.
        location: number of the log and of the record.
        flagged: the user flagged the conversation.
        moderated: the demo's moderation rejected an input of the conversation.
    """

    text: str
    image: Path
    location: str
    flagged: bool = False
    moderated: bool = False


@dataclass(frozen=True)
class DroppedRequest:
    """A dropped request or answer: the reason and its location in the logs, without any of its text."""

    reason: DropReason
    location: str


def read_requests(folder: Path) -> Iterator[Request | DroppedRequest]:
    """Yield a request, or the reason why it is dropped, for each chat of the logs. Votes are skipped.

    Raises:
        DataError: `folder` has no logs.
    """
    logs = sorted(folder.glob("*-conv.json"))
    if not logs:
        raise DataError(f"{folder} has no YYYY-MM-DD-conv.json; --logs must be the log folder of a LLaVA demo.")
    flagged = {
        _conversation_key(record)
        for log in logs
        for _, record in iter_records(log)
        if isinstance(record, dict) and record.get("type") == "flag"
    }
    images = {path.stem: path for path in sorted((folder / "serve_images").glob("*/*.jpg"), reverse=True)}
    for number, log in enumerate(logs, start=1):
        for log_location, record in iter_records(log):
            location = f"log {number}, {log_location.rsplit(', ', 1)[-1]}"
            if isinstance(record, Reject):
                yield DroppedRequest(DropReason.BROKEN_RECORD, location)
            elif record.get("type") == "chat":
                yield _parse_request(record, images, flagged, location)


def _parse_request(
    record: dict[str, Any], images: dict[str, Path], flagged: set[tuple[str, str]], location: str
) -> Request | DroppedRequest:
    turns = _read_turns(record)
    if turns is None:
        return DroppedRequest(DropReason.BROKEN_RECORD, location)
    questions = [text for role, text in turns if role == "user"]
    if len(questions) != 1:
        return DroppedRequest(DropReason.LATER_TURN if questions else DropReason.NO_TEXT, location)
    hashes = record.get("images") or []
    if not isinstance(hashes, list) or not all(isinstance(h, str) and _MD5.fullmatch(h) for h in hashes):
        return DroppedRequest(DropReason.BROKEN_RECORD, location)
    if len(hashes) != 1:
        return DroppedRequest(DropReason.SEVERAL_IMAGES if hashes else DropReason.NO_IMAGE, location)
    text = questions[0].replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        return DroppedRequest(DropReason.NO_TEXT, location)
    if hashes[0] not in images:
        return DroppedRequest(DropReason.IMAGE_MISSING, location)
    moderated = any(_MODERATION in text.lower() for _, text in turns)
    return Request(text, images[hashes[0]], location, _conversation_key(record) in flagged, moderated)


def _conversation_key(record: dict[str, Any]) -> tuple[str, str]:
    """Return (address, first question), which a vote and its chat have in common."""
    turns = _read_turns(record) or []
    first = next((text for role, text in turns if role == "user"), "")
    return str(record.get("ip")), first.replace(IMAGE_PLACEHOLDER, "").strip()


def _read_turns(record: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Return (role, text) of each turn after the examples, or None if the state has an unknown layout."""
    state = record.get("state")
    if not isinstance(state, dict):
        return None
    messages, roles, offset = state.get("messages"), state.get("roles"), state.get("offset")
    if not isinstance(messages, list) or not isinstance(roles, list) or not isinstance(offset, int):
        return None
    turns = []
    for message in messages[offset:]:
        if not isinstance(message, list) or len(message) != 2:
            return None
        role, text = message
        if isinstance(text, list):  # [text, image, mode]
            text = text[0] if text else None
        if not isinstance(text, str | None):
            return None
        turns.append(("user" if roles and role == roles[0] else "assistant", text or ""))
    return turns

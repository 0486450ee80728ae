"""What the users of a LLaVA demo asked, out of its server's logs.

Owns: the layout of the logs, what counts as one request, who flagged what.
Leaves: what may be kept to `screen.py` and `duplicates.py`.

The public demo server writes one file a day, `YYYY-MM-DD-conv.json`, one object a line: {tstamp, type, model, state,
ip} and, where `type` is chat, {start, finish, images}. `state` is the conversation so far, {system, roles, messages,
offset, sep, sep2, template_name}; a message is [role, text] or [role, [text, image, mode]], and the first `offset`
ones are examples. `images` are md5 sums; the pictures lie in `serve_images/YYYY-MM-DD/MD5.jpg`.

A request is the first question of a conversation: later ones depend on answers that are not to be learnt. Address and
time are read for nothing but to match a flag with its conversation, and leave this module in no form: a place is "log
2, record 17", the logs counted by name.
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
# What the demo says in place of an answer when its moderation stops an input.
_MODERATION = "violates our content moderation guidelines"


class Drop(StrEnum):
    """Why a request or its answer is not kept. A fixed list: `left_out.jsonl` uses these words."""

    BROKEN_RECORD = "broken_record"
    LATER_TURN = "later_turn"
    NO_PICTURE = "no_picture"
    SEVERAL_PICTURES = "several_pictures"
    NO_TEXT = "no_text"
    FLAGGED = "flagged"
    UNSAFE = "unsafe"
    PRIVATE_EMAIL = "private_email"
    PRIVATE_PHONE = "private_phone"
    PRIVATE_CARD = "private_card"
    PRIVATE_ADDRESS = "private_network_address"
    PRIVATE_NUMBER = "private_id_number"
    PICTURE_MISSING = "picture_missing"
    PICTURE_UNUSABLE = "picture_unusable"
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
    """One question on one picture; `flagged` if its user or the demo's moderation objected to the conversation."""

    text: str
    picture: Path
    place: str
    flagged: bool = False
    moderated: bool = False


@dataclass(frozen=True)
class LeftOut:
    """Something that is not kept: why, and where it stands in the logs. It never repeats what was said."""

    reason: Drop
    place: str


def read_requests(folder: Path) -> Iterator[Request | LeftOut]:
    """Every chat of the logs, days in their order: a request, or why it is none. Votes are no chats and not counted.

    Raises:
        DataError: there are no logs in `folder`.
    """
    logs = sorted(folder.glob("*-conv.json"))
    if not logs:
        raise DataError(f"{folder}: no YYYY-MM-DD-conv.json in it; --logs is the folder that a LLaVA demo logs to.")
    flagged = {
        _conversation_key(record)
        for log in logs
        for _, record in iter_records(log)
        if isinstance(record, dict) and record.get("type") == "flag"
    }
    pictures = {path.stem: path for path in sorted((folder / "serve_images").glob("*/*.jpg"), reverse=True)}
    for number, log in enumerate(logs, start=1):
        for log_place, record in iter_records(log):
            place = f"log {number}, {log_place.rsplit(', ', 1)[-1]}"
            if isinstance(record, Reject):
                yield LeftOut(Drop.BROKEN_RECORD, place)
            elif record.get("type") == "chat":
                yield _request(record, pictures, flagged, place)


def _request(
    record: dict[str, Any], pictures: dict[str, Path], flagged: set[tuple[str, str]], place: str
) -> Request | LeftOut:
    said = _said(record)
    if said is None:
        return LeftOut(Drop.BROKEN_RECORD, place)
    asked = [text for role, text in said if role == "user"]
    if len(asked) != 1:
        return LeftOut(Drop.LATER_TURN if asked else Drop.NO_TEXT, place)
    hashes = record.get("images") or []
    if not isinstance(hashes, list) or not all(isinstance(h, str) and _MD5.fullmatch(h) for h in hashes):
        return LeftOut(Drop.BROKEN_RECORD, place)
    if len(hashes) != 1:
        return LeftOut(Drop.SEVERAL_PICTURES if hashes else Drop.NO_PICTURE, place)
    text = asked[0].replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        return LeftOut(Drop.NO_TEXT, place)
    if hashes[0] not in pictures:
        return LeftOut(Drop.PICTURE_MISSING, place)
    moderated = any(_MODERATION in text.lower() for _, text in said)
    return Request(text, pictures[hashes[0]], place, _conversation_key(record) in flagged, moderated)


def _conversation_key(record: dict[str, Any]) -> tuple[str, str]:
    """What a vote and the chat that it is about have in common: who, and the first question."""
    said = _said(record) or []
    first = next((text for role, text in said if role == "user"), "")
    return str(record.get("ip")), first.replace(IMAGE_PLACEHOLDER, "").strip()


def _said(record: dict[str, Any]) -> list[tuple[str, str]] | None:
    """(user or assistant, text) of each turn after the examples; None where the state is not laid out so."""
    state = record.get("state")
    if not isinstance(state, dict):
        return None
    messages, roles, offset = state.get("messages"), state.get("roles"), state.get("offset")
    if not isinstance(messages, list) or not isinstance(roles, list) or not isinstance(offset, int):
        return None
    said = []
    for message in messages[offset:]:
        if not isinstance(message, list) or len(message) != 2:
            return None
        role, text = message
        if isinstance(text, list):  # [text, image, mode]
            text = text[0] if text else None
        if not isinstance(text, str | None):
            return None
        said.append(("user" if roles and role == roles[0] else "assistant", text or ""))
    return said

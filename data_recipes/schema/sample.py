"""The sample format that readers yield, the rules that it must satisfy, and the reasons for rejecting a record.

Readers build samples with `assemble`; `check_sample` is applied to every sample before it is stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, cast

IMAGE_PLACEHOLDER = "<image>"

# The longest context of a supported backbone is 131,072 tokens, and no language averages 7.6 characters per token, so a
# longer sample fits no backbone. Training applies the limit of the chosen backbone.
MAX_CHARACTERS = 1_000_000

Role = Literal["system", "user", "assistant"]

# Speaker names in raw files, in lower case. ShareGPT exports use `bing`, `bard` and `chatgpt` for the assistant, newer
# OpenAI formats `developer` for the system prompt, Gemini and Gemma `model`, OpenAssistant `prompter`.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
}


class DataError(ValueError):
    """A user error in the data configuration, such as an unknown name or a missing folder.

    The message says how to fix it. Programs print it and exit with code 2. It derives from `ValueError` so that
    pydantic, which validates `MixtureConfig` for training, reports it with the path of the key.
    """


class Reason(StrEnum):
    """Why a record was rejected. `manifest.json` and `quarantine.jsonl` contain these values, so they do not change."""

    IMAGE_MISSING = "picture_missing"
    IMAGE_UNREADABLE = "picture_unreadable"
    IMAGE_TRUNCATED = "picture_truncated"
    IMAGE_EMPTY = "picture_empty"
    IMAGE_TOO_LARGE = "picture_too_large"
    PATH_OUTSIDE_ROOT = "path_outside_root"
    IMAGE_NOT_LOCAL = "image_not_local"
    PLACEHOLDER_MISMATCH = "placeholder_mismatch"
    EMPTY_ANSWER = "empty_answer"
    NOT_A_STRING = "not_a_string"
    ROLES_DO_NOT_ALTERNATE = "roles_do_not_alternate"
    FIRST_TURN_NOT_USER = "first_turn_not_user"
    NO_ANSWER = "no_answer"
    DUPLICATE_ID = "duplicate_id"
    TOO_LONG = "too_long"
    BROKEN_RECORD = "broken_record"
    FILE_CUT_OFF = "file_cut_off"
    FILE_UNREADABLE = "file_unreadable"
    ASPECT_RATIO = "aspect_ratio"
    WRONG_ENCODING = "wrong_encoding"
    UNKNOWN_COMPONENT = "unknown_component"
    UNSUPPORTED_KEY = "unsupported_key"
    UNFILLED_PLACEHOLDER = "unfilled_placeholder"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. User text contains one `<image>` per image, in the order of `Sample.images`."""

    role: Role
    text: str


@dataclass(frozen=True)
class ArchiveMember:
    """One file inside a zip or tar archive.

    Attributes:
        archive: path of the archive.
        name: name of the member, as the archive spells it.
        path: where a record expects the unpacked file; None for a member that a reader names itself. Not compared.
    """

    archive: Path
    name: str
    path: Path | None = field(default=None, compare=False)


ImageReference = Path | bytes | ArchiveMember
"""An image of a sample: the path of a file, encoded bytes, or a member of an archive."""


@dataclass(frozen=True)
class Sample:
    """One conversation, as a reader yields it.

    Attributes:
        id: the id of the raw record. It need not be unique; the store makes it unique.
        messages: an optional system turn, then alternating user and assistant turns, user first.
        images: one per `<image>` placeholder: the path of a file, encoded bytes, or a member of an archive.
        location: file and record number of the raw record.
        repairs: changes made to the raw record (`first_turn_dropped`, `last_turn_dropped`), counted in the manifest.
        notes: (name, example) of what the raw record holds and the sample does not, such as an unknown key. They are
            counted in the manifest and do not change the fingerprint. An example is one short line of printable text.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageReference, ...] = ()
    location: str = ""
    repairs: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reject:
    """An invalid record. It is counted and written to `quarantine.jsonl`; no other record replaces it.

    Attributes:
        id: the id of the raw record, or its location if it has none.
        reason: the category of the error.
        detail: a description of the error.
        location: file and record number of the raw record.
    """

    id: str
    reason: Reason
    detail: str
    location: str = ""


def describe_value(value: object, limit: int = 60) -> str:
    """Describe a raw value of any type for a message: one line of printable text, about `limit` characters.

    Lists and objects are described by their size or keys, because a value may be nested deeply.
    """
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | int | float):
        text = repr(value[:limit]) if isinstance(value, str) else repr(value)[:limit]
        return text + "..." if isinstance(value, str) and len(value) > limit else text
    if isinstance(value, dict):
        keys = ", ".join(describe_key(key) for key in list(value)[:4])
        return f"an object with the keys {keys}"[: limit + 20] if keys else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"a {type(value).__name__}"


def describe_key(key: object, limit: int = 40) -> str:
    """Describe a raw key for a message: the key itself, or its quoted beginning if it is long or not printable."""
    text = str(key) if isinstance(key, str | int | float) else type(key).__name__
    return text if text.isprintable() and 0 < len(text) <= limit else repr(text[:limit])


def assemble(
    sample_id: str, turns: Iterable[tuple[object, object]], images: Iterable[ImageReference], location: str
) -> Sample | Reject:
    """Build a `Sample` from raw (speaker, text) pairs, which may have any type.

    A first turn that is not the user's is dropped, as in the authors' training code, and so is a last user turn
    without an answer. Both are listed in `repairs`. The other rules are those of `check_sample`, which is applied to
    every sample before it is stored.

    Returns:
        The sample, or a `Reject` if a turn is not a string or its speaker is unknown.
    """
    messages: list[Message] = []
    for number, (speaker, text) in enumerate(turns, start=1):
        if not isinstance(speaker, str) or not isinstance(text, str):
            wrong = text if isinstance(speaker, str) else speaker
            detail = f"turn {number} holds {describe_value(wrong)} where a string belongs"
            return Reject(sample_id, Reason.NOT_A_STRING, detail, location)
        role = ROLES.get(speaker.strip().lower())
        if role is None:
            detail = f"turn {number} is spoken by {speaker[:60]!r}; known speakers: {', '.join(ROLES)}"
            return Reject(sample_id, Reason.ROLES_DO_NOT_ALTERNATE, detail, location)
        messages.append(Message(role, text))

    repairs = []
    opening = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > opening and messages[opening].role == "assistant":
        del messages[opening]
        repairs.append("first_turn_dropped")
    if messages and messages[-1].role == "user" and any(m.role == "assistant" for m in messages):
        del messages[-1]
        repairs.append("last_turn_dropped")
    return Sample(sample_id, tuple(messages), tuple(images), location, tuple(repairs))


def check_sample(sample: Sample) -> Reject | None:
    """Validate a sample's messages.

    Texts must be strings that UTF-8 can encode, with at most `MAX_CHARACTERS` in total. User and assistant turns must
    alternate, user first, with at least one answer and no empty answer. `<image>` may occur in user text only, once per
    image.

    Returns:
        A `Reject` with the first violated rule, or None if the sample is valid.
    """

    def reject(reason: Reason, detail: str) -> Reject:
        return Reject(str(sample.id), reason, detail, sample.location)

    for number, message in enumerate(sample.messages, start=1):
        # The annotation says str, but a custom reader may not respect it.
        text = cast(object, message.text)
        if not isinstance(text, str):
            return reject(Reason.NOT_A_STRING, f"turn {number} is of type {type(text).__name__}, not a string")
    for name, text in [("id", sample.id), *((f"turn {n}", m.text) for n, m in enumerate(sample.messages, 1))]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return reject(
                Reason.WRONG_ENCODING, f"{name}, character {error.start}: not valid UTF-8, or an unpaired surrogate"
            )

    num_characters = sum(len(message.text) for message in sample.messages)
    if num_characters > MAX_CHARACTERS:
        return reject(Reason.TOO_LONG, f"{num_characters} characters; the limit is {MAX_CHARACTERS}")

    turns = sample.messages[1:] if sample.messages[:1] and sample.messages[0].role == "system" else sample.messages
    if not any(message.role == "assistant" for message in turns):
        return reject(Reason.NO_ANSWER, f"none of the {len(sample.messages)} turns is an answer")
    if turns[0].role != "user":
        return reject(Reason.FIRST_TURN_NOT_USER, f"the first turn is {turns[0].role!r}, not 'user'")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            detail = f"turn {number + 1} is {message.role!r} where {expected!r} is expected"
            return reject(Reason.ROLES_DO_NOT_ALTERNATE, detail)
        if message.role == "assistant" and not message.text.strip():
            return reject(Reason.EMPTY_ANSWER, f"the answer in turn {number + 1} is empty")

    num_placeholders = sum(m.text.count(IMAGE_PLACEHOLDER) for m in turns if m.role == "user")
    num_misplaced = sum(m.text.count(IMAGE_PLACEHOLDER) for m in sample.messages if m.role != "user")
    if num_misplaced:
        return reject(Reason.PLACEHOLDER_MISMATCH, f"{num_misplaced} {IMAGE_PLACEHOLDER} outside user turns")
    if num_placeholders != len(sample.images):
        detail = f"{num_placeholders} {IMAGE_PLACEHOLDER} for {len(sample.images)} images"
        return reject(Reason.PLACEHOLDER_MISMATCH, detail)
    return None

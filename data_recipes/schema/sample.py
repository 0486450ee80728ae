"""What a sample is, what makes one bad, and the word for the user's own mistake.

Owns: `Message`, `Sample`, `Reject`, the fixed list of `Reason`s, the rules on messages, `DataError`.
Leaves: reading raw files to `readers/`, everything about pictures to `raw/pictures.py`, counting and
writing down the rejected to `writing/tables.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, cast

IMAGE_PLACEHOLDER = "<image>"

# The longest context of a supported backbone is 131,072 tokens, and no language has 7.6 characters a token. What
# fits one backbone and not another is for the run to leave out; this is what fits none.
MAX_CHARACTERS = 1_000_000

Role = Literal["system", "user", "assistant"]

# Speakers as raw files name them. `bing`, `bard` and `chatgpt` are what ShareGPT exports call the answering
# side.
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class DataError(ValueError):
    """The user's mistake (a wrong name, no such folder, more wanted than found), and the way out.

    Programs print it as one sentence and leave with exit code 2. It is a `ValueError` so that pydantic, which
    validates `MixtureConfig` for a run, reports it with the path of the key.
    """


class Reason(StrEnum):
    """Why a record was left out. A fixed list: `manifest.json` and `quarantine.jsonl` use these words."""

    PICTURE_MISSING = "picture_missing"
    PICTURE_UNREADABLE = "picture_unreadable"
    PICTURE_TRUNCATED = "picture_truncated"
    PICTURE_EMPTY = "picture_empty"
    PICTURE_TOO_LARGE = "picture_too_large"
    PATH_OUTSIDE_ROOT = "path_outside_root"
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


@dataclass(frozen=True)
class Message:
    """One turn. Pictures stand as `<image>` in user text, in the order of `Sample.pictures`."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """What a reader yields; the source's name is the store's.

    Attributes:
        id: unique within the source as far as the raw files go; the store makes it so.
        messages: an optional system turn, then user and assistant in turn, user first.
        pictures: one per placeholder, a file to read or the encoded bytes themselves.
        place: file and record number, enough to find the raw record again.
        repairs: what was done to make it whole (`first_turn_dropped`, `last_turn_dropped`); counted in the
            manifest, so that nothing is changed in silence.
    """

    id: str
    messages: tuple[Message, ...]
    pictures: tuple[Path | bytes, ...] = ()
    place: str = ""
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    """A bad record: left out, counted, and written to `quarantine.jsonl`, never replaced."""

    id: str
    reason: Reason
    detail: str
    place: str = ""


def assemble(
    sample_id: str, turns: Iterable[tuple[object, object]], pictures: Iterable[Path | bytes], place: str
) -> Sample | Reject:
    """Make a `Sample` of raw (speaker, text) pairs of any type, by the rules the authors' training code has.

    A first turn that is not the user's is dropped (recipe 3.1: the authors drop it too), and so is a last
    user turn that nobody answers, since it could teach nothing; both are noted in `repairs`. The rest is
    judged by `check`, which the store calls for every sample, whoever made it.
    """
    messages: list[Message] = []
    for number, (speaker, text) in enumerate(turns, start=1):
        if not isinstance(speaker, str) or not isinstance(text, str):
            wrong = text if isinstance(speaker, str) else speaker
            detail = f"turn {number} holds {type(wrong).__name__} {str(wrong)[:60]!r} where a string belongs"
            return Reject(sample_id, Reason.NOT_A_STRING, detail, place)
        role = ROLES.get(speaker.strip().lower())
        if role is None:
            detail = f"turn {number} is spoken by {speaker[:60]!r}; known speakers: {', '.join(ROLES)}"
            return Reject(sample_id, Reason.ROLES_DO_NOT_ALTERNATE, detail, place)
        messages.append(Message(role, text))

    repairs = []
    opening = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > opening and messages[opening].role == "assistant":
        del messages[opening]
        repairs.append("first_turn_dropped")
    if messages and messages[-1].role == "user" and any(m.role == "assistant" for m in messages):
        del messages[-1]
        repairs.append("last_turn_dropped")
    return Sample(sample_id, tuple(messages), tuple(pictures), place, tuple(repairs))


def check(sample: Sample) -> Reject | None:
    """The rules on messages: None where all hold, else the first that does not.

    Strings that UTF-8 can hold and a context might, user first, roles in turn, at least one answer, no empty
    answer, and as many `<image>` (in user text only) as pictures.
    """

    def reject(reason: Reason, detail: str) -> Reject:
        return Reject(str(sample.id), reason, detail, sample.place)

    for number, message in enumerate(sample.messages, start=1):
        # The annotation promises str; a reader of one's own may break it.
        text = cast(object, message.text)
        if not isinstance(text, str):
            return reject(Reason.NOT_A_STRING, f"turn {number} holds {type(text).__name__}, not a string")
    for name, text in [("id", sample.id), *((f"turn {n}", m.text) for n, m in enumerate(sample.messages, 1))]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return reject(
                Reason.WRONG_ENCODING, f"{name}, character {error.start}: not UTF-8, or half a surrogate pair"
            )

    num_characters = sum(len(message.text) for message in sample.messages)
    if num_characters > MAX_CHARACTERS:
        return reject(Reason.TOO_LONG, f"{num_characters} characters; no context holds more than {MAX_CHARACTERS}")

    spoken = sample.messages[1:] if sample.messages[:1] and sample.messages[0].role == "system" else sample.messages
    if not any(message.role == "assistant" for message in spoken):
        return reject(Reason.NO_ANSWER, f"none of {len(sample.messages)} turns is an answer")
    if spoken[0].role != "user":
        return reject(Reason.FIRST_TURN_NOT_USER, f"the conversation begins with {spoken[0].role!r}")
    for number, message in enumerate(spoken):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            detail = f"turn {number + 1} is {message.role!r} where {expected!r} belongs"
            return reject(Reason.ROLES_DO_NOT_ALTERNATE, detail)
        if message.role == "assistant" and not message.text.strip():
            return reject(Reason.EMPTY_ANSWER, f"turn {number + 1} answers nothing")

    asked = sum(m.text.count(IMAGE_PLACEHOLDER) for m in spoken if m.role == "user")
    elsewhere = sum(m.text.count(IMAGE_PLACEHOLDER) for m in sample.messages if m.role != "user")
    if elsewhere:
        return reject(Reason.PLACEHOLDER_MISMATCH, f"{elsewhere} {IMAGE_PLACEHOLDER} outside the user's turns")
    if asked != len(sample.pictures):
        return reject(Reason.PLACEHOLDER_MISMATCH, f"{asked} {IMAGE_PLACEHOLDER} for {len(sample.pictures)} pictures")
    return None

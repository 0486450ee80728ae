"""Converts one raw record of a conversation file to a sample, in the layouts of the common training frameworks.

The layout follows from the keys: a list of turns, or a prompt and its response. `docs/data_layouts.md` shows them.
Every key of a record is used, or rejects the record with its name, or is noted (`conversation_keys.py`). A record may
hold any values in any place; the result is a sample or a reason, never an exception.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_recipes.raw.conversation_keys import PAIR_PARTS, PARTS, UNSUPPORTED, RecordKeys, find_unsupported, is_empty
from data_recipes.raw.image_files import ImageError, resolve_images
from data_recipes.raw.placeholders import find_placeholder
from data_recipes.schema.sample import (
    IMAGE_PLACEHOLDER,
    ROLES,
    Reason,
    Reject,
    Sample,
    assemble,
    describe_key,
    describe_value,
)

_USUAL_KEYS = RecordKeys()
_MAX_DETAIL = 240
_NEXT_IMAGE = None
"""A placeholder that stands for the next image beside the turns; an image part may hold its own image instead."""

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
# A turn without a speaker is a question with its answer: {user, assistant} in The Cauldron, {human, assistant} in
# ms-swift, {input, output} in xtuner.
_PAIR_ROLES: dict[str, str] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "input", "question", "query", "instruction", "prompt"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output", "answer", "response"), "assistant"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_KEYS = ("text", "value")
_IMAGE_KEYS = ("image", "image_url", "path", "url", "value")
_PLACES_IMAGE = "<IMG_CONTEXT>"
"""InternVL's placeholder; xtuner writes it in the text beside an image part."""


class _RecordError(Exception):
    """A record cannot be converted."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass
class _Turn:
    """One raw turn.

    Attributes:
        speaker, text: values of any type; `assemble` checks them.
        images: the image of each placeholder in the text, or `_NEXT_IMAGE`.
        is_llava: the turn is written as {from, value}. Images of such turns have placeholders, and two questions in a
            row are an error, as in LLaVA's own code.
    """

    speaker: object
    text: object
    images: list[object] = field(default_factory=list)
    is_llava: bool = False

    @property
    def role(self) -> str | None:
        return ROLES.get(self.speaker.strip().lower()) if isinstance(self.speaker, str) else None


def convert_record(
    record: Mapping[str, Any] | list[Any],
    image_root: Path,
    location: str,
    keys: RecordKeys = _USUAL_KEYS,
    *,
    images_first: bool = False,
    suffix: str = "",
) -> Sample | Reject:
    """Convert one record to a sample.

    Args:
        record: the raw record, or its list of turns; an image is anything that `resolve_image` takes.
        image_root: folder that image paths are relative to.
        location: file and record number.
        keys: which keys hold which part.
        images_first: place the images of a record without any placeholder before its first question in LLaVA's layout
            too.
        suffix: a line that is appended to the first question.

    Returns:
        The sample, with a note for each unknown key; or a `Reject`, which is `unsupported_key` for a key that changes
        the meaning of the record, and `unfilled_placeholder` for a placeholder of another framework.
    """
    if isinstance(record, list):
        record = {next(iter(keys.parts["messages"]), "messages"): record}
    sample_id = record_id(record, location, keys)
    try:
        reader = _RecordReader(keys, images_first)
        turns, images = reader.read(record)
        resolved = resolve_images(images, image_root)
        repairs = _merge_questions(turns)
        _append_to_question(turns, suffix)
        sample = assemble(sample_id, [(turn.speaker, turn.text) for turn in turns], resolved, location)
        if isinstance(sample, Reject):
            return sample
        _check_placeholders(sample)
    except (ImageError, _RecordError) as error:
        detail = " ".join(error.detail.split())
        detail = detail if len(detail) <= _MAX_DETAIL else detail[:_MAX_DETAIL] + "..."
        return Reject(sample_id, error.reason, detail, location)
    return replace(sample, repairs=(*sample.repairs, *repairs), notes=tuple(reader.notes.items()))


def record_id(record: Mapping[str, Any], location: str, keys: RecordKeys = _USUAL_KEYS) -> str:
    """Return the record's id, or its location if it has none; an id is a text or an integer."""
    for key in keys.parts["id"]:
        if _is_id(record.get(key)):
            return str(record[key])
    return location


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


class _RecordReader:
    """Reads the turns and images of one record, and notes the keys that it does not use.

    Attributes:
        notes: {name: example} of unknown keys.
    """

    def __init__(self, keys: RecordKeys, images_first: bool) -> None:
        self.notes: dict[str, str] = {}
        self._keys = keys
        self._images_first = images_first

    def read(self, record: Mapping[str, Any]) -> tuple[list[_Turn], list[object]]:
        """Return the turns and, in the order of their placeholders, the raw images."""
        parts = self._find_parts(record)
        used = {key for part_keys in parts.values() for key in part_keys}
        self._check_other_keys(record, used)
        values = {part: record[part_keys[0]] for part, part_keys in parts.items()}
        if "messages" in parts:
            turns = self._read_turns(parts["messages"][0], values["messages"])
        else:
            turns = self._read_pair(record, parts, values)
        if "system" in parts:
            _add_system(turns, values["system"], parts["system"][0])
        beside = values.get("images", [])
        return turns, _order_images(turns, beside if isinstance(beside, list) else [beside], self._images_first)

    def _find_parts(self, record: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return {part: the keys of the record that hold it}; several keys with the same value are one."""
        parts: dict[str, list[str]] = {}
        for part, keys in self._keys.parts.items():
            if part in PAIR_PARTS and "messages" in parts:
                continue
            present = [key for key in keys if key in record and not is_empty(record[key])]
            if part == "id":
                present = [key for key in present if _is_id(record[key])]
            elif len(present) > 1 and not _agree(record, present):
                names = _join_names(present)
                advice = f"name the one to read in the options: `columns: {{{part}: {describe_key(present[0])}}}`"
                raise _RecordError(Reason.BROKEN_RECORD, f"both {names} hold the {part}; {advice}")
            if present:
                parts[part] = present
        if not parts.keys() & {"messages", "prompt", "query", "response"}:
            # An empty list of turns is a conversation without an answer.
            empty = [key for key in self._keys.parts["messages"] if isinstance(record.get(key), list)]
            parts |= {"messages": empty[:1]} if empty else {}
        return parts

    def _check_other_keys(self, record: Mapping[str, Any], used: set[str]) -> None:
        """Reject the record for an unsupported key, and note the unknown ones."""
        parts = {key: part for part, key in self._keys.columns.items() if key is not None}
        for key, value in record.items():
            if key not in used:
                self._check_key(key, value, "", meaning=parts.get(key))

    def _check_key(
        self, key: str, value: object, place: str, is_answer: bool = True, meaning: str | None = None
    ) -> None:
        """Reject or note one key that is not used.

        Args:
            key: its name.
            value: its value.
            place: " of turn 2", or empty for a key of the record.
            is_answer: see `find_unsupported`.
            meaning: the part that the options say it holds.
        """
        if is_empty(value):
            return
        name = describe_key(key)
        if meaning is not None or key not in self._keys.columns:
            why = find_unsupported(meaning or key, value, is_answer)
            if why is not None:
                advice = f"only if it says nothing about the training: `columns: {{{meaning or name}: null}}`"
                detail = f"`{name}`{place} is {describe_value(value)}: {why.replace('KEY', name)} ({advice})"
                raise _RecordError(Reason.UNSUPPORTED_KEY, detail)
            if (meaning or key) in UNSUPPORTED:
                return
        self.notes.setdefault(f"unknown_key:turn.{name}" if place else f"unknown_key:{name}", describe_value(value))

    def _read_turns(self, key: str, value: object) -> list[_Turn]:
        """Read a list of turns."""
        value = _transpose(value)
        if not isinstance(value, list):
            detail = f"`{describe_key(key)}` is {describe_value(value)}, not a list of turns"
            raise _RecordError(Reason.BROKEN_RECORD, detail)
        turns: list[_Turn] = []
        for number, turn in enumerate(value, start=1):
            if not isinstance(turn, dict):
                detail = f"turn {number} of `{describe_key(key)}` is {describe_value(turn)}, not an object"
                raise _RecordError(Reason.BROKEN_RECORD, detail)
            turns += self._read_turn(turn, number)
        return turns

    def _read_turn(self, turn: dict[str, Any], number: int) -> list[_Turn]:
        """Read {role, content}, {from, value}, or a question with its answer."""
        if len(turn) == 2 and not self._keys.role_key:
            # Nearly every turn of the published datasets; what follows is several times slower.
            for role_key, content_key in zip(_ROLE_KEYS, _CONTENT_KEYS, strict=True):
                speaker, text = turn.get(role_key), turn.get(content_key)
                if isinstance(speaker, str) and isinstance(text, str):
                    return [_Turn(speaker, text, _count_placeholders(text), role_key == "from")]
        place = f" of turn {number}"
        role_keys = (self._keys.role_key,) if self._keys.role_key else _ROLE_KEYS
        content_keys = (self._keys.content_key,) if self._keys.content_key else _CONTENT_KEYS
        named = next((key for key in role_keys if turn.get(key) is not None), None)
        if named is None:
            return self._read_pair_turn(turn, number)
        content_key = _pick_key(turn, content_keys, place)
        speaker = turn[named]
        if isinstance(speaker, str):
            speaker = self._keys.speakers.get(speaker, speaker)
        content, images = self._read_content(turn.get(content_key), number)
        read = _Turn(speaker, content, images, named == "from")
        for key, value in turn.items():
            if key not in (named, content_key):
                self._check_turn_key(key, value, place, read.role == "assistant")
        return [read]

    def _read_pair_turn(self, turn: dict[str, Any], number: int) -> list[_Turn]:
        place = f" of turn {number}"
        turns = []
        used: list[str] = []
        for role in ("system", "user", "assistant"):
            keys = [key for key, each in _PAIR_ROLES.items() if each == role and key in turn]
            if not keys:
                continue
            key = _pick_key(turn, keys, place)
            used.append(key)
            if role != "system" or not is_empty(turn[key]):
                text, images = self._read_content(turn[key], number)
                turns.append(_Turn(role, text, images))
        if not any(turn.speaker != "system" for turn in turns):
            detail = f"turn {number} is {describe_value(turn)}; it has neither `role` nor `from`"
            raise _RecordError(Reason.BROKEN_RECORD, detail)
        for key, value in turn.items():
            if key not in used:
                self._check_turn_key(key, value, place, True)
        return turns

    def _check_turn_key(self, key: str, value: object, place: str, is_answer: bool) -> None:
        if key in PARTS["images"] and not is_empty(value):
            detail = f"`{key}`{place} is {describe_value(value)}: images are named beside the turns, or in parts"
            raise _RecordError(Reason.UNSUPPORTED_KEY, detail)
        self._check_key(key, value, place, is_answer)

    def _read_content(self, content: object, number: int) -> tuple[object, list[object]]:
        """Join the parts of a turn's content.

        Returns:
            The text, and the image of each of its placeholders. Content that is not a list is returned unchanged.
        """
        if not isinstance(content, list):
            return content, _count_placeholders(content)
        lines: list[str] = []
        images: list[object] = []
        own: list[object] = []
        texts: list[str] = []
        for part in content:
            kind, value = self._read_part(part, number)
            if kind == "image":
                lines.append(IMAGE_PLACEHOLDER)
                images.append(value)
                own.append(value)
            else:
                lines.append(value)
                texts.append(value)
                images += _count_placeholders(value)
        joined = "\n".join(texts).replace(_PLACES_IMAGE, IMAGE_PLACEHOLDER)
        if own and _NEXT_IMAGE not in own and joined.count(IMAGE_PLACEHOLDER) == len(own):
            return joined, own  # the text says where the images of the parts belong
        return "\n".join(lines), images

    def _read_part(self, part: object, number: int) -> tuple[str, Any]:
        """Return ("text", the text) or ("image", its image or `_NEXT_IMAGE`)."""
        if isinstance(part, str):
            return "text", part
        if not isinstance(part, dict):
            detail = f"a part of turn {number} is {describe_value(part)}, not an object with `type`"
            raise _RecordError(Reason.NOT_A_STRING, detail)
        place = f" of a part of turn {number}"
        kind = part.get("type")
        if kind is None:
            kind = next((key for key in ("text", "image", "image_url") if not is_empty(part.get(key))), None)
        if kind in _TEXT_PARTS:
            key = _pick_key(part, _TEXT_KEYS, place)
            value = part.get(key)
            if not isinstance(value, str):
                raise _RecordError(Reason.NOT_A_STRING, f"`{key}`{place} is {describe_value(value)}, not a text")
        elif kind in _IMAGE_PARTS:
            key = _pick_key(part, _IMAGE_KEYS, place)
            value = _NEXT_IMAGE if is_empty(part.get(key)) else part[key]
        else:
            detail = f"a part of turn {number} is of type {describe_value(kind)}: only images and texts are read"
            raise _RecordError(Reason.UNSUPPORTED_KEY, detail)
        for other, extra in part.items():
            if other not in ("type", key):
                self._check_key(other, extra, place)
        return ("text" if kind in _TEXT_PARTS else "image"), value

    def _read_pair(
        self, record: Mapping[str, Any], parts: Mapping[str, list[str]], values: Mapping[str, Any]
    ) -> list[_Turn]:
        """Read a prompt and its response, which may be texts or lists of turns, after their history."""
        asked = [part for part in ("prompt", "query") if part in parts]
        if not asked and "response" not in parts:
            keys = describe_value(dict(record), 120)
            wanted = "`messages`, `conversations`, or a prompt and a response"
            detail = f"no conversation: the record is {keys}; it needs {wanted}"
            raise _RecordError(Reason.BROKEN_RECORD, detail)
        if not asked:
            name = describe_key(parts["response"][0])
            raise _RecordError(Reason.BROKEN_RECORD, f"`{name}` is a response without a prompt")
        if "response" not in parts:
            name = describe_key(parts[asked[0]][0])
            is_blank = any(key in record for key in self._keys.parts["response"])
            reason = Reason.EMPTY_ANSWER if is_blank else Reason.NO_ANSWER
            raise _RecordError(reason, f"the prompt in `{name}` has no response")
        turns = self._read_history(values.get("history", []))
        first = values[asked[0]]
        if len(asked) == 2 and isinstance(first, str) and isinstance(values["query"], str):
            first = f"{first}\n{values['query']}"
        elif len(asked) == 2:
            detail = f"{_join_names([parts[part][0] for part in asked])} are read together and must be texts"
            raise _RecordError(Reason.NOT_A_STRING, detail)
        turns += self._read_side(parts[asked[0]][0], first, "user")
        return turns + self._read_side(parts["response"][0], values["response"], "assistant")

    def _read_side(self, key: str, value: object, role: str) -> list[_Turn]:
        """Read the prompt or the response: a text, a turn or a list of turns."""
        if isinstance(value, list | dict):
            return self._read_turns(key, value if isinstance(value, list) else _transpose(value, or_one=True))
        return [_Turn(role, value, _count_placeholders(value))]

    def _read_history(self, history: object) -> list[_Turn]:
        """Read earlier rounds: a list of [question, answer], or of turns."""
        turns: list[_Turn] = []
        for number, each in enumerate(history if isinstance(history, list) else [history], start=1):
            if isinstance(each, dict):
                turns += self._read_turn(each, number)
            elif isinstance(each, list | tuple) and len(each) == 2:
                turns += [_Turn(role, text, _count_placeholders(text)) for role, text in zip(_SIDES, each, strict=True)]
            else:
                detail = f"round {number} of `history` is {describe_value(each)}, not [question, answer]"
                raise _RecordError(Reason.BROKEN_RECORD, detail)
        return turns


_SIDES = ("user", "assistant")


def _join_names(keys: Sequence[str]) -> str:
    return " and ".join(f"`{describe_key(key)}`" for key in keys)


def _agree(record: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Return whether the keys hold the same text, or the same list of one text."""
    values = [record[key] for key in keys]
    texts = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return all(isinstance(text, str) and text == texts[0] for text in texts)


def _pick_key(values: Mapping[str, Any], keys: Sequence[str], place: str) -> str:
    """Return the only key with a value, or the first that is there."""
    present = [key for key in keys if key in values]
    if len(present) < 2:
        return present[0] if present else keys[0]
    filled = [key for key in present if not is_empty(values[key])]
    if len(filled) > 1:
        detail = f"both {_join_names(filled)}{place} hold values; keep one of them"
        raise _RecordError(Reason.BROKEN_RECORD, detail)
    return (filled or present)[0]


def _transpose(value: object, or_one: bool = False) -> object:
    """Return a list of turns from an object of lists, as older versions of `datasets` write it to parquet.

    Args:
        value: the raw turns.
        or_one: whether another object is one turn.
    """
    if not isinstance(value, dict):
        return value
    columns = list(value.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value] if or_one else value


def _count_placeholders(text: object) -> list[object]:
    return [_NEXT_IMAGE] * text.count(IMAGE_PLACEHOLDER) if isinstance(text, str) and "<" in text else []


def _add_system(turns: list[_Turn], system: object, key: str) -> None:
    """Insert the system prompt beside the turns, unless the first turn says the same."""
    if turns and turns[0].role == "system":
        if isinstance(system, str) and turns[0].text == system:
            return
        raise _RecordError(Reason.BROKEN_RECORD, f"both `{describe_key(key)}` and the first turn are system prompts")
    turns.insert(0, _Turn("system", system, _count_placeholders(system)))


def _order_images(turns: Sequence[_Turn], beside: Sequence[object], images_first: bool) -> list[object]:
    """Return the images in the order of the placeholders; those beside the turns that have none come last.

    If no turn has a placeholder, all images are placed before the first question, as in TRL and ms-swift; in LLaVA's
    layout with `images_first` only. `check_sample` rejects a sample with another number of images than placeholders.
    """
    has_placeholders = any(turn.images for turn in turns)
    if beside and not has_placeholders and (images_first or not any(turn.is_llava for turn in turns)):
        first = next((turn for turn in turns if turn.role == "user" and isinstance(turn.text, str)), None)
        if first is not None:
            first.text = f"{IMAGE_PLACEHOLDER}\n" * len(beside) + str(first.text)
            first.images = [_NEXT_IMAGE] * len(beside)
    rest = list(beside)
    ordered: list[object] = []
    for image in (image for turn in turns for image in turn.images):
        if image is not _NEXT_IMAGE:
            ordered.append(image)
        elif rest:
            ordered.append(rest.pop(0))
    return [*ordered, *rest]


def _append_to_question(turns: Sequence[_Turn], suffix: str) -> None:
    """Append a line to the first question."""
    first = next((turn for turn in turns if turn.role == "user" and isinstance(turn.text, str)), None)
    if suffix and first is not None:
        first.text = f"{first.text}\n{suffix}"


def _merge_questions(turns: list[_Turn]) -> list[str]:
    """Join questions that follow each other, as in OpenAI's examples; returns the name of the repair if there are."""
    merged: list[_Turn] = []
    for turn in turns:
        before = merged[-1] if merged else None
        if before is None or turn.is_llava or not (before.role == turn.role == "user"):
            merged.append(turn)
        elif isinstance(before.text, str) and isinstance(turn.text, str):
            merged[-1] = replace(before, text=f"{before.text}\n{turn.text}")
        else:
            merged.append(turn)
    repairs = ["questions_joined"] if len(merged) < len(turns) else []
    turns[:] = merged
    return repairs


def _check_placeholders(sample: Sample) -> None:
    for number, message in enumerate(sample.messages, start=1):
        found = find_placeholder(message.role, message.text)
        if found is not None:
            detail = f"{describe_value(found)} in turn {number} is a placeholder that nothing fills"
            raise _RecordError(Reason.UNFILLED_PLACEHOLDER, detail)

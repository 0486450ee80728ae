"""Names the keys of conversation records: the parts that they hold, and those whose meaning training cannot follow.

A key is used, or it rejects the record (`find_unsupported`), or it is noted. An empty value counts as absent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from data_recipes.schema.sample import DataError, describe_key, describe_value

PARTS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "messages": ("messages", "conversations", "conversation", "texts"),
    "prompt": ("instruction", "query", "prompt", "question"),
    "query": ("input",),
    "response": ("output", "response", "completion", "answer"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "images": ("images", "image"),
}
"""{part of a record: the keys that hold it}. The parts have the names of LLaMA-Factory's `columns`."""

PAIR_PARTS = ("prompt", "query", "response", "history")
"""Parts that are read only if the record has no list of turns."""

_MEDIUM = "only images and texts are read"
_IMAGE = "not read; if it holds the images: `columns: {images: KEY}`"
_PREFERENCE = "it marks or compares answers, and every answer is trained on"
_LOSS = "every answer is trained on, with the same weight"
_TOOL = "tools are not shown to the model"
_GROUNDING = "boxes and references are not filled into the text"
_REASONING = "reasoning beside the answer is not trained on"
_TEMPLATE = "the chat template cannot be changed by a record"
_CONTEXT = "the turns before are not read beside a list of turns"

UNSUPPORTED: dict[str, str] = {
    key: why
    for why, keys in {
        _MEDIUM: "video videos video_path video_url audio audios audio_path audio_url input_audio sound speech frames "
        "point_cloud point_clouds mask masks depth",
        _IMAGE: "image_path image_paths image_url image_urls image_file image_list img imgs img_path picture pictures "
        "photo photos",
        _PREFERENCE: "label labels kto_tag chosen rejected rejected_response rejected_messages rejected_images "
        "preferred_output non_preferred_output positive_messages negative_messages completions margin",
        _LOSS: "loss loss_mask loss_scale loss_weight weight weights sample_weight train output_with_loss "
        "need_eos_token",
        _TOOL: "tools tool_calls tool_call_id functions function_call",
        _GROUNDING: "objects bbox bboxes boxes ref refs",
        _REASONING: "reasoning reasoning_content thinking thought thoughts",
        _TEMPLATE: "chat_template_kwargs enable_thinking prefix",
        _CONTEXT: "history",
    }.items()
    for key in keys.split()
}
"""{key that changes the meaning of a record or turn: why it rejects the record}."""

_LOSS_FLAGS = ("loss", "loss_weight", "weight", "train", "output_with_loss", "need_eos_token")
_WANTED_FLAGS = ("label", "kto_tag")


@dataclass(frozen=True)
class RecordKeys:
    """Which keys of the records of one file hold which part.

    Attributes:
        columns: {part: key} where it differs from `PARTS`; None if no key holds the part, so that its usual keys are
            only noted. A key of `UNSUPPORTED` may be a part too.
        role_key, content_key: keys of the speaker and the text in a turn; empty for the usual ones.
        speakers: {speaker in the file: usual speaker}.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    role_key: str = ""
    content_key: str = ""
    speakers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """{part: the keys that may hold it}; a key that `columns` names for one part is not among those of another."""
        named = set(self.columns.values())
        parts = {part: tuple(key for key in keys if key not in named) for part, keys in PARTS.items()}
        return parts | {part: () if key is None else (key,) for part, key in self.columns.items() if part in PARTS}

    def record_keys(self) -> tuple[str, ...]:
        """Return the keys that distinguish a record from an object that holds a list of records."""
        return tuple(key for part, keys in self.parts.items() if part != "id" for key in keys)

    def check_columns(self, names: Iterable[str], origin: str) -> None:
        """Check that a table has the columns of a conversation.

        Args:
            names: the columns of the table.
            origin: the file, for the error message.

        Raises:
            DataError: there is neither a list of turns nor a prompt with its response.
        """
        known = list(names)

        def has(*parts: str) -> bool:
            return any(key in known for part in parts for key in self.parts[part])

        if known and not has("messages") and not (has("prompt", "query") and has("response")):
            listed = ", ".join(describe_key(name) for name in known)
            raise DataError(
                f"{origin}: no column with a conversation; the file has {listed}. Name the columns in the options, for "
                "example `columns: {messages: KEY, images: KEY}` or `columns: {prompt: KEY, response: KEY}`."
            )


def read_columns(columns: object) -> RecordKeys:
    """Read the option `columns` of a reader, {part: key}; a part with null has no key.

    Raises:
        DataError: it is not such a mapping, or it names an unknown part.
    """
    if columns is None:
        return RecordKeys()
    if not isinstance(columns, dict):
        raise DataError(f"columns: {describe_value(columns)}; must be a mapping such as {{messages: texts}}.")
    known = (*PARTS, *(key for key in UNSUPPORTED if key not in PARTS))
    for part, key in columns.items():
        if part not in known:
            turned = f" Parts come first: {{{key}: {part}}}." if key in PARTS else ""
            raise DataError(f"columns: unknown part {describe_key(part)}; known: {', '.join(PARTS)}.{turned}")
        if key is not None and not isinstance(key, str):
            raise DataError(
                f"columns.{part}: {describe_value(key)}; must be the name of a key of the records, or null."
            )
    return RecordKeys(columns)


def is_empty(value: object) -> bool:
    """Return whether a raw value says nothing: null, blank, an empty list, or an object of only such values.

    False and 0 say something. Parquet files have null, or objects of nulls and empty lists, for absent values.
    """
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, dict):
        return all(each is None or (isinstance(each, str | list) and not each) for each in value.values())
    return value is None or (isinstance(value, list | tuple | bytes) and not value)


def find_unsupported(key: str, value: object, is_answer: bool) -> str | None:
    """Return why a key with this value rejects the record, or None if it does not.

    A flag that says what is done anyway does not: `loss: true` of an answer, `loss: false` of a question, or
    `label: true`.

    Args:
        key: a key of `UNSUPPORTED`, or any other.
        value: its value.
        is_answer: whether the value belongs to an answer or to the record as a whole.
    """
    if key not in UNSUPPORTED or is_empty(value):
        return None
    if key in _WANTED_FLAGS and value is True:
        return None
    if key in _LOSS_FLAGS and isinstance(value, bool | int | float) and value == is_answer:
        return None
    return UNSUPPORTED[key]

"""Reader of images with a table of their texts: the imagefolder layout of the `datasets` library, and tables like it.

`metadata.jsonl`, `metadata.csv` or `metadata.parquet` has one row per image, with the name of the image relative to the
table's folder. What a row says beside it is one of three forms, tried in this order; `columns` names the column of each
part where it has another name than these:

    messages    `messages`, `conversations` or `texts`: a conversation, as in `messages_jsonl.py` and `llava_json.py`,
                or a list of {user, assistant}, as in The Cauldron and FineVision
    question    `question` or `query`, with an answer in `answer`, `answers` or `label`; of several answers the most
                frequent one, of equally frequent ones the first. With `options` or `choices`, which are appended to the
                question, the answer is the letter of the right one, found by its index, letter or text
    text        `text` or `caption`: a caption, which answers one of `prompts`

The images are in `image`, `images`, `file_name` or `file_names`. All of them are placed before the first question
unless a text has placeholders. `image_text_parquet.py` and `webdataset.py` read the same rows from other containers. A
folder of images without a table, such as one folder per class, has no texts and is refused.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_recipes.raw.conversation_record import convert_record, record_id
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.parquet_records import iter_rows, list_columns
from data_recipes.raw.questions import LETTER_ANSWER, format_multiple_choice, pick_by_hash
from data_recipes.schema.sample import DataError, Reason, Reject, Sample, describe_value
from data_recipes.schema.source import reject_unknown_keys

PROMPTS = ("Describe this image.",)
"""The default prompts of captions."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "images": ("images", "image", "file_name", "file_names"),
    "messages": ("messages", "conversations", "texts"),
    "question": ("question", "query"),
    "answer": ("answer", "answers", "label"),
    "options": ("options", "choices"),
    "text": ("text", "caption"),
}
"""{part of a row: usual names of its column}."""

FORMS = ("messages", "question", "text")
"""Parts of which a row has one, in the order in which they are tried."""


@dataclass(frozen=True)
class RowLayout:
    """What the columns of a table mean.

    Attributes:
        columns: {part: name of its column}; parts that are not named have one of their usual names. If a form is named
            (messages, question or text), rows are read in that form only.
        prompts: prompts of captions, of which one is selected by hash for each row.
        suffix: format instruction that is appended to questions. The default is none, and `LETTER_ANSWER` for questions
            with options.

    Raises:
        DataError: `columns` has an unknown part, or there are no prompts.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    prompts: Sequence[str] = PROMPTS
    suffix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Mapping) or not all(isinstance(name, str) for name in self.columns.values()):
            raise DataError(f"columns: {str(self.columns)[:80]!r} is not a mapping of parts to names of columns.")
        reject_unknown_keys("columns", self.columns, list(COLUMNS), "parts of a row")
        if isinstance(self.prompts, str) or not self.prompts or not all(isinstance(each, str) for each in self.prompts):
            raise DataError("prompts: must be a list of at least one sentence that asks for a description.")

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that rows may have, in the order in which they are tried."""
        return tuple(form for form in FORMS if form in self.columns) or FORMS

    def names(self, part: str) -> tuple[str, ...]:
        """The columns that may hold a part of a row."""
        return (self.columns[part],) if part in self.columns else COLUMNS[part]

    def take(self, row: dict[str, Any], part: str) -> Any:
        """Remove a part from a row and return it; None if the row does not have it."""
        return next((row.pop(name) for name in self.names(part) if row.get(name) is not None), None)


def samples(
    root: Path,
    metadata: str = "metadata.jsonl",
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    suffix: str = "",
) -> Iterator[Sample | Reject]:
    """Yield one sample per row of `root/metadata`, in file order.

    Args:
        root: the source's raw folder.
        metadata: path of the table (.jsonl, .json, .csv or .parquet), relative to `root`.
        image_root: folder that the names of images are relative to, itself relative to `root`; None for the table's.
        columns, prompts, suffix: see `RowLayout`.

    Raises:
        DataError: the table does not exist, or an option has an invalid value.
    """
    layout = RowLayout(columns or {}, prompts, suffix)
    path = root / metadata
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. An imagefolder needs a table with the text of each image: name it in `metadata`, "
            'or write one, such as metadata.jsonl with lines {"file_name": "1.jpg", "text": "A cup."}. Folders named '
            "after classes have no texts."
        )
    folder = path.parent if image_root is None else root / image_root
    for location, row in iter_table(path):
        yield row if isinstance(row, Reject) else convert_row(row, folder, location, layout)


def convert_row(row: Mapping[str, Any], image_root: Path, location: str, layout: RowLayout) -> Sample | Reject:
    """Convert one row to a sample. What the row says besides goes to the converter of conversations.

    Args:
        row: {column: value}.
        image_root: folder that image paths are relative to.
        location: file and row number.
        layout: what the columns mean.
    """
    rest = dict(row)
    given = [name for name in layout.names("images") if row.get(name) is not None]
    if len(given) > 1:
        detail = (
            f"the columns {given[0]} and {given[1]} both have images; name one of them: columns: {{images: {given[0]}}}"
        )
        return Reject(record_id(rest, location), Reason.BROKEN_RECORD, detail, location)
    images = layout.take(rest, "images")
    form, value = next(
        ((form, value) for form in layout.forms if (value := layout.take(rest, form)) is not None), (None, None)
    )
    if form == "messages":
        return convert_record({**rest, "messages": value, "images": images}, image_root, location)
    sample_id = record_id(rest, location)
    if form is None:
        needed = ", ".join(name for each in layout.forms for name in layout.names(each))
        detail = f"the row has none of {needed}; it is {describe_value(dict(row), 160)}"
        return Reject(sample_id, Reason.BROKEN_RECORD, detail, location)
    if form == "question":
        turns = _question_turns(value, layout.take(rest, "answer"), layout.take(rest, "options"), layout.suffix)
    elif images is None or images == []:
        turns = (Reason.IMAGE_MISSING, "a caption without an image")
    else:
        turns = [("user", pick_by_hash(layout.prompts, sample_id)), ("assistant", value)]
    if isinstance(turns, tuple):
        return Reject(sample_id, *turns, location)
    messages = [{"role": role, "content": text} for role, text in turns]
    return convert_record({**rest, "messages": messages, "images": images}, image_root, location)


_Turns = list[tuple[str, object]] | tuple[Reason, str]
"""(role, text) pairs, or why there are none."""


def _question_turns(question: object, answer: object, options: object, suffix: str) -> _Turns:
    answer = _select_answer(answer)
    if answer is None:
        return Reason.NO_ANSWER, "a question without an answer; is this a test set?"
    if not isinstance(question, str):
        return Reason.NOT_A_STRING, f"the question is of type {type(question).__name__}, not a string"
    if options is not None and options != []:
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            return Reason.BROKEN_RECORD, "the options of a question are not a list of strings"
        right = _find_option(answer, options)
        if right is None:
            return Reason.BROKEN_RECORD, f"the answer {str(answer)[:60]!r} names none of the {len(options)} options"
        question, answer = format_multiple_choice(question, options, right)
        suffix = suffix or LETTER_ANSWER
    return [("user", f"{question}\n{suffix}".rstrip("\n")), ("assistant", answer)]


def _select_answer(answer: object) -> object:
    """Of several answers the most frequent one, of equally frequent ones the first; other values unchanged."""
    if not isinstance(answer, list):
        return answer
    texts = [each.get("answer") if isinstance(each, dict) else each for each in answer]
    strings = [text for text in texts if isinstance(text, str) and text.strip()]
    return Counter(strings).most_common(1)[0][0] if strings else None


def _find_option(answer: object, options: Sequence[str]) -> int | None:
    """The index of the right option, given by index, letter or text; None if there is none, or if two are meant."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < min(len(options), 26) else None
    if not isinstance(answer, str):
        return None
    found = {number for number, option in enumerate(options) if option == answer}
    if answer.isascii() and answer.isdecimal():
        found.add(int(answer[:3]))
    if len(answer) == 1 and "A" <= answer <= "Z":
        found.add(ord(answer) - ord("A"))
    found = {number for number in found if number < min(len(options), 26)}
    return found.pop() if len(found) == 1 else None


def iter_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) of a table; a row is a dictionary, or a `Reject` if it cannot be read."""
    if path.suffix == ".parquet":
        return iter_rows(path, [], optional=list_columns(path))
    return _iter_csv(path) if path.suffix == ".csv" else iter_records(path)


def _iter_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) of a CSV file with a header, in UTF-8; empty cells are absent."""
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        while True:
            location = f"{path.name}, row {number + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield location, Reject(location, Reason.BROKEN_RECORD, f"not CSV from here on: {error}", location)
                return
            number += 1
            if None in row or None in row.values():
                detail = "the row has more or fewer cells than the header"
                yield location, Reject(location, Reason.BROKEN_RECORD, detail, location)
            else:
                yield location, {name: value for name, value in row.items() if value != ""}

"""Reads the records of JSON files of any size one at a time.

Published annotation files are lists of up to a gigabyte, and some are truncated. `json.load` would need many times that
memory and fail on the whole file. Here the file is read through a window of bounded size, an invalid record is rejected
alone, and of a truncated file only the end is lost.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from data_recipes.schema.sample import DataError, Reason, Reject

_CHUNK_CHARACTERS = 1 << 20
_MAX_RECORD_CHARACTERS = 64 << 20
_DECODER = json.JSONDecoder(strict=False)  # accepts raw line breaks inside strings
_SEPARATORS = re.compile(r"[\s,]*")


def iter_records(path: Path, record_type: type = dict, list_key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) for each record of a JSON list or JSON-lines file, detected by the first character.

    A record that cannot be parsed or has another type is yielded as a `Reject`, as is the missing end of a truncated
    file. Bytes that are not UTF-8 become lone surrogates, which `sample.check_sample` rejects. A UTF-16 file is a
    single `Reject`.

    Args:
        path: the file, in UTF-8 with or without byte order mark.
        record_type: required type of each record, `dict` or `list`.
        list_key: key of the list if the file is one object; preceding keys are skipped.

    Raises:
        DataError: the file does not exist, or it has no list under `list_key`.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. The raw folder exists, but its annotations are missing: download them, or correct "
            "the file name in `options` of the source's YAML."
        )
    with path.open("rb") as binary:
        head = binary.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        yield (
            path.name,
            Reject(path.name, Reason.WRONG_ENCODING, "the file is UTF-16 or UTF-32, not UTF-8", path.name),
        )
        return
    # `surrogateescape` continues after invalid bytes, so that a single record in Latin-1 does not affect the others.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        window = _Window(stream)
        if list_key is not None and not _seek_list(window, list_key):
            raise DataError(
                f"{path}: no list under the key {list_key!r}; check that the file is the right one and complete."
            )
        is_list = window.peek() == "["
        for number, record in _iter_list(window, record_type) if is_list else _iter_lines(window):
            location = f"{path.name}, record {number}"
            if isinstance(record, _ParseError):
                reason = Reason.FILE_CUT_OFF if record.is_truncated else Reason.BROKEN_RECORD
                yield location, Reject(location, reason, record.message, location)
            elif not isinstance(record[0], record_type):
                detail = f"a JSON {type(record[0]).__name__} where a {record_type.__name__} belongs"
                yield location, Reject(location, Reason.BROKEN_RECORD, detail, location)
            else:
                yield location, record[0]


@dataclass(frozen=True)
class _ParseError:
    """Why a value could not be parsed; `is_truncated` if the file ends inside it."""

    message: str
    is_truncated: bool = False


# A parsed value in a tuple of length 1 (the value itself may be None), or an error.
_Parsed = tuple[Any] | _ParseError


class _Window:
    """The part of a stream that is in memory; `text[position:]` is not decoded yet."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.text = ""
        self.position = 0

    def read_more(self) -> bool:
        """Extend the window; returns False at the end of the file.

        The undecoded text at least doubles, so the cost of decoding a long record repeatedly stays linear.
        """
        num_undecoded = len(self.text) - self.position
        chunk = self._stream.read(max(_CHUNK_CHARACTERS, num_undecoded))
        if not chunk:
            return False
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return True

    def peek(self) -> str:
        """Skip white space and commas; return the next character without consuming it, or '' at the end."""
        while True:
            match = _SEPARATORS.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""

    def decode_value(self) -> _Parsed:
        """Decode the value at `position` and advance past it; after an error, `position` is unchanged."""
        while True:
            try:
                value, self.position = _DECODER.raw_decode(self.text, self.position)
                return (value,)
            except RecursionError:
                return _ParseError("nested too deeply")
            except json.JSONDecodeError as error:
                # A record that extends beyond the window also fails to parse. An unterminated string or an error at the
                # end of the window may be resolved by reading more; other errors cannot.
                at_edge = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if not at_edge or len(self.text) - self.position > _MAX_RECORD_CHARACTERS:
                    return _ParseError(f"not JSON: {error.msg}, {error.pos - self.position} characters into the record")
                if not self.read_more():
                    return _ParseError(f"not JSON: {error.msg}, up to the end of the file", is_truncated=True)

    def iter_lines(self) -> Iterator[str]:
        """Yield the remaining lines with their line breaks; the last line may have none."""
        *complete, partial = self.text[self.position :].split("\n")
        yield from (line + "\n" for line in complete)
        yield partial + self._stream.readline()
        yield from self._stream

    def skip_to(self, pattern: re.Pattern[str]) -> bool:
        """Advance to the next match of `pattern` after the current character; returns False if there is none."""
        start = self.position + 1
        while True:
            match = pattern.search(self.text, start)
            if match is not None:
                self.position = match.start()
                return True
            # Keep the last characters, because a match may extend beyond the window, but not the first character of the
            # invalid record.
            self.position = min(max(self.position + 1, len(self.text) - 256), len(self.text))
            if not self.read_more():
                return False
            start = 0


def _seek_list(window: _Window, key: str) -> bool:
    """Advance to the list under `key` of the top-level object; returns False if there is none."""
    if window.peek() != "{":
        return False
    window.position += 1
    while window.peek() == '"':
        name = window.decode_value()
        if isinstance(name, _ParseError) or window.peek() != ":":
            return False
        window.position += 1
        if name == (key,):
            return window.peek() == "["
        window.peek()
        if isinstance(window.decode_value(), _ParseError):
            return False
    return False


def _iter_list(window: _Window, record_type: type) -> Iterator[tuple[int, _Parsed]]:
    window.position += 1
    number = 0
    first_key = "id"
    while True:
        character = window.peek()
        if character == "]":
            return
        number += 1
        if character == "":
            yield number, _ParseError("the file ends without its closing bracket", is_truncated=True)
            return
        parsed = window.decode_value()
        if isinstance(parsed, _ParseError):
            # Continue at the next object whose first key is that of the previous record. Objects inside records, such
            # as the turns, have another first key.
            start = r"\[\s*\"" if record_type is list else r"\{\s*\"" + re.escape(first_key) + r"\"\s*:"
            has_next = window.skip_to(re.compile(start))
            if has_next or window.text.rstrip().endswith("]"):
                parsed = replace(parsed, is_truncated=False)  # a missing quotation mark, not a truncated file
            yield number, parsed
            if not has_next:
                return
            continue
        yield number, parsed
        if isinstance(parsed[0], dict) and parsed[0]:
            first_key = str(next(iter(parsed[0])))


def _iter_lines(window: _Window) -> Iterator[tuple[int, _Parsed]]:
    number = 0
    for line in window.iter_lines():
        number += 1
        if not line.strip():
            continue
        try:
            yield number, (json.loads(line, strict=False),)
        except RecursionError:
            yield number, _ParseError("nested too deeply")
        except json.JSONDecodeError as error:
            message = f"not JSON: {error.msg}, {error.pos} characters into the line"
            yield number, _ParseError(message, is_truncated=not line.endswith("\n"))

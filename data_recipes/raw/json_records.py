"""Reads the records of JSON files of any size one at a time.

Published annotation files are lists of up to a gigabyte, and some are truncated. `json.load` would need many times that
memory and fail on the whole file. Here the file is read through a window of bounded size, an invalid record is rejected
alone, and of a truncated file only the end is lost.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from data_recipes.raw.file_kinds import HEAD_BYTES, describe_file_kind
from data_recipes.schema.sample import DataError, Reason, Reject

_CHUNK_CHARACTERS = 1 << 20
_MAX_RECORD_CHARACTERS = 64 << 20
_DECODER = json.JSONDecoder(strict=False)  # accepts raw line breaks inside strings
_SEPARATORS = re.compile(r"[\s,]*")
_LONG_LIST = 64
"""Elements after which a list of objects in an object holds the records of the file, and is not part of one record."""
_TURN_KEYS = ("role", "from")
_TOO_MANY_DIGITS = "not JSON that can be read: an integer has thousands of digits"


def iter_records(
    path: Path,
    record_type: type | tuple[type, ...] = dict,
    list_key: str | None = None,
    record_keys: Collection[str] = (),
) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) for each record of a JSON list or JSON-lines file, detected by its beginning.

    A record that cannot be parsed or has another type is yielded as a `Reject`, as is the missing end of a truncated
    file. Bytes that are not UTF-8 become lone surrogates, which `sample.check_sample` rejects. A UTF-16 file is a
    single `Reject`.

    Args:
        path: the file, in UTF-8 with or without byte order mark.
        record_type: required type of each record, `dict`, `list` or both.
        list_key: key of the list if the file is one object; preceding keys are skipped.
        record_keys: keys that only records have, of which each has at least one. With them, a file may also be one
            object with a list of records under any key, objects may extend over several lines, and a line may be a list
            of turns.

    Raises:
        DataError: the file does not exist, is another kind of file, has no list under `list_key`, or is an object with
            more than one list of records.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. The raw folder exists, but its annotations are missing: download them, or correct "
            "the file name in `options` of the source's YAML."
        )
    with path.open("rb") as binary:
        head = binary.read(HEAD_BYTES)
    kind = describe_file_kind(head)
    if kind is not None:
        raise DataError(
            f"{path} is {kind}, where JSON is expected. Download or unpack the file itself, or correct the file name "
            "in `options` of the source's YAML."
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        yield (
            path.name,
            Reject(path.name, Reason.WRONG_ENCODING, "the file is UTF-16 or UTF-32, not UTF-8", path.name),
        )
        return
    # `surrogateescape` continues after invalid bytes, so that a single record in Latin-1 does not affect the others.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, record in _iter_values(stream, path, record_type, list_key, record_keys):
            location = f"{path.name}, record {number}"
            if isinstance(record, _ParseError):
                reason = Reason.FILE_CUT_OFF if record.is_truncated else Reason.BROKEN_RECORD
                yield location, Reject(location, reason, record.message, location)
            elif not isinstance(record[0], record_type):
                expected = record_type.__name__ if isinstance(record_type, type) else "dict or list"
                detail = f"a JSON {type(record[0]).__name__} where a {expected} belongs"
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
                value, end = _DECODER.raw_decode(self.text, self.position)
                is_at_edge = end > len(self.text) - 3 and self.text[end:].lower() in ("", ".", "e", "e-", "e+")
                if is_at_edge and isinstance(value, int | float) and self.read_more():
                    continue  # the rest of the number may follow
                self.position = end
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
            except ValueError:
                return _ParseError(_TOO_MANY_DIGITS)

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


def _iter_values(
    stream: IO[str],
    path: Path,
    record_type: type | tuple[type, ...],
    list_key: str | None,
    record_keys: Collection[str],
) -> Iterator[tuple[int, _Parsed]]:
    """Yield (number, value) for each record of the file in its layout; see `iter_records`."""
    window = _Window(stream)
    if list_key is not None:
        if not _seek_list(window, list_key):
            raise DataError(
                f"{path}: no list under the key {list_key!r}; check that the file is the right one and complete."
            )
        yield from _iter_list(window, record_type)
        return
    if record_keys and _has_lists_of_turns(window, record_keys, stream):
        yield from _iter_lines(_Window(stream))
        return
    if record_keys:
        window = _Window(stream)
    if window.peek() == "[":
        number = 0
        for number, parsed in _iter_list(window, record_type):
            yield number, parsed
        if window.peek() == "]":
            window.position += 1
            if window.peek() != "":
                yield number + 1, _ParseError("text follows the end of the list; it is not read")
        return
    if record_keys and window.peek() == "{":
        found = _find_list(window, record_keys)
        stream.seek(0)
        if found is not None:
            yield from _iter_list_in_object(_Window(stream), path, found, record_type, record_keys)
            return
        has_several_lines = _has_several_lines(stream)
        stream.seek(0)
        window = _Window(stream)
        if has_several_lines:
            window.peek()
            yield from _iter_list(window, record_type, closing="")
            return
    yield from _iter_lines(window)


def _has_lists_of_turns(window: _Window, record_keys: Collection[str], stream: IO[str]) -> bool:
    """Return whether every line of the stream, which is then at its beginning, is a list of turns."""
    is_first_line = False
    if window.peek() == "[":
        window.position += 1
        first = window.decode_value()
        if not isinstance(first, _ParseError) and isinstance(first[0], dict):
            keys = first[0].keys()
            if not keys.isdisjoint(_TURN_KEYS) and keys.isdisjoint(record_keys):
                stream.seek(0)
                is_first_line = _is_json(next((line for line in stream if line.strip()), ""))
    stream.seek(0)
    return is_first_line


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def _find_list(window: _Window, record_keys: Collection[str]) -> str | None:
    """Return the key of the first list of records in the object at `window`; None if the object is a record itself.

    A list of records has an object with one of `record_keys` as first element. A record may have such a list too, so a
    short list counts only if neither a key of a record nor another object follows.
    """
    found: str | None = None
    window.position += 1
    while window.peek() == '"':
        name = window.decode_value()
        if isinstance(name, _ParseError) or window.peek() != ":" or name[0] in record_keys:
            return None
        window.position += 1
        if window.peek() != "[":
            if isinstance(window.decode_value(), _ParseError):
                return None
            continue
        window.position += 1
        count = 0
        while window.peek() != "]":
            parsed = window.decode_value()
            if isinstance(parsed, _ParseError):
                return found
            is_record = isinstance(parsed[0], dict) and not parsed[0].keys().isdisjoint(record_keys)
            if found is None and count == 0 and is_record:
                found = str(name[0])
            count += 1
            if found is not None and count >= _LONG_LIST:
                return found
        window.position += 1
    if window.peek() == "}":
        window.position += 1
    return found if window.peek() == "" else None


def _iter_list_in_object(
    window: _Window, path: Path, list_key: str, record_type: type | tuple[type, ...], record_keys: Collection[str]
) -> Iterator[tuple[int, _Parsed]]:
    """Yield the records of the list under a key.

    Raises:
        DataError: after the list, the file has more records, or what belongs to a record.
    """
    _seek_list(window, list_key)
    yield from _iter_list(window, record_type)
    if window.peek() != "]":
        return  # the file is cut off
    # `_find_list` skips the closing bracket as it skips the opening brace of an object.
    name = f"the list of records under {list_key[:60]!r}"
    other = _find_list(window, record_keys)
    if other is not None:
        raise DataError(f"{path}: another list, {other[:60]!r}, follows {name}; save the one to read as a file.")
    if window.peek() != "":
        raise DataError(f"{path}: more text follows {name}; save the list as a file of its own.")


def _has_several_lines(stream: IO[str]) -> bool:
    """Return whether the first object of a stream extends over several lines."""
    first = next((line for line in stream if line.strip()), "")
    if _is_json(first) or first.strip() == "{":
        return not _is_json(first)
    stream.seek(0)
    window = _Window(stream)
    window.peek()
    return not isinstance(window.decode_value(), _ParseError)


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


def _iter_list(
    window: _Window, record_type: type | tuple[type, ...], closing: str = "]"
) -> Iterator[tuple[int, _Parsed]]:
    """Yield the values of a list, or with an empty `closing` those up to the end of the file."""
    window.position += len(closing)
    number = 0
    first_key = "id"
    while True:
        character = window.peek()
        if character == closing:
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
            if has_next or window.text.rstrip().endswith(closing or "}"):
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
        except ValueError:
            yield number, _ParseError(_TOO_MANY_DIGITS)

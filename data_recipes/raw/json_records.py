"""Records out of JSON files of any size, one at a time.

Owns: reading a JSON list, or one object per line, through a window that does not grow with the file; what
happens at a record that does not parse, and at a file that was cut off.
Leaves: what a record means to the readers.

Published annotation files are lists of up to a gigabyte, and some arrive cut off. `json.load` would need many
times that memory and lose everything; here a broken record costs itself, and a cut-off file its end.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_recipes.schema.sample import DataError, Reason, Reject

_CHUNK_CHARACTERS = 1 << 20
_MAX_RECORD_CHARACTERS = 64 << 20
_DECODER = json.JSONDecoder(strict=False)  # a raw line break inside a string harms nobody
_BETWEEN = re.compile(r"[\s,]*")


def iter_records(path: Path, kind: type = dict, under: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each record of a JSON list or a JSON-lines file; the first character tells.

    Args:
        path: the file; UTF-8, with or without byte order mark.
        kind: `dict` or `list`, what each record must be.
        under: the file is one object, and this key of it holds the list; what stands before it is passed over.

    A record that does not parse, or is of another kind, is yielded as a `Reject` in the record's stead, and
    so is the missing end of a file that was cut off. Bytes that are not UTF-8 become lone surrogates, which
    `sample.check` finds; a UTF-16 file is one `Reject`.

    Raises:
        DataError: there is no such file, or it has no list under `under`.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file. The raw folder exists, but its annotations are not in it: "
            "fetch them, or name the right file in `options` of the source's YAML."
        )
    with path.open("rb") as binary:
        head = binary.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        yield (
            path.name,
            Reject(path.name, Reason.WRONG_ENCODING, "the file is UTF-16 or UTF-32, not UTF-8", path.name),
        )
        return
    # `surrogateescape` goes on after a bad byte, so that one record in Latin-1 costs itself only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        window = _Window(stream)
        if under is not None and not _go_to_list(window, under):
            raise DataError(f"{path}: no list under the key {under!r}; is it the right file, and whole?")
        is_list = window.next_character() == "["
        for number, record in _from_list(window, kind) if is_list else _from_lines(window):
            place = f"{path.name}, record {number}"
            if isinstance(record, str):
                reason = Reason.FILE_CUT_OFF if isinstance(record, _CutOff) else Reason.BROKEN_RECORD
                yield place, Reject(place, reason, str(record), place)
            elif not isinstance(record[0], kind):
                detail = f"a JSON {type(record[0]).__name__} where a {kind.__name__} belongs"
                yield place, Reject(place, Reason.BROKEN_RECORD, detail, place)
            else:
                yield place, record[0]


class _CutOff(str):
    """Why there is no value: the file ends inside it."""


# A parsed value in a tuple of one, or the sentence that says why there is none.
_Parsed = tuple[Any] | str


class _Window:
    """The part of a stream that is being looked at: `text[at:]` is not decoded yet."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> bool:
        """Read on, as much again as is waiting (so a long record is not decoded a thousand times)."""
        waiting = len(self.text) - self.at
        chunk = self._stream.read(max(_CHUNK_CHARACTERS, waiting))
        if not chunk:
            self.ended = True
            return False
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return True

    def next_character(self) -> str:
        """The next character that is neither blank nor a comma, without passing it; '' at the end."""
        while True:
            match = _BETWEEN.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def decode(self) -> _Parsed:
        """The value at `at`, and pass it; or say what is wrong, and stay."""
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return (value,)
            except RecursionError:
                return "nested too deeply"
            except json.JSONDecodeError as error:
                # At the window's edge every record looks broken. A string without an end, or an error at the
                # very edge, may be mended by reading on; anything else is broken whatever follows.
                at_edge = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if not at_edge or len(self.text) - self.at > _MAX_RECORD_CHARACTERS:
                    return f"not JSON: {error.msg}, {error.pos - self.at} characters into the record"
                if not self.more():
                    return _CutOff(f"not JSON: {error.msg}, up to the end of the file")

    def lines(self) -> Iterator[str]:
        """What is left, line by line, each with its line break if it has one."""
        *whole, begun = self.text[self.at :].split("\n")
        yield from (line + "\n" for line in whole)
        yield begun + self._stream.readline()
        yield from self._stream

    def skip_to(self, pattern: re.Pattern[str]) -> bool:
        """Pass everything before the next match of `pattern`, beyond the present character."""
        start = self.at + 1
        while True:
            match = pattern.search(self.text, start)
            if match is not None:
                self.at = match.start()
                return True
            # A match may straddle the edge, so the last characters stay; the broken record's first one does
            # not.
            self.at = min(max(self.at + 1, len(self.text) - 256), len(self.text))
            if not self.more():
                return False
            start = 0


def _go_to_list(window: _Window, key: str) -> bool:
    """Stand before the list that the file's one object has under `key`; False where there is none."""
    if window.next_character() != "{":
        return False
    window.at += 1
    while window.next_character() == '"':
        name = window.decode()
        if isinstance(name, str) or window.next_character() != ":":
            return False
        window.at += 1
        if name == (key,):
            return window.next_character() == "["
        window.next_character()
        if isinstance(window.decode(), str):
            return False
    return False


def _from_list(window: _Window, kind: type) -> Iterator[tuple[int, _Parsed]]:
    window.at += 1
    number = 0
    first_key = "id"
    while True:
        character = window.next_character()
        if character == "]":
            return
        number += 1
        if character == "":
            yield number, _CutOff("the file ends without its closing bracket")
            return
        parsed = window.decode()
        if isinstance(parsed, str):
            # Go on at the next thing that begins as the records before did. Objects inside records (the
            # turns) begin with another key, so they are not taken for records.
            begins = r"\[\s*\"" if kind is list else r"\{\s*\"" + re.escape(first_key) + r"\"\s*:"
            goes_on = window.skip_to(re.compile(begins))
            if goes_on or window.text.rstrip().endswith("]"):
                parsed = str(parsed)  # an open quote swallows all that follows; the file is whole
            yield number, parsed
            if not goes_on:
                return
            continue
        yield number, parsed
        if isinstance(parsed[0], dict) and parsed[0]:
            first_key = str(next(iter(parsed[0])))


def _from_lines(window: _Window) -> Iterator[tuple[int, _Parsed]]:
    number = 0
    for line in window.lines():
        number += 1
        if not line.strip():
            continue
        try:
            yield number, (json.loads(line, strict=False),)
        except RecursionError:
            yield number, "nested too deeply"
        except json.JSONDecodeError as error:
            what = f"not JSON: {error.msg}, {error.pos} characters into the line"
            yield number, what if line.endswith("\n") else _CutOff(what)  # whole lines end in a line break

"""Keeps a run alive whose terminal or pipe is gone, so that it can save.

After a terminal is closed, each write to it fails (EIO), as does each write to a pipe whose reader has ended (EPIPE).
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_LOST = (errno.EIO, errno.EPIPE)


class LossTolerantStream:
    """A text stream that writes to the null device once its terminal or pipe is gone.

    Args:
        stream: standard output or standard error; all other attributes are the stream's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text; returns the number of characters."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._replace_lost(error)
            return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._replace_lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _replace_lost(self, error: OSError) -> None:
        """Replaces the file descriptor for the whole process, libraries included."""
        if error.errno not in _LOST:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._stream.flush()  # what was buffered


@contextmanager
def tolerate_lost_output() -> Iterator[None]:
    """Context manager inside of which a lost terminal or pipe raises no error."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LossTolerantStream(stream) for stream in streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams

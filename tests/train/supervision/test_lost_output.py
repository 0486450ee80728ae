"""Tests of output whose reader is gone."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from train.supervision.lost_output import LossTolerantStream, tolerate_lost_output


def test_a_pipe_without_a_reader_is_replaced() -> None:
    """Writes to a pipe whose reader has ended raise nothing, buffered or not, nor does closing the stream."""
    reader, writer = os.pipe()
    stream = LossTolerantStream(os.fdopen(writer, "w"))
    os.close(reader)
    for _ in range(2):
        assert stream.write("a line\n") == 7
        stream.flush()
        print("x" * 100_000, file=stream)
    assert str(Path(f"/proc/self/fd/{writer}").readlink()) == os.devnull
    stream.close()


def test_a_full_disk_is_still_an_error() -> None:
    """Only a lost terminal or pipe is replaced."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        LossTolerantStream(Full()).flush()


def test_streams_are_restored() -> None:
    """The process has its own streams again afterwards; the others' attributes are theirs."""
    before = sys.stdout, sys.stderr
    with tolerate_lost_output():
        stream: object = sys.stderr
        assert isinstance(stream, LossTolerantStream)
        assert stream.encoding == before[1].encoding
        print("to the terminal")
    assert (sys.stdout, sys.stderr) == before

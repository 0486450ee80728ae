"""Runs a program's `main` so that what the terminal or the file system does wrong ends it in one sentence."""

import errno
import os
import select
import sys
from collections.abc import Callable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""Ctrl-C, as in a shell."""
EXIT_BROKEN_PIPE = 141
"""The reader of standard output has ended, as with `| head`: a shell's code for SIGPIPE."""
_DEVICE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def run_program(main: Callable[[], int]) -> int:
    """Returns the exit code of `main`, also where it raises SystemExit.

    Characters that the terminal's encoding lacks are escaped. A closed standard output ends the program silently; an
    error of the file system that `main` has not handled is printed as one sentence.
    """
    _open_standard_streams()
    try:
        try:
            code = main()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        is_reader_gone = isinstance(error, BrokenPipeError) and _is_reader_gone()
        if not is_reader_gone:
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
        _discard_unwritten()
        if is_reader_gone:
            return EXIT_BROKEN_PIPE
        return EXIT_FAILED if error.errno in _DEVICE_ERRORS else EXIT_USAGE


def describe_os_error(error: OSError) -> str:
    """The file and the system's reason as one line; the message of libraries that raise OSError with a text."""
    if error.strerror is None:
        return " ".join(str(error).split())
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _open_standard_streams() -> None:
    """Opens /dev/null for a closed standard stream, whose number the next opened file would get."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor < number:
                os.dup2(descriptor, number)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_reader_gone() -> bool:
    """Whether standard output is a pipe whose reader has ended; a pipe to a worker process can break too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_unwritten() -> None:
    """Discards what standard output could not take, which the interpreter would write again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

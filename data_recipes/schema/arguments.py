"""The command line of programs: a parser that reports a mistake as one sentence, and types that refuse empty values,
and outputs that could not be written, before any work is done."""

import argparse
import math
import os
from pathlib import Path
from typing import NoReturn

from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.console import EXIT_USAGE


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, which prints the sentence of a mistake without the usage, and where to find the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the sentence and ends the program with EXIT_USAGE."""
        sentence = " ".join(message.split())  # a value may have line breaks
        self.exit(EXIT_USAGE, f"error: {sentence}; see `{self.prog} --help`\n")


def add_source_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Adds --mixture or --source, one of which is required, and the folders of their YAML files.

    Args:
        parser: of the program.
        verb: what the program does with the sources, for the help.
    """
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--mixture",
        type=text_argument,
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{verb} every source of configs/mixture/NAME.yaml",
    )
    what.add_argument("--source", nargs="+", default=[], help=f"{verb} these sources of configs/source/*.yaml")
    parser.add_argument(
        "--config-dir",
        type=path_argument,
        metavar="MINE",
        help="a folder of further YAML files (MINE/mixture/*.yaml, MINE/source/*.yaml), which take precedence",
    )
    parser.add_argument(
        "--configs", type=path_argument, default=CONFIG_DIR, help="folder of YAML files, instead of the shipped ones"
    )


def path_argument(text: str) -> Path:
    """A path to read, which may not exist."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def output_file(text: str) -> Path:
    """A file that can be written; its folders are created later."""
    path = path_argument(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
        _check_folder(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path


def output_folder(text: str) -> Path:
    """A folder that can be written or created."""
    path = path_argument(text)
    try:
        _check_folder(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path


def text_argument(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def count_argument(text: str) -> int:
    """A whole number of at least 0, such as a seed."""
    return _whole_number(text, 0)


def positive_argument(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def positive_size(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def _whole_number(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} must be at least {minimum}")
    return value


def _check_folder(path: Path) -> None:
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{nearest} cannot be written by this user")

"""Program that says how a folder or file of raw data can be read.

    python -m data_recipes.guess FOLDER_OR_FILE [--write MINE/source/NAME.yaml [--mixture NAME]] [--raw RAW]

It tries every reader on the first records, shows three samples as they would be read, and writes the YAML of the source
and of a mixture. Exit codes: 0 if a reader fits; 2 if none fits, or for a user error. Neither torch nor DeepSpeed is
needed.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes.guess.description import (
    describe_best,
    describe_look,
    describe_misfit,
    describe_others,
    format_mixture,
    format_source,
)
from data_recipes.guess.folder_look import FolderLook, look_at
from data_recipes.guess.trial import best_of, try_readers
from data_recipes.schema.arguments import ArgumentParser, output_file, path_argument, text_argument
from data_recipes.schema.console import EXIT_USAGE, run_program
from data_recipes.schema.sample import DataError
from data_recipes.store.durable import write_text_atomically


@dataclass(frozen=True)
class Arguments:
    """The parsed command line; the fields are its options."""

    data: Path
    write: Path | None
    mixture: str | None
    raw: Path | None


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line; argparse exits with code 2 on invalid arguments."""
    parser = ArgumentParser(
        prog="python -m data_recipes.guess", description="Say which reader and options fit a folder or file."
    )
    parser.add_argument("data", type=path_argument, help="a raw folder, or one file in it")
    parser.add_argument("--write", type=output_file, metavar="MINE/source/NAME.yaml", help="write the source's YAML")
    parser.add_argument("--mixture", type=text_argument, metavar="NAME", help="also write MINE/mixture/NAME.yaml")
    parser.add_argument(
        "--raw",
        type=path_argument,
        help="the folder of raw folders, to which `root` is written relative (default: an absolute path)",
    )
    return Arguments(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse_arguments(argv)
    try:
        return guess(arguments)
    except DataError as error:
        print(f"guess: {error}", file=sys.stderr)
        return EXIT_USAGE


def guess(arguments: Arguments) -> int:
    """Print which reader fits, and write the YAML files.

    Raises:
        DataError: the data does not exist, or a file cannot be written where it should.
        OSError: the data cannot be read.
    """
    outputs = _list_outputs(arguments)
    look = _look(arguments.data)
    root = _format_root(look.root, arguments.raw)
    trials = try_readers(look, published=arguments.data.is_dir())
    best = best_of(trials)
    print(describe_look(look))
    print()
    if best is not None:
        print(describe_best(best))
        print()
    others = describe_others([trial for trial in trials if trial is not best])
    if others:
        print(f"{others}\n")
    if best is None:
        print(f"guess: no reader fits {arguments.data}. {describe_misfit(look)}", file=sys.stderr)
        return EXIT_USAGE
    texts = [format_source(best, root)]
    if arguments.write is None:
        print(f"# MINE/source/NAME.yaml\n{texts[0]}", end="")
        return 0
    if arguments.mixture is not None:
        texts.append(format_mixture(arguments.mixture, arguments.write.stem))
    for path, text in zip(outputs, texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, text)
        print(f"written: {path}")
    what = f"--mixture {arguments.mixture}" if arguments.mixture else f"--source {arguments.write.stem}"
    folders = f"--config-dir {arguments.write.parent.parent} --raw {arguments.raw or 'RAW'} --stores data/stores"
    print(f"next: python -m data_recipes.prepare {what} {folders}")
    return 0


def _list_outputs(arguments: Arguments) -> list[Path]:
    """Return the files to write: the source's YAML, and the mixture's."""
    if arguments.write is None:
        if arguments.mixture is not None:
            raise DataError(f"--mixture {arguments.mixture}: its source is missing; add --write MINE/source/NAME.yaml.")
        return []
    source = arguments.write
    if source.parent.name != "source" or source.suffix != ".yaml":
        raise DataError(
            f"--write {source}: the preparation reads sources from .yaml files in a folder named source; write to "
            f"{source.parent / 'source' / source.stem}.yaml."
        )
    outputs = [source]
    if arguments.mixture is not None:
        if not re.fullmatch(r"[\w.-]+", arguments.mixture):
            raise DataError(f"--mixture {arguments.mixture}: a name has letters, digits, `_`, `-` and `.` only.")
        outputs.append(source.parent.with_name("mixture") / f"{arguments.mixture}.yaml")
    for path in outputs:
        if path.exists():
            raise DataError(f"{path} exists; choose another name, or remove it.")
    return outputs


def _look(data: Path) -> FolderLook:
    """Look at a folder, or at the folder of a file with this file only."""
    if not data.exists():
        raise DataError(f"{data}: there is no such folder or file.")
    if data.is_dir():
        return look_at(data)
    look = look_at(data.parent)
    look.keep_only(data.name)
    return look


def _format_root(root: Path, raw: Path | None) -> str:
    """The raw folder as the source is to name it: relative to `--raw`, or absolute."""
    absolute = Path(os.path.abspath(root))  # noqa: PTH100  (a link to a folder stays a link)
    if raw is None:
        return str(absolute)
    parent = Path(os.path.abspath(raw))  # noqa: PTH100
    if not absolute.is_relative_to(parent):
        raise DataError(f"--raw {raw}: {root} is not below it; leave the option out for an absolute path.")
    return absolute.relative_to(parent).as_posix()


if __name__ == "__main__":
    sys.exit(run_program(main))

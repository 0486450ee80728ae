"""Program that fetches the raw files of sources from their publishers.

    python -m data_recipes.fetch --mixture NAME... --raw DIR [--dry-run] [--locked FILE] [--mirror DIR]

Files on the Hugging Face hub are fetched by its client, the others by plain HTTP. Complete files are not fetched again,
and an interrupted fetch is continued by the same command. Every file is checked against the published size and digest
and recorded in a lock file. Nothing is unpacked.

Exit codes: 0 success; 1 the network, a publisher or the disk failed, or a file is not the expected one; 2 user error,
or files that must be fetched by hand are missing; 130 interrupted by Ctrl-C.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from data_recipes.fetch.byte_progress import ByteProgress
from data_recipes.fetch.fetch_plan import Plan, make_plan
from data_recipes.fetch.lock_file import LockFile
from data_recipes.fetch.plan_report import check_space, describe_missing, describe_plan
from data_recipes.fetch.remote_file import FetchError
from data_recipes.fetch.transfer import Transfer, count_bytes_to_fetch, run_parallel
from data_recipes.mixture.mixture import list_sources, read_mixture
from data_recipes.schema.arguments import (
    ArgumentParser,
    add_source_arguments,
    output_file,
    output_folder,
    path_argument,
    positive_argument,
)
from data_recipes.schema.config_dir import list_config_folders
from data_recipes.schema.console import run_program
from data_recipes.schema.denied_files import describe_error
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_source
from data_recipes.store.durable import exclusive_lock

LOCK_NAME = "fetch.lock.json"


@dataclass(frozen=True)
class Arguments:
    """The parsed command line; the fields are its options."""

    mixture: list[str]
    source: list[str]
    raw: Path
    dry_run: bool
    lock: Path | None
    locked: Path | None
    mirror: Path | None
    threads: int
    config_dir: Path | None
    configs: Path


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line; argparse exits with code 2 on invalid arguments."""
    parser = ArgumentParser(
        prog="python -m data_recipes.fetch",
        description="Fetch the raw files of sources from their publishers.",
        epilog="Models are fetched by `python -m train.fetch NAME`.",
    )
    add_source_arguments(parser, "fetch")
    parser.add_argument("--raw", type=output_folder, required=True, help="folder of the raw folders")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print what would be fetched, how much, and under which licence"
    )
    parser.add_argument(
        "--lock", type=output_file, metavar="FILE", help=f"file of revisions, sizes and sha256 (RAW/{LOCK_NAME})"
    )
    parser.add_argument(
        "--locked", type=path_argument, metavar="FILE", help="fetch exactly what this lock file records, or fail"
    )
    parser.add_argument(
        "--mirror",
        type=path_argument,
        metavar="DIR",
        help="a folder with copies, in which each file is looked up first",
    )
    parser.add_argument("--threads", type=positive_argument, default=4, help="files at the same time (%(default)s)")
    return Arguments(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse_arguments(argv)
    continue_hint = "Complete files are kept; run the same command again to continue"
    try:
        return fetch(arguments)
    except DataError as error:
        return _fail(2, str(error))
    except FetchError as error:
        return _fail(1, str(error))
    except PermissionError as error:
        return _fail(2, f"{describe_error(error)}. {continue_hint} after resolving the error.")
    except OSError as error:
        return _fail(1, f"{error}. {continue_hint} after resolving the error.")
    except KeyboardInterrupt:
        return _fail(130, f"interrupted. {continue_hint}.")


def fetch(arguments: Arguments) -> int:
    """Fetch the files of all requested sources and return the exit code.

    Raises:
        DataError: user error in the configuration, the command line or at a publisher's page.
        FetchError: the network or a publisher failed.
        OSError: the disk is full or failing.
    """
    if arguments.mirror is not None and not arguments.mirror.is_dir():
        raise DataError(f"--mirror: there is no folder {arguments.mirror}.")
    configs = list_config_folders(arguments.configs, arguments.config_dir)
    mixtures = [read_mixture(configs, name) for name in arguments.mixture]
    names = list(dict.fromkeys(arguments.source)) or list_sources(mixtures)
    sources = [read_source(configs, name) for name in names]
    is_enforced = arguments.locked is not None
    lock = LockFile.read(arguments.lock or arguments.raw / LOCK_NAME)
    expected = LockFile.read(arguments.locked, required=True) if arguments.locked is not None else lock
    with requests.Session() as session:
        plan = make_plan(sources, arguments.raw, expected, session, is_enforced=is_enforced)
        print(describe_plan(plan, arguments.raw), flush=True)
        if not arguments.dry_run:
            check_space(plan, arguments.raw)
            with exclusive_lock(lock.path, "--lock"):
                _transfer(plan, lock, session, arguments)
    return _report_rest(plan, arguments)


def _transfer(plan: Plan, lock: LockFile, session: requests.Session, arguments: Arguments) -> None:
    to_fetch, num_unknown = count_bytes_to_fetch(plan.files, arguments.raw)
    with ByteProgress((arguments.mixture or arguments.source)[0], None if num_unknown else to_fetch) as progress:
        transfer = Transfer(
            arguments.raw,
            lock,
            session,
            progress,
            mirror=arguments.mirror,
            expected=arguments.locked,
        )
        run_parallel([partial(transfer.fetch, file) for file in plan.files], arguments.threads, progress)
        transfer.clean_up()
    if plan.files:
        print(f"complete: {len(plan.files)} files; recorded in {lock.path}", flush=True)


def _report_rest(plan: Plan, arguments: Arguments) -> int:
    """Print what could not be fetched and what must be fetched by hand; return the exit code."""
    refusals = [item.refusal for item in plan.items if item.refusal]
    if arguments.dry_run:  # the description has said it
        is_failed = any(isinstance(error, FetchError) for error in plan.problems)
        return 1 if is_failed else 2 if plan.problems else 0
    for sentence in (*map(str, plan.problems), *refusals):
        _fail(2, sentence)
    missing = describe_missing(plan)
    if missing:
        _fail(2, missing)
    if any(isinstance(error, FetchError) for error in plan.problems):
        return 1
    return 2 if plan.problems or refusals or missing else 0


def _fail(code: int, message: str) -> int:
    print(f"fetch: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_program(main))

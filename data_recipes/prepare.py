"""The program that turns raw files into stores.

    python -m data_recipes.prepare --mixture NAME --raw DIR --stores DIR [--workers N] [--strict]

Owns: the command line, which sources need work, progress, the tables at the end, exit codes.
Leaves: the making of one store to `store.py`, raw layouts to `readers/`, choosing samples to `mixture.py`.

Exit codes: 0 done; 1 the data or the machine failed (too many bad records, a full disk); 2 the user's
mistake, in one sentence; 130 stopped by Ctrl-C. Needs neither torch nor deepspeed.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_recipes.mixture import Mixture, read_mixture
from data_recipes.pictures import PicturePool
from data_recipes.sample import DataError
from data_recipes.source import NOT_STATED, SourceInfo, raw_digest, read_source
from data_recipes.store import read_manifest, remove_leftovers, write_store
from data_recipes.store_tables import RejectedError


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    mixture: str | None
    source: list[str]
    raw: Path
    stores: Path
    workers: int
    strict: bool
    configs: Path


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line; argparse itself leaves with 2 on what it does not understand."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes.prepare", description="raw files → stores")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mixture", help="prepare every source of configs/mixture/NAME.yaml")
    what.add_argument("--source", nargs="+", default=[], help="prepare these of configs/source/*.yaml")
    parser.add_argument("--raw", type=Path, required=True, help="the folder that holds the raw folders")
    parser.add_argument("--stores", type=Path, required=True, help="where the stores go, one folder a source")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode pictures (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="the YAML folder (%(default)s)")
    arguments = Arguments(**vars(parser.parse_args(argv)))
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1 is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    arguments = parse(argv)
    try:
        prepare(arguments)
    except DataError as error:
        return _fail(2, str(error))
    except RejectedError as error:
        return _fail(1, str(error))
    except BrokenProcessPool:
        return _fail(
            1,
            "a process that decodes pictures was killed, most likely for want of memory. Try fewer --workers.",
        )
    except OSError as error:
        return _fail(1, f"{error}. Finished stores are whole; start again once this is mended.")
    except KeyboardInterrupt:
        return _fail(130, "stopped. Finished stores are whole; start again to make the others.")
    return 0


def prepare(arguments: Arguments) -> None:
    """Make every store that is asked for and is not there yet, then print what came of it.

    All raw folders and readers are looked for before the first is read: a run of hours should not end on a
    wrong name at its last source.
    """
    if not arguments.configs.is_dir():
        raise DataError(f"no folder {arguments.configs}: start in the checkout, or name it with --configs.")
    config = read_mixture(arguments.configs, arguments.mixture) if arguments.mixture else None
    names = sorted({*config.sources, *config.exclude}) if config else list(dict.fromkeys(arguments.source))
    sources = [read_source(arguments.configs, name) for name in names]
    work = [(source, _inputs_to_work_on(source, arguments)) for source in sources]
    # Before any other thread starts: the pool forks. One pool serves all sources.
    num_workers = arguments.workers if any(inputs for _, inputs in work) else 1
    with PicturePool(num_workers) as pool:
        for source, inputs in work:
            if inputs is not None:
                _make_store(source, inputs, arguments, pool)
    if config is None:
        _print_sources(sources, arguments.stores)
    else:
        _print_mixture(Mixture.open(config, arguments.stores), arguments.stores)


def _inputs_to_work_on(source: SourceInfo, arguments: Arguments) -> dict[str, str] | None:
    """The digests of a source's inputs if its store must be made; None, and one line, if it stands."""
    path = arguments.stores / source.name
    manifest = read_manifest(path)
    kept = manifest["inputs"] if manifest else {}
    recipe = source.recipe_digest()
    if kept.get("recipe") == recipe and not (arguments.raw / source.root).is_dir():
        print(f"{source.name}: already prepared (its raw folder is gone, its store is kept)")
        return None
    source.samples(arguments.raw)  # a generator: nothing is read yet, but reader, options and folder are checked
    inputs = {"recipe": recipe, "raw": raw_digest(source.raw_folder(arguments.raw), arguments.stores)}
    if kept == inputs:
        assert manifest is not None
        print(f"{source.name}: already prepared, {manifest['num_samples']:,} samples")
        return None
    return inputs


def _make_store(source: SourceInfo, inputs: dict[str, str], arguments: Arguments, pool: PicturePool) -> None:
    path = arguments.stores / source.name
    arguments.stores.mkdir(parents=True, exist_ok=True)
    with _only_one(path):
        if remove_leftovers(path):
            print(f"{source.name}: removed what an interrupted start had left")
        with tqdm(total=source.expected_count, desc=source.name, unit=" records", disable=None) as bar:
            report = write_store(
                path,
                source,
                source.samples(arguments.raw),
                pool=pool,
                inputs=inputs,
                strict=arguments.strict,
                on_record=bar.update,
            )
    left_out = sum(report.rejects.values())
    print(f"{source.name}: {report.num_samples:,} samples, {report.num_pictures:,} pictures, {left_out:,} left out")


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Two programs that write one store would remove each other's unfinished folder."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another prepare is writing {path}; wait for it, or use another --stores.") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _print_sources(sources: Sequence[SourceInfo], stores: Path) -> None:
    rows = []
    for source in sources:
        manifest = read_manifest(stores / source.name) or {}
        wanted = source.expected_count
        rows.append(
            [
                source.name,
                NOT_STATED if wanted is None else f"{wanted:,}",
                f"{manifest['num_samples']:,}",
                _reasons(manifest["rejects"]),
                _short(source.licence),
            ]
        )
    _print_table(["source", "expected", "found", "left out", "licence"], rows)


def _print_mixture(mixture: Mixture, stores: Path) -> None:
    rows = [
        [
            row["source"],
            "all" if row["wanted"] is None else f"{row['wanted']:,}",
            f"{row['found']:,}",
            f"{row['held_out']:,}",
            f"{row['excluded']:,}",
            f"{row['used']:,}",
            f"{row['share']:.1%}",
            _reasons(row["rejects"]),
            _short(row["licence"]),
        ]
        for row in mixture.table()
    ]
    head = ["source", "wanted", "found", "held out", "excluded", "used", "share", "left out", "licence"]
    _print_table(head, rows)
    print(f"{mixture.config.name}: {mixture.num_samples:,} samples, fingerprint {mixture.fingerprint}")
    if any(row["rejects"] for row in mixture.table()):
        print(f"Each record left out is listed in {stores}/SOURCE/quarantine.jsonl.")


def _reasons(rejects: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in rejects.items()) or "none"


def _short(licence: str, limit: int = 40) -> str:
    """What fits into a table; the whole is in the manifest."""
    text = licence or NOT_STATED
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _fail(code: int, sentence: str) -> int:
    print(f"prepare: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

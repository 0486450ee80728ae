"""Runs `prepare` as a user does, on folders with raw files and configurations."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.slices import make_slice_writer
from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.sample import Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import LoadedRecord, NumberedStream, Slice, StreamPosition
from data_recipes.writing.writer import write_records
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import write_file

ROOT = Path(__file__).resolve().parents[3]
SOURCES: dict[str, dict[str, Any]] = {
    "talk": {
        "reader": "llava_json",
        "root": "llava",
        "options": {"annotations": "mix.json", "image_root": "images"},
    },
    "charts": {"reader": "chartqa", "root": "chartqa", "expected_count": 3, "licence": "GPL-3.0"},
    "pages": {"reader": "synthdog", "root": "pages"},
    "shapes": {"reader": "easy_vqa", "root": "shapes", "options": {"max_questions": 2}},
}

# Waits in the middle of its stream, so that a test can act at that moment.
SLOW_READER = '''
"""Reads like llava_json, but waits at record 60 of the first run while the file `wait` exists."""
import time
from data_recipes.readers import llava_json

def samples(root):
    raw = root.parent
    for number, sample in enumerate(llava_json.samples(root, "mix.json", "images")):
        is_writing = (raw.parent / "stores" / "slow.partial").exists()
        if number == 60 and is_writing and not (raw / "reached").exists():
            (raw / "reached").touch()
            while (raw / "wait").exists():
                time.sleep(0.02)
        yield sample
'''


def make_workspace(folder: Path) -> Path:
    """Create configs/ and raw/ with four sources and the mixture `all` of them."""
    for name, source in SOURCES.items():
        write_file(folder / "configs" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    shares: dict[str, Any] = {name: {} for name in SOURCES} | {"shapes": {"count": 2, "holdout": 1}}
    write_mixture(folder, "all", shares)
    raw_folders.write_llava(folder / "raw" / "llava")
    raw_folders.write_chartqa(folder / "raw" / "chartqa")
    raw_folders.write_synthdog(folder / "raw" / "pages")
    raw_folders.write_easy_vqa(folder / "raw" / "shapes")
    return folder


def make_slow_workspace(folder: Path, num_samples: int = 100) -> Path:
    """Create one source, `slow`, whose reader waits after 60 records while `raw/wait` exists."""
    raw_folders.write_llava(folder / "raw" / "llava", num_samples)
    write_file(folder / "mine" / "slow_reader.py", SLOW_READER)
    write_file(folder / "configs/source/slow.yaml", yaml.safe_dump({"reader": "mine.slow_reader", "root": "llava"}))
    return folder


def write_mixture(folder: Path, name: str, sources: dict[str, Any], **more: object) -> None:
    """Write a mixture's YAML."""
    mixture = {"name": name, "seed": 0, "sources": sources, **more}
    write_file(folder / "configs" / "mixture" / f"{name}.yaml", yaml.safe_dump(mixture))


def change(workspace: Path, source: str, **values: object) -> None:
    """Change keys of a source's YAML."""
    write_file(workspace / "configs" / "source" / f"{source}.yaml", yaml.safe_dump(SOURCES[source] | values))


def arguments(workspace: Path, *more: str, stores: str = "stores") -> list[str]:
    """Return the command line for a workspace."""
    folders = {"--raw": workspace / "raw", "--stores": workspace / stores, "--configs": workspace / "configs"}
    line = [*more, *(word for pair in folders.items() for word in map(str, pair))]
    return line if "--workers" in more else [*line, "--workers", "1"]


class BackgroundProgram:
    """The program in its own process group. It is forked, because a new Python process takes seconds to import."""

    def __init__(self, workspace: Path, line: list[str], checkpoint: int) -> None:
        self._output_files = [workspace / f".output_{time.monotonic_ns()}_{name}" for name in ("out", "err")]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
                sys.path.insert(0, str(workspace))
                store_tables.CHECKPOINT_RECORDS = checkpoint
                with self._output_files[0].open("w") as sys.stdout, self._output_files[1].open("w") as sys.stderr:
                    code = prepare.main(line)
            finally:
                os._exit(code)

    def is_running(self) -> bool:
        """Return whether the program is running."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> tuple[int, str, str]:
        """Wait up to two minutes for the end; return exit code (negative for a signal), stdout and stderr."""
        deadline = time.monotonic() + 120
        while self.is_running():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(
                    "the program did not end: " + " | ".join(path.read_text() for path in self._output_files)
                )
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (path.read_text() for path in self._output_files)
        return code, out, err


@contextmanager
def started(
    workspace: Path, *more: str, stores: str = "stores", checkpoint: int = 100_000
) -> Iterator[BackgroundProgram]:
    """Run the program in the background; kill it at the end. `checkpoint` is the number of records per checkpoint."""
    program = BackgroundProgram(workspace, arguments(workspace, *more, stores=stores), checkpoint)
    try:
        yield program
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def run(workspace: Path, *more: str, stores: str = "stores", checkpoint: int = 100_000) -> tuple[int, str, str]:
    """Run the program to its end; return exit code, stdout and stderr."""
    with started(workspace, *more, stores=stores, checkpoint=checkpoint) as program:
        return program.wait()


def run_in_new_process(workspace: Path, *more: str, seed: str = "0") -> tuple[int, str, str]:
    """Run the program in a new Python process with this hash seed; return exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "data_recipes.prepare", *arguments(workspace, *more)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def failure(workspace: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Run the program; return its exit code and its message, which must be a single line."""
    code = prepare.main(arguments(workspace, *more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("prepare: ")
    return code, lines[0]


def write_slice(
    store: Path, part: Slice, source: SourceInfo, items: Iterable[Sample | Reject], inputs: dict[str, str]
) -> None:
    """Write one slice of `store` from records in memory."""

    def records(starts: Mapping[str, StreamPosition]) -> Iterator[tuple[str, StreamPosition, LoadedRecord | None]]:
        return NumberedStream(((None, item) for item in items), Path(), starts, part).load(ImagePool())

    write_records([make_slice_writer(store, part, source, inputs)], records)


def contents(store: Path) -> dict[str, bytes]:
    """Read every file of a store except `inputs.json`, which has the modification times of the raw files."""
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name != "inputs.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}

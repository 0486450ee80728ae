"""The program as a user meets it: a folder with raw files and configs, and command lines on them.

Owns what the tests of `prepare`, of slices and of interrupted starts share; what they prove is theirs.
"""

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
from data_recipes.prepare.slices import slice_writer
from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import Loaded, Mark, NumberedStream, Slice
from data_recipes.writing.writer import write_records
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import put

ROOT = Path(__file__).resolve().parents[3]
SOURCES: dict[str, dict[str, Any]] = {
    "talk": {
        "reader": "llava_json",
        "root": "llava",
        "options": {"annotations": "mix.json", "image_root": "images"},
    },
    "charts": {"reader": "chartqa", "root": "chartqa", "expected_count": 4, "licence": "GPL-3.0"},
    "pages": {"reader": "synthdog", "root": "pages"},
    "shapes": {"reader": "easy_vqa", "root": "shapes", "options": {"max_questions": 2}},
}

# Waits in the middle of its stream until it may go on, so that a test can do something at that moment.
SLOW_READER = '''
"""Reads like llava_json; the first to be at record 60 of a store that is begun waits while there is a file `wait`."""
import time
from data_recipes.readers import llava_json

def samples(root):
    raw = root.parent
    for number, sample in enumerate(llava_json.samples(root, "mix.json", "images")):
        begun = (raw.parent / "stores" / "slow.partial").exists()
        if number == 60 and begun and not (raw / "reached").exists():
            (raw / "reached").touch()
            while (raw / "wait").exists():
                time.sleep(0.02)
        yield sample
'''


def make_place(folder: Path) -> Path:
    """A folder with configs/ and raw/ for four sources and the mixture `all` of them."""
    for name, source in SOURCES.items():
        put(folder / "configs" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    shares: dict[str, Any] = {name: {} for name in SOURCES} | {"shapes": {"count": 2, "holdout": 1}}
    put_mixture(folder, "all", shares)
    raw_folders.write_llava(folder / "raw" / "llava")
    raw_folders.write_chartqa(folder / "raw" / "chartqa")
    raw_folders.write_synthdog(folder / "raw" / "pages")
    raw_folders.write_easy_vqa(folder / "raw" / "shapes")
    return folder


def make_slow_place(folder: Path, num_samples: int = 100) -> Path:
    """A folder with one source, `slow`, whose reader waits after 60 records while there is `raw/wait`."""
    raw_folders.write_llava(folder / "raw" / "llava", num_samples)
    put(folder / "mine" / "slow_reader.py", SLOW_READER)
    put(folder / "configs/source/slow.yaml", yaml.safe_dump({"reader": "mine.slow_reader", "root": "llava"}))
    return folder


def put_mixture(folder: Path, name: str, sources: dict[str, Any], **more: object) -> None:
    """Write a mixture's YAML."""
    mixture = {"name": name, "seed": 0, "sources": sources, **more}
    put(folder / "configs" / "mixture" / f"{name}.yaml", yaml.safe_dump(mixture))


def change(place: Path, source: str, **values: object) -> None:
    """Change keys of a source's YAML."""
    put(place / "configs" / "source" / f"{source}.yaml", yaml.safe_dump(SOURCES[source] | values))


def arguments(place: Path, *more: str, stores: str = "stores") -> list[str]:
    """The command line for `place`."""
    folders = {"--raw": place / "raw", "--stores": place / stores, "--configs": place / "configs"}
    line = [*more, *(word for pair in folders.items() for word in map(str, pair))]
    return line if "--workers" in more else [*line, "--workers", "1"]


class Started:
    """The program in a process and process group of its own: a fork, since a new Python takes seconds to import."""

    def __init__(self, place: Path, line: list[str], checkpoint: int) -> None:
        self._said = [place / f".said_{time.monotonic_ns()}_{name}" for name in ("out", "err")]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
                sys.path.insert(0, str(place))
                store_tables.CHECKPOINT_RECORDS = checkpoint
                with self._said[0].open("w") as sys.stdout, self._said[1].open("w") as sys.stderr:
                    code = prepare.main(line)
            finally:
                os._exit(code)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> tuple[int, str, str]:
        """Wait for it, two minutes at most; exit code (a signal's number below zero), stdout, stderr."""
        deadline = time.monotonic() + 120
        while self.is_running():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError("the program did not end: " + " | ".join(said.read_text() for said in self._said))
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (said.read_text() for said in self._said)
        return code, out, err


@contextmanager
def started(place: Path, *more: str, stores: str = "stores", checkpoint: int = 100_000) -> Iterator[Started]:
    """The program running; what is left of it at the end is killed. `checkpoint`: records from one to the next."""
    program = Started(place, arguments(place, *more, stores=stores), checkpoint)
    try:
        yield program
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def run(place: Path, *more: str, stores: str = "stores", checkpoint: int = 100_000) -> tuple[int, str, str]:
    """The program from start to end: exit code, stdout, stderr."""
    with started(place, *more, stores=stores, checkpoint=checkpoint) as program:
        return program.end()


def run_anew(place: Path, *more: str, seed: str = "0") -> tuple[int, str, str]:
    """The same as a user starts it, in a new Python with this hash seed."""
    done = subprocess.run(
        [sys.executable, "-m", "data_recipes.prepare", *arguments(place, *more)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def failure(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and the sentence on stderr, which must be one."""
    code = prepare.main(arguments(place, *more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("prepare: ")
    return code, lines[0]


def write_slice(
    store: Path, part: Slice, source: SourceInfo, items: Iterable[Sample | Reject], inputs: dict[str, str]
) -> None:
    """One slice of `store`, of a stream in memory."""

    def records(starts: Mapping[str, Mark]) -> Iterator[tuple[str, Mark, Loaded | None]]:
        return NumberedStream(((None, item) for item in items), Path(), starts, part).load(PicturePool())

    write_records([slice_writer(store, part, source, inputs)], records)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store but `inputs.json`, which has the times of the raw files."""
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name != "inputs.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}

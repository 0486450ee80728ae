"""Tests of the estimated disk space and of the progress report."""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from data_recipes.prepare.disk_space import SpaceNeed, check_space, estimate_space
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.progress import Progress, format_bytes
from data_recipes.writing.sample_stream import Slice, TaggedRecord
from data_recipes.writing.writer import write_store
from tests.data_recipes.prepare.program import write_slice
from tests.data_recipes.raw_folders import make_image, make_sample, write_file

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)


def records(folder: Path) -> Iterator[Sample | Reject]:
    """Yield 400 records with 200 images of 12 KB, each used twice, with missing images and invalid records."""
    for number in range(400):
        shown = folder / f"{number % 200}.png"
        if number < 200 and number % 50 != 49:
            write_file(shown, make_image(number, 60, 70))
        yield make_sample(str(number), shown, answer="word " * 20)
    yield from (Reject(f"r{n}", Reason.BROKEN_RECORD, "x") for n in range(5))


def tag_records(items: Iterable[Sample | Reject]) -> Iterator[TaggedRecord]:
    """Build the stream of a single source."""
    return ((None, item) for item in items)


def size(folder: Path) -> int:
    """Return the total size of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_estimate_agrees_with_store(tmp_path: Path) -> None:
    """The estimate is at most a tenth above the size of the store, and needs no image to be opened."""
    items = list(records(tmp_path / "raw"))
    write_store(tmp_path / "s", SOURCE, items)
    [need] = estimate_space({"s": "s"}, tag_records(items), raw_bytes=int)
    taken = size(tmp_path / "s")
    assert need.num_records == 405
    assert taken <= need.num_bytes - 2**20 <= 1.1 * taken
    [part] = estimate_space({"s": "s 2/4"}, tag_records(items), int, Slice(2, 4))
    assert part.name == "s 2/4"
    write_slice(tmp_path / "t", Slice(2, 4), SOURCE, items, {"recipe": "r"})
    taken = size(tmp_path / "t.slices")
    assert part.num_records == 101
    assert taken <= part.num_bytes - 2**20 <= 1.2 * taken


def test_estimate_of_embedded_images() -> None:
    """The size of the raw folder is used, and only the first record is read."""
    read = []

    def parquet() -> Iterator[Sample]:
        for number in range(100):
            read.append(number)
            yield make_sample(str(number), make_image(1))

    single, pair = {"s": "s"}, {"s": "s", "t": "t"}
    assert estimate_space(single, tag_records(parquet()), lambda: 5000) == [SpaceNeed("s", None, 5000 + 2**20)]
    assert estimate_space(single, tag_records(parquet()), lambda: 5000, Slice(1, 5)) == [
        SpaceNeed("s", None, 1000 + 2**20)
    ]
    assert estimate_space(pair, tag_records(parquet()), lambda: 5000) == [
        SpaceNeed(name, None, 2500 + 2**20) for name in "st"
    ]
    assert read == [0, 0, 0]


def test_free_space_of_output_folder(tmp_path: Path) -> None:
    """The folder need not exist; the message has the needed and the free space."""
    line = check_space([SpaceNeed("a", 1, 1000), SpaceNeed("b", 1, 5 * 2**30)], tmp_path / "not" / "yet")
    assert line.startswith("space: about 5.0 GiB needed (a 1000 B, b 5.0 GiB), ")
    assert line.endswith(f"free in {tmp_path}")
    with pytest.raises(
        DataError, match=r"1024.0 TiB needed .* which is not enough. Free some space, or use another --stores"
    ):
        check_space([SpaceNeed("a", 1, 2**50)], tmp_path)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**50, "1024.0 TiB")]
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    """Sizes have binary units."""
    assert format_bytes(num_bytes) == text


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets lines with counts, rates, rejected records and the remaining time."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("talk", 2000) as progress:
        progress.start(400)
        for number in range(960):
            clock[0] += 0.05
            progress.update(2**19, number % 100 == 0)
    output = capsys.readouterr()
    assert output.out == "talk: resuming after 400 records of the interrupted run\n"
    lines = output.err.splitlines()
    assert lines == ["talk: 1,008 of 2,000 records (50 %), 20 records/s, 10.0 MiB/s, 7 rejected, 1 min left"]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets a progress bar with the same values."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("talk", 128) as progress:
        progress.start(0)
        for _ in range(128):
            progress.update(2**20, False)
    assert "talk: 100%" in terminal.getvalue()
    assert "iB/s, 0 rejected" in terminal.getvalue()

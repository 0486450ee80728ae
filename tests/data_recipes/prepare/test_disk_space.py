"""Owns the proofs about the room a store needs, and about telling how far it has come."""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from data_recipes.prepare.disk_space import Need, check_space, survey
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.progress import Progress, readable
from data_recipes.writing.sample_stream import Named, Slice
from data_recipes.writing.writer import write_store
from tests.data_recipes.prepare.program import write_slice
from tests.data_recipes.raw_folders import conversation, picture, put

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)


def records(folder: Path) -> Iterator[Sample | Reject]:
    """400 records on 200 pictures of 12 KB, each shown twice, some missing, some records broken."""
    for number in range(400):
        shown = folder / f"{number % 200}.png"
        if number < 200 and number % 50 != 49:
            put(shown, picture(number, 60, 70))
        yield conversation(str(number), shown, answer="word " * 20)
    yield from (Reject(f"r{n}", Reason.BROKEN_RECORD, "x") for n in range(5))


def named(items: Iterable[Sample | Reject]) -> Iterator[Named]:
    """A stream of one source."""
    return ((None, item) for item in items)


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_survey_is_what_the_store_takes(tmp_path: Path) -> None:
    """Within a tenth above it, no picture opened: each file once, as a store keeps it."""
    items = list(records(tmp_path / "raw"))
    write_store(tmp_path / "s", SOURCE, items)
    [need] = survey({"s": "s"}, named(items), raw_bytes=int)
    taken = size(tmp_path / "s")
    assert need.num_records == 405
    assert taken <= need.num_bytes - 2**20 <= 1.1 * taken
    [part] = survey({"s": "s 2/4"}, named(items), int, Slice(2, 4))
    assert part.name == "s 2/4"
    write_slice(tmp_path / "t", Slice(2, 4), SOURCE, items, {"recipe": "r"})
    taken = size(tmp_path / "t.slices")
    assert part.num_records == 101
    assert taken <= part.num_bytes - 2**20 <= 1.2 * taken


def test_pictures_inside_raw_files_are_not_read_for_it() -> None:
    """The raw folder's size stands for them, and the survey ends at the first."""
    asked = []

    def parquet() -> Iterator[Sample]:
        for number in range(100):
            asked.append(number)
            yield conversation(str(number), picture(1))

    one, two = {"s": "s"}, {"s": "s", "t": "t"}
    assert survey(one, named(parquet()), lambda: 5000) == [Need("s", None, 5000 + 2**20)]
    assert survey(one, named(parquet()), lambda: 5000, Slice(1, 5)) == [Need("s", None, 1000 + 2**20)]
    assert survey(two, named(parquet()), lambda: 5000) == [Need(name, None, 2500 + 2**20) for name in "st"]
    assert asked == [0, 0, 0]


def test_room_is_compared_where_the_stores_will_be(tmp_path: Path) -> None:
    """The folder need not be there yet; both numbers are told, source by source."""
    line = check_space([Need("a", 1, 1000), Need("b", 1, 5 * 2**30)], tmp_path / "not" / "yet")
    assert line.startswith("space: about 5.0 GiB needed (a 1000 B, b 5.0 GiB), ")
    assert line.endswith(f"free in {tmp_path}")
    with pytest.raises(DataError, match=r"1024.0 TiB needed .* which is not enough. Make room, or name another place"):
        check_space([Need("a", 1, 2**50)], tmp_path)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**50, "1024.0 TiB")]
)
def test_readable(num_bytes: int, text: str) -> None:
    """As a person reads it."""
    assert readable(num_bytes) == text


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets a line now and then: how many of how many, both rates, what was left out, how long it takes."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("talk", 2000) as told:
        told.begin(400)
        for number in range(960):
            clock[0] += 0.05
            told.record(2**19, number % 100 == 0)
    said = capsys.readouterr()
    assert said.out == "talk: goes on after the 400 records that an interrupted start had done\n"
    lines = said.err.splitlines()
    assert lines == ["talk: 1,008 of 2,000 records (50 %), 20 records/s, 10.0 MiB/s, 7 left out, 1 min to go"]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar, with the same."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("talk", 128) as told:
        told.begin(0)
        for _ in range(128):
            told.record(2**20, False)
    assert "talk: 100%" in terminal.getvalue()
    assert "iB/s, 0 left out" in terminal.getvalue()

"""Tests of the length table: its counts are those of training, it is built once, and it is complete or absent."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message, Sample
from data_recipes.store.reader import StoredText
from llava_next.config import ANYRES, ModelError, ViewsConfig
from llava_next.inputs.processor import Processor, SampleRejected
from llava_next.model.build import read_backbone
from tests.tiny import tiny_model, tiny_samples, tiny_store
from train.config.schema import ConfigError, PackingConfig, RunConfig
from train.data import length_table
from train.data.length_table import LengthTable, check_budgets, data_fingerprint, open_table
from train.distributed.world import heartbeat_mtime, wait_for

ROOT = Path(__file__).resolve().parents[3]


def processor_of(config: RunConfig, **changes: Any) -> Processor:
    """Returns the processor of the run's stage with these changes."""
    stage = replace(config.stage, **changes)
    return read_backbone(config.model).processor(
        template=stage.template, views=stage.views, max_length=stage.max_length
    )


def mixture_of(config: RunConfig, **changes: Any) -> Mixture:
    """Opens the run's mixture."""
    return Mixture.open(replace(config.mixture, **changes), Path(config.data.store_root))


def made(mixture: Mixture, processor: Processor, folder: Path, num_workers: int = 1) -> LengthTable:
    """Builds the table in this process."""
    return open_table(mixture, processor, folder, is_writer=True, num_workers=num_workers, show_progress=False)


def test_special_tokens_in_a_text_are_counted(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Samples with a special token's text in a question or an answer are counted once per source and token; the text is
    encoded as that token, as in the authors' code. The counts are the same with several processes and when read from
    disk; an older table without them has None."""
    samples = tiny_samples(600, pictures=False)
    for number, texts in ((3, ("What?", "A<|im_end|> and <|im_end|> B")), (590, ("Is </s> one?", "No<|im_end|>."))):
        messages = (Message("user", texts[0]), Message("assistant", texts[1]))
        samples[number] = replace(samples[number], messages=messages)
    for name, chosen in (("odd", samples), ("plain", tiny_samples(20, pictures=False, first=5000))):
        tiny_store(tmp_path / "stores", name, chosen)
    config = MixtureConfig("both", 0, {"odd": SourceShare(), "plain": SourceShare()})
    mixture, processor = Mixture.open(config, tmp_path / "stores"), processor_of(tiny_parts)
    expected = {"odd": {"</s>": 1, "<|im_end|>": 2}}
    table = made(mixture, processor, tmp_path / "tables", num_workers=2)
    assert table.special_texts == expected
    assert made(mixture, processor, tmp_path / "tables").special_texts == expected
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    usual, odd = (processor.layout(samples[number].messages, ()).ids for number in (0, 3))
    assert (odd == end).sum() == (usual == end).sum() + 2
    place = table.folder / "table.json"
    about = json.loads(place.read_text())
    del about["special_texts"]
    place.write_text(json.dumps(about))
    assert made(mixture, processor, tmp_path / "tables").special_texts is None


def test_captions_are_searched_without_their_questions(tiny_parts: RunConfig) -> None:
    """The template plain omits questions, so their special tokens do not count; the image placeholder never counts."""
    messages = (Message("user", "<image>\n</s>"), Message("assistant", "A <|im_start|> b."))
    assert processor_of(tiny_parts).special_texts(messages) == {"</s>", "<|im_start|>"}
    assert processor_of(tiny_parts, template="plain").special_texts(messages) == {"<|im_start|>"}


def test_table_counts_what_layout_counts(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Tokens, supervised tokens, tiles and source of every accepted sample are those of its layout; every other sample
    is in the quarantine with its reason; cut rounds are counted. No sample is missing or counted twice."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts, max_length=150)
    table = made(mixture, processor, tmp_path)
    expected, reasons, cut = [], Counter[str](), 0
    for number in range(mixture.num_samples):
        text = mixture.text(number)
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected as rejected:
            reasons[rejected.reason.value] += 1
            continue
        cut += layout.num_rounds_cut
        expected.append(
            (number, layout.num_tokens, layout.num_supervised, layout.num_tiles, mixture.source_ids[number])
        )
    assert table.rows.tolist() == expected
    assert table.rejects == dict(reasons)
    assert reasons["too_long"] > 0
    assert table.num_rounds_cut == cut > 0
    quarantine = [json.loads(line) for line in table.quarantine.read_text().splitlines()]
    assert len(quarantine) + len(table) == mixture.num_samples
    assert Counter(entry["reason"] for entry in quarantine) == reasons
    by_source = table.rejects_by_source()
    assert by_source == {
        source: dict(Counter(entry["reason"] for entry in quarantine if entry["source"] == source))
        for source in sorted({entry["source"] for entry in quarantine})
    }
    for entry in quarantine:
        assert entry["source"] in mixture.source_names
        assert "150" in entry["detail"]


def test_number_of_workers_changes_nothing(
    tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process or several build the same table, in the order of the mixture."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    monkeypatch.setattr(length_table, "_CHUNK", 7)
    alone = made(mixture, processor, tmp_path / "alone")
    several = made(mixture, processor, tmp_path / "several", num_workers=2)
    np.testing.assert_array_equal(alone.rows, several.rows)
    assert alone.rows["sample"].tolist() == sorted(alone.rows["sample"].tolist())


def test_table_is_made_once(tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start, and every other rank, memory-maps the file of the first."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    first = made(mixture, processor, tmp_path)
    written = (first.folder / "rows.npy").stat().st_mtime_ns
    monkeypatch.setattr(length_table, "_write", lambda *_: pytest.fail("it was made again"))
    second = made(mixture, processor, tmp_path)
    reader = open_table(mixture, processor, tmp_path, is_writer=False, num_workers=1, show_progress=False)
    assert (second.folder / "rows.npy").stat().st_mtime_ns == written
    assert isinstance(reader.rows, np.memmap)
    np.testing.assert_array_equal(reader.rows, first.rows)


def test_other_data_has_another_table(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Anything that could change a length changes the fingerprint: samples, seed of a subset, template, mode, maximum
    length."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    first = made(mixture, processor, tmp_path)
    sources = dict(tiny_parts.mixture.sources)
    fewer = {**sources, "tiny_pictures": replace(sources["tiny_pictures"], count=5)}
    others = [
        (mixture_of(tiny_parts, sources=fewer), processor),
        (mixture, processor_of(tiny_parts, template="plain")),
        (mixture, processor_of(tiny_parts, views=ViewsConfig("crop", "crop"))),
        (mixture, processor_of(tiny_parts, max_length=100)),
    ]
    result = {first.fingerprint, *(data_fingerprint(*other) for other in others)}
    assert len(result) == 1 + len(others)
    assert made(*others[0], tmp_path).folder != first.folder
    assert first.folder.is_dir()


def test_a_row_budget_must_hold_the_largest_sample(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """A budget of exactly its size does; with one less, the key and the smallest value that would do are named."""
    table = made(mixture_of(tiny_parts), processor_of(tiny_parts), tmp_path)
    tokens, tiles = int(table.rows["tokens"].max()), int(table.rows["tiles"].max())
    check_budgets(table, PackingConfig(tokens, tiles))
    with pytest.raises(ConfigError, match=rf"packing\.max_tokens={tokens - 1}, .*at least {tokens}$"):
        check_budgets(table, PackingConfig(tokens - 1, tiles))
    with pytest.raises(ConfigError, match=rf"packing\.max_tiles={tiles - 1}, .*at least {tiles}$"):
        check_budgets(table, PackingConfig(tokens, tiles - 1))


def test_sets_without_a_rule_are_rejected_and_counted(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Samples with several images, if the views have no rule for them; the others are kept."""
    mixture = mixture_of(tiny_parts)
    whole = made(mixture, processor_of(tiny_parts), tmp_path)
    table = made(mixture, processor_of(tiny_parts, views=ViewsConfig("anyres")), tmp_path)
    num_sets = sum(len(mixture.text(number).sizes_hw) > 1 for number in range(mixture.num_samples))
    assert num_sets > 0
    assert table.rejects == {"several_images": num_sets}
    assert len(table) == len(whole) - num_sets
    assert "2 images, and stage.views.several has no value" in table.quarantine.read_text()


def test_rejecting_every_sample_is_an_error(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """A maximum length that rejects every sample is one sentence with the key, the reasons and the file."""
    with pytest.raises(ConfigError, match=r"stage\.max_length=10 leaves no sample .*\d+ too_long.*quarantine"):
        made(mixture_of(tiny_parts), processor_of(tiny_parts, max_length=10), tmp_path)


def test_source_without_accepted_samples_is_an_error(tmp_path: Path) -> None:
    """A source without accepted samples is an error with its name, its counts by reason, the file and the fixes, both
    when the table is built and when it is read."""
    model = tiny_model(tmp_path / "models")
    long_answer = (Message("user", "Why?"), Message("assistant", "Because. " * 200))
    tiny_store(tmp_path / "stores", "tiny_long", [Sample(f"{n}", long_answer) for n in range(3)])
    tiny_store(tmp_path / "stores", "tiny_short", tiny_samples(5, pictures=False))
    config = MixtureConfig("tiny", 0, {"tiny_long": SourceShare(), "tiny_short": SourceShare()})
    mixture = Mixture.open(config, tmp_path / "stores")
    processor = read_backbone(model).processor(template=None, views=ANYRES, max_length=300)
    for is_writer in (True, False):
        with pytest.raises(
            ConfigError,
            match=r"^mixture\.sources\.tiny_long: none of its 3 samples .*: 3 too_long; raise stage\.max_length.*"
            r"remove the source from the mixture; \S+quarantine\.jsonl",
        ):
            open_table(mixture, processor, tmp_path, is_writer=is_writer, num_workers=1, show_progress=False)


def test_a_store_whose_placeholders_are_wrong_names_the_sample(
    tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More placeholders than images in a stored sample end the start with its id, source and both numbers."""
    mixture, text = mixture_of(tiny_parts), Mixture.text
    last = mixture.num_samples - 1  # shows a picture: sources stand in the order of their names

    def damaged(self: Mixture, index: int) -> StoredText:
        known = text(self, index)
        return known if index != last else replace(known, sizes_hw=known.sizes_hw[:0])

    monkeypatch.setattr(Mixture, "text", damaged)
    known = text(mixture, last)
    with pytest.raises(
        ModelError,
        match=rf"^sample '{known.id}' of source {known.source}: \d placeholders <image> but 0 images; prep",
    ):
        made(mixture, processor_of(tiny_parts), tmp_path)


_WRITER = """
import os, signal, sys, pickle
from pathlib import Path
from tests.tiny import tiny_model, tiny_samples, tiny_store
from train.data import length_table
mixture, processor, folder = pickle.loads(Path(sys.argv[1]).read_bytes())
length_table._CHUNK = 5
count = length_table._count
def killed(numbers):
    if numbers.start >= 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return count(numbers)
length_table._count = killed
length_table.open_table(mixture, processor, folder, is_writer=True, num_workers=1, show_progress=False)
"""


def test_killed_writer_leaves_nothing_complete(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """A killed writer leaves no table; the next one builds it, and readers ignore the partial files."""
    import pickle

    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    folder = tmp_path / "tables"
    (tmp_path / "arguments").write_bytes(pickle.dumps((mixture, processor, folder)))
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(tmp_path / "arguments")], cwd=ROOT, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    place = folder / data_fingerprint(mixture, processor)[:16]
    assert not place.exists()
    assert list(folder.iterdir()), "it had begun"
    table = made(mixture, processor, folder)
    np.testing.assert_array_equal(table.rows, made(mixture, processor, tmp_path / "fresh").rows)
    assert list(folder.iterdir()) == [table.folder], "what the killed writer had begun is gone"


def test_leftovers_of_other_hosts_go_when_they_are_old(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """A folder that another host's writer has touched recently is kept; one without heartbeat for ten minutes is
    removed."""
    begun, dead = tmp_path / "0123.other-host.1.partial", tmp_path / "4567.other-host.2.partial"
    for folder in (begun, dead):
        folder.mkdir()
        (folder / "rows.raw").touch()
    os.utime(dead, (time.time() - 601,) * 2)
    made(mixture_of(tiny_parts), processor_of(tiny_parts), tmp_path)
    assert begun.is_dir()
    assert not dead.exists()


def test_killed_writer_takes_its_processes_along(
    tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker processes end soon after their writer was killed."""

    def never_ends(_: int) -> Any:
        (tmp_path / f"{os.getpid()}.worker").touch()
        time.sleep(600)

    monkeypatch.setattr(length_table, "_CHUNK", 1)
    mixture = mixture_of(tiny_parts)
    monkeypatch.setattr(mixture, "text", never_ends)
    arguments = (mixture, processor_of(tiny_parts), tmp_path / "tables", 2)
    writer = multiprocessing.get_context("fork").Process(target=made, args=arguments)
    writer.start()
    until(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    until(lambda: not any(Path("/proc", path.stem).exists() for path in tmp_path.glob("*.worker")))


def until(is_so: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Waits until a condition holds that other processes establish."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_writer_that_comes_second_yields(
    tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that build the same table at once both use the one that was completed first."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    first = made(mixture, processor, tmp_path / "first")
    count_all, shared = length_table._count_all, tmp_path / "shared"

    def beaten(*args: Any) -> Any:
        yield from count_all(*args)
        shutil.copytree(first.folder, shared / first.folder.name)

    monkeypatch.setattr(length_table, "_count_all", beaten)
    written = (first.folder / "table.json").stat().st_mtime_ns
    table = made(mixture, processor, shared)
    assert len(table) == mixture.num_samples
    assert (table.folder / "table.json").stat().st_mtime_ns == written


def test_waiting_ends() -> None:
    """A process stops waiting when the writer's heartbeat stops, and names what it waited for."""
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="the thing: the process that creates it gave no sign of life for 0 s"):
        wait_for(lambda: False, lambda: None, what="the thing", patience_s=0.3)
    assert time.monotonic() - started < 3


def test_heartbeats_extend_the_wait() -> None:
    """Heartbeats extend the wait beyond the timeout, whatever the clock."""
    started, beats = time.monotonic(), itertools.cycle((0, 10**18, 5))  # as of 1970, of 2001, of 1970 again
    wait_for(lambda: time.monotonic() - started > 1.0, lambda: next(beats), what="it", patience_s=0.3)


def test_old_sign_of_life_does_not_end_the_wait(tmp_path: Path) -> None:
    """An old heartbeat file of a killed writer does not end the wait for the current one."""
    beat = tmp_path / "beat"
    beat.touch()
    os.utime(beat, (0, 0))
    started = time.monotonic()
    wait_for(lambda: time.monotonic() - started > 0.5, lambda: heartbeat_mtime(beat), what="it", patience_s=2.0)
    beat.touch()  # nor does one that stands still, however new it is
    with pytest.raises(TimeoutError):
        wait_for(lambda: False, lambda: heartbeat_mtime(beat), what="it", patience_s=0.3)


def test_one_process_per_usable_core(tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`num_workers=0` counts the cores that this process may use (affinity), not those of the machine."""

    class Started(Exception):
        """The processes would start here."""

    def start(num_workers: int, **_: Any) -> None:
        raise Started(num_workers)

    monkeypatch.setattr(length_table, "ProcessPoolExecutor", start)
    monkeypatch.setattr(length_table, "_CHUNK", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    with pytest.raises(Started, match=r"^3$"):
        made(mixture_of(tiny_parts), processor_of(tiny_parts), tmp_path / "tables", num_workers=0)


def test_stores_of_another_user_have_their_table_elsewhere(
    tiny_parts: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the folder beside the stores cannot be written, the table is in the next one, with a warning, and other
    processes find it there; without another folder it is one sentence."""
    mixture, processor = mixture_of(tiny_parts), processor_of(tiny_parts)
    (tmp_path / "a_file").touch()
    denied, run_folder = tmp_path / "a_file" / ".lengths", tmp_path / "run" / "lengths"
    options: dict[str, Any] = {"num_workers": 1, "show_progress": False}
    with pytest.raises(ConfigError, match=rf"{denied} cannot be written.*data\.store_root"):
        open_table(mixture, processor, denied, is_writer=True, **options)
    for is_writer in (True, False):
        table = open_table(mixture, processor, denied, is_writer=is_writer, fallbacks=(run_folder,), **options)
        assert table.folder.parent == run_folder
    (message,) = [record.message for record in caplog.records]
    assert str(denied) in message
    assert str(run_folder) in message
    assert [path.name for path in run_folder.iterdir()] == [table.folder.name]

"""Owns the proofs about the program: what it makes, skips and redoes, and the sentence and exit code of each
mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.prepare import __main__ as prepare
from data_recipes.schema.source import read_source
from data_recipes.store.reader import Store
from tests.data_recipes import raw_folders
from tests.data_recipes.prepare.program import (
    ROOT,
    SOURCES,
    arguments,
    change,
    contents,
    failure,
    make_place,
    put_mixture,
    run_anew,
)
from tests.data_recipes.raw_folders import picture, put


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with configs/ and raw/ for four sources and the mixture `all` of them."""
    return make_place(tmp_path)


def test_a_mixture_from_raw_files_to_its_table(place: Path) -> None:
    """The program, as it is started: every store is made, the table says what became of each, torch is not
    loaded."""
    code, out, err = run_anew(place, "--mixture", "all", "--workers", "2")
    assert code == 0, err
    assert "charts: 3 samples, 3 pictures, 0 left out" in out
    row = next(line for line in out.splitlines() if line.startswith("shapes ") and "samples" not in line)
    assert re.split(r"\s{2,}", row)[1:10] == ["2", "not stated", "4", "0", "1", "0", "0", "2", "7.1%"]
    row = next(line for line in out.splitlines() if line.startswith("charts ") and "samples" not in line)
    assert re.split(r"\s{2,}", row)[1:4] == ["all", "4", "3 (-1)"]
    assert "found (+ or -): so many more or fewer samples than were published" in out
    assert re.search(r"all: 28 samples, fingerprint [0-9a-f]{64}", out)
    assert sorted(path.name for path in (place / "stores").iterdir()) == sorted([*SOURCES, "mixtures"])
    script = (
        "import sys; from data_recipes.prepare import __main__ as prepare; "
        f"prepare.main({arguments(place, '--mixture', 'all')!r}); "
        "from data_recipes.store.reader import Store; from pathlib import Path; "
        f"Store.open(Path({str(place)!r}) / 'stores' / 'talk').sample(0); "
        "assert not {'torch', 'deepspeed', 'hydra', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    again = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already prepared") == 4


def test_an_excluded_store_is_prepared_and_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark that shows some of a source's pictures: its store is made, none of them is trained on, and the table
    says how many samples were held out, excluded and used."""
    raw_folders.write_llava(place / "raw" / "bench", num_samples=8)
    put(place / "configs/source/bench.yaml", yaml.safe_dump(SOURCES["talk"] | {"root": "bench", "licence": "CC0"}))
    more = [raw_folders.llava_record(number, "00010.png", id=f"again {number}") for number in range(20, 30)]
    raw_folders.write_llava(place / "raw" / "llava", 20, more)
    put_mixture(place, "some", {"talk": {"holdout": 4}}, exclude=["bench"])
    assert prepare.main(arguments(place, "--mixture", "some")) == 0
    out = capsys.readouterr().out
    mixture = Mixture.open(read_mixture(place / "configs", "some"), place / "stores")
    shown = {letters.decode() for letters in Store.open(place / "stores" / "bench").all_picture_hashes()}
    trained = [mixture.sample(number) for number in range(mixture.num_samples)]
    assert not {h for sample in trained for h in sample.picture_hashes} & shown
    [row] = mixture.table()
    assert row["excluded"] > 0
    assert row["found"] == 30 == row["held_out"] + row["beside_heldout"] + row["excluded"] + row["used"]
    cells = re.split(r"\s{2,}", next(line for line in out.splitlines() if re.match(r"talk +all", line)))
    counts = [row[key] for key in ("found", "held_out", "beside_heldout", "excluded", "used")]
    assert [cells[3], *cells[5:9]] == [str(count) for count in counts]
    section = (place / "stores/mixtures/some/manifest.md").read_text()
    assert "No picture of bench is among them." in section
    assert "bench (excluded from training): " in section


def test_a_second_start_does_only_what_is_missing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole and unchanged stores are passed over with a line; a changed raw file or YAML, or a lost store, is
    redone."""
    assert prepare.main(arguments(place, "--mixture", "all")) == 0
    capsys.readouterr()

    def redone() -> list[str]:
        assert prepare.main(arguments(place, "--mixture", "all")) == 0
        out = capsys.readouterr().out
        skipped = re.findall(r"^(\w+): already prepared, [\d,]+ samples$", out, re.MULTILINE)
        return sorted(set(SOURCES) - set(skipped))

    assert redone() == []
    raw_folders.write_llava(place / "raw" / "llava", num_samples=24)
    (place / "stores" / "pages").rename(place / "lost")
    put(
        place / "configs/source/shapes.yaml",
        yaml.safe_dump(SOURCES["shapes"] | {"options": {"max_questions": 1}}),
    )
    assert redone() == ["pages", "shapes", "talk"]
    assert len(Store.open(place / "stores" / "talk")) == 24
    assert redone() == []


def test_files_behind_links_are_looked_at(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures behind a link: what changes there makes a new store. A circle of links harms nobody."""
    (place / "raw/llava/images").rename(place / "elsewhere")
    (place / "raw/llava/images").symlink_to(place / "elsewhere")
    (place / "elsewhere/circle").symlink_to(place / "raw/llava")
    for number, changes in enumerate((True, False, True)):
        if changes:
            put(place / "elsewhere" / "00000.png", picture(number, 9, 9))
        assert prepare.main(arguments(place, "--source", "talk")) == 0
        assert ("already prepared" in capsys.readouterr().out) is not changes


def test_a_store_outlives_its_raw_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw files may be deleted to make room: the store is kept and used."""
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    (place / "raw" / "chartqa").rename(place / "gone")
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    assert "its raw folder is gone, its store is kept" in capsys.readouterr().out


def test_neither_workers_nor_the_machine_change_a_byte(place: Path) -> None:
    """1 and 8 processes, another path, other times of change, another hash seed: the same stores, the same manifest,
    and no path of the machine in any of them."""
    other = place / "another" / "machine"
    for folder in ("raw", "configs"):
        shutil.copytree(place / folder, other / folder, copy_function=shutil.copyfile)
    put_mixture(other, "all", {name: {} for name in reversed(SOURCES)} | {"shapes": {"count": 2, "holdout": 1}})
    for machine, num_workers, seed in ((place, "1", "1"), (other, "8", "2")):
        code, _, err = run_anew(machine, "--mixture", "all", "--workers", num_workers, seed=seed)
        assert code == 0, err
    ours, theirs = contents(place / "stores"), contents(other / "stores")
    assert ours == theirs
    assert {f"mixtures/all/manifest.{kind}" for kind in ("json", "md", "tex", "bib")} <= set(ours)
    assert [name for name, data in ours.items() if str(place).encode() in data] == []


def test_a_mended_description_needs_no_new_store(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Licence and citation are what the YAML says now, also of a store that stands."""
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    before = Store.open(place / "stores" / "charts")
    change(place, "charts", licence="GPL-3.0-or-later")
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    assert "already prepared" in capsys.readouterr().out
    after = Store.open(place / "stores" / "charts")
    assert after.manifest == before.manifest | {"licence": "GPL-3.0-or-later"}


def test_a_missing_raw_folder_says_where_to_get_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every one that is missing: publisher, where to fetch, how much, under which licence, and where to put it. The
    sources of one folder stand together, and nothing was begun for the others."""
    about = {"root": "nowhere", "publisher": "V. Zhou", "fetch": "from PyPI", "size": "3 MB"}
    change(place, "shapes", **about, expected_count=4000, licence="MIT")
    change(place, "pages", **about, expected_count=500, licence="CC0")
    change(place, "charts", root="far/away", publisher="A. Masry")
    assert prepare.main(arguments(place, "--mixture", "all")) == 2
    err = capsys.readouterr().err
    lines = [line.replace(str(place), "PLACE") for line in err.splitlines()]
    assert lines == [
        "prepare: 2 raw folders are not there:",
        "  PLACE/raw/far/away  (for charts)",
        "    publisher: A. Masry",
        "    fetch: not stated",
        "    size: not stated",
        "    licence: GPL-3.0",
        "    expected: 4 samples",
        "  PLACE/raw/nowhere  (for pages, shapes)",
        "    publisher: V. Zhou",
        "    fetch: from PyPI",
        "    size: 3 MB",
        "    licence:",
        "      pages: CC0",
        "      shapes: MIT",
        "    expected: 4,500 samples",
        "Put each there, or name another folder as `root` in the source's YAML.",
    ]
    assert not (place / "stores").exists()
    assert prepare.main(arguments(place, "--source", "shapes", "--slice", "1/2")) == 2
    assert f"no raw folder at\n  {place}/raw/nowhere  (for shapes)" in capsys.readouterr().err


def test_unknown_names_list_the_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixture, source, reader and option: each sentence has the choices."""
    code, sentence = failure(place, capsys, "--mixture", "al")
    assert (code, "Did you mean all? Known: all." in sentence) == (2, True)
    code, sentence = failure(place, capsys, "--source", "chart")
    assert (code, "Did you mean charts? Known: charts, pages, shapes, talk." in sentence) == (2, True)
    change(place, "charts", reader="chart_qa")
    code, sentence = failure(place, capsys, "--source", "charts")
    assert code == 2
    assert "no reader 'chart_qa'. Known: " in sentence
    assert {"chartqa", "easy_vqa", "llava_json"} <= set(re.split(r"[,;] ", sentence.split("Known: ")[1]))
    change(place, "charts", options={"spilt": "train"})
    code, sentence = failure(place, capsys, "--source", "charts")
    expected = "`options`: unknown key 'spilt'; reader chartqa takes: split. Did you mean split?"
    assert (code, expected in sentence) == (2, True)
    change(place, "talk", options={"image_root": "images"})
    code, sentence = failure(place, capsys, "--source", "talk")
    assert (code, "'annotations' is missing; reader llava_json takes: annotations: str, image_root" in sentence) == (
        2,
        True,
    )
    change(place, "charts", reader="json.decoder")
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "has no function `samples(root, **options)`" in sentence) == (2, True)


def test_a_reader_of_ones_own(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by its module path, with options of its own; a wrong one is told as for ours."""
    code = """
from data_recipes.schema.sample import Message, Sample

def samples(root, file, shout=False):
    for number, line in enumerate((root / file).read_text().splitlines()):
        answer = line.upper() if shout else line
        yield Sample(str(number), (Message("user", "What is bought?"), Message("assistant", answer)))
"""
    put(place / "mylab" / "receipts.py", code)
    put(place / "raw" / "receipts" / "all.txt", "Milk.\nBread.")
    monkeypatch.syspath_prepend(place)
    change(place, "talk", reader="mylab.receipts", root="receipts", options={"file": "all.txt", "shout": True})
    assert prepare.main(arguments(place, "--source", "talk")) == 0
    assert Store.open(place / "stores" / "talk").text(1).messages[1].text == "BREAD."
    capsys.readouterr()
    change(place, "talk", reader="mylab.receipts", root="receipts", options={"file": "all.txt", "shuot": True})
    assert (
        "reader mylab.receipts takes: file, shout. Did you mean shout?" in failure(place, capsys, "--source", "talk")[1]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rooot": "x"}, "unknown key 'rooot'; known keys: citation"),
        ({"licenze": "MIT"}, "size, name. Did you mean licence?"),
        ({"root": None}, "`root` is missing"),
        ({"expected_count": "many"}, "`expected_count` is 'many', and must be int"),
        ({"max_reject_share": 2}, "must lie between 0 and 1"),
        ({"options": ["train"]}, "must be dict"),
        ({"publisher": 3}, "must be str"),
    ],
)
def test_mistakes_in_a_sources_yaml(
    place: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object], message: str
) -> None:
    """Each names the file, the key and the value."""
    change(place, "charts", **values)
    code, sentence = failure(place, capsys, "--source", "charts")
    assert code == 2
    assert "configs/source/charts.yaml" in sentence
    assert message in sentence


def test_bad_records_decide_the_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above max_reject_share and under --strict it is 1 with the reason; below the share 0, and counted."""
    (place / "raw" / "chartqa/ChartQA Dataset/train/png/two_col_1.png").unlink()
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "1 of 3 records are bad (picture_missing 1)" in sentence) == (1, True)
    quarantine = place / "stores" / "charts.quarantine.jsonl"
    assert json.loads(quarantine.read_text())["place"] == "train_augmented.json, record 1"
    change(place, "charts", max_reject_share=0.5)
    code, sentence = failure(place, capsys, "--source", "charts", "--strict")
    assert (code, "picture_missing at train_augmented.json, record 1" in sentence) == (1, True)
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    out = capsys.readouterr().out
    assert "charts: 2 samples, 2 pictures, 1 left out" in out
    assert re.search(r"charts +4 +2 \(-2\) +1 +GPL-3.0", out)
    assert re.search(r"charts +picture_missing +1 +33.33% +train_augmented.json, record 1: no file 'two_col_1", out)


def test_more_wanted_than_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stores are made; the mixture says both numbers."""
    put_mixture(place, "all", {"charts": {"count": 4}})
    code, sentence = failure(place, capsys, "--mixture", "all")
    assert (code, "source charts: 4 samples wanted, 3 found" in sentence) == (2, True)


def test_a_full_disk_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, what happened, and that nothing half-written is left."""

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_recipes.writing.store_tables.sync", full)
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "No space left on device" in sentence) == (1, True)
    assert list((place / "stores").iterdir()) == []


def test_max_rejects_on_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes before the YAML's share, in both directions; and what is done by then need not be done again."""
    (place / "raw" / "chartqa/ChartQA Dataset/train/png/two_col_1.png").unlink()
    change(place, "charts", max_reject_share=0.5)
    code, sentence = failure(place, capsys, "--source", "charts", "--max-rejects", "0.2")
    assert (code, "1 of 3 records are bad" in sentence, "or --max-rejects" in sentence) == (1, True, True)
    assert not (place / "stores" / "charts").exists()
    assert prepare.main(arguments(place, "--source", "charts", "--max-rejects", "0.4")) == 0
    assert "goes on after the 3 records" in capsys.readouterr().out
    assert len(Store.open(place / "stores" / "charts")) == 2


def test_too_little_room_is_told_first(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both numbers, before anything is written."""
    big = picture(1, 700, 700)
    put(place / "raw" / "llava" / "images" / "00000.png", big)
    need = 60 * 2**20 // 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": need - 2**20}))
    assert len(big) > 2**20
    code, sentence = failure(place, capsys, "--mixture", "all")
    assert code == 2
    assert re.search(
        r"about 5\.\d MiB needed \(charts 1.0 MiB, .*talk 2\.\d MiB\), 5.0 MiB free in .*not enough", sentence
    )
    assert not (place / "stores").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": need}))
    assert prepare.main(arguments(place, "--mixture", "all")) == 0
    assert "space: about 5." in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--mixture", "a", "--source", "b"],
        ["--source", "charts", "--workers", "0"],
        ["--source", "charts", "--max-rejects", "2"],
        ["--source", "charts", "--slice", "0/3"],
        ["--source", "charts", "--slice", "4/3"],
        ["--source", "charts", "--slice", "3"],
        ["--source", "charts", "--slice", "1/3", "--merge", "3"],
        ["--source", "charts", "--merge", "0"],
    ],
)
def test_a_wrong_command_line_is_two(place: Path, line: list[str]) -> None:
    """As argparse has it."""
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments(place, *line))
    assert caught.value.code == 2


def test_the_shipped_mixtures_name_shipped_sources() -> None:
    """Every YAML of this checkout reads, with a known reader; the demo's are as the quickstart needs them."""
    configs = ROOT / "configs"
    for path in sorted((configs / "source").glob("*.yaml")):
        source = read_source(configs, path.stem)
        assert source.publisher, path
        assert source.fetch, path
        assert source.licence, path
    align = read_mixture(configs, "quickstart_align")
    finetune = read_mixture(configs, "quickstart_finetune")
    assert set(align.sources) == {"quickstart_captions"}
    assert set(finetune.sources) == {
        "quickstart_instruct",
        "text_chats",
        "chartqa",
        "synthdog_en",
        "easy_vqa",
    }
    assert align.exclude == finetune.exclude == ("easy_vqa_test",)  # what the evaluation asks about

"""Tests of the program: what it prepares and skips, and the message and exit code of each error."""

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
    make_workspace,
    run_in_new_process,
    write_mixture,
)
from tests.data_recipes.raw_folders import make_image, write_file


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with configs/ and raw/ for four sources and the mixture `all` of them."""
    return make_workspace(tmp_path)


def test_prepare_mixture(workspace: Path) -> None:
    """All stores are prepared and the table has their counts, without importing torch."""
    change(workspace, "charts", expected_count=4)
    code, out, err = run_in_new_process(workspace, "--mixture", "all", "--workers", "2", "--partial")
    assert code == 0, err
    assert "charts: 3 samples, 3 images, 0 rejected" in out
    row = next(line for line in out.splitlines() if line.startswith("shapes ") and "samples" not in line)
    assert re.split(r"\s{2,}", row)[1:10] == ["2", "not stated", "4", "0", "1", "0", "0", "2", "7.1%"]
    row = next(line for line in out.splitlines() if line.startswith("charts ") and "samples" not in line)
    assert re.split(r"\s{2,}", row)[1:4] == ["all", "4", "3 (-1)"]
    assert "found: the number in parentheses is the difference to the published number" in out
    assert re.search(r"all: 28 samples, fingerprint [0-9a-f]{64}", out)
    assert sorted(path.name for path in (workspace / "stores").iterdir()) == sorted([*SOURCES, "mixtures"])
    script = (
        "import sys; from data_recipes.prepare import __main__ as prepare; "
        f"prepare.main({arguments(workspace, '--mixture', 'all', '--partial')!r}); "
        "from data_recipes.store.reader import Store; from pathlib import Path; "
        f"Store.open(Path({str(workspace)!r}) / 'stores' / 'talk').sample(0); "
        "assert not {'torch', 'deepspeed', 'hydra', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    again = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already prepared") == 4


def test_excluded_store(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of an excluded benchmark are not trained on, and the table counts held-out, excluded and used samples."""
    raw_folders.write_llava(workspace / "raw" / "bench", num_samples=8)
    write_file(
        workspace / "configs/source/bench.yaml", yaml.safe_dump(SOURCES["talk"] | {"root": "bench", "licence": "CC0"})
    )
    more = [raw_folders.llava_record(number, "00010.png", id=f"again {number}") for number in range(20, 30)]
    raw_folders.write_llava(workspace / "raw" / "llava", 20, more)
    write_mixture(workspace, "some", {"talk": {"holdout": 4}}, exclude=["bench"])
    assert prepare.main(arguments(workspace, "--mixture", "some")) == 0
    out = capsys.readouterr().out
    mixture = Mixture.open(read_mixture(workspace / "configs", "some"), workspace / "stores")
    shown = {letters.decode() for letters in Store.open(workspace / "stores" / "bench").all_image_hashes()}
    trained = [mixture.sample(number) for number in range(mixture.num_samples)]
    assert not {h for sample in trained for h in sample.image_hashes} & shown
    [row] = mixture.table()
    assert row["excluded"] > 0
    assert row["found"] == 30 == row["held_out"] + row["beside_heldout"] + row["excluded"] + row["used"]
    cells = re.split(r"\s{2,}", next(line for line in out.splitlines() if re.match(r"talk +all", line)))
    counts = [row[key] for key in ("found", "held_out", "beside_heldout", "excluded", "used")]
    assert [cells[3], *cells[5:9]] == [str(count) for count in counts]
    section = (workspace / "stores/mixtures/some/manifest.md").read_text()
    assert "They contain no image of bench." in section
    assert "bench (excluded from training): " in section


def test_second_run_prepares_only_changes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stores that are up to date are skipped; changed raw files or options and removed stores are prepared again."""
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
    capsys.readouterr()

    def redone() -> list[str]:
        assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
        out = capsys.readouterr().out
        skipped = re.findall(r"^(\w+): already prepared, [\d,]+ samples$", out, re.MULTILINE)
        return sorted(set(SOURCES) - set(skipped))

    assert redone() == []
    raw_folders.write_llava(workspace / "raw" / "llava", num_samples=24)
    (workspace / "stores" / "pages").rename(workspace / "lost")
    write_file(
        workspace / "configs/source/shapes.yaml",
        yaml.safe_dump(SOURCES["shapes"] | {"options": {"max_questions": 1}}),
    )
    assert redone() == ["pages", "shapes", "talk"]
    assert len(Store.open(workspace / "stores" / "talk")) == 24
    assert redone() == []


def test_changes_behind_links_are_detected(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes behind symbolic links are detected, and circular links are harmless."""
    (workspace / "raw/llava/images").rename(workspace / "elsewhere")
    (workspace / "raw/llava/images").symlink_to(workspace / "elsewhere")
    (workspace / "elsewhere/circle").symlink_to(workspace / "raw/llava")
    for number, changes in enumerate((True, False, True)):
        if changes:
            write_file(workspace / "elsewhere" / "00000.png", make_image(number, 9, 9))
        assert prepare.main(arguments(workspace, "--source", "talk")) == 0
        assert ("already prepared" in capsys.readouterr().out) is not changes


def test_store_without_raw_folder(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store is used after the raw folder was removed."""
    assert prepare.main(arguments(workspace, "--source", "charts")) == 0
    (workspace / "raw" / "chartqa").rename(workspace / "gone")
    assert prepare.main(arguments(workspace, "--source", "charts")) == 0
    assert "the raw folder was removed; the store is kept" in capsys.readouterr().out


def test_stores_do_not_depend_on_workers_or_machine(workspace: Path) -> None:
    """The number of processes, paths, modification times and hash seeds do not change stores or manifest."""
    other = workspace / "another" / "machine"
    for folder in ("raw", "configs"):
        shutil.copytree(workspace / folder, other / folder, copy_function=shutil.copyfile)
    write_mixture(other, "all", {name: {} for name in reversed(SOURCES)} | {"shapes": {"count": 2, "holdout": 1}})
    for machine, num_workers, seed in ((workspace, "1", "1"), (other, "8", "2")):
        code, _, err = run_in_new_process(machine, "--mixture", "all", "--workers", num_workers, seed=seed)
        assert code == 0, err
    own_contents, other_contents = contents(workspace / "stores"), contents(other / "stores")
    assert own_contents == other_contents
    assert {f"mixtures/all/manifest.{kind}" for kind in ("json", "md", "tex", "bib")} <= set(own_contents)
    assert [name for name, data in own_contents.items() if str(workspace).encode() in data] == []


def test_description_is_updated(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Licence and citation of an existing store are updated from the YAML."""
    assert prepare.main(arguments(workspace, "--source", "charts")) == 0
    before = Store.open(workspace / "stores" / "charts")
    change(workspace, "charts", licence="GPL-3.0-or-later")
    assert prepare.main(arguments(workspace, "--source", "charts")) == 0
    assert "already prepared" in capsys.readouterr().out
    after = Store.open(workspace / "stores" / "charts")
    assert after.manifest == before.manifest | {"licence": "GPL-3.0-or-later"}


def test_missing_raw_folders(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All missing folders are reported with publisher, download instructions, size, licence and path, grouped by
    folder."""
    about = {"root": "nowhere", "publisher": "V. Zhou", "fetch": "from PyPI", "size": "3 MB"}
    change(workspace, "shapes", **about, expected_count=4000, licence="MIT")
    change(workspace, "pages", **about, expected_count=500, licence="CC0")
    change(workspace, "charts", root="far/away", publisher="A. Masry")
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 2
    err = capsys.readouterr().err
    lines = [line.replace(str(workspace), "PLACE") for line in err.splitlines()]
    assert lines == [
        "prepare: 2 missing raw folders:",
        "  PLACE/raw/far/away  (for charts)",
        "    publisher: A. Masry",
        "    fetch: not stated",
        "    size: not stated",
        "    licence: GPL-3.0",
        "    expected: 3 samples",
        "  PLACE/raw/nowhere  (for pages, shapes)",
        "    publisher: V. Zhou",
        "    fetch: from PyPI",
        "    size: 3 MB",
        "    licence:",
        "      pages: CC0",
        "      shapes: MIT",
        "    expected: 4,500 samples",
        "Download them to these paths, or set `root` in the source's YAML.",
    ]
    assert not (workspace / "stores").exists()
    assert prepare.main(arguments(workspace, "--source", "shapes", "--slice", "1/2")) == 2
    assert f"missing raw folder:\n  {workspace}/raw/nowhere  (for shapes)" in capsys.readouterr().err


def test_unknown_names_list_the_known(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages about unknown mixtures, sources, readers and options list the known ones."""
    code, sentence = failure(workspace, capsys, "--mixture", "al")
    assert (code, "Did you mean all? Known: all." in sentence) == (2, True)
    code, sentence = failure(workspace, capsys, "--source", "chart")
    assert (code, "Did you mean charts? Known: charts, pages, shapes, talk." in sentence) == (2, True)
    change(workspace, "charts", reader="chart_qa")
    code, sentence = failure(workspace, capsys, "--source", "charts")
    assert code == 2
    assert "no reader 'chart_qa'. Known: " in sentence
    assert {"chartqa", "easy_vqa", "llava_json"} <= set(re.split(r"[,;] ", sentence.split("Known: ")[1]))
    change(workspace, "charts", options={"spilt": "train"})
    code, sentence = failure(workspace, capsys, "--source", "charts")
    expected = "`options`: unknown key 'spilt'; reader chartqa takes: split. Did you mean split?"
    assert (code, expected in sentence) == (2, True)
    change(workspace, "talk", options={"image_root": "images"})
    code, sentence = failure(workspace, capsys, "--source", "talk")
    assert (code, "'annotations' is missing; reader llava_json takes: annotations: str, image_root" in sentence) == (
        2,
        True,
    )
    change(workspace, "charts", reader="json.decoder")
    code, sentence = failure(workspace, capsys, "--source", "charts")
    assert (code, "has no function `samples(root, **options)`" in sentence) == (2, True)


def test_custom_reader(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A custom reader is given by its import path; its options are checked like those of other readers."""
    code = """
from data_recipes.schema.sample import Message, Sample

def samples(root, file, shout=False):
    for number, line in enumerate((root / file).read_text().splitlines()):
        answer = line.upper() if shout else line
        yield Sample(str(number), (Message("user", "What is bought?"), Message("assistant", answer)))
"""
    write_file(workspace / "mylab" / "receipts.py", code)
    write_file(workspace / "raw" / "receipts" / "all.txt", "Milk.\nBread.")
    monkeypatch.syspath_prepend(workspace)
    change(workspace, "talk", reader="mylab.receipts", root="receipts", options={"file": "all.txt", "shout": True})
    assert prepare.main(arguments(workspace, "--source", "talk")) == 0
    assert Store.open(workspace / "stores" / "talk").text(1).messages[1].text == "BREAD."
    capsys.readouterr()
    change(workspace, "talk", reader="mylab.receipts", root="receipts", options={"file": "all.txt", "shuot": True})
    assert (
        "reader mylab.receipts takes: file, shout. Did you mean shout?"
        in failure(workspace, capsys, "--source", "talk")[1]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rooot": "x"}, "unknown key 'rooot'; known keys: citation"),
        ({"licenze": "MIT"}, "size, name. Did you mean licence?"),
        ({"root": None}, "`root` is missing"),
        ({"expected_count": "many"}, "`expected_count` is 'many', but must be int"),
        ({"max_reject_share": 2}, "must be between 0 and 1"),
        ({"options": ["train"]}, "must be dict"),
        ({"publisher": 3}, "must be str"),
    ],
)
def test_invalid_source_yaml(
    workspace: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object], message: str
) -> None:
    """Messages name the file, the key and the value."""
    change(workspace, "charts", **values)
    code, sentence = failure(workspace, capsys, "--source", "charts")
    assert code == 2
    assert "configs/source/charts.yaml" in sentence
    assert message in sentence


def test_exit_code_of_rejects(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too many rejected records, or one with --strict, exit with code 1; otherwise they are counted."""
    (workspace / "raw" / "chartqa/ChartQA Dataset/train/png/two_col_1.png").unlink()
    code, sentence = failure(workspace, capsys, "--source", "charts")
    assert (code, "1 of 3 records are rejected (picture_missing 1)" in sentence) == (1, True)
    quarantine = workspace / "stores" / "charts.quarantine.jsonl"
    assert json.loads(quarantine.read_text())["place"] == "train_augmented.json, record 1"
    change(workspace, "charts", max_reject_share=0.5)
    code, sentence = failure(workspace, capsys, "--source", "charts", "--strict")
    assert (code, "picture_missing at train_augmented.json, record 1" in sentence) == (1, True)
    assert prepare.main(arguments(workspace, "--source", "charts")) == 0
    out = capsys.readouterr().out
    assert "charts: 2 samples, 2 images, 1 rejected" in out
    assert re.search(r"charts +3 +2 \(-1\) +1 +GPL-3.0", out)
    assert re.search(r"charts +picture_missing +1 +33.33% +train_augmented.json, record 1: no file 'two_col_1", out)


def test_too_large_count(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stores are prepared; the message has the requested and the available number."""
    write_mixture(workspace, "all", {"charts": {"count": 4}})
    code, sentence = failure(workspace, capsys, "--mixture", "all")
    assert (code, "source charts: 4 samples requested, 3 available" in sentence) == (2, True)


def test_full_disk(workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, a message, and no incomplete store."""

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_recipes.writing.store_tables.sync_folder", full)
    code, sentence = failure(workspace, capsys, "--source", "charts")
    assert (code, "No space left on device" in sentence) == (1, True)
    assert list((workspace / "stores").iterdir()) == []


def test_max_rejects_on_the_command_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--max-rejects overrides the YAML in both directions, and completed work is kept."""
    (workspace / "raw" / "chartqa/ChartQA Dataset/train/png/two_col_1.png").unlink()
    change(workspace, "charts", max_reject_share=0.5)
    code, sentence = failure(workspace, capsys, "--source", "charts", "--max-rejects", "0.2")
    assert (code, "1 of 3 records are rejected" in sentence, "or --max-rejects" in sentence) == (1, True, True)
    assert not (workspace / "stores" / "charts").exists()
    assert prepare.main(arguments(workspace, "--source", "charts", "--max-rejects", "0.4")) == 0
    assert "resuming after 3 records" in capsys.readouterr().out
    assert len(Store.open(workspace / "stores" / "charts")) == 2


def test_too_little_disk_space(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the needed and the free space, before anything is written."""
    big = make_image(1, 700, 700)
    write_file(workspace / "raw" / "llava" / "images" / "00000.png", big)
    need = 60 * 2**20 // 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": need - 2**20}))
    assert len(big) > 2**20
    code, sentence = failure(workspace, capsys, "--mixture", "all")
    assert code == 2
    assert re.search(
        r"about 5\.\d MiB needed \(charts 1.0 MiB, .*talk 2\.\d MiB\), 5.0 MiB free in .*not enough", sentence
    )
    assert not (workspace / "stores").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": need}))
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
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
def test_invalid_command_line(workspace: Path, line: list[str]) -> None:
    """Invalid arguments exit with code 2."""
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments(workspace, *line))
    assert caught.value.code == 2


def test_the_shipped_mixtures_name_shipped_sources() -> None:
    """Every shipped source is valid and described, and the quickstart's mixtures have the expected sources."""
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
        "quickstart_letters",
        "quickstart_instruct",
        "text_chats",
        "chartqa",
        "synthdog_en",
        "easy_vqa",
    }
    assert align.exclude == finetune.exclude == ("easy_vqa_test",)  # used by the evaluation

"""Owns the proofs about the program: what it makes, skips and redoes, and the sentence and exit code of each
mistake."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes import prepare
from data_recipes.mixture import read_mixture
from data_recipes.source import read_source
from data_recipes.store import Store
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import put

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with configs/ and raw/ for four sources and the mixture `all` of them."""
    for name, source in SOURCES.items():
        put(tmp_path / "configs" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    shares: dict[str, Any] = {name: {} for name in SOURCES} | {"shapes": {"count": 2, "holdout": 1}}
    mixture = {"name": "all", "seed": 0, "sources": shares}
    put(tmp_path / "configs" / "mixture" / "all.yaml", yaml.safe_dump(mixture))
    raw_folders.write_llava(tmp_path / "raw" / "llava")
    raw_folders.write_chartqa(tmp_path / "raw" / "chartqa")
    raw_folders.write_synthdog(tmp_path / "raw" / "pages")
    raw_folders.write_easy_vqa(tmp_path / "raw" / "shapes")
    return tmp_path


def arguments(place: Path, *more: str) -> list[str]:
    """The command line for `place`."""
    folders = [
        "--raw",
        str(place / "raw"),
        "--stores",
        str(place / "stores"),
        "--configs",
        str(place / "configs"),
    ]
    return [*more, *folders, *([] if "--workers" in more else ["--workers", "1"])]


def program(place: Path, *more: str) -> "subprocess.Popen[str]":
    """The program as a user starts it."""
    command = [sys.executable, "-m", "data_recipes.prepare", *arguments(place, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_mixture_from_raw_files_to_its_table(place: Path) -> None:
    """The program, as it is started: every store is made, the table says what became of each, torch is not
    loaded."""
    process = program(place, "--mixture", "all", "--workers", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "charts: 3 samples, 3 pictures, 0 left out" in out
    row = next(line for line in out.splitlines() if line.startswith("shapes ") and "samples" not in line)
    assert re.split(r"\s{2,}", row)[1:7] == ["2", "4", "1", "0", "2", "7.1%"]
    assert re.search(r"all: 28 samples, fingerprint [0-9a-f]{64}", out)
    assert sorted(path.name for path in (place / "stores").iterdir()) == sorted(SOURCES)
    code = (
        "import sys; from data_recipes import prepare; "
        f"prepare.main({arguments(place, '--mixture', 'all')!r}); "
        "from data_recipes.store import Store; from pathlib import Path; "
        f"Store.open(Path({str(place)!r}) / 'stores' / 'talk').sample(0); "
        "assert not {'torch', 'deepspeed', 'hydra', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already prepared") == 4


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


def test_a_store_outlives_its_raw_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw files may be deleted to make room: the store is kept and used."""
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    (place / "raw" / "chartqa").rename(place / "gone")
    assert prepare.main(arguments(place, "--source", "charts")) == 0
    assert "its raw folder is gone, its store is kept" in capsys.readouterr().out


def test_workers_change_no_fingerprint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mixture's fingerprint is the same for 1 and for 3 processes."""
    prints = []
    for num_workers in ("1", "3"):
        stores = str(place / f"stores_{num_workers}")
        line = arguments(place, "--mixture", "all", "--workers", num_workers)
        line[line.index("--stores") + 1] = stores
        assert prepare.main(line) == 0
        prints.append(re.findall(r"fingerprint (\w+)", capsys.readouterr().out))
    assert prints[0] == prints[1] != []


def test_a_killed_start_is_taken_up_again(place: Path) -> None:
    """Killed in the middle it leaves a `.partial` and no store, its workers leave with it, and the next start
    makes the store whole."""
    wait = """
import time
from data_recipes.readers import llava_json

def samples(root):
    yield from llava_json.samples(root, "mix.json", "images")
    (root / "reached").touch()
    while (root / "wait").exists():
        time.sleep(0.02)
"""
    put(place / "mine" / "slow_reader.py", wait)
    raw = place / "raw" / "llava"
    put(
        place / "configs" / "source" / "slow.yaml",
        yaml.safe_dump({"reader": "mine.slow_reader", "root": "llava"}),
    )
    put(raw / "wait", "")
    command = [
        sys.executable,
        "-m",
        "data_recipes.prepare",
        *arguments(place, "--source", "slow", "--workers", "2"),
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (raw / "reached").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in (place / "stores").iterdir() if path.is_dir()] == ["slow.partial"]
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "workers outlived the program"
        time.sleep(0.05)
    (raw / "wait").unlink()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slow: removed what an interrupted start had left" in done.stdout
    assert [path.name for path in (place / "stores").iterdir()] == ["slow"]
    assert len(Store.open(place / "stores" / "slow")) == 20


def _group_lives(group: int) -> bool:
    """Is any process of the group left? (A dead one that nobody waits for does not count.)"""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_two_programs_do_not_write_one_store(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is told, and touches nothing."""
    (place / "stores").mkdir()
    with (place / "stores" / ".charts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare.main(arguments(place, "--source", "charts")) == 2
    assert "another prepare is writing" in capsys.readouterr().err


def change(place: Path, source: str, **values: object) -> None:
    """Change keys of a source's YAML."""
    put(place / "configs" / "source" / f"{source}.yaml", yaml.safe_dump(SOURCES[source] | values))


def failure(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and the sentence on stderr, which must be one."""
    code = prepare.main(arguments(place, *more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("prepare: ")
    return code, lines[0]


def test_a_missing_raw_folder_says_where_to_get_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Publisher, where to fetch, how much and under which licence; and nothing was begun for the other
    sources."""
    change(
        place,
        "shapes",
        root="nowhere",
        publisher="V. Zhou",
        fetch="from PyPI",
        expected_count=4000,
        licence="MIT",
    )
    code, sentence = failure(place, capsys, "--mixture", "all")
    assert code == 2
    for part in ("source shapes: no raw folder at", "V. Zhou", "from PyPI", "4,000 samples", "MIT"):
        assert part in sentence
    assert not (place / "stores").exists()


def test_unknown_names_list_the_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixture, source, reader and option: each sentence has the choices."""
    code, sentence = failure(place, capsys, "--mixture", "al")
    assert (code, "Did you mean all? Known: all." in sentence) == (2, True)
    code, sentence = failure(place, capsys, "--source", "chart")
    assert (code, "Did you mean charts? Known: charts, pages, shapes, talk." in sentence) == (2, True)
    change(place, "charts", reader="chart_qa")
    code, sentence = failure(place, capsys, "--source", "charts")
    assert code == 2
    assert "no reader 'chart_qa'. Known: ai2d, chartqa, coco_captions, docvqa" in sentence
    change(place, "charts", options={"spilt": "train"})
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "it takes split: str = 'train'" in sentence) == (2, True)
    change(place, "charts", reader="json.decoder")
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "has no function `samples(root, **options)`" in sentence) == (2, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rooot": "x"}, "unknown key 'rooot'; known keys: citation"),
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
    assert re.search(r"charts +3 +2 +picture_missing 1 +GPL-3.0", out)


def test_more_wanted_than_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stores are made; the mixture says both numbers."""
    mixture = {"name": "all", "seed": 0, "sources": {"charts": {"count": 4}}}
    put(place / "configs" / "mixture" / "all.yaml", yaml.safe_dump(mixture))
    code, sentence = failure(place, capsys, "--mixture", "all")
    assert (code, "source charts: 4 samples wanted, 3 found" in sentence) == (2, True)


def test_a_full_disk_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, what happened, and that nothing half-written is left."""

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_recipes.store.sync", full)
    code, sentence = failure(place, capsys, "--source", "charts")
    assert (code, "No space left on device" in sentence) == (1, True)
    assert list((place / "stores").iterdir()) == []


@pytest.mark.parametrize("line", [[], ["--mixture", "a", "--source", "b"], ["--source", "charts", "--workers", "0"]])
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

"""Tests of `python -m train.evaluate --suite`: which columns are measured, what is kept, and what is written.

lmms-eval is a script of a few lines here, which writes results of its form; tests/scripts/test_suite_tasks.py has the
real one. The hub is on loopback, in a process of its own client.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import ROOT, TOKEN, ClientProcess, Ended, Hub, client_environment, running_hub
from tests.train.evaluate.chat_api import ChatApi, running_api
from train.config.schema import ConfigError
from train.evaluate.suite_columns import describe_columns, read_suite, select_columns, select_published
from train.observability.suite_results import read_suite_results, suite_rows, weights_fingerprint

SECRET = "sk-secretOfThisTest"
SUITE = read_suite("llava_next")
JUDGE_KEY = "OPENAI_API_KEY"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STAND_IN = Path(__file__).with_name("lmms_eval_stand_in.py")
PROGRAM = "tests.train.evaluate.evaluate_with_stand_in"


class Bench:
    """A model, a hub, the stand-in, and what it is to do.

    Attributes:
        behaviour: of the stand-in by task.
    """

    def __init__(self, folder: Path, hub: Hub, client: ClientProcess) -> None:
        self.folder, self.hub, self.client = folder, hub, client
        self.run_dir, self.export = folder / "run", folder / "run" / "export"
        self.export.mkdir(parents=True)
        (self.export / "config.json").write_text("{}")
        (self.export / "model.safetensors").write_bytes(b"weights")
        self.script, self.calls_file = folder / "lmms_eval", folder / "calls.jsonl"
        self.script.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        self.script.chmod(0o755)
        self.behaviour: dict[str, Any] = {
            "pope": {"scores": {"pope_f1_score,none": 0.875}},
            "mme": {"scores": {"mme_perception_score,none": 1500.25, "mme_cognition_score,none": 300}},
            "mmvet": {"scores": {"gpt_eval_score,none": 40.0}},
            "mmbench_en_dev": {"scores": {"gpt_eval_score,none": 60.0}},
            "vizwiz_vqa_test": {"submits": True},
        }
        for column in SUITE.columns.values():
            hub.add(f"datasets/{column.data}", {"README.md": b"x"}, licence="mit")
        self.environment: dict[str, str] = {"HF_TOKEN": TOKEN}

    @property
    def out(self) -> Path:
        """The file of the results."""
        return self.run_dir / "suite_llava_next.json"

    def arguments(self, *options: str, model: str = "run") -> list[str]:
        """Of the program."""
        return [str(self.script), str(self.folder / model), "--suite", "llava_next", *options]

    def variables(self) -> dict[str, str | None]:
        """Of the environment; None for those that the program must not have."""
        absent: dict[str, str | None] = dict.fromkeys(
            (JUDGE_KEY, "OPENAI_API_URL", "MODEL_VERSION", "HF_TOKEN", *LAUNCHER)
        )
        stand_in = {"BEHAVIOUR": json.dumps(self.behaviour), "CALLS": str(self.calls_file)}
        return {**absent, **stand_in, **self.environment}

    def run(self, *options: str, model: str = "run") -> Ended:
        """Runs the program."""
        return self.client.run(PROGRAM, self.arguments(*options, model=model), **self.variables())

    def columns(self) -> dict[str, Any]:
        """The columns of the results."""
        columns: dict[str, Any] = json.loads(self.out.read_text())["columns"]
        return columns

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        """Arguments and judge of every call of the stand-in."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [tuple(json.loads(line)) for line in text.splitlines()]  # type: ignore[misc]

    def measured(self) -> list[str]:
        """The tasks of every call, in their order."""
        return [arguments[2] for arguments, _ in self.calls()]


@pytest.fixture(scope="module")
def hub_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, ClientProcess]]:
    """A hub and a process of its client, in which the programs run."""
    with running_hub(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, hub_and_client: tuple[Hub, ClientProcess]) -> Bench:
    """A run and a hub that has every data set."""
    hub, client = hub_and_client
    hub.repositories.clear()
    return Bench(tmp_path, hub, client)


def test_columns_are_measured_once(bench: Bench) -> None:
    """Values have the unit of the published ones; a finished column is not measured again, a failed one is, and one on
    fewer questions is replaced by one on all, not the other way round."""
    bench.behaviour["mme"]["fails"] = True
    options = ("--published", "vicuna_7b", "--columns", "pope,mme")
    ended = bench.run(*options)
    assert ended.code == 1
    assert "mme: failed: ValueError: no such thing; see" in ended.stderr
    assert bench.columns()["mme"]["state"] == "failed"
    pope = bench.columns()["pope"]
    assert (pope["state"], pope["values"], pope["published"], pope["num_questions"]) == ("done", [87.5], [86.53], 5)
    repository = bench.hub.repositories["datasets/lmms-lab-encoder/POPE"]
    assert (pope["data_revision"], pope["licence"]) == (repository.resolve("main"), "mit")

    del bench.behaviour["mme"]["fails"]
    ended = bench.run(*options)
    assert ended.code == 0, ended.stderr
    assert bench.measured() == ["mme", "pope", "mme"]
    assert all("HF_HUB_OFFLINE" not in recorded for _, recorded in bench.calls())  # lmms-eval fetches its data
    assert "finished, not measured again" in ended.stdout
    assert bench.columns()["mme"]["values"] == [1500.25, 300]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("MME ")]
    assert "1500.2 / 300.0" in line
    assert "1519 / 332" in line
    assert "-18.8 / -32.0" in line

    assert bench.run(*options, "--limit", "4").code == 0
    assert bench.measured() == ["mme", "pope", "mme"]


def test_fewer_questions_are_not_the_result(bench: Bench) -> None:
    """A column of `--limit` says so, is kept for the same limit, and is measured again without it."""
    for limit in (("--limit", "4"), ("--limit", "4"), ()):
        ended = bench.run("--columns", "pope", *limit)
        assert ended.code == 0, ended.stderr
        assert ("the first 4 questions only" in ended.stdout) == bool(limit)
    assert [arguments[5:] for arguments, _ in bench.calls()] == [["--limit", "4"], []]


def test_what_cannot_be_measured_is_said_before_anything_runs(bench: Bench) -> None:
    """Keys, submissions, terms and missing data sets, each with its reason, in the output and in the file."""
    bench.hub.repositories["datasets/lmms-lab-encoder/textvqa"].gated = True
    bench.behaviour["mmmu_val"] = {"scores": {"mmmu_acc,none": 0.25}}
    del bench.environment["HF_TOKEN"]
    ended = bench.run("--published", "vicuna_7b")
    assert ended.code == 0, ended.stderr
    columns = bench.columns()
    assert list(columns) == list(SUITE.columns)
    assert {name for name, values in columns.items() if values["state"] != "skipped"} == {"mmmu_val"}
    assert "set HF_TOKEN" in columns["pope"]["reason"]
    assert "/datasets/lmms-lab-encoder/textvqa" in columns["textvqa"]["reason"]
    assert "--columns vqav2 writes the file for it" in columns["vqav2"]["reason"]
    plan, _, _ = ended.stdout.partition("measured now")
    assert [name for name in SUITE.columns if f"\n{name} " not in plan] == []

    bench.environment["HF_TOKEN"] = TOKEN
    del bench.hub.repositories["datasets/lmms-lab-encoder/GQA"]
    ended = bench.run("--columns", "gqa,mm_vet,pope")
    columns = bench.columns()
    assert "datasets/lmms-lab-encoder/GQA" in columns["gqa"]["reason"]
    assert "set OPENAI_API_KEY" in columns["mm_vet"]["reason"]
    assert columns["pope"]["state"] == "done"
    assert (ended.code, TOKEN in ended.stdout + ended.stderr) == (0, False)


def test_a_submission_is_written_for_its_server(bench: Bench) -> None:
    """A column whose answers are not public is measured if it is named; the file and the server are in the table."""
    ended = bench.run("--columns", "vizwiz")
    assert ended.code == 0, ended.stderr
    vizwiz = bench.columns()["vizwiz"]
    assert vizwiz["state"] == "submission"
    assert Path(vizwiz["file"]).read_text() == "[]"
    assert f"to be scored by {SUITE.columns['vizwiz'].server}" in ended.stdout
    assert bench.run("--columns", "vizwiz").code == 0
    assert len(bench.calls()) == 1


def test_the_score_of_a_submission_is_entered(bench: Bench) -> None:
    """The value that a server gave stands beside the published one, and can be corrected; a column without a file, one
    that needs no server, and a value that is no number are errors."""
    bench.run("--columns", "vizwiz,pope", "--published", "vicuna_7b")
    for value in (57.0, 58.1):
        ended = bench.run("--score", f"vizwiz={value}", "--published", "vicuna_7b")
        assert ended.code == 0, ended.stderr
    vizwiz = bench.columns()["vizwiz"]
    assert (vizwiz["state"], vizwiz["values"], vizwiz["published"]) == ("done", [58.1], [57.6])
    assert "+0.5" in ended.stdout
    assert f"scored by {SUITE.columns['vizwiz'].server}" in ended.stdout
    assert len(bench.calls()) == 2
    assert bench.run("--columns", "vizwiz").code == 0
    assert len(bench.calls()) == 2
    for score, word in (
        ("mmmu_test=40", "has no file of this column"),
        ("pope=87", "has no file of this column"),
        ("vizwiz=good", "write COLUMN=VALUE"),
        ("nothing=1", "has no file of this column"),
        ("vizwiz=1 --columns vizwiz", "leave out --columns"),
        ("vizwiz=1 --score vizwiz=2", "names a column twice"),
    ):
        ended = bench.run("--score", *score.split())
        assert (ended.code, word in ended.stderr) == (2, True), ended.stderr
    assert bench.columns()["vizwiz"]["values"] == [58.1]


@pytest.fixture
def api() -> Iterator[ChatApi]:
    """A judge."""
    with running_api() as running:
        running.key, running.models = SECRET, ["judge"]
        yield running


def test_the_judge_is_asked_first(bench: Bench, api: ChatApi) -> None:
    """Tasks get its address in the form that each of them takes. A judge that refuses the key, or fails later, gives no
    result; the key is in no file."""
    bench.environment |= {"OPENAI_API_KEY": SECRET, "OPENAI_API_URL": f"{api.url}/v1", "MODEL_VERSION": "judge"}
    bench.behaviour["mmvet"]["prints"] = "question 1 failed to get a score."
    ended = bench.run("--columns", "mm_vet,mmbench_en")
    columns = bench.columns()
    assert (ended.code, columns["mmbench_en"]["state"], columns["mmbench_en"]["judge"]) == (1, "done", "judge")
    assert "the judge gave no answer 1 times" in columns["mm_vet"]["reason"]
    assert [environment for _, environment in bench.calls()] == [
        {"API_TYPE": "openai", "OPENAI_API_URL": f"{api.url}/v1/chat/completions", "MODEL_VERSION": "judge"},
        {"API_TYPE": "openai", "OPENAI_API_URL": f"{api.url}/v1", "MODEL_VERSION": "judge"},
    ]
    assert len(api.requests) == 1
    log = (bench.run_dir / "suite_llava_next" / "mm_vet" / "log.txt").read_text()
    assert "key *** token ***" in log

    api.key = "another"
    ended = bench.run("--columns", "mm_vet")
    assert ended.code == 1
    assert "the judge cannot be used" in bench.columns()["mm_vet"]["reason"]
    assert len(bench.calls()) == 2
    texts = [path.read_text() for path in bench.run_dir.rglob("*") if path.is_file()]
    assert not any(SECRET in text or TOKEN in text for text in [*texts, ended.stdout, ended.stderr])


@pytest.mark.full
def test_a_stop_ends_lmms_eval(bench: Bench) -> None:
    """SIGTERM reaches the script's process; the same command continues."""
    bench.behaviour["pope"]["sleeps"] = 600
    variables = {**client_environment(bench.hub, bench.folder), **bench.variables()}
    command = [sys.executable, "-m", PROGRAM, *bench.arguments("--columns", "mme,pope")]
    environment = {name: value for name, value in variables.items() if value is not None}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    while "pope" not in bench.measured():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(bench.run_dir) not in listing
    del bench.behaviour["pope"]["sleeps"]
    assert bench.run("--columns", "mme,pope").code == 0
    assert bench.measured() == ["mme", "pope", "pope"]


def test_results_are_of_one_model(bench: Bench) -> None:
    """After the export was replaced, its results are neither continued nor shown."""
    assert bench.run("--columns", "pope").code == 0
    remarks: list[str] = []
    assert len(read_suite_results(bench.run_dir, remarks)) == 1
    (bench.export / "model.safetensors").write_bytes(b"weights of another training")
    assert read_suite_results(bench.run_dir, remarks) == []
    assert remarks == ["suite_llava_next.json is left out: it is of other weights than those in export/"]
    ended = bench.run("--columns", "mme")
    assert ended.code == 2
    assert "has results of another weights" in ended.stderr
    bench.out.write_text("{}")
    assert "is not a results table" in bench.run("--columns", "mme").stderr


def test_mistakes_are_reported_before_anything_runs(bench: Bench) -> None:
    """Unknown columns and models, a directory without weights, and a launcher with several ranks."""
    cases = [
        (("--columns", "mme,vmcbench"), "the table has no column vmcbench; it has mmmu_val, "),
        (("--published", "gpt4"), "the table has no such model; it has vicuna_7b, mistral_7b"),
    ]
    for arguments, words in cases:
        ended = bench.run(*arguments)
        assert (ended.code, words in ended.stderr) == (2, True), ended.stderr
    ended = bench.run(model="nothing")
    assert (ended.code, "is neither a run with an export/ nor a model directory" in ended.stderr) == (2, True)
    bench.environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    ended = bench.run()
    assert (ended.code, "--suite is one process" in ended.stderr) == (2, True), ended.stderr
    assert bench.calls() == []


def test_the_published_model(tmp_path: Path) -> None:
    """By --published, by the name of the released weights, in the hub's cache too; none for another model."""
    names = {
        "llava-v1.6-mistral-7b-hf": "mistral_7b",
        "models--llava-hf--llava-v1.6-34b-hf/snapshots/0123": "hermes_yi_34b",
        "mine": "",
    }
    for name, expected in names.items():
        assert select_published(SUITE, tmp_path / name, None) == expected
    assert select_published(SUITE, tmp_path / "mine", "vicuna_13b") == "vicuna_13b"
    assert select_published(SUITE, tmp_path / "llava-v1.6-mistral-7b-hf", "none") == ""


def test_the_published_model_of_a_run(tmp_path: Path) -> None:
    """That with its language model."""
    from tests.tiny import tiny_mixture, tiny_model
    from tests.train.cases import tiny_run
    from train.config.compose import to_yaml

    config = tiny_run(tiny_model(tmp_path / "models"), *tiny_mixture(tmp_path / "data", 4), tmp_path / "outputs")
    text = to_yaml(config)
    name = config.model.language_model.name
    assert f"name: {name}\n" in text
    (tmp_path / "config.yaml").write_text(text.replace(f"name: {name}\n", "name: vicuna_7b\n"))
    assert select_published(SUITE, tmp_path / "export", None) == "vicuna_7b"
    (tmp_path / "config.yaml").write_text(text)
    assert select_published(SUITE, tmp_path / "export", None) == ""


def test_every_model_has_a_yaml_file_and_every_value() -> None:
    """The published models are choices of model/language_model; only MMMU's test split was not published for all."""
    for name, model in SUITE.published.items():
        assert (ROOT / "configs" / "model" / "language_model" / f"{name}.yaml").is_file()
        assert set(SUITE.columns) - set(model.values) <= {"mmmu_test"}


def test_the_page_has_the_tables() -> None:
    """docs/evaluation.md has what `--describe` prints."""
    assert describe_columns(SUITE) in (ROOT / "docs" / "evaluation.md").read_text()


def test_a_damaged_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the file, the key and the value."""
    monkeypatch.setattr("train.evaluate.suite_columns.SUITE_DIR", tmp_path)
    text = (ROOT / "configs" / "suite" / "llava_next.yaml").read_text()
    cases = {
        "metric: x": (text.replace("metrics: [pope_f1_score]", "metric: pope_f1_score"), "columns.pope.metrics"),
        "one value": (text.replace("mme: [1519, 332]", "mme: [1519]"), "needs one value for each metric"),
        "no column": (text.replace("pope: [86.53]", "pop: [86.53]"), "values.pop: there is no such column"),
    }
    for changed, words in cases.values():
        (tmp_path / "mine.yaml").write_text(changed)
        with pytest.raises(ConfigError, match=words):
            read_suite("mine")
    with pytest.raises(ConfigError, match="no such table; available: mine"):
        read_suite("../mine")


def test_columns_are_in_the_order_of_the_table() -> None:
    """Whatever the order in which they are named."""
    assert list(select_columns(SUITE, "pope, mme")) == ["mme", "pope"]
    assert list(select_columns(SUITE, None)) == list(SUITE.columns)
    with pytest.raises(ConfigError, match="no column is named"):
        select_columns(SUITE, ",")


@pytest.mark.parametrize("size", [10, 2**20, 2**20 + 5, 3 * 2**20])
def test_a_fingerprint_sees_both_ends_of_a_file(tmp_path: Path, size: int) -> None:
    """A changed byte at the start or at the end, another name, another size; not the time of the file."""
    file = tmp_path / "model.safetensors"
    content = bytes(size)
    seen = set()
    for changed in (content, b"1" + content[1:], content[:-1] + b"1", content + b"0"):
        file.write_bytes(changed)
        seen.add(weights_fingerprint(tmp_path))
    file.write_bytes(content)
    os.utime(file, (0, 0))
    assert weights_fingerprint(tmp_path) in seen
    file.rename(tmp_path / "other.safetensors")
    seen.add(weights_fingerprint(tmp_path))
    assert len(seen) == 5


def test_rows_have_texts() -> None:
    """Values, published values and differences of several metrics; the reason where there is none."""
    columns = {
        "mme": {
            "title": "MME",
            "state": "done",
            "values": [1500.25, 300],
            "published": [1519, 332],
            "num_questions": 2374,
        },
        "vqav2": {"title": "VQAv2", "state": "skipped", "published": [81.8], "reason": "no key", "note": "test"},
    }
    rows = [row.cells() for row in suite_rows({"columns": columns})]
    assert rows == [
        ("MME", "1500.2 / 300.0", "1519 / 332", "-18.8 / -32.0", "2,374", ""),
        ("VQAv2", "", "81.8", "", "", "skipped: no key; test"),
    ]

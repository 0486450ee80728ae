"""The columns of configs/suite with the real lmms-eval: each task is the installed one, and one runs end to end."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_recipes.schema.sample import Sample
from llava_next.cache_root import cache_root
from tests.hub_server import ROOT, TOKEN, Hub, client_environment
from tests.tiny import tiny_store
from tests.train.evaluate.learned import learn
from train.evaluate.__main__ import main
from train.evaluate.suite_columns import Suite, read_suite

ENVIRONMENT = cache_root() / "lmms_eval_env"
SUITES = sorted(path.stem for path in (ROOT / "configs" / "suite").glob("*.yaml"))


@pytest.mark.parametrize("name", SUITES)
def test_the_version_is_the_pinned_one(name: str) -> None:
    """That of scripts/lmms_eval.sh."""
    script = (ROOT / "scripts" / "lmms_eval.sh").read_text()
    assert f"lmms-eval=={read_suite(name).lmms_eval} " in script


@pytest.mark.full
@pytest.mark.parametrize("name", SUITES)
def test_columns_are_tasks_of_the_installed_lmms_eval(name: str) -> None:
    """Task, data, split, token and metrics; also the text by which a judge that does not answer is noticed, and the
    form of the judge's address."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("the environment of lmms-eval is absent: scripts/lmms_eval.sh makes it at its first start")
    suite: Suite = read_suite(name)
    tasks = [column.task for column in suite.columns.values()]
    program = str(Path(__file__).with_name("lmms_eval_tasks.py"))
    command = [str(ENVIRONMENT / "bin" / "python"), "-W", "ignore", program, *tasks, "no_such_task"]
    environment = {**os.environ, "OPENAI_API_KEY": "none"}  # without one, MM-Vet's task cannot be imported
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.loads(done.stdout.splitlines()[-1])
    assert listed["version"] == suite.lmms_eval
    assert listed["tasks"]["no_such_task"] is None
    for column in suite.columns.values():
        task = listed["tasks"][column.task]
        assert task is not None, column.task
        expected = (column.data, column.split, column.token)
        assert (task["data"], task["split"], task["token"]) == expected, column.task
        assert set(column.metrics) <= set(task["metrics"]), column.task
        assert (column.metrics == ("submission",)) == (column.needs == "submission"), column.task
        assert (column.needs == "judge") == bool(column.judge_failure) == bool(column.judge_url), column.task
        if column.judge_failure:
            assert column.judge_failure in task["texts"], column.task
            has_endpoint = '"https://api.openai.com/v1/chat/completions"' in task["texts"]
            assert has_endpoint == (column.judge_url == "endpoint"), column.task


def pope_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """A data set with the columns of POPE, as its publisher keeps it on the hub."""
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), "string")
    features = [{"name": name, "dtype": kind} for name, kind in {**columns, "image": "image"}.items()]
    info = {
        "dataset_info": {"features": features, "splits": [{"name": "test", "num_examples": len(rows)}]},
        "configs": [{"config_name": "default", "data_files": [{"split": "test", "path": "data/test-*"}]}],
    }
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    card = f"---\n{yaml.safe_dump(info)}---\n"
    return {"README.md": card.encode(), "data/test-00000-of-00001.parquet": table.getvalue()}


@pytest.mark.full
def test_a_column_runs_end_to_end(tmp_path: Path) -> None:
    """POPE of four questions from a hub on loopback: F1 is that of the answers that our own evaluation gets from stock
    transformers, and the model has learned some of them."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("the environment of lmms-eval is absent: scripts/lmms_eval.sh makes it at its first start")
    asked, ending = "Is there a cat in the image?", "Answer the question using a single word or phrase."
    truths = ("yes", "no", "yes", "yes")
    learned = learn(tmp_path / "learned", f"{asked}\n{ending}", truths)

    samples = [Sample(each.id, each.messages, each.images, f"shapes:{each.id}") for each in learned.samples]
    own = tmp_path / "own.json"
    store = tiny_store(tmp_path, "shapes", samples)
    assert main([str(learned.export), "--store", str(store), "--out", str(own)]) == 0
    lines = own.with_suffix(".answers.jsonl").read_text().splitlines()
    pairs = [(answer["answer"].lower(), answer["truth"]) for answer in map(json.loads, lines)]
    num_true = pairs.count(("yes", "yes"))
    precision = num_true / max(1, sum(given == "yes" for given, _ in pairs))
    recall = num_true / truths.count("yes")
    assert num_true >= 2

    rows = [
        {"id": str(n), "question_id": str(n), "question": asked, "answer": truths[n], "image_source": f"COCO_{n}"}
        | {"category": "random", "image": {"bytes": each.images[0], "path": f"{n}.png"}}
        for n, each in enumerate(learned.samples)
    ]
    hub = Hub()
    try:
        hub.add("datasets/lmms-lab-encoder/POPE", pope_files(rows), licence="mit")
        environment = client_environment(hub, tmp_path / "home")
        environment |= {"LLAVA_NEXT_CACHE": str(cache_root()), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}  # on a busy machine
        environment.pop("OPENAI_API_KEY", None)
        out = tmp_path / "suite.json"
        command = [sys.executable, "-m", "train.evaluate", str(learned.export), "--suite", "llava_next"]
        command += ["--columns", "pope,mm_vet", "--published", "vicuna_7b", "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    finally:
        hub.close()
    assert done.returncode == 0, done.stdout + done.stderr
    columns = json.loads(out.read_text())["columns"]
    pope = columns["pope"]
    assert (pope["state"], pope["num_questions"], pope["licence"]) == ("done", 4, "mit")
    assert pope["values"] == [pytest.approx(100 * 2 * precision * recall / (precision + recall))]
    assert columns["mm_vet"]["state"] == "skipped"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("POPE ")]
    assert f"{pope['values'][0] - 86.53:+.1f}" in line

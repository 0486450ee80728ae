"""lmms-eval loads an export and gives it the score of this project's evaluation."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from data_recipes.schema.sample import Sample
from llava_next.cache_root import cache_root
from tests.tiny import tiny_samples, tiny_store
from tests.train.evaluate.learned import learn

SCRIPT = Path(__file__).parents[2] / "scripts" / "lmms_eval.sh"
CACHE = cache_root()


@pytest.mark.full
def test_an_export_runs_in_lmms_eval(tmp_path: Path) -> None:
    """By the documented command, on a prepared source: three of four answers are right, as with stock `generate`."""
    if not (CACHE / "lmms_eval_env" / ".ready").is_file():
        pytest.skip("the environment of lmms-eval is absent: scripts/lmms_eval.sh makes it at its first start")
    learned = learn(tmp_path / "learned")
    shapes = [Sample(each.id, each.messages, each.images, f"shapes:{each.id}") for each in learned.samples]
    store = tiny_store(tmp_path, "shapes", [*shapes, *tiny_samples(2, pictures=False)])
    out = tmp_path / "out"
    command = [str(SCRIPT), str(learned.export), "--store", str(store), "--output_path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = out.rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["llava_next_store"]["exact_match,none"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs EXPORT and --tasks NAMES or --store STORE"),
        (["{tmp}", "--tasks", "mme"], "has no config.json"),
        (["{tmp}/model", "--store", "{tmp}"], "has no manifest.json"),
        (["{tmp}/model", "--task", "mme"], "unknown argument '--task'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_installed(tmp_path: Path, arguments: list[str], words: str) -> None:
    """One sentence and exit code 2."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    environment = {**os.environ, "LLAVA_NEXT_CACHE": str(tmp_path / "cache")}
    command = [str(SCRIPT), *(argument.format(tmp=tmp_path) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "cache").exists()

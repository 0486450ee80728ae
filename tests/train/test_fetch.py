"""`python -m train.fetch` through the hub's own client against a hub on loopback, and a run of what it fetched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.fetch.hub import HubFile
from llava_next.cache_root import cache_root
from tests.data_recipes import raw_folders
from tests.hub_server import TOKEN, ClientProcess, Ended, Fault, Hub, client_environment, running_hub
from tests.llava_next.models import pretrained
from train.config.compose import load
from train.config.schema import ConfigError
from train.fetch import select_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a tiny language model and of a tiny tower, by repository."""
    config = pretrained(tmp_path_factory.mktemp("parts"))
    folders = {"models/org/tiny-lm": config.language_model.path, "models/org/tiny-tower": config.vision_tower.path}
    return {
        source: {path.name: path.read_bytes() for path in Path(folder).iterdir()} for source, folder in folders.items()
    }


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, ClientProcess]]:
    """A hub and its client for all tests."""
    with running_hub(tmp_path_factory.mktemp("home")) as running:
        yield running


class Models:
    """The hub with both models, and the program."""

    def __init__(self, hub: Hub, client: ClientProcess) -> None:
        self.hub, self._client = hub, client
        self.cache = client.home / "hf" / "hub"

    def fetch(self, *arguments: str, token: str | None = None) -> Ended:
        """Runs the program."""
        ended = self._client.run("train.fetch", arguments, HF_TOKEN=token)
        assert TOKEN not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended

    def snapshot(self, name: str, commit: int = -1) -> Path:
        """The directory of a commit in the cache."""
        revision = list(self.hub.repositories[f"models/org/{name}"].commits)[commit]
        return self.cache / f"models--org--{name}" / "snapshots" / revision


@pytest.fixture
def models(servers: tuple[Hub, ClientProcess], parts: dict[str, dict[str, bytes]], request: Any) -> Models:
    """The models under names of this test, so that the cache has none of them."""
    hub, client = servers
    hub.repositories.clear()
    hub.faults, hub.requests = [], []
    more = {"README.md": b"card", "model.onnx": b"x", "pytorch_model.bin": b"x", "original/consolidated.00.pth": b"x"}
    for source, files in parts.items():
        hub.add(f"{source}-{request.node.name}", {**files, **more}, licence="mit")
    return Models(hub, client)


def names(models: Models) -> list[str]:
    """The ids of both models."""
    return [source.removeprefix("models/") for source in models.hub.repositories]


def test_models_are_shown_then_fetched_then_complete(models: Models, parts: Mapping[str, Any]) -> None:
    """Only what a run reads; a second time nothing is sent."""
    language_model, tower = names(models)
    shown = models.fetch(language_model, tower, "--dry-run")
    assert (shown.code, shown.stderr) == (0, "")
    assert "licence: mit" in shown.stdout
    assert models.hub.downloads() == []
    first = models.fetch(language_model, tower)
    assert first.code == 0, first.stderr
    for source, name in zip(parts, (language_model, tower), strict=True):
        folder = models.snapshot(name.removeprefix("org/"))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == parts[source]
        assert f"{name}: complete, in {folder}" in first.stdout
    before = len(models.hub.requests)
    again = models.fetch(language_model, tower)
    assert again.code == 0
    assert "all in the cache" in again.stdout
    assert models.hub.downloads(before) == []


def test_a_lock_file_repeats_a_fetch(models: Models, tmp_path: Path) -> None:
    """After the publisher has pushed another version, --locked fetches the first one, and fails for a file that is not
    the recorded one."""
    name = names(models)[1]
    short = name.removeprefix("org/")
    lock = str(tmp_path / "models.lock.json")
    assert models.fetch(name, "--lock", lock).code == 0
    recorded = json.loads(Path(lock).read_text())["files"]
    assert {values["revision"] for values in recorded.values()} == {models.snapshot(short).name}
    repository = models.hub.repositories[f"models/{name}"]
    repository.push({**next(iter(repository.commits.values())), "model.safetensors": b"newer"})
    assert models.fetch(name).code == 0
    assert (models.snapshot(short) / "model.safetensors").read_bytes() == b"newer"
    locked = models.fetch(name, "--locked", lock)
    assert locked.code == 0, locked.stderr
    assert f"{name}@{models.snapshot(short, 0).name}" in locked.stdout
    (models.snapshot(short, 0) / "model.safetensors").resolve().write_bytes(b"damaged")
    damaged = models.fetch(name, "--locked", lock)
    assert damaged.code == 1
    assert "model.safetensors is not as" in damaged.stderr
    assert models.fetch(name, "--locked", lock).code == 0


def test_wrong_content_is_removed_from_the_cache(models: Models) -> None:
    """The file is named, and the next fetch gets it."""
    name = names(models)[1]
    weights = models.hub.repositories[f"models/{name}"].commits
    right = next(iter(weights.values()))["model.safetensors"]
    models.hub.faults = [Fault("/storage/", content=right[::-1])]
    failed = models.fetch(name)
    assert failed.code == 1
    assert f"{name}/model.safetensors is not what is published" in failed.stderr
    assert models.fetch(name).code == 0
    assert (models.snapshot(name.removeprefix("org/")) / "model.safetensors").read_bytes() == right


def test_names_are_those_of_the_configuration(models: Models, tmp_path: Path) -> None:
    """A file of configs/model, a user's one first; what is neither such a file nor an id is refused with the names."""
    tower = names(models)[1]
    folder = tmp_path / "model" / "vision_tower"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"name: mine\npath: {tower}\n")
    assert models.fetch("mine", "--config-dir", str(tmp_path)).code == 0
    assert models.snapshot(tower.removeprefix("org/")).is_dir()
    unknown = models.fetch("vicuna_8b")
    assert unknown.code == 2
    assert "vicuna_7b" in unknown.stderr
    drawn = models.fetch("quickstart")
    assert drawn.code == 2
    assert "not the id of a model on the hub" in drawn.stderr
    absent = models.fetch("vicuna_7b", "clip_vit_l_336")
    assert absent.code == 2
    assert "models/lmsys/vicuna-7b-v1.5" in absent.stderr
    assert len(absent.stderr.splitlines()) == 1


def test_a_gated_model_needs_an_account(models: Models) -> None:
    """Refused in one sentence with its page before anything is fetched, and fetched with a token."""
    name = names(models)[0]
    models.hub.repositories[f"models/{name}"].gated = True
    assert "accept" in models.fetch(name, "--dry-run").stdout
    refused = models.fetch(*names(models))
    assert refused.code == 2
    assert f"{models.hub.url}/{name}" in refused.stderr
    assert models.hub.downloads() == []
    assert models.fetch(name, token=TOKEN).code == 0
    assert not any(each.headers.get("authorization") for each in models.hub.requests if each.server == "storage")


def test_one_form_of_the_weights_is_selected() -> None:
    """safetensors with its index where there are both, else torch's files; nothing from folders."""

    def selected(*paths: str) -> set[str]:
        return {file.path for file in select_files([HubFile(path, 1, None, None) for path in paths])}

    common = ("config.json", "tokenizer.model", "README.md", "a/config.json", "flax_model.msgpack", "merges.txt")
    read = {"config.json", "tokenizer.model", "merges.txt"}
    torch_files = (
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    )
    safe = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")
    assert selected(*common, *torch_files) == read | set(torch_files)
    assert selected(*common, *torch_files, *safe, "consolidated.safetensors") == read | set(safe)


def test_absent_parts_are_told_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once, with the command, although the stores are not there either."""
    monkeypatch.setenv("LLAVA_NEXT_MODELS", str(tmp_path))
    words = [f"model.{part}.path=org/absent-{part}" for part in ("language_model", "vision_tower")]
    with pytest.raises(ConfigError) as caught:
        load([*words, "name=a", "mixture=lcs_558k", "stage=align", f"data.store_root={tmp_path / 'none'}"])
    assert "python -m train.fetch org/absent-language_model org/absent-vision_tower" in str(caught.value)


@pytest.mark.full
def test_from_nothing_to_a_first_step(parts: Mapping[str, Mapping[str, bytes]], tmp_path: Path) -> None:
    """Data and models are fetched by name, the data is prepared, and a run whose parts are named by their ids trains,
    while the client is offline."""
    data = raw_folders.write_llava_parquet(tmp_path / "published")
    files = {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    configs = tmp_path / "configs"
    write = {
        "source/mine.yaml": {
            "reader": "llava_parquet",
            "root": "mine",
            "download": [{"hub": "datasets/org/data", "files": ["data/*.parquet"]}],
        },
        "mixture/mine.yaml": {"name": "mine", "seed": 0, "sources": {"mine": {"count": None}}},
        "model/language_model/mine.yaml": {"name": "mine", "path": "org/tiny-lm", "template": "chatml"},
        "model/vision_tower/mine.yaml": {"name": "mine", "path": "org/tiny-tower"},
    }
    for name, values in write.items():
        path = configs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
    hub = Hub()
    environment = client_environment(hub, tmp_path)
    # The compiled operators are those of the other tests.
    environment |= {"LLAVA_NEXT_CACHE": str(cache_root())}
    hub.add("datasets/org/data", files)
    for source, model_files in parts.items():
        hub.add(source, model_files)

    def run(*command: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    own = ("--config-dir", str(configs))
    train = ("train", *own, "model/language_model=mine", "model/vision_tower=mine", "mixture=mine", "stage=align")
    try:
        run("llava_next", "fetch", "--mixture", "mine", "--raw", "raw", *own)
        run("llava_next", "fetch", "mine", "org/tiny-tower", "--lock", "models.lock.json", *own)
    finally:
        hub.close()
    run("llava_next", "prepare", "--mixture", "mine", "--raw", "raw", "--stores", "stores", "--workers", "1", *own)
    run(
        *train,
        *("name=first", "data.store_root=stores", "data.workers=0", "data.length_workers=1", "device=cpu"),
        *("stage.batch_size=2", "max_steps=1", "timeout_s=60"),
        HF_HUB_OFFLINE="1",
    )
    folder = tmp_path / "outputs" / "first" / "align"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    recorded = yaml.safe_load((folder / "config.yaml").read_text())["model"]["language_model"]["path"]
    assert recorded.startswith(str(tmp_path / "hf" / "hub" / "models--org--tiny-lm"))
    assert os.listdir(tmp_path / "raw" / "mine" / "data") == ["train-00000-of-00001.parquet"]  # noqa: PTH208

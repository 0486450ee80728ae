"""Directories of models are found by path or hub id without the network, and what they lack is told before a run."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from llava_next.config import LanguageModelConfig, VisionTowerConfig
from llava_next.model_directory import (
    HubId,
    check_directories,
    find_model_directory,
    is_hub_snapshot,
    model_argument,
    parse_hub_id,
)
from tests.llava_next.models import pretrained

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two commits of one model, the first of which is main; the current folder is empty."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("LLAVA_NEXT_MODELS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    repository = folder / "models--org--tiny-1.5"
    for commit in COMMITS:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    return repository


@pytest.mark.parametrize("text", ["/models/a", "./a/b", "~/a/b", "a", "a/b/c", "a b/c", "../a/b", "a/b@", "${x}/b", ""])
def test_paths_are_no_ids(text: str) -> None:
    """An id has two parts, and none of the characters that begin a path."""
    assert parse_hub_id(text) is None
    assert find_model_directory(text) == text


def test_ids() -> None:
    """With and without a revision."""
    assert parse_hub_id("Qwen/Qwen2.5-7B-Instruct") == HubId("Qwen/Qwen2.5-7B-Instruct")
    assert parse_hub_id("org/tiny-1.5@refs/pr/1") == HubId("org/tiny-1.5", "refs/pr/1")
    assert str(HubId("org/tiny", "v2")) == "org/tiny@v2"


def test_an_id_is_found_in_order(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing path, then the folder of models, then the hub's cache at its main or the named commit."""
    assert find_model_directory("org/tiny-1.5") == str(cache / "snapshots" / COMMITS[0])
    assert find_model_directory(f"org/tiny-1.5@{COMMITS[1]}") == str(cache / "snapshots" / COMMITS[1])
    assert find_model_directory("org/other") == "org/other"
    assert is_hub_snapshot(Path(find_model_directory("org/tiny-1.5")))
    (tmp_path / "mine" / "tiny-1.5").mkdir(parents=True)
    monkeypatch.setenv("LLAVA_NEXT_MODELS", str(tmp_path / "mine"))
    assert find_model_directory("org/tiny-1.5") == str(tmp_path / "mine" / "tiny-1.5")
    assert find_model_directory(f"org/tiny-1.5@{COMMITS[1]}") == str(cache / "snapshots" / COMMITS[1])
    Path("org/tiny-1.5").mkdir(parents=True)
    assert find_model_directory("org/tiny-1.5") == "org/tiny-1.5"
    assert not is_hub_snapshot(Path("org/tiny-1.5"))


def test_a_snapshot_without_a_config_is_not_found(cache: Path) -> None:
    """Another program may have fetched a tokenizer only."""
    (cache / "snapshots" / COMMITS[0] / "config.json").unlink()
    assert find_model_directory("org/tiny-1.5") == "org/tiny-1.5"


def test_arguments_of_programs(cache: Path) -> None:
    """A path that does not exist is left to the program; an id that is not there is refused with the command."""
    assert model_argument("org/tiny-1.5") == cache / "snapshots" / COMMITS[0]
    assert model_argument("/none/such") == Path("/none/such")
    for text, part in (("org/other", r"`python -m train\.fetch org/other` fetches it"), (" ", "empty")):
        with pytest.raises(argparse.ArgumentTypeError, match=part):
            model_argument(text)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModelConfig, VisionTowerConfig]:
    """A tiny language model and a tiny tower with weights."""
    config = pretrained(tmp_path_factory.mktemp("parts"))
    return config.language_model, config.vision_tower


def problems(language: str, tower: str, *, weights: bool = True) -> str:
    """What is wrong with these directories."""
    return check_directories(
        [
            ("model.language_model.path", language, "language model", weights),
            ("model.language_model.path", language, "tokenizer", False),
            ("model.vision_tower.path", tower, "vision tower", weights),
        ]
    )


def test_complete_directories_have_no_problem(parts: tuple[LanguageModelConfig, VisionTowerConfig]) -> None:
    """With weights, and of the random parts of tests without."""
    assert problems(parts[0].path, parts[1].path) == ""


def test_everything_that_is_absent_is_told_at_once() -> None:
    """With one command for all ids; a path has no command, and the same problem is told once."""
    found = problems("org/other", "org/tower@v1")
    assert "python -m train.fetch org/other org/tower@v1" in found
    assert found.count("org/other is neither") == 1
    assert "\n" not in found
    plain = problems("/none/language", "/none/tower")
    assert "there is no folder /none/language" in plain
    assert "there is no folder /none/tower" in plain
    assert "train.fetch" not in plain


def test_an_incomplete_snapshot_is_fetched_by_its_id(cache: Path) -> None:
    """The config alone is in the cache."""
    (cache / "snapshots" / COMMITS[0] / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    found = problems(find_model_directory("org/tiny-1.5"), "org/tower")
    assert "no weights" in found
    assert "no tokenizer" in found
    assert "python -m train.fetch org/tiny-1.5 org/tower" in found


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _list_more_weights(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _keep_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*tok*"):
        path.unlink()


def _cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_remove_weights, "has a config.json but no weights"),
        (_list_more_weights, "lacks 1 of the files that model.safetensors.index.json lists"),
        (_keep_pointer, "is a git-lfs pointer, not the file itself"),
        (_remove_tokenizer, "has no tokenizer"),
        (_cut_config, "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
    ids=["weights", "shard", "pointer", "tokenizer", "json", "config"],
)
def test_what_a_directory_lacks_is_told(
    parts: tuple[LanguageModelConfig, VisionTowerConfig], tmp_path: Path, change: Callable[[Path], None], part: str
) -> None:
    """Each with the key of the part and the name of the file."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(parts[0].path).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    found = problems(str(folder), parts[1].path)
    assert part in found
    assert found.startswith("model.language_model.path: ")
    if change is _remove_weights:
        assert problems(str(folder), parts[1].path, weights=False) == ""


def test_the_other_kind_of_model_is_told(parts: tuple[LanguageModelConfig, VisionTowerConfig]) -> None:
    """A tower in place of a language model, and the reverse; a file in place of a folder."""
    swapped = problems(parts[1].path, parts[0].path)
    assert "contains a vision tower (model_type clip_vision_model), not a language model" in swapped
    assert "contains a language model (model_type llama), not a vision tower" in swapped
    assert "is a file, not a folder" in problems(f"{parts[0].path}/config.json", parts[1].path)

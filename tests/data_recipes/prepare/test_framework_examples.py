"""The example files of other frameworks are read without an unexplained rejection, and the program `guess` finds how.

`framework_examples.yaml` lists the files. They are fetched by name and never committed. Texts and images are compared
with those that the file has, read with `json` only.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from data_recipes.guess import __main__ as guess
from data_recipes.prepare import __main__ as prepare
from data_recipes.store.reader import Store
from llava_next.cache_root import cache_root
from tests.data_recipes.raw_folders import write_file

pytestmark = pytest.mark.full

REPOSITORIES = yaml.safe_load(Path(__file__).with_name("framework_examples.yaml").read_text())
EXAMPLES = [
    pytest.param(repository, example, id=f"{repository['repository']}/{example['path']}")
    for repository in REPOSITORIES
    for example in repository["examples"]
]
SERVER = "https://raw.githubusercontent.com"
TIMEOUT_S = 20
ROLES = {"human": "user", "gpt": "assistant"}
PROMPTS = ("instruction", "query", "toy_input")
ANSWERS = ("output", "response", "toy_output")
SYSTEM_PROMPTS = ("system", "system_prompt", "toy_system")

Turn = tuple[str, str]


@cache
def network_problem() -> str:
    """Say why the server cannot be reached; empty if it can."""
    try:
        requests.head(SERVER, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return type(error).__name__
    return ""


def download(url: str) -> tuple[bytes, str]:
    """Return the content at a URL and an empty text, or nothing and why the server did not send it."""
    problem = network_problem()
    if problem:
        return b"", problem
    try:
        response = requests.get(url, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return b"", type(error).__name__
    assert response.status_code != HTTPStatus.NOT_FOUND, url
    return (response.content, "") if response.ok else (b"", f"status {response.status_code}")


def fetch(repository: dict[str, Any], name: str, sha256: str) -> Path:
    """Return a file of a repository from the cache, or fetch it."""
    place = f"{repository['repository']}/{repository['commit']}/{name}"
    path = cache_root() / "framework_examples" / place
    if not path.is_file():
        content, problem = download(f"{SERVER}/{place}")
        if problem:
            pytest.skip(
                f"{path} is absent and {SERVER} is not reached ({problem}): copy {SERVER}/{place} there, or run "
                f"`pytest -m full {__file__}` with a network"
            )
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        write_file(partial, content)
        assert hashlib.sha256(content).hexdigest() == sha256, f"{partial} is not the file that is listed"
        partial.replace(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{path} has another content: remove it"
    return path


def fetch_example(repository: dict[str, Any], example: dict[str, Any]) -> tuple[Path, Path]:
    """Return the folder of a repository with the files of an example, and the example."""
    for name, sha256 in repository.get("files", {}).items():
        fetch(repository, name, sha256)
    path = fetch(repository, example["path"], example["sha256"])
    return path.parents[len(Path(example["path"]).parts) - 1], path


def write_source(workspace: Path, folder: Path, example: dict[str, Any]) -> None:
    """Write the source `given` with the reader and options of an example."""
    reader = example.get("reader", "messages_jsonl")
    source = {"reader": reader, "root": str(folder / example["root"]), "options": example["options"]}
    write_file(workspace / "source" / "given.yaml", yaml.safe_dump(source))


def run_prepare(workspace: Path, source: str) -> int:
    """Prepare a source, however many of its records are rejected; return the exit code."""
    folders = ["--raw", str(workspace), "--stores", str(workspace / "stores"), "--configs", str(workspace)]
    return prepare.main(["--source", source, "--max-rejects", "1", "--partial", "--workers", "1", *folders])


def load_records(path: Path) -> dict[int, Any]:
    """Return {number of the record or line: the record}."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return dict(enumerate(json.loads(text), start=1))
    return {number: json.loads(line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()}


def read_record(record: Any) -> tuple[list[Turn], list[str]]:
    """Return the turns of a record in any of the layouts, and the names of its images in their order."""
    if isinstance(record, list):
        return list(map(read_turn, record)), []
    images = record.get("images") or record.get("image") or []
    images = [images] if isinstance(images, str) else list(images)
    turns = [("system", record[key]) for key in SYSTEM_PROMPTS if record.get(key)]
    for turn in record.get("messages") or record.get("conversations") or []:
        turns.append(read_turn(turn))
        images += part_images(turn)
    for pair in record.get("conversation", []):
        turns += [("user", pair["human"]), ("assistant", pair["assistant"])]
    for question, answer in record.get("history") or []:
        turns += [("user", question), ("assistant", answer)]
    for prompt in [record[key] for key in PROMPTS if key in record]:
        more = record.get("input")
        turns.append(("user", f"{prompt}\n{more}" if more else prompt))
    turns += [("assistant", record[key]) for key in ANSWERS if key in record]
    return turns, images


def read_turn(turn: dict[str, Any]) -> Turn:
    """Return the role and the text of a turn, with `<image>` where an image belongs."""
    role = turn["role"] if "role" in turn else ROLES.get(turn["from"], turn["from"])
    content: Any = turn["content"] if "content" in turn else turn["value"]
    if not isinstance(content, list):
        return role, content
    texts = [part.get("text") or part["value"] if part["type"] == "text" else "<image>" for part in content]
    if any("<IMG_CONTEXT>" in text for text in texts):  # of xtuner: the text says where the images belong
        texts = [text.replace("<IMG_CONTEXT>", "<image>") for text in texts if text != "<image>"]
    return role, "\n".join(texts)


def part_images(turn: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the images in the parts of a turn."""
    content = turn.get("content")
    for part in content if isinstance(content, list) else []:
        if part["type"] in ("image", "image_url"):
            image = part.get(part["type"]) or part["value"]
            yield image["url"] if isinstance(image, dict) else image


def read_quarantine(workspace: Path, code: int) -> list[dict[str, Any]]:
    """Return the rejected records; they are beside the store if all are."""
    path = workspace / "stores" / ("given.quarantine.jsonl" if code else "given/quarantine.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("repository", "example"), EXAMPLES)
def test_example(
    repository: dict[str, Any], example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every record is a sample with the texts and images of the file, or is rejected for a reason that is listed."""
    folder, path = fetch_example(repository, example)
    write_source(tmp_path, folder, example)
    code = run_prepare(tmp_path, "given")
    if "refused" in example:
        assert (code, example["refused"] in capsys.readouterr().err) == (2, True)
        return
    assert code == (0 if example["num_samples"] else 1)
    rejected = read_quarantine(tmp_path, code)
    left = list(rejected)
    for listed in example.get("rejected", []):
        explained = [each for each in left if each["reason"] == listed["reason"] and listed["words"] in each["detail"]]
        assert len(explained) == listed["count"], listed
        left = [each for each in left if each not in explained]
    assert left == []

    numbers = {int(each["place"].rsplit(" ", 1)[1]) for each in rejected}
    expected = [read_record(each) for number, each in load_records(path).items() if number not in numbers]
    assert len(expected) == example["num_samples"]
    if expected:
        store = Store.open(tmp_path / "stores" / "given")
        samples = [store.sample(row) for row in range(len(store))]
        assert [[(turn.role, turn.text) for turn in sample.messages] for sample in samples] == [
            turns for turns, _ in expected
        ]
        images = folder / example["root"] / example["options"].get("image_root", ".")
        assert [sample.images for sample in samples] == [
            tuple((images / name).read_bytes() for name in names) for _, names in expected
        ]
        assert sorted(store.manifest["notes"]) == example.get("notes", [])
        assert store.manifest["repairs"] == example.get("repairs", {})


@pytest.mark.parametrize(("repository", "example"), EXAMPLES)
def test_guess(repository: dict[str, Any], example: dict[str, Any], tmp_path: Path) -> None:
    """The program proposes a reader and options that read the same samples, or none if there are no samples."""
    folder, path = fetch_example(repository, example)
    code = guess.main([str(path), "--write", str(tmp_path / "source" / "guessed.yaml")])
    if not example.get("num_samples") or "not_guessed" in example:
        assert code == 2
        return
    assert code == 0
    write_source(tmp_path, folder, example)
    for source in ("given", "guessed"):
        assert run_prepare(tmp_path, source) == 0
    given, guessed = (Store.open(tmp_path / "stores" / source) for source in ("given", "guessed"))
    assert guessed.fingerprint == given.fingerprint
    assert Counter(guessed.manifest["rejects"]) == Counter(given.manifest["rejects"])


def test_every_rejection_is_explained() -> None:
    """The list says for each reason what the records are, and names each file by its commit."""
    for repository in REPOSITORIES:
        assert len(repository["commit"]) == 40
        for example in repository["examples"]:
            assert ("refused" in example) != ("num_samples" in example)
            assert all(each["why"] and each["count"] > 0 for each in example.get("rejected", []))

"""`python -m train.export --push` through the hub's own client, to a hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from llava_next.config import ANYRES
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from llava_next.model_directory import find_hub_id
from tests.data_recipes.archive_files import files_of
from tests.hub_server import TOKEN, WRITABLE, ClientProcess, Ended, Fault, Hub, running_hub
from tests.tiny import tiny_model

NAME = f"{WRITABLE}/mine"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, ClientProcess]]:
    """A hub and a process with its client."""
    with running_hub(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    backbone = read_backbone(tiny_model(folder / "parts"))
    processor = backbone.processor(template=None, views=ANYRES, max_length=2048)
    write_hf(build_model(backbone, dtype=torch.float32, seed=1), backbone, processor, folder / "released")
    return folder / "released"


class Push:
    """The program with a hub that has no repositories."""

    def __init__(self, hub: Hub, client: ClientProcess, model: Path, out: Path) -> None:
        self.hub, self.out = hub, out
        self._client, self._model = client, model
        hub.repositories.clear()
        hub.faults, hub.requests = [], []

    def run(self, *options: str, token: str | None = TOKEN) -> Ended:
        """Exports the model with these options."""
        arguments = [str(self._model), "--out", str(self.out), *options]
        ended = self._client.run("train.export.__main__", arguments, HF_TOKEN=token)
        assert TOKEN not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended


@pytest.fixture
def push(servers: tuple[Hub, ClientProcess], model: Path, tmp_path: Path) -> Push:
    """The program for one test."""
    return Push(*servers, model, tmp_path / "out")


def test_the_directory_is_uploaded_to_a_private_repository(push: Push) -> None:
    """All files, in one commit; a second time in another commit of the same repository."""
    for number in (1, 2):
        ended = push.run("--push", NAME, "--licence", "apache-2.0")
        assert ended.code == 0, ended.stderr
        assert f"pushed it to {push.hub.url}/{NAME} (private)" in ended.stdout
        repository = push.hub.repositories[f"models/{NAME}"]
        assert repository.private
        assert len(repository.commits) == number
        assert list(repository.commits.values())[-1] == files_of(push.out)
    _, front, _ = (push.out / "README.md").read_text().split("---\n", 2)
    expected = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "apache-2.0"}
    assert expected.items() <= yaml.safe_load(front).items()


def test_the_id_of_a_base_model_is_that_of_its_directory(tmp_path: Path) -> None:
    """A directory of the hub's cache has one, others have none."""
    snapshot = tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / ("0" * 40)
    assert (find_hub_id(snapshot), find_hub_id(tmp_path)) == ("lmsys/vicuna-7b-v1.5", "")


def test_a_public_repository_is_asked_for(push: Push) -> None:
    """Everybody sees it only with --public, also where the repository exists already."""
    assert push.run("--push", NAME, "--public").code == 0
    assert not push.hub.repositories[f"models/{NAME}"].private
    refused = push.run("--push", NAME)
    assert refused.code == 2
    assert "is public; add --public" in refused.stderr
    assert len(push.hub.repositories[f"models/{NAME}"].commits) == 1


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        (("--push", "mine"), TOKEN, "ORG/NAME"),
        (("--push", f"{NAME}@main"), TOKEN, "ORG/NAME"),
        (("--push", NAME), None, "HF_TOKEN"),
        (("--public",), TOKEN, "--push"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    push: Push, options: tuple[str, ...], token: str | None, message: str
) -> None:
    """One sentence, exit code 2, no directory and no repository."""
    ended = push.run(*options, token=token)
    assert ended.code == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not push.out.exists()
    assert not push.hub.repositories


@pytest.mark.parametrize(
    ("repository", "faults", "message"),
    [
        ("others/mine", [], "may not write"),
        (NAME, [Fault("/commit/", method="POST", status=413)], "status 413"),
    ],
)
def test_a_refused_upload_leaves_the_directory(push: Push, repository: str, faults: list[Fault], message: str) -> None:
    """The export is complete, and one sentence says why it is not on the hub."""
    push.hub.faults = faults
    ended = push.run("--push", repository)
    assert ended.code == 2
    assert message in ended.stderr
    assert (push.out / "README.md").is_file()

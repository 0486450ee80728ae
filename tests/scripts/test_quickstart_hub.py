"""The tower of `quickstart.sh --hub`: fetched from a hub on this machine, checked, and loaded as the model's tower.

The real hub is never asked.
"""

import json
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_next.model.build import build_model, read_backbone
from tests.tiny import tiny_model
from train.config.compose import load

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "quickstart"))

import hub_tower
from package_downloads import AssetError, file_sha256


class _Hub(BaseHTTPRequestHandler):
    """Answers /REPOSITORY/resolve/REVISION/FILE as the model hub does, from a folder."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        start = f"/{hub_tower.REPOSITORY}/resolve/{hub_tower.REVISION}/"
        file = self._folder / self.path.removeprefix(start)
        if not self.path.startswith(start) or not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{file_sha256(file)}"')
        self.send_header("X-Repo-Commit", hub_tower.REVISION)
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """Nothing is logged."""


def _tower_overrides() -> list[str]:
    """What quickstart.sh adds to the commands of training."""
    script = (Path(__file__).parents[2] / "scripts" / "quickstart.sh").read_text()
    (words,) = re.findall(r"TOWER=\((model/.*?)\)", script, re.DOTALL)
    return shlex.split(words)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The files of a complete CLIP model, as the published one is, only narrow."""
    import transformers

    folder = tmp_path / "snapshot"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 100, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        vision_config={**vision, "image_size": 224, "patch_size": 16}, text_config=text, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    return folder


@pytest.fixture
def endpoint(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub with the snapshot, which may be asked although tests are offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, snapshot))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_tower_is_fetched_once_and_loaded(
    snapshot: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overrides of --hub find the fetched folder; the tower has 4 x 4 patches and the published weights."""
    monkeypatch.setattr(hub_tower, "WEIGHTS_SHA256", file_sha256(snapshot / "model.safetensors"))
    cache = tmp_path / "cache"
    folder = hub_tower.fetch(cache, endpoint)
    assert {path.name for path in folder.iterdir()} == {*hub_tower.FILES, "asset.json"}
    assert hub_tower.fetch(cache, "http://127.0.0.1:1") == folder  # a complete one needs no hub

    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(cache))
    config = load(["experiment=quickstart", "stage=align", "name=x", *_tower_overrides()], folders=False)
    tiny = tiny_model(tmp_path / "models")
    backbone = read_backbone(replace(tiny, vision_tower=config.model.vision_tower))
    assert (backbone.tile, backbone.patches_per_side) == (64, 4)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    published = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
    (fc1,) = [tensor for name, tensor in weights.items() if name.endswith("layers.0.mlp.fc1.weight")]
    assert torch.equal(fc1, published["vision_model.encoder.layers.0.mlp.fc1.weight"])


@pytest.mark.full  # the client retries for twenty seconds
def test_other_weights_and_a_hub_that_does_not_answer_leave_nothing(endpoint: str, tmp_path: Path) -> None:
    """The message says what to do, and no folder is left."""
    for address, words in ((endpoint, "is pinned in"), ("http://127.0.0.1:1", "run the quickstart without --hub")):
        with pytest.raises(AssetError, match=words):
            hub_tower.fetch(tmp_path / "cache", address)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]

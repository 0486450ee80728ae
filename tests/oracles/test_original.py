"""The authors' classes load our exports in their layout, and we load their checkpoints, with equal logits.

They run in the environment that ./scripts/oracles.sh makes (LLAVA_NEXT_CACHE, or ~/.cache/llava_next); without it the
tests are skipped. The other tests of the layout are in tests/llava_next/formats/test_original.py.
"""

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_recipes.schema.sample import Message
from llava_next.cache_root import cache_root
from llava_next.config import ANYRES
from llava_next.formats.hugging_face import published_tensors
from llava_next.formats.load_weights import load_weights
from llava_next.formats.original import original_model, write_original_folder
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from tests.oracles import our_model, tiny_model, tiny_runs
from tests.oracles.digests import IMAGE
from tests.tiny import encoded_picture

CACHE = cache_root()
PYTHON = CACHE / "oracle_env" / "bin" / "python"
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHON.exists(), reason="the authors' environment is absent: ./scripts/oracles.sh"),
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, LlavaNext]:
    """Our tiny model, with weights from their names."""
    torch.set_num_threads(1)
    return our_model.build(our_model.write_directories(tmp_path_factory.mktemp("ours")))


def _processor(backbone: Backbone) -> Processor:
    return backbone.processor(template="vicuna_v1", views=ANYRES, max_length=tiny_model.MAX_LENGTH)


def _examples(backbone: Backbone, folder: Path) -> list[Example]:
    """A question about an image of each size, and one about two images; inputs.json is input of the authors' side."""
    examples, cases = [], []
    for number, sizes in enumerate([*([size] for size in (*tiny_runs.SIZES_HW, (28, 56))), [(45, 61), (90, 31)]]):
        images = [encoded_picture(10 * number + i, size) for i, size in enumerate(sizes)]
        messages = [Message("user", "<image>\n" * len(sizes) + "Which?"), Message("assistant", "The red one.")]
        example = _processor(backbone).encode(messages, sizes, images)
        examples.append(example)
        files = [folder / f"{number}_{i}.png" for i in range(len(sizes))]
        for file, image in zip(files, images, strict=True):
            file.write_bytes(io.BytesIO(image).getvalue())
        cases.append({"ids": _narrowed(example), "pictures": [str(file) for file in files]})
    (folder / "inputs.json").write_text(json.dumps(cases))
    return examples


def _narrowed(example: Example) -> list[int]:
    """Ids with one IMAGE in place of the features of an image."""
    layout = example.layout
    ids, position, images = [], 0, iter(layout.images)
    while position < layout.num_tokens:
        is_image = layout.ids[position] == layout.image_token_id
        ids.append(IMAGE if is_image else int(layout.ids[position]))
        position += next(images).num_tokens if is_image else 1
    return ids


def _authors_logits(model: Path, folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    command = [str(PYTHON), "-W", "ignore", "-m", "tests.oracles.authors.logits", str(model)]
    command += [str(folder / "inputs.json"), str(folder / "logits.safetensors"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "logits.safetensors")


def _compare(backbone: Backbone, model: LlavaNext, examples: list[Example], authors: dict[str, torch.Tensor]) -> None:
    """At every supervised position, to 1e-5 of their norm."""
    for number, example in enumerate(examples):
        batch: Batch = collate([example], tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
        logits = authors[f"logits/{number}"]
        assert len(logits) == example.layout.num_tokens
        expected = logits[batch.target_positions]
        actual = model.target_logits(batch)[:, : expected.shape[1]]
        assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_authors_code_loads_our_export(ours: tuple[Backbone, LlavaNext], tmp_path: Path) -> None:
    """No tensor is missing or left over for their loader, the tower's are taken from the export, and on AnyRes pictures
    of every grid the logits are ours."""
    backbone, model = ours
    examples = _examples(backbone, tmp_path)
    original = original_model(backbone, _processor(backbone), str(tmp_path / "clip_tower"))
    (tmp_path / "export").mkdir()
    write_original_folder(published_tensors(model, backbone, ANYRES), original, tmp_path / "export")
    assert len({example.layout.images[0].grid for example in examples}) == len(backbone.config.grids)
    _compare(backbone, model, examples, _authors_logits(tmp_path / "export", tmp_path))


def test_we_load_what_the_authors_code_has_saved(ours: tuple[Backbone, LlavaNext], tmp_path: Path) -> None:
    """Sharded pickles with the tuned tower inside, as they publish them, into a model of other random weights."""
    backbone, _ = ours
    examples = _examples(backbone, tmp_path)
    authors = _authors_logits(tmp_path / "llava", tmp_path, "--write")
    assert len(list((tmp_path / "llava").glob("pytorch_model-*.bin"))) > 1
    fresh = build_model(backbone, dtype=torch.float32, seed=9)
    assert "in the authors' layout" in load_weights(fresh, backbone, tmp_path / "llava")
    _compare(backbone, fresh, examples, authors)
    assert np.isfinite(float(fresh.hf.model.image_newline.detach().sum()))

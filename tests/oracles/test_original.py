"""The authors' own classes load what we write in their layout, and we load what they write: the same logits.

Runs them in the environment that ./scripts/oracles.sh makes (LLAVA_NEXT_CACHE, or ~/.cache/llava_next); without it the
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
from llava_next.formats.hugging_face import published_tensors
from llava_next.formats.load import load_weights
from llava_next.formats.original import of_backbone, write_original_folder
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from scripts.oracles import our_model, tiny_model, tiny_runs
from scripts.oracles.digests import IMAGE
from tests.tiny import encoded_picture

CACHE = Path(os.environ.get("LLAVA_NEXT_CACHE", Path.home() / ".cache" / "llava_next"))
PYTHON = CACHE / "oracle_env" / "bin" / "python"
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHON.exists(), reason="the authors' environment is not here: ./scripts/oracles.sh"),
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, LlavaNext]:
    """Our tiny model, with weights from their names."""
    torch.set_num_threads(1)
    return our_model.build(our_model.write_directories(tmp_path_factory.mktemp("ours")))


def _processor(backbone: Backbone) -> Processor:
    return backbone.processor(template="vicuna_v1", image_mode="anyres", max_length=tiny_model.MAX_LENGTH)


def _examples(backbone: Backbone, folder: Path) -> list[Example]:
    """A question about a picture of each size, and one about two; inputs.json has what the authors' side is given."""
    examples, cases = [], []
    for number, sizes in enumerate([*([size] for size in (*tiny_runs.SIZES_HW, (28, 56))), [(45, 61), (90, 31)]]):
        pictures = [encoded_picture(10 * number + i, size) for i, size in enumerate(sizes)]
        messages = [Message("user", "<image>\n" * len(sizes) + "Which?"), Message("assistant", "The red one.")]
        example = _processor(backbone).encode(messages, sizes, pictures)
        examples.append(example)
        files = [folder / f"{number}_{i}.png" for i in range(len(sizes))]
        for file, picture in zip(files, pictures, strict=True):
            file.write_bytes(io.BytesIO(picture).getvalue())
        cases.append({"ids": _narrowed(example), "pictures": [str(file) for file in files]})
    (folder / "inputs.json").write_text(json.dumps(cases))
    return examples


def _narrowed(example: Example) -> list[int]:
    """One IMAGE where the features of a picture go."""
    layout = example.layout
    ids, position, images = [], 0, iter(layout.images)
    while position < layout.num_tokens:
        is_image = layout.ids[position] == layout.image_token_id
        ids.append(IMAGE if is_image else int(layout.ids[position]))
        position += next(images).num_tokens if is_image else 1
    return ids


def _theirs(model: Path, folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    command = [str(PYTHON), "-W", "ignore", "-m", "scripts.oracles.original_logits", str(model)]
    command += [str(folder / "inputs.json"), str(folder / "logits.safetensors"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "logits.safetensors")


def _compare(backbone: Backbone, model: LlavaNext, examples: list[Example], theirs: dict[str, torch.Tensor]) -> None:
    """At every supervised position, to 1e-5 of their norm."""
    for number, example in enumerate(examples):
        batch: Batch = collate([example], tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
        logits = theirs[f"logits/{number}"]
        assert len(logits) == example.layout.num_tokens
        wanted = logits[batch.target_positions]
        found = model.target_logits(batch)[:, : wanted.shape[1]]
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_the_authors_code_loads_our_export(ours: tuple[Backbone, LlavaNext], tmp_path: Path) -> None:
    """No tensor is missing or left over for their loader, the tower's are taken from the export, and on AnyRes pictures
    of every grid the logits are ours."""
    backbone, model = ours
    examples = _examples(backbone, tmp_path)
    original = of_backbone(backbone, _processor(backbone), str(tmp_path / "clip_tower"))
    (tmp_path / "export").mkdir()
    write_original_folder(published_tensors(model, backbone, "anyres"), original, tmp_path / "export")
    assert len({example.layout.images[0].grid for example in examples}) == len(backbone.config.grids)
    _compare(backbone, model, examples, _theirs(tmp_path / "export", tmp_path))


def test_we_load_what_the_authors_code_has_saved(ours: tuple[Backbone, LlavaNext], tmp_path: Path) -> None:
    """Sharded pickles with the tuned tower inside, as they publish them, into a model of other random weights."""
    backbone, _ = ours
    examples = _examples(backbone, tmp_path)
    theirs = _theirs(tmp_path / "llava", tmp_path, "--write")
    assert len(list((tmp_path / "llava").glob("pytorch_model-*.bin"))) > 1
    fresh = build_model(backbone, dtype=torch.float32, seed=9)
    assert "in the authors' layout" in load_weights(fresh, backbone, tmp_path / "llava")
    _compare(backbone, fresh, examples, theirs)
    assert np.isfinite(float(fresh.hf.model.image_newline.detach().sum()))

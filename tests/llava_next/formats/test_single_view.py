"""A model that was trained on single views (LLaVA-1.5): its export is a stock LLaVA that sees the same view, the same
tokens and the same logits, and comes back as what it was.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from data_recipes.schema.sample import Message
from llava_next.config import ImageMode, ModelError, ProjectorKind
from llava_next.formats.hugging_face import read_hf, stock_image_mode, write_hf
from llava_next.formats.load import load_weights
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import row
from tests.tiny import SIZES_HW, TowerName, encoded_picture

QUESTION = "What is in the picture?"
CASES: list[tuple[TowerName, ImageMode, ProjectorKind]] = [
    ("clip", "pad", "mlp2x_gelu"),
    ("clip", "square", "linear"),
    ("siglip", "pad", "linear"),
    ("siglip", "square", "mlp2x_gelu"),
    ("siglip", "squash", "mlp2x_gelu"),
    ("clip", "squash", "linear"),
    ("dinov2", "pad", "mlp2x_gelu"),
]
cases = pytest.mark.parametrize(("tower", "mode", "kind"), CASES)


def _written(
    make_backbone: MakeBackbone, folder: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> tuple[Backbone, Processor, LlavaNext]:
    backbone = make_backbone(tower, projector=kind)
    processor = backbone.processor(template=None, image_mode=mode, max_length=256)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    write_hf(model, backbone, processor, folder)
    return backbone, processor, model


def _example(processor: Processor, number: int) -> tuple[Example, bytes]:
    messages = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "A red circle.")]
    size = SIZES_HW[number]
    picture = encoded_picture(number, size)
    return processor.encode(messages, [size], [picture]), picture


@cases
def test_the_stock_model_sees_what_training_saw(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """Loaded whole by stock transformers, with its processor: the prompt's ids, the pixels (to rounding of the
    normalisation) and the logits of every supervised token, for wide, tall and small pictures."""
    _, processor, model = _written(make_backbone, tmp_path / "export", tower, mode, kind)
    stock, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(stock) is LlavaForConditionalGeneration
    assert [problem for problem in found.values() if problem] == []
    theirs = AutoProcessor.from_pretrained(tmp_path / "export")
    assert type(theirs) is LlavaProcessor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = theirs.apply_chat_template([turn], add_generation_prompt=True)
    for number, size in enumerate(SIZES_HW):
        example, picture = _example(processor, number)
        inputs = theirs(images=Image.open(io.BytesIO(picture)), text=text, return_tensors="pt")
        ours, _ = processor.prompt([Message("user", f"<image>\n{QUESTION}")], [size])
        assert inputs["input_ids"][0].tolist() == ours.tolist(), size
        pixels = torch.from_numpy(example.tiles).permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
        torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=1e-5, atol=1e-5)
        batch = row(make_backbone(tower), [example])
        ids = torch.from_numpy(example.layout.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = stock(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, batch.target_positions]
            states, head = model._target_states(batch)
        torch.testing.assert_close(states @ head.T, logits, rtol=1e-5, atol=1e-6)


THIN_HW = [(1, 9), (9, 1), (3, 40), (500, 20)]
"""Where transformers guesses the channels of an array from its shape; it must not with an image."""


@pytest.mark.parametrize("size", [*SIZES_HW, *THIN_HW])
def test_the_stock_processor_squashes_alike(make_backbone: MakeBackbone, tmp_path: Path, size: tuple[int, int]) -> None:
    """The exported processor resizes the whole image to a square: equal bytes, before it normalises them."""
    _, processor, _ = _written(make_backbone, tmp_path / "export", "siglip", "squash", "mlp2x_gelu")
    theirs = AutoProcessor.from_pretrained(tmp_path / "export").image_processor
    picture = encoded_picture(3, size)
    messages = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "A red circle.")]
    tiles = processor.encode(messages, [size], [picture]).tiles
    image = Image.open(io.BytesIO(picture))
    plain = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tiles, np.asarray(plain).transpose(0, 2, 3, 1))


@cases
def test_the_image_mode_is_read_from_the_directory(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """What a directory's processor does names the image mode that it was written for."""
    _written(make_backbone, tmp_path / "export", tower, mode, kind)
    images = AutoProcessor.from_pretrained(tmp_path / "export").image_processor
    assert stock_image_mode("llava", images, tmp_path) == mode


def test_published_image_processors_have_an_image_mode() -> None:
    """CLIP's crops the centre and SigLIP's resizes to a square, as in published LLaVA directories; a crop of a squashed
    image, or a view that is no square, is refused with its sizes."""
    square = {"height": 28, "width": 28}
    assert stock_image_mode("llava", SiglipImageProcessorPil(size=square), Path("there")) == "squash"
    assert stock_image_mode("llava", CLIPImageProcessorPil(size={"shortest_edge": 28}), Path("there")) == "square"
    same = LlavaImageProcessorPil(size=square, crop_size=square)
    assert stock_image_mode("llava", same, Path("there")) == "squash"
    for size, crop in ((square, {"height": 14, "width": 14}), ({"height": 28, "width": 42}, None)):
        odd = LlavaImageProcessorPil(size=size, crop_size=crop, do_center_crop=crop is not None)
        with pytest.raises(ModelError, match=r"there: .*28 x (28|42) and crops to (14 x 14|28 x 42)"):
            stock_image_mode("llava", odd, Path("there"))


@cases
def test_it_comes_back_as_what_it_was(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """By itself (read_hf) and into a fresh model (load_weights, which says that the newline stays fresh): the same
    tensors, the same loss, the same kind of projector, the same grids. Writing left the live model as it was."""
    backbone, processor, model = _written(make_backbone, tmp_path / "export", tower, mode, kind)
    example, _ = _example(processor, 1)
    batch = row(backbone, [example])
    expected = {name: parameter.detach() for name, parameter in live_parameters(model)}
    found, read = read_hf(tmp_path / "export", backbone.config)
    assert found.config == backbone.config
    assert (found.tile, found.patches_per_side) == (backbone.tile, backbone.patches_per_side)
    fresh = build_model(make_backbone(tower, projector=kind), dtype=torch.float32, seed=7)
    newline = fresh.hf.model.image_newline.detach().clone()
    assert "a LLaVA has no image_newline, which starts fresh" in load_weights(fresh, backbone, tmp_path / "export")
    with torch.no_grad():
        unwritten = build_model(make_backbone(tower, projector=kind), dtype=torch.float32, seed=0)(batch)[0]
        for other in (model, read, fresh):
            torch.testing.assert_close(other(batch)[0], unwritten)
    for name, parameter in live_parameters(fresh):
        assert torch.equal(parameter, newline if "image_newline" in name else expected[name]), name


def test_its_directory_is_a_published_llavas(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Names, configuration and image processor as the published LLaVA-1.5 directories have them."""
    _written(make_backbone, tmp_path / "export", "clip", "pad", "mlp2x_gelu")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert "image_grid_pinpoints" not in config
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "image_newline" not in names
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
    } <= names
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    assert processor.image_processor.do_pad

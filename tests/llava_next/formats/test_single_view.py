"""Models trained on single views (LLaVA-1.5): the export is a stock LLaVA with the same view, tokens and logits, and
round trips are exact."""

import io
import json
from functools import partial
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from data_recipes.schema.sample import Message
from llava_next.config import ImageMode, ModelError, ProjectorKind, ViewsConfig
from llava_next.formats.hugging_face import read_hf, stock_views, write_hf
from llava_next.formats.load_weights import load_weights
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import row
from tests.tiny import SIZES_HW, TowerName, encode_noise_image

QUESTION = "What is in the picture?"
CASES: list[tuple[TowerName, ImageMode, ProjectorKind]] = [
    ("clip", "pad", "mlp2x_gelu"),
    ("clip", "crop", "linear"),
    ("siglip", "pad", "linear"),
    ("siglip", "crop", "mlp2x_gelu"),
    ("siglip", "squash", "mlp2x_gelu"),
    ("clip", "squash", "linear"),
    ("dinov2", "pad", "mlp2x_gelu"),
]
cases = pytest.mark.parametrize(("tower", "mode", "kind"), CASES)


def _written(
    make_backbone: MakeBackbone, folder: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> tuple[Backbone, Processor, LlavaNext]:
    backbone = make_backbone(tower, projector=kind)
    processor = backbone.processor(template=None, views=ViewsConfig(mode, mode), max_length=256)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    write_hf(model, backbone, processor, folder)
    return backbone, processor, model


def _example(processor: Processor, number: int) -> tuple[Example, bytes]:
    messages = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "A red circle.")]
    size = SIZES_HW[number]
    encoded = encode_noise_image(number, size)
    return processor.encode(messages, [size], [encoded]), encoded


@cases
def test_stock_model_has_the_inputs_of_training(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """Stock transformers and its processor give the prompt's ids, the pixels (up to rounding in the normalization) and
    the logits of every supervised token, for wide, tall and small images."""
    _, processor, model = _written(make_backbone, tmp_path / "export", tower, mode, kind)
    stock, loading_info = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(stock) is LlavaForConditionalGeneration
    assert [problem for problem in loading_info.values() if problem] == []
    stock_processor = AutoProcessor.from_pretrained(tmp_path / "export")
    assert type(stock_processor) is LlavaProcessor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = stock_processor.apply_chat_template([turn], add_generation_prompt=True)
    for number, size in enumerate(SIZES_HW):
        example, encoded = _example(processor, number)
        inputs = stock_processor(images=Image.open(io.BytesIO(encoded)), text=text, return_tensors="pt")
        actual, _ = processor.prompt([Message("user", f"<image>\n{QUESTION}")], [size])
        assert inputs["input_ids"][0].tolist() == actual.tolist(), size
        pixels = torch.from_numpy(example.tiles).permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
        torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=1e-5, atol=1e-5)
        batch = row(make_backbone(tower), [example])
        ids = torch.from_numpy(example.layout.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = stock(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, batch.target_positions]
        torch.testing.assert_close(model.target_logits(batch), logits, rtol=1e-5, atol=1e-6)


THIN_HW = [(1, 9), (9, 1), (3, 40), (500, 20)]
"""Sizes for which transformers infers a wrong channel dimension from an array, but not from an image."""


@pytest.mark.parametrize("size", [*SIZES_HW, *THIN_HW])
def test_stock_processor_squashes_identically(
    make_backbone: MakeBackbone, tmp_path: Path, size: tuple[int, int]
) -> None:
    """The exported processor resizes the entire image to a square with bitwise equal pixels before normalization."""
    _, processor, _ = _written(make_backbone, tmp_path / "export", "siglip", "squash", "mlp2x_gelu")
    image_processor = AutoProcessor.from_pretrained(tmp_path / "export").image_processor
    encoded = encode_noise_image(3, size)
    messages = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "A red circle.")]
    tiles = processor.encode(messages, [size], [encoded]).tiles
    image = Image.open(io.BytesIO(encoded))
    pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tiles, np.asarray(pixels).transpose(0, 2, 3, 1))


@cases
def test_image_mode_is_read_from_the_directory(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """The directory's processor gives the image mode that it was written for."""
    _written(make_backbone, tmp_path / "export", tower, mode, kind)
    images = AutoProcessor.from_pretrained(tmp_path / "export").image_processor
    assert stock_views(LlavaConfig(), images, tmp_path) == ViewsConfig(mode, mode)


def test_published_image_processors_have_an_image_mode() -> None:
    """CLIP's processor crops the center and SigLIP's resizes to a square. A crop of a squashed image and a view that is
    not square are errors."""
    square = {"height": 28, "width": 28}
    views = partial(stock_views, LlavaConfig(), source=Path("there"))
    assert views(SiglipImageProcessorPil(size=square)).single == "squash"
    assert views(CLIPImageProcessorPil(size={"shortest_edge": 28})).single == "crop"
    assert views(LlavaImageProcessorPil(size=square, crop_size=square)).single == "squash"
    for size, crop in ((square, {"height": 14, "width": 14}), ({"height": 28, "width": 42}, None)):
        odd = LlavaImageProcessorPil(size=size, crop_size=crop, do_center_crop=crop is not None)
        with pytest.raises(ModelError, match=r"there: .*28 x (28|42) and crops to (14 x 14|28 x 42)"):
            views(odd)


@cases
def test_single_view_round_trip(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, mode: ImageMode, kind: ProjectorKind
) -> None:
    """`read_hf` and `load_weights`, which reports the newly initialized newline, give the same tensors, loss, projector
    and grids. Writing does not modify the model."""
    backbone, processor, model = _written(make_backbone, tmp_path / "export", tower, mode, kind)
    example, _ = _example(processor, 1)
    batch = row(backbone, [example])
    expected = {name: parameter.detach() for name, parameter in live_parameters(model)}
    reloaded, read_model = read_hf(tmp_path / "export", backbone.config)
    assert reloaded.config == backbone.config
    assert (reloaded.tile, reloaded.patches_per_side) == (backbone.tile, backbone.patches_per_side)
    fresh = build_model(make_backbone(tower, projector=kind), dtype=torch.float32, seed=7)
    newline = fresh.hf.model.image_newline.detach().clone()
    assert "a LLaVA has no image_newline, which is newly initialized" in load_weights(
        fresh, backbone, tmp_path / "export"
    )
    with torch.no_grad():
        unwritten = build_model(make_backbone(tower, projector=kind), dtype=torch.float32, seed=0)(batch)[0]
        for other in (model, read_model, fresh):
            torch.testing.assert_close(other(batch)[0], unwritten)
    for name, parameter in live_parameters(fresh):
        assert torch.equal(parameter, newline if "image_newline" in name else expected[name]), name


def test_directory_is_that_of_a_published_llava(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Names, config and image processor are those of the published LLaVA-1.5 directories."""
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

"""Models trained on OneVision's views: the export is a stock LLaVA-OneVision with the same views, tokens and logits for
single images and sets, and round trips are exact."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaOnevisionForConditionalGeneration

from data_recipes.schema.sample import Message
from llava_next.config import ModelError, ProjectorKind, ViewsConfig, stock_class
from llava_next.formats.hugging_face import read_hf, stock_views, write_hf
from llava_next.formats.load_weights import load_weights
from llava_next.formats.onevision import ImagesOnlyProcessor, load_processor
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import row, with_grids
from tests.tiny import TowerName, encode_noise_image

QUESTION = "What has changed?"
VIEWS = ViewsConfig("anyres_max_2", "pad", closing_newline=True)
GRIDS = tuple((rows, cols) for cols in range(1, 4) for rows in range(1, 4))
SETS = [[(100, 90)], [(45, 61), (90, 31)], [(20, 20)], [(28, 110)], [(61, 45), (20, 20), (100, 100)]]
CASES: list[tuple[TowerName, ProjectorKind]] = [("siglip", "mlp2x_gelu"), ("clip", "linear")]
cases = pytest.mark.parametrize(("tower", "kind"), CASES)


def _written(
    make_backbone: MakeBackbone, folder: Path, tower: TowerName, kind: ProjectorKind
) -> tuple[Backbone, Processor, LlavaNext]:
    backbone = with_grids(make_backbone(tower, projector=kind), GRIDS)
    processor = backbone.processor(template=None, views=VIEWS, max_length=512)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    write_hf(model, backbone, processor, folder)
    return backbone, processor, model


def _example(processor: Processor, sizes: Sequence[tuple[int, int]]) -> tuple[Example, list[Image.Image]]:
    images = [encode_noise_image(number, size) for number, size in enumerate(sizes)]
    question = Message("user", "<image>\n" * len(sizes) + QUESTION)
    example = processor.encode([question, Message("assistant", "A red circle.")], sizes, images)
    return example, [Image.open(io.BytesIO(image)) for image in images]


def _text(stock: ImagesOnlyProcessor, num_images: int) -> str:
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": QUESTION}]
    return str(stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


@cases
def test_stock_model_has_the_inputs_of_training(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, kind: ProjectorKind
) -> None:
    """Stock transformers gives the prompt's ids and the logits of every supervised token, for single images, reduced
    ones among them, and for sets."""
    backbone, processor, model = _written(make_backbone, tmp_path / "export", tower, kind)
    stock, loading_info = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(stock) is LlavaOnevisionForConditionalGeneration
    assert [problem for problem in loading_info.values() if problem] == []
    stock_processor = load_processor(tmp_path / "export")
    num_reduced = 0
    for sizes in SETS:
        example, images = _example(processor, sizes)
        num_reduced += sum(image.num_reduced > 0 for image in example.layout.images)
        inputs = stock_processor(images=[images], text=_text(stock_processor, len(sizes)), return_tensors="pt")
        prompt, _ = processor.prompt([Message("user", "<image>\n" * len(sizes) + QUESTION)], sizes)
        assert inputs["input_ids"][0].tolist() == prompt.tolist(), sizes
        batch = row(backbone, [example])
        ids = torch.from_numpy(example.layout.ids.astype(np.int64))[None]
        pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
        with torch.no_grad():
            logits = stock(input_ids=ids, **pixels).logits[0, batch.target_positions]
        torch.testing.assert_close(model.target_logits(batch), logits, rtol=1e-5, atol=1e-5)
    assert num_reduced > 0


@torch.no_grad()
def test_a_batch_equals_its_samples(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Greedy answers about a single image and about a set are the same alone and in one batch, padded on the left."""
    _, processor, _ = _written(make_backbone, tmp_path / "export", "siglip", "mlp2x_gelu")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    stock_processor = load_processor(tmp_path / "export")
    texts = [_text(stock_processor, len(sizes)) for sizes in SETS[:2]]
    images = [_example(processor, sizes)[1] for sizes in SETS[:2]]

    def answers(which: list[int]) -> list[list[int]]:
        chosen = [images[number] for number in which]
        inputs = stock_processor(
            images=chosen, text=[texts[number] for number in which], return_tensors="pt", padding=True
        )
        outputs = stock.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return outputs[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

    assert answers([0, 1]) == [*answers([0]), *answers([1])]


@cases
def test_round_trip(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, kind: ProjectorKind) -> None:
    """`read_hf` and `load_weights` give the same tensors, loss, projector and grids; the views are read back."""
    backbone, processor, model = _written(make_backbone, tmp_path / "export", tower, kind)
    batches = [row(backbone, [_example(processor, sizes)[0]]) for sizes in SETS]
    reloaded, read_model = read_hf(tmp_path / "export", backbone.config)
    assert reloaded.config == backbone.config
    assert (reloaded.tile, reloaded.patches_per_side) == (backbone.tile, backbone.patches_per_side)
    assert stock_views(AutoModelForImageTextToText.from_pretrained(tmp_path / "export").config, None, tmp_path) == VIEWS
    fresh = build_model(with_grids(make_backbone(tower, projector=kind), GRIDS), dtype=torch.float32, seed=7)
    load_weights(fresh, backbone, tmp_path / "export")
    with torch.no_grad():
        for other in (read_model, fresh):
            for batch in batches:
                torch.testing.assert_close(other(batch)[0], model(batch)[0])
    expected = dict(live_parameters(model))
    for name, parameter in live_parameters(fresh):
        assert torch.equal(parameter, expected[name]), name


def test_files_are_those_of_a_published_onevision(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Class names, the keys of the views, and a video processor with the tower's pixels for where torchvision is."""
    backbone, _, _ = _written(make_backbone, tmp_path / "export", "siglip", "mlp2x_gelu")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["model_type"] == "llava_onevision"
    assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
    assert config["vision_aspect_ratio"] == "anyres_max_2"
    assert config["image_grid_pinpoints"] == [[rows * backbone.tile, cols * backbone.tile] for rows, cols in GRIDS]
    saved = json.loads((tmp_path / "export" / "processor_config.json").read_text())
    assert saved["processor_class"] == "LlavaOnevisionProcessor"
    assert saved["num_image_tokens"] == backbone.patches_per_side**2
    videos, mean = saved["video_processor"], list(backbone.config.vision_tower.image_mean)
    assert videos["size"] == {"height": backbone.tile, "width": backbone.tile}
    assert (videos["image_mean"], saved["image_processor"]["image_mean"]) == (mean, mean)


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (ViewsConfig("anyres", "anyres"), "llava_next"),
        (ViewsConfig("anyres"), "llava_next"),
        *((ViewsConfig(mode, mode), "llava") for mode in ("crop", "pad", "squash")),
        (ViewsConfig("anyres_max_9"), "llava_onevision"),
        (VIEWS, "llava_onevision"),
        (ViewsConfig("anyres_max_9", "pad"), None),
        (ViewsConfig("anyres_max_9", "squash", closing_newline=True), None),
        (ViewsConfig("anyres_max_9", "anyres_max_9"), None),
        (ViewsConfig("anyres", "pad", closing_newline=True), None),
        (ViewsConfig("anyres", "squash"), None),
        (ViewsConfig("pad", "pad", closing_newline=True), None),
    ],
)
def test_class_of_the_views(views: ViewsConfig, expected: str | None) -> None:
    """A class is chosen only if its processor makes exactly these views."""
    if expected is not None:
        assert stock_class(views) == expected
        return
    with pytest.raises(ModelError, match=r"^stage\.views=.* cannot be exported: .* or stage\.result=connector$"):
        stock_class(views)

"""Shared parts of the model's tests: encoded samples, stock models with the same weights, comparisons of gradients, and
pretrained parts on disk."""

import io
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, Grid, ModelConfig, ViewsConfig
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import Example
from llava_next.model.build import Backbone, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters, part_of
from tests.tiny import TowerName, encode_noise_image, tiny_model


@dataclass(frozen=True)
class Encoded:
    """An example and the encoded images that it was made from."""

    example: Example
    images: tuple[bytes, ...]


def encoded(
    backbone: Backbone,
    sizes_hw: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    rounds: int = 1,
    views: ViewsConfig = ANYRES,
) -> Encoded:
    """A conversation of `rounds` rounds whose first question has images of these sizes."""
    messages = []
    for turn in range(rounds):
        shown = "<image>\n" * len(sizes_hw) if turn == 0 else ""
        messages.append(Message("user", f"{shown}What is number {seed} in line {turn}?"))
        messages.append(Message("assistant", "It is " + " ".join("0123456789"[: 2 + (seed + turn) % 5]) + "."))
    images = tuple(encode_noise_image(100 * seed + i, size) for i, size in enumerate(sizes_hw))
    processor = backbone.processor(template=None, views=views, max_length=4096)
    return Encoded(processor.encode(messages, sizes_hw, images), images)


def mixed(backbone: Backbone) -> list[Encoded]:
    """Several samples: images with several grids, two images, text only, several rounds."""
    sizes: list[list[tuple[int, int]]] = [[(45, 61)], [], [(28, 90), (90, 31)], [(20, 20)], [], [(33, 140)]]
    return [encoded(backbone, each, seed=seed, rounds=1 + seed % 3) for seed, each in enumerate(sizes)]


def row(backbone: Backbone, examples: Sequence[Example], *, per_sample: bool = False) -> Batch:
    """Packs the examples into one row. Each is its own source, so that per-source sums are per-sample sums."""
    return collate(
        examples,
        tile=backbone.tile,
        patches_per_tile=backbone.patches_per_side**2,
        source_ids=range(len(examples)),
        per_sample=per_sample,
    )


def stock_twin(model: LlavaNext, backbone: Backbone) -> LlavaNextForConditionalGeneration:
    """A stock model, with the complete tower, and the same weights."""
    config = deepcopy(backbone.hf_config)
    config.text_config._attn_implementation = "sdpa"
    stock = LlavaNextForConditionalGeneration(config).to(model.hf.model.image_newline.dtype)
    state = {name.removeprefix("hf."): p.detach().clone() for name, p in live_parameters(model)}
    missing, unexpected = stock.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if missing:
        assert config.tie_word_embeddings
    return stock


def stock_inputs(backbone: Backbone, sample: Encoded) -> dict[str, torch.Tensor]:
    """The inputs of stock transformers for a sample: pixels of its processor, ids and labels of ours."""
    layout = sample.example.layout
    inputs = {
        "input_ids": torch.from_numpy(layout.ids.astype(np.int64))[None],
        "labels": torch.from_numpy(layout.labels.astype(np.int64))[None],
    }
    if sample.images:
        tower = backbone.config.vision_tower
        stock = LlavaNextImageProcessorPil(
            size={"shortest_edge": backbone.tile},
            crop_size={"height": backbone.tile, "width": backbone.tile},
            image_grid_pinpoints=backbone.hf_config.image_grid_pinpoints,
            image_mean=list(tower.image_mean),
            image_std=list(tower.image_std),
        )
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
        pixels = stock(images, return_tensors="pt")
        inputs |= {"pixel_values": pixels["pixel_values"], "image_sizes": pixels["image_sizes"]}
    return inputs


def stock_square_twin(model: LlavaNext, backbone: Backbone) -> LlavaForConditionalGeneration:
    """A stock LLaVA-1.5 with the same weights. It supports square images only and has no newline."""
    config = deepcopy(backbone.hf_config)
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_seq_length=config.image_seq_length,
        )
    ).to(model.hf.model.image_newline.dtype)
    state = {name.removeprefix("hf."): p.detach().clone() for name, p in live_parameters(model)}
    del state["model.image_newline"]
    stock.load_state_dict(state)
    return stock


def stock_square_inputs(backbone: Backbone, sample: Encoded) -> dict[str, torch.Tensor]:
    """The inputs of stock LLaVA-1.5 for a sample with cropped images: pixels of the stock CLIP processor, ids and
    labels of ours."""
    inputs = stock_inputs(backbone, replace(sample, images=()))
    tower, side = backbone.config.vision_tower, {"height": backbone.tile, "width": backbone.tile}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": backbone.tile},
        crop_size=side,
        image_mean=list(tower.image_mean),
        image_std=list(tower.image_std),
    )
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    return inputs | {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}


def with_grids(backbone: Backbone, grids: tuple[Grid, ...]) -> Backbone:
    """The backbone with other grids."""
    tile = backbone.tile
    backbone.hf_config.image_grid_pinpoints = [[rows * tile, cols * tile] for rows, cols in grids]
    return replace(backbone, config=replace(backbone.config, grids=grids))


def stock_onevision_twin(
    model: LlavaNext, backbone: Backbone, max_views: int
) -> LlavaOnevisionForConditionalGeneration:
    """A stock LLaVA-OneVision with the same weights and anyres_max_N, N = `max_views`."""
    config = deepcopy(backbone.hf_config)
    config.text_config._attn_implementation = "sdpa"
    stock = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_grid_pinpoints=config.image_grid_pinpoints,
            vision_aspect_ratio=f"anyres_max_{max_views}",
        )
    ).to(model.hf.model.image_newline.dtype)
    state = {name.removeprefix("hf."): p.detach().clone() for name, p in live_parameters(model)}
    stock.load_state_dict(state)
    return stock


def stock_onevision_inputs(backbone: Backbone, sample: Encoded) -> dict[str, torch.Tensor]:
    """The inputs of stock LLaVA-OneVision for a sample: pixels of its processor, ids and labels of ours.

    The images are a nested list, since the processor cuts each image of a flat list with AnyRes.
    """
    inputs = stock_inputs(backbone, replace(sample, images=()))
    if sample.images:
        tower = backbone.config.vision_tower
        stock = LlavaOnevisionImageProcessorPil(
            size={"height": backbone.tile, "width": backbone.tile},
            image_grid_pinpoints=backbone.hf_config.image_grid_pinpoints,
            image_mean=list(tower.image_mean),
            image_std=list(tower.image_std),
        )
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
        pixels = stock([images], return_tensors="pt")
        inputs |= {key: pixels[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    return inputs


def gradients(model: LlavaNext) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients by parameter name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def learned(model: LlavaNext, rows: Iterable[Batch]) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """The loss sum and the gradients of each row."""
    results = []
    for batch in rows:
        model.zero_grad()
        total, _, _ = model(batch)
        total.backward()
        results.append((float(total.detach()), gradients(model)))
    return results


def is_key_bias(name: str) -> bool:
    """Whether a parameter is a key bias of the tower, whose true gradient is zero because softmax is invariant to it.

    The key bias of a language model has a gradient, because keys are rotated by their positions.
    """
    return part_of(name) == "vision_tower" and name.endswith(("k_proj.bias", "key.bias"))


def worst_difference(
    actual: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], names: Iterable[str]
) -> float:
    """The largest relative difference (2-norm) over these tensors without key biases; None counts as zero."""
    worst = 0.0
    for name in names:
        if is_key_bias(name):
            continue
        a, b = actual[name], expected[name]
        if a is None or b is None:
            assert all(gradient is None or not gradient.any() for gradient in (a, b)), name
            continue
        scale = float(b.norm())
        difference = float((a - b).norm()) / scale if scale else float(a.norm())
        worst = max(worst, difference)
    return worst


def key_bias_share(gradients_by_name: dict[str, torch.Tensor | None]) -> float:
    """The largest gradient norm of a tower's key bias relative to its layer's query bias (0 if both are zero)."""
    worst = 0.0
    for name in filter(is_key_bias, gradients_by_name):
        key, query = (
            gradients_by_name[name],
            gradients_by_name[name.replace("k_proj", "q_proj").replace("key.", "query.")],
        )
        if key is not None and key.any():
            assert query is not None, name
            worst = max(worst, float(key.norm()) / float(query.norm()))
    return worst


def pretrained(folder: Path, tower: TowerName = "clip", **options: Any) -> ModelConfig:
    """A tiny model whose parts are on disk with weights; `options` are those of `tiny_model`."""
    config = tiny_model(folder, tower, **options)
    backbone = read_backbone(config)
    torch.manual_seed(11)
    vision = AutoModel.from_config(backbone.hf_config.vision_config)
    vision.save_pretrained(config.vision_tower.path)
    text = type(backbone.hf_config.text_config).from_pretrained(config.language_model.path)
    AutoModelForCausalLM.from_config(text).save_pretrained(config.language_model.path)
    return replace(
        config,
        language_model=replace(config.language_model, weights="pretrained"),
        vision_tower=replace(config.vision_tower, weights="pretrained"),
    )

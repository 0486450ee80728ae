"""The tiny model for the authors' code: directories for their classes, and their data set with AnyRes images.

Runs in the environment that scripts/oracles.sh makes. The released training code uses single views only;
`AnyResDataset` gives it tiles, image sizes and several images by functions of the package, as the released inference
code does.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llava.mm_utils import process_images  # type: ignore[import-not-found]
from llava.model.language_model.llava_llama import (  # type: ignore[import-not-found]
    LlavaConfig,
    LlavaLlamaForCausalLM,
)
from llava.train import train  # type: ignore[import-not-found]
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel  # type: ignore[import-not-found]

from tests.oracles import tiny_model, tiny_runs
from tests.oracles.authors.slow_tokenizers import write_sentencepiece


def write_directories(folder: Path) -> tuple[Path, Path]:
    """The tower's directory and that of a LLaVA checkpoint with tokenizer, ready for `from_pretrained`; both made."""
    tower_folder, model_folder = folder / "tower", folder / "llava"
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny_model.TOWER))
    _fill((f"vision_tower.{name}", parameter) for name, parameter in tower.named_parameters())
    tower.save_pretrained(tower_folder)
    side = tiny_model.TILE
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        tower_folder
    )
    config = LlavaConfig(
        **tiny_model.LANGUAGE_MODEL,
        mm_vision_tower=str(tower_folder),
        mm_hidden_size=tiny_model.TOWER["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad",
        mm_vision_select_layer=tiny_model.FEATURE_LAYER,
        image_grid_pinpoints=tiny_model.PINPOINTS_WH,
        image_aspect_ratio="anyres",
    )
    model = LlavaLlamaForCausalLM(config)
    _fill((tiny_model.published_name(name), parameter) for name, parameter in model.named_parameters())
    model.save_pretrained(model_folder)
    pieces = [*tiny_model.SPECIALS, *tiny_model.CHARACTERS]
    write_sentencepiece(
        model_folder / "tokenizer.model",
        [(piece, -float(row)) for row, piece in enumerate(pieces)],
        bytes_after_specials=False,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}  # as Vicuna's 1.5
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tower_folder, model_folder


@torch.no_grad()
def _fill(named: Any) -> None:
    for name, parameter in named:
        parameter.copy_(torch.from_numpy(tiny_model.weight(name, parameter.shape)))


class AnyResDataset(train.LazySupervisedDataset):  # type: ignore[misc]
    """Their records with `image` tensors [tiles, 3, S, S] and (width, height) of each image."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.list_data_dict[index]
        names = tiny_runs.image_names(record)
        source = [copy.deepcopy(record["conversations"])]
        if names:
            source = train.preprocess_multimodal(source, self.data_args)
        encoded = train.preprocess(source, self.tokenizer, has_image=bool(names))
        processor = self.data_args.image_processor
        shown = [train.Image.open(Path(self.data_args.image_folder, name)).convert("RGB") for name in names]
        if self.data_args.image_aspect_ratio == "anyres" and shown:
            images = list(process_images(shown, processor, self.data_args))
        else:
            images = [processor.preprocess(each, return_tensors="pt")["pixel_values"][0] for each in shown]
        if not images:  # as in their data set: a text-only sample has an empty image, of which no token is used
            images = [torch.zeros(3, tiny_model.TILE, tiny_model.TILE)]
        sizes = [each.size for each in shown] or [(tiny_model.TILE, tiny_model.TILE)]
        return {
            "input_ids": encoded["input_ids"][0],
            "labels": encoded["labels"][0],
            "images": images,
            "image_sizes": sizes,
        }


class AnyResCollator(train.DataCollatorForSupervisedDataset):  # type: ignore[misc]
    """Their collator for ids and labels; the images of all samples in one list, in the order of the model."""

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__([{key: each[key] for key in ("input_ids", "labels")} for each in instances])
        images = [image for each in instances for image in each["images"]]
        # A list means tiles to be merged; single views go in as one tensor, as their collator has them.
        batch["images"] = torch.stack(images) if all(image.ndim == 3 for image in images) else images
        batch["image_sizes"] = [size for each in instances for size in each["image_sizes"]]
        return dict(batch)

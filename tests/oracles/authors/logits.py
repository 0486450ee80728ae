"""Logits of a directory in the authors' layout, by the authors' own classes, for tests/oracles/test_original.py.

    python -m tests.oracles.authors.logits MODEL INPUTS OUT

Runs in the environment that scripts/oracles.sh makes. INPUTS is a JSON list of {"ids": [...], "pictures": [file, ...]},
ids with IMAGE in place of an image's features. OUT gets "logits/<number>", float32 [tokens, vocabulary] with every
image token, and "config/<key>" is compared by the model itself. `--write` makes MODEL first: the tiny model as the
authors' code saves it, tuned tower inside.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llava.mm_utils import process_images  # type: ignore[import-not-found]
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM  # type: ignore[import-not-found]
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel  # type: ignore[import-not-found]

from tests.oracles import tiny_model
from tests.oracles.authors.tiny_llava import write_directories


def write_tower(folder: Path) -> None:
    """A tower with weights of its own, random ones: those in the checkpoint must replace them."""
    CLIPVisionModel(CLIPVisionConfig(**tiny_model.TOWER)).save_pretrained(folder)
    side = tiny_model.TILE
    size = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)


def write_checkpoint(folder: Path) -> None:
    """The tiny model with the tuned tower inside, as `save_pretrained` of their code writes it."""
    _, made = write_directories(folder.with_name(folder.name + "_parts"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": True}))
    LlavaLlamaForCausalLM.from_pretrained(made).save_pretrained(folder, safe_serialization=False, max_shard_size="60KB")


def logits(model: Any, case: dict[str, Any]) -> torch.Tensor:
    """One sample's, [tokens, vocabulary]."""
    files = [Image.open(path).convert("RGB") for path in case["pictures"]]
    images = process_images(files, model.get_vision_tower().image_processor, model.config)
    outputs = model(
        input_ids=torch.tensor([case["ids"]]), images=list(images), image_sizes=[each.size for each in files]
    )
    assert isinstance(outputs.logits, torch.Tensor)
    return outputs.logits[0].contiguous()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        write_checkpoint(options.model)
    else:
        write_tower(Path(json.loads((options.model / "config.json").read_text())["mm_vision_tower"]))
    model, info = LlavaLlamaForCausalLM.from_pretrained(options.model, output_loading_info=True)
    problems = [key for key, value in info.items() if value]
    if problems:
        raise SystemExit(f"their loader finds {info}")
    cases = json.loads(options.inputs.read_text())
    with torch.no_grad():
        save_file({f"logits/{number}": logits(model.eval(), case) for number, case in enumerate(cases)}, options.out)


if __name__ == "__main__":
    main()

"""Generates the inputs of the checks: small models with a tokenizer, prepared stores, and their YAML files.

The number of samples depends on the number of ranks, so that the last step of the epoch has fewer samples than ranks.
The files have the formats of a real run; nothing is downloaded.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_recipes.schema.sample import Message, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.config import LanguageModelConfig, VisionTowerConfig

NUM_STEPS = 7
IMAGES, CHATS, WIDE = "accept_images", "accept_chats", "accept_wide"
"""Names of the sources: images with questions, text only, and large images for the speed phase."""
_SIZES_HW = ((20, 20), (31, 90), (90, 31), (56, 56), (45, 61), (61, 45), (28, 140), (40, 33))
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
_SENTENCES = (
    "You are a helpful language and vision assistant. Answer the questions.",
    "system\nuser\nassistant\n\nWhat colour is the square? Blue, and the triangle is green.",
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples in the equality checks.

    Attributes:
        batch_size: samples per step, except the last.
        last: samples in the last step; fewer than ranks if there are several.
    """

    batch_size: int
    last: int

    @property
    def num_samples(self) -> int:
        return self.batch_size * (NUM_STEPS - 1) + self.last


def compute_sizes(num_ranks: int) -> Sizes:
    """Returns sizes with about three samples per rank and step, and a last step for half of the ranks."""
    return Sizes(batch_size=max(8, 3 * num_ranks + 1), last=max(1, num_ranks // 2))


@dataclass(frozen=True)
class ModelSlice:
    """The model of the speed phase: a few blocks of a given width.

    Attributes:
        width, mlp, heads, layers: of the language model.
        tower_width, tower_layers: of the vision tower.
        tile, patch: sides in pixels.
        max_tokens: budget of a row.
        image_hw: size of the images in pixels.
        answer_words: length of the answers.
    """

    width: int
    mlp: int
    heads: int
    layers: int
    tower_width: int
    tower_layers: int
    tile: int
    patch: int
    max_tokens: int
    image_hw: tuple[int, int]
    answer_words: int


WIDE_SLICE = ModelSlice(4096, 11008, 32, 4, 1024, 6, 336, 14, 8192, (600, 900), 200)
"""Blocks with the width of Vicuna-7B, and a tower with that of CLIP ViT-L/14-336."""
NARROW_SLICE = ModelSlice(128, 344, 4, 2, 64, 2, 56, 14, 1024, (100, 150), 30)
"""For CPUs: tests the measurement only; its rates say nothing about a GPU."""


def write_inputs(folder: Path, num_ranks: int, model_slice: ModelSlice) -> None:
    """Writes models/, stores/ and configs/ into the folder."""
    sizes = compute_sizes(num_ranks)
    tiny = ModelSlice(32, 48, 4, 2, 24, 3, 28, 7, 0, (0, 0), 0)
    num_chats = sizes.num_samples // 4
    stores: dict[str, Sequence[Sample]] = {
        IMAGES: [_make_sample(number, shows_image=True) for number in range(sizes.num_samples - num_chats)],
        CHATS: [_make_sample(100_000 + number, shows_image=False) for number in range(num_chats)],
        WIDE: [_make_wide_sample(number, model_slice) for number in range(max(32, 4 * num_ranks))],
    }
    for name, samples in stores.items():
        write_store(folder / "stores" / name, SourceInfo(name=name, reader="messages_jsonl", root=name), samples)
    for name, shape in (("accept", tiny), ("accept_wide", model_slice)):
        _write_model(folder, name, shape)
    for name, sources in (("accept", (IMAGES, CHATS)), ("accept_wide", (WIDE,))):
        _write_yaml(folder, "mixture", name, {"name": name, "seed": 0, "sources": dict.fromkeys(sources)})


def _write_model(folder: Path, name: str, shape: ModelSlice) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig

    language, tower = folder / "models" / f"{name}_language_model", folder / "models" / f"{name}_vision_tower"
    _write_tokenizer(language)
    LlamaConfig(
        vocab_size=32_000 if shape.width >= 4096 else 520,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(4096, shape.max_tokens),
        tie_word_embeddings=False,
    ).save_pretrained(language)
    CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower_width // 64) if shape.tower_width >= 64 else 3,
        image_size=shape.tile,
        patch_size=shape.patch,
    ).save_pretrained(tower)
    language_model = LanguageModelConfig(name, str(language), "chatml", weights="random")
    _write_yaml(folder, "model/language_model", name, asdict(language_model))
    vision_tower = VisionTowerConfig(f"{name}_clip", str(tower), weights="random")
    _write_yaml(folder, "model/vision_tower", name, asdict(vision_tower))


def _write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer that is trained on two sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)


def _write_yaml(folder: Path, group: str, name: str, values: dict[str, Any]) -> None:
    path = folder / "configs" / group / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    path.write_text(yaml.safe_dump(plain))


def _make_sample(number: int, *, shows_image: bool) -> Sample:
    """Returns a sample whose answer length depends on the number; all texts differ."""
    images = (encode_noise_image(number, _SIZES_HW[number % len(_SIZES_HW)]),) if shows_image else ()
    words = " ".join(str((number * 7 + word) % 10) for word in range(1 + number % 12))
    question = Message("user", ("<image>\n" if images else "") + f"What is number {number}?")
    return Sample(f"{number:06d}", (question, Message("assistant", f"It is {words}.")), images, f"accept:{number}")


def _make_wide_sample(number: int, shape: ModelSlice) -> Sample:
    image = encode_noise_image(number, shape.image_hw, "JPEG")
    words = " ".join(str((number * 7 + word) % 10) for word in range(shape.answer_words))
    question = Message("user", f"<image>\nWhat is number {number}?")
    return Sample(f"{number:06d}", (question, Message("assistant", f"It is {words}.")), (image,), f"wide:{number}")


def encode_noise_image(seed: int, size_hw: tuple[int, int], file_format: str = "PNG") -> bytes:
    """Returns the bytes of an image of coarse coloured noise, which differ for each seed."""
    height, width = size_hw
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()

"""Tiny parts for the tests of `llava_next` and `train`: tokenizers, language models, vision towers, images, stores.

They are made within a second by the same classes as real ones: a tokenizer that transformers loads from disk,
directories with a `config.json`, prepared stores. Nothing is downloaded. torch is imported only where a model is built,
so that tests of the configuration stay fast.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.config import LanguageModelConfig, ModelConfig, VisionTowerConfig
from train.acceptance.generated_inputs import encode_noise_image as encode_noise_image

TowerName = Literal["clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2", "ijepa"]
TokenizerName = Literal["bytes", "metaspace"]

TILE = 28
PATCH = 7
PATCHES_PER_SIDE = TILE // PATCH
MAX_POSITIONS = 4096
WIDTH = 32
VISION_LAYERS = 3

SIZES_HW = ((20, 20), (31, 90), (90, 31), (56, 56), (45, 61), (61, 45), (28, 140), (40, 33))
"""(height, width) of tiny pictures: with 28-pixel tiles they choose all of the authors' five grids but (1, 2)."""

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

_SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle on a white page.",
    "You are a helpful language and vision assistant. Answer the questions.",
    "system\nuser\nassistant\n\nWhat colour is the square? Blue, and the triangle is green.",
    "[INST] Read the text. [/INST] The sign says: twenty-three metres.",
)


def tiny_tokenizer(folder: Path, kind: TokenizerName = "bytes", bos: str | None = "<s>") -> Path:
    """Trains a tokenizer and writes it as transformers reads it.

    Args:
        folder: is made.
        kind: `bytes` is byte-level BPE (GPT-2, Qwen, Llama-3); `metaspace` marks word beginnings with ▁ and
            falls back to bytes, as Llama's and Vicuna's sentencepiece does.
        bos: the beginning-of-sequence token; None for a tokenizer that has none (Qwen).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = list(SPECIAL_TOKENS)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        specials = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=517, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    if kind == "metaspace":  # as Llama's: trained on words (no piece spans a space), applied to whole texts
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        if bos is not None:  # and it opens a text with that token when it is asked for special tokens
            number = tokenizer.token_to_id(bos)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
            )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def tiny_language_model(
    folder: Path,
    *,
    kind: TokenizerName = "bytes",
    bos: str | None = "<s>",
    tied: bool = False,
    **changes: Any,
) -> Path:
    """A directory with the `config.json` of a two-layer Llama and a tokenizer; no weights.

    `changes` replace keys of its `LlamaConfig`.
    """
    from transformers import LlamaConfig

    tiny_tokenizer(folder, kind, bos)
    sizes = {
        "vocab_size": 520,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    LlamaConfig(**{**sizes, "tie_word_embeddings": tied, **changes}).save_pretrained(folder)
    return folder


def tiny_vision_tower(folder: Path, tower: TowerName = "clip") -> Path:
    """A directory with the `config.json` of a three-layer tower for tiles of 4 x 4 patches; no weights."""
    from transformers import (
        Aimv2VisionConfig,
        CLIPVisionConfig,
        Dinov2Config,
        Dinov2WithRegistersConfig,
        DINOv3ViTConfig,
        IJepaConfig,
        SiglipVisionConfig,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 3,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    config: Any
    match tower:
        case "clip":
            config = CLIPVisionConfig(intermediate_size=40, **sizes)
        case "siglip":
            config = SiglipVisionConfig(intermediate_size=40, **sizes)
        case "dinov2":
            config = Dinov2Config(mlp_ratio=2, **sizes)
        case "dinov2_with_registers":
            config = Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **sizes)
        case "dinov3":
            config = DINOv3ViTConfig(intermediate_size=40, num_register_tokens=4, **sizes)
        case "aimv2":
            config = Aimv2VisionConfig(intermediate_size=40, **sizes)
        case "ijepa":
            config = IJepaConfig(intermediate_size=40, **sizes)
    config.save_pretrained(folder)
    return folder


def tiny_model(
    folder: Path,
    tower: TowerName = "clip",
    template: str = "chatml",
    *,
    kind: TokenizerName = "bytes",
    tied: bool = False,
    **changes: Any,
) -> ModelConfig:
    """A model of random weights: a tiny Llama (width 32) behind a tiny tower, with the authors' five grids.

    `changes` replace keys of the `LlamaConfig`. A picture is at most 16 + 8 x 9 = 88 tokens and 5 tiles.
    """
    language_model = tiny_language_model(folder / "language_model", kind=kind, tied=tied, **changes)
    vision_tower = tiny_vision_tower(folder / tower, tower)
    return ModelConfig(
        language_model=LanguageModelConfig("tiny_llama", str(language_model), template, weights="random"),
        vision_tower=VisionTowerConfig(f"tiny_{tower}", str(vision_tower), weights="random"),
    )


encoded_picture = encode_noise_image


class HostilePickle:
    """Unpickled, it runs a command that makes a file: what a hostile file of weights does is the same, only worse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def tiny_samples(num_samples: int, *, pictures: bool = True, first: int = 0) -> list[Sample]:
    """Conversations of one to three rounds; with pictures, every fifth sample shows two of them.

    Sizes go through `SIZES_HW`, lengths of answers differ, and every text differs from every other.
    """
    samples = []
    for number in range(first, first + num_samples):
        shown: tuple[bytes, ...] = ()
        if pictures:
            count = 2 if number % 5 == 4 else 1
            shown = tuple(
                encoded_picture(1000 * number + i, SIZES_HW[(number + i) % len(SIZES_HW)]) for i in range(count)
            )
        messages = []
        for turn in range(1 + number % 3):
            places = "<image>" * len(shown) + "\n" if shown and turn == 0 else ""
            messages.append(Message("user", f"{places}What is number {number} in line {turn}?"))
            words = " ".join(str((number * 7 + word) % 10) for word in range(1 + (number + turn) % 6))
            messages.append(Message("assistant", f"It is {words}."))
        samples.append(Sample(f"{number:06d}", tuple(messages), shown, f"tiny:{number}"))
    return samples


def tiny_store(store_root: Path, name: str, samples: Sequence[Sample]) -> Path:
    """Prepares one source from samples, as `data_recipes.prepare` would; returns the store's folder."""
    path = store_root / name
    write_store(path, SourceInfo(name=name, reader="messages_jsonl", root=name), samples)
    return path


def tiny_mixture(folder: Path, num_samples: int, *, holdout: int = 0) -> tuple[MixtureConfig, Path]:
    """Two prepared sources, three quarters `tiny_pictures` and one quarter `tiny_chats` (text only).

    Returns:
        The mixture of all of their `num_samples` training samples, and the root of the stores. `holdout` more
        samples with pictures are held out.
    """
    store_root = folder / "stores"
    num_chats = num_samples // 4
    num_pictures = num_samples - num_chats + holdout
    tiny_store(store_root, "tiny_pictures", tiny_samples(num_pictures))
    sources = {"tiny_pictures": SourceShare(count=None, holdout=holdout)}
    if num_chats:
        tiny_store(store_root, "tiny_chats", tiny_samples(num_chats, pictures=False, first=100_000))
        sources["tiny_chats"] = SourceShare()
    return MixtureConfig("tiny", 0, sources), store_root

"""A tiny LLaVA-NeXT that is equal to the last bit in two environments: sizes, weights by name, a vocabulary.

Imported by the programs in authors/ and by ours. Weights are bytes of a hash times a power of two, so that they are
equal in every version of numpy and torch, and exact in fp16, to which the authors' program always converts its tower.
Tensors have their published Hugging Face names.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TILE, PATCH = 28, 7
PINPOINTS_WH = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
"""(width, height), in the order of the released configurations."""
FEATURE_LAYER = -2
MAX_LENGTH = 1024

TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
}
"""Keys of CLIPVisionConfig."""

SPECIALS = ("<unk>", "<s>", "</s>")
CHARACTERS = "▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-()<>/"
"""One piece each, after the specials. Both sides mark a space as ▁ and merge nothing; the fixtures of prompts test real
vocabularies."""

LANGUAGE_MODEL = {
    "vocab_size": 128,  # the pieces, one for our image token, and a few that nothing uses
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
"""Keys of LlamaConfig."""

_AUTHORS_PREFIXES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def published_name(authors: str) -> str:
    """The published Hugging Face name of a tensor of the authors' `LlavaLlamaForCausalLM`."""
    for prefix, published in _AUTHORS_PREFIXES:
        if authors.startswith(prefix):
            return published + authors.removeprefix(prefix)
    raise KeyError(authors)


def weight(name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """The tensor of this published name, float32: norms about one, biases small, matrices and tables about zero."""
    noise = np.frombuffer(hashlib.shake_256(name.encode()).digest(math.prod(shape)), np.uint8).astype(np.float32) - 128
    is_norm = "norm" in name and name.endswith(".weight")
    exponent = 10 if is_norm or name.endswith(".bias") else 9
    return (noise * np.float32(2.0**-exponent) + np.float32(is_norm)).reshape(tuple(shape))

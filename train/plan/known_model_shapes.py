"""The shapes of the language models and vision towers in configs/model, for planning without a download.

Each entry has the keys of the published config.json that determine the shapes; a directory on disk takes precedence. A
test builds each model on the meta device and compares the number of parameters with the published one.
"""

from typing import Any


def _decoder(model_type: str, vocabulary: int, width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen(vocabulary: int, width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict:
    return _decoder("qwen2", vocabulary, width, mlp, layers, heads, max_position_embeddings=32_768, **more)


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, tied: bool) -> dict:
    positions = {"max_position_embeddings": 40_960, "head_dim": 128, "num_key_value_heads": 8}
    return _decoder("qwen3", 151_936, width, mlp, layers, heads, tie_word_embeddings=tied, **positions)


def _llama3(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict:
    positions = {"max_position_embeddings": 131_072, "num_key_value_heads": 8}
    return _decoder("llama", 128_256, width, mlp, layers, heads, **positions, **more)


def _gemma3(width: int, mlp: int, layers: int) -> dict:
    attention = {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}
    positions = {"max_position_embeddings": 32_768}
    return _decoder("gemma3_text", 262_144, width, mlp, layers, 4, tie_word_embeddings=True, **attention, **positions)


def _tower(model_type: str, width: int, mlp: int, layers: int, heads: int, tile: int, act: str) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": tile,
        "patch_size": 14,
        "hidden_act": act,
    }


def _dinov2(width: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
        "mlp_ratio": 4,
    }


def _smollm2(width: int, mlp: int, layers: int, heads: int, key_value_heads: int) -> dict:
    positions = {"max_position_embeddings": 8192, "num_key_value_heads": key_value_heads}
    return _decoder("llama", 49_152, width, mlp, layers, heads, tie_word_embeddings=True, **positions)


_SMOLLM2_135M = _smollm2(576, 1536, 30, 9, 3)

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # lmsys/vicuna-7b-v1.5 and -13b-v1.5
    "vicuna_7b": _decoder("llama", 32_000, 4096, 11_008, 32, 32, max_position_embeddings=4096),
    "vicuna_13b": _decoder("llama", 32_000, 5120, 13_824, 40, 40, max_position_embeddings=4096),
    # mistralai/Mistral-7B-Instruct-v0.2
    "mistral_7b": _decoder(
        "mistral", 32_000, 4096, 14_336, 32, 32, num_key_value_heads=8, max_position_embeddings=32_768,
        sliding_window=None,
    ),
    # mistralai/Mistral-7B-Instruct-v0.3
    "mistral_7b_v0_3": _decoder(
        "mistral", 32_768, 4096, 14_336, 32, 32, num_key_value_heads=8, max_position_embeddings=32_768,
        sliding_window=None,
    ),
    # NousResearch/Nous-Hermes-2-Yi-34B
    "hermes_yi_34b": _decoder(
        "llama", 64_000, 7168, 20_480, 60, 56, num_key_value_heads=8, max_position_embeddings=4096
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama3_8b": _decoder("llama", 128_256, 4096, 14_336, 32, 32, num_key_value_heads=8, max_position_embeddings=8192),
    # Qwen/Qwen1.5-*-Chat, Qwen/Qwen2-*-Instruct
    "qwen1_5_0_5b": _qwen(151_936, 1024, 2816, 24, 16, tie_word_embeddings=True),
    "qwen1_5_7b": _qwen(151_936, 4096, 11_008, 32, 32),
    "qwen1_5_14b": _qwen(152_064, 5120, 13_696, 40, 40),
    "qwen1_5_32b": _qwen(152_064, 5120, 27_392, 64, 40, num_key_value_heads=8),
    "qwen1_5_72b": _qwen(152_064, 8192, 24_576, 80, 64),
    "qwen1_5_110b": _qwen(152_064, 8192, 49_152, 80, 64, num_key_value_heads=8),
    "qwen2_0_5b": _qwen(151_936, 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_7b": _qwen(152_064, 3584, 18_944, 28, 28, num_key_value_heads=4),
    # Qwen/Qwen2.5-*-Instruct
    "qwen2_5_0_5b": _qwen(151_936, 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_5_1_5b": _qwen(151_936, 1536, 8960, 28, 12, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_5_3b": _qwen(151_936, 2048, 11_008, 36, 16, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_5_7b": _qwen(152_064, 3584, 18_944, 28, 28, num_key_value_heads=4),
    "qwen2_5_14b": _qwen(152_064, 5120, 13_824, 48, 40, num_key_value_heads=8),
    "qwen2_5_32b": _qwen(152_064, 5120, 27_648, 64, 40, num_key_value_heads=8),
    "qwen2_5_72b": _qwen(152_064, 8192, 29_568, 80, 64, num_key_value_heads=8),
    # Qwen/Qwen3-*
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3_8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3_14b": _qwen3(5120, 17_408, 40, 40, tied=False),
    "qwen3_32b": _qwen3(5120, 25_600, 64, 64, tied=False),
    # meta-llama/Llama-3.1-8B-Instruct, Llama-3.2-1B-Instruct and -3B-Instruct
    "llama3_1_8b": _llama3(4096, 14_336, 32, 32),
    "llama3_2_1b": _llama3(2048, 8192, 16, 32, tie_word_embeddings=True),
    "llama3_2_3b": _llama3(3072, 8192, 28, 24, tie_word_embeddings=True),
    # google/gemma-3-270m-it and gemma-3-1b-it
    "gemma3_270m": _gemma3(640, 2048, 18),
    "gemma3_1b": _gemma3(1152, 6912, 26),
    # microsoft/Phi-4-mini-instruct
    "phi4_mini": _decoder(
        "phi3", 200_064, 3072, 8192, 32, 24, num_key_value_heads=8, max_position_embeddings=131_072,
        tie_word_embeddings=True, pad_token_id=199_999, sliding_window=262_144,
    ),
    # HuggingFaceTB/SmolLM2-*-Instruct, six layers of the 135M (scripts/quickstart/assets.py), and SmolLM3-3B
    "smollm2_135m": _SMOLLM2_135M,
    "smollm2_360m": _smollm2(960, 2560, 32, 15, 5),
    "smollm2_1_7b": _smollm2(2048, 8192, 24, 32, 32),
    "quickstart": {**_SMOLLM2_135M, "num_hidden_layers": 6},
    "smollm3_3b": _decoder(
        "smollm3", 128_256, 2048, 11_008, 36, 16, num_key_value_heads=4, max_position_embeddings=65_536,
        tie_word_embeddings=True,
    ),
}  # fmt: skip

VISION_TOWERS: dict[str, dict[str, Any]] = {
    # openai/clip-vit-large-patch14-336
    "clip_vit_l_336": _tower("clip_vision_model", 1024, 4096, 24, 16, 336, "quick_gelu"),
    # google/siglip-so400m-patch14-384 and siglip2-so400m-patch14-384
    "siglip_so400m_384": _tower("siglip_vision_model", 1152, 4304, 27, 16, 384, "gelu_pytorch_tanh"),
    "siglip2_so400m_384": _tower("siglip_vision_model", 1152, 4304, 27, 16, 384, "gelu_pytorch_tanh"),
    # facebook/dinov2-large, dinov2-with-registers-large and dinov2-small
    "dinov2_large": _dinov2(1024, 24, 16),
    "dinov2_registers_large": {
        **_dinov2(1024, 24, 16),
        "model_type": "dinov2_with_registers",
        "num_register_tokens": 4,
    },
    "dinov2_small_112": _dinov2(384, 12, 6),
    "dinov2_small_70": _dinov2(384, 12, 6),
    "dinov2_small_56": _dinov2(384, 12, 6),
}

_WITH_SPARE_ROWS = ("phi3", "qwen2", "qwen3")
"""Models whose embedding has more rows than their tokenizer has tokens, so that it does not grow by the image token."""


def count_tokens(shape: dict[str, Any]) -> int:
    """Returns the number of rows that the embedding needs, with the image token."""
    return int(shape["vocab_size"]) + (shape["model_type"] not in _WITH_SPARE_ROWS)

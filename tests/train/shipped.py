"""Tiny directories in place of those of the hub: the real tokenizers, configs with the published keys, random weights.

The configurations in configs/model/ read them by their own paths.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.oracles import real_tokenizers
from tests.tiny import MAX_POSITIONS, WIDTH

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
}
_QWEN = {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False}
_QWEN |= {"rope_theta": 1000000.0, "num_key_value_heads": 2}
_QWEN3 = {"model_type": "qwen3", "use_sliding_window": False, "rope_theta": 1000000.0, "num_key_value_heads": 2}
_QWEN3 |= {"head_dim": 16}  # unlike the others', not the width divided by the heads
_GEMMA3 = {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
_GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "rope_theta": 1000000.0}
_GEMMA3 |= {"rope_local_base_freq": 10000.0, "sliding_window": 24, "sliding_window_pattern": 2}
_PHI4 = {"model_type": "phi3", "num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": 262144}
_PHI4 |= {"partial_rotary_factor": 0.75, "rope_theta": 10000.0, "pad_token_id": 0}
_PHI4 |= {"original_max_position_embeddings": 2048, "hidden_size": 64}  # three eighths of a head's width are even
_PHI4 |= {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.1] * 6}}
_SMOLLM3 = {"model_type": "smollm3", "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5000000.0}
_SMOLLM3 |= {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "use_sliding_window": False}
_LLAMA3_1 = {"model_type": "llama", "rope_theta": 500000.0, "num_key_value_heads": 2}
_LLAMA3_1 |= {
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_type": "llama3",
    }
}


@dataclass(frozen=True)
class Family:
    """Language models of one class, tokenizer and template.

    Attributes:
        tokenizer: its name in `real_tokenizers`, of which some are stand-ins.
        config: what the published config.json has besides the sizes.
        members: the other configurations of the same family.
    """

    tokenizer: str
    config: dict[str, Any]
    members: tuple[str, ...] = ()


FAMILIES = {
    "vicuna_7b": Family("vicuna", {"model_type": "llama", "rope_scaling": None}, ("vicuna_13b",)),
    "hermes_yi_34b": Family("vicuna_chatml", {"model_type": "llama", "rope_theta": 5000000.0}),
    "llama3_8b": Family("llama3", {"model_type": "llama", "rope_theta": 500000.0, "num_key_value_heads": 2}),
    "mistral_7b": Family(
        "mistral",
        {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None, "num_key_value_heads": 2},
        ("mistral_7b_v0_3",),
    ),
    "qwen1_5_0_5b": Family("qwen", _QWEN | {"tie_word_embeddings": True}, ("qwen2_0_5b",)),
    "qwen2_7b": Family(
        "qwen",
        _QWEN,
        ("qwen1_5_7b", "qwen1_5_14b", "qwen1_5_32b", "qwen1_5_72b", "qwen1_5_110b"),
    ),
    "qwen2_5_0_5b": Family("qwen", _QWEN | {"tie_word_embeddings": True}, ("qwen2_5_1_5b", "qwen2_5_3b")),
    "qwen2_5_7b": Family("qwen", _QWEN, ("qwen2_5_14b", "qwen2_5_32b", "qwen2_5_72b")),
    "qwen3_8b": Family("qwen", _QWEN3, ("qwen3_14b", "qwen3_32b")),
    "qwen3_0_6b": Family("qwen", _QWEN3 | {"tie_word_embeddings": True}, ("qwen3_1_7b", "qwen3_4b")),
    "llama3_1_8b": Family("llama3", _LLAMA3_1),
    "llama3_2_1b": Family("llama3", _LLAMA3_1 | {"tie_word_embeddings": True}, ("llama3_2_3b",)),
    "gemma3_1b": Family("mistral_gemma", _GEMMA3, ("gemma3_270m",)),
    "phi4_mini": Family("qwen_phi", _PHI4),
    "smollm2_135m": Family(
        "smollm2",
        {"model_type": "llama", "tie_word_embeddings": True},
        ("quickstart", "smollm2_360m", "smollm2_1_7b"),
    ),
    "smollm3_3b": Family("llama3_chatml", _SMOLLM3),
}
"""By the configuration that is run; sizes of one family differ in numbers alone."""

TOWERS = {
    "clip_vit_l_336": (),
    "siglip_so400m_384": (),
    "siglip2_so400m_384": (),
    "dinov2_large": ("model.vision_tower.tile=28",),
    "dinov2_registers_large": ("model.vision_tower.tile=28",),
    "dinov2_small_70": (),
}
"""Towers that are run, and the overrides that go with the tiny directory; `dinov2_small_70` has its real weights."""


def write_language_model(name: str, root: Path) -> None:
    """The directory that configs/model/language_model/NAME.yaml reads, below `root`; skips without its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llava_next.formats.hugging_face import write_tokenizer_settings

    family = FAMILIES[name]
    tokenizer = real_tokenizers.tokenizer(family.tokenizer)
    folder = root / _directory("language_model", name)
    tokenizer.save_pretrained(folder)
    write_tokenizer_settings(folder, tokenizer)
    values = _SIZES | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | family.config
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))  # as published, not as transformers 5 writes it


def write_vision_tower(name: str, root: Path) -> None:
    """The directory that configs/model/vision_tower/NAME.yaml reads, below `root`."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipConfig,
        SiglipModel,
    )

    folder = root / _directory("vision_tower", name)
    torch.manual_seed(1)
    vision: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 7}
    text: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    narrow = {"intermediate_size": 40}
    images: dict[str, Any] = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    if name == "clip_vit_l_336":
        # As published, the directory describes and holds both of CLIP's towers.
        vision_config = vision | narrow | {"image_size": 28}
        CLIPModel(CLIPConfig(vision_config=vision_config, text_config=text | narrow)).save_pretrained(folder)
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        images |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}}
    elif name in ("siglip_so400m_384", "siglip2_so400m_384"):
        vision_config = vision | narrow | {"image_size": 31}  # like 384 and 14, the patch does not divide it
        SiglipModel(SiglipConfig(vision_config=vision_config, text_config=text | narrow)).save_pretrained(folder)
        mean = std = [0.5, 0.5, 0.5]
        images |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": 31, "width": 31}}
    elif name.endswith("large"):
        config = {**vision, "mlp_ratio": 2, "image_size": 42}
        if name == "dinov2_registers_large":
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config)).save_pretrained(folder)
        else:
            Dinov2Model(Dinov2Config(**config)).save_pretrained(folder)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        images |= {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 42}}
    else:
        folder.symlink_to(real_tokenizers.asset("dinov2_small"))
        return
    (folder / "preprocessor_config.json").write_text(json.dumps(images | {"image_mean": mean, "image_std": std}))


def _directory(kind: str, name: str) -> str:
    """The last part of a path or of an id on the hub, which is the folder's name in the folder of models."""
    path: str = yaml.safe_load((MODEL_CONFIGS / kind / f"{name}.yaml").read_text())["path"]
    return path.rpartition("/")[2]

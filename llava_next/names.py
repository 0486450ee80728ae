"""Tensor names: the live model's, the published Hugging Face layout's.

Only this file and `hf.py` know how tensors are called on disk. The published names are those of the released
checkpoints, which transformers, vLLM and TGI all read; what transformers 5 itself writes is not.
"""

_TOWERS_WITH_PREFIX = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Towers whose published checkpoints say `vision_tower.vision_model.`, which today's module tree leaves out."""


def published_name(live: str, tower_type: str) -> str:
    """The name in the published Hugging Face layout of a parameter of `LlavaNext` (`hf.model...`)."""
    tower = "vision_tower.vision_model." if tower_type in _TOWERS_WITH_PREFIX else "vision_tower."
    for prefix, published in (
        ("hf.model.vision_tower.vision_model.", tower),
        ("hf.model.vision_tower.", tower),
        ("hf.model.language_model.", "language_model.model."),
        ("hf.lm_head.", "language_model.lm_head."),
        ("hf.model.", ""),
    ):
        if live.startswith(prefix):
            return published + live.removeprefix(prefix)
    raise KeyError(live)

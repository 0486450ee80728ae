"""Tensor names: the live model's, the published Hugging Face layout's, the authors'.

Only this file, `hf.py` and `connector.py` know how tensors are called on disk. The published names are those of the
released checkpoints, which transformers, vLLM and TGI all read; what transformers 5 itself writes is not.
"""

from llava_next.config import ProjectorKind

_TOWERS_WITH_PREFIX = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Towers whose published checkpoints say `vision_tower.vision_model.`, which today's module tree leaves out."""

_LINEAR = ("hf.model.multi_modal_projector.weight", "hf.model.multi_modal_projector.bias")
"""A linear projector is one layer: in the published layout the first of two (see `hf.py`)."""

AUTHORS_PROJECTORS: dict[ProjectorKind, set[str]] = {
    "mlp2x_gelu": {f"mm_projector.{layer}.{tensor}" for layer in (0, 2) for tensor in ("weight", "bias")},
    "linear": {"mm_projector.weight", "mm_projector.bias"},
}
"""The tensors of the authors' projectors, without the prefix that their files vary."""


def published_name(live: str, tower_type: str) -> str:
    """The name in the published Hugging Face layout of a parameter of `LlavaNext` (`hf.model...`)."""
    tower = "vision_tower.vision_model." if tower_type in _TOWERS_WITH_PREFIX else "vision_tower."
    if live in _LINEAR:
        return live.removeprefix("hf.model.").replace("projector.", "projector.linear_1.")
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


def authors_name(connector: str) -> str:
    """The authors' name of a connector's tensor (`multi_modal_projector...`, `image_newline`), without prefix."""
    for ours, authors in (
        ("multi_modal_projector.linear_1.", "mm_projector.0."),
        ("multi_modal_projector.linear_2.", "mm_projector.2."),
        ("multi_modal_projector.", "mm_projector."),
    ):
        if connector.startswith(ours):
            return authors + connector.removeprefix(ours)
    return connector

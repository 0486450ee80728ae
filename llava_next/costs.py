"""FLOPs of a tile and of a token, from the sizes of a model.

Asked by packing (to balance ranks), the planner and the MFU. A multiply-add counts as two. Forward only; a trained
part's backward costs twice its forward, a frozen part's once when a gradient must pass through it.
"""

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PretrainedConfig

from llava_next.config import ProjectorKind


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of forward and backward: `tile` of a tile, `token` of a token, `pair` of a causal pair of tokens.

    A segment of n tokens costs n * token + n² / 2 * pair, plus its tiles.
    """

    tile: float
    token: float
    pair: float

    def of(self, num_tokens: float, num_tiles: float, squared_tokens: float) -> float:
        """FLOPs of samples with these sums; `squared_tokens` is the sum of their squared lengths."""
        return num_tiles * self.tile + num_tokens * self.token + squared_tokens / 2 * self.pair


def step_costs(
    vision: PretrainedConfig,
    language: PretrainedConfig,
    *,
    projector: ProjectorKind,
    num_vision_layers: int,
    trains_tower: bool,
    trains_language_model: bool,
    adapted: Collection[str] = (),
) -> StepCosts:
    """Costs of a micro-step's parts.

    Args:
        vision, language: the Hugging Face configs.
        projector: what joins them.
        num_vision_layers: layers that run (the tower is cut at its feature layer).
        trains_tower, trains_language_model: what gets weight gradients. The projector, always trained when the
            tower is, is in `tile`; the head, run at supervised positions only, is left out.
        adapted: of these, parts whose adapters alone get weight gradients, at a cost that is left out.
    """
    width, hidden = vision.hidden_size, language.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    mlp = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
    layer = patches * (8 * width * width + 4 * width * mlp) + 4 * patches * patches * width
    passes = 1 + (0 if not trains_tower else 1 if "vision_tower" in adapted else 2)
    tower = num_vision_layers * layer * passes
    projected = width * hidden + (hidden * hidden if projector == "mlp2x_gelu" else 0)

    heads = language.num_attention_heads
    head_width = getattr(language, "head_dim", None) or hidden // heads
    kv_heads = getattr(language, "num_key_value_heads", None) or heads
    block = 2 * hidden * head_width * (2 * heads + 2 * kv_heads) + 6 * hidden * language.intermediate_size
    backward = 3 if trains_language_model and "language_model" not in adapted else 2
    layers = language.num_hidden_layers
    return StepCosts(
        tile=float(tower + patches * 2 * projected * 3),
        token=float(layers * block * backward),
        pair=float(layers * 4 * heads * head_width * 3),
    )

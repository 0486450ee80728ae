"""FLOPs of a tile and of a token, from the sizes of a model.

Asked by packing (to balance ranks), the planner and the MFU. A multiply-add counts as two. Forward only; a trained
part's backward costs twice its forward, a frozen part's once when a gradient must pass through it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

from llava_next.config import ProjectorKind
from llava_next.model.towers import mlp_shape


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of forward and backward: `tile` of a tile, `token` of a token, `pair` of a causal pair of tokens, `target`
    of a supervised token besides (what of the last block runs at these alone, see `last_block.py`).

    A segment of n tokens costs n * token + n² / 2 * pair, plus its tiles and targets.
    """

    tile: float
    token: float
    pair: float
    target: float = 0.0

    def of(
        self, tokens: npt.NDArray[Any], tiles: npt.NDArray[Any], targets: npt.NDArray[Any]
    ) -> npt.NDArray[np.float64]:
        """FLOPs of samples, float64 [n], from their tokens, tiles and supervised tokens, [n] each."""
        lengths = tokens.astype(np.float64)
        return tiles * self.tile + lengths * self.token + lengths**2 / 2 * self.pair + targets * self.target


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
            tower is, is in `tile`; the head, run at supervised positions only, is left out. Attention is counted in
            every block, though on a CPU the last one's attends from supervised positions alone.
        adapted: of these, parts whose adapters alone get weight gradients, at a cost that is left out.
    """
    width, hidden = vision.hidden_size, language.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    mlp, matrices = mlp_shape(vision)
    layer = patches * (8 * width * width + 2 * matrices * width * mlp) + 4 * patches * patches * width
    passes = 1 + (0 if not trains_tower else 1 if "vision_tower" in adapted else 2)
    tower = num_vision_layers * layer * passes
    projected = width * hidden + (hidden * hidden if projector == "mlp2x_gelu" else 0)

    heads = language.num_attention_heads
    head_width = getattr(language, "head_dim", None) or hidden // heads
    kv_heads = getattr(language, "num_key_value_heads", None) or heads
    block = 2 * hidden * head_width * (2 * heads + 2 * kv_heads) + 6 * hidden * language.intermediate_size
    backward = 3 if trains_language_model and "language_model" not in adapted else 2
    last = 4 * hidden * head_width * heads + 6 * hidden * language.intermediate_size  # queries, their output, MLP
    layers = language.num_hidden_layers
    return StepCosts(
        tile=float(tower + patches * 2 * projected * 3),
        token=float((layers * block - last) * backward),
        pair=float(layers * 4 * heads * head_width * 3),
        target=float(last * backward),
    )

"""FLOPs of a training step's tiles and tokens, computed from the sizes of a model.

Packing, the planner and the MFU metric use them. A multiply-add counts as two FLOPs.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

from llava_next.config import ProjectorKind
from llava_next.model.language_models import attention_windows
from llava_next.model.towers import mlp_shape


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of the forward and backward pass per unit of a row.

    A segment of n tokens costs n * token + n² / 2 * pair, plus its tiles and targets. In layers with a sliding window
    of w < n tokens it has w * n - w² / 2 pairs.

    Attributes:
        tile: of a tile.
        token: of a token.
        pair: of a causal pair of tokens, in the layers without a window.
        target: additional FLOPs of a supervised token, from the modules of the last block that run at these positions
            only (see `supervised_last_block.py`).
    """

    tile: float
    token: float
    pair: float
    target: float = 0.0
    window: int = 0
    """Of the layers with a sliding window, in tokens; 0 if there are none."""
    window_pair: float = 0.0
    """Of a pair, in the layers with a window."""

    def attention(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """FLOPs of the attention of samples with these numbers of tokens, [n]."""
        lengths = tokens.astype(np.float64)
        inside = np.minimum(lengths, self.window)
        return lengths**2 / 2 * self.pair + (inside * lengths - inside**2 / 2) * self.window_pair

    def flops(
        self, tokens: npt.NDArray[Any], tiles: npt.NDArray[Any], targets: npt.NDArray[Any]
    ) -> npt.NDArray[np.float64]:
        """FLOPs of samples.

        Args:
            tokens, tiles, targets: numbers of tokens, tiles and supervised tokens of each sample, [n].

        Returns:
            float64 [n].
        """
        return tiles * self.tile + tokens * self.token + self.attention(tokens) + targets * self.target


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
    """FLOPs per tile and token of a training step.

    The backward pass costs twice the forward pass for a trained part, and once for a frozen part through which a
    gradient passes. The projector is counted in `tile`, as trained. The head, which runs at supervised positions only,
    is not counted. Nor is the interpolation of reduced feature maps (`anyres_max_N`): it takes about a millionth of the
    FLOPs of their tokens, which are counted. Attention is counted in every block, although on a CPU the last block
    attends from supervised positions only.

    Args:
        vision, language: the Hugging Face configs.
        projector: kind of the projector.
        num_vision_layers: layers of the tower that run, up to its feature layer.
        trains_tower, trains_language_model: whether the part gets weight gradients.
        adapted: parts of which only adapters get weight gradients; the FLOPs of the adapters are not counted.
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
    layers, windows = language.num_hidden_layers, [window for window in attention_windows(language) if window]
    pair = float(4 * heads * head_width * 3)
    return StepCosts(
        tile=float(tower + patches * 2 * projected * 3),
        token=float((layers * block - last) * backward),
        pair=(layers - len(windows)) * pair,
        target=float(last * backward),
        window=windows[0] if windows else 0,
        window_pair=len(windows) * pair,
    )

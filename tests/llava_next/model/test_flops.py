"""FLOPs by formula compared with those counted by torch."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Qwen2Config

from llava_next.config import ProjectorKind
from llava_next.model.build import build_model
from llava_next.model.flops import StepCosts, step_costs
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import mixed, row
from tests.tiny import TowerName


@pytest.mark.parametrize(
    ("tower", "kind"),
    [("clip", "mlp2x_gelu"), ("siglip", "mlp2x_gelu"), ("dinov2", "mlp2x_gelu"), ("clip", "linear")],
)
def test_matrix_products_equal_counted_flops(
    make_backbone: MakeBackbone, tower: TowerName, kind: ProjectorKind
) -> None:
    """The language model's FLOPs are exact; those of a tile are exact except for the class token.

    torch counts no attention on the CPU, so attention is excluded from the comparison.
    """
    backbone = make_backbone(tower, projector=kind)
    model = build_model(backbone, dtype=torch.float32, seed=0, num_sources=8)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    counted = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    vision, language = backbone.hf_config.vision_config, backbone.hf_config.text_config
    frozen, trained = (
        step_costs(
            vision, language, projector=kind, num_vision_layers=2, trains_tower=trains, trains_language_model=trains
        )
        for trains in (False, True)
    )
    num_tokens, num_tiles = batch.input_ids.numel(), len(batch.tiles)
    num_targets = len(batch.target_ids)
    assert 0 < num_targets < num_tokens / 2
    language_model = (num_tokens * trained.token + num_targets * trained.target) / 3
    assert counted["LlavaNext.hf.model.language_model"] == language_model
    assert (frozen.token, frozen.target) == pytest.approx((trained.token * 2 / 3, trained.target * 2 / 3))
    patches = backbone.patches_per_side**2
    projector = counted["LlavaNext.hf.model.multi_modal_projector"] / num_tiles
    attention = 2 * 4 * patches * patches * vision.hidden_size
    encoder = frozen.tile - 3 * projector - attention
    assert trained.tile - frozen.tile == pytest.approx(2 * (encoder + attention))
    name = model.tower_layers_name
    layers = sum(counted[f"LlavaNext.{name}.{index}"] for index in range(2)) / num_tiles
    prefix = model.num_prefix_tokens
    assert layers == pytest.approx(encoder * (patches + prefix) / patches)


def test_flops_of_samples() -> None:
    """n tokens cost n * token + n² / 2 * pair, plus tiles and targets."""
    costs = StepCosts(tile=7.0, token=3.0, pair=2.0, target=5.0)
    actual = costs.flops(np.array([10, 1]), np.array([2, 0]), np.array([4, 0]))
    assert actual.tolist() == [7 * 2 + 3 * 10 + 2 * 100 / 2 + 5 * 4, 3 + 2 / 2]


def test_flops_of_a_sliding_window() -> None:
    """In a layer with a window of w tokens a sample of n > w tokens has w * n - w² / 2 pairs; the layers without one
    are counted as before."""
    costs = StepCosts(tile=0.0, token=0.0, pair=2.0, window=4, window_pair=3.0)
    assert costs.attention(np.array([10, 3])).tolist() == [2 * 100 / 2 + 3 * (40 - 8), 2 * 9 / 2 + 3 * 9 / 2]
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    options = {"projector": "mlp2x_gelu", "num_vision_layers": 1, "trains_tower": False, "trains_language_model": True}
    full, windowed = (
        step_costs(CLIPVisionConfig(), Qwen2Config(**sizes, **more), **options)  # type: ignore[arg-type]
        for more in ({}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1})
    )
    assert (windowed.pair, windowed.window_pair, windowed.window) == (full.pair / 4, full.pair * 3 / 4, 4)

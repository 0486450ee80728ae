"""Tests of the time formulas: FLOPs against torch's counter, collectives and kinds computed by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.config import ModelConfig, VisionTowerConfig
from llava_next.model.build import build_model, read_backbone
from llava_next.model.flops import step_costs
from llava_next.model.parts import set_trained_parts
from tests.llava_next.models import mixed, row
from tests.tiny import tiny_model
from tests.train.plan.test_memory import FACTS, setting
from train.config.schema import ConfigError
from train.plan.hardware import Hardware, check_hardware
from train.plan.hours import estimate_computation, estimate_step_time
from train.plan.simulated_steps import StepRows

ALL = ("vision_tower", "projector", "image_newline", "language_model")


def hardware(name: str = "a100_80g") -> Hardware:
    """Returns a file of configs/hardware."""
    return check_hardware(yaml.safe_load((CONFIG_DIR / "hardware" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_hardware_files_are_valid(path: Path) -> None:
    """Every file has all keys, and its name is the `name` in it."""
    assert hardware(path.stem).name == path.stem


def test_bad_hardware_is_refused() -> None:
    """The error has the key, the rule and the value."""
    good = yaml.safe_load((CONFIG_DIR / "hardware" / "cpu.yaml").read_text())
    for changes, words in (
        ({"link_gb_s": 0}, r"hardware\.link_gb_s must be above 0 and finite, got 0"),
        ({"vision_share": 1.5}, r"hardware\.vision_share is a fraction of the dense rate"),
        ({"gpus_per_node": "many"}, r"hardware\.gpus_per_node: .*'many'"),
        ({"colour": "red"}, r"hardware\.colour"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_hardware({**good, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Returns a tiny model whose tower does a fifth of the work, with so many patches that its class token is
    negligible."""
    folder = tmp_path_factory.mktemp("flops")
    tower = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, image_size=56, patch_size=7
    )
    tower.save_pretrained(folder / "tower")
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
    }
    language = tiny_model(folder, **sizes).language_model
    return ModelConfig(language, VisionTowerConfig("flops_clip", str(folder / "tower"), weights="random"))


@pytest.mark.parametrize("parts", [ALL, ("projector", "language_model"), ("projector",)])
def test_flops_are_those_that_torch_counts(model: ModelConfig, parts: tuple[str, ...]) -> None:
    """Forward and backward, with eager attention and the loss in one piece: within 2 %.

    Eager attention computes every pair of the row, the causal half and the other samples' besides: so does the
    expectation. What the formula leaves out is the patch embedding and the class token.
    """
    backbone = read_backbone(model)
    built = build_model(backbone, dtype=torch.float32, seed=0, num_sources=8)
    set_trained_parts(built, parts)
    built.hf.model.language_model.set_attn_implementation("eager")
    built.hf.model.vision_tower.set_attn_implementation("eager")
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    with FlopCounterMode(display=False) as counter:
        built(batch)[0].backward()
    text = backbone.hf_config.text_config
    costs = step_costs(
        backbone.hf_config.vision_config,
        text,
        projector="mlp2x_gelu",
        num_vision_layers=5,
        trains_tower="vision_tower" in parts,
        trains_language_model="language_model" in parts,
    )
    tokens, tiles = batch.input_ids.numel(), len(batch.tiles)
    head = 2 * text.hidden_size * text.vocab_size * len(batch.target_ids) * (3 if "language_model" in parts else 2)
    # Eager attention computes the square, in the last block too.
    planned = tiles * costs.tile + tokens * costs.token + tokens**2 * costs.pair + head
    planned += len(batch.target_ids) * costs.target
    assert tiles * costs.tile > planned / 20  # the tower counts
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_step_takes_as_long_as_its_slowest_ranks() -> None:
    """Two micro-steps on two ranks: the means of the kinds and the balance add up to the time of the slower ranks."""
    costs = step_costs(
        CLIPVisionConfig(image_size=28, patch_size=14),
        LlamaConfig(),
        projector="mlp2x_gelu",
        num_vision_layers=2,
        trains_tower=True,
        trains_language_model=True,
    )
    facts = replace(FACTS, costs=costs)
    sums = np.array([[[100, 0, 2, 10], [300, 0, 0, 10]], [[50, 0, 1, 5], [50, 0, 1, 5]]], dtype=float)
    sums[..., 1] = costs.attention(sums[..., 0])
    step = StepRows(sums, np.ones((2, 2), dtype=np.int64))
    node = replace(hardware(), gpus_per_node=2)
    seconds, useful = estimate_computation(facts, (), step, node, half=True)
    slowest = sum(seconds.values()).max(axis=1).sum()  # type: ignore[union-attr]
    time = estimate_step_time(facts, setting(2), [step], node, half=True, workers=2)
    spent = sum(time.kinds[kind] for kind in ("vision", "language", "attention", "head", "recompute", "balance"))
    assert spent == pytest.approx(float(slowest))
    assert time.balance < 1
    head = 6 * 4096 * 32_064 * 30
    each = costs.flops(np.array([100, 300, 50, 50]), np.array([2, 0, 1, 1]), np.array([10, 10, 5, 5]))
    assert useful == pytest.approx(each.sum() + head)
    assert time.mfu == pytest.approx(useful / (time.total * 2 * 312e12))

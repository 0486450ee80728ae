"""Tests of fine-tuning a complete model from its directory: its grids, template and processor are used."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import LlavaNextForConditionalGeneration

from llava_next.config import (
    ANYRES,
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    ModelError,
    ViewsConfig,
    VisionTowerConfig,
)
from llava_next.formats.hugging_face import published_tensors, write_hf
from llava_next.formats.original import original_model, write_original_folder
from llava_next.model.build import build_model, read_backbone
from llava_next.model.checkpoint_config import check_image_statistics
from llava_next.model.llava_next import LlavaNext
from tests.tiny import tiny_model
from tests.train import cases
from tests.train.conftest import StartRanks
from train.config.compose import check, load, to_yaml
from train.config.schema import ConfigError, RunConfig

GRIDS = ((1, 2), (3, 1))
"""Not the authors', so that they can only come from the directory."""


def finished(folder: Path) -> tuple[ModelConfig, LlavaNext]:
    """A model as published: hf/ and original/."""
    config = replace(tiny_model(folder / "parts", tower="clip"), grids=GRIDS)
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=77)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    write_hf(model, backbone, processor, folder / "hf")
    (folder / "original").mkdir()
    write_original_folder(
        published_tensors(model, backbone, ANYRES),
        original_model(backbone, processor),
        folder / "original",
    )
    return config, model


def released(config: RunConfig, directory: Path, tower: VisionTowerConfig | None = None, **changes: Any) -> RunConfig:
    """Composes and checks the run of `experiment=tune stage.init_from=DIR`."""
    model = ModelConfig(
        LanguageModelConfig("released", str(directory), "tokenizer", weights="init_from"),
        tower or VisionTowerConfig("released", str(directory), weights="init_from"),
    )
    stage = replace(config.stage, init_from=str(directory))
    composed = OmegaConf.create(to_yaml(replace(config, model=model, stage=stage, **changes)))
    assert isinstance(composed, DictConfig)
    return check(composed)


@pytest.mark.parametrize(
    ("layout", "lora"),
    [
        ("hf", False),
        pytest.param("hf", True, marks=pytest.mark.full),
        pytest.param("original", False, marks=pytest.mark.full),
        pytest.param("original", True, marks=pytest.mark.full),
    ],
)
def test_a_finished_model_is_tuned_further(
    start_ranks: StartRanks, run_config: RunConfig, tmp_path: Path, layout: str, lora: bool
) -> None:
    """It starts with exactly those weights and uses those grids; the result is a model of the same kind with changed
    weights; fully or with adapters."""
    if lora:
        pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
    published, model = finished(tmp_path)
    # The authors' layout names its tower; what it holds of it replaces the tower's own weights.
    tower = replace(published.vision_tower, weights="random") if layout == "original" else None
    adapters = {"language_model": LoraConfig(4, 8.0, ("q_proj", "v_proj"))} if lora else None
    rates: dict[str, float | None] = {"projector": 1.0e-3, "language_model": 5.0e-4}
    config = released(
        replace(run_config, stage=replace(run_config.stage, learning_rates=rates)),
        tmp_path / layout,
        tower,
        lora=adapters,
    )
    assert config.model.grids == GRIDS
    assert config.model.projector == "mlp2x_gelu"
    record = start_ranks(1).run(cases.train_and_write, config)[0]
    for name, parameter in model.named_parameters():
        first = record.before.get(name, record.before.get(name.replace(".weight", ".base_layer.weight")))
        torch.testing.assert_close(torch.from_numpy(first), parameter.detach(), rtol=0, atol=0)
    assert all(loss > 0 for loss in record.losses)
    tuned = LlavaNextForConditionalGeneration.from_pretrained(config.run_dir / "export")
    assert tuned.config.image_grid_pinpoints == [[28, 56], [84, 28]]
    before = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    moved = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("q_proj" in name for name in moved)
    assert any("embed_tokens" in name for name in moved) is not lora
    assert not any("vision_tower" in name for name in moved)


@pytest.mark.parametrize("files", [("processor_config.json",), ("preprocessor_config.json",)])
def test_image_statistics_are_read_from_the_directory(tmp_path: Path, files: tuple[str, ...]) -> None:
    """The statistics are read from the file of transformers 5, which our exports have, and from the older one; without
    either, or if they disagree, the start is rejected."""
    parts = tiny_model(tmp_path / "parts", tower="dinov2")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = replace(parts, vision_tower=replace(parts.vision_tower, image_mean=mean, image_std=std))
    backbone, export = read_backbone(config), tmp_path / "export"
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, export)
    new, old = export / "processor_config.json", export / "preprocessor_config.json"
    assert not old.exists()
    images = json.loads(new.read_text())["image_processor"]
    if old.name in files:
        old.write_text(json.dumps(images))
        new.unlink()
    overrides = ["experiment=tune", "name=mine", "mixture=llava_next_779k", f"stage.init_from={export}"]
    tower = load(overrides, folders=False).model.vision_tower
    assert (tower.image_mean, tower.image_std) == (mean, std)
    old.write_text(json.dumps(images | {"image_mean": [0.5, 0.5, 0.5]}))
    if new.name in files:
        with pytest.raises(ConfigError, match="differ between files"):
            load(overrides, folders=False)
    for path in (new, old):
        path.unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"neither processor_config\.json nor preprocessor_config\.json"):
        load(overrides, folders=False)


def test_a_tower_with_other_statistics_than_its_own_is_refused(tmp_path: Path) -> None:
    """A DINOv2 in a configuration with CLIP's default values is rejected, and the overrides in the message are
    right."""
    tower = tiny_model(tmp_path / "parts", tower="dinov2").vision_tower
    check_image_statistics(tower)  # its directory has none
    own = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (Path(tower.path) / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match=r"image_mean=\[0\.48145466") as refused:
        check_image_statistics(tower)
    overrides = re.findall(r"'model\.vision_tower\.(\w+)=(\[[^']+\])'", str(refused.value))
    assert len(overrides) == 2
    mean, std = (tuple(json.loads(values)) for _, values in sorted(overrides))
    check_image_statistics(replace(tower, image_mean=mean, image_std=std))
    (Path(tower.path) / "preprocessor_config.json").write_text(json.dumps(own | {"do_normalize": False}))
    with pytest.raises(ModelError, match="do_normalize=False"):
        check_image_statistics(tower)


def test_the_command_line_takes_them_from_the_directory(tmp_path: Path) -> None:
    """`experiment=tune stage.init_from=DIR` is sufficient; the configuration that a run writes has the values of the
    directory."""
    finished(tmp_path)
    overrides = ["experiment=tune", "name=mine", "mixture=llava_next_779k", "precision=fp32"]
    config = load([*overrides, f"stage.init_from={tmp_path / 'hf'}"], folders=False)
    assert config.model.grids == GRIDS
    assert config.model.language_model.path == str(tmp_path / "hf")
    assert read_backbone(config.model).tile == 28
    with pytest.raises(
        ConfigError, match=r"authors' layout, .* choose the tower, for example model/vision_tower=clip_vit_l_336"
    ):
        load([*overrides, f"stage.init_from={tmp_path / 'original'}"], folders=False)
    with pytest.raises(ConfigError, match=r"has no config\.json; give the directory of a complete model"):
        load([*overrides, f"stage.init_from={tmp_path}"], folders=False)
    with pytest.raises(ConfigError, match=r"stage\.init_from has no value"):
        load(overrides, folders=False)


@pytest.mark.parametrize(
    ("stage_file", "before"),
    [
        ("interleave/finetune", ANYRES),
        ("onevision/single_image", ViewsConfig("anyres_max_9", "pad", closing_newline=True)),
    ],
)
def test_later_stages_start_from_a_whole_model(
    start_ranks: StartRanks, run_config: RunConfig, tmp_path: Path, stage_file: str, before: ViewsConfig
) -> None:
    """A stage that names `stage.init_from` as both backbones starts with exactly those weights, and its result is what
    it says: with OneVision's views a model that the next stage can start from."""
    config = replace(tiny_model(tmp_path / "parts", tower="siglip"), grids=GRIDS)
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=77)
    processor = backbone.processor(template=None, views=before, max_length=512)
    start = tmp_path / "start"
    write_hf(model, backbone, processor, start)
    shipped = load([f"stage={stage_file}", f"stage.init_from={start}", "name=x", "mixture=lcs_558k"], folders=False)
    assert shipped.model.grids == GRIDS  # of the directory
    language_model = replace(shipped.model.language_model, template="chatml")
    stage = replace(
        run_config.stage, views=shipped.stage.views, init_from=shipped.stage.init_from, result=shipped.stage.result
    )
    shipped_run = replace(run_config, model=replace(shipped.model, language_model=language_model), stage=stage)
    record = start_ranks(1).run(cases.train_and_write, shipped_run)[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(record.before[name]), parameter.detach(), rtol=0, atol=0)
    assert all(loss > 0 for loss in record.losses)
    result = shipped_run.run_dir / shipped_run.stage.result
    if stage_file == "interleave/finetune":
        assert result.name == "connector"
    else:
        assert json.loads((result / "config.json").read_text())["model_type"] == "llava_onevision"
        assert (
            load(
                [f"stage={stage_file}", f"stage.init_from={result}", "name=x", "mixture=lcs_558k"], folders=False
            ).model.grids
            == GRIDS
        )

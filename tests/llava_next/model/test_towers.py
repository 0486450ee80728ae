"""Towers of every family: patches become image tokens, and exports have published names; other towers are errors."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    InternVLVisionConfig,
    LlavaNextForConditionalGeneration,
    PixtralVisionConfig,
    PretrainedConfig,
    Siglip2VisionConfig,
    ViTConfig,
)

from llava_next.config import ANYRES, ModelConfig, ModelError
from llava_next.formats.hugging_face import read_hf, write_hf
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.flops import step_costs
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.towers import TOWER_FAMILIES, num_prefix_tokens, stock_unsupported_reason
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, gradients, pretrained, row, stock_inputs, stock_twin
from tests.tiny import PATCHES_PER_SIDE, TILE, TowerName, tiny_model

TOWERS: tuple[TowerName, ...] = get_args(TowerName)
PREFIX = dict(zip(TOWERS, (1, 0, 1, 5, 5, 0, 0), strict=True))


def _model(backbone: Backbone) -> LlavaNext:
    """A model whose tower has large weights, so that each token has distinct features."""
    model = build_model(backbone, dtype=torch.float32, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.model.vision_tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _with_tower(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, vision_tower=replace(config.vision_tower, **changes))


def test_every_family_is_tested(make_backbone: MakeBackbone) -> None:
    """There is a tiny tower for each family of the table."""
    kinds = {make_backbone(tower).hf_config.vision_config.model_type for tower in TOWERS}
    assert kinds == set(TOWER_FAMILIES)


@pytest.mark.parametrize("tower", TOWERS)
def test_image_tokens_are_the_towers_patches(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """The projector's input is the patches of the stock tower's feature layer, without class and register tokens, and
    logits equal those of stock LLaVA-NeXT where it supports the tower."""
    backbone = make_backbone(tower)
    assert num_prefix_tokens(backbone.hf_config.vision_config) == PREFIX[tower]
    model = _model(backbone)
    tiles = torch.randint(0, 256, (2, TILE, TILE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    hook = model.hf.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.tile_features(tiles)
    hook.remove()
    twin = stock_twin(model, backbone).eval()
    pixels = tiles.permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
    with torch.no_grad():
        whole = twin.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    patches = whole[:, PREFIX[tower] :]
    assert patches.shape[1] == PATCHES_PER_SIDE**2
    torch.testing.assert_close(seen[0], patches, rtol=1e-5, atol=1e-5)
    sample = encoded(backbone, [(45, 61), (20, 20)])
    batch = row(backbone, [sample.example])
    reason = stock_unsupported_reason(backbone.hf_config.vision_config)
    assert (reason is None) == (PREFIX[tower] <= 1)
    if reason is not None:
        with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
            twin(**stock_inputs(backbone, sample))
        return
    with torch.no_grad():
        expected = twin(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
        assert float((model.target_logits(batch) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("recompute", [(), ("vision_tower",)], ids=["", "recompute"])
@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_the_last_hidden_state(
    make_backbone: MakeBackbone, tower: TowerName, recompute: tuple[str, ...]
) -> None:
    """Features, and the gradients of a trained tower, are bitwise those of the cut tower's last hidden state as
    `output_hidden_states` returns it."""
    model = _model(make_backbone(tower))
    set_trained_parts(model, ("vision_tower", "projector"))
    set_recompute(model, recompute)
    tiles = torch.randint(0, 256, (2, TILE, TILE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    inner = model.hf.model

    def by_hidden_states() -> torch.Tensor:
        pixels = tiles.permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
        states = inner.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        return inner.multi_modal_projector(states[:, model.num_prefix_tokens :])

    results = []
    for compute in (by_hidden_states, lambda: model.tile_features(tiles)):
        model.zero_grad()
        features = compute()
        features.square().sum().backward()
        results.append((features.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert any("vision_tower" in name for name in results[0][1])


@pytest.mark.parametrize("tower", TOWERS)
def test_frozen_tower_keeps_one_layers_output(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """Without gradients, only the output of the last layer is still in memory when the tower has run."""
    model = _model(make_backbone(tower))
    set_trained_parts(model, ("projector",))
    outputs: list[weakref.ref[torch.Tensor]] = []
    num_in_memory: list[int] = []

    def keep_reference(_: torch.nn.Module, __: Any, output: Any) -> None:
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    layers = model.get_submodule(model.tower_layers_name)
    assert isinstance(layers, torch.nn.ModuleList)
    assert len(layers) > 1
    for layer in layers:
        layer.register_forward_hook(keep_reference)
    model.hf.model.vision_tower.register_forward_hook(
        lambda *_: num_in_memory.append(sum(output() is not None for output in outputs))
    )
    model.tile_features(torch.zeros(1, TILE, TILE, 3, dtype=torch.uint8))
    assert len(outputs) == len(layers)
    assert num_in_memory == [1]


@pytest.mark.parametrize("tower", TOWERS)
def test_export_has_the_published_tower_names(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """After the prefix, names are those with which transformers writes the tower; stock transformers and `read_hf` load
    all of them."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(model, backbone, processor, tmp_path / "out")
    AutoModel.from_config(backbone.hf_config.vision_config).save_pretrained(tmp_path / "tower")
    prefix = TOWER_FAMILIES[backbone.hf_config.vision_config.model_type].published_prefix
    with (
        safe_open(tmp_path / "tower" / "model.safetensors", "pt") as stock_file,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as export_file,
    ):
        names = {name for name in export_file.keys() if name.startswith("vision_tower.")}  # noqa: SIM118
        assert names == {prefix + name for name in stock_file.keys()}  # noqa: SIM118
    _, loading_info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading_info.values())
    _, reloaded = read_hf(tmp_path / "out", backbone.config)
    batch = row(backbone, [encoded(backbone, [(45, 61)]).example])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(batch)[0], model(batch)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("tower", ["dinov2_with_registers", "dinov3", "aimv2", "ijepa"])
def test_tower_directory_is_read(tmp_path: Path, tower: TowerName) -> None:
    """Weights of a directory, at their own size and resampled to another, give the features of the stock tower."""
    config = pretrained(tmp_path, tower)
    stock = AutoModel.from_pretrained(config.vision_tower.path).eval()
    tiles = torch.randint(0, 256, (1, TILE, TILE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    model = build_model(read_backbone(config), dtype=torch.float32, seed=0)
    pixels = tiles.permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
    with torch.no_grad():
        expected = stock(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, PREFIX[tower] :]
        actual = model.tile_features(tiles)
        torch.testing.assert_close(actual, model.hf.model.multi_modal_projector(expected), rtol=1e-5, atol=1e-5)
    larger = build_model(read_backbone(_with_tower(config, tile=2 * TILE)), dtype=torch.float32, seed=0)
    assert larger.tile_features(torch.zeros(1, 2 * TILE, 2 * TILE, 3, dtype=torch.uint8)).shape[1] == 64


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_dinov3_is_deterministic(tmp_path: Path, weights: str) -> None:
    """Its random rescaling of positions in training mode is disabled, also with recompute, which requires that mode."""
    config = pretrained(tmp_path, "dinov3")
    vision_config = AutoConfig.from_pretrained(config.vision_tower.path)
    vision_config.pos_embed_rescale = 2.0  # as published
    vision_config.save_pretrained(config.vision_tower.path)
    backbone = read_backbone(_with_tower(config, weights=weights))
    model = build_model(backbone, dtype=torch.float32, seed=0)
    set_trained_parts(model, ("vision_tower", "projector"))
    batch = row(backbone, [encoded(backbone, [(45, 61)]).example])
    results = []
    for recompute in ((), ("vision_tower",), ("vision_tower",)):
        set_recompute(model, recompute)
        model.zero_grad()
        loss = model(batch)[0]
        loss.backward()
        embedding = model.hf.model.vision_tower.embeddings.patch_embeddings.weight
        results.append((loss.detach(), embedding.grad.clone()))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-9)


def test_overrides_apply_to_a_pretrained_tower(tmp_path: Path) -> None:
    """An override that disables dropout also applies to the tower in training mode, which recompute sets."""
    config = pretrained(tmp_path, "clip")
    vision_config = AutoConfig.from_pretrained(config.vision_tower.path)
    vision_config.attention_dropout = 0.5
    vision_config.save_pretrained(config.vision_tower.path)
    with pytest.raises(ModelError, match=r"attention_dropout: 0\.0 in model\.vision_tower\.overrides"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)
    backbone = read_backbone(_with_tower(config, overrides={"attention_dropout": 0.0}))
    model = build_model(backbone, dtype=torch.float32, seed=0)
    set_recompute(model, ("vision_tower",))
    tiles = torch.full((1, TILE, TILE, 3), 200, dtype=torch.uint8)
    torch.testing.assert_close(model.tile_features(tiles), model.tile_features(tiles), rtol=0, atol=0)


def test_unexpected_feature_rows_are_an_error(tmp_path: Path) -> None:
    """A tower whose output does not match its config is an error with both numbers."""
    config = _with_tower(tiny_model(tmp_path, "dinov2"), overrides={})
    vision_config = AutoConfig.from_pretrained(config.vision_tower.path)
    vision_config.num_register_tokens = 4  # a DINOv2 without registers has none
    vision_config.save_pretrained(config.vision_tower.path)
    with pytest.raises(ModelError, match=r"17 rows of features .*, but 5 prefix tokens and 16 patches"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    ("vision", "word"),
    [
        (Siglip2VisionConfig(), "siglip2_vision_model is not supported.*NaFlex"),
        (InternVLVisionConfig(), "internvl_vision is not supported"),
        (ViTConfig(), "vit is not supported"),
        (PixtralVisionConfig(), "pixtral is not supported"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_unsupported_towers_are_errors(tmp_path: Path, vision: PretrainedConfig, word: str) -> None:
    """The message names the family and the supported ones, before weights are read."""
    config = tiny_model(tmp_path)
    vision.save_pretrained(config.vision_tower.path)
    with pytest.raises(ModelError, match=word):
        read_backbone(config)


@pytest.mark.parametrize("key", ["image_size", "patch_size"])
def test_sizes_given_as_pairs_must_be_square(tmp_path: Path, key: str) -> None:
    """`[28, 28]` is 28; `[28, 14]` is an error."""
    config = tiny_model(tmp_path, "dinov3")
    value = getattr(AutoConfig.from_pretrained(config.vision_tower.path), key)
    for sides in ([value, value], [value, 2 * value]):
        vision_config = AutoConfig.from_pretrained(config.vision_tower.path)
        setattr(vision_config, key, sides)
        vision_config.save_pretrained(config.vision_tower.path)
        if sides[0] == sides[1]:
            backbone = read_backbone(config)
            assert (backbone.tile, backbone.patches_per_side) == (TILE, PATCHES_PER_SIDE)
            build_model(backbone, dtype=torch.float32, seed=0)
        else:
            with pytest.raises(ModelError, match=key):
                read_backbone(config)


@pytest.mark.parametrize("tower", TOWERS)
def test_flops_count_the_towers_matrices(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """The products of a layer cost two FLOPs per weight and patch, including the third matrix of a gated MLP."""
    backbone = make_backbone(tower)
    vision, text = backbone.hf_config.vision_config, backbone.hf_config.text_config
    kinds: dict[str, Any] = {"projector": "linear", "trains_tower": False, "trains_language_model": False}
    one_layer, two_layers = (step_costs(vision, text, num_vision_layers=layers, **kinds).tile for layers in (1, 2))
    layer = AutoModel.from_config(vision)
    matrices = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2 and ".1." in name)
    patches = PATCHES_PER_SIDE**2
    assert two_layers - one_layer == patches * 2 * matrices + 4 * patches * patches * vision.hidden_size

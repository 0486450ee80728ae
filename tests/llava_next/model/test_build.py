"""Building a model from a `ModelConfig`: derived values, initial weights, and errors before training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel

from llava_next.config import (
    ANYRES,
    LanguageModelConfig,
    ModelConfig,
    ModelError,
    ProjectorKind,
    VisionTowerConfig,
    Weights,
)
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.model.architecture import VOCABULARY_MULTIPLE
from llava_next.model.build import build_meta_model, build_model, read_backbone, read_tokenizer
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, pretrained, row
from tests.tiny import PATCH, TILE, WIDTH, TowerName, tiny_model, tiny_tokenizer

TOWERS: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")
KINDS: tuple[ProjectorKind, ...] = ("mlp2x_gelu", "linear")


def with_tile(config: ModelConfig, tile: int) -> ModelConfig:
    """The configuration with another tile side in pixels."""
    return replace(config, vision_tower=replace(config.vision_tower, tile=tile))


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def _edit_weights(path: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _edit_config(path: str, **values: Any) -> None:
    file = Path(path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("tower", TOWERS)
def test_random_weights_depend_on_the_seed_only(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """The same seed gives the same weights whatever was drawn before, and torch's global generator state is
    restored."""
    torch.manual_seed(1)
    first = _state(build_model(make_backbone(tower), dtype=torch.float32, seed=5))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(2)
    second = _state(build_model(make_backbone(tower), dtype=torch.float32, seed=5))
    other = _state(build_model(make_backbone(tower), dtype=torch.float32, seed=6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = [name for name in first if first[name].unique().numel() > 1]  # norms and biases start as constants
    assert all(not torch.equal(first[name], other[name]) for name in names)
    assert {"hf.model.image_newline", "hf.model.multi_modal_projector.linear_1.weight"} <= set(names)


@pytest.mark.parametrize("tower", TOWERS)
def test_derived_values(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """Vocabulary, image token, pinpoints, patches and the select strategy are derived from the parts."""
    backbone = make_backbone(tower)
    hf = backbone.hf_config
    assert hf.text_config.vocab_size % VOCABULARY_MULTIPLE == 0
    assert hf.text_config.vocab_size >= len(backbone.tokenizer)
    assert backbone.tokenizer.convert_ids_to_tokens(hf.image_token_index) == IMAGE_PLACEHOLDER
    assert hf.image_grid_pinpoints == [[r * TILE, c * TILE] for r, c in backbone.config.grids]
    assert (backbone.tile, backbone.patches_per_side) == (TILE, TILE // PATCH)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    assert model.hf.get_input_embeddings().weight.shape[0] == hf.text_config.vocab_size
    features = model.tile_features(torch.zeros(2, TILE, TILE, 3, dtype=torch.uint8))
    assert features.shape == (2, (TILE // PATCH) ** 2, hf.text_config.hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_requested_dtype(make_backbone: MakeBackbone, dtype: torch.dtype) -> None:
    """This includes the tower's removed layers. A row runs in the dtype with losses in float32."""
    backbone = make_backbone("siglip")
    model = build_model(backbone, dtype=dtype, seed=0)
    assert {parameter.dtype for _, parameter in live_parameters(model)} == {dtype}
    total, _, _ = model(row(backbone, [encoded(backbone, [(45, 61)]).example]))
    assert total.dtype == torch.float32
    assert torch.isfinite(total)


def test_rotary_frequencies_stay_in_fp32(make_backbone: MakeBackbone) -> None:
    """A bf16 model has the rotary embeddings of the stock model. In bf16 they would be wrong by several radians at
    token 4,000."""
    backbone = make_backbone("clip")
    model = build_model(backbone, dtype=torch.bfloat16, seed=1)
    stock = AutoModelForCausalLM.from_config(backbone.hf_config.text_config, dtype=torch.bfloat16)
    states, positions = torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.tensor([[4000]])
    tables = model.hf.model.language_model.rotary_emb(states, positions)
    for table, expected in zip(tables, stock.base_model.rotary_emb(states, positions), strict=True):
        torch.testing.assert_close(table, expected, rtol=0, atol=0)
    for name, buffer in model.named_buffers():
        assert not buffer.is_floating_point() or buffer.dtype == torch.float32, name


@pytest.mark.parametrize("tower", TOWERS)
def test_pretrained_parts_keep_their_weights(tmp_path: Path, tower: TowerName) -> None:
    """Tower and language model have the tensors of their files; new vocabulary rows are the mean of the others."""
    config = pretrained(tmp_path, tower)
    model = build_model(read_backbone(config), dtype=torch.float32, seed=0)
    state = {name.removeprefix("hf.model."): tensor for name, tensor in _state(model).items()}
    vision = AutoModel.from_pretrained(config.vision_tower.path).state_dict()
    for name, tensor in vision.items():
        assert torch.equal(state[f"vision_tower.{name}"], tensor), name
    text = load_file(Path(config.language_model.path) / "model.safetensors")
    for name, tensor in text.items():
        actual = state[
            "hf.lm_head.weight" if name == "lm_head.weight" else name.replace("model.", "language_model.", 1)
        ]
        assert torch.equal(actual[: len(tensor)], tensor), name
        if len(actual) > len(tensor):
            torch.testing.assert_close(actual[len(tensor) :], tensor.mean(0).expand_as(actual[len(tensor) :]))
    assert model.hf.get_input_embeddings().weight.shape[0] == model.hf.config.text_config.vocab_size


def test_directory_of_a_complete_clip(tmp_path: Path) -> None:
    """OpenAI's directories contain both of CLIP's towers; the vision tower is read."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
              "image_size": TILE, "patch_size": PATCH}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 32}  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    config = tiny_model(tmp_path)
    config = replace(config, vision_tower=VisionTowerConfig("clip", str(tmp_path / "clip")))
    model = build_model(read_backbone(config), dtype=torch.float32, seed=0)
    state = _state(model)
    expected = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("vision_model.")}
    actual = {name: t for name, t in state.items() if name.startswith("hf.model.vision_tower.")}
    assert len(expected) == len(actual) > 40
    for name, tensor in expected.items():
        short = name.removeprefix("vision_model.")
        match = [t for n, t in actual.items() if n.removeprefix("hf.model.vision_tower.").endswith(short)]
        assert any(torch.equal(tensor, candidate) for candidate in match), name


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_missing_tensor_is_an_error(tmp_path: Path, part: str) -> None:
    """transformers would initialize it at random and log a warning; here it is an error that names the tensor."""
    config = pretrained(tmp_path)
    path = getattr(config, part).path
    name = next(n for n in load_file(Path(path) / "model.safetensors") if n.endswith("k_proj.weight"))
    _edit_weights(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"{part}.path=.*lacks .*k_proj.weight.*random"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_tensor_of_another_shape_is_an_error(tmp_path: Path, part: str) -> None:
    """A config.json that does not match its weights is an error."""
    config = pretrained(tmp_path)
    _edit_config(getattr(config, part).path, intermediate_size=64)
    with pytest.raises(ModelError, match=rf"model\.{part}\.path"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_truncated_weights_are_an_error(tmp_path: Path, part: str) -> None:
    """The message has the key of the directory."""
    config = pretrained(tmp_path)
    file = Path(getattr(config, part).path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"model\.{part}\.path: cannot read the weights"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    """A directory with only a config.json is an error if weights are required, for each part."""
    config = tiny_model(tmp_path)
    for part in ("language_model", "vision_tower"):
        config_with_weights = replace(config, **{part: replace(getattr(config, part), weights="pretrained")})
        with pytest.raises(ModelError, match=rf"model\.{part}\.path"):
            build_model(read_backbone(config_with_weights), dtype=torch.float32, seed=0)


# Width of the language model, parameters of its connector (recipe 0; linear: from the formula of one layer).
CONNECTORS = [
    (1024, 2_099_200),
    (3584, 16_522_240),
    (4096, 20_979_712),
    (5120, 31_467_520),
    (7168, 58_734_592),
    (8192, 75_513_856),
]


def test_connectors_have_the_published_sizes(tmp_path: Path) -> None:
    """Parameter counts of the connector between CLIP ViT-L/14-336 (303,507,456 parameters) and every width of the
    published language models; a linear connector is one layer with a bias."""
    config = tiny_model(tmp_path)
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14}  # fmt: skip
    whole = replace(config, vision_tower=replace(config.vision_tower, overrides=clip))
    tower = build_meta_model(read_backbone(whole)).model.vision_tower
    assert sum(parameter.numel() for parameter in tower.parameters()) == 303_507_456
    shallow = replace(whole.vision_tower, overrides={**clip, "num_hidden_layers": 1})
    for width, num_parameters in CONNECTORS:
        language_model = replace(config.language_model, overrides={"hidden_size": width, "num_hidden_layers": 1})
        for kind in KINDS:
            expected = num_parameters if kind == "mlp2x_gelu" else 1024 * width + width
            parts = build_meta_model(read_backbone(ModelConfig(language_model, shallow, projector=kind))).model
            assert sum(parameter.numel() for parameter in parts.multi_modal_projector.parameters()) == expected
            assert parts.image_newline.shape == (width,)


@pytest.mark.parametrize("projector", KINDS)
def test_projector_has_torchs_default_initialization(make_backbone: MakeBackbone, projector: ProjectorKind) -> None:
    """Weights and biases are uniform within 1 / sqrt(inputs), as in the authors' `nn.Linear`."""
    model = build_model(make_backbone(projector=projector), dtype=torch.float32, seed=0)
    layers = [
        module for module in model.hf.model.multi_modal_projector.modules() if isinstance(module, torch.nn.Linear)
    ]
    assert len(layers) == (2 if projector == "mlp2x_gelu" else 1)
    for layer in layers:
        bound = layer.in_features**-0.5
        for tensor in (layer.weight, layer.bias):
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_newline_has_a_length_of_about_one(make_backbone: MakeBackbone) -> None:
    """It is drawn with a standard deviation of 1 / sqrt(width), as in the authors' model."""
    newline = build_model(make_backbone(), dtype=torch.float32, seed=0).hf.model.image_newline
    assert newline.shape == (WIDTH,)
    assert 0.5 < float(newline.detach().norm()) < 2


@pytest.mark.parametrize("weights", ["random", "pretrained", "init_from"])
def test_tied_head_is_the_embedding(tmp_path: Path, weights: Weights) -> None:
    """They are one parameter, whatever gives the language model its weights."""
    config = pretrained(tmp_path, tied=True)
    config = replace(config, language_model=replace(config.language_model, weights=weights))
    hf = build_model(read_backbone(config), dtype=torch.bfloat16, seed=0).hf
    assert hf.lm_head.weight is hf.get_input_embeddings().weight


@pytest.mark.parametrize("tower", TOWERS)
def test_another_tile_resamples_positions(tmp_path: Path, tower: TowerName) -> None:
    """A larger tile has a larger position embedding with the same class token; other weights are equal, and rows
    run."""
    config = pretrained(tmp_path, tower)
    same = _state(build_model(read_backbone(config), dtype=torch.float32, seed=0))
    backbone = read_backbone(with_tile(config, 42))
    model = build_model(backbone, dtype=torch.float32, seed=0)
    larger = _state(model)
    changed = [name for name in same if same[name].shape != larger[name].shape]
    assert len(changed) == 1
    assert "position_embedding" in changed[0]
    read = [n for n in same if n.startswith(("hf.model.vision_tower.", "hf.model.language_model.", "hf.lm_head."))]
    assert all(torch.equal(same[name], larger[name]) for name in read if name not in changed)
    prefix = 0 if tower == "siglip" else 1
    old, new = (state[changed[0]].reshape(-1, 24) for state in (same, larger))
    assert new.shape == (36 + prefix, 24)
    assert torch.equal(old[:prefix], new[:prefix])
    assert float(new[prefix:].mean()) == pytest.approx(float(old[prefix:].mean()), abs=1e-2)
    total, _, _ = model(row(backbone, [encoded(backbone, [(45, 61)]).example]))
    assert torch.isfinite(total)


@pytest.mark.parametrize("prefix", [0, 1])
def test_resampled_positions_keep_their_orientation(tmp_path: Path, prefix: int) -> None:
    """A table that increases from row to row still does, and is constant along each row; the class token is
    unchanged."""
    config = pretrained(tmp_path, "clip" if prefix else "siglip")

    def slope(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "position_embedding" in n)
        rows = torch.arange(4.0).repeat_interleave(4)
        tensors[name] = torch.cat([torch.full((prefix,), 9.0), rows])[:, None].repeat(1, 24)

    _edit_weights(config.vision_tower.path, slope)
    state = _state(build_model(read_backbone(with_tile(config, 42)), dtype=torch.float32, seed=0))
    table = next(tensor for name, tensor in state.items() if "position_embedding" in name)
    assert (table[:prefix] == 9).all()
    grid = table[prefix:].view(6, 6, 24)
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
    assert (grid[1:] > grid[:-1]).all()


@pytest.mark.parametrize("tower", TOWERS)
def test_tile_that_the_patch_does_not_divide(tmp_path: Path, tower: TowerName) -> None:
    """A tower of 30 pixels and patches of 7 (SigLIP: 384 and 14) has 4 x 4 patches, and the last two rows and columns
    of pixels have no effect. Another such size is an error."""
    config = tiny_model(tmp_path, tower)
    config = replace(config, vision_tower=replace(config.vision_tower, overrides={"image_size": 30}))
    for named in (config, with_tile(config, 30)):
        backbone = read_backbone(named)
        assert (backbone.tile, backbone.patches_per_side) == (30, 4)
        model = build_model(backbone, dtype=torch.float32, seed=0)
        tiles = torch.randint(0, 256, (1, 30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        features = model.tile_features(tiles)
        tiles[:, 28:], tiles[:, :, 28:] = 0, 0
        assert torch.equal(model.tile_features(tiles), features)
        assert features.shape[:2] == (1, 16)
        tiles[:, 27] = 0
        assert not torch.equal(model.tile_features(tiles), features)
    with pytest.raises(ModelError, match=r"tile=31 must be a multiple .* 7 pixels, or null for .* size of 30"):
        read_backbone(with_tile(config, 31))


def test_same_tile_keeps_the_positions(tmp_path: Path) -> None:
    """The tower's own size changes nothing, and a constant table is constant at any size."""
    config = pretrained(tmp_path)
    same = _state(build_model(read_backbone(config), dtype=torch.float32, seed=0))
    named = _state(build_model(read_backbone(with_tile(config, TILE)), dtype=torch.float32, seed=0))
    assert all(torch.equal(same[name], named[name]) for name in same)

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "position_embedding" in n)
        tensors[name] = torch.full_like(tensors[name], 0.25)

    _edit_weights(config.vision_tower.path, flatten)
    state = _state(build_model(read_backbone(with_tile(config, 56)), dtype=torch.float32, seed=0))
    table = next(tensor for name, tensor in state.items() if "position_embedding" in name)
    torch.testing.assert_close(table, torch.full_like(table, 0.25))


def test_real_parts_give_finite_features(smollm2: Path, dinov2: Path) -> None:
    """SmolLM2's first layer and DINOv2-small on 70-pixel tiles with real weights give plausible losses.

    DINOv2's interpolation of its table agrees with ours.
    """
    config = ModelConfig(
        LanguageModelConfig("smollm2", str(smollm2), "chatml", overrides={"num_hidden_layers": 1}),
        VisionTowerConfig("dinov2", str(dinov2), tile=70),
    )
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    with torch.no_grad():
        total, _, tokens = model(row(backbone, [encoded(backbone, [(45, 61)]).example]))
        actual = model.hf.model.vision_tower.embeddings(torch.zeros(1, 3, 70, 70))
        native = AutoModel.from_pretrained(dinov2).embeddings(torch.zeros(1, 3, 70, 70))
    assert torch.isfinite(total)
    assert 0 < float(total) / int(tokens.sum()) < 20
    similarity = torch.nn.functional.cosine_similarity(actual.flatten(), native.flatten(), dim=0)
    assert float(similarity) > 0.98


def test_missing_directories_and_keys_are_errors(tmp_path: Path) -> None:
    """A missing directory, config.json or tokenizer and an unknown override; messages have the configuration key."""
    config = tiny_model(tmp_path)
    language, tower = config.language_model, config.vision_tower
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (replace(config, language_model=replace(language, path=str(tmp_path / "no"))), r"language_model\.path"),
        (replace(config, vision_tower=replace(tower, path=str(empty))), r"vision_tower\.path"),
        (replace(config, language_model=replace(language, tokenizer=str(empty))), r"language_model\.tokenizer"),
        (replace(config, language_model=replace(language, overrides={"depth": 1})), r"overrides.*'depth'"),
        (replace(config, vision_tower=replace(tower, tile=30)), r"tile=30 must be a multiple .* 7 pixels"),
        (replace(config, grids=((0, 1),)), r"model\.grids"),
    ]
    for wrong, message in cases:
        with pytest.raises(ModelError, match=message):
            read_backbone(wrong)


def test_length_beyond_the_positions_is_an_error(make_backbone: MakeBackbone) -> None:
    """The message has both numbers and the fix."""
    backbone = make_backbone()
    with pytest.raises(ModelError, match=r"max_length=5000 exceeds the 4096 positions.*decrease it"):
        backbone.processor(template=None, views=ANYRES, max_length=5000)
    assert backbone.processor(template=None, views=ANYRES, max_length=64).config.template == "chatml"
    assert backbone.processor(template="plain", views=ANYRES, max_length=64).config.template == "plain"


def test_image_token_is_added_once(tmp_path: Path) -> None:
    """A tokenizer without an image token gets one at the end; its other special tokens are unchanged."""
    path = tiny_tokenizer(tmp_path / "plain")
    tokenizer = read_tokenizer(str(path))
    assert tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) == len(tokenizer) - 1
    assert tokenizer("<|im_end|><image>", add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer) - 1,
    ]  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "again")
    assert len(read_tokenizer(str(tmp_path / "again"))) == len(tokenizer)
    assert "<|im_end|>" in read_tokenizer(str(tmp_path / "again")).all_special_tokens


def test_sentencepiece_model_is_read(tmp_path: Path) -> None:
    """A tokenizer published as tokenizer.model alone, as Vicuna's and Yi's are, gives the tokens of sentencepiece.

    Merges are applied in the order of their scores, which is not that of the ids.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    unknown, control, normal = 2, 3, 1  # the protobuf's piece types
    pieces = [("<unk>", unknown, 0.0), ("<s>", control, 0.0), ("</s>", control, 0.0), ("\u2581\u2581", normal, -1e9)]
    pieces += [("\u2581a", normal, -1.0), ("\u2581b", normal, -2.0), ("\u2581ab", normal, -3.0)]
    pieces += [("\u2581", normal, -4.0), ("a", normal, -5.0), ("b", normal, -6.0)]
    for text, kind, score in pieces:
        model.pieces.add(piece=text, type=kind, score=score)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.remove_extra_whitespaces = False
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False, "add_bos_token": True}))

    tokenizer = read_tokenizer(str(tmp_path))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("ab a b", "a  b", "a   ab"):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], text
    assert tokenizer("a  b", add_special_tokens=False)["input_ids"] == [4, 7, 5]
    assert tokenizer("a</s>b", add_special_tokens=False)["input_ids"] == [4, 2, 9]


def test_head_with_a_bias_is_an_error(tmp_path: Path) -> None:
    """LLaVA-NeXT's head has no bias, so it would be lost."""
    hf = build_meta_model(read_backbone(tiny_model(tmp_path)))
    hf.lm_head = torch.nn.Linear(hf.lm_head.in_features, hf.lm_head.out_features, device="meta")
    with pytest.raises(ModelError, match="head with a bias"):
        LlavaNext(hf, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("weights", ["pretrained", "init_from"])
def test_complete_model_as_language_model(make_backbone: MakeBackbone, tmp_path: Path, weights: Weights) -> None:
    """Weights of the language model are not read from a complete model; its config alone is."""
    backbone = make_backbone()
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(model, backbone, processor, tmp_path / "whole")
    language = replace(backbone.config.language_model, path=str(tmp_path / "whole"), weights=weights)
    config = replace(backbone.config, language_model=language)
    if weights == "init_from":
        assert read_backbone(config).hf_config.text_config.hidden_size == WIDTH
        return
    with pytest.raises(ModelError, match=r"model\.language_model\.path: .*whole.* is a complete model"):
        read_backbone(config)


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_config_with_custom_code_is_an_error(tmp_path: Path, part: str) -> None:
    """A model_type that transformers does not support, with code in its directory (InternViT), is an error, and the
    code is not executed."""
    config = tiny_model(tmp_path)
    folder = Path(getattr(config, part).path)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    custom = {"model_type": "intern_vit_6b", "auto_map": {"AutoConfig": "code.Config"}, "image_size": [448, 448]}
    (folder / "config.json").write_text(json.dumps(custom))
    with pytest.raises(ModelError, match=rf"model\.{part}\.path: .* model_type intern_vit_6b"):
        read_backbone(config)
    assert not (tmp_path / "it_ran").exists()

"""Tests of the known model shapes: their parameter counts are the published ones, and a directory on disk takes
precedence.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.config import LanguageModelConfig, ModelConfig, ModelError, VisionTowerConfig
from tests.tiny import tiny_model
from train.config.compose import load
from train.config.schema import RunConfig
from train.plan.known_model_shapes import LANGUAGE_MODELS, VISION_TOWERS
from train.plan.model_facts import count_model, read_architecture, read_language_shape

# Published parameter counts, whole models without the image token; the tower's is the card's 303.5M.
PUBLISHED = {
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "mistral_7b": 7_241_732_096,
    "hermes_yi_34b": 34_388_917_248,
    "llama3_8b": 8_030_261_248,
    "qwen1_5_0_5b": 463_987_712,
    "qwen1_5_7b": 7_721_324_544,
    "qwen1_5_14b": 14_167_290_880,
    "qwen1_5_32b": 32_512_218_112,
    "qwen1_5_72b": 72_287_920_128,
    "qwen1_5_110b": 111_209_914_368,
    "qwen2_7b": 7_615_616_512,
    "smollm2_135m": 134_515_008,
    # Qwen3's cards round: 0.6B, 1.7B, 4.0B, 8.2B, 14.8B and 32.8B.
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "phi4_mini": 3_836_021_760,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}
CLIP_L_336 = 303_507_456


def choices(group: str) -> set[str]:
    """Returns the names of the YAML files of a group."""
    return {path.stem for path in (CONFIG_DIR / "model" / group).glob("*.yaml")} - {"released"}


def test_every_backbone_in_configs_has_a_known_shape() -> None:
    """Every backbone in configs/model has a known shape, so planning needs no download."""
    assert set(LANGUAGE_MODELS) == choices("language_model")
    assert set(VISION_TOWERS) == choices("vision_tower")


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_parameters(name: str) -> None:
    """Counted from the widths: embedding and head, attention with Qwen's biases, gated MLP, norms."""
    config = AutoConfig.for_model(**LANGUAGE_MODELS[name])
    shape = read_language_shape(config)
    tables = 1 if config.tie_word_embeddings else 2
    block = 2 * shape.width * (shape.query + shape.key) + 3 * shape.width * shape.mlp + 2 * shape.width
    if config.model_type == "qwen2":
        block += shape.query + 2 * shape.key
    if config.model_type in ("qwen3", "gemma3_text"):  # norms of queries and keys
        block += 2 * config.head_dim
    if config.model_type == "gemma3_text":  # norms of the attention's and the MLP's outputs
        block += 2 * shape.width
    assert tables * shape.vocabulary * shape.width + shape.layers * block + shape.width == PUBLISHED[name]


@pytest.mark.full
def test_a_model_on_the_meta_device_has_them_too() -> None:
    """The 7B without a directory has the card's counts, except for the rows of the image token, and every part is
    trained."""
    config = load(["mixture=lcs_558k", "name=test"], folders=False)
    assert not Path(config.model.language_model.path).exists()
    facts = count_model(read_architecture(config.model), config)
    assert facts.parameters["language_model"] == PUBLISHED["vicuna_7b"] + 2 * 64 * 4096
    assert facts.parameters["projector"] == 20_979_712
    post_norm = 2 * 1024
    assert facts.parameters["vision_tower"] + facts.upper_tower == CLIP_L_336
    assert facts.trained["vision_tower"] == facts.parameters["vision_tower"] - post_norm
    assert facts.largest_group < facts.num_trained < facts.num_parameters + 1


def test_a_folder_on_disk_is_read_instead(tiny_parts: RunConfig) -> None:
    """Frozen parts are counted as in a run, and the tower's upper layer separately."""
    architecture = read_architecture(tiny_parts.model)
    assert hasattr(architecture, "tokenizer")
    stage = SimpleNamespace(rates={"projector": 1e-3}, max_length=512)
    facts = count_model(architecture, SimpleNamespace(stage=stage, model=tiny_parts.model, lora=None, seed=0))  # type: ignore[arg-type]
    assert facts.language.width == 32
    assert facts.vision.layers == 2
    assert facts.upper_tower > 0
    assert {part for part, count in facts.trained.items() if count} == {"projector"}
    assert facts.num_trained == 24 * 32 + 32 + 32 * 32 + 32


def test_half_on_disk_is_enough(tmp_path: Path) -> None:
    """A language model with only its config.json, and a known tower; without a directory its shape is unknown."""
    own = tiny_model(tmp_path).language_model
    known = VisionTowerConfig("dinov2_small_70", "nowhere", tile=70)
    architecture = read_architecture(ModelConfig(own, known))
    assert (architecture.tile, architecture.patches_per_side) == (70, 5)
    with pytest.raises(ModelError, match=r"model\.language_model\.path: there is no folder nowhere.*config\.json"):
        read_architecture(ModelConfig(LanguageModelConfig("mine", "nowhere", "chatml"), known))

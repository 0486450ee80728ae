"""Owns the proofs about the recipes: their numbers are the published ones, and a backbone is one word.

The tables here are typed a second time, from the sources and not from the YAML files, so that a slip in either shows.
Which number is published and which is assumed stands in the comments of configs/recipe/.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from llava_next.config import AUTHORS_GRIDS, ModelConfig
from train.config.compose import check
from train.config.schema import CONFIG_DIR, RunConfig

STAGES = ("align", "finetune")
TOWERS = ("clip_vit_l_336", "dinov2_large", "siglip_so400m_384")
# Ours, not published: their numbers may change with the demonstrations.
OWN_MODELS = {"quickstart", "smollm2_135m"}


class Recipe(NamedTuple):
    """What a recipe decides; `template` is the one that applies, the model's own where the stage names none."""

    batch_size: int
    rates: tuple[float | None, float, float | None]
    """Of the vision tower, the projector, the language model; None: frozen."""
    max_length: int
    clip_norm: float | None
    template: str
    image_mode: str


LLAVA_1_5 = Recipe(256, (None, 1e-3, None), 2048, None, "plain", "square")
LLAVA_NEXT = Recipe(256, (None, 1e-3, None), 8192, 1.0, "plain", "square")

PUBLISHED: dict[tuple[str, str], Recipe] = {
    ("vicuna_7b", "align"): LLAVA_1_5,
    ("vicuna_13b", "align"): LLAVA_1_5,
    ("mistral_7b", "align"): LLAVA_1_5,
    ("hermes_yi_34b", "align"): LLAVA_1_5,
    ("llama3_8b", "align"): LLAVA_NEXT,
    ("qwen1_5_0_5b", "align"): LLAVA_NEXT,
    ("qwen1_5_7b", "align"): LLAVA_NEXT,
    ("qwen1_5_14b", "align"): LLAVA_NEXT,
    ("qwen1_5_32b", "align"): LLAVA_NEXT,
    ("qwen1_5_72b", "align"): LLAVA_NEXT,
    ("qwen1_5_110b", "align"): LLAVA_NEXT,
    ("qwen2_7b", "align"): LLAVA_NEXT,
    ("vicuna_7b", "finetune"): Recipe(128, (2e-6, 2e-5, 2e-5), 4096, None, "vicuna_v1", "anyres"),
    ("vicuna_13b", "finetune"): Recipe(128, (2e-6, 2e-5, 2e-5), 4096, None, "vicuna_v1", "anyres"),
    ("mistral_7b", "finetune"): Recipe(64, (2e-6, 2e-5, 2e-5), 4096, 1.0, "mistral_instruct", "anyres"),
    ("hermes_yi_34b", "finetune"): Recipe(128, (2e-6, 1e-5, 1e-5), 4096, 1.0, "chatml_direct", "anyres"),
    ("llama3_8b", "finetune"): Recipe(64, (2e-6, 1e-5, 1e-5), 8192, 1.0, "llava_llama_3", "anyres"),
    ("qwen1_5_0_5b", "finetune"): Recipe(128, (None, 2e-5, 2e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen1_5_7b", "finetune"): Recipe(128, (2e-6, 2e-5, 2e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen1_5_14b", "finetune"): Recipe(128, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen1_5_32b", "finetune"): Recipe(128, (1e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen1_5_72b", "finetune"): Recipe(128, (2e-6, 5e-6, 5e-6), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen1_5_110b", "finetune"): Recipe(128, (2e-6, 5e-6, 5e-6), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen2_7b", "finetune"): Recipe(128, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
}

LANGUAGE_MODELS = tuple(sorted({model for model, _ in PUBLISHED}))


def composed(*overrides: str) -> RunConfig:
    """A configuration as the command line composes it, checked but for the folders that it names."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        found = compose("train", overrides=["name=test", "mixture=quickstart_align", *overrides])
    return check(found, folders=False)


def recipe_of(config: RunConfig) -> Recipe:
    """The composed configuration as a row of the table."""
    stage = config.stage
    return Recipe(
        stage.batch_size,
        (stage.rates.get("vision_tower"), stage.rates["projector"], stage.rates.get("language_model")),
        stage.max_length,
        stage.clip_norm,
        stage.template or config.model.language_model.template,
        stage.image_mode,
    )


def choices(group: str) -> set[str]:
    """Names of the YAML files of a config group."""
    return {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")} - {"released"}  # whatever lies in init_from


@pytest.mark.parametrize(("language_model", "stage"), PUBLISHED)
def test_numbers_are_the_published_ones(language_model: str, stage: str) -> None:
    """`model/language_model=NAME stage=NAME` and nothing else gives the numbers of the sources."""
    config = composed(f"model/language_model={language_model}", f"stage={stage}")
    assert recipe_of(config) == PUBLISHED[language_model, stage]
    # Common to all runs of the authors.
    common = config.stage
    assert (common.epochs, common.schedule, common.warmup_ratio, common.weight_decay) == (1.0, "cosine", 0.03, 0.0)
    assert config.model.grids == AUTHORS_GRIDS


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_stage_1_shows_siglip_the_whole_image(language_model: str) -> None:
    """With a SigLIP tower the authors' stage 1 resizes the whole image to a square, whatever the language model; all
    else is the language model's recipe, and what is typed wins."""
    words = (f"model/language_model={language_model}", "stage=align", "model/vision_tower=siglip_so400m_384")
    config = composed(*words)
    assert recipe_of(config) == PUBLISHED[language_model, "align"]._replace(image_mode="squash")
    assert composed(*words, "stage.image_mode=square").stage.image_mode == "square"
    assert composed(*words[:2], "model/vision_tower=dinov2_large").stage.image_mode == "square"


def test_every_recipe_of_a_tower_is_found_by_a_run() -> None:
    """Its name is <vision_tower>_<stage>, of a tower and a stage that there are."""
    known = {f"{tower}_{stage}" for tower in choices("model/vision_tower") for stage in STAGES}
    assert choices("recipe/vision_tower") == {"siglip_so400m_384_align"}
    assert choices("recipe/vision_tower") <= known


def test_every_published_backbone_has_both_recipes_and_a_row_here() -> None:
    """No recipe file is outside the table, and none of the table is missing (which Hydra would not say)."""
    files = {f"{model}_{stage}" for model, stage in PUBLISHED}
    own = {f"{model}_{stage}" for model in OWN_MODELS for stage in STAGES}
    assert choices("recipe") - own == files
    assert choices("model/language_model") - OWN_MODELS == set(LANGUAGE_MODELS)
    assert set(PUBLISHED) == {(model, stage) for model, _ in PUBLISHED for stage in STAGES}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_every_language_model_composes_with_every_tower(language_model: str) -> None:
    """The backbones are two words on the command line, and each keeps its recipe whatever the tower."""
    stages = []
    for tower in TOWERS:
        config = composed(f"model/language_model={language_model}", f"model/vision_tower={tower}")
        assert config.model.language_model.name == language_model
        assert config.model.vision_tower.name == tower
        stages.append(config.stage)
    assert stages == [stages[0]] * len(TOWERS)


# Stages of the models before LLaVA-NeXT, by their scripts; the template of stage 2 is the language model's own.
EARLIER: dict[str, tuple[Recipe, str]] = {
    "llava_1_5/align": (LLAVA_1_5, "mlp2x_gelu"),
    "llava_1_5/finetune": (Recipe(128, (None, 2e-5, 2e-5), 2048, None, "", "pad"), "mlp2x_gelu"),
    "llava/align": (Recipe(128, (None, 2e-3, None), 2048, None, "plain", "square"), "linear"),
    "llava/finetune": (Recipe(128, (None, 2e-5, 2e-5), 2048, None, "", "square"), "linear"),
}


@pytest.mark.parametrize("language_model", ["vicuna_7b", "vicuna_13b", "llama3_8b"])
@pytest.mark.parametrize("stage", EARLIER)
def test_earlier_models_are_a_choice_of_stage(language_model: str, stage: str) -> None:
    """`stage=llava_1_5/NAME` and `stage=llava/NAME` alone give the numbers, the views and the projector of LLaVA-1.5
    and LLaVA, undisturbed by LLaVA-NeXT's recipes."""
    config = composed(f"model/language_model={language_model}", f"stage={stage}")
    expected, projector = EARLIER[stage]
    assert recipe_of(config) == expected._replace(template=expected.template or config.model.language_model.template)
    assert config.model.projector == projector
    common = config.stage
    assert (common.epochs, common.schedule, common.warmup_ratio, common.weight_decay) == (1.0, "cosine", 0.03, 0.0)
    # Steps of a run like any other: the same folders, and the connector that the second one starts from.
    name = stage.partition("/")[2]
    assert config.run_dir == Path("outputs/test") / name
    assert config.stage.init_from == (None if name == "align" else "outputs/test/align/connector")
    assert config.stage.result == ("connector" if name == "align" else "export")


def test_every_earlier_stage_is_known_here() -> None:
    """No stage file in a folder is outside the table."""
    assert {f"{path.parent.name}/{path.stem}" for path in (CONFIG_DIR / "stage").glob("*/*.yaml")} == set(EARLIER)


@pytest.mark.parametrize("stage", STAGES)
def test_a_linear_projector_is_one_word(stage: str) -> None:
    """`model.projector=linear` keeps the recipe and changes the connector alone."""
    config = composed("model/language_model=vicuna_7b", f"stage={stage}", "model.projector=linear")
    assert config.model.projector == "linear"
    assert recipe_of(config) == PUBLISHED["vicuna_7b", stage]


def test_the_command_line_has_the_last_word_over_a_recipe() -> None:
    """Recipes are defaults: what is typed wins, also for a part that a recipe leaves out."""
    config = composed("model/language_model=hermes_yi_34b", "stage.learning_rates.language_model=2.0e-5")
    assert config.stage.rates["language_model"] == 2e-5
    config = composed("model/language_model=qwen1_5_0_5b", "+stage.learning_rates.vision_tower=2.0e-6")
    assert config.stage.rates["vision_tower"] == 2e-6


def test_the_seven_grids_of_the_blog_are_a_preset() -> None:
    """`+model/grids=blog7` adds the two long grids after the authors' five, whose ties it leaves as they are."""
    assert composed("+model/grids=blog7").model.grids == (*AUTHORS_GRIDS, (1, 4), (4, 1))
    assert composed("model.grids=[[2,2],[1,2]]").model.grids == ((2, 2), (1, 2))


# ------------------------------------------------------------------------- the architectures behind the names


def write_stand_in(folder: Path, architecture: str, num_heads: int = 4) -> Path:
    """A two-layer language model of an architecture, with config.json and tokenizer as its publisher lays them out."""
    import transformers

    from tests.tiny import tiny_tokenizer

    qwen = architecture == "Qwen2Config"
    tiny_tokenizer(folder, "bytes" if qwen else "metaspace", None if qwen else "<s>")
    sizes: dict[str, Any] = {
        "vocab_size": 520,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    }
    if architecture == "MistralConfig":
        sizes["sliding_window"] = None  # as v0.2's config.json has it
    if qwen:
        sizes |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}  # as the released ones
    getattr(transformers, architecture)(**sizes).save_pretrained(folder)
    return folder


def write_tower(folder: Path, tower: str, *, with_weights: bool = False) -> Path:
    """A narrow three-layer tower with the published picture and patch sizes of a choice."""
    from transformers import AutoModel, CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 14}
    if tower == "clip_vit_l_336":
        config: Any = CLIPVisionConfig(image_size=336, intermediate_size=40, **sizes)
    elif tower == "siglip_so400m_384":
        config = SiglipVisionConfig(image_size=384, intermediate_size=40, **sizes)
    else:
        config = Dinov2Config(image_size=518, mlp_ratio=2, **sizes)
    (AutoModel.from_config(config) if with_weights else config).save_pretrained(folder)
    return folder


def stand_in(folder: Path, architecture: str, language_model: str, tower: str, more: Sequence[str] = ()) -> RunConfig:
    """The composed configuration of a recipe whose two folders hold stand-ins with random weights."""
    model = write_stand_in(folder / "language_model", architecture)
    return composed(
        f"model/language_model={language_model}",
        f"model/vision_tower={tower}",
        f"model.language_model.path={model}",
        "model.language_model.weights=random",
        f"model.vision_tower.path={write_tower(folder / 'tower', tower)}",
        "model.vision_tower.weights=random",
        *more,
    )


@pytest.mark.parametrize(
    ("language_model", "architecture", "tower", "tile", "patches"),
    [
        ("vicuna_13b", "LlamaConfig", "clip_vit_l_336", 336, 24),
        ("mistral_7b", "MistralConfig", "dinov2_large", 336, 24),
        ("qwen2_7b", "Qwen2Config", "siglip_so400m_384", 384, 27),
    ],
)
def test_another_architecture_builds_without_python(
    tmp_path: Path, language_model: str, architecture: str, tower: str, tile: int, patches: int
) -> None:
    """Llama, Mistral and Qwen2 behind each tower become a model and a processor from the YAML files alone."""
    import torch

    from llava_next.model.build import build_model, read_backbone

    config = stand_in(tmp_path, architecture, language_model, tower)
    backbone = read_backbone(config.model)
    assert (backbone.tile, backbone.patches_per_side) == (tile, patches)
    assert backbone.hf_config.text_config.model_type == architecture.removesuffix("Config").lower()
    model = build_model(backbone, dtype=torch.float32, seed=0)
    assert model.hf.model.language_model.embed_tokens.weight.shape[0] == backbone.hf_config.text_config.vocab_size
    stage = config.stage
    processor = backbone.processor(template=stage.template, image_mode=stage.image_mode, max_length=stage.max_length)
    layout = processor.layout(picture_question(), [(2 * tile, 2 * tile)])
    assert count_image_tokens(layout) == patches**2 + (2 * patches) * (2 * patches + 1)


def picture_question() -> list[Any]:
    """One question on one picture, with its answer."""
    from data_recipes.schema.sample import Message

    return [Message("user", "<image>\nWhat is in the picture?"), Message("assistant", "A red circle.")]


def count_image_tokens(layout: Any) -> int:
    """Image tokens of an encoded sample's layout."""
    return int(sum(image.num_tokens for image in layout.images))


@pytest.mark.parametrize("tile", [None, 378])
def test_a_published_siglip_loads_whole_at_its_tile(tmp_path: Path, tile: int | None) -> None:
    """Its own 384 pixels, six of them unseen, and a tile of 378, which sees all, keep its 27 x 27 positions as they
    are: nothing is resampled."""
    import torch
    from transformers import AutoModel

    from llava_next.model.build import build_model, read_backbone

    config = stand_in(tmp_path, "Qwen2Config", "qwen2_7b", "siglip_so400m_384")
    folder = write_tower(tmp_path / "published", "siglip_so400m_384", with_weights=True)
    tower = replace(config.model.vision_tower, path=str(folder), weights="pretrained", tile=tile)
    backbone = read_backbone(ModelConfig(config.model.language_model, tower, config.model.grids))
    assert (backbone.tile, backbone.patches_per_side) == (tile or 384, 27)
    built = build_model(backbone, dtype=torch.float32, seed=0).hf.model.vision_tower.state_dict()
    published = AutoModel.from_pretrained(folder).state_dict()
    assert published["embeddings.position_embedding.weight"].shape[0] == 27 * 27
    for name in built:
        assert torch.equal(built[name], published[name]), name

"""Tests that the recipes have the published values, and that backbones can be combined freely.

The tables were typed from the sources and not from the YAML files, so that an error in either is found. The comments in
configs/recipe/ say which values are published and which are assumed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.config import AUTHORS_GRIDS, ModelConfig, TemplateConfig, ViewsConfig, stock_class
from train.config.compose import check
from train.config.schema import ConfigError, RunConfig
from train.plan.__main__ import _split_stages

STAGES = ("align", "finetune")
TOWERS = ("clip_vit_l_336", "dinov2_large", "siglip_so400m_384")
# Own models without published values.
OWN_MODELS = {"quickstart", "smollm2_135m"}
# Language models that the authors did not train with.
WITHOUT_RECIPE = {
    *(f"qwen3_{size}" for size in ("0_6b", "1_7b", "4b", "8b", "14b", "32b")),
    *(f"qwen2_5_{size}" for size in ("0_5b", "1_5b", "3b", "7b", "14b", "32b", "72b")),
    *("llama3_1_8b", "llama3_2_1b", "llama3_2_3b", "mistral_7b_v0_3", "gemma3_270m", "gemma3_1b", "phi4_mini"),
    *("smollm2_360m", "smollm2_1_7b", "smollm3_3b"),
}


class Recipe(NamedTuple):
    """The values of a recipe. `template` is the one in effect, that of the model if the stage has none."""

    batch_size: int
    rates: tuple[float | None, float, float | None]
    """Learning rates of vision tower, projector and language model; None if frozen."""
    max_length: int
    clip_norm: float | None
    template: str | TemplateConfig
    view: str


LLAVA_1_5 = Recipe(256, (None, 1e-3, None), 2048, None, "plain", "crop")
LLAVA_NEXT = Recipe(256, (None, 1e-3, None), 8192, 1.0, "plain", "crop")

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
    ("qwen2_0_5b", "align"): LLAVA_NEXT,
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
    ("qwen2_0_5b", "finetune"): Recipe(128, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    ("qwen2_7b", "finetune"): Recipe(128, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
}

LANGUAGE_MODELS = tuple(sorted({model for model, _ in PUBLISHED}))


def composed(*overrides: str) -> RunConfig:
    """Compose and validate a configuration, without checking that its folders exist."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed_config = compose("train", overrides=["name=test", "mixture=quickstart_align", *overrides])
    return check(composed_config, folders=False)


def recipe_of(config: RunConfig) -> Recipe:
    """Return the values of a composed configuration."""
    stage = config.stage
    assert stage.views == ViewsConfig(stage.views.single, stage.views.single)
    return Recipe(
        stage.batch_size,
        (stage.rates.get("vision_tower"), stage.rates["projector"], stage.rates.get("language_model")),
        stage.max_length,
        stage.clip_norm,
        stage.template or config.model.language_model.template,
        stage.views.single,
    )


def choices(group: str) -> set[str]:
    """Return the names of the YAML files of a config group."""
    return {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")} - {"released"}  # depends on init_from


@pytest.mark.parametrize(("language_model", "stage"), PUBLISHED)
def test_values_are_the_published_ones(language_model: str, stage: str) -> None:
    """`model/language_model=NAME stage=NAME` alone gives the published values."""
    config = composed(f"model/language_model={language_model}", f"stage={stage}")
    assert recipe_of(config) == PUBLISHED[language_model, stage]
    # Common to all runs of the authors.
    common = config.stage
    assert (common.epochs, common.schedule, common.warmup_ratio, common.weight_decay) == (1.0, "cosine", 0.03, 0.0)
    assert config.model.grids == AUTHORS_GRIDS


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_stage_1_of_siglip(language_model: str) -> None:
    """With a SigLIP tower, stage 1 resizes the complete image to a square with any language model; the command line has
    precedence."""
    words = (f"model/language_model={language_model}", "stage=align", "model/vision_tower=siglip_so400m_384")
    config = composed(*words)
    assert recipe_of(config) == PUBLISHED[language_model, "align"]._replace(view="squash")
    chosen = composed(*words, "stage.views.single=crop", "stage.views.several=pad").stage.views
    assert chosen == ViewsConfig("crop", "pad")
    assert composed(*words[:2], "model/vision_tower=dinov2_large").stage.views == ViewsConfig("crop", "crop")


def test_tower_recipes() -> None:
    """A tower's recipe has a name <vision_tower>_<stage>, by which runs find it."""
    known = {f"{tower}_{stage}" for tower in choices("model/vision_tower") for stage in STAGES}
    assert choices("recipe/vision_tower") == {"siglip_so400m_384_align"}
    assert choices("recipe/vision_tower") <= known


def test_recipe_files_and_table_agree() -> None:
    """The recipe files and the table agree; Hydra would not report a missing file."""
    files = {f"{model}_{stage}" for model, stage in PUBLISHED}
    own_recipes = {f"{model}_{stage}" for model in OWN_MODELS for stage in STAGES}
    assert choices("recipe") - own_recipes == files
    assert choices("model/language_model") - OWN_MODELS - WITHOUT_RECIPE == set(LANGUAGE_MODELS)
    assert set(PUBLISHED) == {(model, stage) for model, _ in PUBLISHED for stage in STAGES}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_every_language_model_composes_with_every_tower(language_model: str) -> None:
    """Every pair of backbones can be selected, and the recipe does not depend on the tower."""
    stages = []
    for tower in TOWERS:
        config = composed(f"model/language_model={language_model}", f"model/vision_tower={tower}")
        assert config.model.language_model.name == language_model
        assert config.model.vision_tower.name == tower
        stages.append(config.stage)
    assert stages == [stages[0]] * len(TOWERS)


# Stages of earlier models, from their scripts; the template of stage 2 is that of the language model.
EARLIER: dict[str, tuple[Recipe, str]] = {
    "llava_1_5/align": (LLAVA_1_5, "mlp2x_gelu"),
    "llava_1_5/finetune": (Recipe(128, (None, 2e-5, 2e-5), 2048, None, "", "pad"), "mlp2x_gelu"),
    "llava/align": (Recipe(128, (None, 2e-3, None), 2048, None, "plain", "crop"), "linear"),
    "llava/finetune": (Recipe(128, (None, 2e-5, 2e-5), 2048, None, "", "crop"), "linear"),
}


@pytest.mark.parametrize("language_model", ["vicuna_7b", "vicuna_13b", "llama3_8b"])
@pytest.mark.parametrize("stage", EARLIER)
def test_earlier_models(language_model: str, stage: str) -> None:
    """`stage=llava_1_5/NAME` and `stage=llava/NAME` alone give values, views and projector of the earlier models."""
    config = composed(f"model/language_model={language_model}", f"stage={stage}")
    expected, projector = EARLIER[stage]
    assert recipe_of(config) == expected._replace(template=expected.template or config.model.language_model.template)
    assert config.model.projector == projector
    common = config.stage
    assert (common.epochs, common.schedule, common.warmup_ratio, common.weight_decay) == (1.0, "cosine", 0.03, 0.0)
    # They replace the usual stages: the same folders, and stage 2 starts from the connector of stage 1.
    name = stage.partition("/")[2]
    assert config.run_dir == Path("outputs/test") / name
    assert config.stage.init_from == (None if name == "align" else "outputs/test/align/connector")
    assert config.stage.result == ("connector" if name == "align" else "export")


class Later(NamedTuple):
    """A stage of the later works: its values, its views of several images, and what it starts from and results in."""

    name: str
    recipe: Recipe
    several: str
    closing_newline: bool
    grids: int
    init_from: str
    result: str
    mixture: str


# Every size of a work has the same values. For Interleave only views and start are published, the numbers are those of
# LLaVA-NeXT's script for SigLIP; for OneVision's stage 1.5 only the rates.
INTERLEAVE = Later(
    "interleave",
    Recipe(128, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres"),
    "pad",
    False,
    5,
    "finetune/export",
    "connector",
    "interleave",
)
ONEVISION = Recipe(256, (2e-6, 1e-5, 1e-5), 32768, 1.0, "qwen_1_5", "anyres_max_9")
MID = Later("mid", ONEVISION, "pad", True, 36, "align/connector", "export", "onevision_mid")
SINGLE_IMAGE = Later("single_image", ONEVISION, "pad", True, 36, "mid/export", "export", "onevision_single_image")
LATER: dict[str, Later] = {
    "interleave/finetune": INTERLEAVE,
    "onevision/mid": MID,
    "onevision/single_image": SINGLE_IMAGE,
}
# {experiment: (language model, its stages)}
LATER_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "interleave_0_5b": ("qwen1_5_0_5b", ("interleave/finetune",)),
    "interleave_7b": ("qwen1_5_7b", ("interleave/finetune",)),
    "interleave_14b": ("qwen1_5_14b", ("interleave/finetune",)),
    "onevision_0_5b": ("qwen2_0_5b", ("onevision/single_image", "onevision/mid")),
    "onevision_7b": ("qwen2_7b", ("onevision/single_image", "onevision/mid")),
}


@pytest.mark.parametrize(
    ("experiment", "stage"), [(name, stage) for name, (_, stages) in LATER_MODELS.items() for stage in stages]
)
def test_later_works(experiment: str, stage: str) -> None:
    """An experiment selects backbones and the last stage; `stage=` selects another, with the values of the table."""
    language_model, stages = LATER_MODELS[experiment]
    expected = LATER[stage]
    words = [] if stage == stages[0] else [f"stage={stage}"]
    config = composed(f"experiment={experiment}", *words, f"mixture={expected.mixture}")
    assert config.model.language_model.name == language_model
    assert config.model.vision_tower.name == "siglip_so400m_384"
    assert config.stage.name == expected.name
    views = ViewsConfig(expected.recipe.view, expected.several, expected.closing_newline)
    assert config.stage.views == views
    assert recipe_of(replace(config, stage=replace(config.stage, views=ViewsConfig(views.single, views.single)))) == (
        expected.recipe
    )
    common = config.stage
    assert (common.epochs, common.schedule, common.warmup_ratio, common.weight_decay) == (1.0, "cosine", 0.03, 0.0)
    assert len(config.model.grids) == expected.grids
    assert config.model.grids == composed(*(["+model/grids=onevision36"] if expected.grids == 36 else [])).model.grids
    assert (common.init_from, common.result) == (f"outputs/test/{expected.init_from}", expected.result)
    # A stage that starts from a whole model reads all of it.
    start = common.init_from if expected.init_from.endswith("export") else None
    for part in (config.model.language_model, config.model.vision_tower):
        assert (part.weights, part.path) == ("init_from", start) if start else part.weights == "pretrained"
    assert config.engine["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("experiment", ["onevision_0_5b", "onevision_7b"])
def test_stage_1_of_onevision(experiment: str) -> None:
    """Stage 1 is `stage=align`: one view of 729 tokens."""
    config = composed(f"experiment={experiment}", "stage=align", "mixture=lcs_558k")
    assert recipe_of(config) == LLAVA_NEXT._replace(view="squash")


@pytest.mark.parametrize("experiment", [name for name in LATER_MODELS if name.startswith("interleave")])
def test_what_interleave_exports(experiment: str) -> None:
    """The views of the training have no export, which is said; the views of the release's serving are a LLaVA's."""
    words = (f"experiment={experiment}", "stage.result=export")
    with pytest.raises(ConfigError, match="cannot be exported"):
        composed(*words)
    assert stock_class(composed(*words, "stage.views.single=pad").stage.views) == "llava"


def test_stages_in_folders_and_tables_agree() -> None:
    """The stage files in folders and the tables agree."""
    files = {f"{path.parent.name}/{path.stem}" for path in (CONFIG_DIR / "stage").glob("*/*.yaml")}
    assert files == set(EARLIER) | set(LATER)
    assert {name for name in choices("experiment") if name.startswith(("interleave", "onevision"))} == set(LATER_MODELS)


@pytest.mark.parametrize("stage", LATER)
def test_planner_knows_the_mixture_of_a_later_stage(stage: str) -> None:
    """Without `mixture=`, the planner uses the stage's own."""
    words = [f"stage={stage}", "hardware=cpu", "model/language_model=qwen2_7b"]
    assert _split_stages(words) == [["name=plan", *words, f"mixture={LATER[stage].mixture}"]]


@pytest.mark.parametrize("stage", STAGES)
def test_linear_projector(stage: str) -> None:
    """`model.projector=linear` changes only the connector."""
    config = composed("model/language_model=vicuna_7b", f"stage={stage}", "model.projector=linear")
    assert config.model.projector == "linear"
    assert recipe_of(config) == PUBLISHED["vicuna_7b", stage]


def test_command_line_overrides_recipe() -> None:
    """The command line has precedence over a recipe, also for parts that the recipe does not train."""
    config = composed("model/language_model=hermes_yi_34b", "stage.learning_rates.language_model=2.0e-5")
    assert config.stage.rates["language_model"] == 2e-5
    config = composed("model/language_model=qwen1_5_0_5b", "+stage.learning_rates.vision_tower=2.0e-6")
    assert config.stage.rates["vision_tower"] == 2e-6


def test_grids_of_onevision() -> None:
    """`+model/grids=onevision36` has all grids of up to 6 x 6 tiles, in the order of the authors' scripts."""
    grids = tuple((rows, columns) for columns in range(1, 7) for rows in range(1, 7))
    assert composed("+model/grids=onevision36", "packing.max_tiles=48").model.grids == grids


def test_seven_grids_preset() -> None:
    """`+model/grids=blog7` appends the two additional grids to the authors' five."""
    assert composed("+model/grids=blog7").model.grids == (*AUTHORS_GRIDS, (1, 4), (4, 1))
    assert composed("model.grids=[[2,2],[1,2]]").model.grids == ((2, 2), (1, 2))


# ---------------------------------------------------------------------------------------------- architectures


def write_small_language_model(folder: Path, architecture: str, num_heads: int = 4) -> Path:
    """Write a two-layer language model of an architecture, with config.json and tokenizer as published."""
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
        sizes["sliding_window"] = None  # as in the config.json of v0.2
    if qwen:
        sizes |= {
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 1,
        }  # as in the released configs
    getattr(transformers, architecture)(**sizes).save_pretrained(folder)
    return folder


def write_tower(folder: Path, tower: str, *, with_weights: bool = False) -> Path:
    """Write a small three-layer tower with the published image and patch sizes."""
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


def compose_with_small_backbones(
    folder: Path, architecture: str, language_model: str, tower: str, more: Sequence[str] = ()
) -> RunConfig:
    """Compose the configuration of a recipe with small random backbones."""
    model = write_small_language_model(folder / "language_model", architecture)
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
def test_architectures_are_built_from_yaml(
    tmp_path: Path, language_model: str, architecture: str, tower: str, tile: int, patches: int
) -> None:
    """Llama, Mistral and Qwen2 with each tower are built from the YAML files alone."""
    import torch

    from llava_next.model.build import build_model, read_backbone

    config = compose_with_small_backbones(tmp_path, architecture, language_model, tower)
    backbone = read_backbone(config.model)
    assert (backbone.tile, backbone.patches_per_side) == (tile, patches)
    assert backbone.hf_config.text_config.model_type == architecture.removesuffix("Config").lower()
    model = build_model(backbone, dtype=torch.float32, seed=0)
    assert model.hf.model.language_model.embed_tokens.weight.shape[0] == backbone.hf_config.text_config.vocab_size
    stage = config.stage
    processor = backbone.processor(template=stage.template, views=stage.views, max_length=stage.max_length)
    layout = processor.layout(image_question(), [(2 * tile, 2 * tile)])
    assert count_image_tokens(layout) == patches**2 + (2 * patches) * (2 * patches + 1)


def image_question() -> list[Any]:
    """Return a conversation with one question about one image."""
    from data_recipes.schema.sample import Message

    return [Message("user", "<image>\nWhat is in the image?"), Message("assistant", "A red circle.")]


def count_image_tokens(layout: Any) -> int:
    """Return the number of image tokens in the layout of a sample."""
    return int(sum(image.num_tokens for image in layout.images))


@pytest.mark.parametrize("tile", [None, 378])
def test_siglip_positions_are_not_resampled(tmp_path: Path, tile: int | None) -> None:
    """A published SigLIP keeps its 27 x 27 position embeddings with tiles of 384 and 378 pixels."""
    import torch
    from transformers import AutoModel

    from llava_next.model.build import build_model, read_backbone

    config = compose_with_small_backbones(tmp_path, "Qwen2Config", "qwen2_7b", "siglip_so400m_384")
    folder = write_tower(tmp_path / "published", "siglip_so400m_384", with_weights=True)
    tower = replace(config.model.vision_tower, path=str(folder), weights="pretrained", tile=tile)
    backbone = read_backbone(ModelConfig(config.model.language_model, tower, config.model.grids))
    assert (backbone.tile, backbone.patches_per_side) == (tile or 384, 27)
    built = build_model(backbone, dtype=torch.float32, seed=0).hf.model.vision_tower.state_dict()
    published = AutoModel.from_pretrained(folder).state_dict()
    assert published["embeddings.position_embedding.weight"].shape[0] == 27 * 27
    for name in built:
        assert torch.equal(built[name], published[name]), name

"""One model and one list of samples for all competitors, in the form that each of them reads.

The folder of the materials:

    language_model/  tower/   configs of random parts      (ours)
    model/                    the weights, as a Hugging Face directory, with processor (all)
    stores/                   the samples, prepared          (ours)
    raw/                      the same samples as LLaVA's JSON and files, in the order of the steps (the others)
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
import yaml
from training_step.drawn_samples import SizeHW, draw_samples
from training_step.job import CLIP_NORM, LEARNING_RATE, TEMPLATE, Job
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import samples_of_step
from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.config import (
    ANYRES,
    AUTHORS_GRIDS,
    AttentionKernel,
    Grid,
    LanguageModelConfig,
    ModelConfig,
    ViewsConfig,
    VisionTowerConfig,
)
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.processor import Processor, SampleRejected
from llava_next.model.build import Backbone, build_model, read_backbone
from train.config.schema import DataConfig, PackingConfig, RunConfig, SaveConfig, StageConfig
from train.data.length_table import LengthTable, open_table
from train.data.loader import build_processor

STORE = "bench"


@dataclass(frozen=True)
class Shape:
    """A model and the samples that go with it.

    `window` is the smallest and the largest number of tokens of a sample. `spread` is the standard deviation of the
    language model's first weights: large, so that a wrong token or tile changes the fourth digit of the loss. `shrink`
    divides images and texts, for tiny tiles. Every other sample has one image; the rest go through `images_per_set`.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    tower_width: int
    tower_layers: int
    tower_heads: int
    window: tuple[int, int] = (2000, 3200)
    spread: float = 0.05
    vocabulary: int = 32_000
    tile: int = 336
    patch: int = 14
    shrink: int = 1
    positions: int = 4096
    tower: Literal["clip", "siglip"] = "clip"
    views: ViewsConfig = ANYRES
    grids: tuple[Grid, ...] = AUTHORS_GRIDS
    images_per_set: tuple[int, ...] = (1,)


_WIDE = Shape(1024, 6, 16, 2752, 256, 6, 4)
_TINY = Shape(32, 2, 4, 48, 24, 3, 3, window=(30, 400), vocabulary=512, tile=28, patch=7, shrink=12)
_SETS: dict[str, Any] = {
    "tower": "siglip",
    "views": ViewsConfig("anyres_max_9", "pad", closing_newline=True),
    "grids": tuple((rows, cols) for rows in range(1, 7) for cols in range(1, 7)),
    "images_per_set": (2, 3, 4, 6),  # assumed: what M4-Instruct has is not published
}
"""LLaVA-OneVision: a single image with up to 36 tiles, reduced to about nine views, and sets of padded images."""

SHAPES = {
    # Real geometry and vocabulary; widths such that a step of eight samples takes two cores less than a minute.
    # ViT-L's share of the FLOPs beside a 7B is 5 %; here it is 9 %.
    "narrow": Shape(384, 6, 6, 1024, 96, 6, 2),
    # Where attention and head weigh less, as they do in a large model.
    "wide": _WIDE,
    # 384-pixel tiles of 729 patches, as SigLIP's.
    "sets": replace(_WIDE, window=(1400, 8000), tile=384, positions=16384, **_SETS),
    # CLIP ViT-L/14-336 and layers of a 7B; on_gpu.py sets their number by the memory of the card.
    "large": Shape(4096, 1, 32, 11008, 1024, 24, 16, spread=0.02),
    "tiny": _TINY,
    "tiny_sets": replace(_TINY, **_SETS),
}


@contextmanager
def prepared(shape: Shape, tokenizer: Path, job: Job, seed: int = 0, *, weights: bool = True) -> Iterator[Job]:
    """Yields the job with a temporary folder that holds its materials; without `weights` it can only be planned."""
    with TemporaryDirectory(prefix="llava_next_bench_") as name:
        given = replace(job, folder=name)
        _write_materials(given, shape, tokenizer, seed, weights=weights)
        yield given


def _write_materials(job: Job, shape: Shape, tokenizer: Path, seed: int, *, weights: bool) -> None:
    folder, num_steps = Path(job.folder), job.num_steps
    model_config = _write_configs(folder, shape, tokenizer)
    content = {"model": asdict(model_config), "views": asdict(shape.views)}
    (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")
    backbone = read_backbone(model_config)
    config = run_config(folder, Job(job.samples_per_step, num_steps, str(folder), max_tokens=shape.window[1]))
    processor = build_processor(backbone, config.stage)
    if weights:
        _write_model(folder, backbone, processor, seed, half=job.device == "cuda")

    def fits(messages: Any, sizes_hw: Sequence[SizeHW]) -> bool:
        try:
            length = processor.layout(messages, sizes_hw).num_tokens
        except SampleRejected:
            return False
        return shape.window[0] <= length <= shape.window[1]

    samples = draw_samples(job.samples_per_step * num_steps, seed, fits, shape.shrink, shape.images_per_set)
    write_store(folder / "stores" / STORE, SourceInfo(name=STORE, reader="llava_json", root=STORE), samples)
    mixture, table = open_data(config, processor)
    order = [samples_of_step(k, len(table), job.samples_per_step, config.seed, 1.0) for k in range(num_steps)]
    ids = [mixture.text(int(table.rows[n]["sample"])).id for step in order for n in step]
    by_id = {sample.id: sample for sample in samples}
    _write_raw(folder / "raw", [by_id[sample_id] for sample_id in ids])


def run_config(folder: Path, job: Job) -> RunConfig:
    """The configuration of this project's run on the materials."""
    model, views = model_config(folder), json.loads((folder / "model.json").read_text(encoding="utf-8"))["views"]
    rates: dict[str, float | None] = {"projector": LEARNING_RATE, "language_model": LEARNING_RATE}
    if job.trains_tower:
        rates["vision_tower"] = LEARNING_RATE
    positions = json.loads((folder / "language_model" / "config.json").read_text())["max_position_embeddings"]
    stage = StageConfig(
        "finetune",
        rates,
        batch_size=job.samples_per_step,
        max_length=positions,
        init_from=str(folder / "model"),
        schedule="constant",
        warmup_ratio=0.0,
        clip_norm=CLIP_NORM,
        views=ViewsConfig(**views),
    )
    return RunConfig(
        root=str(folder / "outputs"),
        name="bench",
        seed=0,
        model=model,
        stage=stage,
        mixture=MixtureConfig("bench", 0, {STORE: SourceShare()}),
        engine=yaml.safe_load((CONFIG_DIR / "engine" / f"zero{job.engine}.yaml").read_text()),
        packing=PackingConfig(max_tokens=job.max_tokens, max_tiles=1024),
        data=DataConfig(str(folder / "stores"), workers=job.workers, length_workers=1),
        save=SaveConfig(every=0),
        device="cuda" if job.device == "cuda" else "cpu",
        attention=cast(AttentionKernel, job.attention),
        recompute=("vision_tower", "language_model") if job.recompute else (),
        compile=("vision_tower", "language_model") if job.compile else (),
        liger=job.liger,
        deterministic=job.deterministic,
    )


def model_config(folder: Path) -> ModelConfig:
    """The model of the materials, with random weights until `model/` is read."""
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))["model"]
    return ModelConfig(
        LanguageModelConfig(**content["language_model"]),
        VisionTowerConfig(**content["vision_tower"]),
        tuple((rows, cols) for rows, cols in content["grids"]),
    )


def open_data(config: RunConfig, processor: Processor) -> tuple[Mixture, LengthTable]:
    """The mixture and its length table, which is written if it is absent."""
    root = Path(config.data.store_root)
    mixture = Mixture.open(config.mixture, root)
    table = open_table(mixture, processor, root / ".lengths", is_writer=True, num_workers=1, show_progress=False)
    return mixture, table


def _write_configs(folder: Path, shape: Shape, tokenizer: Path) -> ModelConfig:
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        initializer_range=shape.spread,
    ).save_pretrained(folder / "language_model")
    tower_config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[shape.tower]
    tower_config(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.tile,
        patch_size=shape.patch,
    ).save_pretrained(folder / "tower")
    return ModelConfig(
        LanguageModelConfig(
            "bench_llama", str(folder / "language_model"), TEMPLATE, tokenizer=str(tokenizer), weights="random"
        ),
        VisionTowerConfig(f"bench_{shape.tower}", str(folder / "tower"), weights="random"),
        shape.grids,
    )


def _write_model(folder: Path, backbone: Backbone, processor: Processor, seed: int, *, half: bool) -> None:
    """`half`: in bf16, so that a competitor in fp32 has the same weights."""
    with torch.device("cuda" if half and torch.cuda.is_available() else "cpu"):  # billions of random numbers
        model = build_model(backbone, dtype=torch.bfloat16 if half else torch.float32, seed=seed)
    write_hf(model.cpu(), backbone, processor, folder / "model")


def _write_raw(folder: Path, samples: list[Sample]) -> None:
    """LLaVA's JSON, with a list of images in the records that have several."""
    folder.mkdir()
    records = []
    for sample in samples:
        names = [f"{sample.id}_{number}.img" for number in range(len(sample.images))]
        for name, image in zip(names, sample.images, strict=True):
            assert isinstance(image, bytes)
            (folder / name).write_bytes(image)
        turns = [
            {"from": {"user": "human", "assistant": "gpt"}[message.role], "value": message.text}
            for message in sample.messages
        ]
        records.append({"id": sample.id, "image": names if len(names) > 1 else names[0], "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")

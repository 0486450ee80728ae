"""Builds the parts of a run in this order: data, model, planner, checkpoint, engine.

The initial weights come from the newest valid checkpoint, else from `init_from`, else from the pretrained parts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import deepspeed

from data_recipes.mixture.mixture import Mixture
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, read_backbone
from llava_next.model.checkpoint_config import check_image_statistics
from llava_next.model.flops import step_costs
from llava_next.model.llava_next import LlavaNext
from train.checkpoint import resume
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.data.length_table import LengthTable, check_budgets, open_table, table_folders
from train.data.loader import Planner, build_processor, make_blank_row
from train.data.local_stores import prepare_local_stores
from train.distributed.launch import Launch
from train.distributed.world import World
from train.engine.deepspeed_engine import start_engine
from train.engine.replica_checksums import compare_starts
from train.engine.sharded_model import build


@dataclass(frozen=True)
class RunParts:
    """The parts of a run on this rank, ready for its first step.

    Attributes:
        frozen: sha256 of the frozen parameters, by part.
        origin: description of where the weights come from.
        first_step: the step to begin or to continue with, from 0.
        num_skipped: earlier steps whose update was skipped because of non-finite numbers.
    """

    config: RunConfig
    world: World
    data: "RunData"
    model: LlavaNext
    planner: Planner
    engine: deepspeed.DeepSpeedEngine
    frozen: dict[str, str]
    origin: str
    first_step: int = 0
    num_skipped: int = 0


def assemble(config: RunConfig, world: World, data: "RunData", checkpoint: Path | None) -> RunParts:
    """Builds the model, loads its weights and starts the engine. Every rank must call it.

    Args:
        checkpoint: the checkpoint to continue from; None starts with the initial weights.
    """
    model, origin = build(data.backbone, config, world, num_sources=len(data.mixture.source_names))
    planner = make_planner(config, world, data.backbone, model, data.table)
    frozen = resume.hash_frozen_parts(model, world)
    first_step, num_skipped = 0, 0
    with resume.open_checkpoint(checkpoint, model, data.table.fingerprint, config, world) as resumption:
        engine = start_engine(model, config, world)
        if resumption is not None:
            origin = resumption.description
            blank = make_blank_row(data.processor).to(world.device)
            first_step = resumption.load(engine, blank, frozen, world, config)
            num_skipped = first_step - resumption.state.updates
    compare_starts(_summarize_start(config, data.table, checkpoint, origin, first_step, num_skipped), world)
    return RunParts(config, world, data, model, planner, engine, frozen, origin, first_step, num_skipped)


def _summarize_start(
    config: RunConfig, table: LengthTable, checkpoint: Path | None, origin: str, first_step: int, num_skipped: int
) -> dict[str, object]:
    """Returns what each rank has determined on its own; it must be equal on all ranks before the first step."""
    resumed = "fresh" if checkpoint is None else origin
    return {
        "configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data fingerprint": table.fingerprint,
        "length table": f"{len(table)} samples, {hashlib.sha256(table.rows.tobytes()).hexdigest()[:12]}",
        "checkpoint to resume from": checkpoint,
        "outcome of the resume": resumed,
        "first step": first_step,
        "skipped steps": num_skipped,
    }


class RunData(NamedTuple):
    """The data of a run, and the processor that encodes it."""

    backbone: Backbone
    processor: Processor
    mixture: Mixture
    table: LengthTable


def open_data(config: RunConfig, launch: Launch) -> RunData:
    """Opens the data; needs no process group. Rank 0 builds the length table if there is none."""
    stage, store_root = config.stage, Path(config.data.store_root)
    check_image_statistics(config.model.vision_tower)
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, stage)
    mixture = Mixture.open(config.mixture, store_root, prepare_local_stores(config, launch))
    folder, *fallbacks = table_folders(config)
    table = open_table(
        mixture,
        processor,
        folder,
        is_writer=launch.is_main,
        num_workers=config.data.length_workers,
        show_progress=launch.is_main,
        fallbacks=fallbacks,
    )
    check_budgets(table, config.packing)
    return RunData(backbone, processor, mixture, table)


def make_planner(config: RunConfig, world: World, backbone: Backbone, model: LlavaNext, table: LengthTable) -> Planner:
    """Returns the planner of this rank, with the FLOPs of this model's parts."""
    costs = step_costs(
        backbone.hf_config.vision_config,
        backbone.hf_config.text_config,
        projector=config.model.projector,
        num_vision_layers=model.num_tower_layers,
        trains_tower="vision_tower" in config.stage.rates,
        trains_language_model="language_model" in config.stage.rates,
        adapted=config.lora or (),
    )
    return Planner(
        table, config.stage, config.packing, costs, config.seed, world.rank, world.size, num_sources=model.num_sources
    )

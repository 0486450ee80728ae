"""The parts of a run, put together in the order of a start: data, model, planner, checkpoint, engine.

The order is fixed: resume, else `init_from`, else fresh parts. `run.py` and the tests start runs by it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import deepspeed

from data_recipes.mixture.mixture import Mixture
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, read_backbone
from llava_next.model.flops import step_costs
from llava_next.model.llava_next import LlavaNext
from llava_next.model.released import check_image_statistics
from train.checkpoint import resume
from train.checkpoint.saver import latest_valid
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.data.length_table import LengthTable, check_budgets, open_table
from train.data.loader import Planner, blank_row, stage_processor
from train.data.local_stores import local_stores
from train.distributed.world import Launch, World
from train.engine.deepspeed_engine import start_engine
from train.engine.replica_checksums import compare_starts
from train.engine.sharded_model import build


@dataclass(frozen=True)
class RunParts:
    """A run that is ready for its first step.

    Attributes:
        config, world, data, model, planner, engine: its parts on this rank.
        frozen: sha256 of the frozen parameters of each part.
        origin: what its weights come from, as a sentence.
        first_step: the step that it begins or continues with.
        num_skipped: steps before it that were left out.
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


def assemble(config: RunConfig, world: World, data: "RunData", *, resumes: bool = True) -> RunParts:
    """Builds the model, reads its weights, and starts the engine, from the newest valid checkpoint if there is one.
    Every rank must call it; errors are those of its parts.

    Args:
        resumes: look for a checkpoint in the run's folder.
    """
    model, origin = build(data.backbone, config, world, num_sources=len(data.mixture.source_names))
    planner = make_planner(config, world, data.backbone, model, data.table)
    frozen = resume.frozen_sums(model, world)
    first_step, num_skipped = 0, 0
    place = latest_valid(config.run_dir / "checkpoints", world) if resumes else None
    with resume.opened(place, model, data.table.fingerprint, config, world) as resumption:
        engine = start_engine(model, config, world)
        if resumption is not None:
            origin = resumption.description
            blank = blank_row(data.processor).to(world.device)
            first_step = resumption.load(engine, blank, frozen, world, config)
            num_skipped = first_step - resumption.state.updates
    compare_starts(_outcome(config, data.table, place, origin, first_step, num_skipped), world)
    return RunParts(config, world, data, model, planner, engine, frozen, origin, first_step, num_skipped)


def _outcome(
    config: RunConfig, table: LengthTable, place: Path | None, loaded: str, first_step: int, num_skipped: int
) -> dict[str, object]:
    """What every rank must have come to by itself before the first step."""
    resumed = "fresh" if place is None else loaded
    return {
        "configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data fingerprint": table.fingerprint,
        "length table": f"{len(table)} samples, {hashlib.sha256(table.rows.tobytes()).hexdigest()[:12]}",
        "checkpoint to resume from": place,
        "outcome of the resume": resumed,
        "first step": first_step,
        "steps that were left out": num_skipped,
    }


class RunData(NamedTuple):
    """What a run reads, and by which processor of which model."""

    backbone: Backbone
    processor: Processor
    mixture: Mixture
    table: LengthTable


def open_data(config: RunConfig, launch: Launch) -> RunData:
    """What can be known without a process group; every rank opens it, rank 0 makes the length table if need be."""
    stage, store_root = config.stage, Path(config.data.store_root)
    check_image_statistics(config.model.vision_tower)
    backbone = read_backbone(config.model)
    processor = stage_processor(backbone, stage)
    mixture = Mixture.open(config.mixture, store_root, local_stores(config, launch))
    table = open_table(
        mixture,
        processor,
        store_root / ".lengths",
        is_writer=launch.is_main,
        num_workers=config.data.length_workers,
        show_progress=launch.is_main,
    )
    check_budgets(table, config.packing)
    return RunData(backbone, processor, mixture, table)


def make_planner(config: RunConfig, world: World, backbone: Backbone, model: LlavaNext, table: LengthTable) -> Planner:
    """The steps of this run on this rank, with the costs of this model's parts."""
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

"""One stage from its configuration to its result: builds the parts in order, trains, writes what comes next.

The order at the start is fixed: resume, else `init_from`, else fresh parts.
"""

import json
import logging
import shutil
import time
from contextlib import closing
from datetime import UTC, datetime
from functools import partial

import torch

from data_recipes.mixture.mixture import Mixture
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import unsupported_by_stock
from train.assemble import RunData, assemble, open_data
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.data.length_table import LengthTable
from train.data.loader import Planner, batches, stage_processor
from train.distributed.versions import versions
from train.distributed.world import Launch, World, barrier, start
from train.engine import deepspeed_ops
from train.engine.deepspeed_engine import gathered
from train.engine.optimizer import format_part_table, part_table
from train.observability.run_log import RunLog, start_logging
from train.supervision import preflight
from train.supervision.rank_progress import sample_names
from train.supervision.watchdog import Watch
from train.trainer import Trainer
from train.validation.held_out import HeldOut, hold_out, of_mixture
from train.validation.live_answers import LiveAnswers, live_answers

logger = logging.getLogger(__name__)


def run(config: RunConfig, launch: Launch, watch: Watch) -> None:
    """Trains the stage and writes its result. Errors are those of its parts; see `__main__` for exit codes.

    The process group is left by the caller, who knows whether the others can still be waited for.
    """
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    start_logging(launch, run_dir)
    deadline_s = time.monotonic() + 60 * config.time_limit_min if config.time_limit_min else float("inf")
    with watch:
        world = _start(config, launch)
        data = open_data(config, launch)
        if config.preflight == "only":
            parts = assemble(config, world, data, resumes=False)
            preflight.rehearse(config, world, parts.engine, data.mixture, data.table, data.processor)
            return
        parts = assemble(config, world, data)
        model, planner, engine, first_step = parts.model, parts.planner, parts.engine, parts.first_step
        watch.names = partial(sample_names, planner, data.mixture)
        if world.is_main:  # only now: a start that the checkpoint refuses leaves the folder as it was
            _write_data_summary(config, data.mixture, data.table)
            _log_start(config, world, data.table, first_step, parts.origin)
        last_step = min(planner.num_steps, config.max_steps or planner.num_steps)
        with closing(RunLog(config, is_main=world.is_main, first_step=first_step, num_steps=last_step)) as log:
            log.say(_opening(config, world, data, planner.num_steps, parts.origin))
            log.say(format_part_table(part_table(model, engine.optimizer)))
            if first_step < last_step:
                held, asked = build_validation(config, data.mixture, data.backbone, data.processor, planner)
                stream = batches(
                    planner,
                    data.mixture,
                    data.processor,
                    range(first_step, last_step),
                    config.data,
                    pin_memory=world.device.type == "cuda",
                )
                Trainer(
                    config,
                    world,
                    engine,
                    planner,
                    stream,
                    log,
                    data.mixture,
                    watch.progress,
                    frozen=parts.frozen,
                    num_skipped=parts.num_skipped,
                    deadline_s=deadline_s,
                    held_out=held,
                    live_answers=asked,
                ).run(first_step, last_step)
            watch.progress.enter("end", last_step - 1)
            if last_step == planner.num_steps:
                _write_result(config, model, data.backbone, world, log)
            else:
                log.say(
                    f"stopped at max_steps={last_step} of {planner.num_steps}: no {config.stage.result}/ yet; the same "
                    "command with a larger max_steps, or null, goes on"
                )
        barrier(world)


def _start(config: RunConfig, launch: Launch) -> World:
    """The process group, after what must be there before it and with what must be right about it."""
    if config.device != "cuda" and not torch.cuda.is_available():
        deepspeed_ops.ensure_built(say=launch.local_rank == 0)
    world = start(config, launch)
    if config.preflight != "off":
        preflight.check(config, world)
    return world


def build_validation(
    config: RunConfig, mixture: Mixture, backbone: Backbone, processor: Processor, planner: Planner
) -> tuple[HeldOut | None, LiveAnswers | None]:
    """The mixture's held-out samples, and those of them that are asked; both dealt to the ranks as the planner deals
    the samples of a step. None where they are not wanted."""
    if not config.evaluate.every:
        return None, None
    packing, costs = planner.packing, planner.costs
    ranks: dict[str, int] = {"rank": planner.rank, "num_ranks": planner.num_ranks}
    per_sample = planner.stage.loss_weighting == "sample"
    samples, names = of_mixture(mixture), mixture.source_names
    held_out = hold_out(samples, names, processor, packing, costs, per_sample=per_sample, **ranks)
    if not config.evaluate.answers:
        return held_out, None
    return held_out, live_answers(held_out.samples, config.evaluate, backbone, processor, packing, costs, **ranks)


def _write_data_summary(config: RunConfig, mixture: Mixture, table: LengthTable) -> None:
    run_dir = config.run_dir
    (run_dir / "config.yaml").write_text(to_yaml(config))
    about = {
        "data_fingerprint": table.fingerprint,
        "mixture_fingerprint": mixture.fingerprint,
        "mixture": mixture.table(),
        "num_samples": len(table),
        "num_tokens": int(table.rows["tokens"].sum()),
        "num_supervised": int(table.rows["supervised"].sum()),
        "num_tiles": int(table.rows["tiles"].sum()),
        "rejects": table.rejects,
        "rejects_by_source": table.rejects_by_source(),
        "num_rounds_cut": table.num_rounds_cut,
        "special_texts": table.special_texts,
    }
    (run_dir / "data.json").write_text(json.dumps(about, indent=1) + "\n")
    (run_dir / "quarantine.jsonl").write_bytes(table.quarantine.read_bytes())


def _log_start(config: RunConfig, world: World, table: LengthTable, first_step: int, origin: str) -> None:
    """A line of starts.jsonl: where this start begins, from what, with which versions, on what (rank 0's device)."""
    is_gpu = world.device.type == "cuda"
    start = {
        "step": first_step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "origin": origin,
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if is_gpu else world.device.type,
        "dtype": str(world.dtype).removeprefix("torch."),
        "data_fingerprint": table.fingerprint,
        "versions": versions(),
    }
    with (config.run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def _opening(
    config: RunConfig,
    world: World,
    data: RunData,
    num_steps: int,
    origin: str,
) -> str:
    stage, table = config.stage, data.table
    left_out = f", {sum(table.rejects.values())} left out ({table.rejects})" if table.rejects else ""
    lines = [f"{config.run_dir}: stage {stage.name}, {origin}"]
    if config.recipe:
        lines.append(config.recipe)
    if stage.image_mode == "square" and data.backbone.hf_config.vision_config.model_type.startswith("siglip"):
        lines.append(
            "stage.image_mode=square crops the centre of every image; for a SigLIP tower the authors resize the whole "
            "image to a square: stage.image_mode=squash"
        )
    lines.append(
        f"{len(table):,} samples{left_out}, {num_steps:,} steps of {stage.batch_size}, on {world.size} rank(s), "
        f"{world.device.type}, {str(world.dtype).removeprefix('torch.')}; data {table.fingerprint[:12]}"
    )
    for source, counts in (table.special_texts or {}).items():
        tokens = ", ".join(f"{count:,} {text}" for text, count in counts.items())
        lines.append(
            f"source {source}: samples whose text has a special token of the tokenizer written in it, which they are "
            f"trained on as that token: {tokens}"
        )
    if table.special_texts is None:
        lines.append(f"special tokens written in samples were not counted in {table.folder}: remove it to count them")
    why_not = unsupported_by_stock(data.backbone.hf_config.vision_config)
    if why_not is not None:
        lines.append(f"stock transformers will load the export of this model, but cannot run it: {why_not}")
    return "\n".join(lines)


def _write_result(config: RunConfig, model: LlavaNext, backbone: Backbone, world: World, log: RunLog) -> None:
    """connector/ or export/, as the stage says. Every rank takes part, since parameters may be partitioned."""
    started = time.monotonic()
    target = config.run_dir / config.stage.result
    if config.stage.result == "connector":
        write_connector(model, backbone, target if world.is_main else None, gathered)
    else:
        processor = stage_processor(backbone, config.stage)
        write_hf(model, backbone, processor, target if world.is_main else None, gathered)
    if world.is_main:  # the fingerprints of what it has learned from go where it goes
        shutil.copyfile(config.run_dir / "data.json", target / "data.json")
    log.say(f"wrote {target} ({time.monotonic() - started:.1f} s)")

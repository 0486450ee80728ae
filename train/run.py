"""Runs one stage: builds its parts, trains, and writes the connector or the export.

The initial weights come from the newest valid checkpoint, else from `init_from`, else from the pretrained parts.
"""

import json
import logging
import os
import time
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from data_recipes.mixture.mixture import Mixture
from llava_next.config import stock_class
from llava_next.file_access import write_problem
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import write_hf
from llava_next.formats.onevision import ONEVISION_SERVING
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import stock_unsupported_reason
from train.assemble import RunData, assemble, open_data
from train.checkpoint.saver import latest_valid
from train.config.compose import to_yaml, with_absolute_paths
from train.config.schema import ConfigError, RunConfig
from train.data.length_table import LengthTable
from train.data.loader import Planner, build_processor, make_batches
from train.distributed.launch import Launch
from train.distributed.versions import versions
from train.distributed.world import World, barrier, broadcast_from_main, start
from train.engine import deepspeed_ops
from train.engine.deepspeed_engine import gathered
from train.engine.optimizer import format_part_table, part_table
from train.observability.run_log import LEGEND, RunLog, start_logging
from train.observability.wandb_run import check_wandb
from train.supervision import flight_recorder, preflight
from train.supervision.rank_progress import list_sample_names
from train.supervision.watchdog import Watchdog
from train.trainer import Trainer
from train.validation.held_out import HeldOutSet, build_held_out, list_mixture_samples
from train.validation.live_answers import AnswerGenerator, build_answer_generator

logger = logging.getLogger(__name__)


def run(config: RunConfig, launch: Launch, watchdog: Watchdog) -> None:
    """Trains the stage and writes its result.

    The caller destroys the process group, because only the caller knows whether the other ranks still take part.
    Errors of the parts propagate; `__main__` maps them to exit codes.
    """
    deadline_s = time.monotonic() + 60 * config.time_limit_min if config.time_limit_min else float("inf")
    with watchdog:
        world = _start_world(config, launch, watchdog)
        broadcast_from_main(world, partial(check_wandb, config))
        data = open_data(config, launch)
        if config.preflight == "only":
            parts = assemble(config, world, data, None)
            last_step = min(parts.planner.num_steps, config.max_steps or parts.planner.num_steps)
            preflight.check_saves_fit(config, world, parts.engine, last_step)
            preflight.run_trial_step(config, world, parts.engine, data.mixture, data.table, data.processor)
            return
        checkpoint = latest_valid(config.run_dir / "checkpoints", world)
        if checkpoint is None:  # else its settings are compared first
            broadcast_from_main(world, partial(_check_overwrite, config, "it has no checkpoint"))
        parts = assemble(config, world, data, checkpoint)
        model, planner, engine, first_step = parts.model, parts.planner, parts.engine, parts.first_step
        watchdog.get_sample_names = partial(list_sample_names, planner, data.mixture)
        last_step = min(planner.num_steps, config.max_steps or planner.num_steps)
        if first_step < last_step:
            preflight.check_saves_fit(config, world, engine, last_step)
        if first_step < planner.num_steps:
            _check_overwrite(config, f"its checkpoints end at step {first_step} of {planner.num_steps}")
        if world.is_main:  # after the resume: a start that is refused must not change the run folder
            _write_data_summary(config, data.mixture, data.table)
            _append_start(config, world, data.table, first_step, parts.origin)
        with closing(RunLog(config, is_main=world.is_main, first_step=first_step, num_steps=last_step)) as log:
            log.info(_describe_start(config, world, data, planner.num_steps, parts.origin))
            log.info(format_part_table(part_table(model, engine.optimizer)))
            if first_step < last_step:
                log.info(LEGEND)
                held_out, live_answers = build_validation(config, data.mixture, data.backbone, data.processor, planner)
                stream = make_batches(
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
                    watchdog.progress,
                    frozen=parts.frozen,
                    num_skipped=parts.num_skipped,
                    deadline_s=deadline_s,
                    held_out=held_out,
                    live_answers=live_answers,
                ).run(first_step, last_step)
            watchdog.progress.enter("end", last_step - 1)
            result = config.run_dir / config.stage.result
            if first_step == planner.num_steps and result.is_dir() and not config.overwrite:
                log.info(f"{result} is complete: this run has finished before; overwrite=true writes it again")
            elif last_step == planner.num_steps:
                _write_result(config, model, data.backbone, world, log)
            else:
                log.info(
                    f"stopped at max_steps={last_step} of {planner.num_steps} steps, before {config.stage.result}/ is "
                    "written; to continue, run the same command with a larger max_steps or max_steps=null"
                )
        barrier(world)


def _open_run_dir(config: RunConfig, launch: Launch, watchdog: Watchdog) -> None:
    """Takes the run folder and starts logging into it.

    Raises:
        ConfigError: it cannot be written.
        RunActiveError: another run is active in it.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        watchdog.open_folder()
        start_logging(launch, config.run_dir)
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if error.filename is not None else config.run_dir
        raise ConfigError(
            f"root={config.root} with name={config.name}: {write_problem(path, error)}; set root= to a folder that can "
            "be written"
        ) from error


def _start_world(config: RunConfig, launch: Launch, watchdog: Watchdog) -> World:
    """Creates the process group, takes the run folder, and runs the pre-flight checks.

    Rank 0 takes the folder first. The others touch nothing in it before they have met rank 0, since another run may be
    active there.
    """
    if launch.is_main:
        _open_run_dir(config, launch, watchdog)
    if config.device != "cuda" and not torch.cuda.is_available():
        deepspeed_ops.ensure_built(verbose=launch.local_rank == 0)
    if config.device != "cpu" and torch.cuda.is_available():
        flight_recorder.configure(os.environ, config.run_dir / "log")
    watchdog.progress.enter("join", -1)
    world = start(config, launch)
    watchdog.progress.enter("start", -1)
    if not launch.is_main:
        _open_run_dir(config, launch, watchdog)
    if config.preflight != "off":
        preflight.run_checks(config, world)
    return world


def _check_overwrite(config: RunConfig, trained: str) -> None:
    """Refuses to replace the result of a run that has finished in this folder.

    Args:
        trained: why this run would train further steps.

    Raises:
        ConfigError: there is a result.
    """
    result = config.run_dir / config.stage.result
    if result.is_dir() and not config.overwrite:
        raise ConfigError(
            f"{result} exists: a run has finished in this folder, and {trained}; choose another name=, or "
            "overwrite=true to train again and replace it"
        )


def build_validation(
    config: RunConfig, mixture: Mixture, backbone: Backbone, processor: Processor, planner: Planner
) -> tuple[HeldOutSet | None, AnswerGenerator | None]:
    """Builds the held-out set and the questions for live answers, assigned to the ranks as the planner assigns samples.

    Returns:
        The held-out set (None where `evaluate.every` is 0) and the answer generator (None where `evaluate.answers` is 0
        too).
    """
    if not config.evaluate.every:
        return None, None
    packing, costs = planner.packing, planner.costs
    ranks: dict[str, int] = {"rank": planner.rank, "num_ranks": planner.num_ranks}
    per_sample = planner.stage.loss_weighting == "sample"
    samples, names = list_mixture_samples(mixture), mixture.source_names
    held_out = build_held_out(samples, names, processor, packing, costs, per_sample=per_sample, **ranks)
    if not config.evaluate.answers:
        return held_out, None
    return held_out, build_answer_generator(
        held_out.samples, config.evaluate, backbone, processor, packing, costs, **ranks
    )


def _write_data_summary(config: RunConfig, mixture: Mixture, table: LengthTable) -> None:
    """Writes config.yaml, data.json and quarantine.jsonl into the run folder."""
    run_dir = config.run_dir
    (run_dir / "config.yaml").write_text(to_yaml(with_absolute_paths(config)))
    summary = {
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
    (run_dir / "data.json").write_text(json.dumps(summary, indent=1) + "\n")
    (run_dir / "quarantine.jsonl").write_bytes(table.quarantine.read_bytes())


def _append_start(config: RunConfig, world: World, table: LengthTable, first_step: int, origin: str) -> None:
    """Appends this start to starts.jsonl: first step, origin of the weights, ranks, rank 0's device, and versions."""
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


def _describe_start(config: RunConfig, world: World, data: RunData, num_steps: int, origin: str) -> str:
    """Returns the lines that are logged at the start: stage, origin, recipe, data, and remarks on the model."""
    stage, table = config.stage, data.table
    rejected = f", {sum(table.rejects.values())} rejected ({table.rejects})" if table.rejects else ""
    lines = [f"{config.run_dir}: stage {stage.name}, {origin}"]
    if config.recipe:
        lines.append(config.recipe)
    if "crop" in stage.views.modes and data.backbone.hf_config.vision_config.model_type.startswith("siglip"):
        lines.append(
            f"stage.views={stage.views}: crop shows the centre of an image only; for a SigLIP tower the authors resize "
            "the whole image to a square, which is squash"
        )
    lines.append(
        f"{len(table):,} samples{rejected}, {num_steps:,} steps of {stage.batch_size}, on {world.size} rank(s), "
        f"{world.device.type}, {str(world.dtype).removeprefix('torch.')}; data {table.fingerprint[:12]}"
    )
    for source, counts in (table.special_texts or {}).items():
        tokens = ", ".join(f"{count:,} {text}" for text, count in counts.items())
        lines.append(
            f"source {source}: number of samples whose text contains a special token's text, which is encoded as the "
            f"token: {tokens}"
        )
    if table.special_texts is None:
        lines.append(f"{table.folder} has no counts of special tokens in the samples' text; remove it to count them")
    reason = stock_unsupported_reason(data.backbone.hf_config.vision_config)
    if reason is not None:
        lines.append(f"stock transformers will load the export of this model but cannot run it: {reason}")
    if stage.result == "export" and stock_class(stage.views) == "llava_onevision":
        lines.append(f"the export will be a llava_onevision model. {ONEVISION_SERVING}")
    return "\n".join(lines)


def _write_result(config: RunConfig, model: LlavaNext, backbone: Backbone, world: World, log: RunLog) -> None:
    """Writes connector/ or export/. Every rank must call it, since the parameters may be partitioned."""
    started = time.monotonic()
    target = config.run_dir / config.stage.result
    attachments = (config.run_dir / "data.json",)  # the data fingerprints stay with the weights
    if config.stage.result == "connector":
        write_connector(model, backbone, target if world.is_main else None, gathered, attachments=attachments)
    else:
        processor = build_processor(backbone, config.stage)
        write_hf(model, backbone, processor, target if world.is_main else None, gathered, attachments=attachments)
    log.info(f"wrote {target} ({time.monotonic() - started:.1f} s)")

"""Competitor: this project's trainer. The parts of `train.run`, with clocks around the unchanged steps of its Trainer.

python -m training_step.competitor_ours JOB.json
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from training_step.job import Job, MemoryMark, Outcome, StepClock, gemm_tflops, use_threads
from training_step.materials import open_data, run_config
from training_step.profiling import TowerClock, longest_operations, marked_input, seconds_by_kind
from transformers.initialization import no_init_weights

from llava_next.formats.load_weights import load_weights
from llava_next.model.build import build_model, read_backbone
from llava_next.model.parts import set_recompute, set_trained_parts
from train.assemble import make_planner
from train.config.schema import RunConfig
from train.data.loader import StepPlan, build_processor, make_batches
from train.distributed.launch import read_launch
from train.distributed.quiet_libraries import quiet_libraries
from train.distributed.world import World, destroy, start
from train.engine import deepspeed_ops
from train.engine.deepspeed_engine import start_engine
from train.engine.optimizer import set_rates
from train.engine.sharded_model import set_kernels
from train.observability.run_log import RunLog
from train.trainer import Trainer


def main(job: Job) -> None:
    """Runs the job and writes its outcome."""
    quiet_libraries(on_cpu=job.device == "cpu")
    use_threads(job.threads)
    config = run_config(Path(job.folder), job)
    if job.device == "cpu":
        deepspeed_ops.ensure_built()
    world = start(config, read_launch())
    try:
        outcome = Outcome(gemm_tflops=gemm_tflops(job.device))
        if job.device == "cuda":
            outcome.device_name = torch.cuda.get_device_name()
        memory = MemoryMark(job.device)
        trainer, tower = _trainer(config, job, world)
        clock = StepClock(job.device)
        for step in range(job.num_steps - job.profile):
            _step(trainer, step, outcome)
            clock.lap(outcome)
            outcome.tower_seconds.append(tower.take_seconds())
        outcome.peak_gib = memory.peak_gib()
        if job.profile:
            _profile(trainer, job.num_steps - 1, job.device, outcome)
        outcome.gemm_tflops = max(outcome.gemm_tflops, gemm_tflops(job.device))
        outcome.write(job.result)
    finally:
        destroy()


def _trainer(config: RunConfig, job: Job, world: World) -> tuple[Trainer, TowerClock]:
    """The trainer as `train.run.run` puts it together."""
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, config.stage)
    mixture, table = open_data(config, processor)
    with no_init_weights():  # random ones would be replaced at once
        model = build_model(backbone, dtype=world.dtype, seed=1, attention=config.attention)
    load_weights(model, backbone, Path(str(config.stage.init_from)))
    set_trained_parts(model, config.stage.rates)
    set_recompute(model, config.recompute)
    set_kernels(model, config, world)
    planner = make_planner(config, world, backbone, model, table)
    engine = start_engine(model, config, world)
    steps = range(job.num_steps)
    stream = make_batches(planner, mixture, processor, steps, config.data, pin_memory=job.device == "cuda")
    log = RunLog(config, is_main=False, first_step=0, num_steps=job.num_steps)
    tower = TowerClock(model.hf.model.vision_tower, model.hf.model.multi_modal_projector, job.device)
    engine.backward = tower.wrap(engine.backward)
    return Trainer(config, world, engine, planner, marked_input(stream), log, mixture), tower


def _step(trainer: Trainer, step: int, outcome: Outcome) -> None:
    """One step of the loop in `Trainer.run`, without its log."""
    set_rates(trainer.engine.optimizer.param_groups, 1.0)
    plan = trainer.planner.plan(step)
    sums = trainer.train_step(plan).agreement.sums
    losses, tokens = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    outcome.losses.append(float(losses.sum()) / plan.divisor)
    outcome.num_supervised.append(int(tokens.sum()))
    outcome.num_tokens.append(plan.num_tokens)
    outcome.head_flops.append(_head_flops(trainer, plan))
    outcome.flops.append(plan.flops + outcome.head_flops[-1] - _spared_attention_flops(trainer, plan))
    outcome.tower_flops.append(plan.num_tiles * trainer.planner.costs.tile)


def _head_flops(trainer: Trainer, plan: StepPlan) -> float:
    """The head's forward and backward at supervised positions, which `StepCosts` does not count."""
    weight = trainer.engine.module.hf.lm_head.weight
    vocabulary, width = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves it empty
    return 3.0 * 2 * plan.num_supervised * vocabulary * width


def _spared_attention_flops(trainer: Trainer, plan: StepPlan) -> float:
    """FLOPs of the last block's attention that `StepCosts` counts and a CPU omits: it attends from targets alone."""
    if trainer.world.device.type != "cpu":
        return 0.0
    rows = trainer.planner.table.rows[plan.samples]
    tokens, targets = rows["tokens"].astype(float), rows["supervised"].astype(float)
    of_a_block = trainer.planner.costs.pair / trainer.engine.module.hf.config.text_config.num_hidden_layers
    return float((tokens * np.maximum(tokens / 2 - targets, 0)).sum() * of_a_block)


def _profile(trainer: Trainer, step: int, device: str, outcome: Outcome) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    clock, profiled = StepClock(device), Outcome()
    with profile(activities=activities, acc_events=True) as profiler:
        _step(trainer, step, profiled)
        clock.lap(profiled)
    outcome.profile = seconds_by_kind(profiler, profiled.seconds[0], device)
    outcome.longest_operations = longest_operations(profiler, device)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))

"""Functions that ranks run in the tests of train/: runs that are built from the package's parts and observed.

`tests.ranks` runs them, so arguments and results are pickled; the assertions are in the tests.
"""

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_recipes.schema.mixture_config import MixtureConfig
from llava_next.config import ModelConfig, ViewsConfig
from train.config.schema import DataConfig, PackingConfig, RunConfig, SaveConfig, StageConfig

Array = npt.NDArray[Any]
RATES: dict[str, float | None] = {"vision_tower": 1.0e-4, "projector": 1.0e-3, "language_model": 5.0e-4}
TIMEOUT_S = 60


def tiny_run(model: ModelConfig, mixture: MixtureConfig, store_root: Path, root: Path) -> RunConfig:
    """A finetune run with every part trained. 40 samples are steps of 13, 13, 13 and 1: the last has one row only."""
    stage = StageConfig(
        "finetune", RATES, batch_size=13, max_length=512, warmup_ratio=0.0, schedule="cosine", weight_decay=0.01
    )
    return RunConfig(
        root=str(root),
        name="tiny",
        seed=3,
        model=model,
        stage=stage,
        mixture=mixture,
        engine=zero(2),
        packing=PackingConfig(max_tokens=640, max_tiles=24),
        data=DataConfig(str(store_root), workers=0, length_workers=1),
        save=SaveConfig(every=0),
        device="cpu",
        timeout_s=TIMEOUT_S,
    )


def zero(stage: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of a ZeRO stage, with small buckets and thresholds, so that all of it is
    exercised."""
    options: dict[str, Any] = {"stage": stage}
    if stage > 0:
        options |= {"reduce_bucket_size": 20_000}
    if stage == 2:
        options |= {"overlap_comm": True, "contiguous_gradients": True, "allgather_bucket_size": 20_000}
    if stage == 3:
        options |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 10_000}
    return {"zero_optimization": options}


def zero_3_in_nodes(ranks_per_node: int | None = 2) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of ZeRO-3 with a copy of the weights in every node."""
    options = zero(3)["zero_optimization"]
    return {"zero_optimization": options | {"zero_hpz_partition_size": ranks_per_node}}


def with_stage(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns the run with another stage."""
    return replace(config, stage=replace(config.stage, **changes))


def aligning(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns the run as stage 1: projector and newline only, square images, captions."""
    values: dict[str, Any] = {
        "name": "align",
        "learning_rates": {"projector": 1.0e-3},
        "template": "plain",
        "views": ViewsConfig("crop", "crop"),
        "result": "connector",
    }
    return with_stage(config, **(values | changes))


LATER_KEYS = ("join_timeout_s", "overwrite", "allow_idle_gpus", "verify", "on_spike", "spike_threshold")
"""Keys of a run that commit 8fd9703 did not have; a run without them has their defaults."""


def earlier_yaml(config: RunConfig) -> str:
    """The config.yaml of a run as commit 8fd9703 wrote it: with keys that were removed, without those that are new."""
    import yaml

    from train.config.compose import to_yaml

    values = yaml.safe_load(to_yaml(config))
    for key in LATER_KEYS:
        del values[key]
    del values["stage"]["betas"], values["stage"]["eps"]
    view = values["stage"].pop("views")["single"]
    values["stage"]["image_mode"] = "square" if view == "crop" else view
    return str(yaml.safe_dump(values | {"linear": "auto", "elementwise": "auto"}, sort_keys=False))


def as_an_earlier_run(config: RunConfig) -> None:
    """Rewrites config.yaml, and each checkpoint's configuration and state, as commit 8fd9703 wrote them."""
    from train.checkpoint.atomic_folder import file_sum

    (config.run_dir / "config.yaml").write_text(earlier_yaml(config))
    for saved in (config.run_dir / "checkpoints").glob("step_*"):
        (saved / "config.yaml").write_text(earlier_yaml(config))
        state = json.loads((saved / "run_state.json").read_text())
        for group in state["groups"]:
            del group["betas"], group["eps"]
        (saved / "run_state.json").write_text(json.dumps(state, indent=1) + "\n")
        sums = json.loads((saved / "sums.json").read_text())
        sums |= {name: file_sum(saved / name) for name in ("config.yaml", "run_state.json")}
        (saved / "sums.json").write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")


@dataclass
class Record:
    """What a rank saw of a run. Weights are whole, and on rank 0 only; losses are per step."""

    first_step: int = 0
    origin: str = ""
    samples: list[list[int]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    by_source: list[list[float]] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    norms_by_part: list[dict[str, float]] = field(default_factory=list)
    moment_square: float = 0.0
    moments_by_part: dict[str, float] = field(default_factory=dict)
    before: dict[str, Array] = field(default_factory=dict)
    after: dict[str, Array] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    table: list[Any] = field(default_factory=list)


@dataclass
class Parts:
    """A run that is built as `train.run.run` does, up to the engine."""

    config: RunConfig
    world: Any
    backbone: Any
    processor: Any
    mixture: Any
    table: Any
    model: Any
    planner: Any
    engine: Any
    frozen: dict[str, str]
    first_step: int = 0
    num_skipped: int = 0
    origin: str = ""


@contextmanager
def built(config: RunConfig, *, goes_on: bool = False) -> Iterator[Parts]:
    """The parts of a run on this rank; ends the engine on exit. `goes_on`: resume from its newest valid checkpoint, if
    any."""
    from train.assemble import assemble, open_data
    from train.checkpoint.saver import latest_valid
    from train.distributed.launch import read_launch
    from train.distributed.world import start

    launch = read_launch()
    data = open_data(config, launch)
    world = start(config, launch)
    checkpoint = latest_valid(config.run_dir / "checkpoints", world) if goes_on else None
    run = assemble(config, world, data, checkpoint)
    parts = Parts(
        config,
        run.world,
        *data,
        run.model,
        run.planner,
        run.engine,
        run.frozen,
        run.first_step,
        run.num_skipped,
        run.origin if run.first_step else "",
    )
    engine = run.engine
    del run
    try:
        yield parts
    finally:
        engine.destroy()
        _destroy_node_group()
        del engine, parts
        gc.collect()


def _destroy_node_group() -> None:
    """DeepSpeed creates the groups of `zero_hpz_partition_size` once per process, and a test has several engines."""
    import deepspeed

    group = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
    if group is not None:
        deepspeed.comm.destroy_process_group(group)


def train(config: RunConfig, last_step: int | None = None) -> Record:
    """Trains from the state of the run folder (resumes or starts anew) up to `last_step`; returns a record."""
    with built(config, goes_on=True) as parts:
        return train_parts(parts, parts.first_step, last_step or parts.planner.num_steps, origin=parts.origin)


def train_in_nodes(config: RunConfig, ranks_per_node: int) -> Record:
    """Trains as on nodes with that many ranks each, as torchrun says it to them."""
    from unittest.mock import patch

    local_rank = int(os.environ["RANK"]) % ranks_per_node
    nodes = {"LOCAL_WORLD_SIZE": str(ranks_per_node), "LOCAL_RANK": str(local_rank)}
    with patch.dict(os.environ, nodes):
        return train(config)


def train_parts(
    parts: Parts,
    first_step: int,
    last_step: int,
    *,
    origin: str = "",
    stop_after: int | None = None,
    seen: list[Record] | None = None,
) -> Record:
    """Runs the trainer over these steps; every outcome, and the weights before and after, are kept.

    `stop_after` asks this process to stop in the step of that number, as a signal would; `seen` then holds the record.
    """
    from llava_next.model.parts import part_of
    from train.data.loader import StepPlan, make_batches
    from train.engine.optimizer import part_table
    from train.observability.run_log import RunLog
    from train.observability.step_metrics import StepOutcome
    from train.run import build_validation
    from train.trainer import Trainer

    config, world, planner = parts.config, parts.world, parts.planner
    record = Record(first_step, origin)
    if seen is not None:
        seen.append(record)
    record.parts = {name: part_of(name) for name, _ in parts.model.named_parameters()}
    record.table = part_table(parts.model, parts.engine.optimizer)
    record.before = weights(parts)

    class Watched(Trainer):
        def train_step(self, plan: StepPlan) -> StepOutcome:
            if stop_after is not None and plan.step + 1 == stop_after and world.is_main:
                signal.raise_signal(signal.SIGUSR1)  # one rank is enough: the step makes it known to all
            outcome = super().train_step(plan)
            num = len(self.source_names)
            sums = outcome.agreement.sums.tolist()
            record.samples.append(planner.table.rows["sample"][plan.samples].tolist())
            record.rows.append([len(row) for row in plan.rows])
            record.losses.append(sum(sums[:num]) / plan.divisor)
            record.by_source.append(sums[:num])
            record.tokens.append(sums[num:])
            record.grad_norms.append(outcome.update.grad_norm)
            record.norms_by_part.append(outcome.update.by_part)
            return outcome

    steps = range(first_step, last_step)
    stream = make_batches(planner, parts.mixture, parts.processor, steps, config.data, pin_memory=False)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    held_out, live_answers = build_validation(config, parts.mixture, parts.backbone, parts.processor, planner)
    log = RunLog(config, is_main=world.is_main, first_step=first_step, num_steps=last_step)
    try:
        Watched(
            config,
            world,
            parts.engine,
            planner,
            stream,
            log,
            parts.mixture,
            frozen=parts.frozen,
            num_skipped=parts.num_skipped,
            held_out=held_out,
            live_answers=live_answers,
        ).run(first_step, last_step)
    finally:
        log.close()
    record.after = weights(parts)
    record.moment_square = first_moment_square(parts.engine)
    record.moments_by_part = first_moments_by_part(parts.engine)
    return record


def weights(parts: Parts) -> dict[str, Array]:
    """Returns every full parameter on rank 0; every rank must call it."""
    from train.engine.deepspeed_engine import gathered

    full_weights = {}
    for name, parameter in parts.model.named_parameters():
        with gathered([parameter]):
            if parts.world.is_main:
                full_weights[name] = parameter.detach().cpu().float().numpy().copy()  # numpy has no bf16
    return full_weights


def held_at_the_start(config: RunConfig) -> tuple[int, int]:
    """Returns the bytes of weights in this rank's memory before the engine is built, and after."""
    from unittest.mock import patch

    from train.engine.deepspeed_engine import start_engine

    before = []

    def watched(model: Any, *args: Any) -> Any:
        before.append(_held(model))
        return start_engine(model, *args)

    with patch("train.assemble.start_engine", watched), built(config) as parts:
        return before[0], _held(parts.model)


def _held(model: Any) -> int:
    held = {}
    for parameter in model.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and not tensor.is_meta:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def first_moment_square(engine: Any) -> float:
    """Returns the squared norm of Adam's first moments on this rank (of its share under ZeRO)."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(float(state["exp_avg"].double().square().sum()) for state in optimizer.state.values())


def first_moments_by_part(engine: Any) -> dict[str, float]:
    """Returns the norm of Adam's first moments by part on this rank; empty at ZeRO-3, whose groups are empty."""
    squares: dict[str, float] = {}
    for group in engine.basic_optimizer.param_groups:
        states = [engine.basic_optimizer.state[parameter] for parameter in group["params"]]
        square = sum(float(state["exp_avg"].double().square().sum()) for state in states)
        squares[group["part"]] = squares.get(group["part"], 0.0) + square
    return {part: square**0.5 for part, square in squares.items()}


def relative_difference(actual: dict[str, Array], expected: dict[str, Array]) -> float:
    """Returns ‖a - b‖ / ‖b‖, one norm over all tensors."""
    assert actual.keys() == expected.keys()
    difference = sum(float(np.square(actual[name].astype(np.float64) - expected[name]).sum()) for name in actual)
    size = sum(float(np.square(expected[name].astype(np.float64)).sum()) for name in actual)
    return float(np.sqrt(difference / size))


def train_with_slow_rank(config: RunConfig, rank: int, seconds: float) -> None:
    """Trains while one rank sleeps for these seconds in each forward pass; the window of slow ranks is two steps."""
    from unittest.mock import patch

    from llava_next.model.llava_next import LlavaNext

    forward = LlavaNext.forward

    def slow(self: LlavaNext, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return forward(self, *args, **kwargs)

    with patch("train.observability.slow_ranks.WINDOW", 2), patch.object(LlavaNext, "forward", slow):
        train(config)


def train_and_write(config: RunConfig) -> Record:
    """Trains a run and writes its result, as `train.run` does at the end."""
    with built(config) as parts:
        record = train_parts(parts, 0, parts.planner.num_steps)
        _write(parts)
        return record


def train_and_ask(config: RunConfig, last_step: int) -> tuple[Record, list[Any]]:
    """Trains up to `last_step`; returns the record and live answers after it."""
    from train.run import build_validation

    with built(config) as parts:
        record = train_parts(parts, 0, last_step)
        _, asked = build_validation(config, parts.mixture, parts.backbone, parts.processor, parts.planner)
        return record, asked.generate(parts.engine, parts.world) if asked else []


def _write(parts: Parts) -> None:
    from llava_next.formats.connector import write_connector
    from llava_next.formats.hugging_face import write_hf
    from train.engine.deepspeed_engine import gathered

    target = parts.config.run_dir / parts.config.stage.result if parts.world.is_main else None
    if parts.config.stage.result == "connector":
        write_connector(parts.model, parts.backbone, target, gathered)
    else:
        write_hf(parts.model, parts.backbone, parts.processor, target, gathered)


def write_untrained(config: RunConfig) -> None:
    """Writes the initial weights of the run as its result."""
    with built(config) as parts:
        _write(parts)


def train_write_and_look(config: RunConfig, num_samples: int) -> list[float]:
    """Trains a run, writes its result, and returns the live model's loss sums of some samples, each alone."""
    import torch

    with built(config) as parts, torch.no_grad():
        with torch.enable_grad():
            train_parts(parts, 0, parts.planner.num_steps)
        _write(parts)
        return [float(parts.engine(batch)[0]) for batch in alone(parts.mixture, parts.processor, num_samples)]


def alone(mixture: Any, processor: Any, num_samples: int) -> Iterator[Any]:
    """Yields the first samples of a mixture, each as a batch."""
    from llava_next.inputs.batch import collate

    for number in range(num_samples):
        sample = mixture.sample(number)
        example = processor.encode(sample.messages, sample.sizes_hw, sample.images)
        geometry = processor.config
        yield collate([example], tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)


def first_loss(config: RunConfig) -> tuple[float, float]:
    """Returns the first step's loss of the trainer, and that computed from each sample's token losses."""
    with built(config) as parts:
        plan = parts.planner.plan(0)
        numbers = parts.table.rows["sample"][plan.samples].tolist()
        expected = _mean_loss(parts, [parts.mixture.sample(number) for number in numbers])
        return train_parts(parts, 0, 1).losses[0], expected


def held_out_loss(config: RunConfig) -> float:
    """Trains one step; returns the mean loss of the held-out samples of `tiny_pictures` after it, each run alone."""
    with built(config) as parts:
        train_parts(parts, 0, 1)
        mixture = parts.mixture
        return _mean_loss(
            parts, [mixture.heldout_sample("tiny_pictures", number) for number in mixture.heldout("tiny_pictures")]
        )


def _mean_loss(parts: Parts, samples: list[Any]) -> float:
    """Returns the mean loss of samples that are run one at a time, weighed as in the stage."""
    from llava_next.inputs.batch import collate

    means, tokens = [], []
    for sample in samples:
        example = parts.processor.encode(sample.messages, sample.sizes_hw, sample.images)
        batch = collate([example], tile=parts.backbone.tile, patches_per_tile=parts.backbone.patches_per_side**2)
        losses = parts.model.score(batch).losses
        means.append(float(losses.mean()))
        tokens.append(len(losses))
    weighs = [1.0] * len(tokens) if parts.config.stage.loss_weighting == "sample" else tokens
    return float(np.average(means, weights=weighs))


@dataclass
class Unequal:
    """A step of different rows: the content of each micro-step of this rank, and every collective in order."""

    kinds: list[str]
    collectives: list["Collective"]
    loss: float
    num_trained: int


KINDS = ("text", "pictures", "nothing")


def unequal_step(config: RunConfig) -> Unequal:
    """Runs one step in which every rank has another kind of row than its neighbour: text, images, none."""
    from llava_next.model.parts import num_parameters

    with built(config) as parts:
        ranks = range(parts.world.size)
        of_ranks = [[KINDS[(rank + micro_step) % 3] for micro_step in range(3)] for rank in ranks]
        kinds = of_ranks[parts.world.rank]
        plan = _plan_of_kinds(parts, of_ranks)
        with recorded_collectives() as seen:
            outcome = _step(parts, plan)
        loss = float(outcome.agreement.sums[: len(parts.mixture.source_names)].sum())
        return Unequal(kinds, seen, loss, num_parameters(parts.model, trained=True))


def collectives_by_kind(config: RunConfig, skips_tower: bool) -> dict[str, list["Collective"]]:
    """What steps issue in which all ranks hold a row of the same kind.

    `skips_tower`: a row without pictures runs neither tower nor projector, as with stock transformers.
    """
    import torch

    with built(config) as parts:
        if skips_tower:
            run_tower = parts.model.tile_features

            def tile_features(tiles: torch.Tensor) -> torch.Tensor:
                if tiles.any():
                    return run_tower(tiles)
                patches = parts.backbone.patches_per_side**2
                return torch.zeros(len(tiles), patches, parts.backbone.hf_config.text_config.hidden_size)

            parts.model.tile_features = tile_features
        by_kind = {}
        for kind in ("pictures", "pictures", "pictures", "text", "nothing"):  # ZeRO-3 learns its order in the first
            plan = _plan_of_kinds(parts, [[kind]] * parts.world.size)
            with recorded_collectives() as by_kind[kind]:
                _step(parts, plan)
        return by_kind


def _plan_of_kinds(parts: Parts, of_ranks: list[list[str]]) -> Any:
    """Returns this rank's plan of a step whose rows have these kinds, by rank and micro-step."""
    tiles = np.asarray(parts.table.rows["tiles"])
    text, pictures = np.flatnonzero(tiles == 0)[:2], np.flatnonzero(tiles > 0)[:2]
    rows = {"text": text, "pictures": pictures, "nothing": text[:0]}
    samples = np.concatenate([rows[kind] for kinds in of_ranks for kind in kinds])
    supervised = int(parts.table.rows["supervised"][samples].sum())
    return replace(
        parts.planner.plan(0),
        samples=samples,
        rows=tuple(rows[kind] for kind in of_ranks[parts.world.rank]),
        num_supervised=max(supervised, 1),
        divisor=float(max(supervised, 1)),
    )


def _step(parts: Parts, plan: Any) -> Any:
    """Runs one step of the trainer over the rows of `plan`."""
    parts.config.run_dir.mkdir(parents=True, exist_ok=True)  # as the run does
    from train.data.loader import RowDataset
    from train.engine.optimizer import set_rates
    from train.observability.run_log import RunLog
    from train.trainer import Trainer

    encode = RowDataset(parts.mixture, parts.table, parts.processor, False, read_retries=0)
    stream = (encode[row] for row in plan.rows)
    log = RunLog(parts.config, is_main=False, first_step=0, num_steps=1)
    trainer = Trainer(parts.config, parts.world, parts.engine, parts.planner, stream, log, parts.mixture)
    if not len(plan.samples):  # no run has such a step, and the trainer would refuse it
        trainer.check.check_counts = lambda *_: None  # type: ignore[method-assign]
    set_rates(parts.engine.optimizer.param_groups, 1.0)
    return trainer.train_step(plan)


@dataclass(frozen=True)
class Collective:
    """One collective, as passed to a process group. A group of some ranks has no name, but its ranks counted from its
    first one: the groups of two nodes are equal then."""

    group: tuple[str, ...]
    kind: str
    sizes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@contextmanager
def recorded_collectives() -> Iterator[list[Collective]]:
    """Every collective that this process issues meanwhile, in order, whoever issues it; the list is filled at the end.

    From torch's flight recorder, which sits inside the process groups, below DeepSpeed and torch.distributed.
    """
    before = {entry["record_id"] for entry in _flight_records()}
    seen: list[Collective] = []
    _learn_group_names()
    try:
        yield seen
    finally:  # where ranks differ, what was issued so far tells where
        _learn_group_names()
        seen += [
            Collective(
                _group_name(entry["process_group"]),
                entry["profiling_name"],
                tuple(tuple(size) for size in (*entry["input_sizes"], *entry["output_sizes"])),
                (*entry["input_dtypes"], *entry["output_dtypes"]),
            )
            for entry in _flight_records()
            if entry["record_id"] not in before
        ]


_PARTIAL_GROUPS: dict[str, tuple[str, ...]] = {}
"""Groups of some of the ranks, by torch's name of them; kept after their end."""


def _learn_group_names() -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    for group, name in _world.pg_names.items():
        ranks = sorted(_world.pg_group_ranks[group])
        if len(ranks) < dist.get_world_size():
            _PARTIAL_GROUPS[name] = tuple(str(rank - ranks[0]) for rank in ranks)


def _group_name(group: list[str]) -> tuple[str, ...]:
    return _PARTIAL_GROUPS.get(group[0], tuple(group))


def _flight_records() -> list[dict[str, Any]]:
    from torch._C import _distributed_c10d

    trace: bytes = vars(_distributed_c10d)["_dump_fr_trace_json"](includeCollectives=True)
    entries: list[dict[str, Any]] = json.loads(trace).get("entries", [])
    return entries


def all_reduces(orders: list[list[int]]) -> list[Collective]:
    """All-reduces in two groups, in this rank's own order of them; what was recorded. None is waited for before all are
    issued, so that ranks may differ without a hang."""
    import torch
    import torch.distributed as dist

    groups = [dist.new_group(), dist.new_group()]
    with recorded_collectives() as seen:
        order = orders[dist.get_rank()]
        works = [dist.all_reduce(torch.ones(3 + number), group=groups[number], async_op=True) for number in order]
        for work in works:
            work.wait()
    return seen


def wrong_count(config: RunConfig) -> tuple[str, bool]:
    """Runs a step whose table counts one supervised token too many; returns the error's message and whether a weight
    changed."""
    with built(config) as parts:
        plan = parts.planner.plan(0)
        return _refused(parts, replace(plan, num_supervised=plan.num_supervised + 1))


def poisoned_step(config: RunConfig) -> tuple[str, bool]:
    """Runs a step with a non-finite loss on rank 1; returns the error's message and whether a weight changed."""
    with built(config) as parts:
        if parts.world.rank == 1:
            parts.model.tile_shift.fill_(float("nan"))
        return _refused(parts, parts.planner.plan(0))


def silent_source(config: RunConfig, all_of_them: bool) -> tuple[str, bool, list[str]]:
    """Runs a step in which no token of one source (or of all) is supervised; returns the error's message, whether a
    weight changed, and the ids of these samples."""
    with built(config) as parts:
        plan = parts.planner.plan(0)
        rows = parts.table.rows[plan.samples]
        silent = np.ones(len(rows), dtype=bool) if all_of_them else rows["source"] == rows["source"].min()
        remaining = [row[~np.isin(row, plan.samples[silent])] for row in plan.rows]
        changed = replace(plan, rows=tuple(remaining), num_supervised=int(rows["supervised"][~silent].sum()))
        message, moved = _refused(parts, changed)
        return message, moved, [parts.mixture.text(int(number)).id for number in rows["sample"][silent]]


def _refused(parts: Parts, plan: Any) -> tuple[str, bool]:
    from train.supervision.step_errors import StepError

    before = weights(parts)
    try:
        _step(parts, plan)
    except StepError as error:
        after = weights(parts)
        return str(error), any(not np.array_equal(before[name], after[name]) for name in before)
    raise AssertionError("the step was not refused")


FAULTY_ROW = 5


def run_with_fault(config: RunConfig, rank: int, fault: str) -> int:
    """The program from its checked configuration on, with a fault in one rank; returns the exit code.

    `data`: the worker of its loader sleeps for ever over a picture. The others are the model's, at its row of number
    `FAULTY_ROW`: it sleeps, the process is stopped or killed, or something raises. `device`: it sleeps, while the other
    ranks wait in the same row for a device that never becomes ready.
    """
    from data_recipes.mixture.mixture import Mixture
    from llava_next.model.llava_next import LlavaNext
    from train.__main__ import execute
    from train.distributed.device_copies import to_host
    from train.distributed.launch import read_launch

    if read_launch().rank == rank and fault == "data":

        def hang(number: int) -> None:
            print("fault at", number, flush=True)
            time.sleep(3600)

        _at_call(Mixture, "sample", 12, hang)
    elif fault == "device" and read_launch().rank != rank:
        _at_call(LlavaNext, "forward", FAULTY_ROW, lambda _: to_host(_NeverReady()))  # type: ignore[arg-type]
    elif read_launch().rank == rank:

        def strike(batch: Any) -> None:
            print("fault at", list(batch.segments.lengths), flush=True)
            if fault in ("sleep", "device"):
                time.sleep(3600)
            elif fault == "raise":
                raise ValueError("a fault on purpose")
            else:
                os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])

        _at_call(LlavaNext, "forward", FAULTY_ROW, strike)
    return execute(config)


class _NeverReady:
    """A stand-in for a tensor whose device waits for other ranks: its copy to the host does not return."""

    def cpu(self) -> None:
        time.sleep(3600)


def _at_call(owner: Any, name: str, number: int, strike: Any) -> None:
    """Calls `strike` with the arguments of the method's call of this number, before that call."""
    method = getattr(owner, name)
    calls = 0

    def watched(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            strike(*args)
        return method(self, *args)

    setattr(owner, name, watched)


def sleep_for_ever(stuck: int) -> None:
    """Hangs on one rank."""
    from train.distributed.launch import read_launch

    if read_launch().rank == stuck:
        time.sleep(3600)


def sum_of_ranks() -> float:
    """Returns the sum of all ranks' numbers, by a collective."""
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return float(value)


def train_up_to(config: RunConfig, last_step: int) -> Record:
    """Trains up to `last_step` and saves, as a run that is asked to stop."""
    from train.trainer import Interrupted

    with built(config) as parts:
        try:
            return train_parts(parts, 0, parts.planner.num_steps, stop_after=last_step)
        except Interrupted as stopped:
            if stopped.step != last_step:
                raise
            return Record()


def betas_after_resume(config: RunConfig) -> set[tuple[float, ...]]:
    """The betas of the live optimizer's groups after its newest checkpoint was loaded."""
    with built(config, goes_on=True) as parts:
        return {tuple(group["betas"]) for group in parts.engine.optimizer.param_groups}


def train_up_to_and_see(config: RunConfig, last_step: int) -> Record:
    """Resumes and is asked to stop after `last_step` steps; returns the record."""
    from train.trainer import Interrupted

    with built(config, goes_on=True) as parts:
        seen: list[Record] = []
        with suppress(Interrupted):
            train_parts(
                parts, parts.first_step, parts.planner.num_steps, stop_after=last_step, origin=parts.origin, seen=seen
            )
        return seen[0]


def resume_without_room(config: RunConfig) -> None:
    """Resumes while the disk reports that it is full."""
    import shutil
    from unittest.mock import patch

    full = shutil.disk_usage("/")._replace(free=0)
    with patch("train.checkpoint.universal.shutil.disk_usage", lambda _: full), built(config, goes_on=True):
        pass


def resume_hostile(config: RunConfig) -> None:
    """Resumes from a checkpoint in which a file, and its hash, were replaced by one that runs code when unpickled."""
    import torch

    from train.checkpoint import atomic_folder
    from train.checkpoint import saver as checkpoint

    class Hostile:
        def __reduce__(self) -> Any:
            return eval, ("1 / 0",)

    saved = checkpoint.find_newest(config.run_dir / "checkpoints")
    assert saved is not None
    [file] = (saved / "engine").glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": Hostile()}, file)
    sums = json.loads((saved / "sums.json").read_text())
    sums[f"engine/{file.name}"] = atomic_folder.file_sum(file)
    (saved / "sums.json").write_text(json.dumps(sums))
    with built(config, goes_on=True):
        pass


def train_deterministically(config: RunConfig) -> tuple[list[float], bool]:
    """Returns the losses with deterministic=true, and whether torch's deterministic algorithms were on."""
    import torch

    try:
        with built(replace(config, deterministic=True)) as parts:
            was_told = torch.are_deterministic_algorithms_enabled()
            return train_parts(parts, 0, parts.planner.num_steps).losses, was_told
    finally:
        torch.use_deterministic_algorithms(False)


def save_untrained(config: RunConfig) -> None:
    """Saves a checkpoint of the initial weights, before the first step."""
    from train.checkpoint.resume import make_run_state
    from train.checkpoint.saver import Saver
    from train.config.compose import to_yaml

    with built(config) as parts:
        saver = Saver(config.run_dir / "checkpoints", parts.world, config.save)
        state = make_run_state(0, parts.table.fingerprint, config, parts.world, parts.engine, parts.frozen)
        saver.write(parts.engine, state, to_yaml(config))
        saver.wait()


def save_often(config: RunConfig, save: SaveConfig) -> list[list[str]]:
    """Returns the names in the checkpoint folder after each of four saves."""
    from train.checkpoint.resume import make_run_state
    from train.checkpoint.saver import Saver
    from train.config.compose import to_yaml

    folder = config.run_dir / "checkpoints"
    with built(config) as parts:
        names = []
        saver = Saver(folder, parts.world, save)
        for step in (1, 2, 3, 4):
            state = make_run_state(step, parts.table.fingerprint, config, parts.world, parts.engine, parts.frozen)
            saver.write(parts.engine, state, to_yaml(config))
            saver.wait()
            names.append(sorted(path.name for path in folder.iterdir()))
        return names


def resume_elsewhere(config: RunConfig, frozen: bool = False) -> Record:
    """Resumes into a model whose trained weights, or frozen ones, were first set to other values."""
    from unittest.mock import patch

    import torch

    from llava_next.model.build import build_model
    from llava_next.model.parts import set_trained_parts

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        model = build_model(*args, **kwargs)
        with torch.no_grad():
            set_trained_parts(model, config.stage.rates)
            for parameter in model.parameters():
                if parameter.requires_grad is not frozen and not parameter.is_meta:
                    parameter.add_(1.0)
        return model

    with patch("train.engine.sharded_model.build_model", spoiled):
        return train(config)

"""Checkpoints: the engine's state and the run's, complete or absent.

A checkpoint is written aside, and gets its name when every rank has finished. `RunState` is all that a run needs
besides: the position in the data is the step.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed

from train.config import ConfigError, RunConfig
from train.engine import zero_stage
from train.world import World, barrier

_TAG = "engine"
_STATE = "run_state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `step` optimizer steps are done, on this data, by this many ranks."""

    step: int
    data_fingerprint: str
    seed: int
    batch_size: int
    epochs: float
    num_ranks: int
    zero_stage: int
    versions: dict[str, str]


def run_state(step: int, data_fingerprint: str, config: RunConfig, world: World) -> RunState:
    """The state to save after `step` steps."""
    versions = {package: version(package) for package in ("torch", "deepspeed", "transformers")}
    stage = config.stage
    return RunState(
        step, data_fingerprint, config.seed, stage.batch_size, stage.epochs, world.size, zero_stage(config), versions
    )


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, state: RunState, world: World, *, keep: int) -> Path:
    """Writes `folder`/step_NNNNNN and removes all but the newest `keep`. Every rank must call it."""
    place = folder / f"step_{state.step:06d}"
    partial = place.with_name(place.name + ".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(world)
    engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
    barrier(world)
    if world.is_main:
        (partial / _STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
        if place.exists():
            shutil.rmtree(place)
        partial.rename(place)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    barrier(world)
    return place


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def read_state(place: Path) -> RunState:
    """What a checkpoint says of itself."""
    values: dict[str, Any] = json.loads((place / _STATE).read_text())
    return RunState(**values)


def resume(
    engine: deepspeed.DeepSpeedEngine, place: Path, data_fingerprint: str, config: RunConfig, world: World
) -> int:
    """Puts the engine where the checkpoint was; returns the steps that are done.

    Raises:
        ConfigError: the checkpoint is of other data, another order, another number of ranks or another ZeRO stage.
    """
    saved, now = read_state(place), run_state(0, data_fingerprint, config, world)
    for name, way_out in (
        ("data_fingerprint", "restore the mixture and the processor's settings"),
        ("seed", "restore the seed"),
        ("batch_size", "restore stage.batch_size"),
        ("epochs", "restore stage.epochs"),
        ("num_ranks", "start as many processes"),
        ("zero_stage", "choose the engine of that stage"),
    ):
        if getattr(saved, name) != getattr(now, name):
            raise ConfigError(
                f"{place} was saved with {name}={getattr(saved, name)}, this run has {getattr(now, name)}; {way_out}, "
                f"or start afresh with another name=..., or remove {place.parent}"
            )
    path, _ = engine.load_checkpoint(str(place), tag=_TAG)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {place}")
    return saved.step


def _complete(folder: Path) -> list[Path]:
    # By number, and not .partial: a write that was killed just before its rename holds every file.
    found = [place for place in folder.glob("step_*") if place.name.removeprefix("step_").isdigit()]
    found.sort(key=lambda place: int(place.name.removeprefix("step_")))
    return [place for place in found if (place / _STATE).is_file()]

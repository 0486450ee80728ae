"""`python -m train`: one stage of one run, from Hydra's command line to an exit code.

The configuration is composed and checked before torch is imported; a mistake is one sentence, printed by rank 0
alone, and exit code 2.
"""

import io
import os
import signal
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from train.config.compose import check, explain
from train.config.exit_codes import EXIT_AT_ONCE, EXIT_INTERRUPTED, report_mistake
from train.config.schema import CONFIG_DIR, ConfigError, RunConfig

if TYPE_CHECKING:
    from train.supervision.watchdog import Watch

_ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Parses, checks, runs; returns the exit code."""
    for number in _ASKS_TO_STOP:
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    # The deepspeed launcher adds this; the environment says the same, and Hydra would refuse it.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    try:
        config = compose()
    except ConfigError as error:
        return report_mistake(error, is_main=rank == 0)
    if config is None:
        return 0  # --help, --cfg job and the like have printed what was asked for
    return execute(config)


def compose() -> RunConfig | None:
    """The checked configuration of the command line, or None when Hydra only printed something.

    Raises:
        ConfigError: with one sentence.
    """
    found: list[DictConfig] = []
    recipes: list[str] = []

    @hydra.main(config_path=str(CONFIG_DIR), config_name="train", version_base="1.3")
    def take(composed: DictConfig) -> None:
        found.append(composed)
        recipes.append(_recipe_used(HydraConfig.get()))

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            take()
    except SystemExit as error:
        if error.code:
            raise ConfigError(explain(said.getvalue())) from None
    if len(found) > 1:
        raise ConfigError(
            f"--multirun asks for {len(found)} runs; one program trains one stage: start it once for each"
        )
    return replace(check(found[0]), recipe=recipes[0]) if found else None


def _recipe_used(hydra_config: DictConfig) -> str:
    """Where the stage's numbers come from, as a sentence; Hydra itself names a recipe that is not there, too."""
    choices = hydra_config.runtime.choices
    choice, of_tower = choices.get("recipe"), choices.get("recipe/vision_tower")
    folders = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
    if any((folder / "recipe" / f"{choice}.yaml").is_file() for folder in folders):
        sentence = f"recipe {choice}.yaml (its comments say which numbers are published and which assumed)"
    else:
        sentence = f"no recipe {choice}.yaml: the numbers are the stage's own"
    if any((folder / "recipe" / "vision_tower" / f"{of_tower}.yaml").is_file() for folder in folders):
        sentence += f"; changed for this vision tower by vision_tower/{of_tower}.yaml"
    typed = [override for override in hydra_config.overrides.task if override.lstrip("+~").startswith("stage.")]
    return f"{sentence}; changed by hand: {' '.join(typed)}" if typed else sentence


def execute(config: RunConfig) -> int:
    """Runs a checked configuration; returns the exit code, unless the run fails: then this process ends here."""
    import torch

    from train.distributed.quiet_libraries import quiet_libraries

    quiet_libraries(on_cpu=config.device == "cpu" or not torch.cuda.is_available())
    from data_recipes.schema.sample import DataError
    from llava_next.config import ModelError
    from train.distributed.world import leave, read_launch
    from train.run import run
    from train.supervision.watchdog import Watch
    from train.trainer import Interrupted

    launch = read_launch()
    watch = Watch(config.run_dir, launch, config.timeout_s)
    _leave_when_asked(watch)
    code, reason = 0, "finished"
    try:
        run(config, launch, watch)
    except (ConfigError, ModelError, DataError) as error:
        code, reason = report_mistake(error, is_main=launch.is_main), str(error)
    except Interrupted as error:
        code, reason = EXIT_INTERRUPTED, f"{error}; run the same command again to go on"
        if launch.is_main:
            print(reason, file=sys.stderr)
    except KeyboardInterrupt:
        reason = "stopped at once, without saving; the newest checkpoint is where the same command goes on"
        watch.exit_at_once(EXIT_AT_ONCE, reason)
    except Exception as error:
        watch.abort(error)
    if launch.is_main and config.preflight != "only":
        watch.exit_file.write(code, reason, step=watch.progress.now[0].step)
    watch.progress.remove()
    leave()
    return code


def _leave_when_asked(watch: "Watch") -> None:
    """A scheduler's signal outside of the steps, where there is nothing to save, ends this rank, and so the run.

    Between the first step and the last, the trainer has its own way.
    """
    rank_pid = os.getpid()

    def leave(number: int, *_: object) -> None:
        if os.getpid() != rank_pid:  # a process that helps at the start and has inherited this
            os._exit(128 + number)
        reason = f"asked to stop ({watch.progress.now[0].description}), where there is nothing to save; "
        watch.exit_at_once(EXIT_INTERRUPTED, reason + "run the same command again to go on")

    for number in _ASKS_TO_STOP:
        signal.signal(number, leave)


if __name__ == "__main__":
    sys.exit(main())

"""Entry point of `python -m train`: runs one stage from Hydra's command line and returns an exit code.

The configuration is composed and validated before torch is imported. A configuration error is printed as one sentence
by rank 0 and ends with exit code 2.
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

from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.compose import check, explain
from train.config.exit_codes import EXIT_AT_ONCE, EXIT_INTERRUPTED, report_mistake
from train.config.schema import ConfigError, RunConfig

if TYPE_CHECKING:
    from train.supervision.watchdog import Watchdog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Composes the configuration, runs the stage, and returns the exit code."""
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    # The deepspeed launcher adds --local_rank. Hydra would reject it, and LOCAL_RANK has the same value.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    try:
        config = compose()
    except ConfigError as error:
        return report_mistake(error, is_main=rank == 0)
    if config is None:
        return 0  # Hydra has handled --help, --cfg job and the like
    return execute(config)


def compose() -> RunConfig | None:
    """Composes and validates the configuration of the command line.

    Returns:
        The configuration; None where Hydra only printed something, as for --help.

    Raises:
        ConfigError: the command line or a value is invalid; the message is one sentence.
    """
    composed: list[DictConfig] = []
    recipes: list[str] = []

    @hydra.main(config_path=str(CONFIG_DIR), config_name="train", version_base="1.3")
    def collect(config: DictConfig) -> None:
        composed.append(config)
        recipes.append(_describe_recipe(HydraConfig.get()))

    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            collect()
    except SystemExit as error:
        if error.code:
            raise ConfigError(explain(stderr.getvalue())) from None
    if len(composed) > 1:
        raise ConfigError(
            f"--multirun selects {len(composed)} runs, but one process trains one stage; start each run separately"
        )
    return replace(check(composed[0]), recipe=recipes[0]) if composed else None


def _describe_recipe(hydra_config: DictConfig) -> str:
    """Returns a sentence that names the recipe files and the overrides that the stage's values come from.

    Hydra's choices name a recipe even where no such file exists, so the files are looked up here.
    """
    choices = hydra_config.runtime.choices
    recipe, tower_recipe = choices.get("recipe"), choices.get("recipe/vision_tower")
    folders = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
    if any((folder / "recipe" / f"{recipe}.yaml").is_file() for folder in folders):
        sentence = f"recipe {recipe}.yaml (its comments say which numbers are published and which assumed)"
    else:
        sentence = f"no recipe {recipe}.yaml: the stage's default values are used"
    if any((folder / "recipe" / "vision_tower" / f"{tower_recipe}.yaml").is_file() for folder in folders):
        sentence += f"; changed for this vision tower by vision_tower/{tower_recipe}.yaml"
    overrides = [override for override in hydra_config.overrides.task if override.lstrip("+~").startswith("stage.")]
    return f"{sentence}; overridden on the command line: {' '.join(overrides)}" if overrides else sentence


def execute(config: RunConfig) -> int:
    """Runs a validated configuration and returns the exit code.

    An unexpected error ends this process here, without returning: other ranks may still wait in a collective.
    """
    import torch

    from train.distributed.quiet_libraries import quiet_libraries

    quiet_libraries(on_cpu=config.device == "cpu" or not torch.cuda.is_available())
    from data_recipes.schema.sample import DataError
    from llava_next.config import ModelError
    from train.distributed.world import destroy, read_launch
    from train.run import run
    from train.supervision.watchdog import Watchdog
    from train.trainer import Interrupted

    launch = read_launch()
    watchdog = Watchdog(config.run_dir, launch, config.timeout_s)
    _exit_on_stop_signals(watchdog)
    code, reason = 0, "finished"
    try:
        run(config, launch, watchdog)
    except (ConfigError, ModelError, DataError) as error:
        code, reason = report_mistake(error, is_main=launch.is_main), str(error)
    except Interrupted as error:
        code, reason = EXIT_INTERRUPTED, f"{error}; run the same command again to resume"
        if launch.is_main:
            print(reason, file=sys.stderr)
    except KeyboardInterrupt:
        reason = "stopped immediately, without saving; the same command resumes from the newest checkpoint"
        watchdog.exit_now(EXIT_AT_ONCE, reason)
    except Exception as error:
        watchdog.abort(error)
    if launch.is_main and config.preflight != "only":
        watchdog.exit_file.write(code, reason, step=watchdog.progress.current[0].step)
    watchdog.progress.remove()
    destroy()
    return code


def _exit_on_stop_signals(watchdog: "Watchdog") -> None:
    """Installs handlers that end this rank, and so the run, on a scheduler's signal.

    They apply before the first step and after the last, where there is nothing to save. During the steps the trainer
    installs its own handlers.
    """
    rank_pid = os.getpid()

    def exit_rank(number: int, *_: object) -> None:
        if os.getpid() != rank_pid:  # a forked helper process, which inherits the handler
            os._exit(128 + number)
        reason = f"stopped by a signal ({watchdog.progress.current[0].description}) with nothing to save; "
        watchdog.exit_now(EXIT_INTERRUPTED, reason + "run the same command again to resume")

    for number in _STOP_SIGNALS:
        signal.signal(number, exit_rank)


if __name__ == "__main__":
    sys.exit(main())

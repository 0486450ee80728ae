"""Entry point of `python -m train`: runs one stage from Hydra's command line and returns an exit code.

The configuration is composed and validated before torch is imported. A configuration error is printed as one sentence
by rank 0 and ends with exit code 2.
"""

import gc
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.console import run_program
from train.config.compose import announce_replaced, check, check_config_dir, drop_empty_variables, explain
from train.config.exit_codes import EXIT_AT_ONCE, EXIT_INTERRUPTED, EXIT_USAGE, report_mistake
from train.config.removed_keys import with_views_overrides
from train.config.schema import ConfigError, RunConfig
from train.distributed.launch import Launch, read_launch
from train.supervision.lost_output import tolerate_lost_output
from train.supervision.stop_signal import list_stop_signals

if TYPE_CHECKING:
    from train.supervision.watchdog import Watchdog

_SAME_MISTAKE_S = 3.0


def main() -> int:
    """Composes the configuration, runs the stage, and returns the exit code."""
    for number in list_stop_signals():
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    # The deepspeed launcher adds --local_rank. Hydra would reject it, and LOCAL_RANK has the same value.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    try:
        launch = read_launch()
    except ConfigError as error:
        return report_mistake(error, is_main=os.environ.get("RANK", "0") in ("", "0"))
    try:
        config = compose(is_main=launch.is_main)
    except ConfigError as error:
        return _report_before_meeting(error, launch)
    if config is None:
        return 0  # Hydra has handled --help, --cfg job and the like
    with tolerate_lost_output():
        return execute(config, launch)


def _report_before_meeting(error: ConfigError, launch: Launch) -> int:
    """Prints a mistake that was made before the ranks have met; returns the exit code.

    Rank 0 prints it. If all ranks have made it, the launcher ends the others while they wait; else only another rank's
    environment is wrong, and that rank prints it. Where the launcher does not end them, one rank of each host prints.
    """
    if launch.is_main:
        return report_mistake(error)
    time.sleep(_SAME_MISTAKE_S)
    is_first_of_host = launch.local_rank == 0 or "SLURM_STEP_ID" not in os.environ
    return report_mistake(f"rank {launch.rank} ({socket.gethostname()}): {error}", is_main=is_first_of_host)


def compose(*, is_main: bool = True) -> RunConfig | None:
    """Composes and validates the configuration of the command line.

    Args:
        is_main: print which shipped YAML files those of `--config-dir` replace.

    Returns:
        The configuration; None where Hydra only printed something, as for --help.

    Raises:
        ConfigError: the command line or a value is invalid; the message is one sentence.
    """
    composed: list[DictConfig] = []
    recipes: list[str] = []
    config_dir, others = take_config_dir(with_views_overrides(sys.argv[1:]))
    first, arguments = CONFIG_DIR, others
    if config_dir is not None:  # Hydra gives its main folder precedence over the one of --config-dir
        first, arguments = check_config_dir(config_dir), ["--config-dir", str(CONFIG_DIR), *others]
        if is_main:
            announce_replaced(first)

    @hydra.main(config_path=str(first), config_name="train", version_base="1.3")
    def collect(config: DictConfig) -> None:
        composed.append(config)
        recipes.append(_describe_recipe(HydraConfig.get()))

    stderr = io.StringIO()
    overrides = [word for word in others if not word.startswith("-")]
    drop_empty_variables()
    try:
        with redirect_stderr(stderr), _command_line(arguments):
            collect()
    except SystemExit as error:
        text = stderr.getvalue()
        if error.code and "BrokenPipeError" in text:
            raise BrokenPipeError from None
        if error.code:
            raise ConfigError(explain(text, overrides)) from None
    except (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        # What Hydra does not check itself, and with HYDRA_FULL_ERROR=1 everything.
        raise ConfigError(explain(str(error), overrides)) from error
    if len(composed) > 1:
        raise ConfigError(
            f"--multirun selects {len(composed)} runs, but one process trains one stage; start each run separately"
        )
    return replace(check(composed[0]), recipe=recipes[0]) if composed else None


def take_config_dir(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of `--config-dir` or `-cd`, None without one, and the other arguments."""
    config_dir: str | None = None
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        option, has_value, value = word.partition("=")
        if option not in ("--config-dir", "-cd"):
            others.append(word)
        elif has_value:
            config_dir = value
        else:
            config_dir = next(words, "")
    return config_dir, others


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """Replaces the arguments of this process in the body, because Hydra reads them there."""
    given = sys.argv
    sys.argv = [given[0], *arguments]
    try:
        yield
    finally:
        sys.argv = given


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
    written = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)  # an override may hold ${...}
    assert isinstance(written, list)
    overrides = [str(override) for override in written if str(override).lstrip("+~").startswith("stage.")]
    return f"{sentence}; overridden on the command line: {' '.join(overrides)}" if overrides else sentence


def execute(config: RunConfig, launch: Launch | None = None) -> int:
    """Runs a validated configuration and returns the exit code.

    An unexpected error ends this process here, without returning: other ranks may still wait in a collective.

    Args:
        config: of the run.
        launch: the position of this process; None: it is read from the environment.
    """
    # Modules and classes are never collected; looking through them took a sixth of the time of these imports.
    gc.disable()
    import torch

    from train.distributed.quiet_libraries import quiet_libraries

    quiet_libraries(on_cpu=config.device == "cpu" or not torch.cuda.is_available())
    from data_recipes.schema.sample import DataError
    from llava_next.cache_root import redirect_kernel_cache
    from llava_next.config import ModelError
    from train.distributed.world import destroy
    from train.run import run
    from train.supervision.watchdog import Watchdog
    from train.trainer import Interrupted

    gc.freeze()
    gc.enable()
    launch = read_launch() if launch is None else launch
    watchdog = Watchdog(config.run_dir, launch, config.timeout_s, config.join_timeout_s)
    _exit_on_stop_signals(watchdog)
    code, reason = 0, "finished"
    try:
        redirect_kernel_cache()
        run(config, launch, watchdog)
    except (ConfigError, ModelError, DataError) as error:
        code, reason = EXIT_USAGE, str(error)
        watchdog.report_mistake(error)
    except Interrupted as error:
        code, reason = EXIT_INTERRUPTED, f"{error}; run the same command again to resume"
        if launch.is_main:
            print(reason, file=sys.stderr)
    except KeyboardInterrupt:
        reason = "stopped immediately, without saving; the same command resumes from the newest checkpoint"
        watchdog.exit_now(EXIT_AT_ONCE, reason)
    except Exception as error:
        watchdog.abort(error)
    if launch.is_main and watchdog.exit_file is not None and config.preflight != "only":
        watchdog.exit_file.write(code, reason, step=watchdog.progress.current[0].step)
    watchdog.close_folder()
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

    for number in list_stop_signals():
        signal.signal(number, exit_rank)


if __name__ == "__main__":
    sys.exit(run_program(main))

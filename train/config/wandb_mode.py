"""Whether a run writes to wandb: the configuration and the environment variable WANDB_MODE together."""

import os
from typing import Literal

from train.config.schema import ConfigError, LogConfig

WandbMode = Literal["off", "offline", "online"]

_OF_ENVIRONMENT: dict[str, WandbMode] = {
    "disabled": "off",
    "offline": "offline",
    "dryrun": "offline",  # the earlier name
    "online": "online",
    "run": "online",  # the earlier name
    "shared": "online",
}
"""What each value of WANDB_MODE permits."""
_ORDER: tuple[WandbMode, ...] = ("off", "offline", "online")


def wandb_mode(log: LogConfig) -> WandbMode:
    """Returns the lesser of log.wandb and WANDB_MODE, so that the environment can only reduce what is sent.

    Raises:
        ConfigError: wandb does not know the value of WANDB_MODE, and the run would use wandb.
    """
    value = os.environ.get("WANDB_MODE", "").strip().lower()
    if log.wandb == "off" or not value:
        return log.wandb
    if value not in _OF_ENVIRONMENT:
        raise ConfigError(
            f"WANDB_MODE={value} in the environment is not a mode of wandb ({', '.join(_OF_ENVIRONMENT)}); correct or "
            "unset it, or set log.wandb=off"
        )
    return min(log.wandb, _OF_ENVIRONMENT[value], key=_ORDER.index)

"""Where the YAML files of this project are: `configs/` in a checkout, `llava_next_configs/` in an installation."""

from pathlib import Path

_SITE = Path(__file__).resolve().parents[2]
CONFIG_DIR = next(
    (folder for folder in (_SITE / "llava_next_configs", _SITE / "configs") if (folder / "train.yaml").is_file()),
    _SITE / "configs",
)

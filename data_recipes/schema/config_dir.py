"""Where the YAML files of this project are, and a user's own files, which take precedence over them.

The files are in `configs/` in a checkout and in `llava_next_configs/` in an installation.
"""

from collections.abc import Iterable
from pathlib import Path

from data_recipes.schema.sample import DataError

_SITE = Path(__file__).resolve().parents[2]
CONFIG_DIR = next(
    (folder for folder in (_SITE / "llava_next_configs", _SITE / "configs") if (folder / "train.yaml").is_file()),
    _SITE / "configs",
)
_MAX_NAMED = 8


def replaced_files(config_dir: Path, shipped: Path = CONFIG_DIR) -> list[str]:
    """List the YAML files of a user's folder that have the name of a shipped file and are used instead of it."""
    if config_dir.resolve() == shipped.resolve():
        return []
    files = (path.relative_to(config_dir) for path in config_dir.rglob("*.yaml"))
    return sorted(path.as_posix() for path in files if (shipped / path).is_file())


def describe_replaced(config_dir: Path, groups: Iterable[str] = (), shipped: Path = CONFIG_DIR) -> str:
    """Describe in one line which shipped files a user's folder replaces; empty if there are none.

    Args:
        config_dir: the user's folder.
        groups: the folders of files that the program reads; all if empty.
        shipped: the folder of the shipped files.
    """
    groups = tuple(groups)
    files = [name for name in replaced_files(config_dir, shipped) if not groups or name.partition("/")[0] in groups]
    if not files:
        return ""
    more = f" and {len(files) - _MAX_NAMED} more" if len(files) > _MAX_NAMED else ""
    return f"--config-dir {config_dir}: used instead of the shipped files: {', '.join(files[:_MAX_NAMED])}{more}"


def list_config_folders(configs: Path, config_dir: Path | None) -> list[Path]:
    """Return the folders of YAML files, the first with precedence, and print which files it replaces.

    Args:
        configs: the folder of `--configs`.
        config_dir: the user's folder of `--config-dir`; None without one.

    Raises:
        DataError: one of them does not exist.
    """
    for option, folder in (("--config-dir", config_dir), ("--configs", configs)):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{option}: there is no folder {folder}.")
    if config_dir is None:
        return [configs]
    replaced = describe_replaced(config_dir, ("mixture", "source"), configs)
    if replaced:
        print(replaced, flush=True)
    return [config_dir, configs]

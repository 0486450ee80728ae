"""What pyproject.toml cannot say: configs/ of the checkout becomes the package `llava_next_configs` of a wheel."""

from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = Path("configs")
folders = [CONFIGS, *(path for path in CONFIGS.rglob("*") if path.is_dir())]
config_packages = {
    ".".join(["llava_next_configs", *folder.relative_to(CONFIGS).parts]): str(folder) for folder in folders
}

setup(
    packages=[*find_packages(include=["llava_next*", "data_recipes*", "train*"]), *config_packages],
    package_dir=config_packages,
)

"""Tests of the modules that are actually imported, which import-linter does not check."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llava_next", "data_recipes", "train")
HEAVY = ("torch", "transformers", "deepspeed", "wandb")


def loaded_by(modules: list[str], watched: tuple[str, ...]) -> list[str]:
    """Import `modules` in a new interpreter and return those of the `watched` packages that are loaded."""
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({m!r})\n" for m in modules)
    code += f"print(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_config_is_checked_before_torch_is_loaded() -> None:
    """train.config.schema imports no heavy package, so that a wrong key is reported within seconds."""
    assert loaded_by(["train.config.schema"], HEAVY) == []


def test_model_config_imports_standard_library_only() -> None:
    """llava_next.config imports the standard library only."""
    assert loaded_by(["llava_next.config"], (*HEAVY, "numpy", "PIL", "pydantic", "omegaconf")) == []


def test_data_recipes_load_no_torch() -> None:
    """No module of data_recipes imports torch, an engine or Hydra."""
    files = sorted(p for p in ROOT.glob("data_recipes/**/*.py") if p.name not in ("__init__.py", "__main__.py"))
    assert files
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    assert loaded_by(modules, (*HEAVY, "hydra", "omegaconf")) == []


def test_package_inits_are_empty() -> None:
    """Every `__init__.py` is empty, so that each name has a single import path."""
    inits = [p for package in PACKAGES for p in ROOT.glob(f"{package}/**/__init__.py")]
    assert inits
    assert [str(p.relative_to(ROOT)) for p in inits if p.read_text().strip()] == []


def test_every_package_folder_is_a_package() -> None:
    """Every folder with Python files has an `__init__.py`, without which setuptools would omit it."""
    folders = {p.parent for package in PACKAGES for p in ROOT.glob(f"{package}/**/*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []

"""A wheel of the project works outside of a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, as in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Of a copy: setuptools leaves build/ behind, and takes what it finds there into the next wheel.
    source = folder / "source"
    ignored = {".git", ".venv", "build", "outputs", "tests"}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in files:
        if name and name.split("/")[0] not in ignored:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`llava-next` of the wheel, started in a folder that has nothing of the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-m", "llava_next", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_wheel_has_what_the_checkout_has(installed: Path) -> None:
    """Configurations, page templates and the marks of typed packages, besides the modules."""
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.relative_to(installed / "llava_next_configs") for path in installed.rglob("*.yaml")} == shipped
    templates = ROOT / "train" / "html" / "templates"
    assert all((installed / "train" / "html" / "templates" / path.name).is_file() for path in templates.iterdir())
    assert all((installed / name / "py.typed").is_file() for name in ("llava_next", "data_recipes", "train"))


def test_commands_of_a_wheel(installed: Path, tmp_path: Path) -> None:
    """A configuration, a plan, and the refusal of missing raw data, each with shipped YAML files."""
    printed = run(installed, tmp_path, "train", "--cfg", "job", "name=x", "mixture=lcs_558k")
    assert printed.returncode == 0, printed.stderr
    assert "lcs_558k" in printed.stdout
    planned = run(installed, tmp_path, "plan", "model/language_model=vicuna_7b", "hardware=h200_141g", "stage=finetune")
    assert planned.returncode in (0, 1), planned.stderr
    assert "GPU-hours" in planned.stdout
    refused = run(installed, tmp_path, "prepare", "--mixture", "lcs_558k", "--raw", "raw", "--stores", "stores")
    assert refused.returncode == 2
    assert "raw" in refused.stderr
    assert "Traceback" not in refused.stderr

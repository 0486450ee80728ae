"""Tests of the cache folder: Python, the shell scripts and the configurations agree, and there is a fallback."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from llava_next.cache_root import cache_root, redirect_kernel_cache, temporary_cache, writable_cache_root
from llava_next.config import ModelError
from tests.permissions import public_folder, unprivileged
from train.config.compose import compose_overrides, load
from train.config.schema import ConfigError
from train.engine import deepspeed_ops

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["model/language_model=quickstart", "model/vision_tower=dinov2_small_70"]
CASES = {
    "LLAVA_NEXT_CACHE": ({"LLAVA_NEXT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/llava_next"),
    "HOME": ({"HOME": "/c"}, "/c/.cache/llava_next"),
    "empty": ({"LLAVA_NEXT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/llava_next"),
    "spaces": ({"XDG_CACHE_HOME": "/b c", "HOME": "/c"}, "/b c/llava_next"),
}
SPELLINGS = ("$HOME/.cache", "{HOME}/.cache", '".cache"', 'get("LLAVA_NEXT_CACHE"', "XDG_CACHE_HOME:-")


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Sets these of the three variables, and unsets the others."""
    for name in ("LLAVA_NEXT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("variables", "expected"), CASES.values(), ids=CASES)
def test_python_shell_and_configs_agree(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """The same folder in Python, in scripts, and in the paths of the models that the quickstart fetches."""
    set_environment(monkeypatch, variables)
    assert cache_root() == Path(expected)
    command = "set -euo pipefail; source scripts/cache_root.sh; printenv LLAVA_NEXT_CACHE"
    shell = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shell.stdout == f"{expected}\n"
    model = compose_overrides(["name=x", *MODEL]).model
    assert Path(model.language_model.path).parent == Path(expected)
    assert Path(model.vision_tower.path).parent == Path(expected)


def test_one_place_has_the_rule() -> None:
    """No script, program or test computes the folder by itself."""
    owners = {ROOT / "llava_next" / "cache_root.py", ROOT / "scripts" / "cache_root.sh", Path(__file__)}
    for folder in ("llava_next", "data_recipes", "train", "scripts", "tests", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml", ".sbatch") and path not in owners:
                text = path.read_text()
                spelled = [each for each in SPELLINGS if each in text]
                assert spelled == [], path


def test_no_home_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a home directory, as in containers: the message names the variable to set, in every place."""
    set_environment(monkeypatch, {})

    def no_entry(_: int) -> NoReturn:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(ModelError, match="LLAVA_NEXT_CACHE"):
        cache_root()
    with pytest.raises(ConfigError, match="LLAVA_NEXT_CACHE"):
        load(["experiment=quickstart", "stage=align", "name=x"], folders=False)
    root, reason = writable_cache_root()
    assert root.parent == tmp_path
    assert "LLAVA_NEXT_CACHE" in reason
    shell = subprocess.run(
        ["bash", "-c", "source scripts/cache_root.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shell.returncode == 2
    assert "LLAVA_NEXT_CACHE" in shell.stderr


def test_read_only_cache_has_a_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's op is compiled in a folder of this user alone, which is reported with the variable to set."""
    compiled: list[Path] = []
    monkeypatch.setattr(deepspeed_ops, "_compile", lambda *_: compiled.append(deepspeed_ops.extensions_folder()))
    for name in ("TORCH_EXTENSIONS_DIR", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with public_folder() as folder:
        temporary = folder / "tmp"
        temporary.mkdir()
        temporary.chmod(0o777)
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o555)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))
        set_environment(monkeypatch, {"LLAVA_NEXT_CACHE": str(folder / "cache"), "HOME": str(folder / "cache")})
        monkeypatch.setattr(os, "getuid", os.geteuid)
        with unprivileged():
            deepspeed_ops.ensure_built(5)
            monkeypatch.setenv("TRITON_CACHE_DIR", "")
            monkeypatch.delenv("TRITON_CACHE_DIR")
            redirect_kernel_cache()
            own = temporary_cache()
        assert own.stat().st_mode & 0o777 == 0o700
        assert own in compiled[0].parents
        assert os.environ["TRITON_CACHE_DIR"] == str(own / "triton")
        assert "LLAVA_NEXT_CACHE" in capsys.readouterr().err


def test_temporary_cache_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody else could have put any program there."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    temporary_cache().chmod(0o777)
    with pytest.raises(ModelError, match="changed by another user"):
        temporary_cache()


def test_cache_can_be_located_without_torch() -> None:
    """The scripts that fetch models run before torch is needed."""
    command = "import sys, llava_next.cache_root; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0

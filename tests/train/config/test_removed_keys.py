"""The config.yaml of an earlier version is read; a removed key on a command line is refused with what to write."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from llava_next.config import ViewsConfig
from tests.train.cases import LATER_KEYS, earlier_yaml
from train.__main__ import compose
from train.config.compose import load, load_yaml, to_yaml
from train.config.removed_keys import EARLIER_VALUES, REMOVED_KEYS, upgraded
from train.config.schema import ConfigError, RunConfig

EARLIER = Path(__file__).with_name("earlier_config.yaml")
"""The quickstart's second stage with `linear=onednn elementwise=fused`, as commit 8fd9703 wrote it."""


def test_the_config_of_an_earlier_version_is_read() -> None:
    """Its removed keys are dropped, the keys that it lacks have the values of that time, and all others are kept."""
    config = load_yaml(EARLIER)
    assert (config.name, config.stage.name, config.attention) == ("quickstart", "finetune", "sdpa")
    assert (config.stage.betas, config.stage.eps) == ((0.9, 0.999), 1e-8)
    now, then = yaml.safe_load(to_yaml(config)), yaml.safe_load(EARLIER.read_text())
    assert set(then) - set(now) == set(REMOVED_KEYS)
    assert {f"stage.{key}" for key in set(now["stage"]) - set(then["stage"])} == {*EARLIER_VALUES, "stage.views"}
    assert set(now) - set(then) == set(LATER_KEYS)
    same = set(now) & set(then) - {"stage"}
    assert {key: now[key] for key in same} == {key: then[key] for key in same}


@pytest.mark.parametrize(
    ("image_mode", "view"), [("anyres", "anyres"), ("square", "crop"), ("pad", "pad"), ("squash", "squash")]
)
def test_an_image_mode_is_read_as_the_views_of_all_images(tmp_path: Path, image_mode: str, view: str) -> None:
    """In the config.yaml of an earlier run, and in a YAML file of the user's own, whose value replaces the stage's. The
    configuration that is written again has all keys of the views."""
    earlier = yaml.safe_load(EARLIER.read_text())
    earlier["stage"]["image_mode"] = image_mode
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(earlier))
    assert load_yaml(path).stage.views == ViewsConfig(view, view)
    views = {"single": view, "several": view, "closing_newline": False}
    assert upgraded(earlier)["stage"]["views"] == views == yaml.safe_load(to_yaml(load_yaml(path)))["stage"]["views"]
    (tmp_path / "experiment").mkdir()
    mine = f"# @package _global_\nname: mine\nstage:\n  image_mode: {image_mode}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    config = load(["experiment=mine", "mixture=quickstart_finetune"], config_dir=str(tmp_path), folders=False)
    assert config.stage.views == ViewsConfig(view, view)


def test_an_image_mode_on_a_command_line_is_read_as_views(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the functions that compose a configuration, and by `python -m train`. An unknown one names the views."""
    overrides = ["experiment=quickstart", "stage.image_mode=square"]
    views = ViewsConfig("crop", "crop")
    assert load(overrides, folders=False).stage.views == views
    monkeypatch.setattr(sys, "argv", ["train", *overrides, "--cfg", "job"])
    assert compose() is None
    assert yaml.safe_load(capsys.readouterr().out)["stage"]["views"] == asdict(views)
    with pytest.raises(ConfigError, match=r"^stage\.views"):
        load(["experiment=quickstart", "stage.image_mode=round"], folders=False)


def test_the_tests_write_it_alike(run_config: RunConfig) -> None:
    """`earlier_yaml`, which tests of whole runs use, has the keys of the real file."""
    written, real = yaml.safe_load(earlier_yaml(run_config)), yaml.safe_load(EARLIER.read_text())
    assert (set(written), set(written["stage"])) == (set(real), set(real["stage"]))


def test_upgrading_changes_nothing_else() -> None:
    """A file of this version stays as it is, the argument too; a damaged one is left to its reader."""
    now = {"seed": 1, "stage": {"betas": [0.8, 0.9], "eps": 1e-6}}
    assert upgraded(now) == now
    then = {"linear": "auto", "stage": {"name": "align"}}
    assert upgraded(then) == {"stage": {"name": "align", "betas": [0.9, 0.999], "eps": 1e-8}}
    assert then == {"linear": "auto", "stage": {"name": "align"}}
    assert upgraded({"stage": "none"}) == {"stage": "none"}


@pytest.mark.parametrize("key", REMOVED_KEYS)
@pytest.mark.parametrize("sign", ["", "+"])
def test_a_removed_key_is_refused(key: str, sign: str) -> None:
    """With what to write instead, however it is given."""
    with pytest.raises(ConfigError, match=rf"^{key}: this key was removed; leave it out"):
        load(["experiment=quickstart", f"{sign}{key}=auto"], folders=False)


def test_a_removed_key_in_a_yaml_file_is_refused(tmp_path: Path) -> None:
    """An experiment of the user's own that names it gets the same sentence."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nlinear: onednn\n")
    with pytest.raises(ConfigError, match="linear: this key was removed; leave it out"):
        load(["experiment=mine", "mixture=quickstart_finetune"], config_dir=str(tmp_path), folders=False)

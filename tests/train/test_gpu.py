"""Test on a GPU: a run with deterministic=true that is stopped and resumed ends with bit-identical weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from train.config.compose import to_yaml
from train.config.schema import RunConfig, SaveConfig

_RUN = """
import sys
from pathlib import Path
from train.__main__ import execute
from train.config.compose import load_yaml
sys.exit(execute(load_yaml(Path(sys.argv[1]))))
"""


def _run(config: RunConfig, max_steps: int | None = None) -> None:
    path = Path(config.root) / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(replace(config, max_steps=max_steps)))
    environment = {key: value for key, value in os.environ.items() if config.device == "cpu" or key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("device", "compiled"),
    [
        pytest.param("cpu", False, marks=pytest.mark.full),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
def test_a_deterministic_run_is_resumed_bit_for_bit(
    run_config: RunConfig, device: Literal["cpu", "cuda"], compiled: bool
) -> None:
    """Two starts, each with its own compilation, give the weights of an uninterrupted run."""
    config = replace(run_config, device=device, deterministic=True, save=SaveConfig(every=2), preflight="off")
    if compiled:
        config = replace(config, compile=("vision_tower", "language_model"))
    _run(replace(config, name="whole"))
    _run(config, max_steps=2)
    assert not (config.run_dir / "export").exists()
    _run(config)
    whole_dir = replace(config, name="whole").run_dir
    whole, resumed = (load_file(folder / "export" / "model.safetensors") for folder in (whole_dir, config.run_dir))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    losses = [
        [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole_dir, config.run_dir)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4

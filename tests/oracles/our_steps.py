"""Twenty optimizer steps of the tiny model by this project's program, for each run of tiny_runs.RUNS.

    python -m tests.oracles.our_steps [--check]

Runs `python -m data_recipes.prepare` on the raw folders, then `python -m train` with YAML files of its own, DeepSpeed
included, in this project's environment. The losses are written to tests/oracles/fixtures/steps_ours.json, for the plot.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data_recipes.prepare import __main__ as prepare
from llava_next.config import ANYRES, PARTS
from llava_next.formats.hugging_face import write_hf
from tests.oracles import our_model, tiny_model, tiny_runs
from tests.oracles.save_fixture import save
from tests.oracles.tiny_runs import RUNS, Run

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
TOLERANCE = 1e-5
"""Another processor may round differently."""


class OurSide:
    """The raw folders, YAML files, stores and first weights of the runs, in a new folder.

    A run is determined by its YAML files and `overrides`; `metrics` reads its numbers afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs = folder / "configs"
        config = self.model_config = our_model.write_directories(folder / "model")
        backbone, model = our_model.build(config)
        processor = backbone.processor(template=None, views=ANYRES, max_length=tiny_model.MAX_LENGTH)
        write_hf(model, backbone, processor, folder / "start")
        for source in sorted({source for run in RUNS for source in run.sources}):
            tiny_runs.write_raw(folder / "raw" / source, tiny_runs.records(source))
            options = {"annotations": "records.json"}
            self._yaml(f"source/{source}", {"reader": "llava_json", "root": source, "options": options})
        self._yaml("model/language_model/oracle", asdict(config.language_model))
        self._yaml("model/vision_tower/oracle", asdict(config.vision_tower))
        for run in RUNS:
            mixture = {"name": run.name, "seed": 0, "sources": {source: {} for source in run.sources}}
            self._yaml(f"mixture/{run.name}", mixture)
            self._yaml(f"stage/{run.name}", self._stage(run))

    def prepare(self, run: Run) -> None:
        """Makes the stores of a run, as `python -m data_recipes.prepare` does; existing ones are kept."""
        folders = {"--raw": self.folder / "raw", "--stores": self.folder / "stores", "--configs": self.configs}
        arguments = ["--mixture", run.name, "--workers", "1", *(str(each) for pair in folders.items() for each in pair)]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert prepare.main(arguments) == 0, output.getvalue()

    def overrides(self, run: Run) -> list[str]:
        """The command line of a run, next to `--config-dir`."""
        return [
            "model/language_model=oracle",
            "model/vision_tower=oracle",
            f"stage={run.name}",
            f"mixture={run.name}",
            "name=steps",
            f"root={self.folder / 'outputs'}",
            f"seed={tiny_runs.SEED}",
            f"data.store_root={self.folder / 'stores'}",
            "data.workers=0",
            "data.length_workers=1",
            f"packing.max_tokens={2 * tiny_model.MAX_LENGTH}",
            "save.every=0",
            "device=cpu",
        ]

    def metrics(self, run: Run) -> list[dict[str, float]]:
        """The metrics of a finished run, step by step."""
        path = self.folder / "outputs" / "steps" / run.name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _stage(self, run: Run) -> dict[str, Any]:
        return {
            "name": run.name,
            "learning_rates": {part: run.rates.get(part) for part in PARTS},
            "batch_size": tiny_runs.BATCH_SIZE,
            "epochs": tiny_runs.EPOCHS,
            "max_length": tiny_model.MAX_LENGTH,
            "template": run.template,
            "views": asdict(our_model.VIEWS[run.image_mode]),
            "init_from": str(self.folder / "start"),
            "warmup_ratio": tiny_runs.WARMUP_RATIO,
            "clip_norm": tiny_runs.CLIP_NORM,
            "loss_weighting": "sample",  # what their trainer does with one sample a micro-batch
            "result": "connector" if run.is_align else "export",
        }

    def _yaml(self, name: str, values: dict[str, Any]) -> None:
        path = self.configs / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        # By way of JSON, which has no tuples.
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values))), encoding="utf-8")


def train(side: OurSide, run: Run) -> list[float]:
    """Runs the program in a process of its own; returns the losses. AssertionError with its output if it fails."""
    side.prepare(run)
    command = [sys.executable, "-m", "train", "--config-dir", str(side.configs), *side.overrides(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return [step["train/loss"] for step in side.metrics(run)]


def main() -> int:
    """The program; returns 1 if the file differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        side = OurSide(Path(scratch, "steps"))
        outputs = {run.name: {"losses": train(side, run)} for run in RUNS}
    right = save("steps_ours", "python -m train", tiny_runs.inputs(RUNS), outputs, check=check, tolerance=TOLERANCE)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())

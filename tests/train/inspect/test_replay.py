"""A replayed step has the samples, the ranks and the loss of the step, and the page names the weights."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.tiny import tiny_model
from tests.train import cases
from train.checkpoint.saved_weights import Weights, choose_weights
from train.config.compose import to_yaml
from train.config.schema import RunConfig, SaveConfig
from train.inspect.__main__ import main

Start = Callable[[int], Ranks]


@pytest.mark.parametrize(("zero_stage", "weighting"), [(2, "token"), (3, "sample")])
def test_a_step_is_replayed(
    start_ranks: Start,
    run_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    zero_stage: int,
    weighting: str,
) -> None:
    """The first step, from initial weights, and a later one, from a checkpoint of two ranks: each sample alone on one
    process gives the logged loss, and the page has the samples and rows of the ranks."""
    config = cases.with_stage(run_config, loss_weighting=weighting)
    config = replace(config, engine=cases.zero(zero_stage), save=SaveConfig(every=2, keep=2))
    records = start_ranks(2).run(cases.train, config, 3)
    run_dir = config.run_dir
    (run_dir / "config.yaml").write_text(to_yaml(config))
    for step, origin in ((0, "initial parts"), (2, "checkpoint")):
        assert main([str(run_dir), "--step", str(step), "--loss"]) == 0
        output = capsys.readouterr().out
        assert f"weights exactly as before step {step}: {origin}" in output
        replayed, logged = map(float, re.findall(r"([\d.]+) (?:replayed|logged)", output))
        assert replayed == pytest.approx(logged, abs=1e-5)
        assert logged == pytest.approx(records[0].losses[step], abs=1e-6)
        page = (run_dir / "inspect" / f"step_{step:06d}.html").read_text()
        places = re.findall(r"rank (\d), micro-step (\d)", page)
        for rank, record in enumerate(records):
            lengths = [places.count((str(rank), str(row))) for row in range(len(record.rows[step]))]
            assert lengths == record.rows[step]
        assert len(places) == len(records[0].samples[step])
        losses = [float(loss) for loss in re.findall(r"<b>loss ([\d.]+)</b>", page)]
        assert losses == sorted(losses, reverse=True)
        assert len(losses) == len(places)


@pytest.mark.parametrize("zero_stage", [0, 2, pytest.param(3, marks=pytest.mark.full)])
def test_a_head_that_is_the_embedding_is_replayed(
    start_ranks: Start, run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], zero_stage: int
) -> None:
    """However a checkpoint names the shared tensor, the replayed loss is the logged one."""
    model = tiny_model(tmp_path / "models", tied=True)
    config = replace(run_config, model=model, engine=cases.zero(zero_stage), save=SaveConfig(every=2, keep=2))
    records = start_ranks(1).run(cases.train, config, 3)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    assert main([str(config.run_dir), "--step", "2", "--loss"]) == 0
    output = capsys.readouterr().out
    assert "weights exactly as before step 2: checkpoint" in output
    replayed, _ = map(float, re.findall(r"([\d.]+) (?:replayed|logged)", output))
    assert replayed == pytest.approx(records[0].losses[2], abs=1e-5)


def test_the_last_step_is_the_default_one(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The last of metrics.jsonl without a line that a kill cut off, or the first where nothing was logged; the page
    shows the logged loss around it."""
    run_dir = run_config.run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(run_config))
    assert main([str(run_dir), "--num", "1"]) == 0
    assert (run_dir / "inspect" / "step_000000.html").is_file()
    lines = [json.dumps({"step": step, "train/loss": 5.5 - step}) for step in range(3)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "tra')
    assert main([str(run_dir), "--num", "1"]) == 0
    page = (run_dir / "inspect" / "step_000002.html").read_text()
    assert "train/loss 3.5" in page
    assert "<h2>1 of 13 samples</h2>" in page
    assert "from 3.5000 to 5.5000" in page
    capsys.readouterr()


@pytest.mark.parametrize(
    ("checkpoints", "result", "step", "expected"),
    [
        ([], None, 0, 0),
        ([], None, 7, 0),
        ([50, 100], None, 100, 100),
        ([50, 100], None, 99, 50),
        ([50, 100], 110, 49, 50),
        ([50, 100], 110, 20, 0),
        ([], 110, 100, 110),
        ([], 110, 10, 0),
    ],
)
def test_weights_are_the_newest_before_the_step(
    checkpoints: list[int], result: int | None, step: int, expected: int
) -> None:
    """A checkpoint at or before it; without one, the nearest of the first weights and the later ones."""
    weights = [Weights(0), *(Weights(number, Path("checkpoints") / str(number)) for number in checkpoints)]
    weights += [Weights(result, Path("export"))] if result is not None else []
    assert choose_weights(weights, step).step == expected

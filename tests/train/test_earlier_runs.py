"""Runs that an earlier version wrote are resumed, exported, evaluated and reported, and their model answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import RankError
from tests.train import cases
from tests.train.cases import as_an_earlier_run, with_stage
from tests.train.conftest import StartRanks
from train.chat import main as chat
from train.config.schema import RunConfig, SaveConfig
from train.evaluate.__main__ import main as evaluate
from train.export.__main__ import main as export
from train.report.__main__ import main as report


def test_a_checkpoint_of_an_earlier_version_is_resumed(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """With the losses of a run that was not interrupted. Other betas are refused, and taken where they are allowed."""
    ranks = start_ranks(1)
    whole = ranks.run(cases.train, replace(run_config, name="whole"))[0]
    ranks.run(cases.train_up_to, run_config, 2)
    as_an_earlier_run(run_config)
    other = with_stage(run_config, betas=(0.9, 0.95))
    with pytest.raises(RankError, match=r"stage.betas was \[0.9, 0.999\], is \[0.9, 0.95\]"):
        ranks.run(cases.train, other)
    assert ranks.run(cases.betas_after_resume, replace(other, resume_allow=("stage.betas",)))[0] == {(0.9, 0.95)}
    resumed = ranks.run(cases.train, run_config)[0]
    assert (resumed.first_step, resumed.losses) == (2, whole.losses[2:])


def test_programs_read_the_folder_of_an_earlier_run(
    start_ranks: StartRanks, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export from the checkpoint, evaluation of the result, report of the run, and a chat with its model."""
    config = replace(run_config, save=SaveConfig(every=2, keep=2))
    start_ranks(1).run(cases.train_and_write, config)
    as_an_earlier_run(config)
    store = Path(config.data.store_root) / "tiny_pictures"
    for program, arguments in (
        (export, [str(config.run_dir / "checkpoints" / "step_000004")]),
        (evaluate, [str(config.run_dir), "--store", str(store), "--limit", "2", "--generate", "0"]),
        (report, [str(config.run_dir)]),
        (chat, [str(config.run_dir), "--ask", "What is it?", "--max-new-tokens", "2"]),
    ):
        assert program(arguments) == 0, capsys.readouterr().err
    assert (config.run_dir / "exports" / "step_000004_hf" / "config.json").is_file()
    assert (config.run_dir / "evaluation.json").is_file()
    assert (config.run_dir / "report.html").is_file()

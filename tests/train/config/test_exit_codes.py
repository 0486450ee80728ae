"""Tests of how programs report a mistake: one sentence and exit code 2."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from train.config import compose
from train.config.exit_codes import EXIT_USAGE, report_mistake
from train.config.schema import ConfigError, RunConfig
from train.distributed.launch import Launch
from train.run import run
from train.supervision.watchdog import Watchdog


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_denied_output_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """The sentence has the path, the reason and the owner."""
    path = tmp_path / "below" / "report.html"
    assert report_mistake(OSError(number, os.strerror(number), str(path))) == EXIT_USAGE
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"error: {path} cannot be written: {os.strerror(number)} (owner {tmp_path.owner()}")


def test_other_errors_of_the_disk_keep_their_traceback() -> None:
    """They are not a mistake of the user."""
    with pytest.raises(OSError, match="Input/output error"):
        report_mistake(OSError(errno.EIO, os.strerror(errno.EIO)))


def test_root_that_cannot_be_written_is_one_sentence(run_config: RunConfig, tmp_path: Path) -> None:
    """Before anything is started. The message names the key, the folder and the reason."""
    (tmp_path / "a_file").touch()
    config = replace(run_config, root=str(tmp_path / "a_file" / "outputs"))
    launch = Launch(0, 0, 1)
    with pytest.raises(ConfigError, match=rf"root={config.root}.*cannot be written: Not a directory.*set root="):
        run(config, launch, Watchdog(config.run_dir, launch, 60.0, 60.0))


def test_denied_folder_of_the_configuration_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder inside somebody's closed home directory: the checks of folders say so."""

    def denied(_: RunConfig) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "closed" / "stores"))

    monkeypatch.setattr(compose, "check_folders", denied)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/closed/stores .*Permission denied .*owner {tmp_path.owner()}"):
        compose.load(["experiment=quickstart", "stage=align", "name=x"])

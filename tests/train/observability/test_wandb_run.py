"""Tests of a folder's wandb run: its id, the modes, and the checks before the model is built, without a network."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from train.config.rules import check_installed, check_values
from train.config.schema import ConfigError, LogConfig, RunConfig
from train.config.wandb_mode import wandb_mode
from train.observability import wandb_run
from train.observability.run_log import RunLog
from train.observability.wandb_run import check_wandb, start_wandb

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every `wandb.init`, of a stand-in for wandb; WANDB_MODE is not set."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        return SimpleNamespace(summary={}, log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=lambda **_: None))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


@pytest.fixture
def online(run_config: RunConfig) -> RunConfig:
    """A run with log.wandb=online, whose folder exists."""
    run_config.run_dir.mkdir(parents=True)
    return replace(run_config, log=LogConfig(wandb="online"))


def test_each_folder_has_its_own_run(online: RunConfig, started: list[dict[str, Any]]) -> None:
    """A resumed run continues the wandb run of its folder. A folder of the same name that was removed, or another
    person's, has another one."""
    for _ in range(2):
        start_wandb(online, 0)
    shutil.rmtree(online.run_dir)
    online.run_dir.mkdir()
    start_wandb(online, 0)
    start_wandb(replace(online, root=f"{online.root}/colleague"), 0)
    first, second, third, fourth = (call["id"] for call in started)
    assert first == second
    assert len({first, third, fourth}) == 3
    assert {call["resume"] for call in started} == {"allow"}
    assert sorted(path.name for path in (online.run_dir / "wandb").iterdir()) == ["run_id", "sent.json"]


def test_folder_of_an_earlier_version_continues_its_run(online: RunConfig, started: list[dict[str, Any]]) -> None:
    """It has sent steps under the id NAME-STAGE, and continues it also when it is moved to another name later."""
    sent = online.run_dir / "wandb" / "sent.json"
    sent.parent.mkdir()
    sent.write_text("7\n")
    assert start_wandb(online, 3)[1] == 7
    sent.unlink()
    start_wandb(online, 3)
    assert [call["id"] for call in started] == ["tiny-finetune"] * 2


@pytest.mark.parametrize(
    ("variable", "configured", "expected"),
    [
        ("", "online", "online"),
        ("disabled", "online", "off"),
        ("disabled", "offline", "off"),
        ("offline", "online", "offline"),
        ("dryrun", "online", "offline"),
        ("online", "offline", "offline"),
        ("online", "off", "off"),
        ("no-such-mode", "off", "off"),
    ],
)
def test_environment_can_only_reduce_what_is_sent(
    monkeypatch: pytest.MonkeyPatch, variable: str, configured: Any, expected: str
) -> None:
    """The mode is the lesser of WANDB_MODE and log.wandb."""
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(LogConfig(wandb=configured)) == expected


def test_disabled_wandb_is_not_used(
    online: RunConfig,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """WANDB_MODE=disabled with log.wandb=online sends nothing, asks for no key, and is reported."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb_run, "_login_error", lambda: pytest.fail("a key was looked for"))
    check_wandb(online)
    log = RunLog(online, is_main=True, first_step=0, num_steps=1)
    log.log_step(0, {"perf/step_s": 0.5})
    log.close()
    assert started == []
    assert not (online.run_dir / "wandb").exists()
    assert "WANDB_MODE" in capsys.readouterr().err


def test_unknown_mode_is_an_error(online: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable and its value, when the configuration is checked."""
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    with pytest.raises(ConfigError, match="WANDB_MODE=no-such-mode"):
        check_installed(online)


@pytest.mark.parametrize("project", ["", "team/project", "50%", "x" * 129])
def test_project_is_checked(online: RunConfig, project: str) -> None:
    """Names that wandb refuses after the model has been built are refused with the configuration."""
    check_values(replace(online, log=LogConfig(wandb="off", wandb_project=project)))
    with pytest.raises(ConfigError, match=r"log\.wandb_project"):
        check_values(replace(online, log=LogConfig(wandb="online", wandb_project=project)))


@pytest.mark.parametrize("text", ["", "a b", "../other", "x" * 129])
def test_invalid_id_is_an_error(online: RunConfig, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = online.run_dir / "wandb" / "run_id"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        check_wandb(online)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """An environment in which wandb finds no API key; the function sets one. The server does not exist."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    return lambda key: monkeypatch.setenv("WANDB_API_KEY", key)


@pytest.mark.usefixtures("no_account")
def test_missing_key_is_an_error(online: RunConfig) -> None:
    """It is found before the model is built. Offline no key is needed."""
    check_wandb(replace(online, log=LogConfig(wandb="offline")))
    with pytest.raises(ConfigError, match=r"log\.wandb=online.*WANDB_API_KEY"):
        check_wandb(online)
    assert list(online.run_dir.iterdir()) == []


@pytest.mark.parametrize("key", [pytest.param(KEY, marks=pytest.mark.full), "too-short-0123"])
def test_message_does_not_show_the_key(online: RunConfig, no_account: Callable[[str], None], key: str) -> None:
    """Neither for a malformed key nor for one that the server does not accept."""
    no_account(key)
    with pytest.raises(ConfigError, match=r"log\.wandb=online") as error:
        check_wandb(online)
    assert key not in str(error.value)

"""The wandb run of a run folder: its id, whether it can start, and its start.

wandb/run_id      the id, chosen at random when the folder's first run starts
wandb/sent.json   the first step that was not yet sent
"""

import json
import os
import re
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.config.compose import to_yaml
from train.config.schema import ConfigError, RunConfig
from train.config.wandb_mode import wandb_mode

_LOGIN_TIMEOUT_S = 90.0
_LOGIN = """
import wandb
try:
    is_logged_in = wandb.login(verify=True)
    error = "" if is_logged_in else "no API key is configured"
except Exception as raised:
    error = str(raised) or type(raised).__name__
print("\\nresult:", " ".join(error.split()))
"""
"""Looks for the API key where wandb.init does, and asks the server whether it is valid. It runs in another process:
without a terminal wandb asks no question, and the threads of wandb do not exist yet when workers are forked here."""


def check_wandb(config: RunConfig) -> None:
    """Checks what `start_wandb` will need: the run's id and, online, an API key that the server accepts.

    Nothing is written.

    Raises:
        ConfigError: the id cannot be read or is not valid, there is no API key, or the server rejects it or cannot be
            reached. The message has no key.
    """
    mode = wandb_mode(config.log)
    if mode == "off":
        return
    _read_run_id(config)
    if mode == "offline":
        return
    error = _login_error()
    if error:
        raise ConfigError(
            f"log.wandb=online: wandb cannot log in ({error}); run `wandb login`, set WANDB_API_KEY, or set "
            "log.wandb=offline (`wandb sync` sends the files later)"
        )


def start_wandb(config: RunConfig, first_unlogged: int) -> tuple[Any, int]:
    """Starts the wandb run of this folder, or continues it.

    Args:
        config: of the run.
        first_unlogged: the first step that metrics.jsonl never had.

    Returns:
        The run, None where wandb is off; and the first step to send.
    """
    mode = wandb_mode(config.log)
    if mode == "off":
        return None, first_unlogged
    import wandb

    run_id = _read_run_id(config) or secrets.token_hex(8)
    path = _run_id_path(config.run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, run_id)
    data = _read_data_summary(config.run_dir)
    run = wandb.init(
        project=config.log.wandb_project,
        name=f"{config.name}/{config.stage.name}",
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(config.run_dir),
        config={"yaml": to_yaml(config), "data": data},
    )
    # In the summary instead of the history: wandb accepts each step once, and the start is not a step.
    run.summary["quarantine"] = wandb.Table(
        columns=["source", "left out by", "reason", "samples"], data=_list_rejects(data)
    )
    return run, _read_first_unsent(config.run_dir, first_unlogged)


def _run_id_path(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run_id"


def _sent_path(run_dir: Path) -> Path:
    return run_dir / "wandb" / "sent.json"


def _read_run_id(config: RunConfig) -> str:
    """Returns the id of the folder's wandb run; empty if it has none yet.

    A folder of an earlier version has no file with an id, but has sent steps: its id is NAME-STAGE.
    """
    path = _run_id_path(config.run_dir)
    try:
        run_id = path.read_text().strip()
    except FileNotFoundError:
        is_of_earlier_version = _sent_path(config.run_dir).is_file()
        return f"{config.name}-{config.stage.name}".replace("/", "-") if is_of_earlier_version else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the id of the wandb run cannot be read from {path}: {error}; restore the file, or remove it to log to a "
            "new wandb run"
        ) from error
    if not re.fullmatch(r"[\w.-]{1,128}", run_id):
        raise ConfigError(
            f"{path} contains {run_id[:80]!r}, which is not an id of a wandb run; remove the file to log to a new one"
        )
    return run_id


def _login_error() -> str:
    """Returns why wandb has no valid login, in one sentence without the key; empty if it has one."""
    try:
        login = subprocess.run(
            [sys.executable, "-c", _LOGIN],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "WANDB_SILENT": "true"},
            timeout=_LOGIN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the server did not answer within {_LOGIN_TIMEOUT_S:.0f} s"
    results = re.findall(r"^result: ?(.*)$", login.stdout, re.MULTILINE)
    if not results:
        lines = login.stderr.strip().splitlines()
        return _hide_keys(lines[-1] if lines else f"the check ended with exit code {login.returncode}")
    return _hide_keys(results[-1]).rstrip(".")


def _hide_keys(text: str) -> str:
    """Replaces the API key of the environment, and everything that looks like one, by asterisks."""
    key = os.environ.get("WANDB_API_KEY", "").strip()
    if key:
        text = text.replace(key, "***")
    return re.sub(r"[\w-]{40,}", "***", text)


def _read_first_unsent(run_dir: Path, first_unlogged: int) -> int:
    """Returns the first step that was never sent to wandb, and stores it.

    It is stored in a file of its own, because a run that is killed twice has already removed the lines in question.
    """
    path = _sent_path(run_dir)
    with suppress(OSError, ValueError):
        first_unlogged = max(first_unlogged, int(json.loads(path.read_text())))
    _write_atomically(path, json.dumps(first_unlogged))
    return first_unlogged


def _write_atomically(path: Path, line: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(line + "\n")
    partial.replace(path)


def _read_data_summary(run_dir: Path) -> dict[str, Any]:
    """Returns the content of data.json, or an empty dictionary where there is no such file."""
    path = run_dir / "data.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return summary


def _list_rejects(data: dict[str, Any]) -> list[list[Any]]:
    """Returns (source, rejected by, reason, number of samples) of the preparation and of the length table."""
    rejects_by_gate = {
        "preparing": {row["source"]: row["rejects"] for row in data.get("mixture", [])},
        "this run": data.get("rejects_by_source", {}),
    }
    return [
        [source, gate, reason, number]
        for gate, sources in rejects_by_gate.items()
        for source, reasons in sources.items()
        for reason, number in reasons.items()
    ]

"""A stand-in for scripts/lmms_eval.sh: EXPORT --tasks TASK --output_path FOLDER [--limit N].

It writes results of lmms-eval's form. What it does for a task is in the environment variable BEHAVIOUR; its calls are
appended to the file CALLS.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_RECORDED = ("OPENAI_API_URL", "API_TYPE", "MODEL_VERSION", "HF_HUB_OFFLINE")


def run_task(arguments: Sequence[str]) -> int:
    """Does what BEHAVIOUR says; returns the exit code."""
    task, folder = arguments[2], Path(arguments[4])
    behaviour = json.loads(os.environ["BEHAVIOUR"]).get(task, {})
    recorded = {name: os.environ[name] for name in _RECORDED if name in os.environ}
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write(json.dumps([arguments, recorded]) + "\n")
    print("key", os.environ.get("OPENAI_API_KEY"), "token", os.environ.get("HF_TOKEN"))
    print(behaviour.get("prints", ""), flush=True)
    time.sleep(behaviour.get("sleeps", 0))
    if behaviour.get("fails"):
        print("Traceback (most recent call last):\n  File x\nValueError: no such thing\n  more")
        return 1
    (folder / "model").mkdir()
    if behaviour.get("submits"):
        (folder / "submissions").mkdir()
        (folder / "submissions" / "answers.json").write_text("[]")
    results = {"results": {task: behaviour.get("scores", {})}, "n-samples": {task: {"effective": 5}}}
    (folder / "model" / "2026_results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_task(sys.argv[1:]))

"""Tasks of the installed lmms-eval as JSON on the last line: python tests/scripts/lmms_eval_tasks.py NAME...

Runs in the environment that scripts/lmms_eval.sh makes, for test_suite_tasks.py. A name that lmms-eval does not have is
null. `texts` is the source of the task's folder and of what its judge uses.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmms_eval  # type: ignore[import-not-found]
from lmms_eval.tasks import TaskManager  # type: ignore[import-not-found]

_PACKAGE = Path(lmms_eval.__file__).parent


def describe(manager: Any, name: str) -> dict[str, Any] | None:
    """What the table's YAML says about a task, as the installed task has it."""
    if name not in manager.all_tasks:
        return None
    config = manager._get_config(name)
    folder = Path(manager.task_index[name]["yaml_path"]).parent
    files = [*folder.glob("*.py"), *(_PACKAGE / "llm_judge" / "providers").glob("openai.py")]
    return {
        "data": config["dataset_path"],
        "split": config["test_split"],
        "token": bool((config.get("dataset_kwargs") or {}).get("token")),
        "metrics": [metric["metric"] for metric in config["metric_list"]],
        "texts": "\n".join(file.read_text() for file in files),
    }


def main() -> None:
    """Prints the tasks that the command line names."""
    manager = TaskManager("ERROR")
    tasks = {name: describe(manager, name) for name in sys.argv[1:]}
    print(json.dumps({"version": version("lmms-eval"), "tasks": tasks}))


if __name__ == "__main__":
    main()

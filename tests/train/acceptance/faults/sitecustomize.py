"""Imported by Python at start-up if the folder is on PYTHONPATH: injects the fault ACCEPT_FAULT into rank 1 of a
run."""

import os
import sys
import time
from typing import Any

if sys.orig_argv[1:3] == ["-m", "train"] and os.environ.get("RANK") == "1":
    from deepspeed.runtime.engine import DeepSpeedEngine

    sound = DeepSpeedEngine.backward
    num_calls = 0

    def larger(engine: DeepSpeedEngine, loss: Any, *arguments: Any, **options: Any) -> Any:
        """The gradient of this rank is one percent too large."""
        return sound(engine, loss * 1.01, *arguments, **options)

    def late(engine: DeepSpeedEngine, loss: Any, *arguments: Any, **options: Any) -> Any:
        """This rank never starts its fourth backward pass."""
        global num_calls
        num_calls += 1
        if num_calls == 4:
            time.sleep(3600)
        return sound(engine, loss, *arguments, **options)

    DeepSpeedEngine.backward = {"larger": larger, "late": late}[os.environ["ACCEPT_FAULT"]]

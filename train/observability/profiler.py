"""Where the time of chosen steps goes, operation by operation: torch's profiler around them, on rank 0.

Owns when it runs and what it leaves in the run's folder `profile/`: a trace for chrome://tracing or ui.perfetto.dev,
and the longest operations as text. The steps learn what they learn without it; their own `perf/` numbers are slower.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.config.schema import RunConfig
from train.distributed.world import World

_NUM_ROWS = 60


class StepProfiler:
    """Profiles steps `profile.steps` (the first and the last) of rank 0; elsewhere it does nothing.

    Args:
        config, world: of the run.
        say: tells the person in front of the terminal what was written.
    """

    def __init__(self, config: RunConfig, world: World, say: Callable[[str], None]) -> None:
        self._steps = config.profile.steps if world.is_main else ()
        self._folder, self._device, self._say = config.run_dir / "profile", world.device, say
        self._running: Any = None
        self._span: Any = None
        self._began = 0

    def before(self, step: int) -> None:
        """Starts in the first of the steps, or where a run goes on between them."""
        if self._steps and self._running is None and self._steps[0] <= step <= self._steps[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running, self._began = torch.profiler.profile(activities=activities), step
            self._running.start()
        if self._running is not None:
            self._span = torch.profiler.record_function(f"step {step}")
            self._span.__enter__()

    def after(self, step: int, *, is_last: bool) -> None:
        """Stops after the last of the steps, or of the run, and writes what was seen."""
        if self._running is None:
            return
        self._span.__exit__(None, None, None)
        if step < self._steps[1] and not is_last:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found, self._running = self._running, None
        found.stop()
        place = self._write(found, f"steps_{self._began:06d}_{step:06d}")
        self._say(f"profiled steps {self._began} to {step}: {place} (for ui.perfetto.dev), and a table beside it")

    def _write(self, found: Any, name: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"{name}.json.gz"
        found.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=_NUM_ROWS, max_name_column_width=80)
        (self._folder / f"{name}.txt").write_text(table + "\n")
        return trace

"""Runs torch's profiler around selected steps of rank 0.

It writes a trace for chrome://tracing or ui.perfetto.dev and a table of the longest operations to `profile/` in the run
folder. The profiler changes nothing that is learned, but the `perf/` metrics of the profiled steps are slower.
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
        info: logs a message to the terminal.
    """

    def __init__(self, config: RunConfig, world: World, info: Callable[[str], None]) -> None:
        self._steps = config.profile.steps if world.is_main else ()
        self._folder, self._device, self._info = config.run_dir / "profile", world.device, info
        self._profile: Any = None
        self._span: Any = None
        self._first_step = 0

    def begin_step(self, step: int) -> None:
        """Starts the profiler at the first selected step, or where a run resumes between the first and the last."""
        if self._steps and self._profile is None and self._steps[0] <= step <= self._steps[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile, self._first_step = torch.profiler.profile(activities=activities), step
            self._profile.start()
        if self._profile is not None:
            self._span = torch.profiler.record_function(f"step {step}")
            self._span.__enter__()

    def end_step(self, step: int, *, is_last: bool) -> None:
        """Stops the profiler after the last selected step or the last of the run, and writes the files."""
        if self._profile is None:
            return
        self._span.__exit__(None, None, None)
        if step < self._steps[1] and not is_last:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profile, self._profile = self._profile, None
        profile.stop()
        trace = self._write(profile, f"steps_{self._first_step:06d}_{step:06d}")
        self._info(f"profiled steps {self._first_step} to {step}: wrote {trace} (for ui.perfetto.dev) and a .txt table")

    def _write(self, profile: Any, name: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"{name}.json.gz"
        profile.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=_NUM_ROWS, max_name_column_width=80)
        (self._folder / f"{name}.txt").write_text(table + "\n")
        return trace

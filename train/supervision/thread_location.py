"""Determines where a thread of this process is, and whether it waits for other ranks or for its device.

The whole stack is read: a collective's innermost frame may belong to any library, and on a GPU a rank that needs the
result of a collective waits in an ordinary copy.
"""

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from train.distributed import device_copies

_COLLECTIVES = ("torch.distributed", "deepspeed.comm", "deepspeed.runtime.zero")
"""Modules whose frames mean a collective, wherever they are in the stack: none of them calls the model's forward."""


class ThreadLocation(NamedTuple):
    """The location of a thread.

    Attributes:
        waits: whether it is inside a collective or waits for its device.
        waits_for_device: whether it waits for its device.
        at: its innermost line.
    """

    waits: bool = False
    waits_for_device: bool = False
    at: str = ""


def locate_thread(thread: int) -> ThreadLocation:
    """Returns the location of a thread of this process, given by its identifier."""
    frames = sys._current_frames()
    innermost = frames.get(thread)
    if innermost is None:
        return ThreadLocation()
    if _module(innermost) == "torch.autograd.graph":
        innermost = _find_autograd_frame(frames) or innermost
    code = innermost.f_code
    at = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{innermost.f_lineno} in {code.co_name}"
    frame: FrameType | None = innermost
    while frame is not None:
        if _is_device_wait(frame):
            return ThreadLocation(True, True, at)
        if _is_collective(frame, is_innermost=frame is innermost):
            return ThreadLocation(True, False, at)
        frame = frame.f_back
    return ThreadLocation(False, False, at)


def _find_autograd_frame(frames: dict[int, FrameType]) -> FrameType | None:
    """Returns the innermost frame of a thread of autograd, which runs the hooks of a backward pass on a GPU.

    Autograd's threads are not Python's: `threading` has no name for them, or a placeholder.
    """
    named = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy-")}
    return next((frame for thread, frame in frames.items() if thread not in named), None)


def _is_device_wait(frame: FrameType) -> bool:
    module = _module(frame)
    if module.startswith("torch.cuda"):  # of a device, a stream or an event
        return frame.f_code.co_name == "synchronize"
    return module == device_copies.__name__


def _is_collective(frame: FrameType, *, is_innermost: bool) -> bool:
    module = _module(frame)
    if module == "deepspeed.runtime.engine" and frame.f_code.co_name == "step":
        return True
    return module.startswith(_COLLECTIVES) or (is_innermost and module.startswith("deepspeed"))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))

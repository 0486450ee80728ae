"""Tests of where a thread is: whether it waits for other ranks or for its device, whichever library it is in."""

import _thread
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from train.distributed.device_copies import to_host
from train.supervision.thread_location import ThreadLocation, locate_thread


def in_module(module: str, name: str, inner: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a function of a module and name of a library, which calls `inner`."""
    values: dict[str, Any] = {"__name__": module, "inner": inner}
    exec(f"def {name}():\n    inner()\n", values)
    function: Callable[[], Any] = values[name]
    return function


class Tensor:
    """A tensor whose copy to the host calls a function."""

    def __init__(self, inner: Callable[[], Any]) -> None:
        self.cpu = inner


def locate_inside(call: Callable[[Callable[[], Any]], Any]) -> ThreadLocation:
    """Returns the location of a thread that runs `call` on a function that blocks."""
    entered, released = threading.Event(), threading.Event()
    identifiers: list[int] = []

    def block() -> None:
        entered.set()
        released.wait(10)

    def run() -> None:
        identifiers.append(threading.get_ident())
        call(block)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(10)
    try:
        return locate_thread(identifiers[0])
    finally:
        released.set()
        thread.join()


ENGINE = "deepspeed.runtime.engine"


@pytest.mark.parametrize(
    ("call", "waits", "waits_for_device"),
    {
        "own_code": (lambda block: block(), False, False),
        "collective": (
            lambda block: in_module("torch.distributed.distributed_c10d", "all_reduce", block)(),
            True,
            False,
        ),
        "below_a_collective": (lambda block: in_module("deepspeed.comm.comm", "wait", lambda: block())(), True, False),
        "in_the_engines_step": (lambda block: in_module(ENGINE, "step", block)(), True, False),
        "in_the_engines_forward": (lambda block: in_module(ENGINE, "forward", block)(), False, False),
        "copy_to_the_host": (lambda block: to_host(Tensor(block)), True, True),  # type: ignore[arg-type]
        "synchronize": (lambda block: in_module("torch.cuda.streams", "synchronize", block)(), True, True),
        "copy_in_the_engines_step": (
            lambda block: in_module(ENGINE, "step", lambda: to_host(Tensor(block)))(),  # type: ignore[arg-type]
            True,
            True,
        ),
    }.values(),
)
def test_waits_are_found_in_the_whole_stack(
    call: Callable[[Callable[[], Any]], Any], waits: bool, waits_for_device: bool
) -> None:
    """A collective or a copy to the host anywhere in the stack is a wait; the engine's forward pass is none."""
    location = locate_inside(call)
    assert (location.waits, location.waits_for_device) == (waits, waits_for_device)
    assert "threading.py" in location.at


def test_hooks_of_a_backward_pass_are_found() -> None:
    """On a GPU the hooks of a backward pass run in a thread of autograd, while the rank's thread is in torch."""
    released, entered = _thread.allocate_lock(), threading.Event()
    released.acquire()

    def hook() -> None:
        entered.set()
        released.acquire()

    _thread.start_new_thread(in_module("deepspeed.runtime.zero.stage3", "reduce", hook), ())
    try:
        assert entered.wait(10)
        location = locate_inside(lambda block: in_module("torch.autograd.graph", "_engine_run_backward", block)())
        assert not location.waits  # the innermost frame is not autograd's
        values: dict[str, Any] = {"__name__": "torch.autograd.graph", "released": threading.Event()}
        exec("def _engine_run_backward():\n    while not released.is_set():\n        pass\n", values)
        main = threading.Thread(target=values["_engine_run_backward"])
        main.start()
        deadline = time.monotonic() + 10
        while not (location := locate_thread(main.ident or 0)).waits and time.monotonic() < deadline:
            time.sleep(0.01)
        values["released"].set()
        main.join()
    finally:
        released.release()
    assert location.waits
    assert location.at.endswith("in hook")


def test_a_thread_that_has_ended_has_no_location() -> None:
    """A thread that no longer runs does not wait."""
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert locate_thread(thread.ident or 0) == ThreadLocation()

"""
Interrupts, as Ctrl-C brings them, at a chosen place.

Python delivers a signal when a function of Python begins and when a call of C returns (and
in loops, where the same calls are made). A profile function is called at just these places, and what it raises is
raised there. So the n-th of them can be chosen, and all of them one after the other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import grpc

# Where interrupts are tried: the project's own code, or gRPC's where it is Python, and what these call of the standard
# library. In C, that of gRPC included, no interrupt comes; but in what it calls of Python.
_ROOT: Final = str(Path(__file__).resolve().parents[1])
_OWN: Final = tuple(f"{_ROOT}/{root}/" for root in ("changelog", "client", "server"))
_GRPC: Final = (f"{Path(grpc.__file__).parent}/",)
_LIBRARY: Final = tuple(sys.modules[name].__file__ or "" for name in ("contextlib", "threading"))


class Interrupted(KeyboardInterrupt):
    """The interrupt that a test asked for."""


def run_interrupted(work: Callable[[], object], at: int, *, in_grpc: bool = False) -> BaseException | None:
    """
    Run something, interrupt it at its place number *at*, and return what came out of it.

    None: it ended before, without an interrupt. An exception is returned with its traceback, and with all
    that this holds on to, as it would be while a program handles it. Places are those of the project's own code;
    with *in_grpc* those of what it calls of gRPC.
    """
    counted = 0
    files = _GRPC if in_grpc else _OWN
    result: BaseException | None = None

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        if _may_interrupt(frame, event) and _is_in(files, frame):
            counted += 1
            if counted == at:
                sys.setprofile(None)
                raise Interrupted(f"at place {at}: {frame.f_code.co_qualname} line {frame.f_lineno} ({event})")

    sys.setprofile(profile)
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
        result = error
    finally:
        sys.setprofile(None)
    if result is None and counted >= at:
        raise AssertionError(f"the interrupt at place {at} was swallowed")
    return result


def _may_interrupt(frame: FrameType, event: str) -> bool:
    # The call of a class is one of C, and its end that of its `__init__`. What ends an object is not interrupted, nor
    # is a generator where it is resumed, which may be its end: Python prints what that raises, and goes on.
    if _ends_object(frame):
        return False
    if event == "return":
        return frame.f_code.co_name == "__init__"
    is_resumed = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
    return event in {"call", "c_return"} and not is_resumed


def _ends_object(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _is_in(files: tuple[str, ...], frame: FrameType | None) -> bool:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(files):
            return True
        if file not in _LIBRARY:
            return False
        frame = frame.f_back
    return False

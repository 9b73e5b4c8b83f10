"""
Interrupts, as Ctrl-C brings them, at a chosen place.

Python delivers a signal when a function of Python begins and when a call of C returns (and
in loops, where the same calls are made). A profile function is called at just these places, and what it raises is
raised there. So the n-th of them can be chosen, and all of them one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

# Where interrupts are tried: the project's own code, and what it calls of the standard library.
_ROOT: Final = str(Path(__file__).resolve().parents[1])
_OWN: Final = tuple(f"{_ROOT}/{root}/" for root in ("changelog", "client", "server"))
_LIBRARY: Final = tuple(sys.modules[name].__file__ or "" for name in ("contextlib", "threading"))


class Interrupted(KeyboardInterrupt):
    """The interrupt that a test asked for."""


def run_interrupted(work: Callable[[], object], at: int) -> BaseException | None:
    """
    Run something, interrupt it at its place number *at*, and return what came out of it.

    None: it ended before, without an interrupt. An exception is returned with its traceback, and with all
    that this holds on to, as it would be while a program handles it.
    """
    counted = 0
    result: BaseException | None = None

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        if _may_interrupt(frame, event) and _is_own(frame):
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
    return result


def _may_interrupt(frame: FrameType, event: str) -> bool:
    # The call of a class is one of C, and its end that of its `__init__`. What ends an object is not interrupted:
    # Python prints what it raises, and goes on.
    name = frame.f_code.co_name
    return (event in {"call", "c_return"} and not _ends_object(frame)) or (event == "return" and name == "__init__")


def _ends_object(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _is_own(frame: FrameType | None) -> bool:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN):
            return True
        if file not in _LIBRARY:
            return False
        frame = frame.f_back
    return False

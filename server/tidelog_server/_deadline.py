"""
Deadlines for the application's code, which runs on the one thread that writes.

A function that goes on for too long is ended where it is, by an exception that another
thread sends it; see `PyThreadState_SetAsyncExc` in the C API of Python. It arrives
between two instructions of Python, so code that waits outside of Python is ended when
it comes back. While the function is in the engine, through its context, nothing is
sent: what the engine does is done as a whole. What a store takes that is far away is not
the function's time.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

LOOK_SECONDS: Final = 0.05
AGAIN_SECONDS: Final = 0.2
DELIVERY_SECONDS_MAX: Final = 5.0


class DeadlineExceeded(BaseException):
    """The application's code took too long. Not an `Exception`: what it catches by mistake must not be this."""

    def __init__(self) -> None:
        super().__init__()
        watch = _watches.get(threading.get_ident())
        if watch is not None:
            watch.has_arrived = True


def run(function: Callable[..., Any], *arguments: object, seconds: float) -> Any:
    """
    Call a function of the application.

    What it calls in turn, by way of the engine, has the same deadline as itself.

    Args:
        function: The function.
        arguments: What it gets.
        seconds: How long it may take.

    Raises:
        DeadlineExceeded: It took longer.
    """
    outer = _watches.get(threading.get_ident())
    if outer is not None:
        with outer.watching():
            return function(*arguments)
    watch = _Watch(seconds)
    _watches[watch.thread_id] = watch
    _wake_watcher()
    try:
        with watch.watching():
            result = function(*arguments)
        if watch.is_sent:
            raise DeadlineExceeded  # which it has caught
        return result
    finally:
        del _watches[watch.thread_id]


def is_within() -> bool:
    """Tell whether this thread runs the application's code, or what that calls."""
    return threading.get_ident() in _watches


@contextmanager
def paused() -> Iterator[None]:
    """Do what must be done as a whole: the deadline counts, but strikes only afterwards."""
    watch = _watches.get(threading.get_ident())
    if watch is None:
        yield
        return
    watch.leave()
    try:
        yield
    finally:
        watch.come_back()


@contextmanager
def waiting() -> Iterator[None]:
    """Wait for somebody else, such as a database, and take what they say as a whole: that time does not count."""
    watch = _watches.get(threading.get_ident())
    if watch is None:
        yield
        return
    # Or it is in the engine already.
    was_inside = watch.is_inside
    began = time.monotonic()
    if was_inside:
        watch.leave()
    try:
        yield
    finally:
        watch.end += time.monotonic() - began
        if was_inside:
            watch.come_back()


class _Watch:
    """
    One thread that runs the application's code.

    Attributes:
        thread_id: The thread.
        end: When its time is over.
        is_inside: Whether it is in the application's code, where it can be ended.
        is_sent: Whether the exception was sent.
        has_arrived: Whether it was raised there.
    """

    def __init__(self, seconds: float) -> None:
        self.thread_id = threading.get_ident()
        self.end = time.monotonic() + seconds
        self.has_arrived = False
        self._lock = threading.Lock()
        self.is_inside = False
        self.is_sent = False
        self._sent_again = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """The application's code begins, unless its time is over."""
        if self.is_sent or time.monotonic() >= self.end:
            self.is_sent = True
            raise DeadlineExceeded
        self.is_inside = True

    def come_back(self) -> None:
        """The application's code goes on. If its time is over it is told so, and again while it catches that."""
        self._sent_again = time.monotonic() + AGAIN_SECONDS
        try:
            self.enter()
        finally:
            self.is_inside = True

    def leave(self) -> None:
        """The application's code ends, or is interrupted by the engine. Nothing arrives afterwards."""
        try:
            with self._lock:
                self.is_inside = False
            limit = time.monotonic() + DELIVERY_SECONDS_MAX
            while self.is_sent and not self.has_arrived and time.monotonic() < limit:
                time.sleep(LOOK_SECONDS)  # it is on its way, and arrives here
        except DeadlineExceeded:
            self.is_inside = False

    def look(self) -> None:
        """Send the exception if it is due, and again while it is caught. Called by the watcher's thread."""
        now = time.monotonic()
        if now < self.end or (self.is_sent and not (self.has_arrived and now >= self._sent_again)):
            return
        with self._lock:
            if self.is_inside:
                self.is_sent = True
                self._sent_again = now + AGAIN_SECONDS
                self.has_arrived = False
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread_id), ctypes.py_object(DeadlineExceeded)
                )


def _wake_watcher() -> None:
    if not _awake.is_set():
        with _start:
            if not _threads or not _threads[-1].is_alive():
                _threads[:] = [threading.Thread(target=_look, name="tidelog-deadlines", daemon=True)]
                _threads[0].start()
        _awake.set()


def _look() -> None:
    while True:
        _awake.wait()
        time.sleep(LOOK_SECONDS)
        if not _watches:
            _awake.clear()
            if not _watches:
                continue
            _awake.set()
        for watch in list(_watches.values()):
            watch.look()


_watches: Final[dict[int, _Watch]] = {}
_threads: Final[list[threading.Thread]] = []
_start: Final = threading.Lock()
_awake: Final = threading.Event()

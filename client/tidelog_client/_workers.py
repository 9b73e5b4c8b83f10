"""
Workers: threads that do what blocks, so that who waits for them can stop waiting.

An interrupt (Ctrl-C) comes to the main thread, which decides and writes what is decided,
and does nothing here but look into a queue. Nothing waits for these threads at an exit.
"""

from __future__ import annotations

import _thread
import queue
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol


class Event(NamedTuple):
    """
    What a piece of work has to say.

    Attributes:
        work: The piece of work.
        value: What it returned, or said meanwhile.
        error: What it raised.
        is_over: Whether that is its end.
    """

    work: Work
    value: Any = None
    error: BaseException | None = None
    is_over: bool = True


class Work(Protocol):
    """A piece of work. What it tells meanwhile, it tells by *tell*."""

    def __call__(self, tell: Callable[[Any], None], /) -> Any:
        """Do it."""
        ...


class WorkRunner(Protocol):
    """What does work: threads, or somebody who takes turns."""

    def submit(self, work: Work) -> None:
        """Have something done."""
        ...

    def next_event(self, timeout: float) -> Event | None:
        """Wait so many seconds for what one of them has to say; None: nothing."""
        ...

    def stop(self) -> None:
        """Take no more work. Does not wait for what is under way."""
        ...

    def join(self, timeout: float) -> None:
        """Wait until what is under way has ended, but not longer than so many seconds."""
        ...


_ENDED: Final = object()


class Workers:
    """Threads. As many as there is work, up to a number."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._tasks: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event | object] = queue.SimpleQueue()
        self._started = 0

    def submit(self, work: Work) -> None:
        """See `WorkRunner`."""
        self._tasks.put(work)
        if self._started < self._count_max:
            self._started += 1
            # Not `threading.Thread`: an interrupt while it starts may leave it standing, and an exit waits for it.
            _thread.start_new_thread(_run, (self._tasks, self._events))

    def next_event(self, timeout: float) -> Event | None:
        """See `WorkRunner`."""
        try:
            event = self._events.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        return event if isinstance(event, Event) else None

    def stop(self) -> None:
        """See `WorkRunner`."""
        for _ in range(self._count_max):
            self._tasks.put(None)

    def join(self, timeout: float) -> None:
        """See `WorkRunner`."""
        end = time.monotonic() + timeout
        running = self._started
        while running and (left := end - time.monotonic()) > 0:
            try:
                running -= self._events.get(timeout=left) is _ENDED
            except queue.Empty:
                return


def _run(tasks: queue.SimpleQueue[Work | None], events: queue.SimpleQueue[Event | object]) -> None:
    while (work := tasks.get()) is not None:
        events.put(done(work, partial(_tell, events, work)))
    events.put(_ENDED)


def _tell(events: queue.SimpleQueue[Event | object], work: Work, value: Any) -> None:
    events.put(Event(work, value, is_over=False))


def done(work: Work, tell: Callable[[Any], None]) -> Event:
    """Do a piece of work and return how it ended."""
    try:
        return Event(work, work(tell))
    except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
        return Event(work, error=error)

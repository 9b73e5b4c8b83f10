"""
Threads that take turns, so that code which blocks can be driven step by step.

The synchronizer waits for a network and for back-offs as any program does. In a fiber
its waits become points where the world goes on, and decides who goes on next: one
thread runs at any time, so that a seed decides everything.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Fiber:
    """
    Runs *work* in a thread of its own, and only while `resume` waits for it.

    Attributes:
        is_running: Whether it is its turn.
        is_done: Whether it has ended.
        error: What it ended with. None: it returned.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.is_running = False
        self.is_done = False
        self.error: BaseException | None = None
        self._work = work
        self._thrown: BaseException | None = None
        self._may_run, self._has_stopped = threading.Lock(), threading.Lock()
        self._may_run.acquire()
        self._has_stopped.acquire()
        runner = _idle.pop() if _idle else _Runner()
        runner.work.put(lambda: self._run(runner))

    def resume(self, thrown: BaseException | None = None) -> None:
        """Let it run until it pauses or ends; *thrown* is raised where it paused."""
        self._thrown = thrown
        self.is_running = True
        self._may_run.release()
        self._has_stopped.acquire()
        self.is_running = False

    def pause(self) -> None:
        """Let the world go on until the next `resume`. Inside the fiber only."""
        self._has_stopped.release()
        self._wait()

    def _wait(self) -> None:
        self._may_run.acquire()
        thrown, self._thrown = self._thrown, None
        if thrown is not None:
            raise thrown

    def _run(self, runner: _Runner) -> None:
        try:
            self._wait()
            self._work()
        except BaseException as error:  # noqa: BLE001 - the world looks at it
            self.error = error
        self.is_done = True
        _idle.append(runner)  # before the world goes on, which may need one at once
        self._has_stopped.release()


class _Runner(threading.Thread):
    """A thread that runs one fiber after the other: to start a thread takes longer than most synchronizations."""

    def __init__(self) -> None:
        super().__init__(name="simulated", daemon=True)
        self.work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self.work.get()()


_idle: list[_Runner] = []

"""Children: roles in processes of their own that start in no time and die at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

# A process that has imported everything and opened nothing forks them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.kill.roles"])

END_SECONDS_MAX = 120.0


class Child:
    """A function in a process of its own."""

    def __init__(self, role: Callable[..., None], *arguments: Any) -> None:
        self._process = _CONTEXT.Process(target=role, args=arguments, daemon=True)
        self._process.start()

    def signal_kill(self) -> None:
        """Send SIGKILL, and wait for nothing."""
        self._process.kill()

    def kill(self) -> bool:
        """
        Kill it and wait until it is gone. Return whether it was still there.

        Raises:
            AssertionError: It had ended by itself, with an error.
        """
        self._process.kill()
        self._process.join()
        return self._was_killed()

    def wait(self) -> None:
        """Wait until it has ended by itself. Raises AssertionError if it does not, or with an error."""
        self._process.join(END_SECONDS_MAX)
        if self._process.is_alive():
            self.kill()
            raise AssertionError("a process did not come to its end")
        if self._was_killed():
            raise AssertionError("somebody else killed a process")

    def _was_killed(self) -> bool:
        code = self._process.exitcode
        if code is None or code > 0:
            raise AssertionError(f"a process ended with the exit code {code}")
        return code < 0


def kill_at_once(*children: Child) -> None:
    """Kill several: no one lives to see the end of another."""
    for child in children:
        child.signal_kill()
    for child in children:
        child.kill()

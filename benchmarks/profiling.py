"""
Profiler: cProfile in every thread of a process.

cProfile sees only the thread that enabled it. Each thread that starts later enables
one of its own as the first thing it does, by way of `threading.setprofile`. From
Python 3.12 on only one cProfile may run in a process: profiling needs Python 3.11.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import threading
import time
from typing import Any, Final, Literal

TABLE_FUNCTIONS: Final = 40

Clock = Literal["cpu", "wall"]


class Profiler:
    """
    Profiles the calling thread and all threads that are started after it.

    Args:
        clock: "cpu" counts the processor time of each thread, so that waiting costs
            nothing; "wall" counts all of it, so that waits can be seen.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._profiles: list[tuple[str, cProfile.Profile]] = []
        threading.setprofile(self._begin)
        self._begin()

    def restart(self) -> None:
        """Forget what the calling thread did so far."""
        self._profiles[0][1].clear()

    def table(self, count: int = TABLE_FUNCTIONS) -> str:
        """End, and return each thread's total and the functions that took most, of all threads together."""
        threading.setprofile(None)
        self._profiles[0][1].disable()
        totals = []
        everything: pstats.Stats | None = None
        text = io.StringIO()
        for name, profile in self._profiles:
            profile.snapshot_stats()  # not create_stats: what another thread is in the middle of is left out
            if not profile.stats:
                continue
            stats = pstats.Stats(profile, stream=text)
            totals.append((sum(entry.inlinetime for entry in profile.getstats()), name))
            if everything is None:
                everything = stats
            else:
                everything.add(profile)
        lines = [f"{seconds:8.3f} s  {name}" for seconds, name in sorted(totals, reverse=True)]
        if everything is not None:
            everything.strip_dirs()
            everything.sort_stats("tottime").print_stats(count)
            everything.sort_stats("cumulative").print_stats(count)
        return f"{self._clock} seconds of each thread\n" + "\n".join(lines) + "\n" + text.getvalue()

    def _begin(self, *_event: Any) -> None:
        timer = time.thread_time if self._clock == "cpu" else time.perf_counter
        profile = cProfile.Profile(timer)
        self._profiles.append((threading.current_thread().name, profile))
        profile.enable()

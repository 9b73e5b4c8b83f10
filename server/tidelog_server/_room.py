"""
Room: how much waits in memory, of all sessions together.

What a session sends waits for the writer thread, and what it is sent waits for a client
that may read slowly. Each session alone is bounded; a thousand of them need a bound on
the sum.

* Batches wait at the door of the writer's queue, in the order in which they came, while
  as many or as large ones are in it as may be. A session whose batch waits reads no
  further, so that its client waits too.
* Pages become smaller the more the sessions hold that nobody takes. So the sum comes near
  to its bound and not much above it, and a session always gets on, page by page, however
  many others have come to a halt. A page has one object at least: where objects are larger
  than the least page, each session holds one of them beyond the bound.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Final, Self

from tidelog._limits import PAGE_BYTES_MAX

# Two groups of the embedded store's writer: one that it commits, and one that is ready.
QUEUED_BATCHES_MAX: Final = 128
QUEUED_BYTES_MAX: Final = 64 * 1024 * 1024

PAGES_BYTES_MAX: Final = 32 * 1024 * 1024
PAGE_BYTES_LEAST: Final = 16 * 1024
# A page takes at most this part of the room that is left.
PAGE_SHARE: Final = 16


class QueueRoom:
    """
    Room in the writer's queue. Used on one event loop.

    Attributes:
        batches: How many are in the queue.
        bytes: How large they are.
        waiting: How many wait for room.
    """

    def __init__(self, batches_max: int = QUEUED_BATCHES_MAX, bytes_max: int = QUEUED_BYTES_MAX) -> None:
        self.batches = 0
        self.bytes = 0
        self._batches_max = batches_max
        self._bytes_max = bytes_max
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def take(self, size: int) -> None:
        """Wait until a batch of so many bytes has room. To be given back."""
        if not self._line and self._has_room(size):
            self._add(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._line.append((turn, size))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)  # the turn had come in the same instant
            else:
                with suppress(ValueError):  # it was passed over already
                    self._line.remove((turn, size))
                self._call_in()
            raise

    def give_back(self, size: int) -> None:
        """A batch has left the queue."""
        self.batches -= 1
        self.bytes -= size
        self._call_in()

    def _call_in(self) -> None:
        while self._line:
            turn, size = self._line[0]
            # Whoever waited for a turn that is over has been cancelled, and has not woken up yet.
            if not turn.done():
                if not self._has_room(size):
                    return
                self._add(size)
                turn.set_result(None)
            self._line.popleft()

    def _has_room(self, size: int) -> bool:
        # One that is too large for any room gets it alone.
        return self.batches < self._batches_max and (not self.batches or self.bytes + size <= self._bytes_max)

    def _add(self, size: int) -> None:
        self.batches += 1
        self.bytes += size


class PageRoom:
    """
    Room for pages on their way out. Used by any thread.

    Attributes:
        bytes: How large those are that were read and that nobody has taken yet.
    """

    def __init__(self, bytes_max: int = PAGES_BYTES_MAX) -> None:
        self.bytes = 0
        self._bytes_max = bytes_max
        self._lock = threading.Lock()

    @property
    def may_read_ahead(self) -> bool:
        """Tell whether a session may read another page before the last one is taken."""
        return self.bytes <= self._bytes_max // 2

    def page_bytes(self) -> int:
        """Return how much the next page may hold."""
        return min(max((self._bytes_max - self.bytes) // PAGE_SHARE, PAGE_BYTES_LEAST), PAGE_BYTES_MAX)

    def add(self, size: int) -> None:
        """Count bytes, or give them back if there are less than none."""
        with self._lock:
            self.bytes += size


class HeldPages:
    """The pages of one session. Use it as a context manager: at the end it holds none."""

    def __init__(self, room: PageRoom) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._bytes = 0
        self._is_over = False

    def add(self, size: int) -> None:
        """A page was read."""
        with self._lock:
            if not self._is_over:  # else it was read for nobody
                self._bytes += size
                self._room.add(size)

    def drop(self, size: int) -> None:
        """A page was taken."""
        self.add(-size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            self._room.add(-self._bytes)

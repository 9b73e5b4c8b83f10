"""
Room: how much waits in memory, of all sessions together.

What a session sends waits for the writer thread, and what it is sent waits for a client
that may read slowly. Each session alone is bounded; a thousand of them need a bound on
the sum.

* Batches wait at the door of the writer's queue, in the order in which they came, while
  as many or as large ones are in it as may be. A session whose batch waits reads no
  further, so that its client waits too.
* Pages become smaller the more the sessions hold that nobody takes, down to a least page,
  which each session may have: so those whose objects are small get on, page by page, however
  many others have come to a halt. Objects are not divided. A session whose next object is
  larger than its page may be waits in line, before it reads the object, until those who are
  before it have taken theirs, or were ended because they did not.

There are three such lines, each with room of its own. A session begins in that of the
newcomers, and goes over to that of the readers once it has taken enough to show that its
client reads: those who read on do not wait for those who have come to a halt. Nor do
newcomers again and again: whose last session was ended because it did not read stands in
the third line, till one of its sessions comes to its end.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import suppress
from typing import Final, NamedTuple, Self

from tidelog._channel import WINDOW_BYTES
from tidelog._limits import PAGE_BYTES_MAX

# Two groups of the embedded store's writer: one that it commits, and one that is ready.
QUEUED_BATCHES_MAX: Final = 128
QUEUED_BYTES_MAX: Final = 64 * 1024 * 1024

# For the pages of newcomers, of sessions that read on, and of those who did not read before; and for each
# session a least page besides.
PAGES_BYTES_MAX: Final = 32 * 1024 * 1024
PAGE_BYTES_LEAST: Final = 16 * 1024
# gRPC keeps one of its own of what is being sent.
PAGE_COPIES: Final = 2
# A page takes at most this part of the room that is left.
PAGE_SHARE: Final = 16


class Room:
    """
    Room for so many things, and so many bytes of them, and a line of those who wait for it. Used on one event loop.

    Attributes:
        count: How many are in it.
        bytes: How large they are.
        waiting: How many wait for room.
    """

    def __init__(self, count_max: float, bytes_max: int) -> None:
        self.count = 0
        self.bytes = 0
        self.bytes_max = bytes_max
        self._count_max = count_max
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def take(self, size: int) -> None:
        """Wait until something of so many bytes has room. To be given back."""
        if not self._line and self._has_room(size):
            self.add(size)
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

    def add(self, size: int) -> None:
        """Take room without a wait, whether there is any or not. To be given back."""
        self.count += 1
        self.bytes += size

    def give_back(self, size: int) -> None:
        """Something has left."""
        self.count -= 1
        self.bytes -= size
        self._call_in()

    def _call_in(self) -> None:
        while self._line:
            turn, size = self._line[0]
            # Whoever waited for a turn that is over has been cancelled, and has not woken up yet.
            if not turn.done():
                if not self._has_room(size):
                    return
                self.add(size)
                turn.set_result(None)
            self._line.popleft()

    def _has_room(self, size: int) -> bool:
        # One that is too large for any room gets it alone.
        return self.count < self._count_max and (not self.bytes or self.bytes + size <= self.bytes_max)


class QueueRoom(Room):
    """Room in the writer's queue."""

    def __init__(self, batches_max: int = QUEUED_BATCHES_MAX, bytes_max: int = QUEUED_BYTES_MAX) -> None:
        super().__init__(batches_max, bytes_max)


class PageRoom:
    """
    Room for pages on their way out, beyond the least page that each session may have. Used on one event loop.

    Attributes:
        bytes: How large those are that were read and that nobody has taken yet.
    """

    def __init__(self, bytes_max: int = PAGES_BYTES_MAX) -> None:
        self.bytes = 0
        self.of_newcomers = Room(math.inf, bytes_max)
        self.of_readers = Room(math.inf, bytes_max)
        self.of_slow = Room(math.inf, bytes_max)

    @property
    def waiting(self) -> int:
        """How many sessions wait for room."""
        return self.of_newcomers.waiting + self.of_readers.waiting + self.of_slow.waiting


class HeldPages:
    """
    The pages of one session. Use it as a context manager: at the end it holds none.

    Args:
        room: Where they are held.
        page_bytes_max: How much one may hold, if it is not a single object: the least for who did not read before.

    Attributes:
        needed: What the next object takes, if it has to wait for room. 0: it has not.
    """

    def __init__(self, room: PageRoom, page_bytes_max: int = PAGE_BYTES_MAX) -> None:
        self.needed = 0
        self._page_bytes_max = page_bytes_max
        self._all = room
        self._room = room.of_newcomers if page_bytes_max > PAGE_BYTES_LEAST else room.of_slow
        self._held: deque[_Held] = deque()
        # Room that was waited for, and that the next page will have.
        self._granted: _Held | None = None
        self._taken_bytes = 0
        self._is_over = False

    @property
    def may_read_ahead(self) -> bool:
        """Tell whether the session may read another page before the last one is taken."""
        return not self._room.waiting and self._room.bytes <= self._room.bytes_max // 2

    def page_bytes(self, needed: int) -> int:
        """Return how much the next page may hold. Used by any thread; notes what the first object of it needs."""
        room = self._room
        share = 0 if room.waiting else (room.bytes_max - room.bytes) // PAGE_COPIES // PAGE_SHARE
        share = min(max(share, PAGE_BYTES_LEAST), PAGE_BYTES_MAX)
        granted = self._granted.page_bytes if self._granted is not None else 0
        has_room = needed <= max(share, granted)
        self.needed = 0 if has_room else needed
        return max(min(share, self._page_bytes_max), granted, needed if has_room else 0)

    async def wait(self) -> None:
        """Wait until there is room for what is needed."""
        self._withdraw()  # or it might wait for itself
        held = _Held(self._room, self.needed)
        await held.room.take(held.room_bytes)
        self._granted = held

    def add(self, size: int) -> None:
        """A page was read."""
        if not self._is_over:  # else it was read for nobody
            held = _Held(self._room, size)
            held.room.add(held.room_bytes)
            self._all.bytes += size
            self._held.append(held)
        self._withdraw()

    def drop(self) -> None:
        """The oldest page was taken."""
        held = self._held.popleft()
        self._all.bytes -= held.page_bytes
        held.room.give_back(held.room_bytes)
        self._taken_bytes += held.page_bytes
        # Less may stand unread in the client's connection. Who did not read before may have taken all of that to halt
        # once more.
        if self._taken_bytes > WINDOW_BYTES and self._room is not self._all.of_slow:
            self._room = self._all.of_readers

    def _withdraw(self) -> None:
        if self._granted is not None:
            self._granted.room.give_back(self._granted.room_bytes)
            self._granted = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._withdraw()
        while self._held:
            self.drop()


class _Held(NamedTuple):
    """
    A page that a session holds, or may read.

    Attributes:
        room: The room that it is in.
        page_bytes: How large it is.
    """

    room: Room
    page_bytes: int

    @property
    def room_bytes(self) -> int:
        """What it takes of the room, beyond the least page."""
        return PAGE_COPIES * max(0, self.page_bytes - PAGE_BYTES_LEAST)

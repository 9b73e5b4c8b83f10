"""
Testing: what programs need to try how they behave when the network does not, and when time goes by.

A `Proxy` stands between a replica and a server, whatever processes they are in, and
does to connections what networks do to them. It has faults for either way separately:
*up* is from the client to the server, *down* is back.

    with Proxy(server.address) as proxy, Replica(path, server=proxy.address) as replica:
        proxy.down.cut_after(1_000)

A `ManualClock` is the clock of a server or a replica that nobody wants to wait for.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from tidelog._errors import InvalidValue

__all__ = ["ManualClock", "Proxy", "Way"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
CHUNK_BYTES: Final = 64 * 1024
POLL_SECONDS: Final = 0.05
# Closing with nothing lingering makes a connection end with RST.
_ABORTIVE: Final = struct.pack("ii", 1, 0)

T = TypeVar("T")


class ManualClock:
    """
    A clock that stands still until somebody moves it, to be given to a `Server` or a `Replica` as its `clock`.

    What is kept for so long goes by it: history, tombstones, replicas that are away, payloads of failures,
    contents of files, the log. Timeouts, and the ends of tokens and certificates, do not.

    Args:
        now: What it shows at first. None: what time it is.

    Raises:
        InvalidValue: *now* does not say in which time zone.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self._lock = threading.Lock()
        self._now = datetime.now(UTC) if now is None else _aware(now)

    @property
    def now(self) -> datetime:
        """What it shows."""
        return self._now

    def advance(self, by: timedelta) -> None:
        """Move it on, or, by a negative time, back."""
        with self._lock:
            self._now += by

    def __call__(self) -> int:
        """Return the microseconds since 1970."""
        return (self._now - EPOCH) // timedelta(microseconds=1)


class Way:
    """
    What happens to bytes on their way in one direction, over all connections.

    Attributes:
        byte_count: How many were handed on since the start.
        cut_count: How many connections were cut by `cut_after`.
        is_holding: Whether something has come that is not handed on.
        bytes_per_second: How many may pass in a second. None: as many as come.
        delay_seconds: How long each chunk takes.
        chunk_bytes: How many are handed on at a time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.byte_count = 0
        self.bytes_per_second: int | None = None
        self.delay_seconds = 0.0
        self.chunk_bytes = CHUNK_BYTES
        self._loop = loop
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._end: int | None = None
        self._cut_resets = False
        self.cut_count = 0
        self.is_holding = False

    def cut_after(self, count: int, *, resets: bool = False) -> None:
        """
        Cut the connection that carries the byte before which *count* more have passed; those after it live.

        Args:
            count: How many bytes are still handed on.
            resets: Whether both ends see a reset (RST) instead of an orderly end (FIN).
        """

        def arm() -> None:
            self._end, self._cut_resets = self.byte_count + count, resets

        _done_in(self._loop, arm)

    def mend(self) -> None:
        """Forget a cut that did not come."""

        def disarm() -> None:
            self._end = None

        _done_in(self._loop, disarm)

    def stall(self) -> None:
        """Hand on nothing more, the end of a connection included, until `heal`."""
        _done_in(self._loop, self._is_open.clear)

    def heal(self) -> None:
        """Hand on what came meanwhile, and what follows."""
        _done_in(self._loop, self._is_open.set)

    async def carry(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on what a connection brings until one of its ends closes."""
        while not connection.is_cut:
            if self._end is not None and self.byte_count >= self._end:
                self._end = None
                self.cut_count += 1
                connection.cut(resets=self._cut_resets)
                return
            limit = self.chunk_bytes
            if self._end is not None:
                limit = min(limit, self._end - self.byte_count)
            if self.bytes_per_second is not None:
                limit = min(limit, max(1, self.bytes_per_second // 20))
            was_reset = False
            try:
                data = await reader.read(limit)
            except ConnectionError:
                data, was_reset = b"", True
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            self.is_holding = not (self._is_open.is_set() and connection.is_open[self].is_set())
            await self._is_open.wait()
            await connection.is_open[self].wait()
            self.is_holding = False
            if was_reset:
                connection.cut(resets=True)
                return
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            if self._end is not None and self.byte_count + len(data) > self._end:
                data = data[: self._end - self.byte_count]  # armed while this waited
            writer.write(data)
            await writer.drain()
            self.byte_count += len(data)
            if self.bytes_per_second is not None:
                await asyncio.sleep(len(data) / self.bytes_per_second)


class Proxy:
    """
    Accepts connections on a free loopback port and connects each to *target*, "host:port".

    Use it as a context manager.

    Attributes:
        target: Where connections lead to from now on; the server may have moved.
        up: The way from clients to the server.
        down: The way back.
        connection_count: How many connections were accepted.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.connection_count = 0
        self._loop = asyncio.new_event_loop()
        self.up, self.down = Way(self._loop), Way(self._loop)
        self._connections: set[_Connection] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def address(self) -> str:
        """Where clients connect to, as "host:port"."""
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    @property
    def open_count(self) -> int:
        """How many connections there are now, both halves standing."""
        return len(self._connections)

    def cut(self, *, resets: bool = False) -> None:
        """Cut all connections at once."""

        def cut_all() -> None:
            for connection in tuple(self._connections):
                connection.cut(resets=resets)

        _done_in(self._loop, cut_all)

    def strand(self, *ways: Way) -> None:
        """Let the connections that there are hand on nothing more in some directions, ever. New ones do."""

        def strand_all() -> None:
            for connection in self._connections:
                for way in ways:
                    connection.is_open[way].clear()

        _done_in(self._loop, strand_all)

    def stall(self) -> None:
        """Be a black hole: accept everything, hand on nothing, until `heal`."""
        self.up.stall()
        self.down.stall()

    def heal(self) -> None:
        """Hand on what came meanwhile, and what follows."""
        self.up.heal()
        self.down.heal()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK_BYTES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection((self.up, self.down), (writer, far_writer))
        self._connections.add(connection)
        ways = [
            asyncio.create_task(self.up.carry(connection, reader, far_writer)),
            asyncio.create_task(self.down.carry(connection, far_reader, writer)),
        ]
        connection.ways = ways
        try:
            # An end that fails takes the other one with it, but only what has not stalled gets to know.
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            connection.cut(resets=False)
            self._connections.discard(connection)

    async def _close(self) -> None:
        self._server.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in tuple(self._connections):
                connection.cut(resets=True)
            await asyncio.wait(tasks, timeout=POLL_SECONDS)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Connection:
    """Both halves of a connection through the proxy."""

    def __init__(self, ways: Iterable[Way], writers: Iterable[asyncio.StreamWriter]) -> None:
        self.is_cut = False
        self.is_open = {way: asyncio.Event() for way in ways}
        for way in self.is_open:
            self.is_open[way].set()
        self.ways: list[asyncio.Task[None]] = []
        self._writers = tuple(writers)
        for writer in self._writers:
            writer.transport.set_write_buffer_limits(high=0)
            _socket(writer).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self, *, resets: bool) -> None:
        if self.is_cut:
            return
        self.is_cut = True
        for writer in self._writers:
            if resets:
                with suppress(OSError):  # the other side has closed it already
                    _socket(writer).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
                writer.transport.abort()
            else:
                writer.close()
        for way in self.ways:
            way.cancel()


def _aware(time: datetime) -> datetime:
    if time.tzinfo is None:
        raise InvalidValue(f"{time} does not say in which time zone: give it a tzinfo")
    return time.astimezone(UTC)


def _socket(writer: asyncio.StreamWriter) -> socket.socket:
    found: socket.socket = writer.get_extra_info("socket")
    return found


def _done_in(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    """Do *work* in the loop's thread, and return once it is done."""

    async def run() -> None:
        work()

    asyncio.run_coroutine_threadsafe(run(), loop).result()

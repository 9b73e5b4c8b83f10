"""
Peer: the client at the other end of a session's stream, who may be slow, or have come to a halt.

A client that is gone is found by pings. One that is there, and neither sends what is
awaited nor reads what is sent, would hold its session for ever: hence a limit of time.
A message has to pass within it; a client that gets that far is not concerned, however long
the whole takes. What the server itself needs for its answers does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from tidelog_server._errors import NothingRead, SessionIdle


class Peer:
    """
    Reads from and writes to a client, each within the limit.

    Args:
        context: Of the client's call.
        idle_seconds: How long to wait for it.
        requests: What it sends. None: it has sent all.

    Attributes:
        owed: How many answers the client waits for. While it does, it need not send anything.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[bytes, bytes],
        idle_seconds: float,
        requests: AsyncIterator[bytes] | None = None,
    ) -> None:
        self._owed = 0
        # When the last answer went out that the client waited for, by the clock of the loop.
        self._all_answered_at = 0.0
        self._context = context
        self._idle_seconds = idle_seconds
        self._requests = requests

    @property
    def owed(self) -> int:
        return self._owed

    @owed.setter
    def owed(self, count: int) -> None:
        if self._owed and not count:
            self._all_answered_at = asyncio.get_running_loop().time()
        self._owed = count

    async def receive(self) -> bytes | None:
        """Return the next message; None at the end. Raises SessionIdle."""
        if self._requests is None:
            return None
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        left_seconds = self._idle_seconds
        coming = asyncio.ensure_future(anext(self._requests, None))
        try:
            while not (await asyncio.wait((coming,), timeout=left_seconds))[0]:
                # What it waits for goes out when it does: then it has all the time from there.
                now = loop.time()
                since = now if self._owed else max(began_at, self._all_answered_at)
                left_seconds = self._idle_seconds - (now - since)
                if left_seconds <= 0:
                    raise SessionIdle(f"nothing came for {self._idle_seconds:g} seconds: begin another session")
            return coming.result()
        finally:
            coming.cancel()

    async def send(self, message: bytes) -> None:
        """Send a message. Returns once the connection has taken it. Raises NothingRead."""
        try:
            async with asyncio.timeout(self._idle_seconds):
                await self._context.write(message)
        except TimeoutError:
            raise NothingRead(f"nothing was read for {self._idle_seconds:g} seconds: begin another session") from None
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None  # the client is gone

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

import pytest

from tidelog_server._errors import SessionIdle
from tidelog_server._peer import Peer

IDLE_SECONDS = 60.0
STEPS = 20


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        """Return the time."""
        return self.now


class Client:
    """The other end of a stream, in the test's hands."""

    def __init__(self) -> None:
        self.sends: asyncio.Queue[bytes] = asyncio.Queue()
        self.takes: asyncio.Queue[None] = asyncio.Queue()
        self.taken: list[bytes] = []

    async def requests(self) -> AsyncIterator[bytes]:
        """Yield what it sends."""
        while (message := await self.sends.get()) != b"end":
            yield message

    async def write(self, message: bytes) -> None:
        """Wait until it takes the message."""
        await self.takes.get()
        self.taken.append(message)

    def peer(self) -> Peer:
        """Return what the server sees of it."""
        return Peer(cast("Any", self), IDLE_SECONDS, self.requests())


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run with a clock of our own."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(scenario)


async def passes(seconds: float) -> None:
    """Let whatever is under way come to where it waits, then time pass, and whatever that sets off."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    for step_seconds in (0.0, seconds):
        loop.now += step_seconds
        for _ in range(STEPS):
            await asyncio.sleep(0)


def test_a_client_that_sends_nothing() -> None:
    """A session whose client owes a message and sends none is over when the limit is, and not before."""

    async def scenario() -> None:
        waiting = asyncio.create_task(Client().peer().receive())
        await passes(IDLE_SECONDS - 1)
        assert not waiting.done()
        await passes(2)
        with pytest.raises(SessionIdle, match="60 seconds"):
            waiting.result()

    run(scenario())


def test_a_client_that_sends_slowly() -> None:
    """A client that sends something now and then is never idle, however long all of it takes."""

    async def scenario() -> None:
        client = Client()
        peer = client.peer()
        for number in range(10):
            waiting = asyncio.create_task(peer.receive())
            await passes(IDLE_SECONDS - 1)
            await client.sends.put(b"%d" % number)
            assert await waiting == b"%d" % number
        await client.sends.put(b"end")
        assert await peer.receive() is None

    run(scenario())


def test_a_client_that_waits_for_the_server() -> None:
    """While the server owes an answer its client need not send anything; afterwards it must."""

    async def scenario() -> None:
        peer = Client().peer()
        peer.owed = 1
        waiting = asyncio.create_task(peer.receive())
        for _ in range(5):
            await passes(2 * IDLE_SECONDS)
        assert not waiting.done()
        peer.owed = 0
        await passes(2 * IDLE_SECONDS)
        with pytest.raises(SessionIdle):
            waiting.result()

    run(scenario())


def test_the_servers_own_time_is_not_the_clients() -> None:
    """However long an answer took, and whenever it went out, the client has the whole limit from then on."""

    async def scenario() -> None:
        for owed_seconds in (1.0, IDLE_SECONDS - 1, IDLE_SECONDS + 1, 5 * IDLE_SECONDS / 2):
            peer = Client().peer()
            peer.owed = 1
            waiting = asyncio.create_task(peer.receive())
            await passes(owed_seconds)
            peer.owed -= 1
            await passes(IDLE_SECONDS - 1)
            assert not waiting.done()
            await passes(2)
            with pytest.raises(SessionIdle, match="60 seconds"):
                waiting.result()

    run(scenario())


def test_a_client_that_waits_for_one_of_two_answers() -> None:
    """A client that has got the first of two answers still waits, and owes nothing."""

    async def scenario() -> None:
        peer = Client().peer()
        peer.owed = 2
        waiting = asyncio.create_task(peer.receive())
        await passes(IDLE_SECONDS - 1)
        peer.owed -= 1
        await passes(2 * IDLE_SECONDS)
        assert not waiting.done()
        waiting.cancel()

    run(scenario())


def test_a_client_that_reads_nothing() -> None:
    """A session whose client takes nothing is over when the limit is, and not before."""

    async def scenario() -> None:
        sending = asyncio.create_task(Client().peer().send(b"page"))
        await passes(IDLE_SECONDS - 1)
        assert not sending.done()
        await passes(2)
        with pytest.raises(SessionIdle, match="60 seconds"):
            sending.result()

    run(scenario())


def test_a_client_that_reads_slowly() -> None:
    """A client that takes a page now and then gets all of them, however long that takes."""

    async def scenario() -> None:
        client = Client()
        peer = client.peer()
        for number in range(10):
            sending = asyncio.create_task(peer.send(b"%d" % number))
            await passes(IDLE_SECONDS - 1)
            await client.takes.put(None)
            await sending
        assert len(client.taken) == 10

    run(scenario())

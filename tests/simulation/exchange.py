"""
File calls of a simulated world: contents on their way, one message at a time.

`FileEnd` does with a call what the gRPC service does, `FileLink` carries its messages and
can be cut, go dark or be slow between any two of them, and `SimulatedCalls` is to the
transfers what a gRPC channel is. The workers are fibers that take turns, so that a seed
decides how transfers that run at once get in each other's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import grpc
from tests.simulation.fiber import Fiber
from tests.simulation.link import CallFailed, ServerGone
from tests.simulation.model import Key

from tidelog import ResourceClosed
from tidelog_client._call_errors import call_error
from tidelog_client._file_calls import ContentStatus, FileRefused, Presence, Standings
from tidelog_client._file_channel import _REFUSALS
from tidelog_client._files import Needed
from tidelog_client._workers import Event, Work, done
from tidelog_server import Principal
from tidelog_server._files import Files, Wanted
from tidelog_server._incoming import Incoming
from tidelog_server._status import status_of

MESSAGES_AHEAD_MAX: Final = 2


class Ask(NamedTuple):
    """The question how contents stand."""

    contents: Sequence[Needed]


class Begin(NamedTuple):
    """The beginning of an upload."""

    content: Needed
    offset: int


class Fetch(NamedTuple):
    """What asks for a content."""

    sha256: bytes
    key: Key
    offset: int


Message: TypeAlias = "Ask | Begin | Fetch | bytes"


class FilePeer(Protocol):
    """What a call has for a device: who is to be waited for, and who looks on."""

    def told(self, ask: Ask, answer: Sequence[ContentStatus]) -> None:
        """Take note of what the server says of contents."""
        ...

    def began(self, sha256: bytes) -> None:
        """Take note that somebody has begun to upload a content."""
        ...

    def sent(self, fetch: Fetch) -> None:
        """Take note that the server sends a content, or begins to."""
        ...


class FileEnd:
    """One file call on the server."""

    def __init__(self, files: Files, principal: Principal, peer: FilePeer) -> None:
        self.is_whole = False
        self._files = files
        self._principal = principal
        self._peer = peer
        self._incoming: Incoming | None = None
        self._pieces: Generator[bytes, None, None] | None = None

    @property
    def has_pieces(self) -> bool:
        """Whether there may be more to be sent."""
        return self._pieces is not None

    def receive(self, message: Message) -> Any:
        """Take in a message, return the answer if there is one."""
        if isinstance(message, Ask):
            standings = self._files.stat(self._principal, [Wanted(*one) for one in message.contents])
            answer = [
                ContentStatus(
                    Presence.PRESENT
                    if one.is_present
                    else Presence.TOO_LARGE
                    if one.is_too_large
                    else Presence.MISSING,
                    one.received_bytes,
                    one.takes_room,
                )
                for one in standings
            ]
            self._peer.told(message, answer)
            return answer
        if isinstance(message, Fetch):
            self._pieces = self._files.download(self._principal, message.sha256, message.key, message.offset, 0)
            self._peer.sent(message)
            return None
        if isinstance(message, Begin):
            self._peer.began(message.content.sha256)
            self._incoming = self._files.begin_upload(self._principal, Wanted(*message.content), message.offset)
        elif self._incoming is not None:
            self._incoming.append(message)
        self.is_whole = self._incoming is not None and self._incoming.is_whole
        return None

    def complete(self) -> bool:
        """Make what came a content."""
        if self._incoming is None:
            raise AssertionError("nothing came")
        self.is_whole = False
        self._incoming.complete()
        return True

    def next_piece(self) -> bytes:
        """Return the next piece of a download; nothing at its end."""
        piece = next(self._pieces or iter(()), b"")
        if not piece:
            self._pieces = None
        return piece

    def leave(self) -> None:
        """Note that the client is gone."""
        if self._incoming is not None:
            self._incoming.leave()
        if self._pieces is not None:
            self._pieces.close()


class FileLink:
    """
    Carries one file call.

    Attributes:
        to_server: Messages on their way to the server.
        to_client: Messages on their way to the replica; an error is the last one.
        is_left: Whether the replica has turned away from it.
        is_dark: Whether messages vanish in both directions.
        stalled_steps: How long nothing moves.
        turns: The workers, one of which makes the call.
    """

    def __init__(self, server: FileEnd, turns: Turns, has_died: Callable[[], bool]) -> None:
        self.to_server: deque[Message] = deque()
        self.to_client: deque[Any] = deque()
        self.is_left = False
        self.is_dark = False
        self.stalled_steps = 0
        self._server = server
        self.turns = turns
        self._has_died = has_died
        self._is_server_done = False
        self._inbox: deque[Any] = deque()

    # --- the replica's side -----------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message, once there is room for it. Raises CallFailed."""
        self.turns.wait(lambda: self.is_left or bool(self._inbox) or len(self.to_server) < MESSAGES_AHEAD_MAX)
        self._check()
        if not self.is_dark:
            self.to_server.append(message)

    def receive(self) -> Any:
        """Wait for the next message. Raises CallFailed."""
        self.turns.wait(lambda: self.is_left or bool(self._inbox))
        self._check()
        return self._inbox.popleft()

    def _check(self) -> None:
        if self._inbox and isinstance(self._inbox[0], CallFailed):
            raise self._inbox[0]
        if self.is_left:
            raise CallFailed(grpc.StatusCode.CANCELLED, "the channel was closed")

    # --- what can happen next ---------------------------------------------------------------

    def moves(self) -> list[Callable[[], str]]:
        """Return what can happen next."""
        possible: list[Callable[[], str]] = []
        if not self._is_server_done:
            if self.to_server:
                possible.append(self.deliver_to_server)
            if self._server.is_whole:
                possible.append(self._complete)
            if self._server.has_pieces and len(self.to_client) < MESSAGES_AHEAD_MAX:
                possible.append(self._send_piece)
        if self.to_client:
            possible.append(self._deliver_to_client)
        return possible

    def deliver_to_server(self) -> str:
        """Let the server take in the oldest message on its way there."""
        message = self.to_server.popleft()
        what = f"{len(message)} bytes" if isinstance(message, bytes) else type(message).__name__
        return self._work(lambda: self._server.receive(message), what)

    @property
    def is_spent(self) -> bool:
        """Whether nothing of it reaches the server any more."""
        return self._is_server_done or not (self.to_server or self._server.is_whole)

    def end_late(self) -> str:
        """Let the server go on with what had been sent when the replica was gone; let it take note at the end."""
        what = self.deliver_to_server() if self.to_server else self._complete()
        if self.is_spent:
            self.end()
        return what

    @property
    def is_over(self) -> bool:
        """Whether the server does nothing more for it."""
        return self._is_server_done

    def cut(self, *, drops_answers: bool) -> None:
        """Break it: both sides see it."""
        if drops_answers:
            self.to_client.clear()
        self.break_off(grpc.StatusCode.UNAVAILABLE, "the link is cut")

    def ghost(self) -> FileLink:
        """Return what is on its way to the server, as a call of its own; this one brings it nothing more."""
        ghost = FileLink(self._server, self.turns, self._has_died)
        ghost.to_server, ghost.is_left = self.to_server, True
        self.to_server, self._is_server_done = deque(), True
        return ghost

    def vanish(self) -> None:
        """Let the replica see that the server is gone, which does nothing more."""
        self._is_server_done = True
        self.break_off(grpc.StatusCode.UNAVAILABLE, "the server is gone")

    def end(self) -> None:
        """Let the server see that the replica is gone."""
        self._is_server_done = True
        self._server.leave()

    def break_off(self, code: grpc.StatusCode, message: str, reason: str = "") -> None:
        """Let the replica see an error after what is on its way to it."""
        self.to_client.append(CallFailed(code, message, reason))

    def _complete(self) -> str:
        return self._work(self._server.complete, "all of it")

    def _send_piece(self) -> str:
        return self._work(self._server.next_piece, "the request for more")

    def _deliver_to_client(self) -> str:
        message = self.to_client.popleft()
        self._inbox.append(message)
        return f"client takes {message}" if isinstance(message, CallFailed) else "client takes an answer"

    def _work(self, work: Callable[[], Any], what: str) -> str:
        try:
            answer = work()
        except AssertionError:
            raise
        except Exception as error:
            if self._has_died():
                raise ServerGone from error
            code, reason, message = status_of(error)
            if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT):
                raise
            self.break_off(code, message, reason)
            self.end()
            return f"server refuses {what}: {reason} {message}"
        if answer is not None and not (self.is_dark or self.is_left):
            self.to_client.append(answer)
        return f"server takes {what}"


@dataclass(eq=False)
class _Turn:
    fiber: Fiber
    may_go_on: Callable[[], bool]


class Turns:
    """
    Workers that take turns. See `WorkRunner`.

    Args:
        pause: Lets the world go on, for so many seconds at the most; tells whether there is time left.
        monotonic: The device's clock.
        death: Tells what a process dies of, if it is dead.
    """

    def __init__(
        self,
        pause: Callable[[float], bool],
        monotonic: Callable[[], float],
        death: Callable[[], BaseException | None],
    ) -> None:
        self._pause = pause
        self._monotonic = monotonic
        self._death = death
        self._turns: list[_Turn] = []
        self._events: deque[Event] = deque()
        self._running: _Turn | None = None

    @property
    def may_go_on(self) -> bool:
        """Whether any of them has something to do."""
        return bool(self._events) or any(one.may_go_on() for one in self._turns)

    def submit(self, work: Work) -> None:
        """See `WorkRunner`."""

        def tell(value: Any) -> None:
            self._events.append(Event(work, value, is_over=False))

        fiber = Fiber(lambda: self._events.append(done(work, tell)))
        self._turns.append(_Turn(fiber, lambda: True))

    def next_event(self, timeout: float) -> Event | None:
        """See `WorkRunner`."""
        end = self._monotonic() + timeout
        while not self._events:
            if self.take_turn():
                continue
            if (left := end - self._monotonic()) <= 0 or not self._pause(left):
                return None
        return self._events.popleft()

    def take_turn(self) -> bool:
        """Let one of them go on that can; tell whether there was one."""
        ready = next((one for one in self._turns if one.may_go_on()), None)
        if ready is not None:
            self._go_on(ready)
        return ready is not None

    def wait(self, until: Callable[[], bool]) -> None:
        """Let the others go on until something is so. For workers."""
        turn = self._running
        if turn is None:
            raise AssertionError("it is nobody's turn")
        while not until():
            turn.may_go_on = until
            turn.fiber.pause()

    def stop(self) -> None:
        """See `WorkRunner`. Whoever works in a process that is dead is dead too."""
        if self._death() is not None:
            self._end()

    def join(self, timeout: float) -> None:
        """See `WorkRunner`."""
        self._end()

    def _end(self) -> None:
        for turn in list(self._turns):
            while not turn.fiber.is_done:
                self._go_on(turn, self._death())

    def _go_on(self, turn: _Turn, thrown: BaseException | None = None) -> None:
        # Those behind it come first next time.
        self._turns.remove(turn)
        self._running, former = turn, self._running
        turn.fiber.resume(thrown)
        self._running = former
        if not turn.fiber.is_done:
            self._turns.append(turn)


class SimulatedCalls:
    """
    What transfers call. See `FileCalls`.

    Args:
        connect: Opens a call.
    """

    def __init__(self, connect: Callable[[], FileLink]) -> None:
        self._connect = connect
        self._links: list[FileLink] = []
        self._is_closed = False

    def stat(self, _metadata: None, contents: Sequence[Needed]) -> Standings:
        """See `FileCalls`."""
        link = self._open(Ask(contents))
        try:
            statuses: list[ContentStatus] = link.receive()
        except CallFailed as error:
            raise _error(error) from error
        finally:
            self._close(link)
        return Standings(statuses)

    def upload(self, _metadata: None, content: Needed, offset: int, chunks: Iterable[bytes]) -> None:
        """See `FileCalls`."""
        link = self._open(Begin(content, offset))
        try:
            for chunk in chunks:
                link.send(chunk)
            link.receive()
        except CallFailed as error:
            raise _error(error) from error
        finally:
            self._close(link)

    def download(self, _metadata: None, sha256: bytes, key: Key, offset: int) -> Iterator[bytes]:
        """See `FileCalls`."""
        link = self._open(Fetch(sha256, key, offset))
        try:
            while chunk := link.receive():
                yield chunk
        except CallFailed as error:
            raise _error(error) from error
        finally:
            self._close(link)

    def close(self) -> None:
        """See `FileCalls`."""
        self._is_closed = True
        for link in self._links:
            link.is_left = True

    def _open(self, message: Message) -> FileLink:
        if self._is_closed:
            raise ResourceClosed("the connection is closed")
        link = self._connect()
        self._links.append(link)
        link.send(message)
        return link

    def _close(self, link: FileLink) -> None:
        link.is_left = True
        with suppress(ValueError):
            self._links.remove(link)


def _error(error: CallFailed) -> Exception:
    meaning, reason = call_error(error, "the simulated server")
    if reason in _REFUSALS:
        is_denied = reason == "FILE_NOT_FOUND"
        return FileRefused(str(meaning), is_too_large=reason == "FILE_TOO_LARGE", is_denied=is_denied)
    return meaning

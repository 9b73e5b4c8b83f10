"""
A link between a replica and a server, in memory.

It carries serialized messages, keeps those under way in two queues, and can be cut,
go dark or repeat itself at any of them. `ServerEnd` does with a session what the gRPC
service does; `Link` is to the synchronizer what a gRPC stream is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from tests.simulation.bounds import Bounds

from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_client._call_errors import error_of
from tidelog_server import Application, Principal
from tidelog_server._outcomes import Result
from tidelog_server._services import ERROR_DOMAIN
from tidelog_server._session import Session, put_results, settled_messages
from tidelog_server._status import status_of
from tidelog_server._store import Store

STORE_TIMEOUT_SECONDS: Final = 60
PAGES_AHEAD_MAX: Final = 3


class ServerGone(Exception):
    """The server died while it worked on a message."""


class CallFailed(grpc.RpcError):
    """A failed call, as gRPC tells of it."""

    def __init__(self, code: grpc.StatusCode, message: str, reason: str = "") -> None:
        super().__init__()
        detail = AnyMessage()
        detail.Pack(ErrorInfo(domain=ERROR_DOMAIN, reason=reason))
        self._status = rpc_status.to_status(
            Status(code=Code.Value(code.name), message=message, details=[detail] if reason else [])
        )

    def code(self) -> grpc.StatusCode:
        """See `grpc.Call`."""
        return self._status.code

    def details(self) -> str:
        """See `grpc.Call`."""
        return self._status.details

    def trailing_metadata(self) -> Any:
        """See `grpc.Call`."""
        return self._status.trailing_metadata

    def __str__(self) -> str:
        return f"{self.code().name} {self.details()}"


class ServerEnd:
    """One session on the server."""

    def __init__(
        self,
        application: Application,
        store: Store,
        principal: Principal,
        clock: Callable[[], int],
        *,
        file_bytes_max: int = FILE_BYTES_MAX_DEFAULT,
    ) -> None:
        self.settled_version = 0  # the tenant's version when the upload was settled
        self.started = sync_pb2.SessionStarted()  # what it said of the session
        self._application = application
        self._store = store
        self._principal = principal
        self._clock = clock
        self._file_bytes_max = file_bytes_max
        self._session: Session | None = None
        self._pages: Iterator[sync_pb2.SnapshotPage] | None = None

    @property
    def has_pages(self) -> bool:
        """Whether the download goes on."""
        return self._pages is not None

    def receive(self, data: bytes | None) -> bytes | None:
        """Take in a message, return the answer if there is one."""
        if data is None:
            return None
        request = splice_pb2.SynchronizeRequestSplice.FromString(data)
        which = request.WhichOneof("message")
        if which == "start":
            start = sync_pb2.SessionStart.FromString(request.start)
            self._session = Session(
                self._application,
                self._store,
                self._principal,
                start,
                self._clock,
                file_bytes_max=self._file_bytes_max,
            )
            self.started = self._session.open().result(STORE_TIMEOUT_SECONDS)
            return _response(started=self.started.SerializeToString())
        if which == "batch":
            return self.submit(data)()
        session = self._opened()
        if which == "selection":
            session.select(sync_pb2.Selection.FromString(request.selection))
            return None
        held = session.settle_held().result(STORE_TIMEOUT_SECONDS)
        settled = next(settled_messages(held, session.checkpoint() if held else b""))
        with self._store.read(self._principal.tenant) as reader:
            self.settled_version = reader.head().version
        self._pages = session.pages()
        return _response(upload_settled=settled.SerializeToString())

    def submit(self, data: bytes) -> Callable[[], bytes]:
        """Take in a batch; what is returned waits for it and returns the answer."""
        batch = splice_pb2.SynchronizeRequestSplice.FromString(data).batch
        session = self._opened()
        future: Future[list[Result]] = session.upload(
            list(batch.operations), batch.former_outcomes, list(batch.lost_contents)
        )

        def answer() -> bytes:
            settled_now = future.result(STORE_TIMEOUT_SECONDS)
            results = sync_pb2.BatchResults(checkpoint=session.checkpoint())
            put_results(settled_now, results.results)
            return _response(batch_results=results.SerializeToString())

        return answer

    def next_page(self) -> bytes:
        """Return the next page of the download, at its end the last message."""
        session = self._opened()
        page = next(self._pages or iter(()), None)
        if page is not None:
            return _response(page=page.SerializeToString())
        self._pages = None
        return _response(complete=session.complete().SerializeToString())

    def _opened(self) -> Session:
        if self._session is None:
            raise AssertionError("the session was not begun")
        return self._session


class Link:
    """
    Carries one attempt's messages.

    Attributes:
        to_server: Messages on their way to the server.
        to_client: Messages on their way to the replica; an error is the last one.
        sent: All that the replica ever sent.
        is_left: Whether the replica has turned away from it.
        is_dark: Whether messages vanish in both directions.
        is_mute: Whether what the server says vanishes.
        stalled_steps: How long nothing moves.
        is_outdated: Whether the server has forgotten since what became of operations that it may have carried.

    Args:
        server: The session on the server.
        wait: Lets the world go on until there may be a message.
        has_server_died: Tells whether the server is dead.
        watch: Looks at whatever the server says, wherever it gets to.
    """

    def __init__(
        self,
        server: ServerEnd,
        wait: Callable[[], None],
        has_server_died: Callable[[], bool],
        watch: Callable[[bytes], None],
    ) -> None:
        self.to_server: deque[bytes | None] = deque()
        self.to_client: deque[bytes | CallFailed] = deque()
        self.sent: list[bytes | None] = []
        self.is_left = False
        self.is_dark = False
        self.is_mute = False
        self.stalled_steps = 0
        self.is_outdated = False
        self._server = server
        self._wait = wait
        self._has_server_died = has_server_died
        self._watch = watch
        self._is_server_done = False
        self._echoes: list[Link] = []
        self._origin: Link | None = None
        self._inbox: deque[bytes | CallFailed] = deque()
        self._bounds = Bounds(lambda: server.started.limits)

    @property
    def settled_version(self) -> int:
        """The tenant's version when the server had settled the upload."""
        return self._server.settled_version

    @property
    def started(self) -> sync_pb2.SessionStarted:
        """What the server said of the session when it began."""
        return self._server.started

    @property
    def is_lost(self) -> bool:
        """Whether the replica waits for what never comes."""
        return (self.is_dark or self.is_mute) and not self.to_client

    @property
    def has_arrived(self) -> bool:
        """Whether the replica has something to take in."""
        return bool(self._inbox)

    @property
    def batches_under_way(self) -> int:
        """How many batches are the next messages on their way to the server."""
        names = [_name(message, splice_pb2.SynchronizeRequestSplice) for message in self.to_server]
        return next((index for index, name in enumerate(names) if name != "batch"), len(names))

    @property
    def next_to_server(self) -> str:
        """The name of the oldest message on its way to the server; empty if there is none."""
        return _name(self.to_server[0], splice_pb2.SynchronizeRequestSplice) if self.to_server else ""

    # --- the replica's side, as a `Stream` ------------------------------------------------

    def send(self, messages: list[bytes | None]) -> None:
        """Send messages."""
        for message in filter(None, messages):
            self._bounds.check_sent(message)
        self.sent += messages
        if not self.is_dark:
            self.to_server.extend(messages)
        for echo in self._echoes:
            echo.to_server.extend(messages)

    def receive(self) -> bytes | None:
        """Wait for the next message."""
        while not self._inbox:
            self._wait()
        message = self._inbox.popleft()
        if isinstance(message, CallFailed):
            raise error_of(message, "the simulated server") from message
        self._bounds.note_taken(message)
        return message

    def cancel(self) -> None:
        """Turn away."""
        self.is_left = True

    # --- what can happen next -------------------------------------------------------------

    def moves(self) -> list[Callable[[], str]]:
        """Return what can happen next."""
        possible: list[Callable[[], str]] = []
        if not self._is_server_done:
            if self.to_server:
                possible.append(self.deliver_to_server)
            if self._server.has_pages and len(self.to_client) < PAGES_AHEAD_MAX:
                possible.append(self.read_page)
        if self.to_client:
            possible.append(self.deliver_to_client)
        return possible

    def deliver_to_server(self) -> str:
        """Let the server take in the oldest message on its way there."""
        what = self.next_to_server
        message = self.to_server.popleft()
        return self._work(lambda: self._server.receive(message), what)

    def submit_batch(self) -> Callable[[], str]:
        """Let the server take in the oldest message, a batch; what is returned waits for what comes of it."""
        message = self.to_server.popleft()
        answer = self._server.submit(message or b"")
        return lambda: self._work(answer, "batch of a burst")

    def read_page(self) -> str:
        """Let the server send the next page."""
        return self._work(self._server.next_page, "page")

    def deliver_to_client(self) -> str:
        """Let the oldest message on its way to the replica arrive."""
        message = self.to_client.popleft()
        self._inbox.append(message)
        if isinstance(message, CallFailed):
            return f"client sees {message}"
        return f"client takes {_name(message, splice_pb2.SynchronizeResponseSplice)}"

    def silence(self) -> CallFailed:
        """Return what the replica sees when it has heard nothing for long."""
        return CallFailed(grpc.StatusCode.UNAVAILABLE, "keepalive watchdog timeout")

    def break_off(self, code: grpc.StatusCode, message: str, reason: str = "", *, still_arrives: bool = False) -> None:
        """
        Let the replica see an error after what is on its way to it.

        What is on its way to the server does not arrive any more, unless *still_arrives*.
        """
        self._is_server_done |= not still_arrives
        self.to_client.append(CallFailed(code, message, reason))

    def echo(self, server: ServerEnd) -> Link:
        """Return a link on which all that is sent comes a second time."""
        link = Link(server, self._wait, self._has_server_died, self._watch)
        link.is_left = True
        link.to_server.extend(self.sent)
        link._origin = self
        self._echoes.append(link)
        return link

    @property
    def is_spent(self) -> bool:
        """Whether nothing of it reaches the server any more."""
        may_follow = self._origin is not None and not self._origin.is_left
        return self._is_server_done or not (self.to_server or may_follow)

    def _work(self, work: Callable[[], bytes | None], what: str) -> str:
        try:
            answer = work()
        except AssertionError:
            raise
        except Exception as error:
            if self._has_server_died():
                raise ServerGone from error
            code, reason, message = status_of(error)
            if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                raise
            if not self.is_left and code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED):
                raise  # an honest client never sees these
            self.break_off(code, message, reason)
            return f"server refuses {what}: {reason} {message}"
        if answer is not None:
            self._watch(answer)
        if answer is not None and not (self.is_dark or self.is_mute or self.is_left):
            self.to_client.append(answer)
        return f"server takes {what}"


def _response(**message: bytes) -> bytes:
    return splice_pb2.SynchronizeResponseSplice(**message).SerializeToString()


def _name(
    data: bytes | None,
    kind: type[splice_pb2.SynchronizeRequestSplice | splice_pb2.SynchronizeResponseSplice],
) -> str:
    return "the end" if data is None else str(kind.FromString(data).WhichOneof("message"))

"""
A link between a replica and a server, in memory.

It carries serialized messages, keeps those under way in two queues, and can be cut
at any of them. `ServerEnd` does with a session what the gRPC service does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_client._synchronization import Synchronization
from tidelog_server import Application, Principal
from tidelog_server._session import Session, put_results
from tidelog_server._status import status_of
from tidelog_server._store import Store

STORE_TIMEOUT_SECONDS: Final = 60
PAGES_AHEAD_MAX: Final = 3

_TRANSIENT: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class ServerGone(Exception):
    """The server died while it worked on a message."""


class ServerEnd:
    """One session on the server."""

    def __init__(self, application: Application, store: Store, principal: Principal, clock: Callable[[], int]) -> None:
        self.settled_version = 0  # the tenant's version when the upload was settled
        self._application = application
        self._store = store
        self._principal = principal
        self._clock = clock
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
            self._session = Session(self._application, self._store, self._principal, start, self._clock)
            started = self._session.open().result(STORE_TIMEOUT_SECONDS)
            return _response(started=started.SerializeToString())
        if self._session is None:
            raise AssertionError(f"{which} came before start")
        if which == "batch":
            settled_now = self._session.upload(list(request.batch.operations), request.batch.former_outcomes).result(
                STORE_TIMEOUT_SECONDS
            )
            results = sync_pb2.BatchResults(checkpoint=self._session.checkpoint())
            put_results(settled_now, results.results)
            return _response(batch_results=results.SerializeToString())
        if which == "selection":
            self._session.select(sync_pb2.Selection.FromString(request.selection))
            return None
        settled = sync_pb2.UploadSettled()
        put_results(self._session.settle_held().result(STORE_TIMEOUT_SECONDS), settled.results)
        settled.checkpoint = self._session.checkpoint()
        with self._store.read(self._principal.tenant) as reader:
            self.settled_version = reader.head().version
        self._pages = self._session.pages()
        return _response(upload_settled=settled.SerializeToString())

    def next_page(self) -> bytes:
        """Return the next page of the download, at its end the last message."""
        if self._pages is None or self._session is None:
            raise AssertionError("the download has not begun")
        page = next(self._pages, None)
        if page is not None:
            return _response(page=page.SerializeToString())
        self._pages = None
        return _response(complete=self._session.complete().SerializeToString())


class Link:
    """Carries one attempt's messages."""

    def __init__(self, attempt: Synchronization, server: ServerEnd) -> None:
        self.attempt = attempt
        self.to_server: deque[bytes | None] = deque(attempt.begin())
        self.to_client: deque[bytes] = deque()
        self.is_broken = False
        self._server = server

    @property
    def settled_version(self) -> int:
        """The tenant's version when the server had settled the upload."""
        return self._server.settled_version

    def moves(self) -> list[Callable[[], str]]:
        """Return what can happen next."""
        possible: list[Callable[[], str]] = []
        if not self.is_broken:
            if self.to_server:
                possible.append(self.deliver_to_server)
            if self._server.has_pages and len(self.to_client) < PAGES_AHEAD_MAX:
                possible.append(self.read_page)
        if self.to_client:
            possible.append(self.deliver_to_client)
        return possible

    def deliver_to_server(self) -> str:
        """Let the server take in the oldest message on its way there."""
        message = self.to_server.popleft()
        return self._work(lambda server: server.receive(message), _name(message, splice_pb2.SynchronizeRequestSplice))

    def read_page(self) -> str:
        """Let the server send the next page."""
        return self._work(lambda server: server.next_page(), "page")

    def deliver_to_client(self) -> str:
        """Let the replica take in the oldest message on its way there."""
        message = self.to_client.popleft()
        self.to_server.extend(self.attempt.receive(message))
        return f"client takes {_name(message, splice_pb2.SynchronizeResponseSplice)}"

    def _work(self, work: Callable[[ServerEnd], bytes | None], what: str) -> str:
        try:
            answer = work(self._server)
        except (ServerGone, AssertionError):
            raise
        except Exception as error:
            code, reason, message = status_of(error)
            if code not in _TRANSIENT:
                raise
            self.is_broken = True
            return f"server refuses {what}: {reason} {message}"
        if answer is not None:
            self.to_client.append(answer)
        return f"server takes {what}"


def _response(**message: bytes) -> bytes:
    return splice_pb2.SynchronizeResponseSplice(**message).SerializeToString()


def _name(
    data: bytes | None,
    kind: type[splice_pb2.SynchronizeRequestSplice | splice_pb2.SynchronizeResponseSplice],
) -> str:
    return "the end" if data is None else str(kind.FromString(data).WhichOneof("message"))

"""
A replica among hostile servers: what it has to lose, and how to tell that it lost nothing.

`Victim` is a replica with objects of a server, pending operations of every kind and a
failure. Any messages may come; afterwards `check` looks at what must have survived, and
a good server must be able to go on.
"""

from __future__ import annotations

import atexit
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Final

from tests.builders import contents, quick_folder
from tests.sessions import ServerEnd, begin, page, synchronize

from tidelog import Operation
from tidelog._errors import SynchronizationError
from tidelog._keys import ObjectKey, pack_object_key
from tidelog._values import decode_map, equal
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_client import Replica, Report
from tidelog_client._call_errors import Transient
from tidelog_client._synchronization import PlansChanged, Synchronization, TimelineChanged
from tidelog_client._view import StateLost, replay

MODES: Final = ("all", "unsynchronized", "selected")
SELECTED: Final = (("Task", "clean"), ("Task", "edited"), ("Task", "new"), ("Note", "first"), ("Note", "second"))
MESSAGES_MAX: Final = 40

SERVER_STATE: Final = (
    ("Task", "clean", 3, {"title": "clean", "count": 1}),
    ("Task", "edited", 4, {"title": "theirs", "count": 1, "tags": ["a"]}),
    ("Task", "deleted", 5, {"title": "deleted"}),
)


class Victim:
    """A copy of the replica, for one session with a hostile server."""

    def __init__(self, folder: Path) -> None:
        self.replica = Replica(folder, durability="relaxed")
        self._storage = self.replica._storage
        self.log = self._logged()
        self.pending = {logged.operation.seq for logged in self.replica.pending()}
        self.shown = self._shown()

    def session(self, mode: str, messages: Iterable[bytes]) -> Exception | None:
        """Let a server say what it likes; return the error in which that ended, None if the session is complete."""
        report = Report()
        try:
            attempt = begin(self.replica, report, mode, SELECTED if mode == "selected" else ())
            attempt.begin()
            for message in messages:
                if attempt.done:
                    break
                attempt.receive(message)
            if not attempt.done:
                raise Transient("the server ended the session before it was complete")
        except StateLost as error:
            self._storage.publication.start_over()
            return error
        except (SynchronizationError, PlansChanged, TimelineChanged, Transient) as error:
            return error
        assert not report.failures or all(one.operation is not None for one in report.failures)
        return None

    def check(self, error: Exception | None) -> None:
        """Look at what must have survived a session."""
        assert self._logged() == self.log, "the operation log was changed"
        pending = {logged.operation.seq for logged in self.replica.pending()}
        assert pending <= self.pending, "an operation is pending that was settled before"
        settled = self.pending - pending
        failures = {one.id for one in self.replica.failures()}
        for logged in self.replica.log():
            if logged.operation.seq in settled:
                assert logged.status != "pending"
                assert logged.status == "applied" or logged.failure_id in failures, "a refusal without its record"
        shown = self._shown()
        if error is not None and not settled:
            assert equal(shown, self.shown), "a session that failed changed what is shown"
        self._check_view(pending)

    def recover(self) -> None:
        """Go on with a good server, to the end, and work."""
        server = good_server()
        before = {logged.operation.seq for logged in self.replica.pending()}
        report = synchronize(self.replica, server)
        assert not list(self.replica.pending()), "an operation is not uploaded any more"
        sent = {one.seq for one in server.uploaded}
        assert sent >= before, "a pending operation was not sent"
        # What was settled is offered again to a server of another timeline.
        assert (report.applied, report.reoffered) == (len(before), len(sent - before))
        self._check_view(set())
        server.reconcile, server.version = False, 2_000
        server.pages = [page(("Task", "after", 2_001, {"title": "after"}))]
        self.replica.create("Task", {"title": "after"}, "after")
        synchronize(self.replica, server)
        assert "after" in contents(self.replica)
        assert not list(self.replica.pending())

    def _logged(self) -> list[Operation]:
        return [logged.operation for logged in self.replica.log()]

    def _shown(self) -> dict[str, dict[str, dict[str, Any]]]:
        with self._storage.environment.read() as transaction:
            entities = self._storage.view.entities(transaction)
        return {entity: contents(self.replica, entity) for entity in entities}

    def _check_view(self, pending: set[int]) -> None:
        """Check promise 9's second half: what is shown of an object is its base with its operations on top."""
        view, log = self._storage.view, {operation.seq: operation for operation in self.log}
        keys: dict[ObjectKey, None] = dict.fromkeys(operation.key for operation in self.log)
        with self._storage.environment.read() as transaction:
            for key in keys:
                packed = pack_object_key(*key)
                unconfirmed = view.unconfirmed(transaction, packed)
                waiting = {seq for seq, version in unconfirmed if version == 0}
                assert waiting == {seq for seq in pending if log[seq].key == key}, "replayed is not what is pending"
                if not unconfirmed:
                    continue
                base = transaction.get(packed, db=view._base)
                start = None if base is None else decode_map(base[9:])
                expected = reduce(replay, [log[seq] for seq, _ in unconfirmed], start)
                found = view.get(transaction, packed)
                assert equal(None if found is None else decode_map(found.attributes), expected), (
                    "view is not base + ops"
                )


def good_server() -> ServerEnd:
    """Return a server that knows the replica, streams everything, and applies what comes."""
    return ServerEnd(
        reconcile=True, pages=[page(*SERVER_STATE[:2], token=b"t")], tenant="default", user_id="ann", version=1_000
    )


_FOLDERS = ExitStack()
atexit.register(_FOLDERS.close)
_TEMPLATE: list[Path] = []


@contextmanager
def victim() -> Iterator[Victim]:
    """Give a fresh copy of the replica."""
    if not _TEMPLATE:
        root = _FOLDERS.enter_context(quick_folder())
        _make(root / "template")
        _TEMPLATE.append(root)
    folder = _TEMPLATE[0] / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_TEMPLATE[0] / "template", folder)
    found = Victim(folder)
    try:
        yield found
    finally:
        found.replica.close()


def _make(folder: Path) -> None:
    with Replica(folder, durability="relaxed") as replica:
        replica.create("Task", {"title": "refused"}, "refused")
        replica.create("Task", {"title": "applied"}, "applied")
        server = ServerEnd(refuses={1}, tenant="default", user_id="ann", pages=[page(*SERVER_STATE)])
        synchronize(replica, server)
        replica.update("Task", "edited", {"title": "mine"}, increment={"count": 2}, add={"tags": ["b"]})
        replica.create("Task", {"title": "new", "parent": "edited"}, "new")
        replica.delete("Task", "deleted")
        with replica.transaction(atomic=True) as transaction:
            transaction.create("Note", {"text": "1"}, "first")
            transaction.create("Note", {"text": "2"}, "second")
        replica.update("Task", "new", {"title": "newer"})


def hostile_session(data: bytes) -> None:
    """Read bytes as a mode and messages of a server, let a replica take them in, and check it."""
    if not data:
        return
    try:
        messages = list(splice_pb2.OperationBatchSplice.FromString(data[1:]).operations)[:MESSAGES_MAX]
    except Exception:  # noqa: BLE001 - the frame around the messages is not what this is about
        return
    run_session(MODES[data[0] % len(MODES)], messages)


def run_session(mode: str, messages: Sequence[bytes]) -> Exception | None:
    """Let a fresh replica take in the messages of a hostile server, check it, and go on with a good one."""
    with victim() as found:
        error = found.session(mode, messages)
        found.check(error)
        found.recover()
    return error


def framed(mode: str, messages: Sequence[bytes]) -> bytes:
    """Return the bytes that `hostile_session` reads."""
    return bytes((MODES.index(mode),)) + splice_pb2.OperationBatchSplice(operations=messages).SerializeToString()


def good_messages(mode: str) -> list[bytes]:
    """Return what a good server says in a session."""
    with victim() as found:
        attempt: Synchronization = begin(found.replica, Report(), mode, SELECTED if mode == "selected" else ())
        server = good_server()
        requests = deque(attempt.begin())
        said: list[bytes] = []
        while not attempt.done:
            request = requests.popleft()
            if request is None:
                continue
            for answer in server.answer(sync_pb2.SynchronizeRequest.FromString(request)):
                said.append(answer.SerializeToString())
                requests.extend(attempt.receive(said[-1]))
        return said


def message_seeds() -> Iterator[bytes]:
    """Yield what good servers say, framed."""
    for mode in MODES:
        yield framed(mode, good_messages(mode))

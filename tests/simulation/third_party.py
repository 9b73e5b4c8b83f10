"""
A program in another language: it knows the unary calls only, and keeps its own books.

It drives the very methods that gRPC calls, with a log and a copy of its own, so that
replicas meet writers whose operations come without a session.

Where stores are put back it looks before it writes: if the server has begun another timeline, what it was told is
worth nothing, and it sends all of that again. A single call cannot name a former id: when the server has retired the
one that it had, it goes on as somebody else, and leaves what it got no answer to for a person to look up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import grpc
from tests.simulation.actions import IDS, pick_contended
from tests.simulation.application import ENTITIES
from tests.simulation.model import Attributes, Key, same
from tests.simulation.promises import PromiseBroken
from tests.simulation.records import Committed, ServerRecord
from tests.simulation.rights import Eyes
from tests.simulation.server import SimulatedServer

from tidelog import Operation, OperationKind, Patch
from tidelog._limits import PROTOCOL_VERSION
from tidelog._operation import CommitGroup
from tidelog._values import decode_map
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_server import Principal
from tidelog_server._callers import Callers
from tidelog_server._errors import ReplicaRetired
from tidelog_server._services import Services

UPLOAD_MAX: Final = 5
GROUP_MAX: Final = 3
MISTAKES: Final = 0.3

T = TypeVar("T")


class Aborted(Exception):
    """The server ended a call with an error."""


class ThirdParty:
    """
    A client of the unary calls.

    Attributes:
        replica_id: As whose log it writes.
        committed: All operations that it ever made.
        pending: Those of which it does not know what became of them, and which it will send.
        abandoned: Those of which it will never know.
        timeline: The server's, when it last looked.
        eyes: What it may do and see.
    """

    def __init__(
        self, replica_id: str, principal: Principal, eyes: Eyes, random: Random, *, is_contended: bool = False
    ) -> None:
        self._is_contended = is_contended
        self.replica_id = replica_id
        self.committed = Committed()
        self.pending: dict[int, bytes] = {}
        self.abandoned: set[int] = set()
        self.timeline = ""
        self._sent_as: dict[int, str] = {}
        self._outcomes: dict[int, tuple[int, str]] = {}
        self._principal = principal
        self.eyes = eyes
        self._random = random
        self._copy: dict[Key, tuple[int, Attributes]] = {}
        self._cursor = b""
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """Forget about the server."""
        self._loop.close()

    def act(self) -> str:
        """Make an operation, or a commit group."""
        random = self._random
        size = random.choice([1, 1, 1, 2, GROUP_MAX])
        first = len(self.committed.data) + 1
        for position in range(size):
            operation = self._operation(first + position)._replace(
                group=CommitGroup(first, position, size) if size > 1 else None
            )
            data = operation.encode()
            self.committed.add(operation.seq, data)
            self.pending[operation.seq] = data
        return f"the third party logs {size} operations"

    def upload(self, server: SimulatedServer, *, is_answer_lost: bool, count_max: int = UPLOAD_MAX) -> str:
        """
        Send some of what is pending, in order and commit groups whole.

        What may depend on operations that are not sent along stays pending: all must be sent together in the end.
        """
        sent: dict[int, bytes] = {}
        for seq, data in self.pending.items():
            group = self.committed.operations[seq].group
            if len(sent) >= count_max and (group is None or group.position == 0):
                break
            sent[seq] = data
        self._sent_as.update(dict.fromkeys(sent, self.replica_id))
        request = splice_pb2.UploadOperationsRequestSplice(
            protocol_version=PROTOCOL_VERSION,
            replica_id=self.replica_id,
            operations=list(sent.values()),
            more_follow=len(sent) < len(self.pending),
        )
        try:
            with self._services(server) as services:
                response = self._run(services._upload_operations(request.SerializeToString(), self._principal))
        except ReplicaRetired:
            return self._become_another()
        if is_answer_lost:
            return f"the third party sends {len(sent)} operations, and the answer is lost"
        if [result.seq for result in response.results] != list(sent):
            raise AssertionError(f"the third party sent {list(sent)} and got {response.results}")
        for result in response.results:
            if result.status in (operation_pb2.OPERATION_STATUS_APPLIED, operation_pb2.OPERATION_STATUS_REJECTED):
                self._outcomes[result.seq] = (result.version, result.failure_id)
                del self.pending[result.seq]
            else:
                del self._sent_as[result.seq]
        return f"the third party sends {len(sent)} operations, {len(self.pending)} are pending"

    def download(self, server: SimulatedServer) -> str:
        """Bring its copy up to date, and compare it with what it may see."""
        request = sync_pb2.DownloadSnapshotsRequest(protocol_version=PROTOCOL_VERSION, cursor=self._cursor)
        with self._services(server) as services:
            messages = self._run(self._all(services, request.SerializeToString()))
        started = messages[0].started
        if self.timeline not in ("", started.timeline):
            self._doubt_what_it_was_told()
        self.timeline = started.timeline
        reconciled = {one.entity for one in started.entities if one.reconcile}
        if started.reconcile:
            self._copy = {}
        self._copy = {key: one for key, one in self._copy.items() if key[0] not in reconciled}
        for message in messages[1:-1]:
            for one in message.page.snapshots:
                self._copy[one.entity, one.id] = one.version, decode_map(one.attributes)
            for gone in message.page.removals:
                self._copy.pop((gone.entity, gone.id), None)
        self._cursor = messages[-1].complete.cursor
        return f"the third party has {len(self._copy)} objects of version {messages[-1].complete.version}"

    def check(self, server: ServerRecord, lost: Collection[int] = ()) -> None:
        """Compare what it was told, unless it is *lost*, with what is so. After a download that nothing followed."""
        settled = server.settled[self.replica_id]
        for seq, (version, failure_id) in self._outcomes.items():
            if seq in lost and seq not in settled:
                continue
            known = settled.get(seq)
            if known is None or known.version != version or bool(known.failure_id) is not bool(failure_id):
                told = f"a third party was told {version, failure_id} of {seq}: {known}"
                raise PromiseBroken("Settled once", [told])
        shown = {
            key: (version, seen)
            for key, (version, attributes) in server.visible().items()
            if (seen := self.eyes.shown(key[0], attributes)) is not None
        }
        if shown.keys() != self._copy.keys() or not all(
            self._copy[key][0] == version and same(self._copy[key][1], seen) for key, (version, seen) in shown.items()
        ):
            raise AssertionError(f"the third party has {self._copy}, and should have {shown}")

    def _doubt_what_it_was_told(self) -> None:
        """Let what it sent under its present id be sent again: the server may have lost it."""
        again = {seq for seq in self._outcomes if self._sent_as[seq] == self.replica_id}
        self.abandoned |= self._outcomes.keys() - again
        self._outcomes = {}
        self.pending = {seq: self.committed.data[seq] for seq in sorted({*again, *self.pending})}

    def _become_another(self) -> str:
        self.replica_id = str(UUID(bytes=self._random.randbytes(16), version=4))
        in_doubt = self.pending.keys() & self._sent_as.keys()
        self.abandoned |= in_doubt
        self.pending = {seq: data for seq, data in self.pending.items() if seq not in in_doubt}
        return f"the third party goes on as {self.replica_id}, and leaves {len(in_doubt)} operations in doubt"

    def _operation(self, seq: int) -> Operation:
        random = self._random
        key = pick_contended(random) if self._is_contended else (random.choice(ENTITIES), random.choice(IDS))
        known = self._copy.get(key)
        attributes: dict[str, Any] = {"n": random.randint(-5, 5), "title": random.choice(["third", ""])}
        if known is None:
            kind, patch = OperationKind.CREATE, Patch(attributes)
        elif random.random() < 0.3:
            # Other people's programs have mistakes: a deletion has no patch.
            mistake = Patch(attributes).encode() if random.random() < MISTAKES else b""
            return Operation(seq, random.getrandbits(64), OperationKind.DELETE, *key, mistake, known[0], None, 1, 0)
        else:
            kind, patch = OperationKind.UPDATE, random.choice([Patch(attributes), Patch(increment={"n": 1})])
        return Operation(
            seq, random.getrandbits(64), kind, *key, patch.encode(), known[0] if known is not None else 0, None, 1, 0
        )

    async def _all(self, services: Services, data: bytes) -> list[sync_pb2.DownloadSnapshotsResponse]:
        context = _Context()
        await services._download_snapshots(data, cast("grpc.aio.ServicerContext[bytes, bytes]", context))
        return [sync_pb2.DownloadSnapshotsResponse.FromString(message) for message in context.written]

    @contextmanager
    def _services(self, server: SimulatedServer) -> Iterator[Services]:
        callers = cast("Callers", _Caller(self._principal))
        services = Services(server.application, server.store, callers, clock=server.clock)
        try:
            yield services
        finally:
            services.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(call)


class _Caller:
    """Says who is calling. Stands for `Callers`."""

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    async def principal_of(self, _context: object) -> Principal:
        return self._principal


class _Context:
    """What gRPC gives to a call."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str, _metadata: object) -> None:
        raise Aborted(f"{code.name} {details}")

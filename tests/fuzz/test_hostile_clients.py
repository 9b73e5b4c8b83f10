"""
A server among hostile clients: the session protocol as a state machine, over real gRPC.

Any number of streams of any replicas send what the protocol allows, in any order, and
what it does not. After each step the server's store must be what the answers said.
"""

from __future__ import annotations

import itertools
import queue
import uuid
from contextlib import ExitStack
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.builders import World, contents, make_operation, quick_folder
from tests.fuzz.targets import APPLICATION
from tests.property.strategies import mutated, patches

from tidelog import CommitGroup, DownloadMode, attribute
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import failure_pb2, object_pb2, operation_pb2, schema_pb2, sync_pb2
from tidelog_server import Application, Principal, StaticTokens

pytestmark = pytest.mark.slow

ANSWER_SECONDS_MAX: Final = 20
USERS: Final = {
    "ann": Principal("ann", "north", frozenset(("operator",))),
    "bob": Principal("bob", "north"),
    "eve": Principal("eve", "south", frozenset(("operator",))),
}
REPLICAS: Final = [str(uuid.UUID(int=one)) for one in (1, 2, 3)]
SYNC: Final = "/tidelog.v1.SyncService/"
SEQ_MAX: Final = 2**63 - 1
SELECTED: Final = sync_pb2.SYNCHRONIZE_MODE_SELECTED

# What the protocol documents for calls that nobody but the client is to blame for.
REFUSALS: Final = {
    "REQUEST_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "OPERATIONS_OUT_OF_ORDER": grpc.StatusCode.INVALID_ARGUMENT,
    "CONSTRAINT_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "PROTOCOL_VERSION_UNSUPPORTED": grpc.StatusCode.FAILED_PRECONDITION,
    "REPLICA_FORKED": grpc.StatusCode.FAILED_PRECONDITION,
    "REPLICA_OWNED": grpc.StatusCode.PERMISSION_DENIED,
    "FAILURE_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "OBJECT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "FAILURE_SETTLED": grpc.StatusCode.FAILED_PRECONDITION,
    "FAILURE_STALE": grpc.StatusCode.FAILED_PRECONDITION,
    "OPERATOR_REQUIRED": grpc.StatusCode.PERMISSION_DENIED,
    "SESSION_SUPERSEDED": grpc.StatusCode.ABORTED,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
}

# Few meet the replicas of others.
users = st.sampled_from(["ann", "ann", "ann", "bob", "eve"])
picks = st.sampled_from([0, 0, 0, 1, 2, 3])
ids = st.sampled_from(["a", "b", "c", "d", "none"])
odd_seqs = st.integers(1, 12) | st.sampled_from([0, -1, 2**31, SEQ_MAX])
plain_sets = st.fixed_dictionaries(
    {"title": st.sampled_from(["x", "y", "z", 1])},
    optional={
        "count": st.integers(-1, 3),
        "code": st.sampled_from(["1", "2"]),
        "parent": ids,
        "tags": st.just(["t"]),
        "unknown": st.just(1),
    },
)


@st.composite
def hostile_batches(draw: st.DrawFn, after: int) -> list[bytes]:
    """Draw operations of which anything may be wrong; most come in order, behind a position."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        step = draw(st.sampled_from([1, 1, 1, 1, 1, 2, 0, -1, None]))
        seq = draw(odd_seqs) if step is None else max(0, min(after + step, SEQ_MAX))
        found.append(draw(hostile_operations(seq)))
        after = max(after, seq)
    return found


@st.composite
def hostile_operations(draw: st.DrawFn, seq: int) -> bytes:
    """Draw an operation at a position. Two at one position have the same nonce, nearly always."""
    kind = draw(st.sampled_from(["create", "create", "update", "delete"]))
    operation = make_operation(
        kind,
        seq=seq,
        id=draw(ids),
        set=draw(plain_sets) if kind != "delete" else None,
        patch=draw(patches()).encode() if kind == "update" and draw(st.booleans()) else None,
        nonce=draw(st.sampled_from([None, None, None, 7])) if seq > 0 else 7,
        base_version=draw(st.sampled_from([0, 0, 3, SEQ_MAX])),
        schema_version=draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        group=draw(st.sampled_from([*[None] * 8, CommitGroup(seq, 0, 1), CommitGroup(seq - 1, 1, 3)])),
    )
    damage = draw(st.sampled_from([*[""] * 8, "a little", "all"]))
    if damage:
        return draw(mutated(st.just(operation.encode())) if damage == "a little" else st.binary(max_size=20))
    return operation.encode()


def _kind(data: bytes) -> str | None:
    try:
        return splice_pb2.SynchronizeRequestSplice.FromString(data).WhichOneof("message")
    except DecodeError:
        return None


def _seq(data: bytes) -> int:
    try:
        return operation_pb2.Operation.FromString(data).seq
    except DecodeError:
        return 0


class Stream:
    """One raw session."""

    def __init__(self, call: Any, user: str) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = call(
            iter(self._requests.get, None), timeout=ANSWER_SECONDS_MAX, metadata=(("authorization", f"Bearer {user}"),)
        )
        self.user = user
        self.replica = ""
        self.uploads = False
        self.is_selected = False
        self.last_seq = 0
        self.is_open = True

    def send(self, data: bytes) -> None:
        """Send a message."""
        self._requests.put(data)

    def half_close(self) -> None:
        """End the client's side."""
        self._requests.put(None)

    def cancel(self) -> None:
        """Hang up."""
        self._ended()
        self._call.cancel()

    def _ended(self) -> None:
        # A thread of gRPC waits for the next request until it is told that there is none.
        self.is_open = False
        self._requests.put(None)

    def receive(self) -> sync_pb2.SynchronizeResponse | None:
        """Return the next answer; None at the end, or if the server refuses."""
        try:
            data = next(self._call, None)
        except grpc.RpcError as error:
            check_refusal(error)
            data = None
        if data is None:
            self._ended()
            return None
        return sync_pb2.SynchronizeResponse.FromString(data)


def check_refusal(error: grpc.RpcError) -> str:
    """Check that a call failed as it is documented, for the client's sake."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call
    assert status is not None, f"an error without details: {error}"
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "tidelog"
    assert REFUSALS.get(info.reason) is error.code(), f"{info.reason}: {error}"
    return str(info.reason)


def request(**message: Any) -> bytes:
    """Return a message of a session."""
    return sync_pb2.SynchronizeRequest(**message).SerializeToString()


def batch_of(operations: list[bytes]) -> bytes:
    """Return a batch of operations, or of what is to pass for them."""
    return splice_pb2.SynchronizeRequestSplice(
        batch=splice_pb2.OperationBatchSplice(operations=operations)
    ).SerializeToString()


UNARY: Final[dict[str, list[bytes]]] = {
    SYNC + "UploadOperations": [
        splice_pb2.UploadOperationsRequestSplice(
            protocol_version=1,
            replica_id=REPLICAS[0],
            operations=[make_operation(id="a", set={"title": "x"}).encode()],
        ).SerializeToString()
    ],
    "/tidelog.v1.ObjectService/GetObject": [object_pb2.GetObjectRequest(entity="Task", id="a").SerializeToString()],
    "/tidelog.v1.ObjectService/ListObjects": [
        object_pb2.ListObjectsRequest(
            entity="Task", page_size=2, where=(attribute("count") >= 1).to_message()
        ).SerializeToString()
    ],
    "/tidelog.v1.SchemaService/GetSchema": [schema_pb2.GetSchemaRequest().SerializeToString()],
    "/tidelog.v1.FailureService/ListFailures": [
        failure_pb2.ListFailuresRequest(page_size=2, entity="Task", replica_id=REPLICAS[0]).SerializeToString()
    ],
    "/tidelog.v1.FailureService/GetFailure": [],
    "/tidelog.v1.FailureService/RetryFailure": [],
    "/tidelog.v1.FailureService/DismissFailure": [],
}


class HostileClients(RuleBasedStateMachine):
    """The machine: see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        self._outcomes: dict[tuple[str, str, int], operation_pb2.OperationResult] = {}
        self._newest: dict[tuple[str, str], Stream] = {}
        self._cursors: dict[str, list[bytes]] = {"north": [], "south": []}
        self._tokens: list[bytes] = [b""]
        self._streams: list[Stream] = []
        self._sent: list[list[bytes]] = []
        self._numbers = itertools.count(1)
        self._highest = 0  # of the positions that any replica used, but for absurd ones

    @initialize()
    def begin(self) -> None:
        """Start a server, and a first session."""
        folder = self._open.enter_context(quick_folder())
        application = Application(schema=APPLICATION.schema, operators=["operator"])
        tokens = StaticTokens(USERS)
        self._world = self._open.enter_context(World(folder, application, authenticator=tokens))
        self._channel = self._world.channel()
        self._begin_well()

    def _begin_well(self) -> None:
        replica = REPLICAS[len(self._streams) % 2]
        user = self._owner("north", replica) or "ann"
        self.start(user, replica, unknown_fields=False, mode=1, uploading=True, cursor="", token=0, wish="")
        assert self.sessions, "a good start was refused"

    def teardown(self) -> None:
        """Let a well-behaved replica go on, as if nothing had been."""
        if not hasattr(self, "_world"):
            return
        try:
            self._good_replica("last", "bob")
        finally:
            self._open.close()

    @property
    def sessions(self) -> list[Stream]:
        """The sessions that are open, as far as their clients know."""
        return [stream for stream in self._streams if stream.is_open]

    def _picked(self, pick: int) -> Stream:
        """Return one of the open sessions, a new one rather than an old one; there is always one."""
        if not self.sessions:
            self._begin_well()
        return self.sessions[-1 - pick % len(self.sessions)]

    # --- sessions -----------------------------------------------------------------

    @rule(
        user=users,
        replica=st.sampled_from(REPLICAS),
        mode=st.sampled_from([1, 2, 3]),
        uploading=st.sampled_from([True, True, True, False]),
        cursor=st.sampled_from(["", "own", "other", "garbage"]),
        token=st.integers(0, 3),
        wish=st.sampled_from(["", "none"]),
        unknown_fields=st.booleans(),
    )
    def start(self, user: str, replica: str, *, unknown_fields: bool, **wishes: Any) -> None:
        """A session of one's own replica begins, whatever it says of where it stands; others' are refused."""
        stream = self._stream(user)
        answer = self._started(stream, self._start(user, replica, **wishes), unknown_fields=unknown_fields)
        tenant = USERS[user].tenant
        if answer is None:
            assert self._owner(tenant, replica) not in (None, user), "a good start was refused"
            return
        assert self._owner(tenant, replica) in (None, user), "somebody else's replica was given away"
        assert answer.tenant == tenant
        stream.replica, stream.uploads, stream.is_selected = replica, wishes["uploading"], wishes["mode"] == SELECTED
        if stream.uploads:
            self._newest[tenant, replica] = stream
        self._streams.append(stream)

    @rule(
        user=users,
        wrong=st.sampled_from(
            [
                {"replica": ""},
                {"replica": "nobody"},
                {"replica": str(uuid.UUID(int=0))},
                {"replica": REPLICAS[0].replace("-", "")},
                {"mode": 0},
                {"mode": 9},
                {"version": 0},
                {"version": 2},
                {"version": -1},
                {"bound": "zoe"},
                {"wish": "where"},
                {"wish": "mode"},
                {"wish": "name"},
                None,
            ]
        ),
        data=st.binary(max_size=30),
    )
    def start_badly(self, user: str, wrong: dict[str, Any] | None, data: bytes) -> None:
        """A session that begins with nonsense does not begin."""
        stream = self._stream(user)
        if wrong is not None:
            assert self._started(stream, self._start(user, **{"replica": REPLICAS[0], **wrong})) is None
        else:
            stream.send(data)
            assert stream.receive() is None

    def _stream(self, user: str) -> Stream:
        return Stream(self._channel.stream_stream(SYNC + "Synchronize"), user)

    def _start(
        self,
        user: str,
        replica: str,
        *,
        mode: int = 1,
        uploading: bool = True,
        version: int = 1,
        cursor: str = "",
        token: int = 0,
        wish: str = "",
        bound: str = "",
    ) -> sync_pb2.SessionStart:
        tenant = USERS[user].tenant
        others = "south" if tenant == "north" else "north"
        known = {"own": self._cursors[tenant], "other": self._cursors[others], "garbage": [b"\x1a\xff\x07garbage"]}
        return sync_pb2.SessionStart(
            protocol_version=version,
            replica_id=replica,
            mode=mode,  # type: ignore[arg-type]  # any number
            cursor=next(iter(known.get(cursor, [])[-1:]), b""),
            resume_token=self._tokens[min(token, len(self._tokens) - 1)],
            uploading=uploading,
            accepts_confirmations=True,
            bound_user_id=bound,
            downloads=_WISHES[wish],
        )

    def _started(
        self, stream: Stream, start: sync_pb2.SessionStart, *, unknown_fields: bool = False
    ) -> sync_pb2.SessionStarted | None:
        extra = b"\xfa\x3f\x03new" if unknown_fields else b""
        stream.send(
            splice_pb2.SynchronizeRequestSplice(start=start.SerializeToString() + extra).SerializeToString() + extra
        )
        answer = stream.receive()
        assert answer is None or answer.WhichOneof("message") == "started"
        return None if answer is None else answer.started

    @rule(pick=picks, place=st.integers(0, 9))
    def upload_again(self, pick: int, place: int) -> None:
        """What was sent before, by another session of the replica or by another replica, comes again."""
        stream = self._picked(pick)
        if self._sent:
            self._upload(stream, self._sent[-1 - place % len(self._sent)])

    @rule(pick=picks, chosen=st.data())
    def upload(self, pick: int, chosen: st.DataObject) -> None:
        """A batch of nonsense is settled, or ends the session and leaves nothing behind."""
        stream = self._picked(pick)
        self._upload(stream, chosen.draw(hostile_batches(stream.last_seq)))

    @rule(pick=picks, chosen=st.data())
    def upload_more(self, pick: int, chosen: st.DataObject) -> None:
        """The same, so that it happens often."""
        self.upload(pick, chosen)

    @rule(pick=picks, count=st.integers(1, 3))
    def upload_well(self, pick: int, count: int) -> None:
        """Whatever others did, a session that keeps to the rules goes on."""
        stream = self._picked(pick)
        if not stream.uploads or stream.last_seq > SEQ_MAX // 2:
            return
        tenant = USERS[stream.user].tenant
        if self._newest[tenant, stream.replica] is not stream:
            return
        operations: list[bytes] = []
        for _ in range(count):
            number = self._highest + 1 + len(operations)
            operations.append(make_operation(seq=number, id=f"good-{number}", set={"title": "good"}).encode())
        results = self._upload(stream, operations)
        assert results is not None, "a good batch was refused"
        assert all(one.status == operation_pb2.OPERATION_STATUS_APPLIED for one in results)

    def _upload(self, stream: Stream, operations: list[bytes]) -> list[operation_pb2.OperationResult] | None:
        tenant = USERS[stream.user].tenant
        before = self._state(tenant)
        stream.send(batch_of(operations))
        self._sent.append(operations)
        answer = stream.receive()
        if answer is None:
            assert self._state(tenant) == before, "a refused batch left something behind"
            return None
        assert answer.WhichOneof("message") == "batch_results"
        results = list(answer.batch_results.results)
        assert len(results) == len(operations)
        self._highest = max([self._highest, *(seq for seq in map(_seq, operations) if seq <= SEQ_MAX // 2)])
        for data, result in zip(operations, results, strict=True):
            seq = max(_seq(data), 0)
            assert result.seq == seq
            stream.last_seq = max(stream.last_seq, seq)
        self._note(tenant, stream.replica, results, dict(zip((one.seq for one in results), operations, strict=True)))
        return results

    @rule(
        pick=picks,
        keys=st.lists(st.tuples(st.sampled_from(["Task", "", "No\0te", "x" * 65]), ids), max_size=3),
    )
    def select(self, pick: int, keys: list[tuple[str, str]]) -> None:
        """Objects are selected, in a session of whatever mode, some of which cannot be."""
        stream = self._picked(pick)
        stream.send(
            request(selection=sync_pb2.Selection(keys=[sync_pb2.ObjectKey(entity=one, id=two) for one, two in keys]))
        )
        if not stream.is_selected or any(entity != "Task" for entity, _ in keys):
            assert stream.receive() is None

    @rule(
        pick=picks,
        how=st.sampled_from(["complete", "complete", "too early", "hang up", "garbage"]),
        data=st.binary(max_size=8) | mutated(st.just(b"\x12\x00")),
    )
    def end(self, pick: int, how: str, data: bytes) -> None:
        """A session ends as it should, in the middle, or with bytes that are no message, or none to come there."""
        stream = self._picked(pick)
        if how == "complete":
            stream.send(request(upload_complete=sync_pb2.UploadComplete()))
            stream.half_close()
            self._read_to_the_end(stream)
        elif how == "hang up":
            stream.cancel()
        elif how == "too early":
            stream.half_close()
            assert stream.receive() is None
        elif _kind(data) in (None, "start"):
            stream.send(data)
            assert stream.receive() is None

    def _read_to_the_end(self, stream: Stream) -> None:
        tenant = USERS[stream.user].tenant
        kinds = []
        while (answer := stream.receive()) is not None:
            kinds.append(answer.WhichOneof("message"))
            if kinds[-1] == "upload_settled":
                self._note(tenant, stream.replica, answer.upload_settled.results, {})
            if kinds[-1] == "page" and answer.page.resume_token:
                self._tokens.append(answer.page.resume_token)
            if kinds[-1] == "complete" and answer.complete.cursor:
                self._cursors[tenant].append(answer.complete.cursor)
        if kinds:
            assert kinds[0] == "upload_settled"
            assert kinds[-1] == "complete"
            assert set(kinds[1:-1]) <= {"page", "upload_settled"}

    # --- other calls ----------------------------------------------------------------

    @rule(
        method=st.sampled_from(sorted(UNARY)),
        user=st.sampled_from([*sorted(USERS), "nobody"]),
        choice=st.integers(0, 5),
        chosen=st.data(),
    )
    def call(self, method: str, user: str, choice: int, chosen: st.DataObject) -> None:
        """A call of another service, whatever it says, is answered or refused as documented."""
        known = [*UNARY[method], *self._about_failures(method)]
        data = known[choice % len(known)] if known else b""
        if choice:
            data = chosen.draw(mutated(st.just(data)) | st.binary(max_size=30))
        before = {tenant: self._state(tenant) for tenant in self._cursors}
        headers = (("authorization", f"Bearer {user}"),)
        try:
            unary: Any = self._channel.unary_unary(method)
            unary(data, timeout=ANSWER_SECONDS_MAX, metadata=headers)
        except grpc.RpcError as error:
            reason = check_refusal(error)
            assert (reason == "UNAUTHENTICATED") == (user not in USERS)
            assert {tenant: self._state(tenant) for tenant in before} == before, "a refused call left something behind"
        else:
            assert user in USERS
            own = USERS[user].tenant
            assert all(self._state(tenant) == before[tenant] for tenant in before if tenant != own)

    def _about_failures(self, method: str) -> list[bytes]:
        failures = [one.id for tenant in self._cursors for one in self._failures(tenant)]
        kind: Any = {
            "GetFailure": failure_pb2.GetFailureRequest,
            "RetryFailure": failure_pb2.RetryFailureRequest,
            "DismissFailure": failure_pb2.DismissFailureRequest,
        }.get(method.rpartition("/")[2])
        return [kind(id=one).SerializeToString() for one in [*failures[-3:], "none"]] if kind else []

    @rule(user=users)
    def synchronize_well(self, user: str) -> None:
        """A well-behaved replica notices nothing of all that."""
        self._good_replica(f"good-{next(self._numbers)}", user)

    # --- what must hold ---------------------------------------------------------------

    @invariant()
    def the_store_is_sound(self) -> None:
        """The history has no hole, and no operation stands in it twice."""
        if not hasattr(self, "_world"):
            return
        for tenant in self._cursors:
            with self._world.store.read(tenant) as reader:
                head = reader.head()
                changes = reader.changes(0, 100_000, 1 << 30)
            assert [change.version for change in changes] == list(range(1, head.version + 1)), "a hole in the history"
            done = [(one.replica, one.seq, one.key, one.kind) for one in changes if one.seq and not one.failure]
            assert len(done) == len(set(done)), "an operation was applied twice"
            for (of_tenant, replica, seq), result in self._outcomes.items():
                if of_tenant == tenant and result.version:
                    known = [one for one in changes if one.replica == uuid.UUID(replica).bytes and one.seq == seq]
                    assert any(one.version <= result.version for one in known) or not known

    def _note(
        self,
        tenant: str,
        replica: str,
        results: Any,
        operations: dict[int, bytes],
    ) -> None:
        """Check results against the store, and against what was said before."""
        failures = {one.id: one for one in self._failures(tenant)}
        for result in results:
            if result.status == operation_pb2.OPERATION_STATUS_REJECTED:
                record = failures[result.failure_id]
                assert record.replica_id == replica
                sent = operations.get(result.seq)
                former = self._outcomes.get((tenant, replica, result.seq))
                if sent is not None and former is None and result.seq:
                    assert sent in (record.operation, *record.group_operations), "a refusal without its payload"
            if result.seq and result.status in (
                operation_pb2.OPERATION_STATUS_APPLIED,
                operation_pb2.OPERATION_STATUS_REJECTED,
            ):
                known = self._outcomes.setdefault((tenant, replica, result.seq), result)
                assert (known.status, known.version, known.failure_id) == (
                    result.status,
                    result.version,
                    result.failure_id,
                ), "an operation has two outcomes"

    def _state(self, tenant: str) -> Any:
        with self._world.store.read(tenant) as reader:
            return reader.head(), [one for one, _ in reader.failures(b"", 100_000, 1 << 30)]

    def _failures(self, tenant: str) -> list[failure_pb2.SynchronizationFailure]:
        with self._world.store.read(tenant) as reader:
            found = reader.failures(b"", 100_000, 1 << 30)
        return [failure_pb2.SynchronizationFailure.FromString(data) for _, data in found]

    def _owner(self, tenant: str, replica: str) -> str | None:
        with self._world.store.read(tenant) as reader:
            known = reader.replica(uuid.UUID(replica).bytes)
        return None if known is None else known.user_id

    def _good_replica(self, name: str, user: str) -> None:
        tenant = USERS[user].tenant
        replica = self._world.replica(name, token=user)
        id_ = replica.create("Task", {"title": name})
        report = replica.synchronize_all()
        assert (report.applied, report.rejected) == (1, 0)
        with self._world.store.read(tenant) as reader:
            objects, _ = reader.entity_objects("Task", "", 100_000, 1 << 30)
        assert sorted(contents(replica)) == sorted(key[1] for key, state in objects if not state.deleted)
        assert contents(replica)[id_]["title"] == name
        replica.close()


_WISHES: Final[dict[str, list[sync_pb2.EntityDownload]]] = {
    "": [],
    "where": [
        sync_pb2.EntityDownload(
            entity="Task", mode=DownloadMode.WHERE.number, where=(attribute("count") == "text").to_message()
        )
    ],
    "mode": [sync_pb2.EntityDownload(entity="Task", mode=DownloadMode.WHERE.number)],
    "name": [sync_pb2.EntityDownload(entity="x" * 65, mode=DownloadMode.ALL.number)],
    "none": [sync_pb2.EntityDownload(entity="Note", mode=99)],  # type: ignore[arg-type]  # any number
}

TestHostileClients = HostileClients.TestCase
TestHostileClients.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    stateful_step_count=40,
    phases=[Phase.generate],  # to shrink takes minutes
)

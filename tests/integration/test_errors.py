from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from tests.builders import (
    REPLICA_B,
    World,
    contents,
    create,
    delete,
    group,
    make_operation,
    nested,
    packed,
    quick_folder,
    references_schema,
    update,
)

from tidelog import (
    FailureReason,
    NotConfigured,
    PermissionRefused,
    ProtocolUnsupported,
    ProtocolViolated,
    ReplicaForked,
    ResourceClosed,
    ServerUnavailable,
    SynchronizationError,
    TidelogError,
    attribute,
)
from tidelog._limits import MESSAGE_BYTES_MAX, OPERATION_BYTES_MAX
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import (
    constraint_pb2,
    failure_pb2,
    failure_pb2_grpc,
    object_pb2,
    operation_pb2,
    sync_pb2,
)
from tidelog_client import Phase, Progress
from tidelog_client import _connection as connection
from tidelog_client import _synchronizer as synchronizer
from tidelog_server import Application, HookContext, HookObject, Reject, Server, TransientError
from tidelog_server._errors import ReplicaOwned

REPLICA = "00000000-0000-4000-8000-000000000001"
SYNC = "/tidelog.v1.SyncService"
FAILURES = "/tidelog.v1.FailureService"
OBJECTS = "/tidelog.v1.ObjectService"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first back-off exceed any deadline, so that a call gives up at its first transient error."""
    monkeypatch.setattr(synchronizer, "BACKOFF_SECONDS_FIRST", 1_000)


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """Give a server whose application rejects tasks that are bad."""
    application = Application()

    @application.before_commit("Task")
    def rejects(task: HookObject, context: HookContext) -> None:
        if task["bad"]:
            raise Reject("bad")

    with World(folder, application) as found:
        yield found


class Answer:
    """How a call ended: its responses, and of its status the code, the reason and the text."""

    def __init__(self, responses: Sequence[bytes], error: grpc.RpcError | None) -> None:
        self.responses = responses
        self.code = grpc.StatusCode.OK if error is None else error.code()
        self.details = "" if error is None else error.details() or ""
        self.reason = ""
        self.domain = ""
        self.size_bytes = sum(map(len, responses))
        status = None if error is None else rpc_status.from_call(error)  # type: ignore[arg-type]  # it is a Call too
        for detail in status.details if status is not None else ():
            info = ErrorInfo()
            if detail.Unpack(info):
                self.reason, self.domain = info.reason, info.domain

    def check_discreet(self, world: World) -> None:
        """Fail if the answer tells how the server is made or where it lies."""
        for text in (self.details, self.reason, *(str(response) for response in self.responses)):
            assert "Traceback" not in text
            assert ".py" not in text
            assert str(world.folder) not in text


def call(world: World, method: str, data: bytes) -> Answer:
    """Call a unary method with raw bytes."""
    try:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = world.channel().unary_unary(method)
        return Answer([unary(data, timeout=10)], None)
    except grpc.RpcError as error:
        return Answer([], error)


def stream(world: World, method: str, messages: Sequence[bytes]) -> Answer:
    """Call a method that streams, with raw bytes."""
    responses: list[bytes] = []
    channel: Any = world.channel()
    calls: Iterator[bytes] = (
        channel.stream_stream(method)(iter(messages), timeout=10)
        if method.endswith("/Synchronize")
        else channel.unary_stream(method)(messages[0], timeout=10)
    )
    try:
        responses.extend(calls)
    except grpc.RpcError as error:
        return Answer(responses, error)
    return Answer(responses, None)


def download_request(**fields: Any) -> bytes:
    """Return a serialized request of a download."""
    return sync_pb2.DownloadSnapshotsRequest(protocol_version=1, **fields).SerializeToString()


def start(**fields: Any) -> bytes:
    """Return the first message of a session."""
    usual: dict[str, Any] = {"protocol_version": 1, "replica_id": REPLICA, "mode": sync_pb2.SYNCHRONIZE_MODE_ALL}
    usual["uploading"] = True
    message = sync_pb2.SessionStart(**usual | fields)
    return splice_pb2.SynchronizeRequestSplice(start=message.SerializeToString()).SerializeToString()


def batch(*operations: bytes) -> bytes:
    """Return a message with a batch."""
    return splice_pb2.SynchronizeRequestSplice(
        batch=splice_pb2.OperationBatchSplice(operations=operations)
    ).SerializeToString()


def selection(*keys: tuple[str, str]) -> bytes:
    """Return a message with a selection."""
    message = sync_pb2.Selection(keys=[sync_pb2.ObjectKey(entity=entity, id=id_) for entity, id_ in keys])
    return splice_pb2.SynchronizeRequestSplice(selection=message.SerializeToString()).SerializeToString()


COMPLETE = splice_pb2.SynchronizeRequestSplice(upload_complete=b"").SerializeToString()


def upload(*operations: bytes, **fields: Any) -> bytes:
    """Return an upload request for clients without streams."""
    usual: dict[str, Any] = {"protocol_version": 1, "replica_id": REPLICA, "operations": operations}
    return splice_pb2.UploadOperationsRequestSplice(**usual | fields).SerializeToString()


def results_of(answer: Answer) -> list[operation_pb2.OperationResult]:
    """Return the results in a session's responses."""
    found: list[operation_pb2.OperationResult] = []
    for data in answer.responses:
        response = sync_pb2.SynchronizeResponse.FromString(data)
        found += [*response.batch_results.results, *response.upload_settled.results]
    return found


def check_alive(world: World) -> None:
    """Fail unless the server still serves."""
    replica = world.replica("alive")
    replica.create("Task", {"alive": True}, "alive")
    assert replica.synchronize_all(timeout=10).applied == 1
    replica.delete("Task", "alive")
    assert replica.synchronize_all(timeout=10).applied == 1
    replica.close()


class TestOutages:
    @pytest.mark.slow
    def test_nobody_listens(self, world: World) -> None:
        """Without a server the call ends by its deadline, nothing is lost, and the next call finishes the job."""
        a = world.replica()
        a.create("Task", {}, "t1")
        address = world.server.address
        world.server.stop(grace_seconds=0)

        with pytest.raises(ServerUnavailable) as caught:  # one that never ends is ended by the runner
            a.synchronize_all(timeout=0.5)

        assert address in str(caught.value)
        assert a.pending_count() == 1
        assert contents(a) == {"t1": {}}
        with world.made_server(address):
            assert a.synchronize_all(timeout=10).applied == 1

    def test_no_time_at_all(self, world: World) -> None:
        """A deadline that has passed already is a typed error; a later call finishes the job."""
        a = world.replica()
        a.create("Task", {})

        with pytest.raises(ServerUnavailable):
            a.synchronize_all(timeout=0)

        assert a.synchronize_all().applied == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("phase", [Phase.UPLOAD, Phase.DOWNLOAD])
    def test_the_server_goes_in_the_middle(self, folder: Path, phase: Phase) -> None:
        """A server that stops in mid-session and comes back later finds everything where it was."""
        with World(folder) as world:
            world.lab.settle(create(1, "theirs"), replica=REPLICA_B)
            a = world.replica()
            address = world.server.address
            with a.transaction() as tx:
                for n in range(1_200):
                    tx.create("Task", {"n": n}, f"t{n}")
                tx.create("Counter", {"n": 0}, "c")
                tx.update("Counter", "c", increment={"n": 1})

            def stops(progress: Progress) -> None:
                if progress.phase is phase:
                    world.server.stop(grace_seconds=0)

            # What had arrived already when the server went may be enough.
            with suppress(ServerUnavailable):
                a.synchronize_all(timeout=0.5, on_progress=stops)

            with world.made_server(address):
                a.synchronize_all(timeout=10)
                assert a.pending_count() == 0
                assert len(contents(a)) == 1_201
                assert contents(a, "Counter") == {"c": {"n": 1}}
                assert world.lab.version() == 1_203
                world.lab.check_history()

    @pytest.mark.slow
    @pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.UPLOAD, Phase.DOWNLOAD])
    def test_the_server_restarts_in_the_middle(self, folder: Path, phase: Phase) -> None:
        """A server that restarts in mid-session is found again by the same call."""
        with quick_folder() as data, World(folder) as world:
            server = Server(Application(), store=data).start()
            address = server.address
            servers = [server]
            a = world.replica(server=address)
            a.create("Counter", {"n": 0}, "c")
            a.update("Counter", "c", increment={"n": 1})

            def restarts(progress: Progress) -> None:
                if progress.phase is phase and len(servers) == 1:
                    servers[0].stop(grace_seconds=0)
                    servers.append(Server(Application(), store=data, listen=address).start())

            a.synchronize_all(timeout=20, on_progress=restarts)

            assert a.pending_count() == 0
            assert contents(a, "Counter") == {"c": {"n": 1}}
            with servers[-1]._store.read("default") as reader:
                assert reader.head().version == 2
            servers[-1].stop(grace_seconds=0)

    def test_a_call_that_grpc_does_not_end(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A synchronization ends when its time is over, whatever gRPC does; the next one has a new channel."""
        over = threading.Event()
        receive = connection.Stream._receive

        def stuck(self: connection.Stream, *arguments: Any) -> None:
            monkeypatch.setattr(connection.Stream, "_receive", receive)
            over.wait(60)

        with World(folder) as world:
            a = world.replica()
            a.synchronize_all()
            a.create("Task", {}, "t1")
            used = cast("connection.Connection", a._synchronizer._connection)
            channel = used._channel
            monkeypatch.setattr(connection, "END_SECONDS_MAX", 0.05)
            monkeypatch.setattr(connection.Stream, "_receive", stuck)

            with pytest.raises(ServerUnavailable, match="gRPC did not end the call"):
                a.synchronize_all(timeout=0.05)
            over.set()

            assert a.synchronize_all().applied == 1
            assert used._channel is not channel

    @pytest.mark.slow
    def test_a_client_that_gives_up_while_its_batch_is_written(self, folder: Path) -> None:
        """A client that disconnects during its batch harms nobody: the server goes on, and so can the client."""
        entered, release = threading.Event(), threading.Event()
        application = Application()

        @application.before_commit("Slow")
        def waits(thing: HookObject, context: HookContext) -> None:
            entered.set()
            assert release.wait(30)

        with World(folder, application) as world, ThreadPoolExecutor(1) as pool:
            a, b = world.replica("a"), world.replica("b")
            a.create("Slow", {}, "s")
            b.create("Task", {}, "t")
            going = pool.submit(a.synchronize_all, timeout=1)
            assert entered.wait(30)
            with pytest.raises(ServerUnavailable):
                going.result(30)
            release.set()

            assert b.synchronize_all(timeout=10).applied == 1
            assert a.synchronize_all(timeout=10).applied == 1
            assert contents(a, "Slow") == {"s": {}}
            assert world.lab.version() == 2

    @pytest.mark.slow
    def test_a_hook_that_cannot_tell_now(self, folder: Path) -> None:
        """A transient error is retried within the call, and never becomes a failure."""
        down = [True, True]
        application = Application()

        @application.before_commit("Task")
        def asks(task: HookObject, context: HookContext) -> None:
            if down and down.pop():
                raise TransientError("the service is down")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {}, "t1")

            report = a.synchronize_all(timeout=20)

            assert (report.applied, report.rejected, report.attempts) == (1, 0, 3)
            assert world.lab.failures() == []

    @pytest.mark.usefixtures("impatient")
    def test_a_hook_that_cannot_tell_for_long(self, folder: Path) -> None:
        """A transient error that lasts ends the call by its deadline; the operation stays pending."""
        application = Application()

        @application.before_commit("Task")
        def asks(task: HookObject, context: HookContext) -> None:
            raise TransientError("the service is down " + "x" * 100_000)

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {}, "t1")

            with pytest.raises(ServerUnavailable, match="the service is down"):
                a.synchronize_all(timeout=60)

            assert a.pending_count() == 1
            assert world.lab.failures() == []

    @pytest.mark.usefixtures("impatient")
    def test_an_error_tells_what_was_done(self, folder: Path) -> None:
        """An error in mid-synchronization carries the report of what was settled before it."""
        application = Application()

        @application.before_commit("Task")
        def asks(task: HookObject, context: HookContext) -> None:
            if task["bad"]:
                raise Reject("bad")
            if task["wait"]:
                raise TransientError("the service is down")

        with World(folder, application) as world:
            a = world.replica()
            with a.transaction() as tx:
                for n in range(500):
                    tx.create("Task", {"bad": n == 7}, f"t{n}")
                tx.create("Task", {"wait": True}, "waits")

            with pytest.raises(ServerUnavailable) as caught:
                a.synchronize_all(timeout=60)

            report = caught.value.report
            assert (report.applied, report.rejected) == (499, 1)
            assert [failure.object_id for failure in report.failures] == ["t7"]
            assert a.pending_count() == 1

    def test_an_observer_that_breaks(self, world: World) -> None:
        """What the progress callback raises reaches the caller; the replica is as usable as before."""
        a = world.replica()
        a.create("Task", {}, "t1")

        def breaks(progress: Progress) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            a.synchronize_all(on_progress=breaks)

        assert a.synchronize_all().applied == 1

    def test_no_server_was_named(self, folder: Path, world: World) -> None:
        """A replica that was opened without a server says so."""
        with pytest.raises(NotConfigured):
            world.replica(server=None).synchronize_all()

    def test_a_closed_replica(self, world: World) -> None:
        """Synchronizing a closed replica says that it is closed."""
        a = world.replica()
        a.close()

        with pytest.raises(ResourceClosed):
            a.synchronize_all()

    def test_a_copied_replica(self, world: World, folder: Path) -> None:
        """Of two copies of one replica the second to upload other operations goes on under another id."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.synchronize_all()
        a.close()
        shutil.copytree(folder / "a", folder / "copy")
        a, copy = world.replica(), world.replica("copy")
        a.create("Task", {}, "of a")
        copy.create("Task", {}, "of the copy")
        a.synchronize_all()

        report = copy.synchronize_all()

        assert report.former_replica_id == a.replica_id != copy.replica_id
        assert (report.applied, copy.pending_count()) == (1, 0)
        assert sorted(contents(copy)) == ["of a", "of the copy", "t1"]
        assert world.lab.attributes("of the copy") == {}

    def test_somebody_elses_replica(self, world: World) -> None:
        """A replica id that belongs to another user is refused, and everything stays pending."""
        a = world.replica()
        a.create("Task", {})
        world.lab.session(bytes.fromhex(a.replica_id.replace("-", "")))  # as the user "ann"

        with pytest.raises(PermissionRefused):
            a.synchronize_all()

        assert a.pending_count() == 1
        assert issubclass(ReplicaOwned, TidelogError)

    @pytest.mark.parametrize("method", ["synchronize", "upload", "download", "list", "get"])
    def test_a_store_that_fails(self, world: World, method: str) -> None:
        """When the store cannot be read or written, callers are told to come back, and not where it lies."""
        world.store.close()

        answer = {
            "synchronize": lambda: stream(world, f"{SYNC}/Synchronize", [start(), COMPLETE]),
            "upload": lambda: call(world, f"{SYNC}/UploadOperations", upload(create(1))),
            "download": lambda: stream(
                world,
                f"{SYNC}/DownloadSnapshots",
                [sync_pb2.DownloadSnapshotsRequest(protocol_version=1).SerializeToString()],
            ),
            "list": lambda: call(
                world, f"{OBJECTS}/ListObjects", object_pb2.ListObjectsRequest(entity="Task").SerializeToString()
            ),
            "get": lambda: call(
                world, f"{FAILURES}/GetFailure", failure_pb2.GetFailureRequest(id=REPLICA).SerializeToString()
            ),
        }[method]()

        assert answer.code is grpc.StatusCode.UNAVAILABLE
        answer.check_discreet(world)


class TestVersions:
    @pytest.mark.parametrize("version", [0, 2, -1, 2**31 - 1])
    def test_a_client_of_another_version(self, world: World, version: int) -> None:
        """A client that speaks another version of the protocol is told so by its reason, in every call."""
        answers = [
            stream(world, f"{SYNC}/Synchronize", [start(protocol_version=version), COMPLETE]),
            call(world, f"{SYNC}/UploadOperations", upload(create(1), protocol_version=version)),
            stream(
                world,
                f"{SYNC}/DownloadSnapshots",
                [sync_pb2.DownloadSnapshotsRequest(protocol_version=version).SerializeToString()],
            ),
        ]

        for answer in answers:
            assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
            assert (answer.domain, answer.reason) == ("tidelog", "PROTOCOL_VERSION_UNSUPPORTED")
            assert "version 1" in answer.details
        assert world.lab.version() == 0

    def test_a_method_of_another_version(self, world: World) -> None:
        """A method that the server does not have is UNIMPLEMENTED."""
        assert call(world, f"{SYNC}/Teleport", b"").code is grpc.StatusCode.UNIMPLEMENTED


def _where(**comparison: Any) -> bytes:
    return object_pb2.ListObjectsRequest(
        entity="Task", where=constraint_pb2.Constraint(comparison=constraint_pb2.Comparison(**comparison))
    ).SerializeToString()


def _deep_where(depth: int) -> bytes:
    # Spelled by hand: protobuf does not build what it would not read.
    data = attribute("a").exists().to_message().SerializeToString()
    for _ in range(depth):
        data = b"\x22" + _varint(len(data)) + data
    return object_pb2.ListObjectsRequest(entity="Task").SerializeToString() + b"\x12" + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


BAD_CALLS: dict[str, tuple[str, bytes, str]] = {
    "upload: garbage": (f"{SYNC}/UploadOperations", b"\xff\xff\xff", "REQUEST_INVALID"),
    "upload: nothing": (f"{SYNC}/UploadOperations", b"", "PROTOCOL_VERSION_UNSUPPORTED"),
    "upload: no replica": (f"{SYNC}/UploadOperations", upload(create(1), replica_id=""), "REQUEST_INVALID"),
    "upload: no UUID": (f"{SYNC}/UploadOperations", upload(create(1), replica_id="x" * 36), "REQUEST_INVALID"),
    "upload: the nil UUID": (
        f"{SYNC}/UploadOperations",
        upload(create(1), replica_id="00000000-0000-0000-0000-000000000000"),
        "REQUEST_INVALID",
    ),
    "upload: a UUID in another form": (
        f"{SYNC}/UploadOperations",
        upload(create(1), replica_id=f"{{{REPLICA}}}"),
        "REQUEST_INVALID",
    ),
    "upload: a UUID in capitals": (
        f"{SYNC}/UploadOperations",
        upload(create(1), replica_id="0000000A-0000-4000-8000-000000000001"),
        "REQUEST_INVALID",
    ),
    "upload: a megabyte of replica": (
        f"{SYNC}/UploadOperations",
        upload(create(1), replica_id="x" * 1_000_000),
        "REQUEST_INVALID",
    ),
    "upload: positions that fall": (
        f"{SYNC}/UploadOperations",
        upload(create(2, "t2"), create(1, "t1")),
        "OPERATIONS_OUT_OF_ORDER",
    ),
    "upload: one position twice": (
        f"{SYNC}/UploadOperations",
        upload(create(1, "t1"), create(1, "t2")),
        "OPERATIONS_OUT_OF_ORDER",
    ),
    "upload: too many": (
        f"{SYNC}/UploadOperations",
        upload(*[create(n, f"t{n}") for n in range(1, 1_002)]),
        "REQUEST_INVALID",
    ),
    "list failures: garbage": (f"{FAILURES}/ListFailures", b"\xff", "REQUEST_INVALID"),
    "list failures: a negative page": (
        f"{FAILURES}/ListFailures",
        failure_pb2.ListFailuresRequest(page_size=-1).SerializeToString(),
        "REQUEST_INVALID",
    ),
    "list failures: no token": (
        f"{FAILURES}/ListFailures",
        failure_pb2.ListFailuresRequest(page_token="../../etc").SerializeToString(),
        "REQUEST_INVALID",
    ),
    "list failures: no replica": (
        f"{FAILURES}/ListFailures",
        failure_pb2.ListFailuresRequest(replica_id="x").SerializeToString(),
        "REQUEST_INVALID",
    ),
    "get failure: garbage": (f"{FAILURES}/GetFailure", b"\xff", "REQUEST_INVALID"),
    "get failure: no UUID": (
        f"{FAILURES}/GetFailure",
        failure_pb2.GetFailureRequest(id="1").SerializeToString(),
        "REQUEST_INVALID",
    ),
    "get failure: unknown": (
        f"{FAILURES}/GetFailure",
        failure_pb2.GetFailureRequest(id=REPLICA).SerializeToString(),
        "FAILURE_NOT_FOUND",
    ),
    "get object: garbage": (f"{OBJECTS}/GetObject", b"\xff", "REQUEST_INVALID"),
    "get object: no name": (f"{OBJECTS}/GetObject", b"", "REQUEST_INVALID"),
    "get object: a NUL": (
        f"{OBJECTS}/GetObject",
        object_pb2.GetObjectRequest(entity="Ta\0sk", id="t1").SerializeToString(),
        "REQUEST_INVALID",
    ),
    "get object: too long": (
        f"{OBJECTS}/GetObject",
        object_pb2.GetObjectRequest(entity="Task", id="x" * 10_000).SerializeToString(),
        "REQUEST_INVALID",
    ),
    "get object: unknown": (
        f"{OBJECTS}/GetObject",
        object_pb2.GetObjectRequest(entity="Task", id="t1").SerializeToString(),
        "OBJECT_NOT_FOUND",
    ),
    "list objects: garbage": (f"{OBJECTS}/ListObjects", b"\xff", "REQUEST_INVALID"),
    "list objects: no entity": (f"{OBJECTS}/ListObjects", b"", "REQUEST_INVALID"),
    "list objects: a negative page": (
        f"{OBJECTS}/ListObjects",
        object_pb2.ListObjectsRequest(entity="Task", page_size=-5).SerializeToString(),
        "REQUEST_INVALID",
    ),
    "list objects: a token too long": (
        f"{OBJECTS}/ListObjects",
        object_pb2.ListObjectsRequest(entity="Task", page_token="x" * 1_000).SerializeToString(),
        "REQUEST_INVALID",
    ),
    "list objects: no expression": (
        f"{OBJECTS}/ListObjects",
        object_pb2.ListObjectsRequest(entity="Task", where=constraint_pb2.Constraint()).SerializeToString(),
        "CONSTRAINT_INVALID",
    ),
    "list objects: an unknown operator": (
        f"{OBJECTS}/ListObjects",
        _where(attribute="a", operator=99, value=packed(1)),
        "CONSTRAINT_INVALID",
    ),
    "list objects: no value": (f"{OBJECTS}/ListObjects", _where(attribute="a", operator=1), "CONSTRAINT_INVALID"),
    "list objects: no attribute": (
        f"{OBJECTS}/ListObjects",
        _where(attribute="", operator=1, value=packed(1)),
        "CONSTRAINT_INVALID",
    ),
    "list objects: in what is no list": (
        f"{OBJECTS}/ListObjects",
        _where(attribute="a", operator=7, value=packed("x" * 100_000)),
        "CONSTRAINT_INVALID",
    ),
    "list objects: less than a list": (
        f"{OBJECTS}/ListObjects",
        _where(attribute="a", operator=3, value=packed([1])),
        "CONSTRAINT_INVALID",
    ),
    "list objects: a deep value": (
        f"{OBJECTS}/ListObjects",
        _where(attribute="a", operator=1, value=b"\x91" * 10_000 + b"\x01"),
        "CONSTRAINT_INVALID",
    ),
    "list objects: a deep constraint": (f"{OBJECTS}/ListObjects", _deep_where(40), "CONSTRAINT_INVALID"),
    "list objects: too deep a constraint": (f"{OBJECTS}/ListObjects", _deep_where(120), "REQUEST_INVALID"),
}

BAD_SESSIONS: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "REQUEST_INVALID"),
    "garbage": ([b"\xff\xff"], "REQUEST_INVALID"),
    "an empty message": ([b""], "REQUEST_INVALID"),
    "a batch first": ([batch(create(1)), COMPLETE], "REQUEST_INVALID"),
    "the end first": ([COMPLETE], "REQUEST_INVALID"),
    "a start of garbage": (
        [splice_pb2.SynchronizeRequestSplice(start=b"\xff\xff").SerializeToString()],
        "REQUEST_INVALID",
    ),
    "no mode": ([start(mode=0), COMPLETE], "REQUEST_INVALID"),
    "an unknown mode": ([start(mode=99), COMPLETE], "REQUEST_INVALID"),
    "no replica": ([start(replica_id=""), COMPLETE], "REQUEST_INVALID"),
    "a second start": ([start(), start(), COMPLETE], "REQUEST_INVALID"),
    "garbage after the start": ([start(), b"\xff\xff"], "REQUEST_INVALID"),
    "an empty message after the start": ([start(), b"", COMPLETE], "REQUEST_INVALID"),
    "no end": ([start()], "REQUEST_INVALID"),
    "no end after a batch": ([start(), batch()], "REQUEST_INVALID"),
    "a batch without uploading": ([start(uploading=False), batch(create(1)), COMPLETE], "REQUEST_INVALID"),
    "a selection in mode all": ([start(), selection(("Task", "t1")), COMPLETE], "REQUEST_INVALID"),
    "a selection of garbage": (
        [start(mode=3), splice_pb2.SynchronizeRequestSplice(selection=b"\xff").SerializeToString(), COMPLETE],
        "REQUEST_INVALID",
    ),
    "a selection without a name": ([start(mode=3), selection(("", "")), COMPLETE], "REQUEST_INVALID"),
    "a selection with a NUL": ([start(mode=3), selection(("Task\0x", "t1")), COMPLETE], "REQUEST_INVALID"),
    "a selection too long": ([start(mode=3), selection(("Task", "x" * 5_000)), COMPLETE], "REQUEST_INVALID"),
    "too large a batch": (
        [start(), batch(*[create(n, f"t{n}") for n in range(1, 1_002)]), COMPLETE],
        "REQUEST_INVALID",
    ),
    "positions that fall": ([start(), batch(create(5, "t5"), create(4, "t4")), COMPLETE], "OPERATIONS_OUT_OF_ORDER"),
}


class TestBadRequests:
    @pytest.mark.parametrize(("method", "data", "reason"), BAD_CALLS.values(), ids=BAD_CALLS)
    def test_a_bad_call(self, world: World, method: str, data: bytes, reason: str) -> None:
        """A request that makes no sense is a status with a reason; nothing is written, the server lives on."""
        answer = call(world, method, data)

        assert (answer.domain, answer.reason) == ("tidelog", reason)
        assert answer.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        assert answer.details
        answer.check_discreet(world)
        assert world.lab.version() == 0
        assert world.lab.failures() == []
        check_alive(world)

    @pytest.mark.parametrize(("messages", "reason"), BAD_SESSIONS.values(), ids=BAD_SESSIONS)
    def test_a_bad_session(self, world: World, messages: list[bytes], reason: str) -> None:
        """A session that breaks the protocol ends with a reason; nothing is written, the server lives on."""
        answer = stream(world, f"{SYNC}/Synchronize", messages)

        assert (answer.code, answer.domain, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "tidelog", reason)
        answer.check_discreet(world)
        assert world.lab.version() == 0
        assert world.lab.failures() == []
        check_alive(world)

    def test_a_bad_batch_behind_a_good_one(self, world: World) -> None:
        """What was settled before a session broke the protocol stays settled, and nothing behind it."""
        answer = stream(
            world,
            f"{SYNC}/Synchronize",
            [
                start(),
                batch(create(1, "t1")),
                batch(create(3, "t3"), create(2, "t2")),
                batch(create(4, "t4")),
                COMPLETE,
            ],
        )

        assert answer.reason == "OPERATIONS_OUT_OF_ORDER"
        assert [change.key[1] for change in world.lab.changes()] == ["t1"]
        assert [result.seq for result in results_of(answer)] == [1]

    def test_positions_that_fall_from_batch_to_batch(self, world: World) -> None:
        """Positions rise over the batches of a session too."""
        answer = stream(
            world, f"{SYNC}/Synchronize", [start(), batch(create(5, "t5")), batch(create(4, "t4")), COMPLETE]
        )

        assert answer.reason == "OPERATIONS_OUT_OF_ORDER"
        assert [change.key[1] for change in world.lab.changes()] == ["t5"]

    def test_another_log_under_the_same_name(self, world: World) -> None:
        """A settled position that comes with another nonce ends the session with REPLICA_FORKED."""
        stream(world, f"{SYNC}/Synchronize", [start(), batch(create(1)), COMPLETE])

        answers = [
            stream(world, f"{SYNC}/Synchronize", [start(), batch(create(1, "other", nonce=9)), COMPLETE]),
            call(world, f"{SYNC}/UploadOperations", upload(create(1, "other", nonce=9))),
        ]

        for answer in answers:
            assert (answer.code, answer.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REPLICA_FORKED")
        assert world.lab.version() == 1

    def test_somebody_elses_name(self, world: World) -> None:
        """The replica id of another user is refused with REPLICA_OWNED, uploading or not."""
        world.lab.session(bytes.fromhex(REPLICA.replace("-", "")))  # as the user "ann"

        answers = [
            stream(world, f"{SYNC}/Synchronize", [start(), COMPLETE]),
            stream(world, f"{SYNC}/Synchronize", [start(uploading=False), COMPLETE]),
            call(world, f"{SYNC}/UploadOperations", upload(create(1))),
        ]

        for answer in answers:
            assert (answer.code, answer.reason) == (grpc.StatusCode.PERMISSION_DENIED, "REPLICA_OWNED")

    def test_more_selected_than_is_allowed(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A selection over all its messages is bounded."""
        monkeypatch.setattr("tidelog._limits.SELECTION_OBJECTS_MAX", 3)
        keys = [("Task", f"t{n}") for n in range(4)]

        fits = stream(world, f"{SYNC}/Synchronize", [start(mode=3), selection(*keys[:3]), COMPLETE])
        exceeds = stream(
            world, f"{SYNC}/Synchronize", [start(mode=3), selection(*keys[:2]), selection(*keys[2:]), COMPLETE]
        )

        assert fits.code is grpc.StatusCode.OK
        assert exceeds.reason == "REQUEST_INVALID"

    @pytest.mark.parametrize("field", ["cursor", "resume_token"])
    @pytest.mark.parametrize(
        "fields",
        [
            {"version": 2**63 - 1},
            {"version": -1},
            {"version": 1, "commit_id": b"x" * 10_000},
            {"epoch": "another"},
            {"timeline": "another"},
            {"scope": b"another"},
        ],
        ids=str,
    )
    def test_a_cursor_that_nobody_gave(self, world: World, field: str, fields: dict[str, Any]) -> None:
        """A cursor or token that does not fit leads to a full download, never to an error."""
        world.lab.settle(create(1))
        identity = world.store.identity
        usual: dict[str, Any] = {"epoch": identity.epoch, "timeline": identity.timeline}
        cursor = splice_pb2.Cursor(**usual | fields)
        token = splice_pb2.ResumeToken(
            start=cursor,
            epoch=cursor.epoch,
            timeline=cursor.timeline,
            scope=cursor.scope,
            position=cursor.version,
            first_head=-1,
        )
        data = cursor.SerializeToString() if field == "cursor" else token.SerializeToString()

        answers = [
            stream(world, f"{SYNC}/Synchronize", [start(**{field: data, "uploading": False}), COMPLETE]),
            stream(
                world,
                f"{SYNC}/DownloadSnapshots",
                [download_request(**{field: data})],
            ),
        ]

        for answer in answers:
            assert answer.code is grpc.StatusCode.OK
            assert b"Buy milk" in b"".join(answer.responses)

    @pytest.mark.parametrize("data", [b"\xff\xff", b"\x00" * 100, b"x" * 100_000])
    def test_a_cursor_of_garbage(self, world: World, data: bytes) -> None:
        """A cursor of garbage is no cursor."""
        world.lab.settle(create(1))

        answer = stream(
            world, f"{SYNC}/Synchronize", [start(cursor=data, resume_token=data, uploading=False), COMPLETE]
        )

        assert answer.code is grpc.StatusCode.OK
        assert b"Buy milk" in b"".join(answer.responses)

    @pytest.mark.slow
    def test_a_message_too_large(self, world: World) -> None:
        """A message over the limit is refused by its size, and the server lives on."""
        huge = upload(create(1, set={"a": "x" * MESSAGE_BYTES_MAX}))

        assert call(world, f"{SYNC}/UploadOperations", huge).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = stream(world, f"{SYNC}/Synchronize", [start(), b"x" * (MESSAGE_BYTES_MAX + 1)])
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        check_alive(world)

    def test_a_client_that_hangs_up(self, world: World) -> None:
        """A client that cancels at any point leaves nothing behind that would hinder others."""
        calls: grpc.StreamStreamMultiCallable[bytes, bytes] = world.channel().stream_stream(f"{SYNC}/Synchronize")
        for messages in ([], [start()], [start(), batch(create(1))], [start(), batch(create(1)), COMPLETE]):
            hold = threading.Event()

            def requests(messages: list[bytes] = messages, hold: threading.Event = hold) -> Iterator[bytes]:
                yield from messages
                hold.wait(10)

            going = calls(requests())
            if messages:
                next(going)
            going.cancel()
            hold.set()

        check_alive(world)


UNREADABLE = {
    "garbage": b"\xff\xff\xff",
    "no UTF-8": b"\x08\x01\x22\x02\xff\xfe",
    "an unknown kind": b"\x08\x07\x18\x63\x22\x04Task\x2a\x01x",
    "no MessagePack": make_operation(seq=7, patch=b"\xc1").encode(),
    "hostile nesting": make_operation(seq=7, patch=b"\x81\xa3set\x81\xa1a" + b"\x91" * 50_000 + b"\x01").encode(),
    "a bomb of lengths": make_operation(seq=7, patch=b"\x81\xa3set\x81\xa1a\xdd\xff\xff\xff\xff").encode(),
    "hostile maps": make_operation(seq=7, patch=b"\x81\xa3set" + b"\x81\xa1a" * 50_000 + b"\x01").encode(),
    "an unset of lists": make_operation("update", seq=7, patch=packed({"unset": [["a"], {}]})).encode(),
    "a wrong type": make_operation("update", seq=7, patch=packed({"increment": {"a": "b"}})).encode(),
    "over 1 MiB": make_operation(seq=7, set={"a": "x" * OPERATION_BYTES_MAX}).encode(),
    "half a group": group(make_operation(seq=7), make_operation(seq=8))[0],
    "the largest numbers": make_operation(seq=2**63 - 1, base_version=2**63 - 1, nonce=2**64 - 1, id="t\0").encode(),
}


class TestBadOperations:
    @pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
    def test_is_a_failure_like_any_other(self, world: World, data: bytes) -> None:
        """An operation that cannot be read is refused and recorded as it came; its neighbours are applied."""
        answer = stream(world, f"{SYNC}/Synchronize", [start(), batch(create(6, "t6"), data), COMPLETE])

        assert answer.code is grpc.StatusCode.OK
        good, bad = results_of(answer)
        assert good.status == operation_pb2.OPERATION_STATUS_APPLIED
        assert bad.status == operation_pb2.OPERATION_STATUS_REJECTED
        assert bad.reason in (operation_pb2.FAILURE_REASON_MALFORMED, operation_pb2.FAILURE_REASON_TOO_LARGE)
        assert bad.message
        answer.check_discreet(world)
        [record] = world.lab.failures()
        assert record.operation == data
        assert record.id == bad.failure_id
        assert [change.key[1] for change in world.lab.changes()] == ["t6"]
        stub = failure_pb2_grpc.FailureServiceStub(world.channel())
        assert stub.GetFailure(failure_pb2.GetFailureRequest(id=record.id)).failure.operation == data
        assert len(stub.ListFailures(failure_pb2.ListFailuresRequest()).failures) == 1
        check_alive(world)

    def test_all_of_them_at_once(self, world: World) -> None:
        """All of them in one batch, one behind the other, leave the good ones applied."""
        messages = [data for data in UNREADABLE.values() if shown_seq(data) != 2**63 - 1]
        renumbered = [_with_seq(data, 10 + index) for index, data in enumerate(messages)]

        answer = stream(
            world,
            f"{SYNC}/Synchronize",
            [start(), batch(create(1, "first"), *renumbered, create(99, "last")), COMPLETE],
        )

        assert answer.code is grpc.StatusCode.OK
        assert [change.key[1] for change in world.lab.changes()] == ["first", "last"]
        assert len(world.lab.failures()) == len(renumbered)

    @pytest.mark.parametrize("size", [10, 900_000])
    def test_many_rejections_with_long_words(self, folder: Path, size: int) -> None:
        """However much a hook has to say about however many operations, the answer can be sent."""
        application = Application()

        @application.before_commit("Task")
        def rejects(task: HookObject, context: HookContext) -> None:
            raise Reject("x" * 100_000)

        with World(folder, application) as world:
            a = world.replica()
            with a.transaction() as tx:
                for n in range(200):
                    tx.create("Task", {"text": "x" * (size if n < 2 else 10)}, f"t{n}")

            report = a.synchronize_all(timeout=20)

            assert (report.rejected, report.attempts) == (200, 1)
            assert len(list(a.failures())) == 200

    @pytest.mark.slow
    def test_large_failures_can_be_listed(self, world: World) -> None:
        """Failures with large payloads come page by page; each can be had, that of a large commit group too."""
        a = world.replica()
        for n in range(6):
            a.create("Task", {"bad": True, "data": b"\0" * 900_000}, f"t{n}")
        with a.transaction(atomic=True) as tx:
            for n in (7, 8):
                tx.create("Task", {"bad": True, "data": b"\1" * 1_000_000}, f"t{n}")
        assert a.synchronize_all().rejected == 8
        stub = failure_pb2_grpc.FailureServiceStub(world.channel())
        found: list[str] = []
        token = ""
        while True:
            page = stub.ListFailures(failure_pb2.ListFailuresRequest(page_token=token))
            found += [failure.object_id for failure in page.failures]
            token = page.next_page_token
            if not token:
                break

        assert found == [*(f"t{n}" for n in range(6)), "t7"]
        for failure in a.failures():
            got = stub.GetFailure(failure_pb2.GetFailureRequest(id=failure.id)).failure
            assert got.operation == failure.operation_bytes
            assert len(got.group_operations) == len(failure.group_operations)

    def test_a_hook_that_breaks_says_nothing(self, folder: Path) -> None:
        """What a broken hook raises, and where, does not reach its caller."""
        application = Application()

        @application.before_commit("Task")
        def breaks(task: HookObject, context: HookContext) -> None:
            raise OSError("/etc/secrets/password is hunter2")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {}, "t1")

            [failure] = a.synchronize_all().failures

            assert failure.reason is FailureReason.HOOK_ERROR
            got = call(
                world, f"{FAILURES}/ListFailures", failure_pb2.ListFailuresRequest().SerializeToString()
            ).responses[0]
            for text in (failure.message, got.decode(errors="replace")):
                assert "hunter2" not in text
                assert "Traceback" not in text
                assert ".py" not in text

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(4))
    def test_mutated_requests(self, world: World, seed: int) -> None:
        """Whatever is done to the bytes of a request, the server answers with what the protocol provides for."""
        dice = random.Random(seed)
        world.lab.settle(create(1), update(2, set={"a": [1, "x", {"b": b"c"}]}), delete(3, "gone"))
        calls = [(method, data) for method, data, _ in BAD_CALLS.values() if len(data) < 1_000]
        sessions = [
            [start(), batch(create(1), update(2, set={"a": nested(3)}), delete(3)), COMPLETE],
            [start(mode=3), selection(("Task", "t1"), ("Task", "t2")), batch(*group(make_operation(seq=1))), COMPLETE],
            [start(uploading=False, cursor=b"xyz"), COMPLETE],
        ]
        seen: set[grpc.StatusCode] = set()

        for _ in range(100):
            method, data = dice.choice(calls)
            seen.add(call(world, method, _mutated(dice, data)).code)
            messages = list(dice.choice(sessions))
            place = dice.randrange(len(messages))
            messages[place] = _mutated(dice, messages[place])
            answer = stream(world, f"{SYNC}/Synchronize", messages)
            answer.check_discreet(world)
            seen.add(answer.code)

        assert seen <= {
            grpc.StatusCode.OK,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
        }
        world.lab.check_history()
        check_alive(world)


def shown_seq(data: bytes) -> int:
    """Return the seq that an operation shows, 0 if it is unreadable."""
    try:
        return operation_pb2.Operation.FromString(data).seq
    except Exception:  # noqa: BLE001 - whatever protobuf says of garbage
        return 0


def _with_seq(data: bytes, seq: int) -> bytes:
    if not shown_seq(data):
        return data
    message = operation_pb2.Operation.FromString(data)
    message.seq = seq
    if message.HasField("group"):
        message.group.id = seq
    return message.SerializeToString()


def _mutated(dice: random.Random, data: bytes) -> bytes:
    mutable = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(mutable) + 1)
        match dice.randrange(4):
            case 0:
                mutable[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del mutable[place : place + dice.randint(1, 8)]
            case 2:
                mutable[place:place] = dice.randbytes(dice.randint(1, 8))
            case _:
                mutable[place:place] = mutable[: dice.randint(0, 20)]
    return bytes(mutable)


Script = Callable[[Iterator[bytes]], Iterator[bytes]]


class FakeServer:
    """A server that answers a session as a test wants it to."""

    def __init__(self, script: Script) -> None:
        handler = grpc.method_handlers_generic_handler(
            "tidelog.v1.SyncService",
            {
                "Synchronize": grpc.stream_stream_rpc_method_handler(
                    lambda requests, context: script(requests),
                )
            },
        )
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> str:
        self._server.start()
        return self.address

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


def response(**message: Any) -> bytes:
    """Return a message of the server's."""
    return sync_pb2.SynchronizeResponse(**message).SerializeToString()


LIMITS = sync_pb2.Limits(batch_operation_count=10, batch_bytes=10_000, batches_in_flight=1)
STARTED = response(started=sync_pb2.SessionStarted(protocol_version=1, epoch="e", timeline="t", limits=LIMITS))
APPLIED = operation_pb2.OperationResult(seq=1, status=operation_pb2.OPERATION_STATUS_APPLIED, version=1)
BATCH_RESULTS = response(batch_results=sync_pb2.BatchResults(results=[APPLIED]))
COMPLETED = response(complete=sync_pb2.SessionComplete(cursor=b"c", version=1))
SETTLED = response(upload_settled=sync_pb2.UploadSettled())


def result(**fields: Any) -> bytes:
    """Return the results of a batch of one."""
    usual: dict[str, Any] = {"seq": 1, "version": 1}
    message = operation_pb2.OperationResult(**usual | fields)
    return response(batch_results=sync_pb2.BatchResults(results=[message]))


WRONG_ANSWERS: dict[str, list[bytes]] = {
    "garbage": [b"\xff\xff"],
    "an empty message": [b""],
    "results first": [BATCH_RESULTS],
    "the end first": [response(complete=sync_pb2.SessionComplete())],
    "two starts": [STARTED, STARTED],
    "a page during the upload": [STARTED, response(page=sync_pb2.SnapshotPage())],
    "the end during the upload": [STARTED, response(complete=sync_pb2.SessionComplete())],
    "results of nothing": [STARTED, response(batch_results=sync_pb2.BatchResults())],
    "results of another operation": [STARTED, result(seq=2, status=1)],
    "results too many": [STARTED, response(batch_results=sync_pb2.BatchResults(results=[APPLIED, APPLIED]))],
    "results twice": [STARTED, BATCH_RESULTS, BATCH_RESULTS],
    "a result without a status": [STARTED, result(status=0)],
    "a result of an unknown status": [STARTED, result(status=99)],
    "a refusal without a failure": [STARTED, result(status=2)],
    "settled too early": [STARTED, SETTLED],
    "settled without the held one": [STARTED, result(status=3), SETTLED],
    "settled what was not held": [
        STARTED,
        BATCH_RESULTS,
        response(upload_settled=sync_pb2.UploadSettled(results=[APPLIED])),
    ],
    "no cursor": [STARTED, BATCH_RESULTS, SETTLED, response(complete=sync_pb2.SessionComplete())],
}


class TestWrongServers:
    @pytest.mark.parametrize("answers", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
    def test_that_break_the_protocol(self, folder: Path, world: World, answers: list[bytes]) -> None:
        """What the protocol does not allow is ProtocolViolated at once, and the replica's data stays as it is."""

        def script(requests: Iterator[bytes]) -> Iterator[bytes]:
            next(requests)
            yield from answers
            for _ in requests:
                pass

        with FakeServer(script) as address:
            a = world.replica(server=address)
            a.create("Task", {"n": 1}, "t1")

            with pytest.raises(ProtocolViolated):
                a.synchronize_all(timeout=10)

            assert contents(a) == {"t1": {"n": 1}}
            a.update("Task", "t1", {"n": 2})
            a.close()

    def test_that_speak_another_version(self, folder: Path, world: World) -> None:
        """A server that answers with another version of the protocol is ProtocolUnsupported."""

        def script(requests: Iterator[bytes]) -> Iterator[bytes]:
            next(requests)
            yield response(started=sync_pb2.SessionStarted(protocol_version=2, epoch="e"))

        with FakeServer(script) as address:
            a = world.replica(server=address)
            with pytest.raises(ProtocolUnsupported, match="upgrade"):
                a.synchronize_all(timeout=10)
            a.close()

    def test_that_are_something_else(self, world: World) -> None:
        """A server that has no such service is ProtocolUnsupported."""
        server = grpc.server(ThreadPoolExecutor(1))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        a = world.replica(server=f"127.0.0.1:{port}")

        with pytest.raises(ProtocolUnsupported):
            a.synchronize_all(timeout=10)

        a.close()
        server.stop(0).wait()

    def test_with_a_schema_that_contradicts_itself(self, world: World) -> None:
        """A schema that cannot be read is ProtocolViolated, and is not remembered."""
        schema = references_schema({"Line": {"order": "Order"}}).to_message()
        schema.entities[0].name = "x" * 100

        def script(requests: Iterator[bytes]) -> Iterator[bytes]:
            next(requests)
            yield response(started=sync_pb2.SessionStarted(protocol_version=1, epoch="e", schema=schema))

        with FakeServer(script) as address:
            a = world.replica(server=address)
            with pytest.raises(ProtocolViolated):
                a.synchronize_all(timeout=10)
            assert a._storage.meta("epoch") == b""
            a.close()

    @pytest.mark.slow
    def test_that_end_too_early(self, world: World) -> None:
        """A session that ends without its last message is tried again, from where it got to."""
        sessions = iter([[], [STARTED], [STARTED, BATCH_RESULTS], [STARTED, SETTLED, COMPLETED]])

        def script(requests: Iterator[bytes]) -> Iterator[bytes]:
            answers = next(sessions)
            next(requests)
            for answer in answers:
                yield answer
                if answer is STARTED and BATCH_RESULTS in answers:
                    next(requests)

        with FakeServer(script) as address:
            a = world.replica(server=address)
            a.create("Task", {}, "t1")

            report = a.synchronize_all(timeout=60)

            assert (report.attempts, report.applied) == (4, 1)
            assert a.pending_count() == 0
            a.close()

    def test_every_error_is_of_one_kind(self) -> None:
        """A caller who catches SynchronizationError catches whatever a synchronization raises about the server."""
        for kind in (ServerUnavailable, ProtocolViolated, ProtocolUnsupported, ReplicaForked, PermissionRefused):
            assert issubclass(kind, SynchronizationError)

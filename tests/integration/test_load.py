"""Many sessions at once, slow ones, stuck ones and cut ones: what they hold is bounded, and they leave nothing."""

from __future__ import annotations

import asyncio
import gc
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tests.builders import TENANT, World, contents, create, quick_folder, update
from tests.simulation.processes import wait_until

from tidelog import ServerUnavailable
from tidelog._channel import authorization
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import object_pb2, object_pb2_grpc, operation_pb2, sync_pb2
from tidelog_client import Replica
from tidelog_client import _synchronizer as synchronizer
from tidelog_server import (
    Application,
    HookContext,
    HookObject,
    LmdbStore,
    Principal,
    Server,
    ServerLimits,
    StaticTokens,
    _services,
)
from tidelog_server._room import PAGE_BYTES_LEAST, PAGE_COPIES, HeldPages, PageRoom, QueueRoom
from tidelog_server._session import Session, Upload

WAIT_SECONDS_MAX: Final = 60.0
# A device on a bad line: nothing is taken ahead of what its program reads.
NARROW: Final = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 * 1024),
)
SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"
COMPLETE: Final = splice_pb2.SynchronizeRequestSplice(upload_complete=b"").SerializeToString()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


class Visitor:
    """A session by hand, over a connection of its own. Use it as a context manager: at the end it is cut."""

    def __init__(self, address: str, number: int = 1, *, uploading: bool = False, token: str | None = None) -> None:
        self._channel = grpc.insecure_channel(address, options=NARROW)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(SYNCHRONIZE)
        self._call: Any = call(iter(self._requests.get, None), timeout=WAIT_SECONDS_MAX, metadata=authorization(token))
        start = sync_pb2.SessionStart(
            protocol_version=1,
            replica_id=f"00000000-0000-4000-8000-{number:012d}",
            mode=sync_pb2.SYNCHRONIZE_MODE_ALL,
            uploading=uploading,
        )
        self.send(splice_pb2.SynchronizeRequestSplice(start=start.SerializeToString()).SerializeToString())

    def send(self, message: bytes) -> None:
        """Send a message."""
        self._requests.put(message)

    def send_batch(self, *operations: bytes) -> None:
        """Send a batch."""
        batch = splice_pb2.OperationBatchSplice(operations=operations)
        self.send(splice_pb2.SynchronizeRequestSplice(batch=batch).SerializeToString())

    def receive(self) -> sync_pb2.SynchronizeResponse:
        """Wait for the next message."""
        return sync_pb2.SynchronizeResponse.FromString(next(self._call))

    def received(self) -> list[sync_pb2.SynchronizeResponse]:
        """Return what comes until the session ends, in whatever way."""
        found = []
        with suppress(grpc.RpcError):
            for data in self._call:
                found.append(sync_pb2.SynchronizeResponse.FromString(data))  # noqa: PERF401 - what came before an error
        return found

    def cut(self) -> None:
        """Go away without a word."""
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()


def visitors(world: World, count: int, open_: ExitStack, **options: Any) -> list[Visitor]:
    """Open sessions, each with the answer to its start."""
    found = [open_.enter_context(Visitor(world.server.address, number + 1, **options)) for number in range(count)]
    for visitor in found:
        assert visitor.receive().HasField("started")
    return found


def said(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, float]:
    """Return code, reason, and after how many seconds to come again, of an error."""
    info, retry = ErrorInfo(), RetryInfo()
    status = rpc_status.from_call(cast("grpc.Call", error))
    for detail in status.details if status is not None else ():
        assert detail.Unpack(info) or detail.Unpack(retry)
    return error.code(), info.reason, retry.retry_delay.ToMicroseconds() / 1e6


def refused(world: World, **options: Any) -> tuple[grpc.StatusCode, str, float]:
    """Begin a session that is refused, and return what is said."""
    with Visitor(world.server.address, 999, **options) as visitor, pytest.raises(grpc.RpcError) as caught:
        visitor.receive()
    return said(caught.value)


def health_status(channel: grpc.Channel) -> int:
    """Ask whether the server is well."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS_MAX).status)


def fill(world: World, count: int, bytes_each: int) -> None:
    """Let other devices create notes."""
    for number in range(count):
        world.lab.settle(create(number + 1, f"n{number}", {"text": "x" * bytes_each}, entity="Note"))


def reader_slots(world: World) -> int:
    """Return how many reader slots of the store were ever used at once."""
    return int(world.store._environment._shared.opened.info()["num_readers"])


def is_quiet(world: World) -> bool:
    """Tell whether nothing is under way in the server."""
    return not any(world.server.load._replace(put_off_count=0))


class TestAdmission:
    def test_a_full_server_says_when_to_come_again(self, folder: Path) -> None:
        """Above its limit a session is refused at its start, with a reason and a moment; then there is room again."""
        with World(folder, limits=ServerLimits(sessions=2)) as world, ExitStack() as open_:
            first, _second = visitors(world, 2, open_)

            code, reason, retry_after = refused(world)

            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
            assert retry_after > 0
            assert world.server.load.put_off_count == 1
            first.cut()
            wait_until(lambda: world.server.load.sessions == 1, "the place is not given back")
            visitors(world, 1, open_)

    def test_reads_and_health_checks_have_places_of_their_own(self, folder: Path) -> None:
        """A server that takes no more sessions still answers health checks and online reads."""
        with World(folder, limits=ServerLimits(sessions=1)) as world, ExitStack() as open_:
            fill(world, 1, 10)
            visitors(world, 1, open_)
            assert refused(world)[1] == "SERVER_BUSY"

            channel = world.channel()
            health = health_status(channel)
            found = object_pb2_grpc.ObjectServiceStub(channel).GetObject(
                object_pb2.GetObjectRequest(entity="Note", id="n0")
            )

            assert health == health_pb2.HealthCheckResponse.SERVING
            assert found.object.id == "n0"

    def test_uploads_are_counted_apart(self, folder: Path) -> None:
        """Above the limit of uploads only sessions that upload are refused, single calls included."""
        with World(folder, limits=ServerLimits(uploads=1)) as world, ExitStack() as open_:
            visitors(world, 1, open_, uploading=True)

            assert refused(world, uploading=True)[1] == "SERVER_BUSY"
            request = splice_pb2.UploadOperationsRequestSplice(
                protocol_version=1, replica_id="00000000-0000-4000-8000-000000000999", operations=[create(1)]
            )
            unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = world.channel().unary_unary(
                "/tidelog.v1.SyncService/UploadOperations"
            )
            with pytest.raises(grpc.RpcError) as caught:
                unary(request.SerializeToString())
            assert said(caught.value)[1] == "SERVER_BUSY"
            visitors(world, 1, open_)
            assert world.lab.version() == 0

    def test_a_download_does_not_keep_others_from_uploading(self, folder: Path) -> None:
        """A session that has uploaded leaves its place among the uploads before it downloads."""
        with World(folder, limits=ServerLimits(uploads=1)) as world, ExitStack() as open_:
            fill(world, 100, 64 * 1024)
            [visitor] = visitors(world, 1, open_, uploading=True)
            visitor.send(COMPLETE)

            wait_until(lambda: world.server.load.uploads == 0, "the upload does not end")

            assert world.server.load.sessions == 1
            visitors(world, 1, open_, uploading=True)

    def test_a_users_own_limit(self, folder: Path) -> None:
        """A user who has as many sessions as one may have is put off, and others are not."""
        tokens = StaticTokens({"a": Principal("ann", "acme"), "b": Principal("bob", "acme")})
        limits = ServerLimits(sessions_per_user=1)
        with World(folder, authenticator=tokens, limits=limits) as world, ExitStack() as open_:
            visitors(world, 1, open_, token="a")

            assert refused(world, token="a")[1] == "SERVER_BUSY"
            visitors(world, 1, open_, token="b")

    def test_all_of_a_crowd_are_served_in_the_end(self, folder: Path) -> None:
        """Many replicas that come at once are put off by a small server, and each completes without an error."""
        crowd = 40
        with World(folder, limits=ServerLimits(sessions=4)) as world:
            replicas = [world.replica(str(number), durability="relaxed") for number in range(crowd)]
            for number, replica in enumerate(replicas):
                replica.create("Task", {"n": number}, f"t{number}")
            with ThreadPoolExecutor(crowd) as pool:
                together = threading.Barrier(crowd)

                def arrives(replica: Replica) -> int:
                    together.wait(WAIT_SECONDS_MAX)
                    return replica.synchronize_all().applied

                assert list(pool.map(arrives, replicas)) == [1] * crowd
            assert world.lab.version() == crowd
            assert world.server.load.put_off_count > 0
            wait_until(lambda: is_quiet(world), "somebody is left")


class _Clock:
    """Time for the synchronizer: it passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let it pass."""
        self.pauses.append(seconds)
        self.now += seconds


class BusyServer:
    """A server that answers every session with an error that tells when to come again."""

    def __init__(self, retry_after_seconds: float, *, times: int | None = None, target: str = "") -> None:
        self._seconds = retry_after_seconds
        self.left = times
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._answer)
        handlers = [grpc.method_handlers_generic_handler("tidelog.v1.SyncService", {"Synchronize": handler})]
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=handlers)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def _answer(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if self.left == 0:
            yield from self._session(requests)
            return
        self.left = None if self.left is None else self.left - 1
        status = Status(code=8, message="the server is busy")
        retry = RetryInfo()
        retry.retry_delay.FromMicroseconds(int(self._seconds * 1e6))
        parts: tuple[Message, ...] = (ErrorInfo(domain="tidelog", reason="SERVER_BUSY"), retry)
        for one in parts:
            status.details.add().Pack(one)
        context.abort_with_status(rpc_status.to_status(status))

    def _session(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        next(requests)
        limits = sync_pb2.Limits(batch_operation_count=10, batch_bytes=10_000, batches_in_flight=1)
        started = sync_pb2.SessionStarted(protocol_version=1, epoch="e", timeline="t", limits=limits)
        yield sync_pb2.SynchronizeResponse(started=started).SerializeToString()
        yield sync_pb2.SynchronizeResponse(upload_settled=sync_pb2.UploadSettled()).SerializeToString()
        complete = sync_pb2.SessionComplete(cursor=b"c", version=1)
        yield sync_pb2.SynchronizeResponse(complete=complete).SerializeToString()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


class TestClientsThatArePutOff:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> _Clock:
        """Give the synchronizer a clock that nobody has to wait for."""
        clock = _Clock()
        monkeypatch.setattr(synchronizer, "time", clock)
        return clock

    def test_come_again_when_they_are_told_to(self, folder: Path, clock: _Clock) -> None:
        """A client without a deadline waits as long as it is told, longer than it would for silence, and completes."""
        wait = synchronizer.SILENCE_SECONDS_MAX * 2
        with BusyServer(wait, times=4) as server, Replica(folder / "a", server=server.address) as replica:
            report = replica.synchronize_all()

        assert report.attempts == 5
        assert clock.pauses == [wait] * 4

    def test_lose_patience_in_the_end(self, folder: Path, clock: _Clock) -> None:
        """A server that does nothing but put off is given up after ten minutes, and nothing is lost."""
        with BusyServer(25.0) as server, Replica(folder / "a", server=server.address) as replica:
            replica.create("Task", {}, "t1")
            with pytest.raises(ServerUnavailable, match="the server is busy"):
                replica.synchronize_all()
            assert replica.pending_count() == 1

        assert synchronizer.BUSY_SECONDS_MAX - 25 <= clock.now <= synchronizer.BUSY_SECONDS_MAX

    def test_do_not_wait_beyond_their_deadline(self, folder: Path, clock: _Clock) -> None:
        """A client whose deadline comes before the moment that it is told gives up at once."""
        with (
            BusyServer(25.0) as server,
            Replica(folder / "a", server=server.address) as replica,
            pytest.raises(ServerUnavailable, match="the server is busy"),
        ):
            replica.synchronize_all(timeout=20)

        assert clock.pauses == []

    def test_do_not_storm_a_server_that_says_now(self, folder: Path, clock: _Clock) -> None:
        """A server that tells to come again at once is not asked more often than by the client's own back-off."""
        with BusyServer(0.0, times=3) as server, Replica(folder / "a", server=server.address) as replica:
            replica.synchronize_all()

        assert min(clock.pauses) >= synchronizer.BACKOFF_SECONDS_FIRST / 2


class TestSlowSessions:
    def test_readers_that_stand_still(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hundred sessions that do not read hold bounded memory, no transaction, and let nobody else wait."""
        readers, object_bytes, room_bytes = 100, 15 * 1024, 4 * 1024 * 1024
        held: list[HeldPages] = []

        class Watched(HeldPages):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                held.append(self)

        monkeypatch.setattr(_services, "HeldPages", Watched)
        monkeypatch.setattr(_services, "PageRoom", partial(PageRoom, room_bytes))
        with World(folder) as world, ExitStack() as open_:
            fill(world, 200, object_bytes)
            writer = world.replica("writer")
            writer.synchronize_all()

            def growth_bytes() -> int:
                """Write many small things, each in a transaction of its own; return what the file grew by."""
                before = (folder / "server" / "data.mdb").stat().st_size
                for number in range(100):
                    lab_seq[0] += 1
                    world.lab.settle(update(lab_seq[0], "n0", {"text": str(number)}, entity="Note"))
                return (folder / "server" / "data.mdb").stat().st_size - before

            lab_seq = [1_000]
            growth_alone = growth_bytes()
            held.clear()
            for visitor in visitors(world, readers, open_):
                visitor.send(COMPLETE)
            wait_until(lambda: sum(bool(one._held) for one in held) == readers, "somebody reads on")

            # One page for each beyond the room: it is full only when it has exceeded what it may hold.
            least = PAGE_BYTES_LEAST + 2 * object_bytes
            assert world.server.load.page_bytes <= room_bytes + readers * least
            assert growth_bytes() <= 2 * growth_alone + 1024 * 1024
            threads = _services.PAGE_THREADS + _services.CALL_THREADS + _services.STANDING_THREADS
            assert reader_slots(world) <= 2 * threads
            writer.create("Task", {}, "t1")
            assert writer.synchronize_all(timeout=WAIT_SECONDS_MAX).applied == 1
        assert not any(one._held for one in held)

    def test_stalled_readers_get_on(self, folder: Path) -> None:
        """A session that stood still gets all its pages once it reads, each object once, though pages became small."""
        with World(folder) as world, ExitStack() as open_:
            room = world.server._services._page_room.of_newcomers
            room.add(room.bytes_max)  # a crowd of others
            fill(world, 100, 4 * 1024)
            [visitor] = visitors(world, 1, open_)
            visitor.send(COMPLETE)
            wait_until(lambda: world.server.load.page_bytes > 0, "nothing is sent")

            pages = [message.page for message in visitor.received() if message.HasField("page")]

            assert sorted(one.id for page in pages for one in page.snapshots) == sorted(f"n{n}" for n in range(100))
            assert max(page.ByteSize() for page in pages) <= 2 * PAGE_BYTES_LEAST

    def test_a_crowd_in_front_of_large_objects(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sessions that stand still before large objects hold what there is room for; those with small ones go on."""
        readers, object_bytes, room_bytes = 20, 300_000, 2_000_000
        monkeypatch.setattr(_services, "PageRoom", partial(PageRoom, room_bytes))
        with World(folder) as world, ExitStack() as open_:
            world.lab.settle(create(1, "small", {"text": "x"}))
            fill(world, 4, object_bytes)
            crowd = visitors(world, readers, open_)
            for visitor in crowd:
                visitor.send(COMPLETE)
            inside = room_bytes // (PAGE_COPIES * object_bytes)
            # All have got the small object's page; in some client's connection a large one stands unread.
            wait_until(lambda: world.server.load.waiting_pages >= readers - 2 * inside, "nobody waits in line")

            assert world.server.load.page_bytes <= room_bytes // PAGE_COPIES + readers * PAGE_BYTES_LEAST
            other = world.replica("other")
            other.create("Task", {}, "t1")
            assert other.synchronize_unsynchronized(timeout=WAIT_SECONDS_MAX).applied == 1
            assert other.synchronize_selected([("Task", "small")], timeout=WAIT_SECONDS_MAX).downloaded == 1
            for visitor in crowd:
                visitor.cut()
            wait_until(lambda: is_quiet(world), "those who have left stand in line")
            assert other.synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded >= 4

    def test_the_line_moves(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever does not take what others wait for too is ended, and who reads gets all, object by object."""
        readers, object_bytes, room_bytes = 12, 300_000, 1_300_000
        monkeypatch.setattr(_services, "PageRoom", partial(PageRoom, room_bytes))
        with World(folder, limits=ServerLimits(idle_seconds=0.5)) as world, ExitStack() as open_:
            fill(world, 6, object_bytes)
            for visitor in visitors(world, readers, open_):
                visitor.send(COMPLETE)
            wait_until(lambda: world.server.load.waiting_pages > 0, "nobody waits in line")

            assert world.replica().synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded == 6

            wait_until(lambda: is_quiet(world), "somebody holds room, or a place")

    def test_an_object_that_is_larger_than_all_room(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What no room is large enough for is had one at a time, in each mode."""
        monkeypatch.setattr(_services, "PageRoom", partial(PageRoom, 1))
        with World(folder) as world:
            fill(world, 3, 500_000)
            replicas = [world.replica(str(number)) for number in range(4)]
            for replica in replicas:
                replica.create("Task", {"text": "x" * 500_000})

            def synchronize(replica: Replica) -> tuple[int, int, int]:
                return (
                    replica.synchronize_unsynchronized(timeout=WAIT_SECONDS_MAX).applied,
                    replica.synchronize_selected([("Note", "n1")], timeout=WAIT_SECONDS_MAX).downloaded,
                    replica.synchronize_all(timeout=WAIT_SECONDS_MAX).applied,
                )

            with ThreadPoolExecutor(len(replicas)) as pool:
                assert list(pool.map(synchronize, replicas)) == [(1, 1, 0)] * len(replicas)
            for replica in replicas:
                replica.synchronize_all(timeout=WAIT_SECONDS_MAX)
                assert (len(contents(replica, "Note")), len(contents(replica))) == (3, len(replicas))
            wait_until(lambda: is_quiet(world), "somebody holds room")

    def test_who_did_not_read_gets_small_pages(self, folder: Path) -> None:
        """A replica whose session came to a halt gets the least pages, which pass a slow link, until one completes."""
        with World(folder, limits=ServerLimits(idle_seconds=0.5)) as world, ExitStack() as open_:
            fill(world, 100, 8 * 1024)

            def page_bytes() -> int:
                [visitor] = visitors(world, 1, open_)
                visitor.send(COMPLETE)
                messages = visitor.received()
                assert messages[-1].HasField("complete")
                return max(message.page.ByteSize() for message in messages)

            assert page_bytes() > 2 * PAGE_BYTES_LEAST
            [stands_still] = visitors(world, 1, open_)
            stands_still.send(COMPLETE)
            wait_until(lambda: world.server.load.page_bytes > 0, "nothing is sent")
            wait_until(lambda: is_quiet(world), "the session holds its place")

            assert page_bytes() <= PAGE_BYTES_LEAST + 1_000
            assert page_bytes() > 2 * PAGE_BYTES_LEAST

    def test_a_call_that_nobody_reads_is_dropped(self, folder: Path) -> None:
        """Of a session that was ended because nothing was read, gRPC keeps nothing: what was to be sent is gone."""
        with World(folder, limits=ServerLimits(idle_seconds=0.1)) as world, ExitStack() as open_:
            fill(world, 10, 500_000)
            # gRPC itself keeps the first call, and the newest one until another comes.
            _first, [stands_still], _newest = (visitors(world, 1, open_) for _ in range(3))
            stands_still.send(COMPLETE)
            assert world.server._loop is not None
            loop = world.server._loop
            wait_until(lambda: is_quiet(world), "the session holds its place")
            # Dropped a moment later: then the server's own tasks are left.
            wait_until(
                lambda: not any("Synchronize" in task.get_name() for task in asyncio.all_tasks(loop)), "it is served"
            )

            stands_still.received()
            with pytest.raises(grpc.RpcError) as caught:
                stands_still.receive()
            assert caught.value.code() is grpc.StatusCode.CANCELLED

    def test_pages_that_take_long_keep_no_read_waiting(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many sessions wait for their pages, online reads are answered."""
        released = threading.Event()

        def waits(session: Session) -> Iterator[sync_pb2.SnapshotPage]:
            assert released.wait(WAIT_SECONDS_MAX)
            yield from ()

        monkeypatch.setattr(Session, "pages", waits)
        with World(folder) as world, ExitStack() as open_:
            fill(world, 1, 10)
            open_.callback(released.set)
            for visitor in visitors(world, 2 * _services.PAGE_THREADS, open_):
                visitor.send(COMPLETE)
                assert visitor.receive().HasField("upload_settled")

            objects = object_pb2_grpc.ObjectServiceStub(world.channel())
            found = objects.GetObject(
                object_pb2.GetObjectRequest(entity="Note", id="n0"), timeout=WAIT_SECONDS_MAX / 2
            )
            assert found.object.id == "n0"
            released.set()

    def test_a_client_that_says_nothing_is_ended(self, folder: Path) -> None:
        """A session whose client sends nothing for too long ends with a reason, and its place is free."""
        with World(folder, limits=ServerLimits(idle_seconds=0.1)) as world, ExitStack() as open_:
            [visitor] = visitors(world, 1, open_)

            with pytest.raises(grpc.RpcError) as caught:
                visitor.receive()

            assert said(caught.value)[:2] == (grpc.StatusCode.ABORTED, "SESSION_IDLE")
            wait_until(lambda: is_quiet(world), "the session holds its place")

    def test_a_client_that_reads_nothing_is_ended(self, folder: Path) -> None:
        """A session whose client takes nothing for too long is ended, and what it held is free."""
        with World(folder, limits=ServerLimits(idle_seconds=0.1)) as world, ExitStack() as open_:
            fill(world, 100, 64 * 1024)
            [visitor] = visitors(world, 1, open_)
            visitor.send(COMPLETE)

            wait_until(lambda: is_quiet(world), "the session holds its place")

            visitor.received()
            with pytest.raises(grpc.RpcError) as caught:  # if it reads on, it learns what became of it
                visitor.receive()
            assert said(caught.value)[:2] == (grpc.StatusCode.ABORTED, "SESSION_IDLE")
            replica = world.replica()
            assert replica.synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded == 100


class HeldHook:
    """An application whose hook on `Slow` waits until it is released."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.application = Application()

        @self.application.before_commit("Slow")
        def waits(thing: HookObject, context: HookContext) -> None:
            self.reached.set()
            assert self.released.wait(WAIT_SECONDS_MAX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()


class TestSlowHooks:
    def test_reads_go_on(self, folder: Path) -> None:
        """While one session's hook takes its time, others download, read online and have nothing to do, as ever."""
        with HeldHook() as hook, World(folder, hook.application) as world, ThreadPoolExecutor(1) as pool, hook:
            fill(world, 10, 10)
            slow, reader = world.replica("slow"), world.replica("reader")
            slow.create("Slow", {}, "s")
            going = pool.submit(slow.synchronize_all)
            assert hook.reached.wait(WAIT_SECONDS_MAX)

            assert reader.synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded == 10
            assert reader.synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded == 0
            assert reader.synchronize_selected([("Note", "n1")], timeout=WAIT_SECONDS_MAX).downloaded == 1
            channel = world.channel()
            objects = object_pb2_grpc.ObjectServiceStub(channel)
            listed = objects.ListObjects(object_pb2.ListObjectsRequest(entity="Note"), timeout=WAIT_SECONDS_MAX)
            assert len(listed.objects) == 10
            assert health_status(channel) == health_pb2.HealthCheckResponse.SERVING
            assert not going.done()

            hook.released.set()
            assert going.result(WAIT_SECONDS_MAX).applied == 1

    def test_the_queue_of_the_writer_is_bounded(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """While the writer is held up, sessions wait outside its queue, and all is applied when it goes on."""
        queued_max, uploaders, batches = 3, 5, 4
        monkeypatch.setattr(_services, "QueueRoom", partial(QueueRoom, queued_max))
        with HeldHook() as hook, World(folder, hook.application) as world, ExitStack() as open_, hook:
            found = visitors(world, uploaders, open_, uploading=True)
            found[0].send_batch(create(1, "s", entity="Slow"))
            assert hook.reached.wait(WAIT_SECONDS_MAX)
            for number, visitor in enumerate(found[1:]):
                for batch in range(batches):
                    visitor.send_batch(create(batch + 1, f"{number}-{batch}"))
                visitor.send(COMPLETE)
            wait_until(lambda: world.server.load.waiting_batches == uploaders - 1, "nobody waits")

            assert world.server.load.queued_batches == queued_max
            assert world.store._jobs.qsize() <= queued_max
            hook.released.set()
            for visitor in found[1:]:
                assert any(message.HasField("complete") for message in visitor.received())
            assert world.lab.version() == 1 + (uploaders - 1) * batches


class TestComingAndGoing:
    def test_cut_sessions_leave_nothing(self, folder: Path) -> None:
        """Hundreds of sessions that are cut at any point leave no files, tasks, reader slots or objects behind."""
        times = 240
        with World(folder) as world:
            fill(world, 50, 16 * 1024)

            def visit(number: int) -> None:
                with Visitor(world.server.address, number + 1, uploading=bool(number % 2)) as visitor:
                    if number % 8 == 0:
                        return  # before anything was answered
                    visitor.receive()
                    if number % 2:
                        visitor.send_batch(*(create(seq, f"v{number}-{seq}") for seq in range(1, 20)))
                    if number % 3:
                        visitor.send(COMPLETE)
                    if number % 2:
                        visitor.receive()

            def traces() -> tuple[int, int, int]:
                assert world.server._loop is not None
                gc.collect()
                left = sum(isinstance(one, Session | Upload | HeldPages) for one in gc.get_objects())
                return len(asyncio.all_tasks(world.server._loop)), len(list(Path("/proc/self/fd").iterdir())), left

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda number: visit(number + times), range(16)))
                wait_until(lambda: is_quiet(world), "sessions are left")
                before, slots = traces(), reader_slots(world)
                list(pool.map(visit, range(times)))

            wait_until(lambda: is_quiet(world), "sessions are left")
            # A connection or two may still be on its way out.
            wait_until(
                lambda: all(now <= then + few for now, then, few in zip(traces(), before, (2, 4, 0), strict=True)),
                f"more is left than the {before} of before",
            )
            assert reader_slots(world) <= slots + _services.PAGE_THREADS
            assert world.replica().synchronize_all(timeout=WAIT_SECONDS_MAX).downloaded >= 50

    def test_cut_uploads_leave_the_queue_free(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sessions that are cut while their batches wait for the writer, which goes on, keep no room in its queue."""
        queued_max, uploaders, batches, rounds = 2, 24, 6, 5
        monkeypatch.setattr(_services, "QueueRoom", partial(QueueRoom, queued_max))
        with World(folder) as world:
            for turn in range(rounds):
                with ExitStack() as open_:
                    found = visitors(world, uploaders, open_, uploading=True)
                    for number, visitor in enumerate(found):
                        for batch in range(batches):
                            visitor.send_batch(create(turn * batches + batch + 1, f"{turn}-{number}-{batch}"))
                    wait_until(lambda: world.server.load.waiting_batches > 0, "nobody waits")
                wait_until(lambda: is_quiet(world), "somebody holds room")

            assert world.server.load.queued_batches == 0
            replica = world.replica()
            replica.create("Task", {}, "t")
            assert replica.synchronize_all(timeout=WAIT_SECONDS_MAX).applied == 1

    def test_room_that_comes_free_while_the_waiting_are_cut(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch that leaves the queue in the instant in which all that wait are cut leaves room for the next one."""
        queued_max, uploaders = 1, 6
        rooms: list[QueueRoom] = []
        cut_off: list[int] = []

        class Watched(QueueRoom):
            def __init__(self) -> None:
                super().__init__(queued_max)
                rooms.append(self)

            def give_back(self, size: int) -> None:
                if self.waiting == uploaders - 1:
                    cut_off.append(self.waiting)
                    for task in asyncio.all_tasks():
                        if getattr(task.get_coro(), "__name__", "") == "_read_uploads":
                            task.cancel()
                super().give_back(size)

        monkeypatch.setattr(_services, "QueueRoom", Watched)
        with HeldHook() as hook, World(folder, hook.application) as world, ExitStack() as open_, hook:
            found = visitors(world, uploaders, open_, uploading=True)
            found[0].send_batch(create(1, "s", entity="Slow"))
            assert hook.reached.wait(WAIT_SECONDS_MAX)
            for number, visitor in enumerate(found[1:]):
                visitor.send_batch(create(1, f"t{number}"))
            wait_until(lambda: world.server.load.waiting_batches == uploaders - 1, "nobody waits")
            hook.released.set()
            assert found[0].receive().HasField("batch_results")
            wait_until(lambda: world.server.load.queued_batches == 0, "somebody holds room")
            assert cut_off == [uploaders - 1]
            assert (rooms[0].bytes, rooms[0].waiting) == (0, 0)

            replica = world.replica()
            replica.create("Task", {}, "t")
            assert replica.synchronize_all(timeout=WAIT_SECONDS_MAX).applied == 1

    def test_a_stop_under_load_loses_nothing(self, folder: Path) -> None:
        """A server that stops with a hundred uploads under way begins nothing more, and keeps what it acknowledged."""
        uploaders, batches = 100, 4
        with HeldHook() as hook, World(folder, hook.application) as world, ExitStack() as open_, hook:
            found = visitors(world, uploaders, open_, uploading=True)
            early, slow, late = found[0], found[1], found[2:]
            early.send_batch(create(1, "early"))
            assert early.receive().HasField("batch_results")
            slow.send_batch(create(1, "s", entity="Slow"))
            assert hook.reached.wait(WAIT_SECONDS_MAX)
            for number, visitor in enumerate(late):
                for batch in range(batches):
                    visitor.send_batch(create(batch + 1, f"{number}-{batch}"))
            full = QueueRoom()._count_max
            wait_until(lambda: world.server.load.queued_batches == full, "the queue does not fill")

            with ThreadPoolExecutor(1) as pool:
                stopping = pool.submit(world.server.stop, 0.1)
                acknowledged = [
                    result.seq
                    for visitor in late
                    for message in visitor.received()
                    for result in message.batch_results.results
                    if result.status == operation_pb2.OPERATION_STATUS_APPLIED
                ]
                stopping.result(WAIT_SECONDS_MAX)  # what had not begun is dropped now, though the writer is busy
                hook.released.set()

            assert acknowledged == []
            # The writer's jobs are all done, or dropped, when the next one is.
            world.store.submit(TENANT, lambda _: (None, None)).result(WAIT_SECONDS_MAX)
            assert world.lab.version() == 2, "only what was acknowledged, and what had begun, was applied"
            world.server.start()
            replica = world.replica()
            replica.synchronize_all(timeout=WAIT_SECONDS_MAX)
            assert set(contents(replica)) == {"early"}
            assert set(contents(replica, "Slow")) == {"s"}


class _SlowReads(LmdbStore):
    """A store that becomes slow after so many reads: whoever reads then waits until somebody lets him."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.quick_reads = sys.maxsize
        self.waits = threading.Semaphore(0)
        self.go_on = threading.Event()

    @contextmanager
    def read(self, tenant: str) -> Iterator[Any]:
        """Wait, then read."""
        self.quick_reads -= 1
        if self.quick_reads < 0:
            self.waits.release()
            assert self.go_on.wait(WAIT_SECONDS_MAX)
        with super().read(tenant) as reader:
            yield reader


@pytest.mark.parametrize("is_uploading", [False, True])
@pytest.mark.parametrize("quick_reads", [0, 1, 2])
def test_a_slow_store_holds_up_its_readers_only(folder: Path, quick_reads: int, *, is_uploading: bool) -> None:
    """While the store does not answer, sessions wait that read it, and what needs no store is served."""
    with (
        closing(_SlowReads(folder / "server")) as store,
        Server(Application(), store=store) as server,
        Replica(folder / "a", server=server.address) as replica,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        if is_uploading:
            replica.create("Task", {}, "t1")
        store.quick_reads = quick_reads
        try:
            synchronized = pool.submit(replica.synchronize_all)
            assert store.waits.acquire(timeout=WAIT_SECONDS_MAX)
            assert health_status(channel) == health_pb2.HealthCheckResponse.SERVING
        finally:
            store.go_on.set()
        assert synchronized.result(WAIT_SECONDS_MAX).applied == int(is_uploading)

"""Contents of files over a real connection: up, down, who may have them, and what is left of a broken transfer."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tests.builders import World, create, quick_folder, update
from tests.integration.test_backup import script

from tidelog import attribute, claim
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog._values import decode_map
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import file_pb2, file_pb2_grpc, object_pb2, object_pb2_grpc, operation_pb2, sync_pb2, sync_pb2_grpc
from tidelog_server import (
    Application,
    Collected,
    DirectoryContents,
    Principal,
    Server,
    ServerLimits,
    StaticTokens,
    _files,
    _incoming,
    _sightings,
    verify_store,
)
from tidelog_server._content_store import MARK_NAME
from tidelog_server._file_questions import LOOKS_OF_QUESTION, QUESTIONS_OF_USER
from tidelog_server._file_service import FILE_THREADS
from tidelog_server._incoming import part_name

ANN: Final = "ann-token"
BOB: Final = "bob-token"
EVE: Final = "eve-token"
TOKENS: Final = StaticTokens(
    {
        ANN: Principal("ann", roles=frozenset({"clerk"})),
        BOB: Principal("bob", roles=frozenset({"clerk"})),
        EVE: Principal("eve", roles=frozenset({"clerk"})),
        "far": Principal("ann", "elsewhere", frozenset({"clerk"})),
    }
)
REPLICAS: Final = {ANN: "a" * 8, BOB: "b" * 8, EVE: "e" * 8}

PHOTO: Final = random.Random(5).randbytes(3 * FILE_CHUNK_BYTES + 17)
SMALL: Final = b"a signature"

MISSING: Final = file_pb2.FILE_STATE_MISSING
PRESENT: Final = file_pb2.FILE_STATE_PRESENT


def reference(data: bytes, name: str = "photo.jpg") -> dict[str, Any]:
    """Return the value of an attribute that refers to a content."""
    return {"name": name, "size": len(data), "media_type": "image/jpeg", "sha256": sha256(data)}


def sha256(data: bytes) -> bytes:
    """Return the hash of a content."""
    return hashlib.sha256(data).digest()


def ruled() -> Application:
    """Return an application where everybody has tasks of his own, with a secret, and reads public ones."""
    application = Application()
    own = attribute("owner") == claim("user_id")
    application.allow("clerk", "Task", create=True, delete=True, write="*", where=own)
    application.allow("clerk", "Task", read=["title", "photo", "public"], where=attribute("public") == 1)
    return application


@dataclass
class Client:
    """A client of one user: calls by hand."""

    world: World
    token: str | None = None
    seq: int = 0
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = self.world.channel()

    @property
    def stub(self) -> Any:
        """The service."""
        return file_pb2_grpc.FileServiceStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credentials."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def stat(self, *contents: bytes) -> list[tuple[Any, int]]:
        """Ask how contents stand: state, bytes received."""
        request = file_pb2.StatFilesRequest(contents=map(content, contents))
        response = self.stub.StatFiles(request, timeout=10, metadata=self.metadata)
        return [(one.state, one.received_bytes) for one in response.statuses]

    def upload(self, data: bytes, offset: int = 0, until: int | None = None, **said: Any) -> None:
        """Upload a content, or a part of it."""
        self.send(iter(messages(data, offset, until, **said)))

    def send(self, requests: Iterator[file_pb2.UploadFileRequest]) -> None:
        """Send the messages of an upload."""
        self.stub.UploadFile(requests, timeout=10, metadata=self.metadata)

    def download(self, data: bytes, id: str = "t1", offset: int = 0, length: int = 0, entity: str = "Task") -> bytes:  # noqa: A002
        """Download a content by way of an object."""
        key = sync_pb2.ObjectKey(entity=entity, id=id)
        request = file_pb2.DownloadFileRequest(sha256=sha256(data), object=key, offset=offset, length=length)
        responses = self.stub.DownloadFile(request, timeout=10, metadata=self.metadata)
        chunks = [response.chunk for response in responses]
        assert all(0 < len(chunk) <= FILE_CHUNK_BYTES for chunk in chunks)
        return b"".join(chunks)

    def operate(self, *operations: Callable[[int], bytes], lost: bytes = b"") -> list[str]:
        """Upload operations, and return what became of each."""
        data = []
        for make in operations:
            self.seq += 1
            data.append(make(self.seq))
        request = splice_pb2.UploadOperationsRequestSplice(
            protocol_version=1,
            replica_id=f"{REPLICAS.get(self.token or '', 'c' * 8)}-0000-7000-8000-000000000000",
            operations=data,
            lost_contents=[lost] if lost else [],
        )
        call: Any = self.channel.unary_unary("/tidelog.v1.SyncService/UploadOperations")
        answered = call(request.SerializeToString(), timeout=10, metadata=self.metadata)
        response = sync_pb2.UploadOperationsResponse.FromString(cast("bytes", answered))
        return [
            operation_pb2.FailureReason.Name(one.reason).removeprefix("FAILURE_REASON_")
            if one.reason
            else operation_pb2.OperationStatus.Name(one.status).removeprefix("OPERATION_STATUS_")
            for one in response.results
        ]

    def create(self, id: str = "t1", **attributes: Any) -> list[str]:  # noqa: A002
        """Create a task."""
        return self.operate(lambda seq: create(seq, id, attributes))

    def attributes(self, id: str = "t1") -> dict[str, Any]:  # noqa: A002
        """Read a task."""
        stub: Any = object_pb2_grpc.ObjectServiceStub(self.channel)
        request = object_pb2.GetObjectRequest(entity="Task", id=id)
        return decode_map(stub.GetObject(request, timeout=10, metadata=self.metadata).object.attributes)


def content(data: bytes) -> file_pb2.FileContent:
    """Name a content."""
    return file_pb2.FileContent(sha256=sha256(data), size=len(data))


def messages(
    data: bytes, offset: int = 0, until: int | None = None, *, uploader: str = "", **said: Any
) -> list[file_pb2.UploadFileRequest]:
    """Return the messages of an upload, or of a part of one."""
    named = content(data)
    named.MergeFrom(file_pb2.FileContent(**said))
    start = file_pb2.UploadFileStart(content=named, offset=offset, uploader=uploader)
    end = len(data) if until is None else until
    return [
        file_pb2.UploadFileRequest(start=start),
        *(
            file_pb2.UploadFileRequest(chunk=data[at : min(at + FILE_CHUNK_BYTES, end)])
            for at in range(offset, end, FILE_CHUNK_BYTES)
        ),
    ]


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Make a call that is refused, and return what it says to programs."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    info = ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return caught.value.code(), info.reason


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """Give a server where everything is allowed to everybody."""
    with World(folder) as opened:
        yield opened


@pytest.fixture
def client(world: World) -> Client:
    """Give a client of it."""
    return Client(world)


@pytest.fixture
def ruled_world(folder: Path) -> Iterator[World]:
    """Give a server with users who have tasks of their own."""
    with World(folder, ruled(), authenticator=TOKENS) as opened:
        yield opened


def kept_files(world: World) -> list[Path]:
    """Return the files that the server keeps for contents and parts."""
    return files_in(world.folder / "server" / "files")


def files_in(place: Path) -> list[Path]:
    """Return the files of contents and parts in a place."""
    return sorted(one for one in place.rglob("*") if one.is_file() and one.name != MARK_NAME)


class TestUploads:
    def test_a_content_goes_up_and_comes_down(self, client: Client) -> None:
        """What was missing is present once it was uploaded, and comes back through the object that refers to it."""
        assert client.stat(PHOTO, SMALL) == [(MISSING, 0), (MISSING, 0)]

        client.upload(PHOTO)
        client.upload(SMALL)

        assert client.stat(PHOTO, SMALL) == [(PRESENT, 0), (PRESENT, 0)]
        assert client.create(photo=reference(PHOTO), signature=reference(SMALL)) == ["APPLIED"]
        assert client.download(PHOTO) == PHOTO
        assert client.download(SMALL) == SMALL

    def test_an_empty_content(self, client: Client) -> None:
        """A file of no bytes is uploaded by its start alone."""
        client.upload(b"")

        assert client.stat(b"") == [(PRESENT, 0)]
        client.create(photo=reference(b""))
        assert client.download(b"") == b""

    def test_goes_on_where_it_was_cut(self, client: Client) -> None:
        """After a cut the server tells how much it has; the rest makes the content whole."""
        half = 2 * FILE_CHUNK_BYTES
        cut(client, messages(PHOTO, until=half))

        assert client.stat(PHOTO) == [(MISSING, half)]
        client.upload(PHOTO, half)

        client.create(photo=reference(PHOTO))
        assert client.download(PHOTO) == PHOTO

    def test_an_end_before_the_content_is_whole(self, client: Client) -> None:
        """A stream that ends early is a mistake of the client, and what came stays."""
        early = messages(PHOTO, until=FILE_CHUNK_BYTES)

        assert refused(lambda: client.send(iter(early))) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
        assert client.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)]

    @pytest.mark.parametrize("offset", [1, FILE_CHUNK_BYTES - 1, FILE_CHUNK_BYTES + 1, len(PHOTO), -1])
    def test_at_another_offset(self, client: Client, offset: int) -> None:
        """An upload that does not begin where the last one ended is refused, and changes nothing."""
        cut(client, messages(PHOTO, until=FILE_CHUNK_BYTES))

        requests = [file_pb2.UploadFileRequest(start=file_pb2.UploadFileStart(content=content(PHOTO), offset=offset))]

        assert refused(lambda: client.send(iter(requests))) == (grpc.StatusCode.ABORTED, "FILE_OFFSET_MISMATCH")
        assert client.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)]

    @pytest.mark.parametrize(
        "said", [{"sha256": sha256(b"other")}, {"size": len(PHOTO) - 1}], ids=["another hash", "longer than said"]
    )
    def test_of_something_else_leaves_nothing(self, world: World, client: Client, said: dict[str, Any]) -> None:
        """What has another hash, or is longer than it was said to be, is refused, and no byte of it is kept."""
        assert refused(lambda: client.upload(PHOTO, **said)) == (grpc.StatusCode.DATA_LOSS, "FILE_CORRUPT")

        assert kept_files(world) == []
        assert client.stat(PHOTO) == [(MISSING, 0)]

    def test_that_is_too_large(self, folder: Path) -> None:
        """A content above the server's limit is refused before its first byte, and said to be too large."""
        with World(folder, limits=ServerLimits(file_bytes=len(PHOTO) - 1)) as world:
            client = Client(world)

            assert client.stat(PHOTO, SMALL) == [(file_pb2.FILE_STATE_TOO_LARGE, 0), (MISSING, 0)]
            assert refused(lambda: client.upload(PHOTO)) == (grpc.StatusCode.FAILED_PRECONDITION, "FILE_TOO_LARGE")
            assert client.create(photo=reference(PHOTO)) == ["TOO_LARGE"]
            assert kept_files(world) == []

    def test_the_newest_one_wins(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """An upload takes the part from one before that is silent, which may append nothing more."""
        monkeypatch.setattr(_incoming, "SILENCE_US", 0)
        client = Client(world)
        sending = Sending(client, messages(PHOTO, until=FILE_CHUNK_BYTES))
        wait_for(lambda: client.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)])

        client.upload(PHOTO, FILE_CHUNK_BYTES)

        sending.go_on(messages(PHOTO, FILE_CHUNK_BYTES)[1:])
        assert refused(sending.result) == (grpc.StatusCode.ABORTED, "UPLOAD_SUPERSEDED")
        assert client.stat(PHOTO) == [(PRESENT, 0)]

    def test_under_way_are_left_alone(self, world: World) -> None:
        """Who begins an upload that goes on elsewhere is told when to come again, and finds the content there then."""
        client = Client(world)
        sending = Sending(client, messages(PHOTO, until=FILE_CHUNK_BYTES))
        wait_for(lambda: client.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)])

        with pytest.raises(grpc.RpcError) as caught:
            client.upload(PHOTO, FILE_CHUNK_BYTES, uploader="another device")
        status = rpc_status.from_call(cast("grpc.Call", caught.value))
        assert status is not None
        assert status.details[1].Is(RetryInfo.DESCRIPTOR)
        assert refused(lambda: client.upload(PHOTO, uploader="x" * 37))[1] == "REQUEST_INVALID"

        sending.go_on(messages(PHOTO, FILE_CHUNK_BYTES)[1:])
        sending.result()
        assert client.stat(PHOTO) == [(PRESENT, 0)]

    def test_of_two_users_do_not_meet(self, ruled_world: World) -> None:
        """Two users upload the same content at the same time, each all of it."""
        ann, bob = Client(ruled_world, ANN), Client(ruled_world, BOB)
        cut(ann, messages(PHOTO, until=FILE_CHUNK_BYTES))

        assert bob.stat(PHOTO) == [(MISSING, 0)]
        bob.upload(PHOTO)
        assert ann.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)]
        ann.upload(PHOTO, FILE_CHUNK_BYTES)

        assert ann.stat(PHOTO) == bob.stat(PHOTO) == [(PRESENT, 0)]
        assert len(kept_files(ruled_world)) == 1

    @pytest.mark.parametrize(
        "requests",
        [
            [],
            [file_pb2.UploadFileRequest(chunk=b"x")],
            [file_pb2.UploadFileRequest()],
            [*messages(PHOTO)[:1], *messages(PHOTO)[:1]],
            [*messages(PHOTO)[:1], file_pb2.UploadFileRequest(chunk=b"")],
            [*messages(PHOTO)[:1], file_pb2.UploadFileRequest(chunk=PHOTO[: FILE_CHUNK_BYTES + 1])],
            messages(PHOTO, sha256=b"short"),
            messages(PHOTO, size=-1),
        ],
        ids=["nothing", "no start", "empty", "two starts", "empty chunk", "large chunk", "no hash", "negative size"],
    )
    def test_that_make_no_sense(
        self, world: World, client: Client, requests: list[file_pb2.UploadFileRequest]
    ) -> None:
        """What the protocol does not allow is refused as such."""
        code, reason = refused(lambda: client.send(iter(requests)))

        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
        assert kept_files(world) == []

    @pytest.mark.parametrize("limits", [{"file_transfers": 1}, {"file_transfers_per_user": 1}], ids=["all", "user"])
    def test_too_many_at_once(self, folder: Path, limits: dict[str, int]) -> None:
        """Who finds no place is told when to come again, and comes in once one is free."""
        with World(folder, limits=ServerLimits(**limits)) as world:
            client = Client(world)
            sending = Sending(client, messages(PHOTO, until=FILE_CHUNK_BYTES))
            wait_for(lambda: world.server.load.file_transfers == 1)

            with pytest.raises(grpc.RpcError) as caught:
                client.upload(SMALL)
            status = rpc_status.from_call(cast("grpc.Call", caught.value))
            assert status is not None
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert status.details[1].Is(RetryInfo.DESCRIPTOR)

            sending.go_on(messages(PHOTO, FILE_CHUNK_BYTES)[1:])
            sending.result()
            wait_for(lambda: world.server.load.file_transfers == 0)
            client.upload(SMALL)

    def test_that_are_being_stored(self, folder: Path) -> None:
        """While contents are made of what came, however long that takes, everything else about files goes on."""
        stored = threading.Event()

        class Slow(DirectoryContents):
            """Takes its time for a large content."""

            def complete(self, tenant: str, part: str, sha256: bytes, size: int, copy: str = "") -> None:
                assert size < FILE_CHUNK_BYTES or stored.wait(30)
                super().complete(tenant, part, sha256, size, copy)

        large = [bytes([number]) * FILE_CHUNK_BYTES for number in range(FILE_THREADS)]
        with World(folder, contents=Slow(folder / "slow")) as world:
            client = Client(world)
            client.upload(SMALL)
            client.create(photo=reference(SMALL))
            sending = [Sending(client, messages(data)) for data in large]
            try:
                for one in sending:
                    one.go_on([])
                wait_for(lambda: client.stat(*large) == [(MISSING, FILE_CHUNK_BYTES)] * FILE_THREADS)
                wait_for(lambda: len(world.server._files._parts.completing) == FILE_THREADS)
                again = refused(lambda: client.upload(large[0], FILE_CHUNK_BYTES))
                assert again == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
                cut(client, messages(PHOTO, until=FILE_CHUNK_BYTES))
                assert client.download(SMALL) == SMALL
            finally:
                stored.set()
            for one in sending:
                one.result()
            assert client.stat(*large) == [(PRESENT, 0)] * FILE_THREADS

    def test_that_stand_still(self, folder: Path) -> None:
        """A client that sends nothing for too long loses its place, and keeps what it has sent."""
        with World(folder, limits=ServerLimits(idle_seconds=1)) as world:
            client = Client(world)
            sending = Sending(client, messages(PHOTO, until=FILE_CHUNK_BYTES))

            assert refused(sending.result) == (grpc.StatusCode.ABORTED, "SESSION_IDLE")
            wait_for(lambda: world.server.load.file_transfers == 0)
            assert client.stat(PHOTO) == [(MISSING, FILE_CHUNK_BYTES)]

    def test_that_nobody_reads(self, folder: Path) -> None:
        """Of a download that was ended because nothing was read, gRPC keeps nothing: what was to be sent is gone."""
        large = bytes(8_000_000)
        with World(folder, limits=ServerLimits(idle_seconds=0.1)) as world:
            client = Client(world)
            client.upload(large)
            client.create(photo=reference(large))
            key = sync_pb2.ObjectKey(entity="Task", id="t1")
            call = client.stub.DownloadFile(file_pb2.DownloadFileRequest(sha256=sha256(large), object=key))
            wait_for(lambda: world.server.load.file_transfers == 1)
            wait_for(lambda: world.server.load.file_transfers == 0)
            client.stat(large)  # gRPC itself keeps the newest call until another comes

            assert world.server._loop is not None
            loop = world.server._loop
            wait_for(lambda: not any("DownloadFile" in task.get_name() for task in asyncio.all_tasks(loop)))
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED


class TestSessions:
    def test_say_what_was_lost(self, client: Client) -> None:
        """A batch of a session names lost contents like a single call does; what it names must be hashes."""

        def results(lost: bytes) -> list[int]:
            start = sync_pb2.SessionStart(
                protocol_version=1,
                replica_id=f"{REPLICAS[ANN]}-0000-7000-8000-000000000000",
                mode=sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED,
                uploading=True,
            )
            batch = sync_pb2.OperationBatch(
                operations=[operation_pb2.Operation.FromString(create(1, set={"photo": reference(PHOTO)}))],
                lost_contents=[lost],
            )
            requests = [
                sync_pb2.SynchronizeRequest(start=start),
                sync_pb2.SynchronizeRequest(batch=batch),
                sync_pb2.SynchronizeRequest(upload_complete=sync_pb2.UploadComplete()),
            ]
            stub: Any = sync_pb2_grpc.SyncServiceStub(client.channel)
            responses = list(stub.Synchronize(iter(requests), timeout=10))
            return [one.reason for response in responses for one in response.batch_results.results]

        assert refused(lambda: results(b"short")) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
        assert results(sha256(SMALL)) == [operation_pb2.FAILURE_REASON_UNSPECIFIED]
        assert results(sha256(PHOTO)) == [operation_pb2.FAILURE_REASON_FILE_MISSING]


class TestDownloads:
    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (1, 0), (FILE_CHUNK_BYTES, 10), (5, FILE_CHUNK_BYTES + 5), (len(PHOTO), 0), (len(PHOTO) - 1, 100)],
    )
    def test_a_range(self, client: Client, offset: int, length: int) -> None:
        """As many bytes come as were asked for, from where it was asked, to the end of the content at the most."""
        client.upload(PHOTO)
        client.create(photo=reference(PHOTO))

        expected = PHOTO[offset : offset + length] if length else PHOTO[offset:]
        assert client.download(PHOTO, offset=offset, length=length) == expected

    @pytest.mark.parametrize(("offset", "length"), [(-1, 0), (len(PHOTO) + 1, 0), (0, -1)])
    def test_a_range_that_is_none(self, client: Client, offset: int, length: int) -> None:
        """What lies outside of the content is refused."""
        client.upload(PHOTO)
        client.create(photo=reference(PHOTO))

        code, reason = refused(lambda: client.download(PHOTO, offset=offset, length=length))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")

    def test_a_content_that_was_lost(self, world: World, client: Client) -> None:
        """A content that is gone from the disk is said to be lost, and comes back once somebody uploads it."""
        client.upload(PHOTO)
        client.create(photo=reference(PHOTO))
        (file,) = kept_files(world)
        file.unlink()

        assert refused(lambda: client.download(PHOTO)) == (grpc.StatusCode.DATA_LOSS, "FILE_LOST")
        assert client.stat(PHOTO) == [(MISSING, 0)]
        client.upload(PHOTO)
        assert client.download(PHOTO) == PHOTO

    def test_a_content_that_was_cut_short(self, world: World, client: Client) -> None:
        """A content that has not all of its bytes is lost too: none of it is sent."""
        client.upload(PHOTO)
        client.create(photo=reference(PHOTO))
        (file,) = kept_files(world)
        file.write_bytes(PHOTO[:-1])
        came: list[Any] = []

        key = sync_pb2.ObjectKey(entity="Task", id="t1")
        request = file_pb2.DownloadFileRequest(sha256=sha256(PHOTO), object=key)
        code = refused(lambda: came.extend(client.stub.DownloadFile(request, timeout=10)))
        assert (code, came) == ((grpc.StatusCode.DATA_LOSS, "FILE_LOST"), [])
        client.upload(PHOTO)
        assert client.download(PHOTO) == PHOTO

    def test_by_an_object_that_does_not_refer_to_it(self, client: Client) -> None:
        """An object that does not refer to the content, or not any more, gives nobody the content."""
        client.upload(PHOTO)
        client.create(photo=reference(PHOTO))
        client.create("t2", photo=reference(PHOTO))
        client.create("t3", title="plain")

        client.operate(lambda seq: update(seq, "t2", {"photo": None}))

        for id_ in ("t2", "t3", "absent"):
            code, reason = refused(lambda id_=id_: client.download(PHOTO, id_))  # type: ignore[misc]
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND")
        assert client.download(PHOTO) == PHOTO


class TestAccess:
    def test_knowing_a_hash_gives_nothing(self, ruled_world: World) -> None:
        """Who neither uploaded a content nor can read who refers to it learns not even that it is there."""
        ann, eve = Client(ruled_world, ANN), Client(ruled_world, EVE)
        ann.upload(PHOTO)
        assert ann.create(owner="ann", photo=reference(PHOTO)) == ["APPLIED"]
        nobodys = b"nobody has this"

        for data in (PHOTO, nobodys):
            assert eve.stat(data) == [(MISSING, 0)]
            assert eve.create("e1", owner="eve", photo=reference(data)) == ["NOT_READY"]
            wrong_size = {**reference(data), "size": 5}
            assert eve.create("t9", owner="eve", photo=wrong_size) == ["NOT_READY"]
            assert refused(lambda data=data: eve.download(data)) == (  # type: ignore[misc]
                grpc.StatusCode.NOT_FOUND,
                "FILE_NOT_FOUND",
            )
            lost = eve.operate(
                lambda seq, data=data: create(seq, f"l{seq}", {"owner": "eve", "photo": reference(data)}),  # type: ignore[misc]
                lost=sha256(data),
            )
            assert lost == ["FILE_MISSING"]

    def test_who_reads_a_referrer_may_refer_to_its_content(self, ruled_world: World) -> None:
        """A content that somebody can read through one object need not be uploaded for another one."""
        ann, bob = Client(ruled_world, ANN), Client(ruled_world, BOB)
        ann.upload(PHOTO)
        ann.create(owner="ann", public=1, photo=reference(PHOTO))

        assert bob.create("t2", owner="bob", photo=reference(PHOTO)) == ["APPLIED"]
        assert bob.stat(PHOTO) == [(PRESENT, 0)]
        assert bob.download(PHOTO, "t1") == bob.download(PHOTO, "t2") == PHOTO

    def test_an_attribute_that_may_not_be_read(self, ruled_world: World) -> None:
        """A content that only an unreadable attribute refers to is as if it were not there."""
        ann, bob = Client(ruled_world, ANN), Client(ruled_world, BOB)
        ann.upload(SMALL)
        ann.create(owner="ann", public=1, secret=reference(SMALL))

        assert "secret" not in bob.attributes()
        assert bob.stat(SMALL) == [(MISSING, 0)]
        assert bob.create("t2", owner="bob", photo=reference(SMALL)) == ["NOT_READY"]
        assert refused(lambda: bob.download(SMALL)) == (grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND")
        assert ann.download(SMALL) == SMALL

    def test_another_tenant(self, ruled_world: World) -> None:
        """The same user in another tenant has none of it."""
        ann, far = Client(ruled_world, ANN), Client(ruled_world, "far")
        ann.upload(PHOTO)
        ann.create(owner="ann", photo=reference(PHOTO))

        assert far.stat(PHOTO) == [(MISSING, 0)]
        assert refused(lambda: far.download(PHOTO)) == (grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND")

    def test_what_is_present_may_be_referred_to_later(self, ruled_world: World) -> None:
        """What StatFiles calls present can be referred to although the object that gave the right is gone since."""
        ann, bob = Client(ruled_world, ANN), Client(ruled_world, BOB)
        ann.upload(PHOTO)
        ann.create(owner="ann", public=1, photo=reference(PHOTO))
        assert bob.stat(PHOTO) == [(PRESENT, 0)]

        ann.operate(lambda seq: update(seq, "t1", {"public": 0}))

        assert bob.create("t2", owner="bob", photo=reference(PHOTO)) == ["APPLIED"]


# A server that kills itself when a content is made: before that, between it and its record, or behind both.
KILLED = """
import os, signal, sys
from tidelog_server import Application, Server
from tidelog_server._files import Files

folder, place = sys.argv[1:]
complete, write = Files._complete, Files._write

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def completing(self, *args):
    if place == "before":
        killed()
    Files._write = killed if place == "between" else write
    complete(self, *args)
    killed()

Files._complete = completing
with Server(Application(), store=folder) as server:
    print(server.address, flush=True)
    signal.pause()
"""


class TestCrashes:
    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["before", "between", "behind"])
    def test_leave_garbage_at_the_most(self, folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever a server is killed while it makes a content, the next one is sound, and nothing stays for good."""
        with script(KILLED, folder / "server", place) as process:
            assert process.stdout is not None
            with grpc.insecure_channel(process.stdout.readline().strip()) as channel:
                stub: Any = file_pb2_grpc.FileServiceStub(channel)
                with pytest.raises(grpc.RpcError):
                    stub.UploadFile(iter(messages(PHOTO)), timeout=20)
            assert process.wait(20) == -9

        with World(folder) as world:
            client = Client(world)
            received = len(PHOTO) if place == "before" else 0
            assert client.stat(PHOTO) == [(PRESENT, 0) if place == "behind" else (MISSING, received)]
            assert len(kept_files(world)) == 1
        for module in (_files, _sightings):
            monkeypatch.setattr(module, "UNKNOWN_KEPT", timedelta(0))
        monkeypatch.setattr(_files, "PART_US_MIN", 0)
        with Server(Application(), store=folder / "server", file_grace=timedelta(0)) as server:
            wait_for(lambda: server.collect() == Collected())
        assert kept_files(world) == []
        assert list(verify_store(folder / "server")) == []


class TestService:
    def test_is_named(self, world: World, client: Client) -> None:
        """Health checks know the service."""
        stub: Any = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest(service="tidelog.v1.FileService")
        assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING

    @pytest.mark.parametrize("count", [0, 1_001])
    def test_asks_for_a_number_that_makes_sense(self, client: Client, count: int) -> None:
        """Nobody asks for no content, or for more than a thousand at once."""
        code, reason = refused(lambda: client.stat(*[SMALL] * count))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
        assert client.stat(*[SMALL] * 1_000) == [(MISSING, 0)] * 1_000

    def test_tells_of_one_content_with_several_sizes(self, client: Client) -> None:
        """Whoever names a content with a wrong size, too, is told that this one is not there, and of all others."""
        client.upload(SMALL)
        contents = [file_pb2.FileContent(sha256=sha256(SMALL), size=size) for size in (1, len(SMALL))]
        request = file_pb2.StatFilesRequest(contents=[*contents, content(PHOTO)])

        response = client.stub.StatFiles(request, timeout=10)
        assert [one.state for one in response.statuses] == [MISSING, PRESENT, MISSING]

    def test_asks_about_several_contents_at_once(self, folder: Path) -> None:
        """A place of contents that takes its time for each answer is asked about several contents at once."""
        together = threading.Barrier(LOOKS_OF_QUESTION)

        class Slow(DirectoryContents):
            """Answers to so many together only."""

            def size(self, tenant: str, sha256: bytes, copy: str = "") -> int | None:
                if is_slow:
                    together.wait(30)
                return super().size(tenant, sha256, copy)

            def part_size(self, tenant: str, part: str) -> int:
                if is_slow:
                    together.wait(30)
                return super().part_size(tenant, part)

        there, missing = ([b"%d %d" % (kind, one) for one in range(2 * LOOKS_OF_QUESTION)] for kind in range(2))
        is_slow = False
        with World(folder, contents=Slow(folder / "slow")) as world:
            client = Client(world)
            for data in there:
                client.upload(data)
            is_slow = True
            assert client.stat(*there) == [(PRESENT, 0)] * len(there)
            assert client.stat(*missing) == [(MISSING, 0)] * len(missing)

    def test_is_not_kept_busy_by_one_user(self, folder: Path) -> None:
        """Questions of one user that wait for the place of contents hold up nobody else, and end with their client."""
        answered = threading.Event()
        asked: list[str] = []

        class Slow(DirectoryContents):
            """Takes its time for one user."""

            def part_size(self, tenant: str, part: str) -> int:
                asked.append(part)
                assert part not in of_eve or answered.wait(30)
                return super().part_size(tenant, part)

        contents = [bytes([number]) for number in range(10 * LOOKS_OF_QUESTION)]
        of_eve = {part_name("eve", sha256(data)) for data in contents}
        with World(folder, ruled(), contents=Slow(folder / "slow"), authenticator=TOKENS) as world:
            ann, eve = Client(world, ANN), Client(world, EVE)
            ann.create(owner="ann")
            request = file_pb2.StatFilesRequest(contents=map(content, contents))
            calls = [eve.stub.StatFiles.future(request, timeout=30, metadata=eve.metadata) for _ in range(100)]
            try:
                wait_for(lambda: len(asked) == QUESTIONS_OF_USER * LOOKS_OF_QUESTION)
                assert ann.stat(SMALL) == [(MISSING, 0)]
                assert ann.attributes() == {"owner": "ann"}
                for call in calls:
                    call.cancel()
                questions = world.server._services._admission.file_questions
                wait_for(lambda: not questions.taken)
            finally:
                answered.set()
            assert ann.stat(SMALL, b"eve's are over") == [(MISSING, 0)] * 2
        assert sum(part in of_eve for part in asked) == QUESTIONS_OF_USER * LOOKS_OF_QUESTION

    def test_keeps_contents_where_it_is_told(self, folder: Path) -> None:
        """A server that is given another place keeps contents there."""
        world = World(folder, contents=DirectoryContents(folder / "elsewhere"))
        with world:
            client = Client(world)
            client.upload(PHOTO)
            client.create(photo=reference(PHOTO))
            assert client.download(PHOTO) == PHOTO
        assert kept_files(world) == []
        assert len(files_in(folder / "elsewhere")) == 1

    def test_survives_a_restart(self, world: World) -> None:
        """Parts, contents and rights to them are there after the server was stopped and started again."""
        client = Client(world)
        client.upload(SMALL)
        cut(client, messages(PHOTO, until=FILE_CHUNK_BYTES))

        world.deploy(Application())

        client = Client(world)
        assert client.stat(PHOTO, SMALL) == [(MISSING, FILE_CHUNK_BYTES), (PRESENT, 0)]
        client.upload(PHOTO, FILE_CHUNK_BYTES)
        assert client.create(photo=reference(PHOTO), small=reference(SMALL)) == ["APPLIED"]


class Sending:
    """An upload that sends when it is told to."""

    def __init__(self, client: Client, requests: list[file_pb2.UploadFileRequest]) -> None:
        self._more = threading.Event()
        self._rest: list[file_pb2.UploadFileRequest] = []
        self._first = requests
        self.call = client.stub.UploadFile.future(self._requests(), timeout=30, metadata=client.metadata)

    def go_on(self, requests: list[file_pb2.UploadFileRequest]) -> None:
        """Send the rest."""
        self._rest = requests
        self._more.set()

    def result(self) -> Any:
        """Wait for the response."""
        try:
            return self.call.result()
        finally:
            self._more.set()

    def cancel(self) -> None:
        """Break the stream."""
        self.call.cancel()
        self._more.set()

    def _requests(self) -> Iterator[file_pb2.UploadFileRequest]:
        yield from self._first
        self._more.wait(30)
        yield from self._rest


def cut(client: Client, requests: list[file_pb2.UploadFileRequest]) -> None:
    """Break an upload once the server has all that was sent."""
    sent = requests[0].start.offset + sum(len(one.chunk) for one in requests)
    named = requests[0].start.content
    sending = Sending(client, requests)

    def received() -> int:
        response = client.stub.StatFiles(
            file_pb2.StatFilesRequest(contents=[named]), timeout=10, metadata=client.metadata
        )
        return cast("int", response.statuses[0].received_bytes)

    wait_for(lambda: received() == sent)
    sending.cancel()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    for _ in range(3_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to hold")

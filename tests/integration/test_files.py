"""Files between replicas and a server over real connections: cuts, slow paths, deadlines, interrupts, two replicas."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from tests.builders import TENANT, World, quick_folder

from tidelog import DiskFull, Entity, FailureReason, File, OperationKind, Reference, Schema, attribute, claim
from tidelog._contents import content_path
from tidelog.testing import Proxy
from tidelog.v1 import file_pb2, file_pb2_grpc
from tidelog_client import FileState, Phase, Progress, Replica, Report, SkipReason, _file_exchange, _transfer
from tidelog_client._call_errors import Transient
from tidelog_client._file_channel import FileChannel
from tidelog_client._synchronizer import Synchronizer
from tidelog_server import Application, DirectoryContents, Principal, ServerLimits, StaticTokens
from tidelog_server._file_rules import REFERRERS_MAX
from tidelog_server._files import Files

pytestmark = pytest.mark.slow

PHOTO: Final = b"a photo" * 1000
LARGE: Final = random.Random(5).randbytes(20 * 1024 * 1024)
CUTS: Final = 5
# What cuts may cost, of the bytes of a content.
COST_MAX: Final = 1.05
# A path on which both ends keep pace: what lies in their buffers when it is cut is little.
PATH_BYTES_PER_SECOND: Final = 10 * 1024 * 1024


@pytest.fixture
def world() -> Iterator[World]:
    """Give a server."""
    with quick_folder() as folder, World(folder) as world:
        yield world


@pytest.fixture
def proxy(world: World) -> Iterator[Proxy]:
    """Give a proxy before it."""
    with Proxy(world.server.address) as proxy:
        yield proxy


def read(replica: Replica, id: str, attribute: str = "photo", **options: Any) -> bytes:  # noqa: A002
    """Return the content of a file."""
    with replica.open_file("Task", id, attribute, **options) as file:
        return file.read()


def server_contents(world: World) -> list[bytes]:
    """Return the hashes of the contents that lie in the server's directory."""
    names = (one.name.partition("-")[0] for one in (world.folder / "server" / "files").rglob("*") if one.is_file())
    return [bytes.fromhex(name) for name in names if len(name) == 64]


def upload(world: World, data: bytes) -> None:
    """Upload a content to which no operation refers yet."""
    start = file_pb2.UploadFileStart(content=file_pb2.FileContent(sha256=_hash(data), size=len(data)))
    messages = [file_pb2.UploadFileRequest(start=start), file_pb2.UploadFileRequest(chunk=data)]
    file_pb2_grpc.FileServiceStub(world.channel()).UploadFile(iter(messages), timeout=10)


def cutting(proxy: Proxy, size: int) -> Callable[[Progress], None]:
    """Return an observer that cuts all connections, each time another sixth of the bytes is done."""
    cuts = [size * n // (CUTS + 1) for n in range(1, CUTS + 1)]

    def observe(now: Progress) -> None:
        if now.phase is Phase.FILES and cuts and now.done >= cuts[0]:
            cuts.pop(0)
            proxy.cut(resets=True)

    observe.cuts = cuts  # type: ignore[attr-defined]
    return observe


def test_a_photo_travels_from_one_replica_to_another(world: World) -> None:
    """What one replica attaches another one opens, and an update of it too."""
    one, two = world.replica("one"), world.replica("two")
    one.create("Task", {}, "t1")
    one.attach("Task", "t1", "photo", PHOTO, name="photo.jpg")
    report = one.synchronize_all()
    assert (report.applied, report.rejected, report.files_uploaded) == (2, 0, 1)
    report = two.synchronize_all()
    assert (report.files_downloaded, report.file_bytes_received) == (1, len(PHOTO))
    assert read(two, "t1") == PHOTO
    two.attach("Task", "t1", "photo", b"another one")
    two.synchronize_all()
    one.synchronize_all()
    assert read(one, "t1") == b"another one"
    assert [list(replica.failures()) for replica in (one, two)] == [[], []]
    assert [list(replica.verify()) for replica in (one, two)] == [[], []]


def test_the_servers_folder_of_contents_is_away(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """While the server's contents are out of reach, who refers to one loses nothing, and goes on when it is back."""
    author = world.replica("author")
    author.create("Task", {"photo": author.add_file(PHOTO)}, "t1")
    author.synchronize_all()
    replica = world.replica(files={"Task": "never"})
    replica.synchronize_all()
    (seen,) = replica.query("Task")
    replica.create("Task", {"photo": seen["photo"]}, "t2")
    replica.create("Task", {}, "t3")
    place = world.folder / "server" / "files"
    away = place.rename(place.with_name("away"))
    address = world.server.address
    world.server.stop(grace_seconds=0)
    world.server = world.made_server(address)
    world.server.start()

    report = replica.synchronize_all(timeout=2)

    assert [(one.id, one.reason) for one in report.skipped] == [("t2", SkipReason.FILE_NOT_UPLOADED)]
    assert (report.applied, replica.pending_count(), list(replica.failures())) == (1, 1, [])
    assert "files can be neither uploaded nor downloaded, nor are they collected" in caplog.text
    away.rename(place)
    report = replica.synchronize_all()
    assert (report.applied, report.skipped, list(replica.failures())) == (1, [], [])
    assert read(author, "t1") == PHOTO


@pytest.mark.timeout(120)
def test_two_devices_that_upload_the_same(world: World, proxy: Proxy) -> None:
    """Of two devices with the same content one uploads it, and the other one waits: its bytes go up once."""
    replicas = [world.replica(name, server=proxy.address) for name in ("one", "two")]
    for number, replica in enumerate(replicas):
        replica.create("Task", {"photo": replica.add_file(LARGE)}, f"t{number}")
    proxy.up.bytes_per_second = proxy.down.bytes_per_second = PATH_BYTES_PER_SECOND // 2
    reports: dict[str, Report] = {}
    threads = [
        threading.Thread(target=lambda one=one, name=name: reports.update({name: one.synchronize_all()}))
        for one, name in zip(replicas, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [(one.applied, one.skipped) for one in reports.values()] == [(1, [])] * 2
    assert sum(one.files_uploaded for one in reports.values()) == 1
    assert len(LARGE) < proxy.up.byte_count <= COST_MAX * len(LARGE)


def test_what_is_on_its_way_is_waited_for(world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of which gRPC has every byte, on a path that takes long for them, needs no second synchronization."""
    replica = world.replica(server=proxy.address)
    replica.synchronize_all()
    replica.create("Task", {"photo": replica.add_file(LARGE[:400_000])}, "t1")
    monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.3)
    proxy.up.bytes_per_second = 200_000

    report = replica.synchronize_all()

    assert (report.applied, report.skipped, report.file_bytes_sent) == (1, [], 400_000)


def test_no_room_for_more_that_nothing_refers_to() -> None:
    """What a user may not upload yet stays pending and is reported at once, and goes up when there is room."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=len(PHOTO) + 5_000)) as world:
        replica, other = world.replica("one"), world.replica("other")
        upload(world, b"nothing")
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {}, "t2")

        report = replica.synchronize_all()

        assert [(one.id, one.reason) for one in report.skipped] == [("t1", SkipReason.FILE_NOT_UPLOADED)]
        assert "above the limit" in report.skipped[0].message
        assert (report.applied, replica.pending_count(), list(replica.failures())) == (1, 1, [])
        other.create("Task", {"photo": other.add_file(b"nothing")}, "t3")
        other.synchronize_all()
        assert replica.synchronize_all().applied == 1


def test_a_commit_group_has_more_files_than_there_is_room_for() -> None:
    """What can never go as it is uploads nothing, and is told with the limit's name; everything else goes."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        photos = [{"photo": replica.add_file(bytes([number]) * 20_000)} for number in range(4)]
        with replica.transaction(atomic=True) as transaction:
            for number in range(3):
                transaction.create("Task", photos[number], f"t{number}")
            transaction.create("Task", {}, "t3")
        replica.create("Task", photos[3], "t4")

        for applied in (1, 0):
            report = replica.synchronize_all()
            assert (report.applied, report.files_uploaded) == (applied, applied)
            assert [(one.id, one.reason) for one in report.skipped] == [
                (f"t{number}", SkipReason.FILES_EXCEED_ROOM) for number in range(4)
            ]
            assert "have 72288 bytes" in report.skipped[0].message
            assert "takes 60000 at once, its limit file_room_per_user" in report.skipped[0].message


def test_what_is_there_of_a_commit_group_counts_for_it() -> None:
    """A group that needs more than there is room for is told so though some is there; what is nobody's room is not."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        replica.create("Task", {"photo": replica.add_file(b"k" * 40_000)}, "known")
        assert replica.synchronize_all().applied == 1
        with replica.transaction(atomic=True) as transaction:
            transaction.update("Task", "known", {"other": replica.add_file(b"k" * 40_000)})
            transaction.create("Task", {"photo": replica.add_file(b"a" * 40_000)})
        assert replica.synchronize_all().applied == 2
        photos = [bytes([number]) * 15_000 for number in range(4)]
        with replica.transaction(atomic=True) as transaction:
            for number, photo in enumerate(photos):
                transaction.create("Task", {"photo": replica.add_file(photo)}, f"t{number}")
        for photo in photos[:2]:
            upload(world, photo)

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded) == (0, 0)
        assert [one.reason for one in report.skipped] == [SkipReason.FILES_EXCEED_ROOM] * 4


@pytest.mark.parametrize("is_first", [True, False])
def test_a_content_that_an_operation_of_its_own_brings_counts_for_no_group(*, is_first: bool) -> None:
    """What takes room for an operation only until that has gone is not held against a group that needs it too."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        photos = [replica.add_file(bytes([number]) * 40_000) for number in range(2)]

        def alone() -> None:
            replica.create("Task", {"photo": photos[0]}, "alone")

        if is_first:
            alone()
        with replica.transaction(atomic=True) as transaction:
            for photo in photos:
                transaction.create("Task", {"photo": photo})
        if not is_first:
            alone()

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (3, 2, [])


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("is_too_much", [False, True])
def test_room_is_shared_though_the_server_did_not_answer_at_first(
    monkeypatch: pytest.MonkeyPatch, *, is_too_much: bool, failures: int
) -> None:
    """Where nobody says at first how much room there is parts of several groups do not fill it."""
    room_bytes = 30_000 if is_too_much else 64_000
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=room_bytes)) as world:
        replica = world.replica()
        for group in range(3):
            with replica.transaction(atomic=True) as transaction:
                for number in range(3):
                    photo = replica.add_file(bytes([group, number]) * (7_500 + 10 * number))
                    transaction.create("Task", {"photo": photo})
        stat, asked = FileChannel.stat, []

        def fails(self: FileChannel, metadata: Any, contents: Any) -> Any:
            asked.append(contents)
            if len(asked) <= failures:
                raise Transient("the server did not answer")
            return stat(self, metadata, contents)

        monkeypatch.setattr(FileChannel, "stat", fails)

        report = replica.synchronize_all()

        if is_too_much:
            assert (report.applied, report.files_uploaded) == (0, 0)
            assert [one.reason for one in report.skipped] == [SkipReason.FILES_EXCEED_ROOM] * 9
        else:
            assert (report.applied, report.files_uploaded, report.skipped) == (9, 9, [])


def test_what_a_session_that_was_cut_would_have_taken_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first session is cut, what the next one takes makes room for more, in the same synchronization."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        for number in range(2):
            replica.create("Task", {"photo": replica.add_file(bytes([number]) * 40_000)}, f"t{number}")
        attempt, attempts = Synchronizer._attempt, []

        def cut_once(self: Synchronizer, *arguments: Any) -> None:
            attempts.append(arguments)
            if len(attempts) == 1:
                raise Transient("cut")
            attempt(self, *arguments)

        monkeypatch.setattr(Synchronizer, "_attempt", cut_once)

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (2, 2, [])


def test_what_is_not_ready_makes_no_room() -> None:
    """Where the creation of an object waits in vain, the files of what refers to it leave the room to others."""
    schema = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task")})])
    limits = ServerLimits(file_room_per_user=60_000)
    with quick_folder() as folder, World(folder, Application(schema=schema), limits=limits) as world:
        replica = world.replica()
        with replica.transaction(atomic=True) as transaction:  # more than there is room for
            transaction.create("Task", {"photo": replica.add_file(b"1" * 40_000)}, "parent")
            transaction.create("Task", {"photo": replica.add_file(b"2" * 40_000)}, "other parent")
        replica.create("Task", {"photo": replica.add_file(b"x" * 40_000), "parent": "parent"}, "child")
        replica.create("Task", {"photo": replica.add_file(b"y" * 40_000)}, "other")

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded) == (1, 1)
        (message,) = (one.message for one in report.skipped if one.id == "child")
        assert "an operation that comes before it waits for the content of a file" in message


def test_what_refers_to_an_object_does_not_take_the_room_of_its_files() -> None:
    """Small files whose objects refer to one with large files leave these the room: all go, in one synchronization."""
    schema = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task")})])
    limits = ServerLimits(file_room_per_user=60_000)
    with quick_folder() as folder, World(folder, Application(schema=schema), limits=limits) as world:
        replica = world.replica()
        with replica.transaction(atomic=True) as transaction:
            for number in range(2):
                value = replica.add_file(bytes([number]) * 20_000)
                transaction.create("Task", {"photo": value}, ("parent", "other parent")[number])
        replica.create("Task", {"parent": "parent"}, "child")
        replica.create("Task", {"photo": replica.add_file(b"x" * 10_000), "parent": "child"}, "grandchild")
        replica.create("Task", {"photo": replica.add_file(b"y" * 10_001)}, "other")

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (5, 4, [])


@pytest.mark.parametrize("on_delete", ["keep", "restrict"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_deletion_does_not_overtake_what_refers_to_its_object(
    monkeypatch: pytest.MonkeyPatch, on_delete: Literal["keep", "restrict"], *, is_new: bool
) -> None:
    """While a file is on its way, the deletion of what its object refers to, or did, waits; other deletions go."""
    monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 0)
    schema = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task", on_delete=on_delete)})])
    with quick_folder() as folder, World(folder, Application(schema=schema)) as world:
        replica = world.replica()
        for id_ in ("old", "new", "other"):
            replica.create("Task", {}, id_)
        if not is_new:
            replica.create("Task", {"parent": "old"}, "child")
        replica.synchronize_all()
        value = replica.add_file(PHOTO)
        if is_new:
            replica.create("Task", {"photo": value, "parent": "old"}, "child")
        if not is_new or on_delete == "restrict":
            replica.update("Task", "child", {"photo": value, "parent": "new"})
        replica.delete("Task", "old")
        replica.delete("Task", "other")
        settled: list[list[int]] = []

        def note(progress: Progress) -> None:
            if progress.phase is Phase.FILES:
                settled.append([one.operation.seq for one in replica.pending()])

        report = replica.synchronize_all(on_progress=note)

        deletion = next(one.operation.seq for one in replica.log() if one.operation.kind is OperationKind.DELETE)
        assert any(deletion in pending and deletion + 1 not in pending for pending in settled)
        assert (report.rejected, replica.pending_count(), report.skipped) == (0, 0, [])
        assert {one.id for one in replica.query("Task")} == {"new", "child"}


def test_a_deletion_that_waits_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot go up, the report names what stays behind, the deletion of what its object refers to too."""
    monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 0)
    monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.3)
    schema = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task", on_delete="keep")})])
    with quick_folder() as folder, World(folder, Application(schema=schema)) as world:
        replica = world.replica()
        replica.create("Task", {}, "old")
        replica.synchronize_all()
        replica.create("Task", {"photo": replica.add_file(PHOTO), "parent": "old"}, "child")
        replica.delete("Task", "old")
        upload = FileChannel.upload

        def away(*_: object) -> None:
            raise Transient("the path is too bad for that")

        monkeypatch.setattr(FileChannel, "upload", away)

        report = replica.synchronize_all()

        assert [(one.id, one.reason) for one in report.skipped] == [
            ("child", SkipReason.FILE_NOT_UPLOADED),
            ("old", SkipReason.FILE_NOT_UPLOADED),
        ]
        assert report.skipped[1].message == "an operation that refers to the object waits for the content of a file"
        monkeypatch.setattr(FileChannel, "upload", upload)
        assert (replica.synchronize_all().applied, replica.pending_count()) == (2, 0)


def test_a_selection_leaves_what_it_refers_to_the_room() -> None:
    """Where the schema is not known yet, a selection brings no files of what would not be ready, which need room."""
    schema = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task")})])
    limits = ServerLimits(file_room_per_user=60_000)
    with quick_folder() as folder, World(folder, Application(schema=schema), limits=limits) as world:
        replica = world.replica()
        replica.create("Task", {"photo": replica.add_file(b"1" * 70_000)}, "parent")
        replica.create("Task", {"photo": replica.add_file(b"x" * 10_000), "parent": "parent"}, "child")

        selected = replica.synchronize_selected([("Task", "child")])
        report = replica.synchronize_all()

        assert (selected.applied, selected.files_uploaded) == (0, 0)
        assert (report.applied, report.files_uploaded, report.skipped) == (2, 2, [])


def test_a_selection_knows_what_takes_room() -> None:
    """What a selection brings, beside what is there of other operations, leaves these the room that they need."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        photos = [bytes([number]) * 20_000 for number in range(2)]
        with replica.transaction(atomic=True) as transaction:
            for number, photo in enumerate(photos):
                transaction.create("Task", {"photo": replica.add_file(photo)}, f"t{number}")
        upload(world, photos[0])
        with replica.transaction(atomic=True) as transaction:
            for number in range(2):
                value = replica.add_file(bytes([9, number]) * 8_000)
                transaction.create("Task", {"photo": value}, f"u{number}")

        selected = replica.synchronize_selected([("Task", "u0")])
        report = replica.synchronize_all()

        assert (selected.applied, selected.files_uploaded) == (0, 0)
        assert (report.applied, report.files_uploaded, report.skipped) == (4, 3, [])


def test_a_content_that_made_room_is_not_lost() -> None:
    """What came long ago, makes room, and is not on the device any more is there for the operation that needs it."""
    limits = ServerLimits(file_room_per_user=60_000)
    with quick_folder() as folder, World(folder, limits=limits) as world:
        replica = world.replica()
        photos = [bytes([number]) * 25_000 for number in range(2)]
        with replica.transaction(atomic=True) as transaction:
            for number, photo in enumerate(photos):
                transaction.create("Task", {"photo": replica.add_file(photo)}, f"t{number}")
        contents = DirectoryContents(folder / "server" / "files")
        ago = time.time_ns() // 1000 - 2 * 24 * 3600 * 1_000_000
        former = Files(world.lab.application, world.store, contents, lambda: ago)
        former.add(TENANT, io.BytesIO(photos[0]), "anonymous")
        upload(world, b"what another device needs" * 800)
        (replica.path / "files" / content_path(_hash(photos[0]))).unlink()

        report = replica.synchronize_all()

        assert (report.applied, report.rejected, report.files_uploaded) == (2, 0, 1)


def test_commit_groups_share_the_room() -> None:
    """Groups whose files fit one after the other, and not together, all go, in one synchronization."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        for group in range(3):
            with replica.transaction(atomic=True) as transaction:
                for number in range(2):
                    photo = replica.add_file(bytes([group, number]) * (5_000 * (1 + number)))
                    transaction.create("Task", {"photo": photo}, f"g{group}-{number}")
        replica.create("Task", {"photo": replica.add_file(PHOTO * 20)}, "t1")  # more than there is room for

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (7, 7, [])


def test_what_came_before_takes_room_too() -> None:
    """What an interrupted synchronization brought of a commit group counts: the group goes before others begin."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=72_000)) as world:
        replica = world.replica()
        groups = [(b"a" * 30_000, b"b" * 25_000), (b"c" * 20_000, b"d" * 14_000)]
        for photos in groups:
            with replica.transaction(atomic=True) as transaction:
                for photo in photos:
                    transaction.create("Task", {"photo": replica.add_file(photo)})
        upload(world, groups[0][0])

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (4, 3, [])


def test_small_files_do_not_wait_for_one_that_the_server_cannot_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server's disk is too full for a large file, small ones that do not fit beside it go all the same."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        append = DirectoryContents.append

        def full(self: DirectoryContents, tenant: str, part: str, offset: int, data: bytes) -> None:
            if len(data) > 30_000:
                raise DiskFull("no room left")
            append(self, tenant, part, offset, data)

        monkeypatch.setattr(DirectoryContents, "append", full)
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.3)
        replica = world.replica()
        for number, size in enumerate((50_000, 10_000, 10_001)):
            replica.create("Task", {"photo": replica.add_file(bytes([number]) * size)}, f"t{number}")

        report = replica.synchronize_all()

        assert (report.applied, [one.id for one in report.skipped]) == (2, ["t0"])


def test_what_comes_behind_an_operation_that_cannot_go_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be read, those of later operations on the same object leave the room to others."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=60_000)) as world:
        replica = world.replica()
        replica.create("Task", {}, "t1")
        replica.attach("Task", "t1", "photo", b"b" * 20_000)
        replica.attach("Task", "t1", "photo", b"c" * 40_000)
        replica.create("Task", {"photo": replica.add_file(PHOTO * 6)}, "t2")
        contents = replica._storage.files.contents
        opened, bad = contents.open, _hash(b"b" * 20_000)

        class Unreadable(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(contents, "open", lambda name: Unreadable() if name == bad else opened(name))

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, len(report.skipped)) == (2, 1, 2)
        assert "Input/output error" in report.skipped[0].message


def test_a_file_that_is_replaced_before_it_goes_takes_no_room() -> None:
    """What was attached to one object in turn goes up as far as there is room, and the rest of it after that."""
    with quick_folder() as folder, World(folder, limits=ServerLimits(file_room_per_user=72_000)) as world:
        replica = world.replica()
        replica.create("Task", {}, "t1")
        for number in range(6):
            replica.attach("Task", "t1", "photo", bytes([number]) * 22_000)

        report = replica.synchronize_all()

        assert (report.applied, report.files_uploaded, report.skipped) == (7, 6, [])


@pytest.mark.timeout(120)
def test_cuts_of_an_upload_cost_little(world: World, proxy: Proxy) -> None:
    """A large content that is cut five times on its way up costs at most 1.05 times its bytes."""
    replica = world.replica(server=proxy.address)
    replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
    observe = cutting(proxy, len(LARGE))
    proxy.up.bytes_per_second = proxy.down.bytes_per_second = PATH_BYTES_PER_SECOND
    report = replica.synchronize_all(on_progress=observe)
    assert observe.cuts == []  # type: ignore[attr-defined]
    assert (report.applied, report.skipped, replica.pending_count()) == (1, [], 0)
    assert len(LARGE) < proxy.up.byte_count <= COST_MAX * len(LARGE)


@pytest.mark.timeout(120)
def test_cuts_of_a_download_cost_little(world: World, proxy: Proxy) -> None:
    """A large content that is cut five times on its way down costs at most 1.05 times its bytes."""
    author = world.replica("author")
    author.create("Task", {"photo": author.add_file(LARGE)}, "t1")
    author.synchronize_all()
    replica = world.replica(server=proxy.address)
    observe = cutting(proxy, len(LARGE))
    proxy.up.bytes_per_second = proxy.down.bytes_per_second = PATH_BYTES_PER_SECOND
    report = replica.synchronize_all(on_progress=observe)
    assert observe.cuts == []  # type: ignore[attr-defined]
    assert report.skipped == []
    assert read(replica, "t1") == LARGE
    assert len(LARGE) < proxy.down.byte_count <= COST_MAX * len(LARGE)


@pytest.mark.timeout(60)
def test_a_path_that_breaks_soon_brings_a_download_ahead(world: World, proxy: Proxy) -> None:
    """Of what came before a cut a replica has a good part, however little it was."""
    author = world.replica("author")
    author.create("Task", {"photo": author.add_file(LARGE)}, "t1")
    author.synchronize_all()
    connection = world.replica(server=proxy.address)._synchronizer._connection
    assert connection is not None
    calls = connection.files(None)
    proxy.down.bytes_per_second = 100_000  # what comes is taken as it comes, and not lost with its connection
    proxy.down.cut_after(passing := 200_000)
    received: list[int] = []
    with pytest.raises(Transient):
        received.extend(
            map(len, calls.download(connection.authorization(), hashlib.sha256(LARGE).digest(), ("Task", "t1"), 0))
        )
    calls.close()
    assert sum(received) > passing // 2


def test_objects_and_small_files_are_not_held_up(world: World, proxy: Proxy) -> None:
    """While a large content is held on its way up, objects and small files are on the server, and at others."""
    replica = world.replica(server=proxy.address)
    replica.create("Task", {"photo": replica.add_file(LARGE)}, "large")
    replica.create("Task", {"photo": replica.add_file(PHOTO)}, "small")
    replica.create("Task", {}, "none")
    reached = threading.Event()

    def observe(now: Progress) -> None:
        if now.phase is Phase.FILES and now.total and now.total >= len(LARGE) and not reached.is_set():
            proxy.up.stall()
            reached.set()

    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(replica.synchronize_all(on_progress=observe)))
    thread.start()
    assert reached.wait(30)
    other = world.replica("other")
    other.synchronize_all()
    assert sorted(one.id for one in other.query("Task")) == ["none", "small"]
    assert read(other, "small") == PHOTO
    proxy.heal()
    thread.join()
    assert (reports[0].applied, reports[0].skipped) == (3, [])
    other.synchronize_all()
    assert read(other, "large") == LARGE


@pytest.mark.timeout(60)
def test_a_black_hole_ends_in_a_report(world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing gets ahead for long the synchronization returns, operations stay pending, and it goes on later."""
    monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 1.0)
    monkeypatch.setattr(_transfer, "SLOWEST_BYTES_PER_SECOND", 1_000_000)
    replica = world.replica(server=proxy.address)
    replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
    replica.create("Task", {}, "t2")

    def observe(now: Progress) -> None:
        if now.phase is Phase.FILES and now.done > len(LARGE) // 2:
            proxy.stall()

    report = replica.synchronize_all(on_progress=observe)
    assert [(one.reason, one.id) for one in report.skipped] == [(SkipReason.FILE_NOT_UPLOADED, "t1")]
    assert (report.applied, replica.pending_count()) == (1, 1)
    proxy.heal()
    proxy.cut()
    sent = proxy.up.byte_count
    report = replica.synchronize_all()
    assert (report.applied, report.skipped) == (1, [])
    assert proxy.up.byte_count - sent < 0.6 * len(LARGE)


@pytest.mark.timeout(60)
def test_a_deadline_ends_transfers(world: World, proxy: Proxy) -> None:
    """At the caller's deadline transfers are given up for now, and a synchronization returns."""
    author = world.replica("author")
    author.create("Task", {"photo": author.add_file(LARGE)}, "t1")
    author.synchronize_all()
    replica = world.replica(server=proxy.address)
    proxy.down.bytes_per_second = 1024 * 1024
    report = replica.synchronize_all(timeout=2)
    assert [(one.reason, one.id) for one in report.skipped] == [(SkipReason.FILE_NOT_DOWNLOADED, "t1")]
    assert replica.file_state("Task", "t1", "photo") is FileState.PENDING
    proxy.down.bytes_per_second = None
    assert replica.synchronize_all().skipped == []
    assert read(replica, "t1") == LARGE
    assert proxy.down.byte_count <= COST_MAX * len(LARGE)


def test_a_deadline_that_never_comes_is_none(world: World) -> None:
    """Files travel with the longest timeouts too."""
    replica = world.replica("one")
    replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
    report = replica.synchronize_all(timeout=math.inf)
    assert (report.files_uploaded, report.skipped) == (1, [])
    other = world.replica("two", files={"Task": "lazy"})
    other.synchronize_all(timeout=1e18)
    assert read(other, "t1", timeout=math.inf) == PHOTO


def test_a_vanished_content_becomes_a_failure(world: World) -> None:
    """An operation whose content is nowhere any more becomes a clear failure, and nothing waits for it."""
    replica = world.replica()
    replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
    replica.create("Task", {}, "t2")
    replica._storage.files.contents.delete(_hash(PHOTO))
    report = replica.synchronize_all()
    assert [(one.reason, one.object_id) for one in report.failures] == [(FailureReason.FILE_MISSING, "t1")]
    assert (report.applied, replica.pending_count()) == (1, 0)


def test_a_content_that_the_server_lost_is_had_again(world: World) -> None:
    """A content that the server lost is reported and marked, and had as soon as the server has it again."""
    author, replica = world.replica("author"), world.replica()
    author.create("Task", {"photo": author.add_file(PHOTO)}, "t1")
    author.create("Task", {"photo": author.add_file(b"another")}, "t2")
    author.synchronize_all()
    (path,) = (world.folder / "server" / "files").rglob(f"{_hash(PHOTO).hex()}*")
    path.rename(world.folder / "elsewhere")
    report = replica.synchronize_all()
    assert [(one.reason, one.id) for one in report.skipped] == [(SkipReason.FILE_NOT_DOWNLOADED, "t1")]
    assert replica.file_state("Task", "t1", "photo") is FileState.FAILED
    assert read(replica, "t2") == b"another"
    (world.folder / "elsewhere").rename(path)
    assert replica.synchronize_all().skipped == []
    assert read(replica, "t1") == PHOTO


@pytest.mark.parametrize("loss", ["deleted", "shorter"])
def test_who_has_what_the_server_lost_brings_it_back(world: World, loss: str) -> None:
    """A device that has a content which the server lost, and refers to it once more, uploads it for everybody."""
    author, replica = world.replica("author"), world.replica()
    author.create("Task", {"photo": author.add_file(PHOTO)}, "t1")
    author.synchronize_all()
    (path,) = (world.folder / "server" / "files").rglob(f"{_hash(PHOTO).hex()}-*")
    if loss == "deleted":
        path.unlink()
    else:
        path.write_bytes(PHOTO[:-1])
    assert [one.id for one in replica.synchronize_all().skipped] == ["t1"]
    found = author.get("Task", "t1")
    assert found is not None
    author.create("Task", {"photo": found["photo"]}, "t2")
    assert author.synchronize_all().files_uploaded == 1
    assert replica.synchronize_all().skipped == []
    assert read(replica, "t1") == PHOTO


def test_contents_leave_with_their_objects(world: World) -> None:
    """When an object is deleted elsewhere its content leaves the device; one that another object has stays."""
    author, replica = world.replica("author"), world.replica()
    author.create("Task", {"photo": author.add_file(PHOTO)}, "t1")
    author.create("Task", {"photo": author.add_file(PHOTO), "plan": author.add_file(b"a plan")}, "t2")
    author.synchronize_all()
    replica.synchronize_all()
    author.delete("Task", "t2")
    author.synchronize_all()
    replica.synchronize_all()
    assert [one.sha256 for one in replica._storage.files.contents.contents()] == [_hash(PHOTO)]
    assert read(replica, "t1") == PHOTO
    assert list(replica.verify()) == []


def test_the_reference_of_another_object_needs_no_content(world: World) -> None:
    """An operation may refer to a content that is not here, if another object has it on the server."""
    author, replica = world.replica("author"), world.replica(files={"Task": "lazy"})
    author.create("Task", {"photo": author.add_file(PHOTO)}, "t1")
    author.synchronize_all()
    replica.synchronize_all()
    first = replica.get("Task", "t1")
    assert first is not None
    replica.create("Task", {"photo": first["photo"]}, "t2")
    report = replica.synchronize_all()
    assert (report.applied, report.rejected, report.file_bytes_sent) == (1, 0, 0)
    assert read(replica, "t2") == PHOTO


def test_what_is_read_behind_many_that_are_not_is_copied(tmp_path: Path) -> None:
    """A reference is copied that its user reads by one object behind more than the server looks at for him."""
    application = Application()
    application.allow("clerk", "Task", create=True, write="*", where=attribute("owner") == claim("user_id"))
    application.allow("clerk", "Task", where=attribute("public") == 1)
    tokens = StaticTokens({name: Principal(name, roles=frozenset({"clerk"})) for name in ("ann", "bob")})
    with World(tmp_path, application, authenticator=tokens) as world:
        bob = world.replica("bob", token="bob")
        value = bob.add_file(PHOTO)
        for number in range(REFERRERS_MAX + 1):
            bob.create("Task", {"photo": value, "owner": "bob"}, f"private{number}")
        bob.create("Task", {"photo": value, "owner": "bob", "public": 1}, "public")
        assert bob.synchronize_all().rejected == 0
        ann = world.replica("ann", token="ann", files={"Task": "lazy"})
        ann.synchronize_all()
        ann.create("Task", {"photo": value, "owner": "ann"}, "copy")
        report = ann.synchronize_all()
        assert (report.applied, report.rejected, report.skipped) == (1, 0, [])
        assert (report.files_downloaded, report.files_uploaded) == (1, 1)


def test_a_lazy_file_comes_when_it_is_opened(world: World) -> None:
    """Lazy contents stay on the server until somebody opens them; two threads get one download."""
    author = world.replica("author")
    author.create("Task", {"photo": author.add_file(LARGE)}, "t1")
    author.synchronize_all()
    with Proxy(world.server.address) as proxy:
        replica = world.replica(server=proxy.address, files={"Task": "lazy"})
        assert replica.synchronize_all().files_downloaded == 0
        found: list[bytes] = []
        threads = [threading.Thread(target=lambda: found.append(read(replica, "t1"))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [LARGE, LARGE]
        assert proxy.down.byte_count < 1.1 * len(LARGE)


def test_operations_of_all_modes_carry_their_contents(world: World) -> None:
    """Unsynchronized and selected upload contents before operations, and download those of what they bring."""
    one, two = world.replica("one"), world.replica("two")
    one.create("Task", {"photo": one.add_file(PHOTO)}, "t1")
    one.create("Task", {"photo": one.add_file(LARGE)}, "t2")
    assert one.synchronize_selected([("Task", "t2")]).applied == 1
    assert server_contents(world) == [_hash(LARGE)]
    assert one.synchronize_unsynchronized().applied == 1
    assert two.synchronize_selected([("Task", "t1")]).files_downloaded == 1
    assert read(two, "t1") == PHOTO


@pytest.mark.timeout(60)
def test_an_interrupt_ends_transfers(world: World, proxy: Proxy) -> None:
    """Ctrl-C in the middle of a transfer ends the synchronization at once; the next one goes on."""
    replica = world.replica(server=proxy.address)
    replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")

    def observe(now: Progress) -> None:
        if now.phase is Phase.FILES and now.done > len(LARGE) // 2:
            proxy.stall()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replica.synchronize_all(on_progress=observe)
    proxy.heal()
    proxy.cut()
    sent = proxy.up.byte_count
    assert replica.synchronize_all(timeout=30).applied == 1
    assert proxy.up.byte_count - sent < 0.6 * len(LARGE)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()

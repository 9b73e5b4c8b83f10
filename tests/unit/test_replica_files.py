"""Files on a replica: contents beside the objects that refer to them, up before operations, down after them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest
from filelock import FileLock
from tests.builders import quick_folder
from tests.files import CHUNK_BYTES, Calls, FileServer, connect, reference, sha256
from tests.sessions import applied, page

from tidelog import (
    DiskFull,
    FailureReason,
    FileUnavailable,
    FindingKind,
    InvalidValue,
    ObjectNotFound,
    Operation,
    PermissionRefused,
    StorageError,
    Unauthenticated,
)
from tidelog._contents import Part
from tidelog._keys import pack_position
from tidelog._limits import FILE_COST_BYTES
from tidelog._operation import decode_operation
from tidelog.testing import ManualClock
from tidelog.v1 import operation_pb2
from tidelog_client import (
    FileDownload,
    FileState,
    Phase,
    Progress,
    Replica,
    Skipped,
    SkipReason,
    _file_exchange,
    _files,
    _transfer,
)
from tidelog_client._call_errors import Transient
from tidelog_client._commit import Committer
from tidelog_client._file_calls import FileRefused, Standings
from tidelog_client._files import Needed
from tidelog_client._lacking_contents import LackingContents
from tidelog_client._transfer import ASKED_OBJECTS_MAX

PHOTO = b"a photo" * 1000
LARGE = os.urandom(10 * CHUNK_BYTES + 17)
LARGER = os.urandom(20 * CHUNK_BYTES)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def replica(folder: Path) -> Iterator[Replica]:
    """Give an empty replica."""
    with Replica(folder / "a") as opened:
        yield opened


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take nothing for a small file that has more than a chunk."""
    monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", CHUNK_BYTES)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon where nothing gets ahead."""
    monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.2)


def contents_of(replica: Replica) -> dict[bytes, int]:
    """Return the contents that lie in a replica's directory: hash and size."""
    return {one.sha256: one.size for one in replica._storage.files.contents.contents()}


def parts_of(replica: Replica) -> list[str]:
    """Return the names of what is on its way."""
    incoming = replica.path / "files" / "incoming"
    return sorted(one.name for one in incoming.iterdir()) if incoming.exists() else []


def read(replica: Replica, id: str = "t1", attribute: str = "photo", **options: Any) -> bytes:  # noqa: A002
    """Return the content of a file."""
    with replica.open_file("Task", id, attribute, **options) as file:
        return file.read()


def age(replica: Replica) -> None:
    """Let contents be older than what a program may be about to refer to."""
    for one in contents_of(replica):
        replica._storage.files.contents.renew(one, 1.0)


def closed_stream() -> io.BytesIO:
    """Return a stream that cannot be read any more."""
    stream = io.BytesIO(PHOTO)
    stream.close()
    return stream


def pending(replica: Replica) -> list[int]:
    """Return the seqs of what is pending."""
    return [one.operation.seq for one in replica.pending()]


class TestAttaching:
    """Attaching a file."""

    @pytest.mark.parametrize("kind", ["path", "bytes", "stream"])
    def test_an_attached_file_is_read_back(self, replica: Replica, folder: Path, kind: str) -> None:
        """What was attached, from whatever source, is opened again, and described by its attribute."""
        path = folder / "photo.jpg"
        path.write_bytes(PHOTO)
        source: Any = {"path": path, "bytes": PHOTO, "stream": io.BytesIO(PHOTO)}[kind]
        replica.create("Task", {}, "t1")
        replica.attach("Task", "t1", "photo", source)

        named = {"name": "photo.jpg", "media_type": "image/jpeg"} if kind == "path" else {"name": "photo"}
        (found,) = replica.query("Task")
        assert found["photo"] == reference(PHOTO) | {"media_type": "application/octet-stream"} | named
        assert read(replica) == PHOTO
        assert replica.file_state("Task", "t1", "photo") is found.file_state("photo") is FileState.AVAILABLE

    def test_name_and_media_type_are_the_callers(self, replica: Replica) -> None:
        """What the caller says of a file stands, and the media type follows from the name it gives."""
        replica.create("Task", {"a": replica.add_file(PHOTO, name="x.pdf")}, "t1")
        replica.attach("Task", "t1", "b", PHOTO, name="x.pdf", media_type="text/plain")
        (found,) = replica.query("Task")
        assert (found["a"]["name"], found["a"]["media_type"]) == ("x.pdf", "application/pdf")
        assert (found["b"]["name"], found["b"]["media_type"]) == ("x.pdf", "text/plain")

    def test_a_transaction_that_fails_leaves_no_operation(self, replica: Replica) -> None:
        """A file attached in a transaction that raises is attached to nothing."""
        replica.create("Task", {}, "t1")
        with pytest.raises(InvalidValue), replica.transaction() as transaction:  # noqa: PT012 - all of it is one
            transaction.attach("Task", "t1", "photo", PHOTO)
            transaction.attach("Task", "t1", "other", 17)  # type: ignore[arg-type]
        assert pending(replica) == [1]
        assert replica.file_state("Task", "t1", "photo") is None

    @pytest.mark.parametrize("source", [17, io.StringIO("text"), "no such file", "a\0b", closed_stream()])
    def test_what_is_no_file_is_refused(self, replica: Replica, source: Any) -> None:
        """What is no file, and what cannot be read, is a typed error, and leaves nothing."""
        replica.create("Task", {}, "t1")
        with pytest.raises(InvalidValue):
            replica.attach("Task", "t1", "photo", source)
        assert pending(replica) == [1]
        assert contents_of(replica) == {}
        assert parts_of(replica) == []

    def test_attaching_to_nothing_stores_nothing(self, replica: Replica) -> None:
        """An object that is not there gets no file, and no content is stored for it."""
        with pytest.raises(ObjectNotFound):
            replica.attach("Task", "t1", "photo", PHOTO)
        assert contents_of(replica) == {}

    def test_what_is_no_file_is_not_opened(self, replica: Replica) -> None:
        """Opening what is no file, or of no object, is a typed error."""
        replica.create("Task", {"photo": "a string"}, "t1")
        with pytest.raises(InvalidValue):
            replica.open_file("Task", "t1", "photo")
        with pytest.raises(ObjectNotFound):
            replica.open_file("Task", "t2", "photo")
        with pytest.raises(ObjectNotFound):
            replica.file_state("Task", "t2", "photo")


class TestUploading:
    """Contents on their way to the server."""

    def test_a_content_goes_up_before_its_operation(self, replica: Replica) -> None:
        """When a session begins the server has the small contents that its operations refer to."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        report = replica.synchronize_all()
        assert server.contents == {sha256(PHOTO): PHOTO}
        assert (report.applied, report.skipped, pending(replica)) == (1, [], [])
        assert (report.files_uploaded, report.file_bytes_sent, report.attempts) == (1, len(PHOTO), 1)

    def test_no_content_no_call(self, replica: Replica) -> None:
        """A synchronization of objects without files makes no file call, and opens no channel for any."""
        server = FileServer(pages=[page(("Task", "t2", 1, {"n": 1}))])
        connection = connect(replica, server)
        replica.create("Task", {"n": 1}, "t1")
        replica.synchronize_all()
        assert (server.stat_count, connection.channel_count) == (0, 0)

    def test_a_content_that_is_there_is_not_sent(self, replica: Replica) -> None:
        """A content that the server has already does not travel."""
        server = FileServer()
        server.put(PHOTO)
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        report = replica.synchronize_all()
        assert server.uploads == []
        assert (report.applied, report.files_uploaded, report.file_bytes_sent) == (1, 0, 0)

    def test_a_content_travels_once(self, replica: Replica) -> None:
        """A content that many operations refer to is uploaded once."""
        server = FileServer()
        connect(replica, server)
        for n in range(5):
            replica.create("Task", {"photo": replica.add_file(PHOTO)}, f"t{n}")
        assert replica.synchronize_all().applied == 5
        assert server.uploads == [(sha256(PHOTO), 0)]

    def test_objects_do_not_wait_for_a_large_file(self, replica: Replica, small: None) -> None:
        """While a large content is uploaded, everything that does not depend on it is on the server already."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "large")
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "small")
        replica.update("Task", "large", {"n": 1})
        replica.create("Task", {"n": 1}, "none")
        batches: list[list[int]] = []
        server.on_upload = lambda name, _: batches.extend(server.batches) if name == sha256(LARGE) else None
        report = replica.synchronize_all()
        assert batches[0] == [2, 4]
        assert server.batches == [[2, 4], [1, 3]]
        assert server.start.mode == 1
        assert (report.applied, report.skipped, pending(replica)) == (4, [], [])

    def test_what_is_committed_meanwhile_does_not_wait(
        self, replica: Replica, small: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While a large content goes up, what is committed, and what has its content, goes in sessions of its own."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "large")
        replica.create("Task", {"photo": replica.add_file(LARGER)}, "larger")
        committed, sent = threading.Event(), threading.Event()

        def settle(operations: Sequence[Operation]) -> list[operation_pb2.OperationResult]:
            results = FileServer.settle(server, operations)
            if {1, 3, 4} <= {seq for batch in server.batches for seq in batch}:
                sent.set()
            return results

        def on_upload(name: bytes, _position: int) -> None:
            if name == sha256(LARGER) and not committed.is_set():
                committed.set()
                replica.create("Task", {"n": 1}, "none")
                replica.create("Task", {"photo": replica.add_file(PHOTO)}, "small")
                assert sent.wait(30)
                assert sha256(LARGER) not in server.contents

        monkeypatch.setattr(server, "settle", settle)
        server.on_upload = on_upload
        report = replica.synchronize_all()
        assert sent.is_set()
        assert server.batches[-1] == [2]
        assert [position for name, position in server.uploads if name == sha256(LARGER)] == [0]
        assert (report.applied, report.files_uploaded, report.skipped, pending(replica)) == (4, 3, [], [])

    def test_the_server_is_told_that_earlier_operations_stay_behind(self, replica: Replica, small: None) -> None:
        """A session that leaves operations with lower seqs behind says so."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "large")
        replica.create("Task", {"n": 1}, "none")
        starts = []
        server.on_upload = lambda *_: starts.append(server.start.leaves_earlier_operations)
        replica.synchronize_all()
        assert set(starts) == {True}
        assert not server.start.leaves_earlier_operations

    def test_a_group_stays_together(self, replica: Replica, small: None) -> None:
        """A commit group of which one operation waits for its content waits whole."""
        server = FileServer()
        connect(replica, server)
        with replica.transaction(atomic=True) as transaction:
            transaction.create("Task", {"n": 1}, "one")
            transaction.create("Task", {"photo": replica.add_file(LARGE)}, "two")
        replica.create("Task", {"n": 1}, "three")
        replica.synchronize_all()
        assert server.batches == [[3], [1, 2]]

    def test_an_upload_goes_on_where_it_was_cut(self, replica: Replica, small: None) -> None:
        """After each cut only what the server does not have is sent."""
        cuts = [3, 6, 9]

        def cut(_name: bytes, position: int) -> None:
            if cuts and position == cuts[0] * CHUNK_BYTES:
                cuts.pop(0)
                raise Transient("cut")

        server = FileServer(on_upload=cut)
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        report = replica.synchronize_all()
        assert server.contents == {sha256(LARGE): LARGE}
        assert [offset for _, offset in server.uploads] == [0, 3 * CHUNK_BYTES, 6 * CHUNK_BYTES, 9 * CHUNK_BYTES]
        assert report.file_bytes_sent <= len(LARGE)
        assert pending(replica) == []

    def test_a_server_that_lets_go_of_what_it_got_does_not_get_it_for_ever(
        self, replica: Replica, small: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A content of which the server keeps nothing, and says to come again, is sent some times, and reported."""
        monkeypatch.setattr(_transfer, "RESENT_BYTES_MAX", 0)
        monkeypatch.setattr(_transfer, "_BACKOFF_SECONDS_MAX", 0.001)
        monkeypatch.setattr(_transfer, "_BACKOFF_SECONDS_FIRST", 0.001)
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")

        def discard(name: bytes, position: int) -> None:
            assert len(server.uploads) < 20
            if position > 8 * CHUNK_BYTES:
                server.parts[name] = b""
                raise Transient("full just now", retry_after_seconds=0.0)

        server.on_upload = discard
        report = replica.synchronize_all()
        assert len(server.uploads) == 4
        assert [(one.reason, one.seq) for one in report.skipped] == [(SkipReason.FILE_NOT_UPLOADED, 1)]
        assert "again and again" in report.skipped[0].message
        server.on_upload = lambda *_: None
        assert (replica.synchronize_all().applied, pending(replica)) == (1, [])

    @pytest.mark.usefixtures("impatient")
    def test_what_cannot_be_uploaded_stays_pending(self, replica: Replica) -> None:
        """Operations whose content cannot be uploaded stay pending and are reported; everything else goes on."""

        def cut(name: bytes, _position: int) -> None:
            if name == sha256(PHOTO):
                raise Transient("cut again")

        server = FileServer(on_upload=cut)
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t2")
        replica.update("Task", "t1", {"n": 1})
        replica.create("Task", {"n": 1}, "t3")
        report = replica.synchronize_all()
        assert pending(replica) == [1, 3]
        assert [(one.reason, one.id, one.seq) for one in report.skipped] == [
            (SkipReason.FILE_NOT_UPLOADED, "t1", 1),
            (SkipReason.FILE_NOT_UPLOADED, "t1", 3),
        ]
        assert "cut again" in report.skipped[0].message
        assert server.contents == {sha256(LARGE): LARGE}

        server.on_upload = lambda *_: None
        report = replica.synchronize_all()
        assert (pending(replica), report.skipped) == ([], [])

    def test_a_content_that_vanished_is_a_failure(self, replica: Replica) -> None:
        """An operation whose content is neither here nor on the server fails with FILE_MISSING; others go on."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t2")
        replica._storage.files.contents.delete(sha256(PHOTO))
        report = replica.synchronize_all()
        assert server.lost_contents == [sha256(PHOTO)]
        assert [(one.reason, one.object_id) for one in report.failures] == [(FailureReason.FILE_MISSING, "t1")]
        assert (pending(replica), report.applied) == ([], 1)

    @pytest.mark.parametrize("wish", ["eager", "lazy", "never"])
    def test_what_is_not_here_is_fetched_before_it_is_called_lost(self, folder: Path, wish: str) -> None:
        """A content that an object shows, and that the server says it lacks, comes down by it and goes up."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.hides.add(server.put(LARGE))
        with Replica(folder / "a", files={"Task": wish}) as replica:
            connect(replica, server)
            receive(replica, task("t1", LARGE))
            replica.create("Task", {"photo": reference(LARGE)}, "t2")
            report = replica.synchronize_all()
            assert [key for _, key, _ in server.downloads] == [("Task", "t1")]
            assert (server.uploads, server.lost_contents) == ([(sha256(LARGE), 0)], [])
            assert (report.applied, report.rejected, report.skipped, pending(replica)) == (1, 0, [], [])
            assert (report.files_downloaded, report.files_uploaded) == (1, 1)
            assert read(replica, "t1") == LARGE
            assert list(replica.verify()) == []

    @pytest.mark.parametrize("mode", ["all", "unsynchronized", "selected"])
    def test_operations_of_an_older_version_get_their_contents(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        """What an operation refers to that was committed before files were known goes up, or is lost for good."""
        server = FileServer()
        connect(replica, server)
        value = replica.add_file(PHOTO)
        with monkeypatch.context() as patch:
            patch.setattr(_files, "may_refer_to_files", lambda _data: False)
            replica.create("Task", {"photo": value}, "here")
            replica.create("Task", {"photo": reference(LARGE)}, "nowhere")
            replica.create("Task", {"n": 1}, "none")
        keys = [("Task", "here"), ("Task", "nowhere")]
        if mode == "selected":
            report = replica.synchronize_selected(keys)
        else:
            report = replica.synchronize_all() if mode == "all" else replica.synchronize_unsynchronized()
        assert server.contents == {sha256(PHOTO): PHOTO}
        assert server.lost_contents == [sha256(LARGE)]
        assert [(one.reason, one.object_id) for one in report.failures] == [(FailureReason.FILE_MISSING, "nowhere")]
        assert (report.applied, report.skipped, pending(replica)) == (
            2 - (mode == "selected"),
            [],
            [3] * (mode == "selected"),
        )
        assert list(replica.verify()) == []

    def test_what_no_object_gives_is_lost(self, replica: Replica) -> None:
        """A content that the server does not give by an object that shows it is lost; others go on."""
        server = FileServer()
        connect(replica, server)
        for id_ in ("t1", "t2"):
            receive(replica, task(id_, PHOTO))
        replica.create("Task", {"photo": reference(PHOTO)}, "t3")
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t4")
        report = replica.synchronize_unsynchronized()
        assert [key for _, key, _ in server.downloads][:1] == [("Task", "t1")]
        assert server.lost_contents == [sha256(PHOTO)]
        assert [(one.reason, one.object_id) for one in report.failures] == [(FailureReason.FILE_MISSING, "t3")]
        assert (report.applied, pending(replica)) == (1, [])

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("error", [Transient("cut again"), DiskFull("no room"), PermissionRefused("not today")])
    def test_a_download_that_fails_for_now_loses_nothing(self, replica: Replica, error: Exception) -> None:
        """While a content that is to go up cannot come down, its operation stays pending, and it is tried again."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.hides.add(server.put(PHOTO))
        connect(replica, server)
        receive(replica, task("t1", PHOTO))
        replica.create("Task", {"photo": reference(PHOTO)}, "t2")
        replica.create("Task", {"n": 1}, "t3")

        def fail(_name: bytes, _position: int) -> None:
            raise error

        server.on_download = fail
        report = replica.synchronize_all()
        assert [one.seq for one in report.skipped if one.reason is SkipReason.FILE_NOT_UPLOADED] == [1]
        assert (server.lost_contents, report.rejected, report.applied, pending(replica)) == ([], 0, 1, [1])
        server.on_download = lambda *_: None
        assert (replica.synchronize_all().applied, pending(replica)) == (1, [])

    def test_what_came_long_ago_is_no_reason_to_lose_a_content(self, replica: Replica) -> None:
        """A content that comes damaged because of what was left of another download comes once more, and goes up."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.hides.add(server.put(LARGE))
        connect(replica, server)
        receive(replica, task("t1", LARGE))
        replica.create("Task", {"photo": reference(LARGE)}, "t2")
        part = replica._storage.files.contents.part(sha256(LARGE).hex())
        part.append(b"x" * CHUNK_BYTES)
        part.close()
        report = replica.synchronize_all()
        assert [offset for _, _, offset in server.downloads] == [CHUNK_BYTES, 0]
        assert (report.applied, report.rejected, server.lost_contents, report.skipped) == (1, 0, [], [])

    def test_a_damaged_content_comes_down_and_goes_up(self, replica: Replica) -> None:
        """A content that was damaged here, and that an object shows, is fetched before its operation is sent."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.hides.add(server.put(LARGE))
        connect(replica, server)
        receive(replica, task("t1", LARGE))
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t2")
        name = sha256(LARGE).hex()
        (replica.path / "files" / name[:2] / name[2:4] / name).write_bytes(LARGE[:-1] + b"x")
        report = replica.synchronize_all()
        assert (report.applied, report.rejected, server.lost_contents) == (1, 0, [])
        assert read(replica, "t1") == LARGE

    @pytest.mark.parametrize("damaged", [LARGE[:-1] + b"x", LARGE[:-1], LARGE + b"x"])
    def test_a_damaged_content_is_not_uploaded(self, replica: Replica, damaged: bytes) -> None:
        """A content that was damaged is found out before it is whole on the server; what is left of it is kept."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        name = sha256(LARGE).hex()
        (replica.path / "files" / name[:2] / name[2:4] / name).write_bytes(damaged)
        report = replica.synchronize_all()
        assert [one.reason for one in report.failures] == [FailureReason.FILE_MISSING]
        assert server.contents == {}
        assert (replica.path / "set-aside" / f"content-{name}").read_bytes() == damaged

    @pytest.mark.parametrize("instead", ["nothing", "folder", "file"])
    def test_contents_that_are_away_are_not_lost(self, replica: Replica, instead: str) -> None:
        """Where the folder of the contents is not what it was, what needs it waits, and the rest goes on."""
        server = FileServer(pages=[page(("Task", "t2", 1, {}), task("t3", LARGE))])
        server.put(LARGE)
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"n": 1}, "t4")
        folder, away = replica.path / "files", replica.path / "away"
        folder.rename(away)
        if instead == "folder":
            folder.mkdir()
        elif instead == "file":
            folder.write_bytes(b"")
        report = replica.synchronize_all()
        assert (report.applied, report.downloaded, list(report.failures), pending(replica)) == (1, 2, [], [1])
        skipped = {(one.reason, one.id) for one in report.skipped}
        assert (SkipReason.FILE_NOT_UPLOADED, "t1") in skipped
        # What objects lack cannot be found out where there is a file.
        assert instead == "file" or (SkipReason.FILE_NOT_DOWNLOADED, "t3") in skipped
        with pytest.raises(StorageError):
            replica.attach("Task", "t2", "photo", PHOTO)
        if instead == "folder":
            folder.rmdir()
        elif instead == "file":
            folder.unlink()
        away.rename(folder)
        server.pages = ()
        report = replica.synchronize_all()
        assert (report.applied, report.skipped, pending(replica)) == (1, [], [])
        assert read(replica, "t3") == LARGE

    def test_a_mark_that_goes_astray_is_made_anew(self, replica: Replica) -> None:
        """Where contents that the replica knows lie in their place the folder is not away, only its mark is."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        mark = replica.path / "files" / "tidelog-replica"
        known = mark.read_bytes()
        mark.unlink()
        server.pages = ()
        assert replica.synchronize_all().skipped == []
        assert mark.read_bytes() == known

    def test_that_the_contents_are_away_is_reported(self, replica: Replica) -> None:
        """A replica whose folder of contents is gone says so at each synchronization, though nothing is to travel."""
        connect(replica, FileServer(pages=[page(task("t1", PHOTO))]))
        replica.add_file(PHOTO)
        replica.synchronize_all()
        shutil.rmtree(replica.path / "files")
        for _ in range(2):
            found = [one for one in replica.synchronize_all().skipped if not one.entity]
            assert [one.reason for one in found] == [SkipReason.FILE_NOT_DOWNLOADED]
            assert "are away" in found[0].message

    def test_a_content_that_is_put_back_during_its_upload_stays(self, replica: Replica) -> None:
        """What was damaged when it was read, and is whole again when that is found out, goes up another time."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        name = sha256(LARGE).hex()

        def on_upload(_name: bytes, position: int) -> None:
            if position == 0:
                (replica.path / "files" / name[:2] / name[2:4] / name).write_bytes(LARGE[:-1] + b"x")
            elif position == 8 * CHUNK_BYTES:
                replica.add_file(LARGE)

        server.on_upload = on_upload
        report = replica.synchronize_all()
        assert ([one.reason for one in report.skipped], pending(replica)) == ([SkipReason.FILE_NOT_UPLOADED], [1])
        server.on_upload = lambda *_: None
        assert replica.synchronize_all().applied == 1
        assert server.contents[sha256(LARGE)] == LARGE

    def test_a_wrong_size_is_refused_at_once(self, replica: Replica) -> None:
        """What says another size of a content that is here is no value; the content, and who refers to it, stays."""
        server = FileServer()
        connect(replica, server)
        value = replica.add_file(PHOTO)
        replica.create("Task", {"photo": value}, "t1")
        with pytest.raises(InvalidValue, match="7000"):
            replica.create("Task", {"photo": value | {"size": 5}}, "t2")
        assert (replica.synchronize_all().applied, server.lost_contents) == (1, [])
        assert sha256(PHOTO) in server.contents

    @pytest.mark.parametrize("is_asked_late", [False, True])
    def test_a_wrong_size_costs_nobody_else(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, *, is_asked_late: bool
    ) -> None:
        """An operation that says another size of a content than it has is sent as lost; the content stays."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": reference(PHOTO) | {"size": 5}}, "wrong")
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        stat = Calls.stat

        def lost(_calls: Calls, _metadata: object, _contents: Sequence[Needed]) -> list[Any]:
            monkeypatch.setattr(Calls, "stat", stat)
            raise Transient("the question was lost on its way")

        if is_asked_late:
            monkeypatch.setattr(Calls, "stat", lost)
        replica.synchronize_all()
        assert server.lost_contents == [sha256(PHOTO)]
        assert server.contents[sha256(PHOTO)] == PHOTO
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}

    def test_a_content_that_cannot_be_read_holds_up_nothing_else(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of the disk, or the program, while a content is sent is reported, and everything else goes on."""
        server = FileServer()
        connect(replica, server)

        class Broken(io.BytesIO):
            def read(self, _size: int | None = -1, /) -> bytes:
                raise OSError(5, "Input/output error")

        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"n": 1}, "t2")
        contents = replica._storage.files.contents
        monkeypatch.setattr(contents, "open", lambda _sha256: Broken())
        report = replica.synchronize_all()
        assert (report.applied, [one.seq for one in report.skipped], pending(replica)) == (1, [1], [1])
        monkeypatch.setattr(contents, "open", lambda _sha256: 1 / 0)
        assert [one.seq for one in replica.synchronize_all().skipped] == [1]
        monkeypatch.undo()
        assert replica.synchronize_all().applied == 1

    def test_a_server_that_cannot_say_how_contents_stand_holds_up_nothing_else(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the server's contents are out of reach, objects are exchanged; what refers to contents waits."""
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.2)
        server = FileServer()
        connection = connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"n": 1}, "t2")

        class Unreachable(Calls):
            def stat(self, _metadata: object, contents: Sequence[Needed]) -> Standings:
                raise Transient(f"{len(contents)} contents are out of reach")

        monkeypatch.setattr(connection, "files", lambda _timeout: Unreachable(server))
        report = replica.synchronize_all()
        assert (report.applied, pending(replica)) == (1, [1])
        assert [(one.reason, one.seq) for one in report.skipped] == [(SkipReason.FILE_NOT_UPLOADED, 1)]
        assert "the server did not answer" in report.skipped[0].message
        assert server.uploads == []
        monkeypatch.undo()
        assert replica.synchronize_all().applied == 1

    def test_a_question_without_an_answer_holds_up_nothing_else(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the server does not say how contents stand, objects go, contents come, and patience ends once."""
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.5)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        monkeypatch.setattr(_file_exchange, "SMALL_SILENCE_SECONDS", 0.1)
        server = FileServer(pages=[page(task("t9", LARGE))])
        server.put(LARGE)
        connection = connect(replica, server)
        for number in range(5):
            replica.create("Task", {"photo": replica.add_file(PHOTO + b"%d" % number)}, f"t{number}")
        replica.create("Task", {"n": 1}, "t5")
        hung = []

        class Hanging(Calls):
            def stat(self, _metadata: object, contents: Sequence[Needed]) -> Standings:
                hung.append((len(contents), len(server.batches)))
                self.is_closed.wait(30)
                raise Transient("closed")

        monkeypatch.setattr(connection, "files", lambda _timeout: Hanging(server))
        report = replica.synchronize_all()
        assert hung == [(5, 0)]  # before the session, and still beside what came after it
        assert (report.applied, report.files_downloaded, server.uploads) == (1, 1, [])
        assert {one.reason for one in report.skipped} == {SkipReason.FILE_NOT_UPLOADED}
        assert read(replica, "t9") == LARGE

    def test_what_an_object_does_not_lack_any_more_is_not_reported(self, replica: Replica) -> None:
        """What could not be had for an object that has changed since, and lacks nothing now, is in no report."""
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        report = replica.synchronize_all()
        assert [one.id for one in report.skipped] == ["t1"]
        others = [
            Skipped("Task", "t2", SkipReason.FILE_NOT_UPLOADED, ""),
            Skipped("Task", "", SkipReason.FILE_NOT_DOWNLOADED, "", count=3),
        ]
        report.skipped += [Skipped("Task", "t2", SkipReason.FILE_NOT_DOWNLOADED, "it was replaced"), *others]

        LackingContents(replica._storage.files, replica._file_wishes, report).take_back()

        assert report.skipped[1:] == others
        assert report.skipped[0].id == "t1"

    @pytest.mark.parametrize("is_slow", [True, False])
    def test_a_question_that_is_too_much_is_asked_in_parts(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, *, is_slow: bool
    ) -> None:
        """Where the server cannot say how many contents stand, or one of them, the others go up all the same."""
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.5)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        monkeypatch.setattr(_transfer, "_BACKOFF_SECONDS_FIRST", 0.001)
        monkeypatch.setattr(_transfer, "_BACKOFF_SECONDS_MAX", 0.01)
        server = FileServer()
        connection = connect(replica, server)
        needed = [PHOTO + b"%d" % number for number in range(100)]
        for number, content in enumerate(needed):
            replica.create("Task", {"photo": replica.add_file(content)}, f"t{number}")
        unknown = hashlib.sha256(needed[7]).digest()

        class Slow(Calls):
            def stat(self, metadata: object, contents: Sequence[Needed]) -> Standings:
                if len(contents) > 5 if is_slow else unknown in {one.sha256 for one in contents}:
                    raise Transient("it takes too long")
                return super().stat(metadata, contents)

        monkeypatch.setattr(connection, "files", lambda _timeout: Slow(server))

        report = replica.synchronize_all()

        assert pending(replica) == ([] if is_slow else [8])
        assert report.files_uploaded == 100 - len(pending(replica))

    @pytest.mark.parametrize("error", [Transient("away"), Unauthenticated("expired")])
    def test_what_the_server_did_not_answer_about_is_asked_again(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """Once it answers, with another token if need be, contents go up, while others are still coming down."""
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        server = FileServer(pages=[page(task("t9", LARGE))])
        server.put(LARGE)
        connection = connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        coming, gone = threading.Event(), threading.Event()
        new_tokens = count()
        tokens = []

        class Away(Calls):
            def stat(self, metadata: object, contents: Sequence[Needed]) -> Standings:
                tokens.append(metadata)
                if not coming.is_set():
                    raise error
                return super().stat(metadata, contents)

        def on_download(_name: bytes, _position: int) -> None:
            coming.set()
            assert gone.wait(30)

        server.on_download, server.on_upload = on_download, lambda *_: gone.set()
        monkeypatch.setattr(connection, "authorization", lambda: next(new_tokens))
        monkeypatch.setattr(connection, "files", lambda _timeout: Away(server))
        report = replica.synchronize_all()
        assert (report.applied, report.files_uploaded, report.files_downloaded, report.skipped) == (1, 1, 1, [])
        assert len(set(tokens)) == len(tokens) > 1

    @pytest.mark.parametrize("is_enough", [True, False])
    def test_what_has_room_for_sure_does_not_wait_for_the_last_answer(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, *, is_enough: bool
    ) -> None:
        """Where the server answers about some contents these go, if there is room for all, and else nothing does."""
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.2)
        monkeypatch.setattr(_transfer, "FILES_STAT_MAX", 1)
        server = FileServer(room_bytes=(4 if is_enough else 2) * (len(PHOTO) + FILE_COST_BYTES))
        connection = connect(replica, server)
        for number in range(3):
            replica.create("Task", {"photo": replica.add_file(PHOTO[number:])}, f"t{number}")
        answered: list[Sequence[Needed]] = []

        class Away(Calls):
            def stat(self, metadata: object, contents: Sequence[Needed]) -> Standings:
                if answered and contents not in answered:
                    raise Transient("away")
                answered.append(contents)
                return super().stat(metadata, contents)

        monkeypatch.setattr(connection, "files", lambda _timeout: Away(server))
        assert (replica.synchronize_all().applied, len(server.uploads)) == ((1, 1) if is_enough else (0, 0))
        monkeypatch.undo()
        assert replica.synchronize_all().applied == (2 if is_enough else 3)

    def test_a_server_that_does_not_answer_is_not_asked_all_the_time(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between two questions passes more and more time."""
        monkeypatch.setattr(_transfer, "SILENCE_SECONDS_MAX", 1.0)
        server = FileServer()
        connection = connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        asked = []

        class Away(Calls):
            def stat(self, _metadata: object, contents: Sequence[Needed]) -> Standings:
                asked.append(contents)
                raise Transient("away")

        monkeypatch.setattr(connection, "files", lambda _timeout: Away(server))
        replica.synchronize_all()
        assert 3 <= len(asked) <= 6

    @pytest.mark.parametrize("is_small", [True, False])
    def test_what_is_tried_in_vain_keeps_no_room_from_others(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, *, is_small: bool
    ) -> None:
        """Where there is room for one file at a time, one that cannot be read holds up no other."""
        monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 1 << 20 if is_small else 0)
        connect(replica, FileServer(room_bytes=len(PHOTO) + FILE_COST_BYTES))
        for number in range(3):
            replica.create("Task", {"photo": replica.add_file(PHOTO + b"%d" % number)}, f"t{number}")
        contents = replica._storage.files.contents
        opened = contents.open

        def unreadable(name: bytes) -> Any:
            if name == sha256(PHOTO + b"0"):
                raise StorageError("it cannot be read")
            return opened(name)

        monkeypatch.setattr(contents, "open", unreadable)

        report = replica.synchronize_all()

        assert (report.applied, [(one.id, one.reason) for one in report.skipped], pending(replica)) == (
            2,
            [("t0", SkipReason.FILE_NOT_UPLOADED)],
            [1],
        )

    def test_what_was_not_begun_is_reported_by_entity(self, replica: Replica, impatient: None) -> None:
        """Where patience ends, files that were not begun are counted, not named one by one."""
        texts = [str(number).encode() for number in range(20)]
        server = FileServer(pages=[page(*(task(text.decode(), text) for text in texts))])
        for text in texts:
            server.put(text)
        connect(replica, server)
        released = threading.Event()
        server.on_download = lambda *_: released.wait(30)
        report = replica.synchronize_all()
        released.set()
        assert sum(one.count for one in report.skipped) == 20
        assert len(report.skipped) <= _transfer.TRANSFERS_AT_ONCE + 1

    def test_a_content_that_is_too_large_is_a_failure(self, replica: Replica) -> None:
        """An operation whose content the server takes at no time is sent as it is, and refused."""
        server = FileServer(size_max=1000)
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        report = replica.synchronize_all()
        assert [one.reason for one in report.failures] == [FailureReason.TOO_LARGE]
        assert (server.uploads, server.lost_contents) == ([], [])

    def test_a_selection_uploads_its_own_contents(self, replica: Replica, small: None) -> None:
        """A synchronization of selected objects uploads the contents that their operations need, and no others."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t2")
        replica.synchronize_selected([("Task", "t2")])
        assert server.contents == {sha256(LARGE): LARGE}
        assert pending(replica) == [1]
        replica.synchronize_unsynchronized()
        assert pending(replica) == []

    def test_the_deadline_ends_an_upload(self, replica: Replica, small: None) -> None:
        """At the deadline an upload is given up for now; the synchronization returns, and reports it."""
        server = FileServer()
        connection = connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        replica.create("Task", {}, "t2")
        stalled = threading.Event()
        server.on_upload = lambda *_: stalled.wait(30)
        report = replica.synchronize_all(timeout=0.5)
        stalled.set()
        assert [(one.reason, one.seq) for one in report.skipped] == [(SkipReason.FILE_NOT_UPLOADED, 1)]
        assert pending(replica) == [1]
        assert connection.channel_count == 1

    def test_a_cut_during_a_long_session_is_no_silence(
        self, replica: Replica, small: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A transfer that was cut while a session took longer than patience lasts is tried again after it."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        late_seconds = 0.0
        cut, seen, in_session = threading.Event(), threading.Event(), threading.Event()

        def on_progress(now: Progress) -> None:
            if now.phase is Phase.FILES and now.done >= 2 * CHUNK_BYTES:
                seen.set()

        def on_upload(_name: bytes, position: int) -> None:
            if position == 2 * CHUNK_BYTES and not cut.is_set():
                cut.set()
                assert seen.wait(30)
                replica.create("Task", {}, "t2")
                assert in_session.wait(30)
                raise Transient("cut")

        def settle(operations: Sequence[Operation]) -> list[operation_pb2.OperationResult]:
            nonlocal late_seconds
            late_seconds += 2 * _transfer.SILENCE_SECONDS_MAX
            in_session.set()
            return FileServer.settle(server, operations)

        monkeypatch.setattr(server, "settle", settle)
        monkeypatch.setattr(_transfer, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_seconds))
        server.on_upload = on_upload
        report = replica.synchronize_all(on_progress=on_progress)
        assert cut.is_set()
        assert (report.applied, report.skipped) == (2, [])

    def test_a_session_that_comes_too_late_is_no_error(self, replica: Replica, small: None) -> None:
        """What a further session was to take is reported where none gets through, with what the first one said."""
        server = FileServer()
        connection = connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        replica.create("Task", {"n": 1}, "t2")
        replica.update("Task", "t1", {"n": 1})
        synchronize = connection.synchronize
        server.on_upload = lambda *_: setattr(connection, "synchronize", unreachable)

        def unreachable(_metadata: object, _timeout: float | None) -> Any:
            raise Transient("the path broke")

        report = replica.synchronize_all(timeout=2.0)
        assert (report.applied, pending(replica)) == (1, [1, 3])
        assert [(one.reason, one.seq) for one in report.skipped] == [(SkipReason.FILE_NOT_UPLOADED, n) for n in (1, 3)]
        assert "the path broke" in report.skipped[0].message
        connection.synchronize = synchronize  # type: ignore[method-assign]
        report = replica.synchronize_all()
        assert (report.applied, report.files_uploaded, report.skipped) == (2, 0, [])

    def test_progress_is_told_in_bytes(self, replica: Replica, small: None) -> None:
        """Progress of files goes up to all of their bytes."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t1")
        told: list[Progress] = []
        replica.synchronize_all(on_progress=told.append)
        files = [(one.done, one.total) for one in told if one.phase is Phase.FILES and one.total]
        assert files[0] == (0, len(LARGE))
        assert files[-1] == (len(LARGE), len(LARGE))
        assert files == sorted(files)
        assert len(files) > 5

    def test_progress_only_grows(self, replica: Replica, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Through all sessions, cuts and refusals neither what is done nor what there is to do falls; both meet."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_transfer, "TRANSFERS_AT_ONCE", 1)
        refused, missed = os.urandom(3 * CHUNK_BYTES), os.urandom(2 * CHUNK_BYTES)
        server = FileServer(pages=[page(task("t5", LARGER), task("t6", refused), task("t7", missed))])
        server.put(LARGER)
        server.put(missed)
        connect(replica, server)
        for id_, content in (("t1", PHOTO), ("t2", LARGE), ("t3", b"small")):
            replica.create("Task", {"photo": replica.add_file(content)}, id_)
        receive(replica, task("t7", missed))
        server.hides.add(sha256(missed))
        replica.create("Task", {"photo": reference(missed)}, "t4")
        cuts = {sha256(PHOTO): [0], sha256(LARGE): [5 * CHUNK_BYTES, 8 * CHUNK_BYTES], sha256(LARGER): [CHUNK_BYTES]}

        def cut(name: bytes, position: int) -> None:
            if name == sha256(LARGE) and position == 0 and not replica.get("Task", "late"):
                replica.create("Task", {"photo": replica.add_file(b"late")}, "late")
            if cuts.get(name, [-1])[:1] == [position]:
                cuts[name].pop(0)
                server.parts[name] = server.parts.get(name, b"")[: position // 2]
                raise Transient("cut")

        server.on_upload = server.on_download = cut
        told: list[Progress] = []
        report = replica.synchronize_all(on_progress=told.append)
        assert not any(cuts.values())
        assert (report.applied, [one.id for one in report.skipped]) == (5, ["t6"])
        files = [(one.done, one.total) for one in told if one.phase is Phase.FILES]
        assert files[0][0] == 0
        for part in zip(*files, strict=True):
            assert list(part) == sorted(part)
        assert all(total is not None and done <= total for done, total in files)
        assert files[-1][0] == files[-1][1]


class TestDownloading:
    """Contents on their way to the replica."""

    def test_contents_come_with_their_objects(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the objects of a download refer to is here when the synchronization is over, smallest first."""
        monkeypatch.setattr(_transfer, "TRANSFERS_AT_ONCE", 1)
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", PHOTO), task("t3", PHOTO))])
        server.put(PHOTO)
        server.put(LARGE)
        connect(replica, server)
        report = replica.synchronize_all()
        assert read(replica, "t1") == LARGE
        assert read(replica, "t2") == read(replica, "t3") == PHOTO
        assert [name for name, _, _ in server.downloads] == [sha256(PHOTO), sha256(LARGE)]
        assert (report.files_downloaded, report.file_bytes_received) == (2, len(PHOTO) + len(LARGE))
        assert parts_of(replica) == []

        report = replica.synchronize_all()
        assert (report.files_downloaded, len(server.downloads)) == (0, 2)

    def test_nobody_waits_while_a_content_is_hashed(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a large content that came is looked through, a program attaches another one."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        connect(replica, server)
        digest = hashlib.file_digest
        attached: list[dict[str, Any]] = []

        def hashed(file: Any, name: str) -> Any:
            if os.fstat(file.fileno()).st_size == len(LARGE) and not attached:
                with ThreadPoolExecutor(1) as pool:
                    attached.append(pool.submit(replica.add_file, PHOTO).result(timeout=30))
            return digest(file, name)

        monkeypatch.setattr(hashlib, "file_digest", hashed)
        assert replica.synchronize_all().skipped == []
        assert attached
        assert read(replica) == LARGE

    @pytest.mark.parametrize("cuts", [0, 2])
    def test_a_small_file_that_comes_later_overtakes(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, cuts: int
    ) -> None:
        """What a later session brings, and what is tried again, does not wait for a large content under way."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        monkeypatch.setattr(_transfer, "TRANSFERS_AT_ONCE", 1)
        server = FileServer(pages=[page(task("large", LARGE))])
        server.put(LARGE)
        server.put(PHOTO)
        connect(replica, server)
        has_come = threading.Event()
        left = cuts

        def on_download(name: bytes, position: int) -> None:
            nonlocal left
            if name == sha256(PHOTO):
                left -= 1
                if left >= 0:
                    raise Transient("cut")
            elif position == CHUNK_BYTES:
                server.pages = [page(task("small", PHOTO))]
                replica.create("Task", {}, "none")
                assert has_come.wait(30)

        def on_progress(_: Progress) -> None:
            if replica.get("Task", "small") and replica.file_state("Task", "small", "photo") is FileState.AVAILABLE:
                has_come.set()

        server.on_download = on_download
        report = replica.synchronize_all(on_progress=on_progress)
        assert (report.files_downloaded, report.skipped) == (2, [])

    def test_what_others_change_does_not_wait(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a large content comes down, what others changed comes in sessions now and then."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_file_exchange, "REFRESH_SECONDS", 0.0)
        server = FileServer(pages=[page(task("large", LARGE))])
        server.put(LARGE)
        connect(replica, server)
        has_come = threading.Event()

        def on_download(_name: bytes, position: int) -> None:
            if position == 2 * CHUNK_BYTES:
                server.pages = [page(("Task", "urgent", 1, {}))]
                assert has_come.wait(30)

        server.on_download = on_download
        report = replica.synchronize_all(
            on_progress=lambda _: has_come.set() if replica.get("Task", "urgent") else None
        )
        assert (report.files_downloaded, report.skipped) == (1, [])

    def test_a_content_that_is_here_is_not_asked_for(self, replica: Replica) -> None:
        """A content that the replica has already, whatever for, does not travel."""
        server = FileServer(pages=[page(task("t2", PHOTO))])
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.synchronize_all()
        assert read(replica, "t2") == PHOTO
        assert server.downloads == []

    def test_a_download_goes_on_where_it_was_cut(self, replica: Replica) -> None:
        """After each cut only what is not here is asked for."""
        cuts = [2, 5, 8]

        def cut(_name: bytes, position: int) -> None:
            if cuts and position == cuts[0] * CHUNK_BYTES:
                cuts.pop(0)
                raise Transient("cut")

        server = FileServer(pages=[page(task("t1", LARGE))], on_download=cut)
        server.put(LARGE)
        connect(replica, server)
        report = replica.synchronize_all()
        assert read(replica) == LARGE
        assert [offset // CHUNK_BYTES for _, _, offset in server.downloads] == [0, 2, 5, 8]
        assert report.file_bytes_received == len(LARGE)

    @pytest.mark.usefixtures("impatient")
    def test_a_download_goes_on_in_the_next_synchronization(self, folder: Path) -> None:
        """What came of a download that was given up is not asked for again, by another process either."""

        def cut(_name: bytes, position: int) -> None:
            if position == 4 * CHUNK_BYTES:
                raise Transient("cut again")

        server = FileServer(pages=[page(task("t1", LARGE))], on_download=cut)
        server.put(LARGE)
        with Replica(folder / "a") as replica:
            connect(replica, server)
            report = replica.synchronize_all()
            assert [(one.reason, one.id) for one in report.skipped] == [(SkipReason.FILE_NOT_DOWNLOADED, "t1")]
            assert replica.file_state("Task", "t1", "photo") is FileState.PENDING
        server.on_download = lambda *_: None
        server.pages = ()
        server.downloads.clear()
        with Replica(folder / "a") as replica:
            connect(replica, server)
            assert replica.synchronize_all().skipped == []
            assert read(replica) == LARGE
        assert [offset // CHUNK_BYTES for _, _, offset in server.downloads] == [4]

    def test_a_content_that_the_server_lost_is_tried_again(self, replica: Replica) -> None:
        """A content that the server does not have is skipped and marked, and had as soon as it is there again."""
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        report = replica.synchronize_all()
        assert [(one.reason, one.id, one.message) for one in report.skipped] == [
            (SkipReason.FILE_NOT_DOWNLOADED, "t1", "FILE_LOST")
        ]
        assert replica.file_state("Task", "t1", "photo") is FileState.FAILED
        assert read(replica, "t2") == PHOTO
        with pytest.raises(FileUnavailable, match="FILE_LOST"):
            read(replica, "t1")

        server.pages = ()
        server.put(LARGE)
        report = replica.synchronize_all()
        assert (report.skipped, report.files_downloaded) == ([], 1)
        assert replica.file_state("Task", "t1", "photo") is FileState.AVAILABLE
        assert replica._storage.files.reason(sha256(LARGE)) is None

    @pytest.mark.parametrize("wrong", [LARGE[:-1] + b"x", LARGE + b"more", b"less"])
    @pytest.mark.usefixtures("impatient")
    def test_wrong_bytes_leave_nothing(self, replica: Replica, wrong: bytes) -> None:
        """What a server sends in place of a content is refused, and is to be seen nowhere."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        server.gives[sha256(LARGE)] = wrong
        connect(replica, server)
        report = replica.synchronize_all()
        assert [one.reason for one in report.skipped] == [SkipReason.FILE_NOT_DOWNLOADED]
        assert contents_of(replica) == {}
        if wrong != b"less":  # which may go on
            assert replica.file_state("Task", "t1", "photo") is FileState.FAILED
            assert [name for name in parts_of(replica) if not name.endswith(".lock")] == []
        server.gives.clear()
        server.pages = ()
        while replica.synchronize_all().skipped:
            assert wrong == b"less", "only a part that is broken takes another try"
        assert read(replica) == LARGE

    def test_what_comes_damaged_is_not_asked_for_each_time(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A content that comes damaged again and again is asked for after longer and longer, reported each time."""
        monkeypatch.setattr(_files, "DAMAGED_SECONDS_MAX", 3000.0)
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", PHOTO))])
        server.put(PHOTO)
        server.gives[sha256(LARGE)] = LARGE[:-1] + b"x"
        clock = ManualClock()
        asked_at = []
        with Replica(folder / "b", clock=clock) as replica:
            connect(replica, server)
            for _ in range(60):
                server.downloads.clear()
                report = replica.synchronize_all()
                assert [(one.reason, one.id) for one in report.skipped] == [(SkipReason.FILE_NOT_DOWNLOADED, "t1")]
                assert "another content" in report.skipped[0].message
                assert replica.file_state("Task", "t1", "photo") is FileState.FAILED
                if any(name == sha256(LARGE) for name, _, _ in server.downloads):
                    asked_at.append(clock.now)
                clock.advance(timedelta(seconds=300))
            pauses = [(after - before).total_seconds() for before, after in pairwise(asked_at)]
            assert pauses == [300, 600, 1200, 2400, *[3000] * (len(pauses) - 4)]
            assert len(pauses) > 5
            server.gives.clear()
            server.put(LARGE)
            clock.advance(timedelta(seconds=3000))
            assert replica.synchronize_all().skipped == []
            assert read(replica) == LARGE

    def test_no_room_for_a_lock_is_told_as_that(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that has no room for an empty file is full, not broken."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        part = replica._storage.files.contents.part("part")
        monkeypatch.setattr(FileLock, "acquire", refuse)
        with pytest.raises(DiskFull), _transfer._Turn(part, lambda: False, lambda _: None):
            pass

    def test_who_opens_what_came_damaged_asks_at_once(self, replica: Replica) -> None:
        """A content that is put off comes when somebody opens it, and then is here for everybody."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.gives[sha256(LARGE)] = LARGE[:-1] + b"x"
        connect(replica, server)
        replica.synchronize_all()
        with pytest.raises(FileUnavailable, match="another content"):
            read(replica)
        server.downloads.clear()
        assert [one.id for one in replica.synchronize_all().skipped] == ["t1"]
        assert server.downloads == []
        server.gives.clear()
        server.put(LARGE)
        assert read(replica) == LARGE
        assert replica.synchronize_all().skipped == []

    def test_a_server_that_says_something_else_is_asked_again(self, replica: Replica) -> None:
        """What the server says that it lost is asked for each time, however often it came damaged before."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.gives[sha256(LARGE)] = LARGE[:-1] + b"x"
        connect(replica, server)
        replica.synchronize_all()
        server.gives.clear()
        for _ in range(3):
            assert [one.message for one in replica.synchronize_all().skipped] == ["FILE_LOST"]
        server.put(LARGE)
        assert replica.synchronize_all().skipped == []

    def test_what_comes_before_a_refusal_is_not_kept(self, replica: Replica) -> None:
        """Bytes of a content that the server takes back in the middle are not gone on from."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.gives[sha256(LARGE)] = b"x" * len(LARGE)

        def refuse(_name: bytes, position: int) -> None:
            if position == 5 * CHUNK_BYTES:
                raise FileRefused("FILE_LOST")

        server.on_download = refuse
        connect(replica, server)
        assert [one.message for one in replica.synchronize_all().skipped] == ["FILE_LOST"]
        assert [name for name in parts_of(replica) if not name.endswith(".lock")] == []
        server.on_download = lambda *_: None
        server.gives.clear()
        server.put(LARGE)
        assert replica.synchronize_all().skipped == []
        assert read(replica) == LARGE

    @pytest.mark.usefixtures("impatient")
    def test_a_part_that_was_damaged_here_is_not_the_servers_fault(self, replica: Replica) -> None:
        """What came before, and lost its bytes with the power, is fetched anew by the same synchronization."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        connect(replica, server)
        part = replica._storage.files.contents.part(sha256(LARGE).hex())
        part.append(LARGE[:CHUNK_BYTES] + bytes(CHUNK_BYTES))
        part.close()
        report = replica.synchronize_all()
        assert [offset for _, _, offset in server.downloads] == [2 * CHUNK_BYTES, 0]
        assert (report.files_downloaded, report.skipped) == (1, [])
        assert read(replica) == LARGE

    def test_what_has_no_room_is_not_asked_for(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """A content for which there is no room costs nothing, and comes as soon as there is room."""
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", PHOTO))])
        server.put(LARGE)
        server.put(PHOTO)
        connect(replica, server)
        free_bytes = len(LARGE) - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free_bytes))
        report = replica.synchronize_all()
        assert [name for name, _, _ in server.downloads] == [sha256(PHOTO)]
        assert [one.id for one in report.skipped] == ["t1"]
        free_bytes += 1
        assert (replica.synchronize_all().skipped, read(replica)) == ([], LARGE)

    def test_what_nobody_needs_makes_room_first(self, replica: Replica) -> None:
        """Contents whose objects are gone are deleted before others are downloaded."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        found: list[dict[bytes, int]] = []
        server.on_download = lambda *_: found.append(contents_of(replica))
        server.pages = [page(task("t2", PHOTO), removals=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert found == [{}]

    def test_more_than_there_should_be_is_not_taken(self, replica: Replica) -> None:
        """A server that sends without end fills no disk: what is too much ends the download."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.gives[sha256(PHOTO)] = LARGE
        connect(replica, server)
        report = replica.synchronize_all()
        assert report.file_bytes_received <= len(PHOTO)
        assert replica.file_state("Task", "t1", "photo") is FileState.FAILED

    def test_a_full_disk_costs_the_files_only(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """A content for which there is no room is skipped, gives its room back, and comes when there is some."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", LARGE))])
        server.put(PHOTO)
        server.put(LARGE)
        connect(replica, server)
        append = Part.append

        def limited(part: Part, data: bytes) -> None:
            if part.size + len(data) > 2 * CHUNK_BYTES:
                raise DiskFull("no room")
            append(part, data)

        with monkeypatch.context() as patch:
            patch.setattr(Part, "append", limited)
            report = replica.synchronize_all()
        assert [(one.id, one.message) for one in report.skipped] == [("t2", "no room")]
        assert read(replica, "t1") == PHOTO
        assert not [name for name in parts_of(replica) if not name.endswith(".lock")]
        server.pages = ()
        assert replica.synchronize_all().skipped == []
        assert read(replica, "t2") == LARGE

    def test_what_was_under_way_is_reported_after_a_session_in_vain(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a session that was begun for what was committed meanwhile fails, downloads are reported, no error."""
        monkeypatch.setattr(_file_exchange, "SESSION_SECONDS", 0.0)
        monkeypatch.setattr(_transfer, "TICK_SECONDS", 0.01)
        server = FileServer(pages=[page(task("t1", LARGE), task("t2", LARGER))])
        server.put(LARGE)
        server.put(LARGER)
        connection = connect(replica, server)
        released = threading.Event()

        def unreachable(_metadata: object, _timeout: float | None) -> Any:
            raise Transient("the path broke")

        def on_download(_name: bytes, position: int) -> None:
            if position == CHUNK_BYTES:
                monkeypatch.setattr(connection, "synchronize", unreachable)
                replica.create("Task", {}, "t3")
                released.wait(3)

        server.on_download = on_download
        report = replica.synchronize_all(timeout=2.0)
        released.set()
        assert {one.reason for one in report.skipped} == {SkipReason.FILE_NOT_DOWNLOADED}
        assert sum(one.count for one in report.skipped) == 2
        assert len(pending(replica)) == 1

    def test_an_expired_token_is_asked_for_again(self, replica: Replica) -> None:
        """A token that expires while contents travel is got anew, and the transfer goes on."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        connection = connect(replica, server)
        refusals = [Unauthenticated("expired")]

        def refuse(_name: bytes, position: int) -> None:
            if refusals and position == 2 * CHUNK_BYTES:
                raise refusals.pop()

        server.on_download = refuse
        before = connection.token_count
        assert replica.synchronize_all().skipped == []
        assert read(replica) == LARGE
        assert connection.token_count - before == 3  # the session's, the first and the second download's

    def test_another_object_is_asked_for_what_one_does_not_give(self, replica: Replica) -> None:
        """A content that cannot be had by one object is had by another one that refers to it."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        denied = server.downloads

        def deny(_name: bytes, _offset: int) -> None:
            if denied[-1][1] == ("Task", "t1"):
                raise FileRefused("FILE_NOT_FOUND", is_denied=True)

        server.on_download = deny
        assert replica.synchronize_all().skipped == []
        assert read(replica, "t1") == PHOTO
        assert [key for _, key, _ in server.downloads] == [("Task", "t1"), ("Task", "t2")]

    @pytest.mark.parametrize("is_denied", [False, True])
    def test_a_shared_content_that_cannot_be_had_costs_few_calls(self, replica: Replica, *, is_denied: bool) -> None:
        """A content of many objects is asked for once if it is lost, by few if it is denied, and most are counted."""
        sharing = ASKED_OBJECTS_MAX + 10
        server = FileServer(pages=[page(*(task(f"t{number}", PHOTO) for number in range(sharing)), task("u1", LARGE))])
        server.put(PHOTO)
        server.put(LARGE)
        connect(replica, server)

        def refuse(name: bytes, _offset: int) -> None:
            if name == sha256(PHOTO):
                raise FileRefused("no", is_denied=is_denied)

        server.on_download = refuse
        report = replica.synchronize_all()
        asked = [key for name, key, _ in server.downloads if name == sha256(PHOTO)]
        assert len(asked) == len(set(asked)) == (ASKED_OBJECTS_MAX if is_denied else 1)
        assert sum(one.count for one in report.skipped) == sharing
        assert [(one.entity, one.id, one.count) for one in report.skipped if one.count > 1] == [("Task", "", 10)]
        assert {replica.file_state("Task", f"t{number}", "photo") for number in range(sharing)} == {FileState.FAILED}
        assert read(replica, "u1") == LARGE

        server.on_download = lambda *_: None
        server.pages = ()
        assert replica.synchronize_all().files_downloaded == 1
        assert replica._storage.files.missing_entities() == []

    def test_contents_that_the_server_lost_hold_up_nothing_else(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However long a server takes to say of one content after the other that it is lost, the next one comes."""
        lost = [b"x" * size for size in range(1, 6)]
        server = FileServer(pages=[page(*(task(f"t{len(one)}", one) for one in lost), task("u1", LARGE))])
        for content in (*lost, LARGE):
            server.put(content)
        connect(replica, server)
        late_seconds = 0.0

        def refuse(name: bytes, _offset: int) -> None:
            nonlocal late_seconds
            if name != sha256(LARGE):
                late_seconds += _transfer.SILENCE_SECONDS_MAX * 0.6
                raise FileRefused("FILE_LOST")

        server.on_download = refuse
        monkeypatch.setattr(_transfer, "TRANSFERS_AT_ONCE", 1)
        monkeypatch.setattr(_transfer, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_seconds))
        report = replica.synchronize_all()
        assert [one.id for one in report.skipped] == [f"t{len(one)}" for one in lost]
        assert read(replica, "u1") == LARGE

    @pytest.mark.parametrize("way", ["set aside", "next day", "folder away"])
    def test_contents_that_vanished_or_rotted_come_again(self, replica: Replica, way: str) -> None:
        """What a replica had, and has no more, is downloaded again, without a change of the objects."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", LARGE))])
        server.put(PHOTO)
        server.put(LARGE)
        connect(replica, server)
        replica.synchronize_all()
        server.pages = ()
        contents = replica._storage.files.contents
        if way == "folder away":
            shutil.rmtree(contents.path)
        else:
            contents.delete(sha256(PHOTO))
        if way == "next day":
            replica._storage.set_meta(files_swept=b"1.0")
            replica.synchronize_all()
        else:
            damaged = LARGE[:-1] + b"x"
            if way == "set aside":
                name = sha256(LARGE).hex()
                (replica.path / "files" / name[:2] / name[2:4] / name).write_bytes(damaged)
            moved = replica.set_aside_damaged().contents
            assert [path.read_bytes() for path in moved.values()] == ([damaged] if way == "set aside" else [])
            assert list(replica.verify()) == []
        assert replica.synchronize_all().files_downloaded == (1 if way == "next day" else 2)
        assert (read(replica, "t1"), read(replica, "t2")) == (PHOTO, LARGE)

    def test_what_vanished_is_looked_for_some_at_a_time(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many objects have files, a few are looked at in one transaction, and the disk outside of any."""
        monkeypatch.setattr(_files, "LOOK_STEP_OBJECTS", 2)
        ids = [f"t{number}" for number in range(7)]
        server = FileServer(pages=[page(*(task(id_, id_.encode()) for id_ in ids))])
        for id_ in ids:
            server.put(id_.encode())
        connect(replica, server)
        replica.synchronize_all()
        files, environment = replica._storage.files, replica._storage.environment
        for id_ in ids[1:]:
            files.contents.delete(sha256(id_.encode()))
        looked_at: list[int] = []
        is_open = False
        read, size, references = environment.read, files.contents.size, files.references

        @contextmanager
        def opened() -> Iterator[Any]:
            nonlocal is_open
            with read() as transaction:
                is_open = True
                looked_at.append(0)
                yield transaction
                is_open = False

        def counted(transaction: Any, key: bytes) -> Any:
            looked_at[-1] += 1
            return references(transaction, key)

        def size_outside(sha256: bytes) -> int | None:
            assert not is_open
            return size(sha256)

        with monkeypatch.context() as watched:
            watched.setattr(environment, "read", opened)
            watched.setattr(files, "references", counted)
            watched.setattr(files.contents, "size", size_outside)
            files.sweep()
        assert (max(looked_at), sum(looked_at)) == (2, len(ids))
        assert sorted(id_ for _, id_ in files.look_again()) == ids[1:]

    @pytest.mark.parametrize("wish", ["lazy", "never", FileDownload("eager", bytes_max=100)])
    def test_what_is_not_wanted_does_not_come(self, folder: Path, wish: Any) -> None:
        """What the replica does not want with its objects stays on the server, until it is opened, or altogether."""
        server = FileServer(pages=[page(task("t1", PHOTO), ("Note", "n1", 1, {"photo": reference(b"small")}))])
        server.put(PHOTO)
        server.put(b"small")
        with Replica(folder / "a", files={"Task": wish}) as replica:
            connect(replica, server)
            report = replica.synchronize_all()
            assert (report.files_downloaded, report.skipped) == (1, [])
            assert replica.file_state("Task", "t1", "photo") is FileState.PENDING
            assert replica.file_state("Note", "n1", "photo") is FileState.AVAILABLE
            if wish == "never":
                with pytest.raises(FileUnavailable, match="never"):
                    read(replica)
            else:
                assert read(replica) == read(replica) == PHOTO
                assert len(server.downloads) == 2
        with Replica(folder / "a") as replica:
            connect(replica, server)
            replica.synchronize_all()
            assert read(replica) == PHOTO
            assert len(server.downloads) == 2

    def test_opening_without_a_server_tells_why(self, folder: Path) -> None:
        """A content that is not here is a typed error where there is no server to ask."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        with Replica(folder / "a", files={"Task": "lazy"}) as replica:
            connect(replica, server)
            replica.synchronize_all()
        with Replica(folder / "a") as replica:
            with pytest.raises(FileUnavailable, match="without a server") as caught:
                read(replica)
            assert (caught.value.entity, caught.value.id, caught.value.attribute) == ("Task", "t1", "photo")

    def test_two_threads_open_one_file(self, folder: Path) -> None:
        """A content that two threads want at the same time is downloaded once, and both have it."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        both = threading.Barrier(2)
        with Replica(folder / "a", files={"Task": "lazy"}) as replica:
            connect(replica, server)
            replica.synchronize_all()

            def opened() -> bytes:
                both.wait()
                return read(replica)

            with ThreadPoolExecutor(2) as pool:
                found = [one.result() for one in [pool.submit(opened), pool.submit(opened)]]
        assert found == [LARGE, LARGE]
        assert len(server.downloads) == 1
        assert parts_of(replica) == []

    def test_the_deadline_ends_opening(self, folder: Path) -> None:
        """Who opens a file waits no longer than was said."""
        server = FileServer(pages=[page(task("t1", LARGE))])
        server.put(LARGE)
        released = threading.Event()
        with Replica(folder / "a", files={"Task": "lazy"}) as replica:
            connect(replica, server)
            replica.synchronize_all()
            server.on_download = lambda *_: released.wait(30)
            threading.Timer(1.0, released.set).start()
            with pytest.raises(FileUnavailable):
                read(replica, timeout=0.1)
            server.on_download = lambda *_: None
            assert read(replica) == LARGE
            assert replica._storage.files.missing_of(("Task", "t1")) == []

    def test_other_modes_bring_the_contents_of_their_objects(self, replica: Replica) -> None:
        """Contents of selected objects, and of those that the operations changed, come in those modes too."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_selected([("Task", "t1")])
        assert read(replica) == PHOTO
        server.pages = [page(task("t2", LARGE))]
        server.put(LARGE)
        replica.create("Task", {}, "t3")
        replica.synchronize_unsynchronized()
        assert read(replica, "t2") == LARGE

    def test_a_selection_tries_again_what_failed(self, replica: Replica) -> None:
        """A selected object gets the content that could not be had before, although the object is the same."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        connect(replica, server)
        replica.synchronize_all()
        server.put(PHOTO)
        server.pages = ()
        replica.synchronize_selected([("Task", "t1")])
        assert replica.file_state("Task", "t1", "photo") is FileState.AVAILABLE

    def test_a_selection_reports_what_failed_before_another_session(self, replica: Replica, small: None) -> None:
        """What could not be downloaded is reported although a further session followed, and what is skipped once."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(LARGE)}, "t2")
        report = replica.synchronize_selected([("Task", "t1"), ("Task", "t2"), replica.new("Task", {}, "new")])
        assert (report.attempts, report.applied) == (2, 1)
        assert sorted((one.reason, one.id) for one in report.skipped) == [
            (SkipReason.FILE_NOT_DOWNLOADED, "t1"),
            (SkipReason.UNCOMMITTED, "new"),
        ]

    @pytest.mark.parametrize("wish", ["eager", "lazy"])
    def test_what_could_not_be_had_is_pending_once_its_object_comes_anew(self, folder: Path, wish: str) -> None:
        """That a content could not be had is forgotten when the server tells of its object again."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        with Replica(folder / "a", files={"Task": wish}) as replica:
            connect(replica, server)
            replica.synchronize_all()
            with pytest.raises(FileUnavailable):
                read(replica)
            server.pages = ()
            replica.synchronize_all()
            assert replica.file_state("Task", "t1", "photo") is FileState.FAILED
            server.put(PHOTO)
            server.pages = [page(("Task", "t1", 101, {"photo": reference(PHOTO)}))]
            replica.synchronize_all()
            expected = {"eager": FileState.AVAILABLE, "lazy": FileState.PENDING}[wish]
            assert replica.file_state("Task", "t1", "photo") is expected

    def test_a_file_that_is_replaced_here_is_not_downloaded(self, replica: Replica) -> None:
        """Only what the replica shows is downloaded, not what an own pending operation has replaced."""
        server = FileServer(pages=[page(task("t1", b"old"))])
        server.put(b"old")
        connect(replica, server)
        replica.create("Task", {}, "t0")
        receive(replica, task("t1", b"old"))
        replica.attach("Task", "t1", "photo", PHOTO)
        replica.synchronize_selected([("Task", "t0")])
        assert server.downloads == []


class TestRemoval:
    """Contents that nobody needs."""

    def test_contents_leave_with_their_objects(self, replica: Replica) -> None:
        """When the last object that refers to a content is removed, the content is; a shared one stays."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", PHOTO), task("t3", LARGE))])
        server.put(PHOTO)
        server.put(LARGE)
        connect(replica, server)
        replica.synchronize_all()
        server.pages = [page(removals=[("Task", "t1", 101), ("Task", "t3", 101)])]
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        server.pages = [page(removals=[("Task", "t2", 102)])]
        replica.synchronize_all()
        assert contents_of(replica) == {}
        assert sorted(one.name for one in (replica.path / "files").iterdir()) == ["incoming", "tidelog-replica"]

    def test_what_was_never_had_leaves_nothing(self, replica: Replica) -> None:
        """When the object goes whose content could not be had, nothing of the tries stays."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        connect(replica, server)
        replica.synchronize_all()
        server.pages = [page(removals=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert parts_of(replica) == []
        assert replica._storage.files.reason(sha256(PHOTO)) is None

    def test_a_content_that_changes_hands_stays(self, replica: Replica) -> None:
        """A content whose last object goes while another one comes that refers to it is not downloaded again."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        server.pages = [page(task("t2", PHOTO), removals=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        assert len(server.downloads) == 1

    def test_a_content_that_an_own_operation_replaced_leaves(self, replica: Replica) -> None:
        """When the server confirms that a file is no more, its content goes."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        replica.update("Task", "t1", {"photo": None})
        assert list(replica._storage.files.look_again()) == []
        server.pages = [page(confirmations=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert contents_of(replica) == {}

    def test_a_file_that_a_refusal_brings_back_keeps_its_content(self, replica: Replica) -> None:
        """A file that shows again because the operation which took it away was refused has its content."""
        server = FileServer(refuses=[3], pages=[page(confirmations=[("Task", "t1", 102)])])
        connect(replica, server)
        replica.create("Task", {}, "t1")
        with replica.transaction() as transaction:
            transaction.attach("Task", "t1", "photo", PHOTO)
            transaction.update("Task", "t1", {"photo": None})
        age(replica)
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        assert list(replica.verify()) == []

    def test_snapshots_beside_pending_operations_count(self, replica: Replica) -> None:
        """Files of snapshots are noticed where operations of their entity are pending, on them or on others."""
        replica.create("Task", {}, "t0")
        receive(replica, ("Task", "t1", 100, {}))
        replica.update("Task", "t1", {"photo": None})
        receive(replica, ("Task", "t1", 101, {"photo": reference(LARGE)}))
        receive(replica, task("t2", PHOTO))
        assert list(replica._storage.files.look_again()) == [("Task", "t2")]
        assert list(replica.verify()) == []
        with replica._storage.environment.read() as transaction:
            assert replica._storage.files.is_user(transaction, sha256(LARGE), b"Task\0t1")

    def test_a_replaced_content_leaves(self, replica: Replica) -> None:
        """A content goes when its attribute is another file, or none."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", LARGE))])
        server.put(PHOTO)
        server.put(LARGE)
        server.put(b"new")
        connect(replica, server)
        replica.synchronize_all()
        server.pages = [page(("Task", "t1", 101, {"photo": reference(b"new")}), ("Task", "t2", 101, {}))]
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(b"new"): 3}

    def test_what_pending_operations_need_stays(self, replica: Replica) -> None:
        """A content stays as long as an operation that refers to it is pending, be its object gone."""
        server = FileServer()
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        replica.delete("Task", "t1")
        age(replica)
        replica._storage.files.sweep()
        assert list(replica._storage.files.look_again()) == []
        replica._storage.files.collect()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}

        server.pages = [page(removals=[("Task", "t1", 102)])]
        replica.synchronize_all()
        assert (pending(replica), contents_of(replica)) == ([], {})

    def test_the_base_of_an_object_keeps_its_content(self, replica: Replica) -> None:
        """What an own pending operation has replaced stays: the operation may be refused."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        replica.update("Task", "t1", {"photo": None})
        server.pages = ()
        replica.synchronize_selected([("Task", "t2")])
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        server.refuses = [1]
        replica.synchronize_all()
        assert read(replica) == PHOTO

    def test_a_failed_operation_keeps_its_content(self, replica: Replica) -> None:
        """The content of a refused operation stays with the failure."""
        server = FileServer(refuses=[1])
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        age(replica)
        replica.synchronize_all()
        replica._storage.files.sweep()
        replica._storage.files.collect()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}

    def test_a_stray_content_is_collected_after_an_hour(self, replica: Replica) -> None:
        """A content that nobody ever referred to, as a crash leaves it, goes, once nobody can be about to."""
        connect(replica, FileServer())
        replica.add_file(PHOTO)
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        age(replica)
        replica._storage.set_meta(files_swept=b"1")  # it was long ago
        replica.synchronize_all()
        assert contents_of(replica) == {}

    def test_a_failure_keeps_its_content_while_it_is_logged(self, folder: Path) -> None:
        """The content of a refused operation goes when the operation leaves the log; the failure stays."""
        with Replica(folder / "a") as replica:
            connect(replica, FileServer(refuses=[1]))
            replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
            replica.synchronize_all()
            age(replica)
            replica.synchronize_all()
            assert list(contents_of(replica)) == [sha256(PHOTO)]
            assert list(replica.verify()) == []
        with Replica(folder / "a", log_retention=timedelta(0)) as replica:
            assert replica.trim_log() == 1
            connect(replica, FileServer())
            replica.synchronize_all()
            assert contents_of(replica) == {}
            assert [one.object_id for one in replica.failures()] == ["t1"]
            assert list(replica.verify()) == []

    @pytest.mark.parametrize("is_stray", [False, True])
    def test_a_content_that_came_under_a_clock_that_was_ahead(self, folder: Path, *, is_stray: bool) -> None:
        """A content that is of the future whenever somebody looks is collected in the end, as any other one."""
        clock = ManualClock()
        with Replica(folder / "a", clock=clock) as replica:
            value = replica.add_file(PHOTO)
            server = FileServer()
            connect(replica, server)
            if not is_stray:
                server.pages = [page(task("t1", PHOTO))]
                server.put(PHOTO)
                replica.synchronize_all()
                server.pages = [page(removals=[("Task", "t1", 101)])]
            replica._storage.files.contents.renew(value["sha256"], clock() / 1e6 + timedelta(days=365).total_seconds())

            for _ in range(2):
                replica.synchronize_all()
                assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
                server.pages = []
                clock.advance(timedelta(days=2))
            for _ in range(2):
                replica.synchronize_all()
                clock.advance(timedelta(days=2))

            assert contents_of(replica) == {}

    def test_a_clock_that_was_behind_once_makes_no_content_old(self, folder: Path) -> None:
        """What a program is about to refer to stays young, though one synchronization had a clock of long ago."""
        clock = ManualClock()
        with Replica(folder / "a", clock=clock) as replica:
            connect(replica, FileServer())
            value = replica.add_file(PHOTO)
            replica._storage.files.contents.renew(value["sha256"], clock() / 1e6)
            for days in (-20_000, 20_000, 0):
                clock.advance(timedelta(days=days))
                replica.synchronize_all()

            assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}

    def test_looking_for_what_nobody_needs_writes_nothing_where_all_is_well(self, replica: Replica) -> None:
        """That no content came under a clock that was ahead is noted once, not each day."""
        replica.create("Task", {"photo": replica.add_file(PHOTO)}, "t1")
        files, environment = replica._storage.files, replica._storage.environment

        def last_transaction() -> int:
            with environment.read() as transaction:
                return transaction.id()

        before = last_transaction()
        files.sweep()
        assert last_transaction() == before

    def test_a_crash_before_the_commit_leaves_what_is_collected(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A program that dies between a content and the operation that refers to it leaves nothing but the content."""

        def die(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with Replica(folder / "a") as replica:
            replica.create("Task", {}, "t1")
            with monkeypatch.context() as patch:
                patch.setattr(Committer, "commit", die)
                with pytest.raises(KeyboardInterrupt):
                    replica.attach("Task", "t1", "photo", PHOTO)
        with Replica(folder / "a") as replica:
            assert list(replica.verify()) == []
            assert replica.file_state("Task", "t1", "photo") is None
            assert list(contents_of(replica)) == [sha256(PHOTO)]
            age(replica)
            connect(replica, FileServer())
            replica.synchronize_all()
            assert contents_of(replica) == {}

    def test_what_is_attached_again_stays(self, replica: Replica) -> None:
        """A content that a program stores again while its last user goes is as young as a new one."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        value = replica.add_file(PHOTO)
        server.pages = [page(removals=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}
        replica.create("Task", {"photo": value}, "t2")
        age(replica)
        replica.synchronize_selected([("Task", "t1")])
        assert read(replica, "t2") == PHOTO

    @pytest.mark.parametrize("is_gone", [False, True])
    def test_a_transaction_that_is_open_for_long_notices(self, replica: Replica, *, is_gone: bool) -> None:
        """What was attached hours before its commit is young from then on; if it has gone, nothing is committed."""
        server = FileServer(pages=[page(("Task", "t1", 1, {}))])
        connect(replica, server)
        replica.synchronize_all()
        server.pages = ()

        def late() -> None:
            with replica.transaction() as transaction:
                transaction.attach("Task", "t1", "photo", PHOTO)
                age(replica)
                if is_gone:
                    replica.synchronize_all()

        if is_gone:
            with pytest.raises(FileUnavailable, match="while the transaction was open"):
                late()
            assert replica.file_state("Task", "t1", "photo") is None
            return
        late()
        (content,) = replica._storage.files.contents.contents()
        assert content.time > 1.0
        assert replica.synchronize_all().files_uploaded == 1

    def test_what_is_attached_during_its_download_stays(self, replica: Replica) -> None:
        """A content that a program stores while it is being downloaded is as young as any that a program stores."""
        server = FileServer(pages=[page(task("t1", PHOTO))])
        server.put(PHOTO)
        server.on_download = lambda *_: replica.add_file(PHOTO)
        connect(replica, server)
        replica.synchronize_all()
        server.pages = [page(removals=[("Task", "t1", 101)])]
        replica.synchronize_all()
        assert contents_of(replica) == {sha256(PHOTO): len(PHOTO)}


def task(id_: str, content: bytes) -> tuple[str, str, int, dict[str, Any]]:
    """Return a snapshot of a task with a photo."""
    return ("Task", id_, 100, {"photo": reference(content)})


def receive(replica: Replica, snapshot: tuple[str, str, int, dict[str, Any]]) -> None:
    """Take in a snapshot as a download does."""
    replica._storage.publication.merge([page(snapshot).SerializeToString()])


class TestVerification:
    """What a verification says of files."""

    @pytest.fixture
    def history(self, replica: Replica) -> Replica:
        """Give a replica with files in every state: t1 here, t2 missing, t3 pending, t4 failed, t5 changed."""
        server = FileServer(pages=[page(task("t1", PHOTO), task("t2", LARGE), task("t5", b"base"))], refuses=[1])
        server.put(PHOTO)
        server.put(b"base")
        connect(replica, server)
        replica.create("Task", {"photo": replica.add_file(b"failed")}, "t4")
        replica.synchronize_all()
        replica.create("Task", {"photo": replica.add_file(b"pending")}, "t3")
        replica.attach("Task", "t5", "photo", b"mine")
        assert list(replica._storage.files.look_again()) == []
        return replica

    def test_a_sound_replica_is_sound(self, history: Replica) -> None:
        """Nothing is found where nothing is wrong, after a settlement and a removal neither."""
        assert list(history.verify()) == []
        server = FileServer(pages=[page(removals=[("Task", "t1", 500)])])
        connect(history, server)
        assert history.synchronize_all().applied == 2
        assert list(history.verify()) == []

    def test_a_server_put_back_needs_contents_again(self, history: Replica) -> None:
        """What is to be offered again is noted with its contents, and nothing is wrong in that."""
        connect(history, FileServer())
        history.synchronize_all()
        history._storage.begin_rebase(epoch="epoch", timeline="other", settled_ranges=[])
        assert list(history.verify()) == []
        assert [seq for seq, _ in history._storage.files.uploads(until=100)] == [1, 2, 3]
        with history._storage.environment.read() as transaction:
            operation = decode_operation(history._storage.log.get(transaction, 1) or b"")
        history._storage.settle([applied(operation, 500)], b"")
        assert list(history.verify()) == []
        with history._storage.environment.read() as transaction:
            assert not history._storage.files.is_user(transaction, sha256(b"failed"), 1)

    def test_a_folder_that_is_away_is_said_once(self, replica: Replica) -> None:
        """That the folder of the contents is away is one finding, however many contents there are."""
        connect(replica, FileServer())
        for content in (PHOTO, LARGE):
            replica.create("Task", {"photo": replica.add_file(content)})
        replica.synchronize_all()
        (replica.path / "files").rename(replica.path / "away")
        assert [(one.kind, one.where) for one in replica.verify()] == [(FindingKind.CONTENT_LOST, "all contents")]
        assert not (replica.path / "files").exists()

    def test_what_is_set_aside_keeps_its_contents(self, history: Replica) -> None:
        """An operation that cannot be read any more becomes a failure, and its content stays with it."""
        seq = pending(history)[0]
        log = history._storage.environment.database("log")

        def damage(transaction: lmdb.Transaction[bytes]) -> None:
            entry = transaction.get(pack_position(seq), b"", db=log)
            transaction.put(pack_position(seq), entry[:-1] + b"?", db=log)

        history._storage.environment.write(damage)
        assert list(history.set_aside_damaged().files) == [seq]
        assert list(history.verify()) == []
        age(history)
        history._storage.files.sweep()
        history._storage.files.collect()
        assert sha256(b"pending") in contents_of(history)

    @pytest.mark.parametrize("what", ["deleted", "changed"])
    def test_a_content_that_was_damaged_is_named(self, history: Replica, what: str) -> None:
        """A content that is gone, or has other bytes, is named."""
        name = sha256(PHOTO).hex()
        path = history.path / "files" / name[:2] / name[2:4] / name
        if what == "deleted":
            path.unlink()
            expected = {FindingKind.CONTENT_LOST}
        else:
            path.write_bytes(PHOTO[:-1] + b"x")
            expected = {FindingKind.CONTENT_DAMAGED}
        found = list(history.verify())
        assert {one.kind for one in found} == expected
        assert all(name in one.where for one in found)

    @pytest.mark.parametrize("table", ["files", "file_users", "file_uploads", "file_missing"])
    def test_a_table_that_lacks_something_is_named(self, history: Replica, table: str) -> None:
        """Each entry of a table that is not there is noticed."""
        environment = history._storage.environment
        database = environment.database(table)
        with environment.read() as transaction:
            entries = list(transaction.cursor(database))
        assert entries
        for key, value in entries:
            environment.write(partial(lmdb.Transaction.delete, key=key, db=database))
            kinds = {one.kind for one in history.verify()}
            assert kinds & {FindingKind.INDEX_WRONG, FindingKind.CONTENT_LOST}, key
            environment.write(partial(lmdb.Transaction.put, key=key, value=value, db=database))
        assert list(history.verify()) == []

    @pytest.mark.parametrize("table", ["files", "file_users", "file_uploads"])
    def test_a_table_that_has_too_much_is_named(self, history: Replica, table: str) -> None:
        """An entry that nothing accounts for is noticed."""
        environment = history._storage.environment
        database = environment.database(table)
        with environment.read() as transaction:
            key, value = next(iter(transaction.cursor(database)))
        other = {"files": b"Task\0t9", "file_users": key[:32] + b"Task\0t9", "file_uploads": b"\0" * 7 + b"\x63"}[
            table
        ]
        environment.write(lambda transaction: transaction.put(other, value, db=database))
        assert FindingKind.INDEX_WRONG in {one.kind for one in history.verify()}

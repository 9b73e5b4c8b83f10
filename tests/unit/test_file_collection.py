"""Contents of files that nothing refers to: when they go, and that none goes which somebody is about to refer to."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
from tests.builders import TENANT, TIME_US, USER, Cabinet, Lab, create, delete, file_value, said, update, wanted

from tidelog import ResourceClosed, StorageError
from tidelog._contents import Content
from tidelog_server import Application, DirectoryContents, HookContext, HookObject, Principal, Reject, Tenant, _files
from tidelog_server._collection import old_grants
from tidelog_server._content_store import MARK_NAME, PartMismatch
from tidelog_server._files import LOOKED_AT_ONCE, TIMELINE_NOTE, Files, Standing
from tidelog_server._records import Writes
from tidelog_server._retention import Periods, Retention
from tidelog_server._sightings import Doubt, Sightings
from tidelog_server._store import Reader

PHOTO: Final = b"a photo, say"
OTHER: Final = b"another one"
HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)


@pytest.fixture
def cabinet(tmp_path: Path) -> Cabinet:
    """Give files with an application that allows everything."""
    return Cabinet(Lab(), tmp_path / "files")


def kept(cabinet: Cabinet) -> list[Path]:
    """Return the files of the directory, but for its mark."""
    return [one for one in cabinet.contents.path.rglob("*") if one.is_file() and one.name != MARK_NAME]


def test_what_nothing_refers_to_goes_after_the_grace(cabinet: Cabinet) -> None:
    """A content that was uploaded, or added by the service, and that nothing came to refer to, is kept for a while."""
    cabinet.upload(PHOTO)
    cabinet.tenant().add_file(OTHER, name="other")

    cabinet.wait(DAY - HOUR)
    assert cabinet.collect() == 0
    assert cabinet.has(PHOTO)
    assert cabinet.has(OTHER)
    cabinet.wait(2 * HOUR)
    assert cabinet.collect() == 2
    assert not cabinet.has(PHOTO)
    assert not cabinet.has(OTHER)
    assert cabinet.entries(b"g") == cabinet.entries(b"c") == []
    assert kept(cabinet) == []


def test_what_something_refers_to_stays(cabinet: Cabinet) -> None:
    """A content stays as long as one object refers to it, and a while longer from when the last one let go."""
    photo = cabinet.upload(PHOTO)
    session = cabinet.lab.session()
    session.batch(create(1, "a", {"photo": photo}), create(2, "b", {"photo": photo}))

    cabinet.wait(5 * DAY)
    session.batch(delete(3, "a"))
    assert cabinet.collect() == 0
    session.time_us = cabinet.time_us
    session.batch(update(4, "b", {"photo": None}))
    cabinet.wait(DAY - HOUR)
    assert cabinet.collect() == 0
    assert cabinet.has(PHOTO)
    cabinet.wait(2 * HOUR)
    assert cabinet.collect() == 1
    assert not cabinet.has(PHOTO)


def test_a_right_ends_with_the_grace(cabinet: Cabinet) -> None:
    """Who uploaded a content may refer to it for a while only, unless he asks for it again."""
    ann, bob = Principal("ann"), Principal("bob")
    photo = cabinet.upload(PHOTO, ann)
    cabinet.upload(PHOTO, bob)
    cabinet.lab.settle(create(1, "a", {"photo": photo}))

    cabinet.wait(DAY - HOUR)
    assert cabinet.files.stat(bob, [wanted(PHOTO)])[0].is_present
    cabinet.wait(2 * HOUR)
    cabinet.collect()

    assert cabinet.entries(b"g") == [b"g" + photo["sha256"] + b"bob"]
    assert cabinet.has(PHOTO)


def test_a_right_stays_while_there_is_a_failure(tmp_path: Path) -> None:
    """Whether a failure keeps its author's right is seen at once, for him only, and without reading it."""
    application = Application()
    application.before_commit("Task")(refusing)
    cabinet = Cabinet(Lab(application), tmp_path)
    ann, an = Principal("ann"), Principal("an")
    photo = cabinet.upload(PHOTO, ann)
    cabinet.upload(PHOTO, an)
    cabinet.lab.session(principal=ann).settle(*(create(seq, f"t{seq}", {"photo": photo}) for seq in range(1, 20)))
    cabinet.wait(2 * DAY)

    with cabinet.lab.store.read(TENANT) as reader, mock.patch.object(type(reader), "failure", side_effect=LookupError):
        assert old_grants(reader, b"", cabinet.time_us) == ([b"g" + photo["sha256"] + b"an"], mock.ANY)
    assert cabinet.collect() == 0
    assert cabinet.entries(b"g") == [b"g" + photo["sha256"] + b"ann"]


def test_what_was_called_present_stays_for_the_grace(cabinet: Cabinet) -> None:
    """Nobody who was told that a content is present finds it gone before the grace is over."""
    cabinet.upload(PHOTO)
    cabinet.wait(2 * DAY)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present

    for _ in range(3):
        cabinet.wait(DAY - HOUR)
        assert cabinet.collect() == 0
        assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    cabinet.wait(DAY - HOUR)
    assert cabinet.collect() == 0
    assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["APPLIED"]


def test_what_is_called_present_while_it_is_collected(tmp_path: Path) -> None:
    """A content that goes right before it would be called present is called missing."""
    lab = Lab()

    class Collecting(DirectoryContents):
        """Collects before it says that a content is there."""

        def size(self, tenant: str, sha256: bytes, copy: str = "") -> int | None:
            size = super().size(tenant, sha256, copy)
            if racing.is_due:
                racing.is_due = False
                assert racing.collect() == 1
            return size

    class Racing(Cabinet):
        is_due = False

    racing = Racing(lab, tmp_path)
    racing.contents = Collecting(tmp_path)
    racing.files = Files(lab.application, lab.store, racing.contents, lambda: racing.time_us)
    racing.upload(PHOTO)
    racing.wait(2 * DAY)
    racing.is_due = True

    assert not racing.files.stat(USER, [wanted(PHOTO)])[0].is_present
    assert not racing.has(PHOTO)
    assert racing.entries(b"g") == []


def test_what_comes_to_be_referred_to_before_it_is_collected(cabinet: Cabinet) -> None:
    """A content that was found unneeded, and that an operation refers to before it would go, stays."""
    photo = cabinet.upload(PHOTO)
    cabinet.wait(2 * DAY)
    before_us = cabinet.time_us
    assert said(cabinet.lab.settle(create(1, set={"photo": photo}))) == ["APPLIED"]
    revoke = {b"g" + photo["sha256"] + b"ann": None}
    cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, revoke), None)).result()

    assert cabinet.files.collect(TENANT, photo["sha256"], before_us) == 0
    assert cabinet.has(PHOTO)


def test_an_upload_while_the_same_content_is_collected(tmp_path: Path) -> None:
    """An upload that ends between the end of a record and that of its content leaves both."""
    lab = Lab()
    uploads: list[threading.Thread] = []

    class Slow(DirectoryContents):
        """Lets an upload of the content have all the time it wants before it deletes it."""

        def delete(self, tenant: str, sha256: bytes, copy: str = "") -> None:
            uploads.append(threading.Thread(target=racing.upload, args=(PHOTO,)))
            uploads[0].start()
            uploads[0].join(0.3)
            super().delete(tenant, sha256, copy)

    racing = Cabinet(lab, tmp_path)
    racing.contents = Slow(tmp_path)
    racing.files = Files(lab.application, lab.store, racing.contents, lambda: racing.time_us)
    racing.upload(PHOTO)
    racing.wait(2 * DAY)

    assert racing.collect() == 1
    uploads[0].join()

    assert racing.has(PHOTO)
    assert said(lab.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["APPLIED"]


def test_a_content_without_a_record(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server left that ended before it wrote the record is missing to everybody, and goes in the end."""

    def ends(*_: Any, **__: Any) -> None:
        raise ResourceClosed("the server ends here")

    with monkeypatch.context() as patched:
        patched.setattr(_files, "completed", ends)
        with pytest.raises(ResourceClosed):
            cabinet.upload(PHOTO)
    assert len(kept(cabinet)) == 1
    assert cabinet.files.stat(USER, [wanted(PHOTO)]) == [Standing(takes_room=True)]
    assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["NOT_READY"]

    cabinet.lab.settle(create(2, "t2"))
    of_the_directory(cabinet)
    cabinet.files.note_timeline()
    assert collected_in(cabinet, days=29) == 0
    assert len(kept(cabinet)) == 1
    assert collected_in(cabinet, days=2) == 1
    assert kept(cabinet) == []
    assert cabinet.entries(b"w") == []


def test_contents_that_were_away(cabinet: Cabinet) -> None:
    """A content that was out of reach when somebody asked for it, and that is referred to, stays once it is back."""
    photo, other = cabinet.upload(PHOTO), cabinet.upload(OTHER)
    cabinet.lab.settle(create(1, set={"photo": photo}), create(2, set={"photo": other}))
    paths = cabinet.path(PHOTO), cabinet.path(OTHER)
    away = [(path, path.rename(cabinet.contents.path / path.name)) for path in paths]
    assert not any(one.is_present for one in cabinet.files.stat(USER, [wanted(PHOTO), wanted(OTHER)]))
    for path, moved in away:
        moved.rename(path)
    paths[1].write_bytes(b"something el")

    of_the_directory(cabinet)
    cabinet.wait(10 * DAY)
    assert cabinet.collect() == 0

    assert cabinet.has(PHOTO)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    assert not cabinet.files.stat(USER, [wanted(OTHER)])[0].is_present
    assert len(kept(cabinet)) == 2
    cabinet.upload(OTHER)
    assert cabinet.has(OTHER)
    assert len(kept(cabinet)) == 2


def test_contents_without_a_record_after_a_restore(cabinet: Cabinet) -> None:
    """What has come since a backup stays where it is for a while after it was put back: it may be offered again."""
    cabinet.upload(PHOTO)
    cabinet.lab.settle(create(1))
    forget_files(cabinet)
    of_the_directory(cabinet)
    cabinet.files.note_timeline()
    collected_in(cabinet, days=29)
    store: Any = cabinet.lab.store
    store._identity = store.identity._replace(timeline="another")

    assert collected_in(cabinet, days=30) == 0
    assert len(kept(cabinet)) == 1
    assert collected_in(cabinet, days=2) == 1
    assert kept(cabinet) == []


@pytest.mark.parametrize("how", ["another timeline", "a state of long ago"])
def test_contents_on_record_after_a_restore(cabinet: Cabinet, how: str) -> None:
    """What was uploaded before a backup, or let go of, and referred to later, is there when that is offered again."""
    other = cabinet.upload(OTHER)
    revoke = {b"g" + other["sha256"] + b"ann": None}
    cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, revoke), None)).result()
    cabinet.upload(PHOTO)
    if how == "another timeline":
        store: Any = cabinet.lab.store
        store._identity = store.identity._replace(timeline="another")
        cabinet.wait(2 * DAY)
    else:
        cabinet.wait(8 * DAY)
        start_again(cabinet)

    assert cabinet.collect() == collected_in(cabinet, days=29) == 0
    cabinet.wait(HOUR)
    assert cabinet.has(OTHER)
    assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}), delete(2))) == ["APPLIED"] * 2
    assert collected_in(cabinet, days=3) == 2


@pytest.mark.parametrize("age", [HOUR, 3 * DAY, 40 * DAY])
def test_contents_without_a_record_after_a_silent_restore(cabinet: Cabinet, age: timedelta) -> None:
    """What a store that was put back behind the server's back has lost stays for a while, however old the store is."""
    cabinet.lab.settle(create(1))
    collected_in(cabinet, days=40)
    noted = cabinet.lab.store.note(TIMELINE_NOTE)
    cabinet.upload(PHOTO)
    now = cabinet.time_us / 1_000_000
    os.utime(kept(cabinet)[0], (now, now))
    cabinet.wait(age)

    forget_files(cabinet)
    cabinet.lab.store.set_note(TIMELINE_NOTE, noted)
    start_again(cabinet)
    assert cabinet.collect(timedelta(0)) == 0
    assert collected_in(cabinet, days=26) == 0
    assert len(kept(cabinet)) == 1
    assert collected_in(cabinet, days=5) == 1


def test_a_silent_restore_under_a_server(cabinet: Cabinet) -> None:
    """A database that was put back under its server knows what became of contents up to when it was copied."""
    cabinet.lab.settle(create(1))
    cabinet.files.note_timeline()
    copied_us, noted = cabinet.time_us, cabinet.lab.store.note(TIMELINE_NOTE)
    cabinet.wait(8 * DAY)
    assert cabinet.files.note_timeline() == cabinet.time_us

    cabinet.lab.store.set_note(TIMELINE_NOTE, noted)

    assert cabinet.files.note_timeline() == copied_us
    cabinet.wait(HOUR)
    assert cabinet.files.note_timeline() == copied_us


def test_what_another_server_noted_stays(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A doubt that another server notes, while one looks too, is not written over: contents are kept as it says."""
    cabinet.lab.settle(create(1))
    cabinet.files.note_timeline()
    copied_us = cabinet.time_us
    cabinet.wait(2 * HOUR)
    store = cabinet.lab.store
    theirs = Sightings.unpack(store.note(TIMELINE_NOTE))
    theirs = theirs._replace(looked_us=cabinet.time_us, doubts=(Doubt(cabinet.time_us, copied_us),))
    set_note, others = store.set_note, [theirs.pack()]

    def meanwhile(name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        if others:
            set_note(name, others.pop())
        return set_note(name, value, expected=expected)

    monkeypatch.setattr(store, "set_note", meanwhile)

    assert cabinet.files.note_timeline() == copied_us
    assert Sightings.unpack(store.note(TIMELINE_NOTE)) == theirs


def test_a_server_that_is_on_now_and_then(cabinet: Cabinet) -> None:
    """A server that is on for some days every other week lets go of what nothing needs too, if later."""
    cabinet.lab.settle(create(1))
    for number in range(6):
        start_again(cabinet)
        cabinet.upload(b"photo %d" % number)
        collected_in(cabinet, days=5)
        cabinet.wait(9 * DAY)

    assert [cabinet.has(b"photo %d" % number) for number in range(6)] == [False] * 4 + [True] * 2


def test_a_clock_that_was_ahead_once(cabinet: Cabinet) -> None:
    """After a start with a clock a year ahead contents are let go of as after any other doubt."""
    cabinet.lab.settle(create(1))
    cabinet.upload(PHOTO)
    cabinet.wait(365 * DAY)
    start_again(cabinet)
    cabinet.files.note_timeline()
    cabinet.wait(-365 * DAY)
    start_again(cabinet)

    assert collected_in(cabinet, days=40) == 1


def test_what_was_about_to_be_needed_before_two_gaps(cabinet: Cabinet) -> None:
    """What a store had lost when it was first put back can be offered again for 30 days, though it is off again."""
    cabinet.upload(PHOTO)
    cabinet.collect()
    cabinet.wait(9 * DAY)
    start_again(cabinet)
    assert collected_in(cabinet, days=5) == 0
    cabinet.wait(9 * DAY)
    start_again(cabinet)

    assert collected_in(cabinet, days=15) == 0
    assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}), delete(2))) == ["APPLIED"] * 2


def test_a_server_that_saw_all_the_time_pass(cabinet: Cabinet) -> None:
    """A server that goes on collects, however far its clock jumps: its store was not put back."""
    cabinet.lab.settle(create(1))
    cabinet.upload(PHOTO)
    cabinet.files.note_timeline()

    for _ in range(4):
        cabinet.wait(40 * DAY)
        cabinet.collect()

    assert not cabinet.has(PHOTO)


@pytest.mark.parametrize("holder", ["object", "failure"])
def test_what_is_off_the_record_and_held_comes_back(tmp_path: Path, holder: str) -> None:
    """A content that lies in its place and is not on record comes back for an object, and for an open failure."""
    application = Application()
    if holder == "failure":
        application.before_commit("Task")(refusing)
    cabinet = Cabinet(Lab(application), tmp_path)
    photo = cabinet.upload(PHOTO)
    expected = {"object": "APPLIED", "failure": "HOOK_REJECTED"}[holder]
    assert said(cabinet.lab.settle(create(1, set={"photo": photo}))) == [expected]
    forget_files(cabinet)
    of_the_directory(cabinet)
    cabinet.files.note_timeline()

    collected_in(cabinet, days=40)

    assert cabinet.has(PHOTO)
    assert len(kept(cabinet)) == 1


def test_a_copy_is_not_one_too_many_where_the_other_one_was_lost(cabinet: Cabinet) -> None:
    """The copy on record is looked at before another one of the same content goes: it may be the only one."""
    cabinet.lab.settle(create(1, set={"photo": cabinet.upload(PHOTO)}))
    path = cabinet.path(PHOTO)
    path.rename(path.with_name(f"{path.name}x"))  # as if it had come under another name, and its record were lost
    of_the_directory(cabinet)
    cabinet.files.note_timeline()

    collected_in(cabinet, days=40)

    assert cabinet.has(PHOTO)
    assert len(kept(cabinet)) == 1


def test_an_upload_that_takes_for_ever(cabinet: Cabinet) -> None:
    """An upload that was given up while its bytes came is there all the same in the end."""
    cabinet.lab.settle(create(1))
    incoming = cabinet.files.begin_upload(USER, wanted(PHOTO), 0)
    incoming.append(PHOTO[:3])
    cabinet.wait(3 * DAY)
    cabinet.collect()
    incoming.append(PHOTO[3:])
    incoming.complete()
    incoming.leave()

    assert cabinet.has(PHOTO)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present


def test_a_clock_that_was_ahead(cabinet: Cabinet) -> None:
    """What was noted by a clock that was years ahead keeps nothing for years once it is right."""
    cabinet.lab.settle(create(1))
    cabinet.upload(PHOTO)
    forget_files(cabinet)
    of_the_directory(cabinet)
    now_us = cabinet.time_us
    cabinet.wait(1_000 * DAY)
    cabinet.files.note_timeline()
    cabinet.time_us = now_us
    start_again(cabinet)

    assert collected_in(cabinet, days=29) == 0
    assert collected_in(cabinet, days=3) == 1


def test_ends_soon_when_the_server_stops(tmp_path: Path) -> None:
    """However many contents there are, a server that stops does not wait until all are looked at."""
    left = [Content(bytes(32), 1, TIME_US)] * 5 * LOOKED_AT_ONCE

    class Large(DirectoryContents):
        """Has more than anybody wants to look at."""

        def contents(self, tenant: str) -> Any:
            retention._stopped.set()
            while left:
                yield left.pop()

    lab = Lab()
    lab.settle(create(1))
    files = Files(lab.application, lab.store, Large(tmp_path), lambda: TIME_US)
    retention = Retention(lab.store, Periods(), lambda: TIME_US, files)

    with pytest.raises(ResourceClosed):
        retention.collect()
    assert len(left) >= 4 * LOOKED_AT_ONCE


def test_what_is_left_of_an_upload(cabinet: Cabinet) -> None:
    """A part that nobody goes on with goes after the grace, also of a tenant that has nothing else."""
    incoming = cabinet.files.begin_upload(USER, wanted(PHOTO), 0)
    incoming.append(PHOTO[:5])
    incoming.leave()
    assert cabinet.lab.store.tenants() == [TENANT]

    cabinet.collect()
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].received_bytes == 5
    cabinet.collect(timedelta(0))
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].received_bytes == 0
    with pytest.raises(PartMismatch):
        cabinet.files.begin_upload(USER, wanted(PHOTO), 5)


def test_a_part_that_is_on_its_way(cabinet: Cabinet) -> None:
    """However short the grace is, an upload that is under way goes on."""
    incoming = cabinet.files.begin_upload(USER, wanted(PHOTO), 0)
    incoming.append(PHOTO[:5])
    cabinet.collect(timedelta(seconds=-1))
    incoming.append(PHOTO[5:])
    incoming.complete()
    assert cabinet.has(PHOTO)


def test_what_the_service_is_adding(cabinet: Cabinet) -> None:
    """However short the grace is, what the service adds comes to its end, and is known before."""

    class Slow(io.BytesIO):
        """Gives a server the time to collect while it is read."""

        def read(self, size: int | None = -1) -> bytes:
            assert cabinet.lab.store.tenants() == [TENANT]
            cabinet.collect(timedelta(seconds=-1))
            return super().read(5)

    assert cabinet.tenant().add_file(Slow(PHOTO), name="photo.jpg") == file_value(PHOTO)


def test_trouble_of_one_tenant(tmp_path: Path) -> None:
    """What cannot be forgotten of one tenant, out of reach or damaged, keeps nothing of others and nothing else."""

    class Away(DirectoryContents):
        """A place of which a part cannot be reached."""

        def contents(self, tenant: str) -> Any:
            if tenant == TENANT:
                raise StorageError("this part cannot be reached")
            return super().contents(tenant)

    lab = Lab()
    cabinet = Cabinet(lab, tmp_path)
    cabinet.contents = Away(tmp_path)
    cabinet.files = Files(lab.application, lab.store, cabinet.contents, lambda: cabinet.time_us)
    tenants = (TENANT, "other", "third")
    for tenant in tenants:
        cabinet.upload(PHOTO, Principal("ann", tenant))
        bad = {b"g" + wanted(PHOTO).sha256 + b"ann": b"bad" if tenant == "other" else None}
        lab.store.submit(tenant, lambda reader, bad=bad: (index_only(reader, bad), None)).result()  # type: ignore[misc]
    cabinet.wait(2 * DAY)

    with pytest.raises(StorageError, match="this part"):
        cabinet.collect()

    kept_of = [len(list(DirectoryContents(tmp_path).contents(tenant))) for tenant in tenants]
    assert kept_of == [0, 1, 0]


def test_contents_that_are_out_of_reach(tmp_path: Path) -> None:
    """Where contents cannot be reached, that is told, and everything else that is due is forgotten all the same."""

    class Away(DirectoryContents):
        """A place that cannot be reached."""

        def contents(self, tenant: str) -> Any:
            raise StorageError("the place cannot be reached")

    lab = Lab()
    files = Files(lab.application, lab.store, Away(tmp_path), lambda: TIME_US)
    files.note_timeline()
    lab.settle(create(1), delete(2))
    Tenant(lab.application, lab.store, "other", None, lambda: TIME_US).create("Task", {})
    periods = Periods(timedelta(0), timedelta(days=1), timedelta(days=1), timedelta(days=1))
    retention = Retention(lab.store, periods, lambda: TIME_US + 1, files)

    with pytest.raises(StorageError):
        retention.collect()

    for tenant in (TENANT, "other"):
        with lab.store.read(tenant) as reader:
            assert reader.collected() == reader.head().version > 0


def collected_in(cabinet: Cabinet, *, days: int) -> int:
    """Let days pass of a server that collects; return how many contents went."""
    count = 0
    for _ in range(days):
        cabinet.wait(DAY)
        count += cabinet.collect()
    return count


def start_again(cabinet: Cabinet) -> None:
    """End the server and start one on the same store, and the same contents."""
    cabinet.files = Files(cabinet.lab.application, cabinet.lab.store, cabinet.contents, lambda: cabinet.time_us)


def forget_files(cabinet: Cabinet) -> None:
    """Take all that is on record of contents off it."""
    forgotten = {key: None for prefix in (b"c", b"g") for key in cabinet.entries(prefix)}
    cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, forgotten), None)).result()


def refusing(task: HookObject, context: HookContext) -> None:
    """Refuse everything."""
    raise Reject("never")


def path_of(data: bytes) -> Path:
    """Return where a content lies in the directory of its tenant."""
    name = wanted(data).sha256.hex()
    return Path(name[:2], name[2:4], name)


def of_the_directory(cabinet: Cabinet) -> None:
    """Set the clock to that of the file system, by which contents without a record are as old as they are."""
    cabinet.time_us = int(max(one.stat().st_mtime for one in kept(cabinet)) * 1_000_000) + 1
    assert cabinet.time_us > TIME_US


def index_only(reader: Reader, entries: Mapping[bytes, bytes | None]) -> Any:
    """Return writes of the table of indexes only."""
    return Writes({}, [], None, [], [], reader.head().version, dict(entries))

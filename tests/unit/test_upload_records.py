"""Whose turn it is to upload, how much he may that nothing refers to, and contents that are found damaged."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from tests.builders import (
    REPLICA_A,
    TENANT,
    USER,
    Cabinet,
    Lab,
    create,
    delete,
    file_value,
    group,
    make_operation,
    said,
    update,
    wanted,
)

from tidelog._limits import FILE_COST_BYTES
from tidelog_server import ContentLost, Principal, _upload_records
from tidelog_server._errors import FileRoomExhausted, ServerBusy, UploadSuperseded
from tidelog_server._files import Files, Standing
from tidelog_server._store import Reader

SECOND: Final = timedelta(seconds=1)
HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
# Room for three small files.
ROOM: Final = 3 * (FILE_COST_BYTES + 100)
KEY: Final = ("Task", "t1")


@pytest.fixture
def cabinet(tmp_path: Path) -> Cabinet:
    """Give files of which a user may upload three before he refers to them."""
    cabinet = Cabinet(Lab(), tmp_path / "files")
    cabinet.files = Files(
        cabinet.lab.application, cabinet.lab.store, cabinet.contents, lambda: cabinet.time_us, room_bytes=ROOM
    )
    cabinet.files.note_timeline()
    return cabinet


def data(number: int) -> bytes:
    """Return a content."""
    return f"photo {number}".encode()


def fill(cabinet: Cabinet) -> None:
    """Upload as much as there is room for."""
    for number in range(3):
        cabinet.upload(data(number))


def give_way(cabinet: Cabinet) -> None:
    """Upload three contents, and three more when these are old, though somebody asked for them all the time."""
    fill(cabinet)
    for _ in range(3):
        cabinet.wait(DAY / 2)
        assert all(one.is_present for one in cabinet.files.stat(USER, [wanted(data(number)) for number in range(3)]))
    for number in (3, 4, 5):
        cabinet.upload(data(number))


def takes_room(cabinet: Cabinet, number: int) -> bool:
    """Tell whether a content takes room of its user."""
    return cabinet.files.stat(USER, [wanted(data(number))])[0].takes_room


def test_more_than_there_is_room_for(cabinet: Cabinet) -> None:
    """Who has uploaded as much as he may without referring to it uploads no more; others do."""
    fill(cabinet)

    with pytest.raises(FileRoomExhausted, match=str(ROOM)):
        cabinet.upload(data(3))
    cabinet.upload(data(3), Principal("bob"))
    cabinet.upload(data(2))
    assert cabinet.files.stat(USER, [wanted(data(3))]) == [Standing()]


def test_what_is_referred_to_makes_room(cabinet: Cabinet) -> None:
    """Contents do not count any more once their user's operations refer to them; others stay as they were."""
    fill(cabinet)
    cabinet.lab.settle(create(1, set={"photo": file_value(data(1))}))

    cabinet.upload(data(3))
    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(4))
    cabinet.lab.settle(
        *(create(2 + number, f"u{number}", {"photo": file_value(data(number))}) for number in (0, 2, 3))
    )
    assert cabinet.entries(b"w") == []


def test_what_was_referred_to_makes_room(cabinet: Cabinet) -> None:
    """Contents count no more once an operation that names them was applied, whatever comes later in its batch."""
    fill(cabinet)

    cabinet.lab.settle(
        create(1, set={"photo": file_value(data(0))}),
        update(2, set={"photo": file_value(data(1))}),
        update(3, set={"photo": file_value(data(2))}),
        delete(4),
    )

    assert cabinet.entries(b"w") == []


def test_what_a_refused_group_names_makes_no_room(cabinet: Cabinet) -> None:
    """What one member of a commit group names counts on if another member is not applied."""
    cabinet.upload(data(0))
    named = make_operation(set={"photo": file_value(data(0))})
    missing = make_operation(seq=2, id="t2", set={"photo": file_value(data(1))})

    assert said(cabinet.lab.settle(*group(named, missing))) == ["NOT_READY", "NOT_READY"]

    assert len(cabinet.entries(b"w")) == 2


def test_what_came_long_ago_makes_room(cabinet: Cabinet) -> None:
    """What nothing has come to refer to for as long as contents are kept makes room, however often it is asked for."""
    give_way(cabinet)

    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(6))
    assert [one.is_present for one in cabinet.files.stat(USER, [wanted(data(n)) for n in (0, 3)])] == [False, True]


def test_what_made_room_may_be_referred_to_for_a_while(cabinet: Cabinet) -> None:
    """Who may have nothing to send again still refers to what made room, until that ends, however often he asks."""
    give_way(cabinet)
    first, second = (file_value(data(number)) for number in (0, 1))
    lost = {one["sha256"] for one in (first, second)}

    assert said(cabinet.lab.session(REPLICA_A).settle(create(1, set={"photo": first}), lost=lost)) == ["APPLIED"]
    for _ in range(4):
        cabinet.wait(DAY / 2)
        assert not cabinet.files.stat(USER, [wanted(data(1))])[0].is_present
        cabinet.collect()
    results = cabinet.lab.session(REPLICA_A).settle(create(2, "t2", {"photo": second}), lost=lost)
    assert said(results) == ["FILE_MISSING"]
    assert cabinet.has(data(0))
    assert not cabinet.has(data(1))


def test_what_made_room_is_kept_for_one_more_grace(cabinet: Cabinet) -> None:
    """What made room may be referred to for as long as contents are kept from then on, though nobody asked for it."""
    fill(cabinet)
    cabinet.wait(DAY + HOUR)
    for number in (3, 4, 5):
        cabinet.upload(data(number))
    cabinet.collect()
    cabinet.wait(DAY - HOUR)
    cabinet.collect()

    photo = file_value(data(0))
    results = cabinet.lab.session(REPLICA_A).settle(create(1, set={"photo": photo}), lost={photo["sha256"]})

    assert said(results) == ["APPLIED"]


def test_what_nobody_asks_for_makes_room_first(cabinet: Cabinet) -> None:
    """Of what came long ago that makes room for which nobody has asked for longest."""
    fill(cabinet)
    cabinet.wait(DAY / 2)
    cabinet.files.stat(USER, [wanted(data(number)) for number in (0, 2)])
    cabinet.wait(DAY)

    cabinet.upload(data(3))

    present = [one.is_present for one in cabinet.files.stat(USER, [wanted(data(number)) for number in range(4)])]
    assert present == [True, False, True, True]


def test_what_takes_room_is_told(cabinet: Cabinet) -> None:
    """A user is told what takes his room: what he uploads that he does not refer to yet, not what he may read."""
    cabinet.upload(data(0))
    cabinet.upload(data(1))
    cabinet.files.begin_upload(USER, wanted(data(2)), 0).leave()
    cabinet.upload(data(3), Principal("bob"))
    assert said(cabinet.lab.settle(create(1, set={"photo": file_value(data(1))}))) == ["APPLIED"]
    refused = update(2, "nowhere", {"photo": cabinet.upload(data(4))})
    assert said(cabinet.lab.settle(refused)) == ["OBJECT_GONE"]

    assert [number for number in range(6) if takes_room(cabinet, number)] == [0, 2]


def test_what_would_make_room_takes_none(cabinet: Cabinet) -> None:
    """What came so long ago that it makes room where there is none is not said to take any."""
    fill(cabinet)
    cabinet.wait(DAY - HOUR)
    assert [number for number in range(3) if takes_room(cabinet, number)] == [0, 1, 2]
    cabinet.wait(2 * HOUR)

    assert not any(takes_room(cabinet, number) for number in range(3))
    assert all(one.is_present for one in cabinet.files.stat(USER, [wanted(data(number)) for number in range(3)]))


def test_what_began_and_was_lost_makes_room(cabinet: Cabinet) -> None:
    """An upload that is not whole counts no more once an operation was refused because its content is lost."""
    fill(cabinet)
    cabinet.lab.settle(create(1, set={"photo": file_value(data(0))}))
    cabinet.files.begin_upload(USER, wanted(data(3)), 0).leave()
    lost = file_value(data(3))
    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(4))

    refused = cabinet.lab.session(REPLICA_A).settle(create(2, "t2", {"photo": lost}), lost={lost["sha256"]})

    assert said(refused) == ["FILE_MISSING"]
    assert not takes_room(cabinet, 3)
    cabinet.upload(data(4))


def test_what_an_operation_says_in_vain_makes_no_room(cabinet: Cabinet) -> None:
    """Contents count as long as an operation that is to refer to them is not settled."""
    fill(cabinet)
    lost = {"photo": file_value(data(1)), "other": file_value(b"on nobody's record")}
    assert said(cabinet.lab.settle(create(1, set=lost))) == ["NOT_READY"]

    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(3))


def test_what_a_service_refers_to_for_a_user_makes_room(cabinet: Cabinet) -> None:
    """Contents do not count any more once their user refers to them by way of a service."""
    fill(cabinet)
    cabinet.tenant(USER).create("Task", {"photo": file_value(data(1))})

    cabinet.upload(data(3))


@pytest.mark.parametrize("is_held", [True, False])
def test_what_others_hold_makes_no_difference(
    cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch, *, is_held: bool
) -> None:
    """Whether somebody else has a content is not told to who uploads it: not by his room, nor by the time it takes."""
    if is_held:
        cabinet.tenant().create("Task", {"photo": cabinet.tenant().add_file(data(0), name="photo")}, id="hidden")
    incoming = cabinet.files.begin_upload(USER, wanted(data(0)), 0)
    incoming.append(data(0))
    with monkeypatch.context() as watched:
        for method in ("read", "size", "delete"):
            watched.setattr(cabinet.contents, method, lambda *_, method=method: pytest.fail(f"{method} takes a while"))
        incoming.complete()
    incoming.leave()

    fill(cabinet)
    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(3))
    assert len([one for one in cabinet.contents.contents(TENANT) if one.sha256 == wanted(data(0)).sha256]) == 1


def test_who_reads_a_copy_reads_on_in_the_next(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A content that is uploaded once more while somebody downloads it comes whole, where what is deleted is gone."""
    photo = cabinet.upload(data(0))
    cabinet.lab.settle(create(1, set={"photo": photo}))
    read = cabinet.contents.read

    def read_in_ranges(tenant: str, sha256: bytes, offset: int = 0, copy: str = "") -> Generator[bytes, None, None]:
        for start in range(offset, len(data(0))):
            with closing(read(tenant, sha256, start, copy)) as pieces:
                yield next(pieces)[:1]

    monkeypatch.setattr(cabinet.contents, "read", read_in_ranges)
    pieces = cabinet.files.download(USER, photo["sha256"], KEY, 0, 0)
    stream = cabinet.files.open(TENANT, wanted(data(0)))
    begun = [next(pieces), next(pieces)]

    cabinet.upload(data(0), Principal("bob"))

    assert b"".join([*begun, *pieces]) == data(0)
    with stream:
        assert stream.read() == data(0)


def test_what_is_collected_makes_room(cabinet: Cabinet) -> None:
    """Contents that nothing came to refer to, and uploads that nobody went on with, do not count after the grace."""
    fill(cabinet)
    cabinet.wait(2 * DAY)
    cabinet.collect()
    assert cabinet.entries(b"w") == []
    for number in range(3):
        cabinet.files.begin_upload(USER, wanted(data(number)), 0).leave()
    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(3))

    cabinet.wait(2 * DAY)
    cabinet.collect()
    assert cabinet.entries(b"w") == []
    fill(cabinet)


def test_one_file_always_fits(cabinet: Cabinet) -> None:
    """A file that is larger than the room is taken if it is alone."""
    cabinet.upload(bytes(ROOM))

    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(0))


def test_an_upload_counts_once(cabinet: Cabinet) -> None:
    """However often an upload is gone on with, or comes again, it counts once; with another size as that."""
    for _ in range(10):
        cabinet.files.begin_upload(USER, wanted(data(0)), 0).leave()
        cabinet.wait(HOUR)
    fill(cabinet)
    fill(cabinet)
    with pytest.raises(FileRoomExhausted):
        cabinet.files.begin_upload(USER, wanted(data(0))._replace(size=ROOM), 0)


def test_what_was_begun_as_larger_counts_as_that(cabinet: Cabinet) -> None:
    """To say a smaller size of what has come in part makes no room: its bytes are there."""
    large = wanted(data(0))._replace(size=ROOM)
    cabinet.files.begin_upload(USER, large, 0).leave()
    cabinet.files.begin_upload(USER, large._replace(size=1), 0).leave()
    with pytest.raises(FileRoomExhausted):
        cabinet.upload(data(1))


def test_room_is_found_among_many(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find room a few uploads are looked at, not all: each time others, until there is some."""
    monkeypatch.setattr(_upload_records, "LOOKED_AT", 2)
    for number in range(40):
        photo = cabinet.upload(data(number))
        assert said(cabinet.lab.settle(update(number + 1, "nowhere", {"photo": photo}))) == ["OBJECT_GONE"]
    assert len(cabinet.entries(b"w")) < 8


def test_room_for_a_large_one_is_made_bit_by_bit(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs more room than is found at once is refused, and finds more the next time."""
    monkeypatch.setattr(_upload_records, "LOOKED_AT", 1)
    fill(cabinet)
    cabinet.wait(2 * DAY)
    large = wanted(data(3))._replace(size=ROOM - FILE_COST_BYTES)

    for _ in range(2):
        with pytest.raises(FileRoomExhausted):
            cabinet.files.begin_upload(USER, large, 0)
    cabinet.files.begin_upload(USER, large, 0).leave()

    assert [number for number in range(4) if takes_room(cabinet, number)] == [3]


def test_the_service_has_all_the_room(cabinet: Cabinet) -> None:
    """What the service itself adds is not limited."""
    for number in range(10):
        cabinet.tenant().add_file(data(number), name="photo")


def test_what_is_known_is_not_written_again(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on with an upload, or asks how contents stand, causes no write before it has been a while."""
    written: list[object] = []
    submit = cabinet.lab.store.submit

    def counting(*arguments: Any) -> Any:
        written.append(arguments)
        return submit(*arguments)

    monkeypatch.setattr(cabinet.lab.store, "submit", counting)

    def writes(act: Callable[[], object]) -> int:
        written.clear()
        act()
        return len(written)

    def go_on() -> None:
        cabinet.files.begin_upload(USER, wanted(data(0)), 0).leave()

    def ask() -> None:
        assert cabinet.files.stat(USER, [wanted(data(1))])[0].is_present

    cabinet.upload(data(1))
    assert [writes(act) for act in (ask, go_on, ask, go_on)] == [0, 1, 0, 0]
    cabinet.wait(HOUR)
    assert [writes(act) for act in (ask, go_on, ask, go_on)] == [1, 1, 0, 0]


def test_what_is_asked_about_is_looked_up_together(cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many contents are asked about, or looked at to find room, they are not looked up one by one."""
    cabinet.upload(data(0))
    lookups: list[bytes] = []
    with cabinet.lab.store.read(TENANT) as reader:
        readers = type(reader)
    index = readers.index

    def counted(self: Reader, key: bytes) -> bytes | None:
        lookups.append(key)
        return index(self, key)

    monkeypatch.setattr(readers, "index", counted)

    def lookup_count(count: int) -> int:
        lookups.clear()
        cabinet.files.stat(USER, [wanted(data(number)) for number in range(count)])
        return len(lookups)

    def lookup_count_of_a_refusal() -> int:
        lookups.clear()
        with pytest.raises(FileRoomExhausted):
            cabinet.files.begin_upload(USER, wanted(b"too much")._replace(size=ROOM), 0)
        return len(lookups)

    assert lookup_count(50) == lookup_count(1)
    few = lookup_count_of_a_refusal()
    fill(cabinet)
    assert lookup_count_of_a_refusal() == few
    assert lookup_count(3) == lookup_count(1)


def test_the_turn_to_upload(cabinet: Cabinet) -> None:
    """An upload is taken over by another device's of the same content only when nothing has come of it for a while."""
    first = cabinet.files.begin_upload(USER, wanted(data(0)), 0, "first")
    for _ in range(3):
        cabinet.wait(4 * SECOND)
        first.append(data(0)[first.received : first.received + 1])
    cabinet.wait(4 * SECOND)
    with pytest.raises(ServerBusy):
        cabinet.files.begin_upload(USER, wanted(data(0)), 3, "second")
    cabinet.files.begin_upload(Principal("bob"), wanted(data(0)), 0)
    first.append(data(0)[3:4])

    cabinet.wait(5 * SECOND)
    second = cabinet.files.begin_upload(USER, wanted(data(0)), 4, "second")
    with pytest.raises(UploadSuperseded):
        first.append(data(0)[4:])
    first.leave()
    second.append(data(0)[4:])
    second.complete()
    assert cabinet.has(data(0))


@pytest.mark.parametrize("uploader", ["first", ""])
def test_an_upload_of_ones_own_is_taken_up_at_once(cabinet: Cabinet, uploader: str) -> None:
    """A device does not wait for itself, whose former connection is dead and does not know it."""
    first = cabinet.files.begin_upload(USER, wanted(data(0)), 0, "first")
    first.append(data(0)[:3])
    second = cabinet.files.begin_upload(USER, wanted(data(0)), 3, uploader)
    second.append(data(0)[3:])
    second.complete()
    assert cabinet.has(data(0))


class TestDamage:
    def test_is_found_by_whoever_downloads(self, cabinet: Cabinet) -> None:
        """A content with other bytes than it had is not sent to its end, and missing until it is uploaded again."""
        photo = cabinet.upload(data(0))
        cabinet.lab.settle(create(1, set={"photo": photo}))
        cabinet.path(data(0)).write_bytes(b"photo ?")

        with pytest.raises(ContentLost):
            b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 0, 0))
        with pytest.raises(ContentLost):
            cabinet.files.download(USER, photo["sha256"], KEY, 3, 1).__next__()
        assert not cabinet.files.stat(USER, [wanted(data(0))])[0].is_present
        assert said(cabinet.lab.settle(create(2, "t2", {"photo": photo}))) == ["NOT_READY"]

        cabinet.upload(data(0))
        assert b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 0, 0)) == data(0)
        assert said(cabinet.lab.settle(create(2, "t2", {"photo": photo}))) == ["APPLIED"]
        assert cabinet.has(data(0))

    def test_is_found_by_an_upload(self, cabinet: Cabinet) -> None:
        """Who uploads what is there already, but damaged, mends it."""
        photo = cabinet.upload(data(0))
        cabinet.lab.settle(create(1, set={"photo": photo}))
        cabinet.path(data(0)).write_bytes(b"photo ?")

        cabinet.upload(data(0), Principal("bob"))

        assert b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 0, 0)) == data(0)
        assert len(list(cabinet.contents.contents(TENANT))) == 1

    def test_that_somebody_mended(self, cabinet: Cabinet) -> None:
        """A content that was put back as it was is there again with the next collection."""
        photo = cabinet.upload(data(0))
        cabinet.lab.settle(create(1, set={"photo": photo}))
        path = cabinet.path(data(0))
        path.write_bytes(b"photo ?")
        with pytest.raises(ContentLost):
            b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 0, 0))
        cabinet.collect()
        assert not cabinet.files.stat(USER, [wanted(data(0))])[0].is_present

        path.write_bytes(data(0))
        cabinet.collect()
        assert cabinet.files.stat(USER, [wanted(data(0))])[0].is_present

    def test_a_part_of_a_content(self, cabinet: Cabinet) -> None:
        """Some bytes of a content are sent as they are, and say nothing of the rest."""
        photo = cabinet.upload(data(0))
        cabinet.lab.settle(create(1, set={"photo": photo}))
        assert b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 2, 3)) == data(0)[2:5]
        assert b"".join(cabinet.files.download(USER, photo["sha256"], KEY, 0, 5)) == data(0)[:5]
        assert cabinet.files.stat(USER, [wanted(data(0))])[0].is_present


@pytest.mark.parametrize("way", ["stat", "download", "open", "collect"])
def test_a_store_that_was_put_back_finds_the_copy_that_has_come_since(cabinet: Cabinet, way: str) -> None:
    """A content whose copy on record was replaced after the backup is there at once, whoever asks."""
    value = cabinet.upload(data(0))
    cabinet.lab.settle(create(1, set={"photo": value}))
    path = cabinet.path(data(0))
    path.rename(path.with_name(f"{path.name[:65]}0123456789abcdef0000000000000000"))

    if way == "stat":
        assert cabinet.files.stat(USER, [wanted(data(0))]) == [Standing(is_present=True)]
        assert cabinet.has(data(0))
    elif way == "download":
        assert b"".join(cabinet.files.download(USER, wanted(data(0)).sha256, KEY, 0, 0)) == data(0)
    elif way == "open":
        with cabinet.files.open(TENANT, wanted(data(0))) as file:
            assert file.read() == data(0)
    else:
        list(cabinet.files.collect_unknown(TENANT, 0))
        assert cabinet.has(data(0))

    assert said(cabinet.lab.settle(create(2, "t2", {"photo": value}))) == ["APPLIED"]


def test_a_copy_that_is_damaged_too_takes_no_place(cabinet: Cabinet) -> None:
    """Where the only copy that is there has another hash the content is lost, and whoever has it uploads it again."""
    cabinet.lab.settle(create(1, set={"photo": cabinet.upload(data(0))}))
    path = cabinet.path(data(0))
    path.rename(path.with_name(f"{path.name[:65]}0123456789abcdef0000000000000000")).write_bytes(b"x" * len(data(0)))

    assert cabinet.files.stat(USER, [wanted(data(0))]) == [Standing()]

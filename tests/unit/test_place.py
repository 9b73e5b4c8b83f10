"""The place of contents that is away, empty, or another one: nothing is forgotten, written or deleted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from tests.builders import TENANT, USER, Cabinet, Lab, create, said, wanted

from tidelog import StorageError
from tidelog._keys import ObjectKey
from tidelog_server import DirectoryContents
from tidelog_server._content_store import MARK_NAME
from tidelog_server._files import Files
from tidelog_server._place import MARKED_NOTE

PHOTO: Final = b"a photo, say"
KEY: Final[ObjectKey] = ("Task", "t1")


@pytest.fixture
def cabinet(tmp_path: Path) -> Cabinet:
    """Give files with a photo that an object refers to, and one that nothing refers to."""
    cabinet = Cabinet(Lab(), tmp_path / "files")
    cabinet.lab.settle(create(1, set={"photo": cabinet.upload(PHOTO)}))
    cabinet.upload(b"nothing refers to it")
    return cabinet


def rename(path: Path) -> None:
    """Have the folder away."""
    path.rename(path.with_name("away"))


def leave_the_mount_point(path: Path) -> None:
    """Have an empty folder in its place."""
    rename(path)
    path.mkdir()


def mount_another(path: Path) -> None:
    """Have another store's in its place."""
    rename(path)
    other = Cabinet(Lab(), path)
    other.upload(b"something of another store")


AWAY: Final = pytest.mark.parametrize("go_away", [rename, leave_the_mount_point, mount_another])

CALLS: Final[dict[str, Callable[[Cabinet], object]]] = {
    "stat": lambda cabinet: cabinet.files.stat(USER, [wanted(PHOTO)]),
    "upload": lambda cabinet: cabinet.upload(b"a new one"),
    "download": lambda cabinet: next(cabinet.files.download(USER, wanted(PHOTO).sha256, KEY, 0, 0)),
    "open": lambda cabinet: cabinet.files.open(TENANT, wanted(PHOTO)),
    "add": lambda cabinet: cabinet.tenant().add_file(b"a new one", name="new"),
    "collect": lambda cabinet: cabinet.collect(),
}


@AWAY
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_place_that_is_away(
    cabinet: Cabinet, go_away: Callable[[Path], None], call: Callable[[Cabinet], object]
) -> None:
    """While contents are out of reach each call says so, and once they are back everything is as it was."""
    cabinet.wait(timedelta(days=2))
    records = [cabinet.entries(prefix) for prefix in (b"c", b"f")]
    place = cabinet.contents.path
    go_away(place)
    there = sorted(place.rglob("*"))

    with pytest.raises(StorageError):
        call(cabinet)

    assert sorted(place.rglob("*")) == there
    assert [cabinet.entries(prefix) for prefix in (b"c", b"f")] == records
    if place.exists():
        place.rename(place.with_name("not it"))
    place.with_name("away").rename(place)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    assert said(cabinet.lab.settle(create(2, "t2", {"photo": cabinet.upload(b"a new one")}))) == ["APPLIED"]


def test_a_place_that_goes_while_an_upload_ends(cabinet: Cabinet) -> None:
    """A content whose place went before it was complete is not promised, and the client not blamed for it."""
    incoming = cabinet.files.begin_upload(USER, wanted(b"a new one"), 0)
    incoming.append(b"a new one")
    rename(cabinet.contents.path)

    with pytest.raises(StorageError):
        incoming.complete()
    assert len(cabinet.entries(b"c")) == 2


def test_one_content_that_is_lost(cabinet: Cabinet) -> None:
    """In the right place a content that is not there is missing: whoever has it uploads it once more."""
    (path,) = cabinet.contents.path.rglob(f"{wanted(PHOTO).sha256.hex()}*")
    path.unlink()

    assert not cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    cabinet.upload(PHOTO)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present


def test_a_new_place(tmp_path: Path) -> None:
    """A store of which nothing was ever stored has no place yet: it is marked when the first content comes."""
    cabinet = Cabinet(Lab(), tmp_path / "files")
    cabinet.files.place.look()
    assert not cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    assert cabinet.collect() == 0
    assert not cabinet.contents.path.exists()

    cabinet.upload(PHOTO)
    assert (cabinet.contents.path / MARK_NAME).read_text() == cabinet.lab.store.identity.epoch
    cabinet.files.place.look()


def test_contents_from_before_there_were_marks(cabinet: Cabinet) -> None:
    """A place without a mark gets one at the start if contents on record are in it, and passes for away if none is."""
    marks = cabinet.contents.path / MARK_NAME
    marks.unlink()
    store = cabinet.lab.store
    store.set_note(MARKED_NOTE, b"")
    elsewhere = Files(cabinet.lab.application, store, DirectoryContents(marks.with_name("other")), lambda: 0)

    with pytest.raises(StorageError):
        elsewhere.place.look()
    with pytest.raises(StorageError):
        elsewhere.stat(USER, [wanted(PHOTO)])
    assert not store.note(MARKED_NOTE)
    Files(cabinet.lab.application, store, cabinet.contents, lambda: 0).place.look()
    assert marks.exists()
    assert store.note(MARKED_NOTE)


def test_what_the_operator_says_is_the_place(cabinet: Cabinet) -> None:
    """Contents that are lost for good are missing from when somebody writes the mark that the error names."""
    place = cabinet.contents.path
    rename(place)
    with pytest.raises(StorageError, match=cabinet.lab.store.identity.epoch):
        cabinet.files.stat(USER, [wanted(PHOTO)])

    place.mkdir()
    (place / MARK_NAME).write_text(f"{cabinet.lab.store.identity.epoch}\n")

    assert not cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present
    cabinet.upload(PHOTO)
    assert cabinet.files.stat(USER, [wanted(PHOTO)])[0].is_present

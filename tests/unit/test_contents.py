"""Contents: a directory of contents, each once, named by its hash."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tidelog import DiskFull, StorageError, _contents
from tidelog._contents import ContentCorrupt, ContentDirectory
from tidelog._file_reference import (
    FileReference,
    encoded_file_references,
    file_references,
    may_refer_to_files,
)
from tidelog._values import encode

TEXT = b"a photo, say" * 1000
SHA256 = hashlib.sha256(TEXT).digest()


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file())


def test_a_content_is_read_as_it_was_added(tmp_path: Path) -> None:
    """What a stream held is there under its hash, and nothing else is."""
    contents = ContentDirectory(tmp_path / "files")
    added = contents.add(io.BytesIO(TEXT))
    assert (added.sha256, added.size) == (SHA256, len(TEXT))
    opened = contents.open(SHA256)
    assert opened is not None
    with opened:
        assert opened.read() == TEXT
    assert contents.size(SHA256) == len(TEXT)
    assert [one[:2] for one in contents.contents()] == [(SHA256, len(TEXT))]
    assert len(_files(tmp_path)) == 1


def test_a_content_is_stored_once(tmp_path: Path) -> None:
    """Adding a content again leaves one file, as young as a new one."""
    contents = ContentDirectory(tmp_path)
    contents.add(io.BytesIO(TEXT))
    (file,) = _files(tmp_path)
    os.utime(file, (1, 1))
    contents.add(io.BytesIO(TEXT))
    assert _files(tmp_path) == [file]
    assert next(contents.contents()).time > time.time() - 3600


@pytest.mark.parametrize("broken", [TEXT[:-1], TEXT[:-1] + b"?"], ids=["shorter", "as long"])
def test_a_broken_content_is_mended_when_it_is_added_again(tmp_path: Path, broken: bytes) -> None:
    """A file that lost bytes, or has others, is replaced by what is added."""
    contents = ContentDirectory(tmp_path)
    contents.add(io.BytesIO(TEXT))
    (file,) = _files(tmp_path)
    file.write_bytes(broken)
    contents.add(io.BytesIO(TEXT))
    assert file.read_bytes() == TEXT


def test_directories_that_are_made_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each directory that a new one is made in is forced to disk, up to one that was there."""
    forced: list[str] = []
    monkeypatch.setattr(_contents, "_sync_directory", lambda path: forced.append(str(path.relative_to(tmp_path))))
    name = SHA256.hex()
    ContentDirectory(tmp_path / "files" / "tenant").add(io.BytesIO(TEXT))

    tenant = "files/tenant"
    assert {".", "files", tenant, f"{tenant}/{name[:2]}", f"{tenant}/{name[:2]}/{name[2:4]}"} == set(forced)


def test_a_part_goes_on_after_it_was_closed(tmp_path: Path) -> None:
    """A content that comes in pieces, to several objects, is whole in the end."""
    first = ContentDirectory(tmp_path).part("some")
    first.append(TEXT[:1000])
    assert first.size == 1000
    first.close()
    assert list(ContentDirectory(tmp_path).contents()) == []
    second = ContentDirectory(tmp_path).part("some")
    assert second.size == 1000
    second.append(TEXT[1000:])
    assert second.complete(SHA256, len(TEXT))[:2] == (SHA256, len(TEXT))
    assert ContentDirectory(tmp_path).size(SHA256) == len(TEXT)


def test_an_empty_content_is_a_content(tmp_path: Path) -> None:
    """A part to which nothing came is the content of no bytes."""
    contents = ContentDirectory(tmp_path)
    empty = hashlib.sha256(b"").digest()
    contents.part("none").complete(empty, 0)
    assert contents.size(empty) == 0


@pytest.mark.parametrize(("sha256", "size"), [(bytes(32), len(TEXT)), (SHA256, len(TEXT) + 1)])
def test_what_is_something_else_leaves_nothing(tmp_path: Path, sha256: bytes, size: int) -> None:
    """A part of another hash or length than was said is refused, and deleted."""
    contents = ContentDirectory(tmp_path)
    part = contents.part("some")
    part.append(TEXT)
    with pytest.raises(ContentCorrupt):
        part.complete(sha256, size)
    assert _files(tmp_path) == []
    assert part.size == 0


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An error of the stream is the caller's, and leaves no part."""

    class Broken(io.BytesIO):
        def read(self, _size: int | None = -1, /) -> bytes:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ContentDirectory(tmp_path).add(Broken())
    assert _files(tmp_path) == []


def test_leftovers_go_when_they_are_old(tmp_path: Path) -> None:
    """Parts that nothing was appended to for long are deleted, younger ones and contents are not."""
    contents = ContentDirectory(tmp_path)
    contents.add(io.BytesIO(TEXT))
    for name in ("old", "young"):
        part = contents.part(name)
        part.append(b"x")
        part.close()
    os.utime(tmp_path / "incoming" / "old", (1, 1))
    assert contents.delete_leftovers(3600) == 1
    assert [one.name for one in _files(tmp_path)] == [SHA256.hex(), "young"]


def test_a_content_that_is_deleted_is_gone(tmp_path: Path) -> None:
    """Deleting is final, and may be repeated."""
    contents = ContentDirectory(tmp_path)
    contents.add(io.BytesIO(TEXT))
    contents.delete(SHA256)
    contents.delete(SHA256)
    assert contents.size(SHA256) is None
    assert contents.open(SHA256) is None
    assert not contents.renew(SHA256)


def test_a_content_is_moved_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved out arrives where no rename goes, too."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    contents = ContentDirectory(tmp_path / "files")
    contents.add(io.BytesIO(TEXT))
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    contents.move_out(SHA256, tmp_path / "elsewhere" / "content")
    assert (tmp_path / "elsewhere" / "content").read_bytes() == TEXT
    assert contents.size(SHA256) is None


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    """Where a file is in the way, the error is typed and names the place."""
    (tmp_path / "files").write_text("in the way")
    with pytest.raises(StorageError, match="files"):
        ContentDirectory(tmp_path / "files").add(io.BytesIO(TEXT))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room nothing is kept, and the error says so."""

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        ContentDirectory(tmp_path).add(io.BytesIO(TEXT))
    monkeypatch.undo()
    assert _files(tmp_path) == []


def test_file_references_are_told_by_their_form() -> None:
    """A map with precisely the fields of a file reference is one; anything else is not."""
    reference = FileReference("photo.jpg", 5, "image/jpeg", bytes(32))
    value = reference.to_value()
    attributes = {
        "photo": value,
        "short": value | {"sha256": b"1"},
        "more": value | {"extra": 1},
        "negative": value | {"size": -1},
        "text": "sha256",
        "list": [value],
    }
    assert dict(file_references(attributes)) == {"photo": reference}
    assert encoded_file_references(encode(attributes)) == {"photo": reference}
    assert encoded_file_references(encode({"text": "a"})) == {}


@pytest.mark.parametrize("header", [b"\xc4\x20", b"\xc5\x00\x20", b"\xc6\x00\x00\x00\x20"])
def test_a_reference_is_noticed_however_it_is_packed(header: bytes) -> None:
    """References are found in encoded attributes whatever form of a header their hash has."""
    encoded = encode({"photo": FileReference("a", 1, "b", SHA256).to_value()})
    packed = encoded.replace(b"\xc4\x20" + SHA256, header + SHA256)
    assert may_refer_to_files(packed)
    assert encoded_file_references(packed) == {"photo": FileReference("a", 1, "b", SHA256)}
    assert not may_refer_to_files(encode({"photo": b"\xff" * 300}))


def test_folders_leave_with_their_contents(tmp_path: Path) -> None:
    """What was the last content of a folder takes the folder with it; one that has others stays."""
    contents = ContentDirectory(tmp_path / "files")
    contents.add(io.BytesIO(TEXT))
    beside = contents._path(SHA256).parent.parent / "other"
    beside.mkdir()
    contents.delete(SHA256)
    assert [one.name for one in beside.parent.iterdir()] == ["other"]
    contents.add(io.BytesIO(TEXT))
    beside.rmdir()
    contents.move_out(SHA256, tmp_path / "out")
    assert not beside.parent.exists()


def test_a_folder_that_leaves_meanwhile_is_made_again(tmp_path: Path) -> None:
    """A content gets to its place although the last other one of its folder is deleted at the same instant."""
    contents = ContentDirectory(tmp_path)
    part = contents.part("part")
    part.append(TEXT)

    def after_deleting(place: Callable[[], None]) -> None:
        contents._remove_folders(SHA256)
        assert not contents._path(SHA256).parent.exists()
        place()

    part.complete(SHA256, len(TEXT), alone=after_deleting)
    assert contents.size(SHA256) == len(TEXT)


def test_a_content_is_as_old_as_it_is_said_to_be_if_it_is_new(tmp_path: Path) -> None:
    """A content that was not there gets the time that it is given; one that was is young."""
    contents = ContentDirectory(tmp_path)
    for expected in (5.0, time.time()):
        part = contents.part("part")
        part.append(TEXT)
        part.complete(at=5.0)
        assert next(contents.contents()).time == pytest.approx(expected, abs=3600)

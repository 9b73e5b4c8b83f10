"""
What every content store promises, wherever it keeps its bytes.

A subclass says how its store is opened; its tests are these.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Final

import pytest

from tidelog._contents import Content, ContentCorrupt
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog_server._content_store import ContentLost, ContentStore, PartMismatch

TENANT: Final = "acme"
PART: Final = "0123456789abcdef"
DATA: Final = random.Random(17).randbytes(3 * FILE_CHUNK_BYTES + 1000)


def sha256_of(data: bytes) -> bytes:
    """Return the hash of a content."""
    return hashlib.sha256(data).digest()


def put(
    contents: ContentStore, data: bytes, *, tenant: str = TENANT, part: str = PART, start: int = 0, copy: str = ""
) -> bytes:
    """Upload a content, or the rest of one; return its hash."""
    for offset in range(start, len(data), FILE_CHUNK_BYTES):
        contents.append(tenant, part, offset, data[offset : offset + FILE_CHUNK_BYTES])
    contents.complete(tenant, part, sha256_of(data), len(data), copy)
    return sha256_of(data)


def read(contents: ContentStore, sha256: bytes, offset: int = 0, *, tenant: str = TENANT) -> bytes:
    """Return a content from an offset on."""
    return b"".join(contents.read(tenant, sha256, offset))


class ContentStoreContract:
    """What every content store promises."""

    @pytest.fixture
    def contents(self) -> ContentStore | Iterator[ContentStore]:
        """Open an empty store."""
        raise NotImplementedError

    def test_a_mark_stays(self, contents: ContentStore) -> None:
        """A place has no mark at first, and keeps the newest one; it is no content of anybody."""
        assert contents.mark() is None
        contents.set_mark(b"one")
        contents.set_mark(b"another")
        put(contents, DATA)
        assert contents.mark() == b"another"
        assert [one.sha256 for one in contents.contents(TENANT)] == [sha256_of(DATA)]

    def test_copies_of_a_content(self, contents: ContentStore) -> None:
        """All copies of a content are found, and nothing else, as long as they are there."""
        name = sha256_of(DATA)
        assert contents.copies(TENANT, name) == []
        put(contents, DATA)
        put(contents, b"another content")
        contents.append(TENANT, PART, 0, DATA[:FILE_CHUNK_BYTES])
        for copy in ("one", "two"):
            put(contents, DATA, copy=copy, part=copy)
        contents.delete(TENANT, name, "two")
        found = [(one.sha256, one.size, one.copy) for one in contents.copies(TENANT, name)]
        assert sorted(found) == [(name, len(DATA), ""), (name, len(DATA), "one")]
        assert contents.copies("other", name) == []

    def test_a_content_is_read_as_it_was_uploaded(self, contents: ContentStore) -> None:
        """What came in chunks is there under its hash, and comes back in pieces that fit a message."""
        sha256 = put(contents, DATA)
        assert contents.size(TENANT, sha256) == len(DATA)
        pieces = list(contents.read(TENANT, sha256))
        assert b"".join(pieces) == DATA
        assert all(0 < len(piece) <= FILE_CHUNK_BYTES for piece in pieces)

    @pytest.mark.parametrize("offset", [1, FILE_CHUNK_BYTES, FILE_CHUNK_BYTES + 7, len(DATA) - 1, len(DATA)])
    def test_a_content_is_read_from_anywhere(self, contents: ContentStore, offset: int) -> None:
        """Reading from an offset on gives the rest, also none of it."""
        assert read(contents, put(contents, DATA), offset) == DATA[offset:]

    def test_an_empty_content_is_one(self, contents: ContentStore) -> None:
        """A part that nothing was appended to becomes the content of no bytes."""
        sha256 = put(contents, b"")
        assert contents.size(TENANT, sha256) == 0
        assert read(contents, sha256) == b""

    def test_reading_what_is_not_there_says_so(self, contents: ContentStore) -> None:
        """The first step of reading an unknown content raises ContentLost, and it has no size."""
        assert contents.size(TENANT, sha256_of(b"nobody's")) is None
        with pytest.raises(ContentLost):
            next(iter(contents.read(TENANT, sha256_of(b"nobody's"))))

    def test_a_reader_may_leave(self, contents: ContentStore) -> None:
        """Whoever has read one piece can close the rest."""
        sha256 = put(contents, DATA)
        pieces = contents.read(TENANT, sha256)
        with closing(pieces):
            first = next(pieces)
        assert DATA.startswith(first)

    def test_what_came_is_kept_while_nobody_appends(self, contents: ContentStore) -> None:
        """After a pause the upload goes on where `part_size` says, and the content is whole."""
        contents.append(TENANT, PART, 0, DATA[:FILE_CHUNK_BYTES])
        contents.append(TENANT, PART, FILE_CHUNK_BYTES, DATA[FILE_CHUNK_BYTES : 2 * FILE_CHUNK_BYTES])
        contents.pause(TENANT, PART)
        kept = contents.part_size(TENANT, PART)
        assert 0 <= kept <= 2 * FILE_CHUNK_BYTES
        assert read(contents, put(contents, DATA, start=kept)) == DATA

    def test_a_part_is_no_content(self, contents: ContentStore) -> None:
        """Before it is completed nobody can read it, and it is not among the contents."""
        contents.append(TENANT, PART, 0, DATA[:1000])
        contents.pause(TENANT, PART)
        assert contents.size(TENANT, sha256_of(DATA[:1000])) is None
        assert list(contents.contents(TENANT)) == []

    def test_bytes_are_appended_where_the_part_ends_only(self, contents: ContentStore) -> None:
        """An offset that is not where the part ends is refused with the right one, and changes nothing."""
        contents.append(TENANT, PART, 0, DATA[:1000])
        for offset in (0, 999, 1001, 2000):
            with pytest.raises(PartMismatch) as caught:
                contents.append(TENANT, PART, offset, DATA[1000:2000])
            assert caught.value.size == 1000
        assert read(contents, put(contents, DATA, start=1000)) == DATA

    def test_an_unknown_part_begins_at_zero(self, contents: ContentStore) -> None:
        """A part that nobody made has no bytes, and takes none at another offset."""
        assert contents.part_size(TENANT, PART) == 0
        with pytest.raises(PartMismatch):
            contents.append(TENANT, PART, 5, b"later")
        assert contents.part_size(TENANT, PART) == 0

    @pytest.mark.parametrize(
        ("sha256", "size"),
        [
            (sha256_of(b"something else"), len(DATA)),
            (sha256_of(DATA), len(DATA) - 1),
            (sha256_of(DATA), len(DATA) + 1),
        ],
        ids=["hash", "longer", "shorter"],
    )
    def test_what_is_not_what_it_was_said_to_be_leaves_nothing(
        self, contents: ContentStore, sha256: bytes, size: int
    ) -> None:
        """A part of another hash or length is refused and deleted."""
        contents.append(TENANT, PART, 0, DATA[:FILE_CHUNK_BYTES])
        contents.append(TENANT, PART, FILE_CHUNK_BYTES, DATA[FILE_CHUNK_BYTES : 2 * FILE_CHUNK_BYTES])
        contents.append(TENANT, PART, 2 * FILE_CHUNK_BYTES, DATA[2 * FILE_CHUNK_BYTES : 3 * FILE_CHUNK_BYTES])
        contents.append(TENANT, PART, 3 * FILE_CHUNK_BYTES, DATA[3 * FILE_CHUNK_BYTES :])
        with pytest.raises(ContentCorrupt):
            contents.complete(TENANT, PART, sha256, size)
        assert list(contents.contents(TENANT)) == []
        assert contents.size(TENANT, sha256) is None
        assert contents.part_size(TENANT, PART) == 0

    def test_a_completed_part_is_gone(self, contents: ContentStore) -> None:
        """Its name can be used again."""
        put(contents, DATA)
        assert contents.part_size(TENANT, PART) == 0
        assert read(contents, put(contents, b"another")) == b"another"

    def test_a_content_that_comes_again_is_there_once(self, contents: ContentStore) -> None:
        """Two uploads of the same bytes leave one content, and both succeed."""
        put(contents, DATA, part="aa")
        put(contents, DATA, part="bb")
        assert [one[:2] for one in contents.contents(TENANT)] == [(sha256_of(DATA), len(DATA))]

    def test_a_discarded_part_is_gone(self, contents: ContentStore) -> None:
        """It can be begun anew; discarding what is not there does nothing."""
        contents.append(TENANT, PART, 0, DATA[:1000])
        contents.discard(TENANT, PART)
        contents.discard(TENANT, PART)
        assert contents.part_size(TENANT, PART) == 0
        assert read(contents, put(contents, DATA)) == DATA

    def test_a_deleted_content_is_gone(self, contents: ContentStore) -> None:
        """It is not there any more; deleting it again does nothing."""
        sha256 = put(contents, DATA)
        contents.delete(TENANT, sha256)
        contents.delete(TENANT, sha256)
        assert contents.size(TENANT, sha256) is None
        assert list(contents.contents(TENANT)) == []

    def test_contents_tell_when_they_came(self, contents: ContentStore) -> None:
        """Each has its hash, its size and a time that is about now."""
        put(contents, DATA)
        put(contents, b"small")
        found = {one.sha256: one for one in contents.contents(TENANT)}
        assert {sha256: one.size for sha256, one in found.items()} == {
            sha256_of(DATA): len(DATA),
            sha256_of(b"small"): 5,
        }
        assert all(abs(one.time - time.time()) < 3600 for one in found.values())
        assert all(isinstance(one, Content) for one in found.values())

    def test_parts_that_nobody_goes_on_with_are_deleted(self, contents: ContentStore) -> None:
        """Those that are older go, the younger and the contents stay."""
        sha256 = put(contents, DATA)
        contents.append(TENANT, PART, 0, DATA[:FILE_CHUNK_BYTES])
        contents.pause(TENANT, PART)
        kept = contents.part_size(TENANT, PART)
        assert contents.delete_leftovers(TENANT, older_than_seconds=3600) == 0
        assert contents.part_size(TENANT, PART) == kept
        contents.delete_leftovers(TENANT, older_than_seconds=-3600)
        assert contents.part_size(TENANT, PART) == 0
        assert contents.size(TENANT, sha256) == len(DATA)

    def test_tenants_share_nothing(self, contents: ContentStore) -> None:
        """Neither a content nor a part of one tenant is seen, changed or deleted by way of another."""
        sha256 = put(contents, DATA)
        contents.append(TENANT, PART, 0, DATA[:1000])
        for other in ("other", "acme/other", "ACME", "../acme", "a" * 128, "ümläut \x01"):
            assert contents.size(other, sha256) is None
            assert contents.part_size(other, PART) == 0
            assert list(contents.contents(other)) == []
            with pytest.raises(ContentLost):
                read(contents, sha256, tenant=other)
            contents.delete(other, sha256)
            contents.discard(other, PART)
            contents.delete_leftovers(other, older_than_seconds=-3600)
        assert contents.size(TENANT, sha256) == len(DATA)
        assert read(contents, put(contents, DATA, start=1000)) == DATA

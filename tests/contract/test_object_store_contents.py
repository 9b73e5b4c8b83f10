"""Object stores keep what every content store promises: in memory, in a directory, and in a stand-in for S3."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.contract.content_store_contract import DATA, PART, TENANT, ContentStoreContract, put, read, sha256_of
from tests.object_stores import Bucket, refusing, s3_options, s3_stand_in, silent

from tidelog import DiskFull, InvalidValue, StorageError
from tidelog._contents import ContentCorrupt
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog_server import ContentStore, ExtraMissing, ObjectStoreContents, _object_store_contents
from tidelog_server._content_store import PartMismatch

# Small ones, so that a content of the contract has several, and a tail.
PIECE_BYTES: Final = FILE_CHUNK_BYTES + 1
# So large that its upload takes several requests.
LARGE: Final = random.Random(23).randbytes(2 * _object_store_contents.STRETCH_BYTES_MIN + 1000)

# A server that ends while it completes a content: all bytes were sent, and nobody has said that they are right.
DYING: Final = """
import json, os, sys
from tidelog_server import _object_store_contents as module
url, options, tenant, part, sha256, size = json.loads(sys.argv[1])
module._verify = lambda *_: os._exit(9)
module.ObjectStoreContents(url, **options).complete(tenant, part, bytes.fromhex(sha256), size)
"""

CALLS: Final[dict[str, Callable[[ObjectStoreContents], object]]] = {
    "check": lambda contents: contents.check(),
    "size": lambda contents: contents.size(TENANT, sha256_of(DATA)),
    "read": lambda contents: read(contents, sha256_of(DATA)),
    "part_size": lambda contents: contents.part_size(TENANT, PART),
    "append": lambda contents: contents.append(TENANT, PART, 0, DATA[:1000]),
    "complete": lambda contents: contents.complete(TENANT, PART, sha256_of(b""), 0),
    "discard": lambda contents: contents.discard(TENANT, PART),
    "delete": lambda contents: contents.delete(TENANT, sha256_of(DATA)),
    "contents": lambda contents: list(contents.contents(TENANT)),
    "delete_leftovers": lambda contents: contents.delete_leftovers(TENANT, 0),
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run the stand-in."""
    with s3_stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str) -> Bucket:
    """Make a bucket."""
    return Bucket(s3)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several pieces of what would be one."""
    monkeypatch.setattr(_object_store_contents, "PIECE_BYTES", PIECE_BYTES)


def opened(bucket: Bucket) -> ObjectStoreContents:
    """Open the contents in a bucket: each time as another server does."""
    return ObjectStoreContents(bucket.url, **bucket.options)


def append(contents: ContentStore, data: bytes, start: int = 0) -> None:
    """Append a part's bytes from an offset on."""
    for offset in range(start, len(data), FILE_CHUNK_BYTES):
        contents.append(TENANT, PART, offset, data[offset : offset + FILE_CHUNK_BYTES])


@pytest.mark.usefixtures("small_pieces")
class TestInMemory(ContentStoreContract):
    @pytest.fixture
    def contents(self) -> ContentStore:
        """Open an empty store."""
        return ObjectStoreContents("memory:///")


@pytest.mark.usefixtures("small_pieces")
class TestInDirectory(ContentStoreContract):
    @pytest.fixture
    def contents(self, tmp_path: Path) -> ContentStore:
        """Open an empty store."""
        return ObjectStoreContents((tmp_path / "objects").as_uri(), mkdir=True)


class TestInS3WithoutPieces(ContentStoreContract):
    @pytest.fixture
    def contents(self, bucket: Bucket) -> ContentStore:
        """Open an empty store."""
        return opened(bucket)

    def test_a_small_content_is_one_object_from_the_start(self, contents: ContentStore, bucket: Bucket) -> None:
        """What fits a piece is not stored before it is complete."""
        append(contents, DATA)
        assert bucket.objects() == []
        contents.complete(TENANT, PART, sha256_of(DATA), len(DATA))
        assert [key.rpartition("/")[2] for key in bucket.objects()] == [sha256_of(DATA).hex()]


@pytest.mark.usefixtures("small_pieces")
class TestInS3(ContentStoreContract):
    """The contract, and what many servers ask of one bucket."""

    @pytest.fixture
    def contents(self, bucket: Bucket) -> ContentStore:
        """Open an empty store."""
        return opened(bucket)

    def test_all_lies_below_the_prefix(self, bucket: Bucket) -> None:
        """Of contents, parts and tenants alike; names of tenants and users are not to be read there."""
        contents = opened(bucket)
        put(contents, DATA)
        append(contents, DATA)
        assert all(key.startswith("some/prefix/") for key in bucket.objects())
        assert not any(TENANT in key for key in bucket.objects())

    def test_another_server_goes_on(self, bucket: Bucket) -> None:
        """After a pause every byte is kept, for whichever server the client meets next."""
        first = opened(bucket)
        append(first, DATA[: 2 * FILE_CHUNK_BYTES + 5])
        first.pause(TENANT, PART)
        second = opened(bucket)
        assert second.part_size(TENANT, PART) == 2 * FILE_CHUNK_BYTES + 5
        assert read(second, put(second, DATA, start=2 * FILE_CHUNK_BYTES + 5)) == DATA

    def test_a_server_that_died_took_its_tail_only(self, bucket: Bucket) -> None:
        """What had become a piece is kept; the upload goes on from there."""
        append(opened(bucket), DATA[: 3 * FILE_CHUNK_BYTES])
        second = opened(bucket)
        kept = second.part_size(TENANT, PART)
        assert PIECE_BYTES <= kept < 3 * FILE_CHUNK_BYTES
        assert read(second, put(second, DATA, start=kept)) == DATA

    def test_a_server_that_was_thought_to_be_dead_does_no_harm(self, bucket: Bucket) -> None:
        """What it writes over or beside the other one's pieces does not change the content."""
        dead, alive = opened(bucket), opened(bucket)
        append(dead, DATA[: 3 * FILE_CHUNK_BYTES])
        append(alive, DATA[: 3 * FILE_CHUNK_BYTES + 100], start=alive.part_size(TENANT, PART))
        alive.pause(TENANT, PART)
        dead.pause(TENANT, PART)
        last = opened(bucket)
        kept = last.part_size(TENANT, PART)
        assert kept == 3 * FILE_CHUNK_BYTES + 100
        assert read(last, put(last, DATA, start=kept)) == DATA
        assert len(bucket.objects()) == 1

    def test_what_somebody_else_stored_of_a_tail_counts_once(self, bucket: Bucket) -> None:
        """A server completes a part although another one made a piece of what it has in memory."""
        data = DATA[: 2 * FILE_CHUNK_BYTES + 100]
        alive, dead = opened(bucket), opened(bucket)
        append(alive, data[: 2 * FILE_CHUNK_BYTES])
        append(dead, data[:-50], start=2 * FILE_CHUNK_BYTES)
        append(alive, data, start=2 * FILE_CHUNK_BYTES)
        dead.pause(TENANT, PART)
        alive.complete(TENANT, PART, sha256_of(data), len(data))
        assert read(alive, sha256_of(data)) == data

    def test_pieces_behind_a_gap_do_not_count(self, bucket: Bucket) -> None:
        """A part ends where the first byte is missing."""
        contents = opened(bucket)
        append(contents, DATA)
        contents.pause(TENANT, PART)
        (first, _) = bucket.objects()
        contents._store.delete(first.removeprefix("some/prefix/"))
        assert contents.part_size(TENANT, PART) == 0
        with pytest.raises(PartMismatch):
            contents.append(TENANT, PART, len(DATA), b"more")

    def test_a_service_on_an_event_loop_completes_a_content(self, bucket: Bucket) -> None:
        """Who waits for a content of several pieces while his own event loop waits gets it all the same."""
        contents = opened(bucket)

        async def serves() -> bytes:
            return put(contents, LARGE)

        assert read(contents, asyncio.run(serves())) == LARGE

    @pytest.mark.slow
    def test_a_large_content_comes_back(self, bucket: Bucket) -> None:
        """One whose upload takes several requests is whole, and nothing else is left."""
        contents = opened(bucket)
        sha256 = put(contents, LARGE)
        assert read(contents, sha256) == LARGE
        assert len(bucket.objects()) == 1
        assert bucket.unfinished_uploads() == []

    @pytest.mark.parametrize("data", [LARGE, DATA], ids=["large", "small"])
    def test_another_hash_leaves_nothing(self, bucket: Bucket, data: bytes) -> None:
        """Neither a content, nor a piece, nor an upload that was begun."""
        contents = opened(bucket)
        append(contents, data)
        with pytest.raises(ContentCorrupt):
            contents.complete(TENANT, PART, sha256_of(b"something else"), len(data))
        assert bucket.objects() == []
        assert bucket.unfinished_uploads() == []

    @pytest.mark.slow
    def test_a_piece_that_vanishes_leaves_no_content(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        """If a piece cannot be read, completing fails, and no upload is left; what there is of the part is kept."""
        contents = opened(bucket)
        append(contents, LARGE)
        pieces = list(contents._pieces(TENANT, PART))
        last = max(pieces)
        contents._store.delete(last.path)
        monkeypatch.setattr(contents, "_pieces", lambda *_: pieces)
        with pytest.raises(StorageError):
            contents.complete(TENANT, PART, sha256_of(LARGE), len(LARGE))
        assert contents.size(TENANT, sha256_of(LARGE)) is None
        assert bucket.unfinished_uploads() == []
        assert opened(bucket).part_size(TENANT, PART) == last.start

    @pytest.mark.slow
    def test_a_server_that_dies_while_it_completes_leaves_no_content(self, bucket: Bucket) -> None:
        """The part is as it was, and another server completes it."""
        contents = opened(bucket)
        append(contents, LARGE)
        contents.pause(TENANT, PART)
        sha256 = sha256_of(LARGE)
        what = [bucket.url, bucket.options, TENANT, PART, sha256.hex(), len(LARGE)]
        died = subprocess.run([sys.executable, "-c", DYING, json.dumps(what)], check=False, capture_output=True)
        assert died.returncode == 9, died.stderr
        assert bucket.unfinished_uploads() == [
            f"some/prefix/{_object_store_contents._content_path(TENANT, sha256, '')}"
        ]
        other = opened(bucket)
        assert other.size(TENANT, sha256) is None
        assert other.part_size(TENANT, PART) == len(LARGE)
        other.complete(TENANT, PART, sha256, len(LARGE))
        assert read(other, sha256) == LARGE

    def test_pieces_that_cannot_be_deleted_are_leftovers(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The content is there, which is told; its pieces go in time."""

        def fail(paths: object) -> None:
            raise StorageError("not now")

        contents = opened(bucket)
        append(contents, DATA)
        with monkeypatch.context() as broken:
            broken.setattr(contents, "_delete", fail)
            contents.complete(TENANT, PART, sha256_of(DATA), len(DATA))
        assert read(contents, sha256_of(DATA)) == DATA
        assert "not deleted" in caplog.text
        assert contents.delete_leftovers(TENANT, older_than_seconds=-3600) == 1
        assert len(bucket.objects()) == 1

    def test_leftovers_are_parts_whose_newest_piece_is_old(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are counted once each, however many pieces they have; one that is appended to stays."""
        contents = opened(bucket)
        for part in ("aa", "bb"):
            for offset in range(0, 2 * PIECE_BYTES, FILE_CHUNK_BYTES):
                contents.append(TENANT, part, offset, DATA[:FILE_CHUNK_BYTES])
            contents.pause(TENANT, part)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 7200)
        contents.append(TENANT, "bb", contents.part_size(TENANT, "bb"), b"more")
        assert contents.delete_leftovers(TENANT, older_than_seconds=3600) == 1
        assert contents.part_size(TENANT, "aa") == 0
        assert contents.part_size(TENANT, "bb") > 2 * FILE_CHUNK_BYTES

    def test_a_tail_that_nobody_goes_on_with_is_let_go(self, monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
        """Memory is no place for leftovers either."""
        contents = opened(bucket)
        contents.append(TENANT, PART, 0, b"a few bytes")
        assert contents.delete_leftovers("other", older_than_seconds=-1) == 0
        assert contents.delete_leftovers(TENANT, older_than_seconds=3600) == 0
        assert contents.part_size(TENANT, PART) == 11
        assert contents.delete_leftovers(TENANT, older_than_seconds=-1) == 1
        assert contents.part_size(TENANT, PART) == 0


class TestStoresOfNoUse:
    """What is not to be had is an error, never a content that is said to be lost."""

    @pytest.mark.parametrize("call", CALLS)
    def test_a_bucket_that_is_not_there(self, s3: str, call: str) -> None:
        """It is a store that cannot be used, whatever is asked of it."""
        contents = ObjectStoreContents("s3://no-such-bucket/prefix", **s3_options(s3))
        with pytest.raises(StorageError):
            CALLS[call](contents)

    @pytest.mark.parametrize("call", CALLS)
    def test_credentials_that_are_not_accepted(self, call: str) -> None:
        """The error says so, and where, but not what the credentials are."""
        with refusing(403, "AccessDenied") as endpoint:
            contents = ObjectStoreContents("s3://bucket", **s3_options(endpoint))
            with pytest.raises(StorageError, match=r"s3://bucket: .*403") as caught:
                CALLS[call](contents)
        assert not isinstance(caught.value, DiskFull)

    @pytest.mark.parametrize("call", CALLS)
    def test_a_store_that_does_not_answer(self, call: str) -> None:
        """The call ends with an error, after the timeout."""
        with silent() as endpoint:
            contents = ObjectStoreContents(
                "s3://bucket", **s3_options(endpoint, timeout="50ms"), retry_config={"max_retries": 0}
            )
            with pytest.raises(StorageError):
                CALLS[call](contents)

    def test_a_store_that_is_full(self) -> None:
        """It says so by the status of HTTP, or by a code of its own."""
        for status, code in ((507, "Whatever"), (400, "XMinioStorageFull")):
            with refusing(status, code) as endpoint:
                contents = ObjectStoreContents("s3://b", **s3_options(endpoint), retry_config={"max_retries": 0})
                with pytest.raises(DiskFull):
                    contents._put("x", bytearray(b"data"))

    def test_a_tail_that_cannot_be_stored_is_let_go(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, small_pieces: None
    ) -> None:
        """Once the store is back the upload goes on from what is kept."""
        contents = opened(bucket)
        store = contents._store
        append(contents, DATA[: 2 * FILE_CHUNK_BYTES])
        kept = contents.part_size(TENANT, PART)
        contents.append(TENANT, PART, kept, DATA[kept : kept + 1000])
        with refusing(403, "AccessDenied") as endpoint:
            contents._store = ObjectStoreContents(bucket.url, **s3_options(endpoint))._store
            with pytest.raises(StorageError):
                contents.pause(TENANT, PART)
        contents._store = store
        assert contents.part_size(TENANT, PART) == kept
        assert read(contents, put(contents, DATA, start=kept)) == DATA

    def test_a_signature_is_not_told(self) -> None:
        """Addresses in messages end before their query."""
        with refusing(403, "AccessDenied") as endpoint:
            contents = ObjectStoreContents("s3://bucket", **s3_options(endpoint))
            with pytest.raises(StorageError) as caught:
                contents.check()
        assert endpoint in str(caught.value)
        assert "?" not in str(caught.value)
        assert "Debug source" not in str(caught.value)


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "options"),
        [
            ("nonsense", {}),
            ("ftp://host/path", {}),
            ("s3://", {}),
            ("s3://bucket", {"nonsense": "1"}),
            ("s3://bucket", {"allow_http": True}),
            ("s3://bucket", {"client_options": {"timeout": "soon"}}),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, url: str, options: dict[str, Any]) -> None:
        """A URL or an option that nobody knows is an error of whoever gave it."""
        with pytest.raises(InvalidValue):
            ObjectStoreContents(url, **options)

    def test_a_signature_in_the_address_is_not_told(self) -> None:
        """Errors name the store without it."""
        with pytest.raises(InvalidValue) as caught:
            ObjectStoreContents("ftp://host/path?sig=secret")
        assert "ftp://host/path: " in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_a_password_in_the_address_is_not_told(self) -> None:
        """Errors name the store without it."""
        with pytest.raises(InvalidValue) as caught:
            ObjectStoreContents("ftp://user:secret@host/path")
        assert "ftp://host/path: " in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says what to install."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "obstore", None)
        with pytest.raises(ExtraMissing, match=r"tidelog\[s3\]"):
            ObjectStoreContents("memory:///")

    @pytest.mark.slow
    def test_the_library_is_loaded_for_those_who_use_it_only(self) -> None:
        """Importing the server imports none of it."""
        program = "import sys, tidelog_server.commands; sys.exit('obstore' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""
Object store contents: a content store for many servers, in S3 or whatever else speaks to `obstore`.

    <tenant>/ab/abcd...-copy                a copy of a content, named by its SHA-256
    <tenant>/incoming/<part>/<start>-<end>  a piece of a part: these bytes of it, some MiB
    tidelog-contents                        the mark of the place

Nothing can be appended to an object. So what is appended to a part becomes pieces, and
at its end they pass through the hash into the content, whose upload is completed only
if they were what they should be: nobody ever sees a content that is not whole and
right. A part that goes on somewhere else, or after a crash, begins where its pieces
end; only what was not yet a piece, the tail, is in the memory of one server.

Pieces may overlap: a server that was thought to be dead writes one more. Where they
do, either will do, for the hash decides about all of them. Since each has its end in
its name too, a short one never replaces a longer one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tidelog._contents import Content, ContentCorrupt
from tidelog._errors import DiskFull, InvalidValue, StorageError
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog._logging import get_logger
from tidelog_server._content_store import MARK_NAME, ContentLost, PartMismatch, tenant_name
from tidelog_server._errors import ExtraMissing

if TYPE_CHECKING:
    from obstore import Bytes, ObjectMeta

# What of a part is in memory at the most before it becomes a piece. Each costs a request, twice.
PIECE_BYTES: Final = 2 * 1024 * 1024
# What a reader has in memory. Each costs a request; none stays open while the reader takes its time.
READ_BYTES: Final = 1024 * 1024
# The upload of a content: S3 takes no smaller stretches than that, and not more of them.
STRETCH_BYTES_MIN: Final = 5 * 1024 * 1024
STRETCHES_MAX: Final = 10_000
STRETCHES_AT_ONCE: Final = 3
PIECES_READ_AHEAD: Final = 4

LISTED_AT_ONCE: Final = 1_000
MESSAGE_CHARS_MAX: Final = 500

# A request that is not answered ends after obstore's timeout, 30 seconds unless an option or the environment says
# otherwise; by then no other attempt follows. One that fails at once is repeated for some seconds.
RETRIES: Final = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}

_CONTENT: Final = re.compile(r"(?:^|/)([0-9a-f]{64})(?:-([0-9a-z]+))?$")
_PIECE: Final = re.compile(r"(?:^|/)incoming/([^/]+)/([0-9]{20})-[0-9]+")
# ENOSPC, EDQUOT and EFBIG of a directory; what S3-compatible stores say.
_FULL: Final = re.compile(r"os error (?:28|122|27)\)|status code: 507 |StorageFull|QuotaExceeded")
# There may be a password in the one, and a signature in the other.
_USER: Final = re.compile(r"(\w+://)[^\s/?\"]*@")
_QUERY: Final = re.compile(r"(\w+://[^\s?\"]+)\?[^\s\"]*")

_log = get_logger("tidelog.contents")


class ObjectStoreContents:
    """
    Contents in an object store, which any number of servers may share.

    Needs the extra `tidelog[s3]`.

    Args:
        url: Where: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, or what else `obstore`
            takes. Credentials and the like come from the environment (`AWS_...`), unless they are among the options.
        options: What `obstore.store.from_url` takes: `config`, `client_options`, `retry_config` ...

    Raises:
        ExtraMissing: The extra is not installed.
        InvalidValue: A URL or an option that obstore does not take.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            # Nobody else needs it.
            from obstore.exceptions import BaseError  # noqa: PLC0415
            from obstore.store import from_url  # noqa: PLC0415
        except ImportError as error:
            raise ExtraMissing("contents in an object store need the extra s3: pip install 'tidelog[s3]'") from error
        self.url = _USER.sub(r"\1", url.partition("?")[0])  # behind it may be a signature
        self._library_errors = (BaseError, OSError)
        given: dict[str, Any] = {"retry_config": RETRIES, **options}
        try:
            self._store = from_url(url, **given)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # Whatever it is. An option of connections that is given as one of the store makes the library panic.
            raise InvalidValue(f"{self.url}: {_said(error)}") from error
        self._tails: dict[tuple[str, str], _Tail] = {}

    def check(self) -> None:
        """Find out whether the store is there and may be used: raises StorageError if not."""
        with self._storage_errors():
            next(iter(self._store.list("check", chunk_size=1)), None)

    def mark(self) -> bytes | None:
        """Return what the object of the mark says, if it is there."""
        with self._storage_errors():
            try:
                return bytes(self._store.get(MARK_NAME).bytes()).strip()
            except FileNotFoundError:
                return None

    def set_mark(self, mark: bytes) -> None:
        """Put the object of the mark."""
        self._put(MARK_NAME, bytearray(mark))

    def size(self, tenant: str, sha256: bytes, copy: str = "") -> int | None:
        """Return the length of a content in bytes, or None if it is not there."""
        with self._storage_errors():
            try:
                return self._store.head(_content_path(tenant, sha256, copy))["size"]
            except FileNotFoundError:
                # The same is said of a bucket that is not there, and then nothing is known of the content.
                self.check()
                return None

    def read(self, tenant: str, sha256: bytes, offset: int = 0, copy: str = "") -> Generator[bytes, None, None]:
        """Iterate over a content from *offset* on. Raises ContentLost."""
        path = _content_path(tenant, sha256, copy)
        size = self.size(tenant, sha256, copy)
        if size is None:
            raise ContentLost(f"the content {sha256.hex()} is not there")
        for start in range(offset, size, READ_BYTES):
            with self._storage_errors():
                try:
                    data = memoryview(self._store.get_range(path, start=start, end=min(start + READ_BYTES, size)))
                except FileNotFoundError as error:
                    self.check()
                    raise ContentLost(f"the content {sha256.hex()} is not there any more") from error
            for first in range(0, len(data), FILE_CHUNK_BYTES):
                yield bytes(data[first : first + FILE_CHUNK_BYTES])

    def part_size(self, tenant: str, part: str) -> int:
        """Return how many bytes of a part are kept."""
        tail = self._tails.get((tenant, part))
        return _end(_stretches(self._pieces(tenant, part))) if tail is None else tail.end

    def append(self, tenant: str, part: str, offset: int, data: bytes) -> None:
        """Append bytes to a part: to its tail, which becomes a piece when it is long enough. Raises PartMismatch."""
        tail = self._tails.get((tenant, part)) or _Tail(self.part_size(tenant, part))
        if tail.end != offset:
            raise PartMismatch(f"bytes from {offset} on came where {tail.end} are there", size=tail.end)
        tail.append(data)
        self._tails[tenant, part] = tail
        if len(tail.data) >= PIECE_BYTES:
            self.pause(tenant, part)
            self._tails[tenant, part] = _Tail(tail.end)

    def pause(self, tenant: str, part: str) -> None:
        """Let go of a part: its tail becomes a piece. If the store fails, the part ends before it."""
        tail = self._tails.pop((tenant, part), None)
        if tail is not None and tail.data:
            self._put(_piece_path(tenant, part, tail), tail.data)

    def complete(self, tenant: str, part: str, sha256: bytes, size: int, copy: str = "") -> None:
        """Make a part a content. Raises ContentCorrupt."""
        tail = self._tails.pop((tenant, part), None)
        pieces = list(self._pieces(tenant, part))
        try:
            stretches = _stretches(pieces)
            rest = bytearray() if tail is None else tail.behind(_end(stretches))
            if (found := _end(stretches) + len(rest)) != size:
                raise ContentCorrupt(f"{found} bytes instead of {size}")
            path = _content_path(tenant, sha256, copy)
            if stretches:
                with self._storage_errors():
                    _run(self._put_verified(path, stretches, rest, sha256, size))
            else:
                _verify(hashlib.sha256(rest), sha256)
                self._put(path, rest)
        except ContentCorrupt:
            self._delete(piece.path for piece in pieces)
            raise
        try:
            self._delete(piece.path for piece in pieces)
        except StorageError as error:
            # The content is there, which is all that was asked for. The pieces are leftovers some day.
            _log.warning("pieces of a content that is complete were not deleted", reason=str(error))

    def discard(self, tenant: str, part: str) -> None:
        """Delete a part, if it is there."""
        self._tails.pop((tenant, part), None)
        self._delete(piece.path for piece in self._pieces(tenant, part))

    def delete(self, tenant: str, sha256: bytes, copy: str = "") -> None:
        """Delete a content, if it is there. Who reads it finds it lost."""
        self._delete([_content_path(tenant, sha256, copy)])

    def contents(self, tenant: str) -> Iterator[Content]:
        """Iterate over a tenant's contents, in no order."""
        return self._contents(tenant_name(tenant))

    def copies(self, tenant: str, sha256: bytes) -> list[Content]:
        """Return the copies of a content that are there."""
        folder = _content_path(tenant, sha256, "").rpartition("/")[0]
        return [one for one in self._contents(folder) if one.sha256 == sha256]

    def delete_leftovers(self, tenant: str, older_than_seconds: float) -> int:
        """Delete parts of a tenant that nothing was appended to for so long; return how many."""
        before = time.time() - older_than_seconds
        appended = {part: tail.time for (owner, part), tail in list(self._tails.items()) if owner == tenant}
        for piece in self._pieces(tenant):
            appended[piece.part] = max(piece.time, appended.get(piece.part, 0.0))
        leftovers = [part for part, latest in appended.items() if latest < before]
        for part in leftovers:
            self.discard(tenant, part)
        return len(leftovers)

    def _contents(self, folder: str) -> Iterator[Content]:
        for found in self._list(folder):
            if match := _CONTENT.search(found["path"]):
                moment = found["last_modified"].timestamp()
                yield Content(bytes.fromhex(match[1]), found["size"], moment, match[2] or "")

    def _pieces(self, tenant: str, part: str | None = None) -> Iterator[_Piece]:
        """Iterate over the pieces of a part, or of all parts of a tenant."""
        folder = f"{tenant_name(tenant)}/incoming"
        for found in self._list(folder if part is None else f"{folder}/{part}"):
            if match := _PIECE.search(found["path"]):
                moment = found["last_modified"].timestamp()
                yield _Piece(found["path"], match[1], int(match[2]), found["size"], moment)

    async def _put_verified(
        self, path: str, stretches: list[_Stretch], rest: bytearray, sha256: bytes, size: int
    ) -> None:
        """Make an object of pieces and of what is behind them; whatever fails leaves none."""
        async with aclosing(self._verified(stretches, rest, sha256)) as data:
            await self._store.put_async(
                path,
                data,
                chunk_size=max(STRETCH_BYTES_MIN, -(-size // STRETCHES_MAX)),
                max_concurrency=STRETCHES_AT_ONCE,
            )

    async def _verified(
        self, stretches: list[_Stretch], rest: bytearray, sha256: bytes
    ) -> AsyncGenerator[Bytes | bytearray]:
        """Iterate over the bytes of a content; raise ContentCorrupt at their end if they are another one."""
        digest = hashlib.sha256()
        async with aclosing(self._read_ahead(stretches)) as pieces:
            async for data in pieces:
                digest.update(data)
                yield data
        digest.update(rest)
        if rest:
            yield rest
        _verify(digest, sha256)

    async def _read_ahead(self, stretches: list[_Stretch]) -> AsyncGenerator[Bytes]:
        """Iterate over what pieces hold; the next ones are on their way meanwhile."""
        coming: deque[asyncio.Task[Bytes]] = deque()
        try:
            for stretch in chain(stretches, [None] * PIECES_READ_AHEAD):
                if stretch is not None:
                    coming.append(asyncio.create_task(self._read(stretch)))
                if coming and (stretch is None or len(coming) > PIECES_READ_AHEAD):
                    yield await coming.popleft()
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)

    async def _read(self, stretch: _Stretch) -> Bytes:
        return await self._store.get_range_async(stretch.path, start=stretch.first, end=stretch.size)

    def _put(self, path: str, data: bytearray) -> None:
        with self._storage_errors():
            self._store.put(path, data, use_multipart=False)

    def _delete(self, paths: Iterable[str]) -> None:
        """Delete objects, as far as they are there."""
        with self._storage_errors():
            every = list(paths)
            try:
                if every:
                    self._store.delete(every)
            except FileNotFoundError:
                # Some stores stop at one that is not there: then one by one. Others have no bucket.
                self.check()
                for path in every:
                    with suppress(FileNotFoundError):
                        self._store.delete(path)

    def _list(self, folder: str) -> Iterator[ObjectMeta]:
        with self._storage_errors():
            for found in self._store.list(folder, chunk_size=LISTED_AT_ONCE):
                yield from found

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except self._library_errors as error:
            message = f"{self.url}: {_said(error)}"
            raise (DiskFull if _FULL.search(str(error)) else StorageError)(message) from error


class _Tail:
    """The end of a part, which is no piece yet."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.data = bytearray()
        self.time = time.time()

    @property
    def end(self) -> int:
        """How many bytes of the part came."""
        return self.start + len(self.data)

    def append(self, data: bytes) -> None:
        """Append bytes."""
        self.data += data
        self.time = time.time()

    def behind(self, offset: int) -> bytearray:
        """Return what follows the first *offset* bytes of the part; nothing if some between are not here."""
        return self.data[offset - self.start :] if offset >= self.start else bytearray()


class _Piece(NamedTuple):
    """An object with bytes of a part, from *start* on."""

    path: str
    part: str
    start: int
    size: int
    time: float


class _Stretch(NamedTuple):
    """What a piece of so many bytes has, from its byte *first* on, to go on with after *offset* bytes of the part."""

    path: str
    first: int
    size: int
    offset: int


def _stretches(pieces: Iterable[_Piece]) -> list[_Stretch]:
    """Return what of the pieces makes up their part: all bytes from the first on, each once."""
    found: list[_Stretch] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        end = _end(found)
        if piece.start > end:
            break
        if piece.start + piece.size > end:
            found.append(_Stretch(piece.path, end - piece.start, piece.size, end))
    return found


def _end(stretches: list[_Stretch]) -> int:
    """Return how many bytes they make up."""
    if not stretches:
        return 0
    last = stretches[-1]
    return last.offset + last.size - last.first


def _verify(digest: hashlib._Hash, sha256: bytes) -> None:
    if digest.digest() != sha256:
        raise ContentCorrupt(f"the SHA-256 {digest.hexdigest()} instead of {sha256.hex()}")


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, in a thread of its own: that of the caller may have an event loop, which waits."""
    with ThreadPoolExecutor(1) as alone:
        alone.submit(asyncio.run, coroutine).result()


def _content_path(tenant: str, sha256: bytes, copy: str) -> str:
    name = sha256.hex()
    return f"{tenant_name(tenant)}/{name[:2]}/{name}" + (f"-{copy}" if copy else "")


def _piece_path(tenant: str, part: str, tail: _Tail) -> str:
    return f"{tenant_name(tenant)}/incoming/{part}/{tail.start:020}-{tail.end}"


def _said(error: BaseException) -> str:
    """Return what the library says, without what is there for its own authors."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    text = _USER.sub(r"\1", _QUERY.sub(r"\1", text))
    return text if len(text) <= MESSAGE_CHARS_MAX else f"{text[:MESSAGE_CHARS_MAX]}..."

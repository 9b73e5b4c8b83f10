"""
Files: the contents that a server keeps, and what its records say of them, kept in step.

A content is in the content store before its record is written, and its record goes
before it does: so what a record names is there, and what a crash leaves in between is a
content that nobody knows of, which is collected. Making one and collecting it exclude
each other, content by content, within this process.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import BinaryIO, Final, NamedTuple, TypeVar
from uuid import uuid4

from tidelog._contents import SHA256_BYTES, Content
from tidelog._errors import InvalidValue
from tidelog._file_reference import file_references
from tidelog._keys import ObjectKey
from tidelog._limits import FILE_BYTES_MAX_DEFAULT, FILE_CHUNK_BYTES
from tidelog._logging import get_logger
from tidelog._values import decode_trusted
from tidelog_server._application import Application
from tidelog_server._collection import is_referred_to, without_content
from tidelog_server._content_reader import open_content
from tidelog_server._content_store import ContentLost, ContentStore
from tidelog_server._errors import FileTooLarge, NotFound, RequestInvalid
from tidelog_server._file_records import (
    SERVICE,
    ContentRecord,
    content_key,
    content_record,
    grant_key,
    pack_content,
    pack_grant,
    renewed_grant,
)
from tidelog_server._file_rules import FileRules
from tidelog_server._incoming import Incoming, KeyedLocks, Parts, part_name
from tidelog_server._indexes import IndexWrites
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import Writes
from tidelog_server._store import Reader, Store

# What a server notes in its store about when its timeline began.
TIMELINE_NOTE: Final = "timeline began"
# How long contents are kept that are not on record, after they came and after a timeline began: as long
# as replicas offer again what a restored store has lost.
UNKNOWN_KEPT: Final = timedelta(days=30)
# What nobody has looked at for longer than this may have been put back without being told.
UNSEEN_MAX: Final = timedelta(days=7)
# Whoever looks through many contents pauses after so many, for those who want to stop it.
LOOKED_AT_ONCE: Final = 1_000
# How long nothing was appended to a part that goes while there are uploads, however short the grace is.
PART_SECONDS_MIN: Final = 3600.0

_TIMES: Final = struct.Struct(">QQ")  # when a timeline began, and when a server last had a look
_NOTED_EVERY: Final = timedelta(hours=1)
_MICROSECOND: Final = timedelta(microseconds=1)

T = TypeVar("T")

_log = get_logger("tidelog.files")


class Wanted(NamedTuple):
    """
    A content as somebody names it.

    Attributes:
        sha256: Its SHA-256: 32 bytes.
        size: Its length in bytes.
    """

    sha256: bytes
    size: int

    def check(self) -> None:
        """Raise InvalidValue if there can be no such content."""
        if len(self.sha256) != SHA256_BYTES:
            raise InvalidValue(f"a SHA-256 has {SHA256_BYTES} bytes, got {len(self.sha256)}")
        if self.size < 0:
            raise InvalidValue(f"a content of {self.size} bytes")


class Standing(NamedTuple):
    """
    How a content stands for one user.

    Attributes:
        is_present: Whether the user's operations may refer to it.
        is_too_large: Whether the server takes none of this size.
        received_bytes: How far an interrupted upload got.
    """

    is_present: bool = False
    is_too_large: bool = False
    received_bytes: int = 0


class Files:
    """
    The contents of all tenants.

    Threads call it, and may be kept waiting.

    Args:
        application: Says who may read what.
        store: Keeps the records.
        contents: Keeps the bytes.
        clock: Returns the time in microseconds since 1970.
        bytes_max: How large a content may be that is uploaded.
    """

    def __init__(
        self,
        application: Application,
        store: Store,
        contents: ContentStore,
        clock: Callable[[], int],
        *,
        bytes_max: int = FILE_BYTES_MAX_DEFAULT,
    ) -> None:
        self.contents = contents
        self._application = application
        self._store = store
        self._clock = clock
        self._bytes_max = bytes_max
        self._parts = Parts(contents)
        self._being_changed: KeyedLocks[tuple[str, bytes]] = KeyedLocks()
        self._known_tenants: set[str] = set()

    def stat(self, principal: Principal, wanted: Sequence[Wanted]) -> list[Standing]:
        """Tell how contents stand. Operations of the user may refer to those that are present, from now on."""
        tenant = principal.tenant
        asked = dict.fromkeys(wanted)  # once each, however often
        entitled = self._entitled(principal, asked)
        there = {one for one in entitled if self.contents.size(tenant, one.sha256) == one.size}
        for one in entitled - there:
            self._forget_lost(tenant, one)
        present = self._granted(principal, there) if there else there
        standings = {
            one: Standing(is_present=True)
            if one in present
            else Standing(is_too_large=True)
            if one.size > self._bytes_max
            else Standing(received_bytes=self.contents.part_size(tenant, part_name(principal.user_id, one.sha256)))
            for one in asked
        }
        return [standings[one] for one in wanted]

    def begin_upload(self, principal: Principal, wanted: Wanted, offset: int) -> Incoming:
        """
        Begin an upload, or go on with one. A former one of the same content by the same user ends.

        Raises:
            FileTooLarge: The server takes no content of that size.
            PartMismatch: *offset* is not how far the upload got.
        """
        if wanted.size > self._bytes_max:
            raise FileTooLarge(f"a file of {wanted.size} bytes: the limit is {self._bytes_max}")
        tenant, part = principal.tenant, part_name(principal.user_id, wanted.sha256)
        self._make_known(tenant)
        complete = partial(self._complete, tenant, part, wanted, principal.user_id)
        return self._parts.begin(tenant, part, offset, wanted.size, complete)

    def download(
        self, principal: Principal, sha256: bytes, key: ObjectKey, offset: int, length: int
    ) -> Generator[bytes, None, None]:
        """
        Return a content, or *length* bytes of it (0: all), from *offset* on, in pieces that fit a message.

        Raises:
            NotFound: The user may read no attribute of the object that refers to it.
            RequestInvalid: It has no such bytes.
            ContentLost: At any step: it is not there any more.
        """
        size = self._readable_size(principal, sha256, key)
        if not 0 <= offset <= size or length < 0:
            raise RequestInvalid(f"{length} bytes from {offset} on, of a file of {size} bytes")
        return self.read(principal.tenant, Wanted(sha256, size), offset, min(length or size, size - offset))

    def open(self, tenant: str, wanted: Wanted) -> BinaryIO:
        """Open a content to be read. Raises ContentLost, also later."""
        self._check_there(tenant, wanted)
        return open_content(partial(self.contents.read, tenant, wanted.sha256), wanted.size)

    def read(self, tenant: str, wanted: Wanted, offset: int, length: int) -> Generator[bytes, None, None]:
        """Yield *length* bytes of a content from *offset* on. Raises ContentLost, with the first step if it can."""
        self._check_there(tenant, wanted)
        if not length:
            return
        pieces = self.contents.read(tenant, wanted.sha256, offset)
        try:
            for piece in pieces:
                yield piece[:length]
                length -= len(piece)
                if length <= 0:
                    return
        finally:
            pieces.close()
        raise ContentLost(f"the content {wanted.sha256.hex()} ended early")

    def add(self, tenant: str, source: BinaryIO, user_id: str = SERVICE) -> Wanted:
        """
        Store what a stream holds, for a user or the service itself. It is kept for a while: nobody refers to it.

        Raises:
            StorageError: It cannot be stored; or a hook adds it, on whose end the store waits.
        """
        # Before anything waits: whoever completes the same content may wait for the store with its lock.
        self._store.check_outside_of_jobs()
        self._make_known(tenant)
        part = f"own{uuid4().hex}"
        size = 0
        digest = hashlib.sha256()
        with self._parts.being_added(tenant, part):
            try:
                while piece := source.read(FILE_CHUNK_BYTES):
                    self.contents.append(tenant, part, size, piece)
                    digest.update(piece)
                    size += len(piece)
            except BaseException:
                self.contents.discard(tenant, part)
                raise
            wanted = Wanted(digest.digest(), size)
            self._complete(tenant, part, wanted, user_id)
        return wanted

    def collect(self, tenant: str, sha256: bytes, before_us: int) -> int:
        """Delete a content that nothing has referred to since a time; return how many were."""
        with self._alone(tenant, sha256):
            count = self._write(tenant, partial(without_content, sha256=sha256, before_us=before_us))
            if count:
                self.contents.delete(tenant, sha256)
        return count

    def collect_unknown(self, tenant: str, before_us: int) -> Iterator[int]:
        """
        Delete contents that have not been on record for long, one after the other; yield how many were.

        What somebody refers to comes back on record, if it is whole: its place was out of reach for a while.
        What nobody knows may be what a store that was put back has lost, and is kept for as long as that
        may be offered again, however it was put back.
        """
        is_settled = self.note_timeline()
        gone_before_us = min(before_us, self._clock() - UNKNOWN_KEPT // _MICROSECOND)
        for number, content in enumerate(self.contents.contents(tenant)):
            if not number % LOOKED_AT_ONCE:
                yield 0
            time_us = content.time * 1_000_000
            if time_us < before_us and not self._is_on_record(tenant, content.sha256):
                with self._alone(tenant, content.sha256):
                    if self._is_needed(tenant, content.sha256):
                        self._record_again(tenant, content)
                    elif is_settled and time_us < gone_before_us and not self._is_on_record(tenant, content.sha256):
                        self.contents.delete(tenant, content.sha256)
                        yield 1

    def delete_leftovers(self, tenant: str, older_than_seconds: float) -> int:
        """Delete what is left of uploads; return how many. While somebody uploads, nothing young goes."""
        if self._parts.is_any_on_its_way(tenant):
            older_than_seconds = max(older_than_seconds, PART_SECONDS_MIN)
        return self.contents.delete_leftovers(tenant, older_than_seconds)

    def note_timeline(self) -> bool:
        """
        Note when the store's timeline began, unless that is known; tell whether it is a while ago.

        After a restore the store does not know what has come since the backup, nor what has come to refer to
        what it knows, and may come to know it once more: from those who offer it again. Till then contents are
        kept. A store that nobody has looked at for a while may be an older state of itself and not know that.
        """
        timeline, now_us = self._store.identity.timeline.encode(), self._clock()
        known = self._store.note(TIMELINE_NOTE)
        is_new = known[_TIMES.size :] != timeline
        began_us, looked_us = (0, 0) if is_new else _TIMES.unpack_from(known)
        since_us = abs(now_us - looked_us)  # a clock may have been ahead
        if is_new or since_us > UNSEEN_MAX // _MICROSECOND:
            began_us = now_us if known or self._store.tenants() else 0
        if is_new or since_us > _NOTED_EVERY // _MICROSECOND:
            self._store.set_note(TIMELINE_NOTE, _TIMES.pack(began_us, now_us) + timeline)
        return not began_us or now_us - began_us > UNKNOWN_KEPT // _MICROSECOND

    @contextmanager
    def _alone(self, tenant: str, sha256: bytes) -> Iterator[None]:
        """Let nobody else make or collect a content meanwhile."""
        with self._being_changed.held((tenant, sha256)):
            yield

    def _is_on_record(self, tenant: str, sha256: bytes) -> bool:
        with self._store.read(tenant) as reader:
            return content_record(sha256, reader.index) is not None

    def _is_needed(self, tenant: str, sha256: bytes) -> bool:
        """Tell whether anything refers to a content, or is about to."""
        with self._store.read(tenant) as reader:
            return is_referred_to(reader, sha256)

    def _record_again(self, tenant: str, content: Content) -> None:
        """Put a content on record that lost its record, unless what is there is something else."""
        digest = hashlib.sha256()
        for piece in self.contents.read(tenant, content.sha256):
            digest.update(piece)
        if digest.digest() == content.sha256:
            record = pack_content(ContentRecord(content.size, self._clock()))
            self._write(tenant, lambda reader: (_entries(reader, {content_key(content.sha256): record}), None))
            _log.info("a content is back", tenant=tenant, sha256=content.sha256.hex())

    def _complete(self, tenant: str, part: str, wanted: Wanted, user_id: str) -> None:
        """Make a part a content that operations of a user may refer to."""
        with self._alone(tenant, wanted.sha256):
            self.contents.complete(tenant, part, wanted.sha256, wanted.size)
            time_us = self._clock()
            entries: IndexWrites = {
                content_key(wanted.sha256): pack_content(ContentRecord(wanted.size, time_us)),
                grant_key(wanted.sha256, user_id): pack_grant(time_us, is_upload=True),
            }
            self._write(tenant, lambda reader: (_entries(reader, entries), None))

    def _entitled(self, principal: Principal, wanted: Iterable[Wanted]) -> set[Wanted]:
        """
        Return those of the contents on record which the user has uploaded, or may read by some object now.

        What he was told before is no reason: who asks every day would never lose what he may not read any more.
        """
        rights = self._application.rights(principal) if self._application.access_rules else None
        asked = {one.sha256: False for one in wanted}
        entitled = set()
        with self._store.read(principal.tenant) as reader:
            overlay = Overlay(reader)
            rules = FileRules(overlay, rights, user_id=principal.user_id, asked=asked)
            for sha256 in asked:
                # Once each, and of what is not there too: the time it takes should not tell.
                asked[sha256] = rules.has_uploaded(sha256, principal.user_id) or rules.reads(sha256)
                overlay.let_go()  # of a thousand contents, referred to by large objects
            for one in wanted:
                record = content_record(one.sha256, reader.index)
                if asked[one.sha256] and record is not None and record.size == one.size:
                    entitled.add(one)
        return entitled

    def _granted(self, principal: Principal, there: set[Wanted]) -> set[Wanted]:
        """Let a user refer to contents, as far as they are still on record; return which."""

        def job(reader: Reader) -> tuple[Writes, set[Wanted]]:
            kept = {one for one in there if content_record(one.sha256, reader.index) is not None}
            keys = [grant_key(one.sha256, principal.user_id) for one in kept]
            time_us = self._clock()
            entries: IndexWrites = {key: renewed_grant(reader.index(key), time_us) for key in keys}
            return _entries(reader, entries), kept

        return self._write(principal.tenant, job)

    def _forget_lost(self, tenant: str, lost: Wanted) -> None:
        """Take the record of a content that is not there: whoever has it may upload it once more."""
        with self._alone(tenant, lost.sha256):
            if self.contents.size(tenant, lost.sha256) != lost.size:
                _log.error("a content was lost", tenant=tenant, sha256=lost.sha256.hex())
                self._write(tenant, lambda reader: (_entries(reader, {content_key(lost.sha256): None}), None))

    def _check_there(self, tenant: str, wanted: Wanted) -> None:
        found = self.contents.size(tenant, wanted.sha256)
        if found != wanted.size:
            what = "is not there" if found is None else f"has {found} bytes instead of {wanted.size}"
            _log.error("a content was lost", tenant=tenant, sha256=wanted.sha256.hex(), detail=what)
            raise ContentLost(f"the content {wanted.sha256.hex()} {what}")

    def _readable_size(self, principal: Principal, sha256: bytes, key: ObjectKey) -> int:
        with self._store.read(principal.tenant) as reader:
            state = reader.objects((key,)).get(key)
        if state is not None and not state.deleted:
            rights = self._application.rights(principal).entity(key[0])
            readable = rights.readable(decode_trusted(state.attributes)) or {}
            for _, reference in file_references(readable):
                if reference.sha256 == sha256:
                    return reference.size
        raise NotFound(f"{key[0]} {key[1]!r} refers to no such file", reason="FILE_NOT_FOUND")

    def _make_known(self, tenant: str) -> None:
        """Have the store know a tenant: what is left of an upload is found by way of those it knows."""
        if tenant not in self._known_tenants:
            if tenant not in self._store.tenants():
                self._write(tenant, lambda reader: (_entries(reader, {}), None))
            self._known_tenants.add(tenant)

    def _write(self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]]) -> T:
        written: Future[T] = self._store.submit(tenant, job)
        return written.result()


def _entries(reader: Reader, entries: IndexWrites) -> Writes:
    return Writes({}, [], None, [], [], reader.head().version, entries)

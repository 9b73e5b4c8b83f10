"""
Files: the contents that a server keeps, and what its records say of them, kept in step.

A content is in the content store before it is on record, and off the record before it is
deleted: so what is on record is there. Which copy of it, and why that holds however many
servers share the records and the content store, is told in `_upload_records`. What a
crash leaves in between is a copy that nobody knows of, which is collected.

A copy that is found lost or damaged is noted as broken, and its content passes for
missing from then on: whoever has it is asked to upload it once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import BinaryIO, Final, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from tidelog._contents import SHA256_BYTES, Content
from tidelog._errors import DiskFull, InvalidValue, StorageError
from tidelog._file_reference import file_references
from tidelog._keys import ObjectKey
from tidelog._limits import FILE_BYTES_MAX_DEFAULT, FILE_CHUNK_BYTES
from tidelog._logging import get_logger
from tidelog._values import decode_trusted
from tidelog_server._application import Application
from tidelog_server._collection import is_held_by_any, without_content
from tidelog_server._content_reader import open_content
from tidelog_server._content_store import ContentLost, ContentStore
from tidelog_server._errors import FileTooLarge, NotFound, RequestInvalid, StoreUnavailable, UploadSuperseded
from tidelog_server._file_records import (
    FOUND_AGAIN,
    SERVICE,
    ContentRecord,
    content_key,
    content_record,
    grant_key,
    kept_record,
    pack_content,
    renewed_grant,
    unpack_grant,
)
from tidelog_server._file_rules import FileRules
from tidelog_server._incoming import Incoming, Parts, part_name
from tidelog_server._indexes import IndexWrites
from tidelog_server._overlay import Overlay
from tidelog_server._place import Place
from tidelog_server._principal import Principal
from tidelog_server._records import Writes
from tidelog_server._sightings import NOTED_EVERY, UNKNOWN_KEPT, Sightings
from tidelog_server._store import Reader, Store
from tidelog_server._upload_records import (
    Begun,
    begun,
    completed,
    counting,
    due_uploads,
    is_begun,
    new_copy,
    upload_key,
    upload_record,
    without_uploads,
)

# What a server notes in its store about when it was looked at.
TIMELINE_NOTE: Final = "timeline seen"
# Whoever looks through many contents pauses after so many, for those who want to stop it.
LOOKED_AT_ONCE: Final = 1_000
# How long nothing was appended to a part that goes while there are uploads, however short the grace is.
PART_SECONDS_MIN: Final = 3600.0
PART_US_MIN: Final = int(PART_SECONDS_MIN * 1_000_000)
FILE_GRACE_DEFAULT: Final = timedelta(days=1)
# What is gone on with, or asked for, is noted so many times in a grace period at the most, and kept that much longer.
RENEWALS: Final = 32

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
        takes_room: Whether it takes some of the room for what no operation of the user refers to yet.
    """

    is_present: bool = False
    is_too_large: bool = False
    received_bytes: int = 0
    takes_room: bool = False


class Each(Protocol):
    """Calls a function with each of some contents; what comes of it is in their order. `map` is one."""

    def __call__(self, function: Callable[[Wanted], T], wanted: Iterable[Wanted], /) -> Iterable[T]:
        """Return what the function returns."""
        ...


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
        room_bytes: How much a user may have uploaded that no operation of his refers to yet. None: whatever it is.
        grace: How long contents are kept that nothing refers to, or not yet.
    """

    def __init__(
        self,
        application: Application,
        store: Store,
        contents: ContentStore,
        clock: Callable[[], int],
        *,
        bytes_max: int = FILE_BYTES_MAX_DEFAULT,
        room_bytes: int | None = None,
        grace: timedelta = FILE_GRACE_DEFAULT,
    ) -> None:
        self.contents = contents
        self._application = application
        self._store = store
        self._clock = clock
        self._bytes_max = bytes_max
        self.room_bytes = room_bytes
        self._grace_us = grace // timedelta(microseconds=1)
        self._renewal_us = self._grace_us // RENEWALS
        # The note of when the store was looked at, as this process saw it last.
        self._seen = Sightings()
        self.place = Place(store, contents)
        self._parts = Parts(contents, clock)

    def stat(self, principal: Principal, wanted: Sequence[Wanted], each: Each = map) -> list[Standing]:
        """
        Tell how contents stand. Operations of the user may refer to those that are present, from now on.

        Args:
            principal: The user.
            wanted: The contents.
            each: Calls a function with contents, several at once if it likes; what it takes waits for their place.
        """
        tenant = principal.tenant
        asked = dict.fromkeys(wanted)  # once each, however often
        entitled = self._entitled(principal, asked)
        found = each(lambda one: self._is_kept(tenant, one.sha256, entitled[one]), entitled)
        there = {one for one, is_there in zip(entitled, found, strict=True) if is_there}
        present = self._granted(principal, there) if there else there
        with self._store.read(tenant) as reader:
            stale_us = self._clock() - self._grace_us
            counted = counting(reader, principal.user_id, {one.sha256 for one in asked}, stale_us)

        def standing(one: Wanted) -> Standing:
            counts = one.sha256 in counted
            if one in present:
                return Standing(is_present=True, takes_room=counts)
            if one.size > self._bytes_max:
                return Standing(is_too_large=True, takes_room=counts)
            part = part_name(principal.user_id, one.sha256)
            return Standing(received_bytes=self.contents.part_size(tenant, part), takes_room=counts)

        standings = dict(zip(asked, each(standing, asked), strict=True))
        return [standings[one] for one in wanted]

    def begin_upload(self, principal: Principal, wanted: Wanted, offset: int, uploader: str = "") -> Incoming:
        """
        Begin an upload, or go on with one. A former one of the same content by the same user ends.

        Unless it is that of another *uploader*, and gets ahead: then that one is waited for.

        Raises:
            FileTooLarge: The server takes no content of that size.
            FileRoomExhausted: The user has uploaded too much that no operation of his refers to.
            PartMismatch: *offset* is not how far the upload got.
        """
        if wanted.size > self._bytes_max:
            raise FileTooLarge(f"a file of {wanted.size} bytes: the limit is {self._bytes_max}")
        tenant, part = principal.tenant, part_name(principal.user_id, wanted.sha256)
        self.place.check(marks=True)
        self._begin(tenant, wanted, principal.user_id, self.room_bytes)

        def complete() -> Callable[[], None]:
            return self._complete(tenant, part, wanted, principal.user_id)

        return self._parts.begin(tenant, part, offset, wanted.size, complete, uploader)

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
        """
        Open a content to be read.

        Raises:
            ContentLost, StoreUnavailable: It is not there; or where it lies is not. Also later.
        """
        with _for_now():
            record = self._located(tenant, wanted)

        def pieces(offset: int) -> Generator[bytes, None, None]:
            with _for_now():
                yield from self._pieces(tenant, wanted.sha256, record, offset)

        return open_content(pieces, wanted.size)

    def read(self, tenant: str, wanted: Wanted, offset: int, length: int) -> Generator[bytes, None, None]:
        """
        Yield *length* bytes of a content from *offset* on. Raises ContentLost, with the first step if it can.

        All of it is compared with its hash on the way, before the last piece.
        """
        record = self._located(tenant, wanted)
        if not length:
            return
        digest = hashlib.sha256() if length == wanted.size else None
        pieces = self._pieces(tenant, wanted.sha256, record, offset)
        try:
            for piece in pieces:
                length -= len(piece)
                if digest is not None:
                    digest.update(piece)
                    if length <= 0 and digest.digest() != wanted.sha256:
                        self._note_broken(tenant, wanted.sha256, record, "it has another hash")
                        raise ContentLost(f"the content {wanted.sha256.hex()} is damaged")
                yield piece if length >= 0 else piece[:length]
                if length <= 0:
                    return
        finally:
            pieces.close()
        raise ContentLost(f"the content {wanted.sha256.hex()} ended early")

    def _pieces(self, tenant: str, sha256: bytes, record: ContentRecord, offset: int) -> Generator[bytes, None, None]:
        """Yield a content from *offset* on, the rest of it from another copy if that takes its place meanwhile."""
        lost: set[str] = set()
        while True:
            pieces = self.contents.read(tenant, sha256, offset, record.copy)
            try:
                for piece in pieces:
                    offset += len(piece)
                    yield piece
                return
            except ContentLost:
                other = self._other(tenant, sha256, record, lost)
                if other is None:
                    raise
                record = other
            finally:
                pieces.close()

    def add(self, tenant: str, source: BinaryIO, user_id: str = SERVICE) -> Wanted:
        """
        Store what a stream holds, for a user or the service itself. It is kept for a while: nobody refers to it.

        Raises:
            StorageError: It cannot be stored; or a hook adds it, on whose end the store waits.
        """
        # Before anything waits: who completes it waits for the store.
        self._store.check_outside_of_jobs()
        self.place.check(marks=True)
        if tenant not in self._store.tenants():  # else nobody would find what a crash leaves
            self._write(tenant, _known)
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
            delete_former = self._complete(tenant, part, wanted, user_id)
        delete_former()
        return wanted

    def collect(self, tenant: str, sha256: bytes, before_us: int) -> int:
        """Delete a content that nothing has referred to since a time; return how many were."""
        self.place.check()
        copy = self._write(tenant, partial(without_content, sha256=sha256, before_us=before_us))
        if copy is None:
            return 0
        self.contents.delete(tenant, sha256, copy)
        return 1

    def collect_uploads(self, tenant: str, before_us: int) -> Iterator[int]:
        """
        Give up uploads that nobody has gone on with since a time; yield now and then.

        A copy that is there all the same is left to `collect_unknown`: a store that was put back may have lost
        that the upload came to its end.
        """
        before_us = min(before_us, self._clock() - PART_US_MIN)
        after = b""
        more = True
        while more:
            with self._store.read(tenant) as reader:
                due, after = due_uploads(reader, after, before_us)
            if due:
                self._write(tenant, partial(_given_up, keys=due, before_us=before_us))
            more = bool(after)
            yield 0

    def collect_unknown(self, tenant: str, before_us: int) -> Iterator[int]:
        """
        Delete copies that have been gone for long, one after the other; yield how many were.

        What somebody refers to and nobody has comes back on record, if it is whole. What nobody knows may be what
        a store that was put back has lost, and is kept for as long as that may be offered again, however it was put
        back.
        """
        self.place.check()
        gone_us = self.note_timeline() - UNKNOWN_KEPT // _MICROSECOND
        for number, content in enumerate(self.contents.contents(tenant)):
            if not number % LOOKED_AT_ONCE:
                yield 0
            time_us = content.time * 1_000_000
            if not self._is_gone(tenant, content):
                continue
            with self._store.read(tenant) as reader:
                record = content_record(content.sha256, reader.index)
                is_held = is_held_by_any(reader, content.sha256)
            is_there = record is not None and self._is_kept(tenant, content.sha256, record)
            if is_held and not is_there and self._stands_in(tenant, content):
                continue
            if time_us >= min(before_us, gone_us):
                continue
            if record is not None and is_there and not self._is_whole(tenant, content.sha256, record):
                self._note_broken(tenant, content.sha256, record, "it has another hash")
                continue  # the next time it is put back
            self.contents.delete(tenant, content.sha256, content.copy)
            yield 1

    def mend(self, tenant: str, sha256: bytes) -> None:
        """Look at a content that was broken: if somebody put it back, it is there again."""
        with self._store.read(tenant) as reader:
            record = kept_record(sha256, reader.index)
        if record is None or not record.is_broken or not self._is_whole(tenant, sha256, record):
            return
        if self._note(tenant, sha256, record, is_broken=False):
            _log.info("a content is back", tenant=tenant, sha256=sha256.hex())

    def delete_leftovers(self, tenant: str, older_than_seconds: float) -> int:
        """Delete what is left of uploads; return how many. While somebody uploads, nothing young goes."""
        if self._parts.is_any_on_its_way(tenant):
            older_than_seconds = max(older_than_seconds, PART_SECONDS_MIN)
        self.place.check()
        return self.contents.delete_leftovers(tenant, older_than_seconds)

    def note_timeline(self) -> int:
        """Note that somebody looks at the store; return up to when it knows for sure what became of contents."""
        timeline, now_us = self._store.identity.timeline.encode(), self._clock()
        while True:
            noted = self._store.note(TIMELINE_NOTE)
            known = Sightings.unpack(noted)
            was_seen = self._seen.timeline == timeline and self._seen.looked_us <= known.looked_us
            is_empty = known == Sightings() and not self._store.tenants()
            now = known.looked(timeline, now_us, was_seen=was_seen, is_empty=is_empty)
            if not known.is_due(now_us, NOTED_EVERY) and known == now._replace(looked_us=known.looked_us):
                self._seen = known
                return now.sure_us
            # Not over what another server has noted meanwhile.
            if self._store.set_note(TIMELINE_NOTE, now.pack(), expected=noted):
                self._seen = now
                return now.sure_us

    def _is_gone(self, tenant: str, content: Content) -> bool:
        """Tell whether a copy, which is there, is neither on record nor on its way there: it never will be."""
        with self._store.read(tenant) as reader:
            record = kept_record(content.sha256, reader.index)
            is_on_record = record is not None and record.copy == content.copy
            return not is_on_record and not is_begun(reader, content.sha256, content.copy)

    def _stands_in(self, tenant: str, content: Content) -> bool:
        """Tell whether a copy is whole. It is put back; where there is no room for that it is read as it is."""
        try:
            return self._put_back(tenant, content)
        except DiskFull as error:
            sha256 = content.sha256.hex()
            _log.warning("a content is not put back yet", tenant=tenant, sha256=sha256, detail=str(error))
            return True

    def _put_back(self, tenant: str, content: Content) -> bool:
        """
        Make another copy of one that is gone, which does not come back itself; tell whether it is whole.

        Raises:
            DiskFull: There is no room for another one.
        """
        if not self._is_whole(tenant, content.sha256, ContentRecord(content.size, 0, content.copy)):
            return False
        pieces = partial(self.contents.read, tenant, content.sha256, copy=content.copy)
        self.add(tenant, open_content(pieces, content.size), FOUND_AGAIN)
        _log.info("a content is back", tenant=tenant, sha256=content.sha256.hex())
        return True

    def _begin(self, tenant: str, wanted: Wanted, user_id: str, room_bytes: int | None = None) -> str:
        """Begin an upload, or go on with one; return the name of its copy."""
        now_us = self._clock()
        with self._store.read(tenant) as reader:
            known = upload_record(upload_key(user_id, wanted.sha256), reader.index)
        if (
            known is not None
            and known.copy
            and known.size == wanted.size
            and now_us < known.time_us + self._renewal_us
        ):
            return known.copy

        def job(reader: Reader) -> tuple[Writes | None, Begun]:
            made = begun(
                reader,
                user_id,
                *wanted,
                copy=new_copy(user_id),
                time_us=now_us,
                room_bytes=room_bytes,
                stale_us=now_us - self._grace_us,
            )
            return _entries(reader, made.writes) if made.writes else None, made

        made = self._write(tenant, job)
        if made.refusal is not None:
            raise made.refusal
        return made.copy

    def _complete(self, tenant: str, part: str, wanted: Wanted, user_id: str) -> Callable[[], None]:
        """
        Make a part a content that operations of a user may refer to.

        Returns what is left to do: how long that takes tells whether there was another copy, which not everybody
        may know.
        """
        copy = self._begin(tenant, wanted, user_id)  # it may have taken so long that it was given up
        try:
            self.contents.complete(tenant, part, *wanted, copy)
        finally:
            self.place.check()  # before anything is promised, or the client is blamed

        def job(reader: Reader) -> tuple[Writes | None, tuple[str | None] | None]:
            done = completed(reader, user_id, *wanted, copy=copy, time_us=self._clock())
            return (None, None) if done is None else (_entries(reader, done[0]), done[1:])

        done = self._write(tenant, job)
        if done is None:
            raise UploadSuperseded("the upload took so long that it was given up: begin anew")
        former = done[0]

        def delete_former() -> None:
            if former is not None:
                try:
                    self.contents.delete(tenant, wanted.sha256, former)
                except StorageError as error:  # it is collected
                    _log.warning("a copy of a content could not be deleted", tenant=tenant, detail=str(error))

        return delete_former

    def _entitled(self, principal: Principal, wanted: Iterable[Wanted]) -> dict[Wanted, ContentRecord]:
        """
        Return those of the contents on record which the user has uploaded, or may read by some object now.

        What he was told before is no reason: who asks every day would never lose what he may not read any more.
        """
        rights = self._application.rights(principal) if self._application.access_rules else None
        user_id = principal.user_id
        asked = {one.sha256: False for one in wanted}
        entitled = {}
        with self._store.read(principal.tenant) as reader:
            overlay = Overlay(reader)
            overlay.prefetch_index(chain.from_iterable((content_key(one), grant_key(one, user_id)) for one in asked))
            rules = FileRules(overlay, rights, user_id=user_id, asked=asked)
            for sha256 in asked:
                # Once each, and of what is not there too: the time it takes should not tell.
                asked[sha256] = rules.has_uploaded(sha256, user_id) or rules.reads(sha256)
            for one in wanted:
                record = content_record(one.sha256, overlay.index)
                if asked[one.sha256] and record is not None and record.size == one.size:
                    entitled[one] = record
        return entitled

    def _granted(self, principal: Principal, there: set[Wanted]) -> set[Wanted]:
        """Let a user refer to contents, as far as they are still on record; return which."""
        now_us = self._clock()

        def job(reader: Reader) -> tuple[Writes | None, set[Wanted]]:
            records = reader.indexes(content_key(one.sha256) for one in there)
            kept = {one for one in there if content_record(one.sha256, records.get) is not None}
            keys = {grant_key(one.sha256, principal.user_id) for one in kept}
            given = reader.indexes(keys)
            entries: IndexWrites = {
                key: renewed_grant(value, now_us)
                for key, value in ((key, given.get(key)) for key in keys)
                if value is None or unpack_grant(value) <= now_us - self._renewal_us
            }
            return _entries(reader, entries) if entries else None, kept

        with self._store.read(principal.tenant) as reader:
            writes, kept = job(reader)
        # What has a grant that is young stays on record.
        return kept if writes is None else self._write(principal.tenant, job)

    def _is_kept(self, tenant: str, sha256: bytes, record: ContentRecord) -> bool:
        """Tell whether a content is there; if not, note that."""
        found = self._size(tenant, sha256, record)
        if found == record.size:
            return True
        if (other := self._replaced(tenant, sha256, record)) is not None:
            return self._is_kept(tenant, sha256, other)
        # A store that was put back does not know the copy that has come since.
        for content in self.contents.copies(tenant, sha256):
            is_other = content.size == record.size and content.copy != record.copy
            if is_other and self._stands_in(tenant, content):
                return True
        self._note_broken(tenant, sha256, record, _amiss(found, record))
        return False

    def _other(self, tenant: str, sha256: bytes, record: ContentRecord, lost: set[str]) -> ContentRecord | None:
        """
        Return the record of a content whose copy is lost as it would be of another copy, which is to be read.

        That has taken its place just now; or long ago, which a store that was put back does not know. Nothing is
        written: hooks read, too.

        Args:
            tenant: The tenant.
            sha256: The content.
            record: What was on record.
            lost: The copies that were found lost before.
        """
        lost.add(record.copy)
        other = self._replaced(tenant, sha256, record)
        if other is not None and other.copy not in lost:
            return other
        copies = (one.copy for one in self.contents.copies(tenant, sha256) if one.size == record.size)
        return next((record._replace(copy=copy) for copy in copies if copy not in lost), None)

    def _replaced(self, tenant: str, sha256: bytes, record: ContentRecord) -> ContentRecord | None:
        """Return the record of a content if another copy has taken the place of the one that is on *record*."""
        with self._store.read(tenant) as reader:
            known = content_record(sha256, reader.index)
        return known if known is not None and known.copy != record.copy and known.size == record.size else None

    def _size(self, tenant: str, sha256: bytes, record: ContentRecord) -> int | None:
        """Return the length of a content, None if it is not there. Raises StorageError where nobody can tell."""
        found = self.contents.size(tenant, sha256, record.copy)
        if found != record.size:
            self.place.check()
            found = self.contents.size(tenant, sha256, record.copy)  # the place may be back just now
        return found

    def _is_whole(self, tenant: str, sha256: bytes, record: ContentRecord) -> bool:
        """Tell whether a content is there, and what it should be. All of it is read."""
        if self._size(tenant, sha256, record) != record.size:
            return False
        digest = hashlib.sha256()
        try:
            for piece in self.contents.read(tenant, sha256, copy=record.copy):
                digest.update(piece)
        except ContentLost:
            return False
        return digest.digest() == sha256

    def _located(self, tenant: str, wanted: Wanted) -> ContentRecord:
        """Return the record of a content that is there. Raises ContentLost."""
        with self._store.read(tenant) as reader:
            record = content_record(wanted.sha256, reader.index)
        if record is None or record.size != wanted.size:
            raise ContentLost(f"the content {wanted.sha256.hex()} is not there, or not whole")
        lost: set[str] = set()
        while (found := self._size(tenant, wanted.sha256, record)) != record.size:
            if (other := self._other(tenant, wanted.sha256, record, lost)) is not None:
                record = other
                continue
            what = _amiss(found, record)
            _log.error("a content was lost", tenant=tenant, sha256=wanted.sha256.hex(), detail=what)
            raise ContentLost(f"the content {wanted.sha256.hex()}: {what}")
        return record

    def _note_broken(self, tenant: str, sha256: bytes, record: ContentRecord, what: str) -> None:
        """Note that a content is lost or damaged: whoever has it may upload it once more."""
        if self._note(tenant, sha256, record, is_broken=True):
            _log.error("a content was lost", tenant=tenant, sha256=sha256.hex(), detail=what)

    def _note(self, tenant: str, sha256: bytes, record: ContentRecord, *, is_broken: bool) -> bool:
        """Note whether a copy is broken; tell whether that is new, and the copy still on record."""

        def job(reader: Reader) -> tuple[Writes | None, bool]:
            known = kept_record(sha256, reader.index)
            if known is None or known.copy != record.copy or known.is_broken is is_broken:
                return None, False
            return _entries(reader, {content_key(sha256): pack_content(known._replace(is_broken=is_broken))}), True

        return self._write(tenant, job)

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

    def _write(self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]]) -> T:
        written: Future[T] = self._store.submit(tenant, job)
        return written.result()


@contextmanager
def _for_now() -> Generator[None, None, None]:
    """Have what is out of reach pass for that, and not for a mistake of whoever reads: hooks do, too."""
    try:
        yield
    except StorageError as error:
        raise StoreUnavailable(str(error)) from error


def _amiss(found: int | None, record: ContentRecord) -> str:
    return "it is not there" if found is None else f"it has {found} bytes instead of {record.size}"


def _known(reader: Reader) -> tuple[Writes, None]:
    return _entries(reader, {}), None


def _given_up(reader: Reader, keys: list[bytes], before_us: int) -> tuple[Writes, None]:
    return _entries(reader, without_uploads(reader, keys, before_us)), None


def _entries(reader: Reader, entries: IndexWrites) -> Writes:
    return Writes({}, [], None, [], [], reader.head().version, entries)

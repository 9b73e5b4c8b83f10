"""
Upload records: what is on its way, or came and nothing refers to it yet. No I/O.

    w digest of user sha256  -> size time copy user   an upload has begun; without a copy: it came
    w digest of user         -> bytes                 what all of these cost

They say which copies a server may still put on record, and so decide what may be
deleted, however many servers share the records and the place of the contents, and
however long one of them was asleep. A copy is made of an upload, under a name that no
other one ever has, and it is in one of these states, which only transactions change:

    begun       an upload names it
    on record   the content's record names it
    gone        nothing names it

It begins before anything of it is stored; goes on record once all of it is, if it is still
begun then; and is deleted once it is gone. Nothing that is gone comes back, for a name
is given once, and only what is begun goes on record. So what is on record was never gone,
nobody has ever set out to delete it, and it is there. What is there and gone is nobody's,
whoever put it there, and whenever: it is deleted by whoever finds it.

An upload counts for its user from its beginning until an operation of his refers to the
content, applied or refused, or it is given up: so nobody fills the disk with what nothing
needs. What came long ago makes room where there is none: else operations of which each has
some of what it needs would block each other for good. It does not count any more then, and its
user is not told that it is there, so that nobody keeps a content for good by asking for it
again and again. But his operations may still refer to it for as long as a grant lasts, counted
from then: a device that is about to may have nothing of it to send again.

What others have makes no difference to that, nor to what is done with the bytes,
which replace the copy on record, if there is one: it tells nobody what others have.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from tidelog._contents import SHA256_BYTES
from tidelog._limits import FILE_COST_BYTES
from tidelog_server._errors import FileRoomExhausted
from tidelog_server._file_records import (
    ContentRecord,
    Lookup,
    content_key,
    failures_prefix,
    grant_key,
    is_upload_grant,
    kept_record,
    pack_content,
    pack_grant,
    unpack_grant,
)
from tidelog_server._indexes import IndexWrites
from tidelog_server._store import Reader

UPLOADS: Final = b"w"

# How many uploads are looked at to find some that do not count any more.
LOOKED_AT: Final = 500

_USER_BYTES: Final = 8
_USER_KEY_BYTES: Final = len(UPLOADS) + _USER_BYTES
_KEY_BYTES: Final = _USER_KEY_BYTES + SHA256_BYTES

_UPLOAD: Final = struct.Struct(">QQB")
_BYTES: Final = struct.Struct(">Q")


class UploadRecord(NamedTuple):
    """
    An upload that has begun.

    Attributes:
        size: How many bytes it has.
        time_us: When it was last gone on with.
        user_id: Who uploads.
        copy: The copy that is made of it. Empty: that was done.
    """

    size: int
    time_us: int
    user_id: str
    copy: str


def new_copy(user_id: str) -> str:
    """Return the name of a copy that a user uploads, which no other one has."""
    return _user_digest(user_id).hex() + secrets.token_hex(_USER_BYTES)


def upload_key(user_id: str, sha256: bytes) -> bytes:
    """Return the key of a user's upload of a content."""
    return _user_key(user_id) + sha256


def upload_of_copy(copy: str, sha256: bytes) -> bytes:
    """Return the key of the upload of which a copy was made. Raises ValueError if it is none."""
    return UPLOADS + bytes.fromhex(copy[: 2 * _USER_BYTES]) + sha256


def upload_record(key: bytes, lookup: Lookup) -> UploadRecord | None:
    """Return what is known of an upload, or None."""
    value = lookup(key)
    return None if value is None else unpack_upload(value)


def unpack_upload(value: bytes) -> UploadRecord:
    """Return what a value says. Raises ValueError if it is none."""
    try:
        size, time_us, copy_chars = _UPLOAD.unpack_from(value)
        rest = value[_UPLOAD.size :].decode()
        return UploadRecord(size, time_us, rest[copy_chars:], rest[:copy_chars])
    except struct.error as error:
        raise ValueError(str(error)) from error


def check_entry(key: bytes, value: bytes) -> None:
    """Raise ValueError if an entry of the table is none."""
    if len(key) == _KEY_BYTES:
        unpack_upload(value)
    elif len(key) != _USER_KEY_BYTES or len(value) != _BYTES.size:
        raise ValueError("neither an upload nor what uploads cost")


def is_begun(reader: Reader, sha256: bytes, copy: str) -> bool:
    """Tell whether an upload names a copy."""
    try:
        record = upload_record(upload_of_copy(copy, sha256), reader.index)
    except ValueError:
        return False
    return record is not None and record.copy == copy != ""


class Begun(NamedTuple):
    """
    What comes of beginning an upload.

    Attributes:
        writes: What is written.
        copy: The name of its copy.
        refusal: Why it does not begin. What has made room has done so all the same: next time there is more.
    """

    writes: IndexWrites
    copy: str
    refusal: FileRoomExhausted | None = None


def begun(
    reader: Reader,
    user_id: str,
    sha256: bytes,
    size: int,
    *,
    copy: str,
    time_us: int,
    room_bytes: int | None,
    stale_us: int = 0,
) -> Begun:
    """
    Begin an upload, or go on with one.

    Args:
        reader: The tenant's records.
        user_id: Who uploads.
        sha256: What.
        size: How many bytes that are.
        copy: The name, should it begin now.
        time_us: The time.
        room_bytes: What uploads of the user may cost. One alone always may. None: whatever it is.
        stale_us: What came before makes room if there is none: what nobody has asked for for longest first.
    """
    key, user_key = upload_key(user_id, sha256), _user_key(user_id)
    known = upload_record(key, reader.index)
    name = (known.copy if known is not None else "") or copy
    if known is not None and known.copy:
        size = max(size, known.size)  # so much of it may be there already
    writes: IndexWrites = {key: _pack(UploadRecord(size, time_us, user_id, name))}
    counted = 0 if known is None else _cost_of(known)
    cost = size + FILE_COST_BYTES
    if counted != cost:
        others = _cost(reader.index, user_key) - counted
        if room_bytes is not None and others and others + cost > room_bytes:
            # Others than the last time: those about a place where chance puts the search.
            near = user_key + hashlib.sha256(copy.encode()).digest()
            some = [one for one in _some_of(reader, user_key, near) if one[0] != key]
            freed, freed_bytes = _room_made(
                reader, user_id, some, needed_bytes=others + cost - room_bytes, time_us=time_us, stale_us=stale_us
            )
            others -= freed_bytes
            if others and others + cost > room_bytes:
                refusal = FileRoomExhausted(
                    f"files of {others} bytes that no operation refers to yet are there, or on their way: "
                    f"with {size} more it would be above the limit file_room_per_user, {room_bytes}"
                )
                return Begun({**freed, user_key: _BYTES.pack(others + counted)} if freed else {}, "", refusal)
            writes.update(freed)
        writes[user_key] = _BYTES.pack(others + cost)
    return Begun(writes, name)


def _room_made(
    reader: Reader,
    user_id: str,
    uploads: Sequence[tuple[bytes, UploadRecord]],
    *,
    needed_bytes: int,
    time_us: int,
    stale_us: int,
) -> tuple[IndexWrites, int]:
    """Make room: those uploads go that do not count, then what came and is stale, no more than it takes."""
    contents = [key[_USER_KEY_BYTES:] for key, _ in uploads]
    grants = reader.indexes(grant_key(sha256, user_id) for sha256 in contents)
    freed: IndexWrites = {}
    freed_bytes = 0
    stale: list[tuple[int, bytes, bytes, int]] = []
    for (key, record), sha256 in zip(uploads, contents, strict=True):
        if freed_bytes >= needed_bytes:
            break
        grant = grants.get(grant_key(sha256, user_id))
        if not _counts(reader, sha256, record, grant):
            freed[key] = None
            freed_bytes += _cost_of(record)
        elif grant is not None and _is_stale(record, stale_us):
            stale.append((unpack_grant(grant), key, sha256, _cost_of(record)))
    for _, key, sha256, cost in sorted(stale):
        if freed_bytes >= needed_bytes:
            break
        freed[key] = None
        # For the last time, and he is not told: it is no upload any more.
        freed[grant_key(sha256, user_id)] = pack_grant(time_us)
        freed_bytes += cost
    return freed, freed_bytes


def completed(
    reader: Reader, user_id: str, sha256: bytes, size: int, *, copy: str, time_us: int
) -> tuple[IndexWrites, str | None] | None:
    """
    Put a copy, all of which is stored, on record; the user may refer to the content from then on.

    Args:
        reader: The tenant's records.
        user_id: Who uploaded it.
        sha256: What.
        size: How many bytes that are.
        copy: The copy.
        time_us: The time.

    Returns:
        What is written, and the name of the copy that is gone then, if one is. None: it is not begun any more.
    """
    key = upload_key(user_id, sha256)
    upload, known = upload_record(key, reader.index), kept_record(sha256, reader.index)
    writes: IndexWrites = {grant_key(sha256, user_id): pack_grant(time_us, is_upload=True)}
    if upload is None or upload.copy != copy:
        # Somebody else may have done it, with the same bytes.
        return (writes, None) if known is not None and known.copy == copy else None
    writes[key] = _pack(upload._replace(time_us=time_us, copy=""))
    writes[content_key(sha256)] = pack_content(ContentRecord(size, time_us, copy))
    return writes, None if known is None else known.copy


def due_uploads(reader: Reader, after: bytes, before_us: int) -> tuple[list[bytes], bytes]:
    """
    Look at some uploads; return the keys of those that nobody has gone on with since a time, or that do not count.

    Returns them with the key to go on after; empty: there are no more.
    """
    entries = reader.index_range(UPLOADS, after, LOOKED_AT)
    due = [key for key, _ in entries if _is_due(reader, key, before_us)]
    return due, entries[-1][0] if entries else b""


def without_uploads(reader: Reader, keys: Iterable[bytes], before_us: int) -> IndexWrites:
    """Give up uploads, as far as they are still due."""
    due = {key: upload_record(key, reader.index) for key in keys if _is_due(reader, key, before_us)}
    return _without(due, reader.index)


def without_settled(uploads: Iterable[tuple[str, bytes]], lookup: Lookup) -> IndexWrites:
    """Let uploads (user, content) go that came, and to which operations of that user refer now."""
    keys = {upload_key(user_id, sha256) for user_id, sha256 in uploads}
    records = {key: upload_record(key, lookup) for key in keys}
    return _without({key: record for key, record in records.items() if record is not None and not record.copy}, lookup)


def counting(reader: Reader, user_id: str, contents: Iterable[bytes], stale_us: int = 0) -> set[bytes]:
    """Return of which contents uploads of a user count for him, and make no room where there is none."""
    keys = {upload_key(user_id, sha256): sha256 for sha256 in contents}
    records = {keys[key]: unpack_upload(value) for key, value in reader.indexes(keys).items()}
    grants = reader.indexes(grant_key(sha256, user_id) for sha256 in records)
    return {
        sha256
        for sha256, record in records.items()
        if not _is_stale(record, stale_us) and _counts(reader, sha256, record, grants.get(grant_key(sha256, user_id)))
    }


def is_settled(reader: Reader, key: bytes) -> bool:
    """Tell whether an upload that came does not count: its user's failure holds it, or he may not refer to it now."""
    record = upload_record(key, reader.index)
    if record is None or record.copy:
        return False
    sha256 = key[_USER_KEY_BYTES:]
    return _is_settled(reader, sha256, record.user_id, reader.index(grant_key(sha256, record.user_id)))


def _is_settled(reader: Reader, sha256: bytes, user_id: str, grant: bytes | None) -> bool:
    return not is_upload_grant(grant) or _is_held_by_failure(reader, sha256, user_id)


def _is_held_by_failure(reader: Reader, sha256: bytes, user_id: str) -> bool:
    return bool(reader.index_range(failures_prefix(sha256, user_id), b"", 1))


def _counts(reader: Reader, sha256: bytes, record: UploadRecord, grant: bytes | None) -> bool:
    """Tell whether an upload counts. One that has begun does not if an operation was refused without it."""
    if record.copy:
        return not _is_held_by_failure(reader, sha256, record.user_id)
    return not _is_settled(reader, sha256, record.user_id, grant)


def _is_stale(record: UploadRecord, stale_us: int) -> bool:
    return not record.copy and record.time_us < stale_us


def _without(uploads: Mapping[bytes, UploadRecord | None], lookup: Lookup) -> IndexWrites:
    """Take uploads away, and what they cost."""
    writes: IndexWrites = dict.fromkeys(uploads)
    costs: dict[bytes, int] = {}
    for key, record in uploads.items():
        user_key = key[:_USER_KEY_BYTES]
        if user_key not in costs:
            costs[user_key] = _cost(lookup, user_key)
        costs[user_key] -= 0 if record is None else _cost_of(record)
    writes.update((key, _BYTES.pack(cost) if cost > 0 else None) for key, cost in costs.items())
    return writes


def _is_due(reader: Reader, key: bytes, before_us: int) -> bool:
    if len(key) != _KEY_BYTES:
        return False
    record = upload_record(key, reader.index)
    return record is not None and (record.time_us < before_us if record.copy else is_settled(reader, key))


def _some_of(reader: Reader, user_key: bytes, near: bytes) -> list[tuple[bytes, UploadRecord]]:
    """Return some uploads of a user: those behind a place, and from the first on if there are few."""
    page = reader.index_range(user_key, near, LOOKED_AT)
    if len(page) < LOOKED_AT:
        page += reader.index_range(user_key, user_key, LOOKED_AT - len(page))
    return [(key, unpack_upload(value)) for key, value in dict(page).items() if len(key) == _KEY_BYTES]


def _cost(lookup: Lookup, user_key: bytes) -> int:
    """Return what the uploads of a user cost."""
    value = lookup(user_key)
    return 0 if value is None else int(_BYTES.unpack(value)[0])


def _cost_of(record: UploadRecord) -> int:
    return record.size + FILE_COST_BYTES


def _pack(record: UploadRecord) -> bytes:
    copy = record.copy.encode()
    return _UPLOAD.pack(record.size, record.time_us, len(copy)) + copy + record.user_id.encode()


def _user_key(user_id: str) -> bytes:
    return UPLOADS + _user_digest(user_id)


def _user_digest(user_id: str) -> bytes:
    return hashlib.sha256(user_id.encode()).digest()[:_USER_BYTES]

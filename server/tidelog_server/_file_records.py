"""
File records: what the table of indexes says of contents, and of who refers to them. No I/O.

    c sha256                -> size time state copy    a content is in the content store, all of it
    g sha256 user           -> time upload             operations of this user may refer to it, uploaded by him then
    f sha256 kind referrer  -> nothing                 who refers to it

The time of a content is when it came, or when the last one stopped referring to it:
from then on it is kept for a while. A referrer is an object, by its key, or a failure
that is open, by its author and its id: what it holds may have to be applied one day. So
as long as it is open its author's grant stays, and with a grant its content; that of nobody else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._contents import SHA256_BYTES
from tidelog._errors import InvalidValue
from tidelog._file_reference import encoded_file_references, file_references, may_refer_to_files
from tidelog._keys import ObjectKey, pack_object_key, unpack_object_key
from tidelog._operation import decode_operation
from tidelog.v1 import failure_pb2
from tidelog_server._indexes import IndexWrites
from tidelog_server._records import FailureRecord

if TYPE_CHECKING:
    from tidelog_server._overlay import Overlay

CONTENTS: Final = b"c"
GRANTS: Final = b"g"
REFERRERS: Final = b"f"

# Who has the grant of a content that the service itself added. No user has this id.
SERVICE: Final = "\0"
# The same of one that was off the record, and was found.
FOUND_AGAIN: Final = "\0\0"

_OBJECT: Final = b"o"
_FAILURE: Final = b"x"
# Behind a user's id, which has none.
_END: Final = b"\0"

_CONTENT: Final = struct.Struct(">QQ")
_TIME: Final = struct.Struct(">Q")
_UPLOAD: Final = b"u"
_UPLOAD_TIME: Final = _TIME.size + len(_UPLOAD)
_WHOLE: Final = b"w"
_BROKEN: Final = b"b"

Lookup = Callable[[bytes], bytes | None]


class ContentRecord(NamedTuple):
    """
    What is known of a content.

    Attributes:
        size: Its length in bytes.
        time_us: When it came, or the last one stopped referring to it, by the server's clock.
        copy: The name of the copy that the content store has; see `_upload_records`.
        is_broken: Whether that copy was found lost or damaged: then it passes for missing, until it is whole again.
    """

    size: int
    time_us: int
    copy: str = ""
    is_broken: bool = False


class Referral(NamedTuple):
    """
    What becomes of one referrer.

    Attributes:
        referrer: It, as keys spell it.
        before: The contents that it refers to until now.
        after: Those that it refers to from now on.
    """

    referrer: bytes
    before: frozenset[bytes]
    after: frozenset[bytes]


def content_of(key: bytes) -> bytes:
    """Return the content that an entry of any of the three tables is about."""
    return key[1 : 1 + SHA256_BYTES]


def content_key(sha256: bytes) -> bytes:
    """Return the key of a content's record."""
    return CONTENTS + sha256


def content_record(sha256: bytes, lookup: Lookup) -> ContentRecord | None:
    """Return what is known of a content, or None if it is not there, or not whole."""
    record = kept_record(sha256, lookup)
    return None if record is None or record.is_broken else record


def kept_record(sha256: bytes, lookup: Lookup) -> ContentRecord | None:
    """Return what is known of a content, whole or broken, or None if it is not on record."""
    value = lookup(CONTENTS + sha256)
    return None if value is None else unpack_content(value)


def pack_content(record: ContentRecord) -> bytes:
    """Return the value of a content's record."""
    return (
        _CONTENT.pack(record.size, record.time_us) + (_BROKEN if record.is_broken else _WHOLE) + record.copy.encode()
    )


def unpack_content(value: bytes) -> ContentRecord:
    """Return what a value says. Raises ValueError if it is none."""
    state, copy = value[_CONTENT.size : _CONTENT.size + 1], value[_CONTENT.size + 1 :]
    try:
        size, time_us = _CONTENT.unpack_from(value)
    except struct.error as error:
        raise ValueError(str(error)) from error
    if state not in {b"", _WHOLE, _BROKEN}:
        raise ValueError(f"the state {state!r}")
    return ContentRecord(size, time_us, copy.decode("ascii"), state == _BROKEN)


def grants_prefix(sha256: bytes) -> bytes:
    """Return what the keys of a content's grants start with; users follow."""
    return GRANTS + sha256


def grant_key(sha256: bytes, user_id: str) -> bytes:
    """Return the key under which a user, or the service, may refer to a content."""
    return GRANTS + sha256 + user_id.encode()


def grantee(key: bytes) -> str:
    """Return the user of a grant's key, or `SERVICE`."""
    return key[len(GRANTS) + SHA256_BYTES :].decode()


def pack_grant(time_us: int, *, is_upload: bool = False) -> bytes:
    """Return the value of a grant; *is_upload*: the user uploads the content, else is told that it is there."""
    return _TIME.pack(time_us) + (_UPLOAD + _TIME.pack(time_us) if is_upload else b"")


def renewed_grant(value: bytes | None, time_us: int) -> bytes:
    """Return the value of a grant, if there is any, that is given again because the user is told that it is there."""
    return _TIME.pack(time_us) + (value or b"")[_TIME.size :]


def unpack_grant(value: bytes) -> int:
    """Return when a grant was given. Raises ValueError if it is none."""
    try:
        if is_upload_grant(value):
            _TIME.unpack(value[_UPLOAD_TIME:])
            return int(_TIME.unpack_from(value)[0])
        return int(_TIME.unpack(value)[0])
    except struct.error as error:
        raise ValueError(str(error)) from error


def is_upload_grant(value: bytes | None, since_us: int = 0) -> bool:
    """Tell whether there is a grant, and it was given for an upload, at a time or later."""
    return (
        value is not None
        and value[_TIME.size : _UPLOAD_TIME] == _UPLOAD
        and value[_UPLOAD_TIME:] >= _TIME.pack(since_us)
    )


def referrers_prefix(sha256: bytes) -> bytes:
    """Return what the keys of all start with that refer to a content."""
    return REFERRERS + sha256


def objects_prefix(sha256: bytes) -> bytes:
    """Return the same for objects only; their keys follow."""
    return REFERRERS + sha256 + _OBJECT


def failures_prefix(sha256: bytes, user_id: str) -> bytes:
    """Return the same for failures of a user only; their ids follow."""
    return REFERRERS + sha256 + _failures_of(user_id)


def referring_object(key: bytes) -> ObjectKey:
    """Return the object of a key under an `objects_prefix`."""
    return unpack_object_key(key[len(REFERRERS) + SHA256_BYTES + len(_OBJECT) :])


def split_referrer(key: bytes) -> tuple[bytes, ObjectKey | bytes]:
    """Return (content, object or failure) of a key of `REFERRERS`. Raises ValueError if it is none."""
    sha256, kind, rest = key[1 : 1 + SHA256_BYTES], key[1 + SHA256_BYTES : 2 + SHA256_BYTES], key[2 + SHA256_BYTES :]
    if kind == _OBJECT:
        return sha256, unpack_object_key(rest)
    if kind == _FAILURE:
        _user, separator, failure_id = rest.partition(_END)
        if not separator:
            raise ValueError("no user")
        return sha256, failure_id
    raise ValueError(f"the kind {kind!r}")


def object_referrer(key: ObjectKey) -> bytes:
    """Return how an object is spelled as a referrer."""
    return _OBJECT + pack_object_key(*key)


def failure_referrer(failure_id: bytes, data: bytes) -> bytes:
    """Return how a failure is spelled as a referrer, given its serialized record."""
    return _failures_of(failure_pb2.SynchronizationFailure.FromString(data).user_id) + failure_id


def entries_of(referrer: bytes, contents: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return the entries that say to which contents somebody refers."""
    return {REFERRERS + sha256 + referrer: b"" for sha256 in contents}


def contents_of_object(attributes: bytes) -> frozenset[bytes]:
    """Return the contents that encoded attributes refer to."""
    if not may_refer_to_files(attributes):
        return _NONE
    return frozenset(one.sha256 for one in encoded_file_references(attributes).values())


def contents_of_failure(data: bytes) -> frozenset[bytes]:
    """Return the contents that a serialized failure refers to, if it can be retried."""
    if not may_refer_to_files(data):
        return _NONE
    record = failure_pb2.SynchronizationFailure.FromString(data)
    return _contents_of_payload(record) if _is_retryable(record) else _NONE


def referrals(overlay: Overlay, failures: Sequence[FailureRecord]) -> Iterator[Referral]:
    """Yield what becomes of the referrers that a transaction writes."""
    for key, before, after in overlay.written_referrers():
        yield Referral(object_referrer(key), contents_of_object(before), contents_of_object(after))
    for failure in failures:
        yield from failure_referral(failure)


def failure_referral(failure: FailureRecord) -> Iterator[Referral]:
    """Yield what becomes of a failure that is written, if it has anything to do with files."""
    if may_refer_to_files(failure.data):
        record = failure_pb2.SynchronizationFailure.FromString(failure.data)
        held = _contents_of_payload(record)
        yield Referral(_failures_of(record.user_id) + failure.id, held, held if _is_retryable(record) else _NONE)


def referral_writes(changed: Iterable[Referral], lookup: Lookup, time_us: int) -> IndexWrites:
    """
    Return what changes in the table of indexes because of what becomes of referrers.

    A content that somebody stops referring to is kept for a while from then on.
    """
    writes: IndexWrites = {}
    for one in changed:
        writes.update(entries_of(one.referrer, one.after))
        for sha256 in one.before - one.after:
            writes[REFERRERS + sha256 + one.referrer] = None
            record = kept_record(sha256, lookup)
            if record is not None:
                writes[CONTENTS + sha256] = pack_content(record._replace(time_us=time_us))
    return writes


def file_writes(overlay: Overlay, failures: Sequence[FailureRecord], time_us: int) -> IndexWrites:
    """Return what changes in the table of indexes because of what a transaction writes."""
    return referral_writes(referrals(overlay, failures), overlay.index, time_us)


def _failures_of(user_id: str) -> bytes:
    return _FAILURE + user_id.encode() + _END


def _is_retryable(record: failure_pb2.SynchronizationFailure) -> bool:
    return record.status == failure_pb2.FAILURE_STATUS_OPEN and not record.payload_removed


def _contents_of_payload(record: failure_pb2.SynchronizationFailure) -> frozenset[bytes]:
    """Return the contents that the operations of a failure refer to."""
    found: set[bytes] = set()
    for data in record.group_operations or [record.operation]:
        if may_refer_to_files(data):
            try:
                attributes: Mapping[str, object] = decode_operation(data).decoded_patch().set
            except InvalidValue:
                continue  # nobody can ever apply it
            found.update(reference.sha256 for _, reference in file_references(attributes))
    return frozenset(found)


_NONE: Final[frozenset[bytes]] = frozenset()

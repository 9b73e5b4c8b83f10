"""
Collection: what of a tenant's past may go, and what is written when it does. No I/O.

How long something is kept goes by the server's clock; what it means that it is gone
goes by versions. Changes are collected from the oldest on, and with a deletion its
tombstone: so what is kept tells all that happened above one version. Whoever stands
below it reconciles.

Each function that finds something looks at a page, so that nobody who writes is kept
waiting for that. Each one that writes makes sure that it still holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._operation import OperationKind
from tidelog.v1 import failure_pb2
from tidelog_server import _account
from tidelog_server._file_records import (
    CONTENTS,
    FOUND_AGAIN,
    GRANTS,
    content_key,
    content_of,
    failures_prefix,
    grantee,
    grants_prefix,
    kept_record,
    objects_prefix,
    referrers_prefix,
    unpack_content,
    unpack_grant,
)
from tidelog_server._formers import Note, read_note, without_notes
from tidelog_server._indexes import twins_after, without_left
from tidelog_server._records import Forgotten, ReplicaState, Settled, Writes
from tidelog_server._store import Reader

# What goes in one transaction, at the most.
STEP_ENTRIES: Final = 500


class Past(NamedTuple):
    """
    The oldest part of a tenant's history.

    Attributes:
        version: Its newest version.
        change_count: How many changes it has.
        deleted: Keys of the objects that were deleted then.
    """

    version: int
    change_count: int
    deleted: list[ObjectKey]


def past_before(reader: Reader, before_us: int) -> Past | None:
    """Return the oldest changes that are kept, as far as they were made before a time; None: there are none."""
    changes = reader.changes(reader.collected(), STEP_ENTRIES, PAGE_BYTES_MAX)
    past = list(takewhile(lambda change: change.time_us < before_us, changes))
    if not past:
        return None
    deleted = [change.key for change in past if change.kind is OperationKind.DELETE]
    return Past(past[-1].version, len(past), deleted)


def without_past(reader: Reader, past: Past) -> tuple[Writes, int]:
    """Let a past go, with the tombstones of what was not created anew; return how many these are."""
    tombstones = {
        key: state.version
        for key, state in reader.objects(past.deleted).items()
        if state.deleted and state.version <= past.version
    }
    version = max(past.version, reader.collected())
    return _writes(reader, forgotten=Forgotten(version, tombstones)), len(tombstones)


def without_left_entries(reader: Reader, entries: Sequence[tuple[bytes, bytes]]) -> tuple[Writes, int]:
    """Take entries of objects that lost a value out of the table of indexes; return how many they are."""
    removed = without_left(entries, reader.index)
    return _writes(reader, index_entries=removed), len(removed)


def is_absent(state: ReplicaState, before_us: int) -> bool:
    """Tell whether a replica was last heard of before a time, and is not retired yet."""
    return not state.retired and 0 < state.heard_us < before_us


def retired(reader: Reader, replica: bytes, before_us: int) -> tuple[Writes | None, int]:
    """Retire a replica, if it is still absent; return how many were."""
    state = reader.replica(replica)
    if state is None or not is_absent(state, before_us):
        return None, 0
    # The number fences a session that may still be open.
    gone = state._replace(retired=True, session_number=state.session_number + 1)
    return _writes(reader, replica=(replica, gone)), 1


def settled_before(reader: Reader, replica: bytes, before_us: int) -> list[int]:
    """
    Return the first operations of a replica of which it may be forgotten what became of them.

    Of a retired one all may. Another one may repeat what it got no answer to: that is
    below what is settled without a gap, and its being settled stays known.
    """
    state = reader.replica(replica)
    if state is None:
        return []
    found = reader.first_settled(replica, STEP_ENTRIES)
    collected = reader.collected()

    def may_go(mark: tuple[int, Settled]) -> bool:
        seq, settled = mark
        return state.retired or (seq <= state.watermark and _is_old(reader, settled, collected, before_us))

    return [seq for seq, _ in takewhile(may_go, found)]


def without_outcomes(reader: Reader, replica: bytes, seqs: Sequence[int]) -> tuple[Writes, int]:
    """Forget what became of operations; return how many they are."""
    told = _account.without_outcomes(reader, replica, seqs)
    forgotten = Forgotten(settled=[(replica, seq) for seq in seqs])
    return _writes(reader, forgotten=forgotten, index_entries=told), len(seqs)


def old_notes(reader: Reader, after: bytes, before_us: int) -> tuple[list[Note], bytes]:
    """
    Look at some notes of copies of replicas, and return those that may be forgotten.

    Returns them with the key to go on after; empty: there are no more. While a replica may still
    send an operation for the first time, what a copy of it settled is known.
    """
    entries = twins_after(after, reader.index_range, STEP_ENTRIES)
    collected = reader.collected()
    due = []
    for key, value in entries:
        note = read_note(key, value)
        if note is None:
            continue
        state = reader.replica(note.replica)
        may_come = state is not None and not state.retired and note.seq > state.watermark
        if not may_come and _is_old(reader, note.settled, collected, before_us):
            due.append(note)
    return due, entries[-1][0] if entries else b""


def without_old_notes(reader: Reader, notes: Sequence[Note]) -> tuple[Writes, int]:
    """Forget notes of copies of replicas; return how many they are."""
    return _writes(reader, index_entries=without_notes(reader, notes)), len(notes)


def without_refused_creations(reader: Reader, replica: bytes, keys: Iterable[ObjectKey]) -> tuple[Writes, None]:
    """Forget what a replica could not create."""
    return _writes(reader, forgotten=Forgotten(refused_creations=[(replica, key) for key in keys])), None


class ContentsDue(NamedTuple):
    """
    Contents that something is to be done about.

    Attributes:
        unneeded: Those that nothing refers to, or is about to.
        broken: Those that something refers to, and that were lost or damaged.
    """

    unneeded: list[bytes]
    broken: list[bytes]


def contents_due(reader: Reader, after: bytes, before_us: int) -> tuple[ContentsDue, bytes]:
    """
    Look at some contents on record, and return those that something is to be done about.

    Returns them with the key to go on after; empty: there are no more.
    """
    entries = reader.index_range(CONTENTS, after, STEP_ENTRIES)
    due = ContentsDue([], [])
    for key, value in entries:
        sha256 = content_of(key)
        if is_unneeded(reader, sha256, before_us):
            due.unneeded.append(sha256)
        elif unpack_content(value).is_broken:
            due.broken.append(sha256)
    return due, entries[-1][0] if entries else b""


def is_unneeded(reader: Reader, sha256: bytes, before_us: int) -> bool:
    """Tell whether a content is on record since before a time, and nothing refers to it or is about to."""
    record = kept_record(sha256, reader.index)
    return record is not None and record.time_us < before_us and not is_referred_to(reader, sha256)


def is_referred_to(reader: Reader, sha256: bytes) -> bool:
    """Tell whether anything refers to a content, or is about to."""
    # A failure keeps the grant of its author.
    return any(reader.index_range(prefix(sha256), b"", 1) for prefix in (objects_prefix, grants_prefix))


def is_held_by_any(reader: Reader, sha256: bytes) -> bool:
    """Tell the same, or whether a failure holds a content, whose author may have no right to it yet."""
    return is_referred_to(reader, sha256) or bool(reader.index_range(referrers_prefix(sha256), b"", 1))


def without_content(reader: Reader, sha256: bytes, before_us: int) -> tuple[Writes | None, str | None]:
    """Take a content off the record, if it is still unneeded; return which copy of it is gone then."""
    record = kept_record(sha256, reader.index)
    if record is None or not is_unneeded(reader, sha256, before_us):
        return None, None
    return _writes(reader, index_entries={content_key(sha256): None}), record.copy


def old_grants(reader: Reader, after: bytes, before_us: int) -> tuple[list[bytes], bytes]:
    """
    Look at some grants, and return the keys of those that were given before a time.

    A failure may be retried at any time: as long as it refers to a content its author may, if he might before.

    Returns them with the key to go on after; empty: there are no more.
    """
    entries = reader.index_range(GRANTS, after, STEP_ENTRIES)
    old = [key for key, _ in entries if _is_old_grant(reader, key, before_us)]
    return old, entries[-1][0] if entries else b""


def without_grants(reader: Reader, keys: Sequence[bytes], before_us: int) -> tuple[Writes, None]:
    """Take grants away, as far as they were not given anew."""
    old: dict[bytes, bytes | None] = {key: None for key in keys if _is_old_grant(reader, key, before_us)}
    return _writes(reader, index_entries=old), None


def _is_old_grant(reader: Reader, key: bytes, before_us: int) -> bool:
    given = reader.index(key)
    if given is None or unpack_grant(given) >= before_us:
        return False
    # Asked in one step, however many failures there are: those who write wait for it. What was found again is kept
    # for anybody's.
    sha256, user_id = content_of(key), grantee(key)
    prefix = referrers_prefix(sha256) if user_id == FOUND_AGAIN else failures_prefix(sha256, user_id)
    return not reader.index_range(prefix, b"", 1)


def _is_old(reader: Reader, settled: Settled, collected: int, before_us: int) -> bool:
    if not settled.failure_id:
        # What changed nothing has the version before it: only a change behind it tells its age.
        return settled.version < collected
    record = failure_pb2.SynchronizationFailure.FromString(reader.failure(settled.failure_id) or b"")
    return record.create_time.ToMicroseconds() < before_us


def _writes(reader: Reader, **fields: Any) -> Writes:
    return Writes({}, [], None, [], [], reader.head().version)._replace(**fields)

"""
The view: what a replica shows, and how the server's answers change it.

    objects      object key          -> version, dirty mark, attributes: the view
    base         object key          -> version, attributes: the server's state, only while dirty
    unconfirmed  object key NUL seq  -> version it was applied at, 0 while pending, or waiting to be offered again

The view of an object is its base with every operation replayed that is pending, or
applied at a version above the base's. So an own edit neither vanishes nor counts
twice between its acknowledgement and its snapshot. So is what
had been applied, was lost by the server, and waits for being applied again, once the server's
state without it is here. An object is dirty as long as it
has such an operation in `unconfirmed`; then its base is kept beside its view (there
is no base entry if the server has no such object). Whoever changes one of the two
changes the other in the same transaction, and leaves a mark where files may be concerned
(see `_files`).

While a download comes into view in several transactions, what these have changed already
is *prepared* only: until the last one, readers see what was shown before, and what the user
has done since (see `_curtain`).

Of an entity that is not downloaded no snapshot will come. What was applied to its
objects is folded: it becomes part of the base, which then is ahead of its version.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._environment import put_many, scan_keys
from tidelog._errors import InvalidValue, LogCorrupt, damaged
from tidelog._keys import POSITION_BYTES, entity_prefix, pack_position, unpack_object_key, unpack_position
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._operation import Operation, OperationKind, decode_operation
from tidelog._values import EMPTY_MAP, Attributes, decode_trusted, encode
from tidelog_client._curtain import Curtain
from tidelog_client._files import FileMarks

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbDatabase, LmdbTransaction
    from tidelog._log import OperationLog

PAGE_OBJECTS: Final = 500

_RECORD: Final = struct.Struct(">QB")
_DIRTY: Final = 1
_FOLDED: Final = 2
_PENDING: Final = bytes(8)


class StateLost(Exception):
    """The server confirmed a state that the replica does not have: all states must be sent again."""


class ViewRecord(NamedTuple):
    """
    An object in the view.

    Attributes:
        version: Version of its base; 0: the server has no such object yet, or another
            one of the same id than this replica created.
        dirty: Whether operations are replayed on top of the base.
        attributes: Its attributes, encoded.
    """

    version: int
    dirty: bool
    attributes: bytes


class View:
    """The objects of a replica. Each method that takes a transaction is part of the caller's."""

    def __init__(self, environment: Environment, log: OperationLog) -> None:
        self._environment = environment
        self._log = log
        self._objects = environment.database("objects")
        self._base = environment.database("base")
        self._unconfirmed = environment.database("unconfirmed")
        self._files = FileMarks(environment)
        self._curtain = Curtain(environment)

    # --- reading --------------------------------------------------------------

    def get(self, transaction: LmdbTransaction, key: bytes) -> ViewRecord | None:
        """Return an object as the replica shows it, or None."""
        hanging = self._curtain.get(transaction, key)
        if hanging is None:
            return self.prepared(transaction, key)
        return _unpack(hanging[1]) if hanging[1] else None

    def prepared(self, transaction: LmdbTransaction, key: bytes) -> ViewRecord | None:
        """Return an object as the replica shows it once all of a download is there, or None."""
        value = transaction.get(key, db=self._objects)
        return None if value is None else _unpack(value)

    def base(self, transaction: LmdbTransaction, key: bytes) -> ViewRecord | None:
        """Return the server's state of an object that operations are replayed on, or None if there is none."""
        value = transaction.get(key, db=self._base)
        return None if value is None else _unpack(value)

    def base_version(self, transaction: LmdbTransaction, key: bytes) -> int:
        """Return the server version of an object that is deleted locally, as its user knows it, 0 if there is none."""
        hanging = self._curtain.get(transaction, key)
        if hanging is not None:
            return unpack_position(hanging[0])
        record = self.base(transaction, key)
        return 0 if record is None else record.version

    def entity_objects(self, entity: str) -> Iterator[tuple[str, ViewRecord]]:
        """
        Iterate over (id, record) of an entity in id order.

        Each page is read in a transaction of its own, so a slow reader holds nothing, and
        finds what has changed meanwhile.
        """
        prefix = entity_prefix(entity)
        start = prefix
        while True:
            page: list[tuple[bytes, bytes]] = []
            room_bytes = PAGE_BYTES_MAX
            with self._environment.read() as transaction:
                for key, value in self._entries(transaction, start):
                    if not key.startswith(prefix):
                        break
                    page.append((key, value))
                    room_bytes -= len(value)
                    if len(page) == PAGE_OBJECTS or room_bytes <= 0:
                        break
            for key, value in page:
                if value:
                    yield key[len(prefix) :].decode(), _unpack(value)
            if not page:
                return
            start = page[-1][0] + b"\0"

    def entity_snapshot(self, entity: str) -> Generator[tuple[str, ViewRecord]]:
        """Iterate over (id, record) of an entity in id order as of one moment, for who does not linger."""
        prefix = entity_prefix(entity)
        with self._environment.read() as transaction:
            for key, value in self._entries(transaction, prefix):
                if not key.startswith(prefix):
                    return
                if value:
                    yield key[len(prefix) :].decode(), _unpack(value)

    def _entries(self, transaction: LmdbTransaction, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over (object key, record) that readers see, from a key on; of what is hidden the record is empty."""
        entries = _scan(transaction, self._objects, start)
        if self._curtain.is_empty(transaction):
            yield from entries
            return
        hanging = self._curtain.records(transaction, start)
        last = b""
        # The sort is stable: what hangs in front of an object comes before it.
        for key, value in heapq.merge(hanging, entries, key=itemgetter(0)):
            if key != last:
                yield key, value
            last = key

    def unconfirmed(self, transaction: LmdbTransaction, key: bytes) -> list[tuple[int, int]]:
        """Return (seq, version applied at; 0: pending) of the operations replayed on an object, in log order."""
        prefix = key + b"\0"
        cursor = transaction.cursor(self._unconfirmed)
        found: list[tuple[int, int]] = []
        more = cursor.set_range(prefix)
        while more:
            entry, version = cursor.item()
            if not entry.startswith(prefix):
                break
            found.append((unpack_position(entry[len(prefix) :]), unpack_position(version)))
            more = cursor.next()
        return found

    def is_needed(self, transaction: LmdbTransaction, key: bytes, seq: int) -> bool:
        """Tell whether an operation is still replayed, so that the log must keep it."""
        return transaction.get(_entry(key, seq), db=self._unconfirmed) is not None

    def is_open(self, transaction: LmdbTransaction, key: bytes, seq: int) -> bool:
        """Tell whether an operation is replayed as one that the server has not applied."""
        return transaction.get(_entry(key, seq), db=self._unconfirmed) == _PENDING

    def creates(self, transaction: LmdbTransaction, seq: int) -> bool:
        """Tell whether the operation at *seq* is a creation."""
        return self._operation(transaction, seq).kind is OperationKind.CREATE

    def replaying(self, transaction: LmdbTransaction, seqs: Container[int]) -> list[tuple[bytes, int]]:
        """Return (object key, seq) of those operations that are still replayed."""
        entries = transaction.cursor(self._unconfirmed).iternext(keys=True, values=False)
        found = ((entry[: -POSITION_BYTES - 1], unpack_position(entry[-POSITION_BYTES:])) for entry in entries)
        return [(key, seq) for key, seq in found if seq in seqs]

    def all_clean(self, transaction: LmdbTransaction) -> bool:
        """Tell whether no operation is replayed on any object."""
        return int(transaction.stat(self._unconfirmed)["entries"]) == 0

    def is_empty(self, transaction: LmdbTransaction) -> bool:
        """Tell whether there is nothing that came from a server or could be mistaken for it."""
        return not transaction.stat(self._objects)["entries"] and not transaction.stat(self._base)["entries"]

    def is_clean(self, transaction: LmdbTransaction, entity: str) -> bool:
        """Tell whether no operation is replayed on any object of an entity."""
        prefix = entity_prefix(entity)
        cursor = transaction.cursor(self._unconfirmed)
        return not (cursor.set_range(prefix) and cursor.key().startswith(prefix))

    def is_server_known(self, transaction: LmdbTransaction, key: bytes) -> bool:
        """Tell whether an object is one that the server had, as far as is known here."""
        if transaction.get(key, db=self._base) is not None:
            return True
        value = transaction.get(key, db=self._objects)
        return value is not None and not _unpack(value).dirty

    def server_known_count(self, transaction: LmdbTransaction, entity: str) -> int:
        """Return how many objects of an entity the server had, as far as is known here."""
        prefix = entity_prefix(entity)
        count = sum(self.is_server_known(transaction, key) for key in scan_keys(transaction, self._objects, prefix))
        # What its user has deleted has a base alone.
        bases = scan_keys(transaction, self._base, prefix)
        return count + sum(transaction.get(key, db=self._objects) is None for key in bases)

    def limit_version(self, transaction: LmdbTransaction, key: bytes, version: int) -> bool:
        """Take an object as of *version* if it claims to be of a newer one; tell whether it did."""
        has_claimed = False
        for database in (self._objects, self._base):
            value = transaction.get(key, db=database)
            if value is not None and _unpack(value).version > version:
                self._veil(transaction, [key])
                transaction.put(key, pack_position(version) + value[POSITION_BYTES:], db=database)
                has_claimed = True
        return has_claimed

    def entities(self, transaction: LmdbTransaction) -> set[str]:
        """Return the entities that have objects in the view or in a base."""
        found = set()
        for database in (self._objects, self._base):
            cursor = transaction.cursor(database)
            more = cursor.first()
            while more:
                entity, _ = unpack_object_key(cursor.key())
                found.add(entity)
                more = cursor.set_range(entity.encode() + b"\1")
        return found

    def keys(self, transaction: LmdbTransaction, entity: str) -> Iterator[bytes]:
        """Iterate over the keys of an entity's objects in the view or in a base, some twice; they may be changed."""
        for database in (self._objects, self._base):
            yield from scan_keys(transaction, database, entity_prefix(entity))

    def all_keys(self, transaction: LmdbTransaction) -> Iterator[bytes]:
        """Iterate over the keys of all objects in the view, in a base, or with operations on top, in order."""
        entries = (key[: -POSITION_BYTES - 1] for key in scan_keys(transaction, self._unconfirmed))
        listed = (scan_keys(transaction, self._objects), scan_keys(transaction, self._base), entries)
        for key, _ in groupby(heapq.merge(*listed)):
            yield key

    # --- local commits --------------------------------------------------------

    def write_commit(
        self,
        transaction: LmdbTransaction,
        operations: Sequence[tuple[bytes, int]],
        changes: dict[bytes, tuple[ViewRecord | None, ViewRecord | None]],
    ) -> None:
        """
        Show committed operations.

        Args:
            transaction: The commit's.
            operations: Object key and seq of each.
            changes: For each object, its record before and after all of them.
        """
        put_many(transaction, self._unconfirmed, [(_entry(key, seq), _PENDING) for key, seq in operations])
        objects = []
        is_drawn = self._curtain.is_drawn(transaction)
        for key, (before, after) in changes.items():
            if is_drawn and self._curtain.get(transaction, key) is not None:
                self._write_behind(transaction, key, after)
                continue
            if before is not None and not before.dirty:
                transaction.put(key, transaction.get(key, b"", db=self._objects), db=self._base)
            if after is not None:
                objects.append((key, _RECORD.pack(after.version, _DIRTY) + after.attributes))
            elif before is not None:
                transaction.delete(key, db=self._objects)
                self._files.note(transaction, key)
        put_many(transaction, self._objects, objects)
        self._files.note_all(transaction, objects)

    def _write_behind(self, transaction: LmdbTransaction, key: bytes, after: ViewRecord | None) -> None:
        """Show what was committed on an object of which something newer is prepared, and replay it on that."""
        shown = b"" if after is None else _RECORD.pack(after.version, _DIRTY) + after.attributes
        self._curtain.change(transaction, key, shown)
        prepared = self.prepared(transaction, key)
        if prepared is not None and not prepared.dirty:
            transaction.put(key, transaction.get(key, b"", db=self._objects), db=self._base)
        self._rebuild(transaction, key)

    # --- the curtain ----------------------------------------------------------

    def draw(self, transaction: LmdbTransaction) -> None:
        """Let readers see nothing of what the server says until `unveil`."""
        self._curtain.draw(transaction)

    def unveil(self, transaction: LmdbTransaction) -> None:
        """Let readers see all that is prepared, if something is."""
        self._curtain.open(transaction)

    def _veil(self, transaction: LmdbTransaction, keys: Iterable[bytes]) -> None:
        """Let readers see objects as they are shown now, if these are about to be prepared for later."""
        if self._curtain.is_drawn(transaction):
            self._curtain.hang(transaction, [(key, self._front(transaction, key)) for key in keys])

    def _front(self, transaction: LmdbTransaction, key: bytes) -> bytes:
        record = transaction.get(key, b"", db=self._objects)
        base = transaction.get(key, db=self._base)
        if base is None:
            base = _PENDING if not record or _unpack(record).dirty else record
        return base[:POSITION_BYTES] + record

    def is_veiled(self) -> bool:
        """Tell whether readers see something else than what is prepared."""
        with self._environment.read() as transaction:
            return self._curtain.is_drawn(transaction)

    # --- what the server says -------------------------------------------------

    def settle_applied(
        self, transaction: LmdbTransaction, applied: Sequence[tuple[bytes, int, int]], *, rebasing: bool
    ) -> None:
        """
        Note operations (object key, seq, version) as applied; those that the base contains are replayed no more.

        While *rebasing*, no base contains any: the versions are of another timeline.
        """
        confirmed = []
        for key, seq, version in applied:
            position = pack_position(version)
            base = transaction.get(key, db=self._base)
            if base is not None and base[:POSITION_BYTES] >= position and not rebasing:
                # A snapshot that contains it came before this answer did.
                transaction.delete(_entry(key, seq), db=self._unconfirmed)
                self._rebuild(transaction, key)
            else:
                confirmed.append((_entry(key, seq), position))
        put_many(transaction, self._unconfirmed, confirmed)

    def replay_again(self, transaction: LmdbTransaction, key: bytes, seq: int) -> None:
        """Replay an operation that the server's state, as it is here now, does not contain any more."""
        self._veil(transaction, [key])
        shown = transaction.get(key, db=self._objects)
        if shown is not None and not _unpack(shown).dirty:
            transaction.put(key, shown, db=self._base)
        transaction.put(_entry(key, seq), _PENDING, db=self._unconfirmed)
        self._rebuild(transaction, key)

    def settle_refused(self, transaction: LmdbTransaction, refused: Sequence[tuple[bytes, int]]) -> None:
        """Take operations (object key, seq) back out of the view."""
        for key, seq in refused:
            transaction.delete(_entry(key, seq), db=self._unconfirmed)
        for key in dict.fromkeys(key for key, _ in refused):
            self._rebuild(transaction, key)

    def put_clean_snapshots(
        self, transaction: LmdbTransaction, snapshots: Sequence[tuple[bytes, int, bytes]], *, force: bool
    ) -> None:
        """
        Take in snapshots (object key, version, attributes) of an entity while it `is_clean`.

        Without *force*, one that is older than what is there is passed over.
        """
        self._veil(transaction, (key for key, _, _ in snapshots))
        records = []
        for key, version, attributes in snapshots:
            record = _RECORD.pack(version, 0) + attributes
            if force or self._is_news(transaction, self._objects, key, record):
                records.append((key, record))
        put_many(transaction, self._objects, records)
        self._files.note_all(transaction, records)

    def put_snapshot(
        self, transaction: LmdbTransaction, key: bytes, version: int, attributes: bytes, *, covered: int, force: bool
    ) -> None:
        """Make a snapshot the base of an object, and replay on top what was not applied up to *covered*."""
        self._veil(transaction, [key])
        record = _RECORD.pack(version, 0) + attributes
        unconfirmed = self.unconfirmed(transaction, key)
        if not unconfirmed:
            if force or self._is_news(transaction, self._objects, key, record):
                transaction.put(key, record, db=self._objects)
                self._files.note(transaction, key, record)
        elif force or self._is_news(transaction, self._base, key, record):
            self._drop_confirmed(transaction, key, unconfirmed, covered)
            transaction.put(key, record, db=self._base)
            self._files.note(transaction, key, record)
            self._rebuild(transaction, key)

    def remove(self, transaction: LmdbTransaction, key: bytes, version: int, *, force: bool) -> bool:
        """
        Take note that the server has no such object any more; tell whether it left the view.

        Without *force*, a removal that is older than what is there is passed over.
        """
        self._veil(transaction, [key])
        unconfirmed = self.unconfirmed(transaction, key)
        state = self._base if unconfirmed else self._objects
        if not force and not self._is_news(transaction, state, key, pack_position(version)):
            return False
        self._files.note(transaction, key)
        if not unconfirmed:
            return transaction.delete(key, db=self._objects)
        was_there = transaction.get(key, db=self._objects) is not None
        self._drop_confirmed(transaction, key, unconfirmed, version)
        transaction.delete(key, db=self._base)
        self._rebuild(transaction, key)
        return was_there and transaction.get(key, db=self._objects) is None

    def confirm(self, transaction: LmdbTransaction, key: bytes, version: int) -> None:
        """
        Take the state that the replica's own operations led to as the server's.

        Raises:
            StateLost: There is no such state.
        """
        self._veil(transaction, [key])
        confirmed, others = self._take_confirmed(transaction, key, version)
        view = transaction.get(key, db=self._objects)
        if not confirmed and not others:
            known, flags = (0, 0) if view is None else _RECORD.unpack_from(view)
            if known < version and not flags & _FOLDED:
                raise StateLost(key)
            if view is not None and flags & _FOLDED:
                transaction.put(key, _RECORD.pack(version, 0) + view[_RECORD.size :], db=self._objects)
            return
        if not others:
            # Nothing else is replayed: the view is what is confirmed.
            if view is None:
                raise StateLost(key)
            transaction.put(key, _RECORD.pack(version, 0) + view[_RECORD.size :], db=self._objects)
            if transaction.delete(key, db=self._base):
                self._files.note(transaction, key)
            return
        base = transaction.get(key, db=self._base)
        attributes = None if base is None else decode_trusted(_unpack(base).attributes)
        attributes, _ = self._replayed(transaction, attributes, [seq for seq, _ in confirmed])
        if attributes is None:
            raise StateLost(key)
        record = _RECORD.pack(version, 0) + _encoded(attributes)
        transaction.put(key, record, db=self._base)
        self._files.note(transaction, key, record)
        self._rebuild(transaction, key)

    def stale_keys(self, transaction: LmdbTransaction, version: int) -> Iterator[bytes]:
        """
        Iterate over the objects with operations that were applied at or below *version*; they may be changed.

        Once everything up to it was downloaded, such an operation has left no trace on
        the server (its object was created and deleted in between, say), or none that
        is downloaded.
        """
        last = pack_position(version)
        found = b""
        for entry in scan_keys(transaction, self._unconfirmed):
            key = entry[: -POSITION_BYTES - 1]
            # Gone meanwhile reads as pending.
            applied = transaction.get(entry, _PENDING, db=self._unconfirmed)
            if key != found and _PENDING < applied <= last:
                found = key
                yield key

    def drop_stale(self, transaction: LmdbTransaction, key: bytes, version: int) -> None:
        """Stop replaying what was applied on an object at or below *version*."""
        self._veil(transaction, [key])
        self._take_confirmed(transaction, key, version)
        self._rebuild(transaction, key)

    def fold(self, transaction: LmdbTransaction, key: bytes, version: int) -> None:
        """
        Make what was applied on an object at or below *version* part of its base.

        The view stays as it is. So does the version: what others changed meanwhile
        was not seen here.
        """
        self._veil(transaction, [key])
        taken, others = self._take_confirmed(transaction, key, version)
        if not taken:
            return
        base = transaction.get(key, db=self._base)
        record = None if base is None else _unpack(base)
        base_version = 0 if record is None else record.version
        operations = []
        for seq, applied in taken:
            operation = self._operation(transaction, seq)
            operations.append(operation)
            if operation.kind is OperationKind.CREATE:
                base_version = applied
        self._files.note(transaction, key)
        header = _RECORD.pack(base_version, _FOLDED)
        if not others:
            # Nothing else is replayed: the view is what results.
            view = transaction.get(key, db=self._objects)
            if view is not None:
                transaction.put(key, header + view[_RECORD.size :], db=self._objects)
            transaction.delete(key, db=self._base)
            return
        attributes = None if record is None else decode_trusted(record.attributes)
        attributes = reduce(replay, operations, attributes)
        if attributes is None:
            transaction.delete(key, db=self._base)
        else:
            transaction.put(key, header + _encoded(attributes), db=self._base)
            self._files.note(transaction, key, _encoded(attributes))
        self._rebuild(transaction, key)

    def clear(self, transaction: LmdbTransaction, key: bytes) -> bool:
        """Forget an object, unless something is pending on it; tell whether it left the view."""
        unconfirmed = self.unconfirmed(transaction, key)
        if any(version == 0 for _, version in unconfirmed):
            return False
        self._veil(transaction, [key])
        for seq, _ in unconfirmed:
            transaction.delete(_entry(key, seq), db=self._unconfirmed)
        transaction.delete(key, db=self._base)
        self._files.note(transaction, key)
        return transaction.delete(key, db=self._objects)

    def _take_confirmed(
        self, transaction: LmdbTransaction, key: bytes, version: int
    ) -> tuple[list[tuple[int, int]], bool]:
        """Stop replaying what was applied up to *version*; return each (seq, version), and whether others are left."""
        prefix = key + b"\0"
        last = pack_position(version)
        taken: list[tuple[int, int]] = []
        others = False
        cursor = transaction.cursor(self._unconfirmed)
        found = cursor.set_range(prefix)
        while found:
            entry, applied = cursor.item()
            if not entry.startswith(prefix):
                break
            if _PENDING < applied <= last:
                taken.append((unpack_position(entry[-POSITION_BYTES:]), unpack_position(applied)))
                found = cursor.delete() and bool(cursor.key())
            else:
                others = True
                found = cursor.next()
        return taken, others

    # --- the rule -------------------------------------------------------------

    def _rebuild(self, transaction: LmdbTransaction, key: bytes) -> None:
        """Make the view of an object anew from its base and what is replayed on top."""
        unconfirmed = self.unconfirmed(transaction, key)
        base = transaction.get(key, db=self._base)
        if not unconfirmed:
            if base is None:
                transaction.delete(key, db=self._objects)
            else:
                transaction.put(key, base, db=self._objects)
                transaction.delete(key, db=self._base)
            self._files.note(transaction, key, base or b"")
            return
        record = None if base is None else _unpack(base)
        attributes = None if record is None else decode_trusted(record.attributes)
        attributes, created = self._replayed(transaction, attributes, [seq for seq, _ in unconfirmed])
        if attributes is None:
            transaction.delete(key, db=self._objects)
            self._files.note(transaction, key)
        else:
            # What this replica created anew is not the object that the base is a version of.
            version = 0 if record is None or created else record.version
            shown = _RECORD.pack(version, _DIRTY) + _encoded(attributes)
            transaction.put(key, shown, db=self._objects)
            self._files.note(transaction, key, shown)

    def _replayed(
        self, transaction: LmdbTransaction, attributes: Attributes | None, seqs: Sequence[int]
    ) -> tuple[Attributes | None, bool]:
        """Return what operations make of an object, and whether a creation is among them."""
        created = False
        for seq in seqs:
            operation = self._operation(transaction, seq)
            created = created or operation.kind is OperationKind.CREATE
            attributes = replay(attributes, operation)
        return attributes, created

    def _operation(self, transaction: LmdbTransaction, seq: int) -> Operation:
        data = self._log.get(transaction, seq)
        if data is None:
            raise LogCorrupt(f"the operation at seq {seq} is still needed and not in the log", seq=seq)
        return decode_operation(data)

    def _is_news(self, transaction: LmdbTransaction, database: LmdbDatabase, key: bytes, record: bytes) -> bool:
        present = transaction.get(key, db=database)
        return present is None or present[:POSITION_BYTES] <= record[:POSITION_BYTES]

    def _drop_confirmed(
        self, transaction: LmdbTransaction, key: bytes, unconfirmed: list[tuple[int, int]], version: int
    ) -> None:
        for seq, applied in unconfirmed:
            if 0 < applied <= version:
                transaction.delete(_entry(key, seq), db=self._unconfirmed)


def replay(attributes: Attributes | None, operation: Operation) -> Attributes | None:
    """
    Return what an operation makes of an object (None: there is none).

    An operation that does not fit, because the server's state is no longer what its
    author saw, changes nothing here; the server decides about it.
    """
    if operation.kind is OperationKind.DELETE:
        return None
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return patch.set
    if attributes is None:
        return None
    try:
        return patch.apply(attributes)
    except InvalidValue:
        return attributes


def _entry(key: bytes, seq: int) -> bytes:
    return key + b"\0" + pack_position(seq)


def _scan(transaction: LmdbTransaction, database: LmdbDatabase, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    cursor = transaction.cursor(database)
    if cursor.set_range(start):
        yield from cursor


def _unpack(value: bytes) -> ViewRecord:
    try:
        version, flags = _RECORD.unpack_from(value)
    except struct.error as error:
        raise damaged("a record of an object") from error
    return ViewRecord(version, bool(flags & _DIRTY), value[_RECORD.size :])


def _encoded(attributes: Attributes) -> bytes:
    return encode(attributes) if attributes else EMPTY_MAP

"""
Files: which contents a replica needs, and what is known of them.

    files          object key                 -> the contents that its view and its base refer to
    file_marks     object key                 -> nothing: one of the two has changed since `files` was written
    file_users     SHA-256, who               -> nothing: an object, or an operation that is pending or failed
    file_uploads   seq                        -> the contents that an operation to be uploaded refers to
    file_missing   entity NUL size SHA-256 id -> nothing: the view refers to a content that is not here
    file_states    SHA-256                    -> why the content could not be had, and when to ask for it again
    file_garbage   SHA-256                    -> nothing: its last user has gone

The contents lie beside the tables, in `files`. Whoever changes the view or a base leaves
a mark in the same transaction, and only if files may be concerned: that is seen from the
encoded bytes, so objects without files cost nothing. What the marks mean is worked out
when it is needed: for downloads, and before anything is deleted. An operation names its
contents at once, in the transaction of its commit.

A content is deleted when nobody refers to it, and not within an hour after it was put
there from outside: a program may be about to refer to it.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, TypeVar, cast
from uuid import uuid4

from filelock import FileLock

from tidelog._clock import Clock, system_time_us
from tidelog._contents import READ_BYTES, SHA256_BYTES, Content, ContentDirectory, Part
from tidelog._environment import SCAN_PAGE_KEYS, put_many, scan_keys
from tidelog._errors import InvalidValue, StorageError, damaged
from tidelog._file_reference import (
    FileReference,
    encoded_file_references,
    file_references,
    may_refer_to_files,
)
from tidelog._keys import (
    ObjectKey,
    entity_prefix,
    pack_object_key,
    pack_position,
    unpack_object_key,
    unpack_position,
)
from tidelog._operation import decode_operation
from tidelog_client._meta import Meta

if TYPE_CHECKING:
    from io import BufferedReader

    from tidelog._environment import Environment, LmdbTransaction
    from tidelog_client._view import View

FOLDER: Final = "files"
LOOK_STEP_OBJECTS: Final = 1_000
COLLECT_STEP_CONTENTS: Final = 1_000
# How long a content stays that nobody refers to: a program may have put it there to refer to it.
GRACE_SECONDS: Final = 3600.0
T = TypeVar("T")

# How long a content is not asked for after what came of it was damaged for the second time; from then on twice as long
# each time, up to this. What came the first time may have been of a download that began long ago.
DAMAGED_SECONDS_FIRST: Final = 600.0
DAMAGED_SECONDS_MAX: Final = 24 * 3600.0
# How long a download that nobody goes on with is kept.
LEFTOVER_SECONDS: Final = 7 * 24 * 3600.0

_LOCK_FILE: Final = "files.lock"
# Lies beside the contents, and says what the meta value `files_mark` does: else they are away.
_MARK_FILE: Final = "tidelog-replica"
_CONTENT: Final = struct.Struct(f">B{SHA256_BYTES}sQ")
_SHOWN: Final = 1
_SIZE: Final = struct.Struct(">Q")
# What comes before the reason where damaged bytes came: how many times, and when, in seconds since 1970.
_DAMAGED: Final = struct.Struct(">xHQ")
# No name of an entity is empty, so no object key begins like this.
_OPERATION: Final = b"\0"


class FileState(enum.StrEnum):
    """
    How the content of a file stands in a replica.

    Attributes:
        AVAILABLE: It is here.
        PENDING: It is not here yet, or is not meant to be until somebody opens it.
        FAILED: It could not be had the last time it was tried.
    """

    AVAILABLE = "available"
    PENDING = "pending"
    FAILED = "failed"


class Needed(NamedTuple):
    """A content that something refers to."""

    sha256: bytes
    size: int


class Missing(NamedTuple):
    """A content that is not here, and an object that refers to it."""

    size: int
    sha256: bytes
    key: ObjectKey


class Failed(NamedTuple):
    """
    Why a content could not be had.

    Attributes:
        reason: In a sentence for people.
        is_damaged: Whether bytes came, and in vain: they are not the content.
    """

    reason: str
    is_damaged: bool = False


class FileMarks:
    """The marks that the view leaves. Each method is part of the caller's transaction."""

    def __init__(self, environment: Environment) -> None:
        self._files = environment.database("files")
        self._marks = environment.database("file_marks")
        # Number of a transaction, and whether any object referred to files when it began.
        self._looked: tuple[int, bool] = (-1, False)

    def note(self, transaction: LmdbTransaction, key: bytes, record: bytes = b"") -> None:
        """Note that an object's view or base is now this, or, if empty, is there no more."""
        if may_refer_to_files(record) or self._is_known(transaction, key):
            transaction.put(key, b"", db=self._marks)

    def note_all(self, transaction: LmdbTransaction, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Do what `note` does for many (key, record)."""
        marked = {key for key, record in records if may_refer_to_files(record)}
        if self._is_any_known(transaction):
            marked.update(key for key, _ in records if self._is_known(transaction, key))
        put_many(transaction, self._marks, [(key, b"") for key in marked])

    def _is_known(self, transaction: LmdbTransaction, key: bytes) -> bool:
        return self._is_any_known(transaction) and transaction.get(key, db=self._files) is not None

    def _is_any_known(self, transaction: LmdbTransaction) -> bool:
        number = transaction.id()
        if number != self._looked[0]:
            self._looked = (number, transaction.stat(self._files)["entries"] > 0)
        return self._looked[1]


class Files:
    """
    The contents of a replica, and the tables that tell of them.

    What takes a transaction is part of the caller's; the others open their own.

    Attributes:
        contents: The contents.
    """

    def __init__(self, environment: Environment, view: View, clock: Clock = system_time_us) -> None:
        self._clock = clock
        self.contents = ContentDirectory(environment.path / FOLDER)
        self._environment = environment
        self._view = view
        database = environment.database
        self._files = database("files")
        self._marks = database("file_marks")
        self._users = database("file_users")
        self._uploads = database("file_uploads")
        self._missing = database("file_missing")
        self._states = database("file_states")
        self._garbage = database("file_garbage")
        self._moving = threading.Lock()
        self._meta = Meta(environment)

    # --- contents -------------------------------------------------------------

    def add(self, source: BinaryIO) -> Content:
        """Store what a stream holds. Returns once it is on disk, safe for an hour from being collected."""
        self.check_place()
        part = self.contents.part(uuid4().hex)
        try:
            while chunk := source.read(READ_BYTES):
                part.append(chunk)
            return part.complete(alone=self._uncollected)
        except BaseException:
            part.discard()
            raise

    def keep(self, sha256: bytes) -> bool:
        """Let a content be safe for another hour from being collected; tell whether it is here."""
        return self._uncollected(lambda: self.contents.renew(sha256))

    def adopt(self, part: Part, sha256: bytes, size: int) -> None:
        """Make a downloaded part a content, which no program is about to refer to. Raises ContentCorrupt."""
        part.complete(sha256, size, alone=self._uncollected, at=0.0)

    def check_place(self) -> None:
        """Mark the folder of the contents, if it was not yet; raise StorageError if what was marked is away."""
        mark = self._meta.read("files_mark")
        if not mark:
            self._uncollected(self._mark_new_place)
        elif self.contents.mark(_MARK_FILE) is None and self._knows_what_is_here():
            self.contents.set_mark(_MARK_FILE, mark)  # it went astray, and nothing else
        else:
            self.require_place()

    def _knows_what_is_here(self) -> bool:
        with self._environment.read() as transaction:
            return any(
                next(iter(scan_keys(transaction, self._users, one.sha256)), None) is not None
                for one in self.contents.contents()
            )

    def _mark_new_place(self) -> None:
        if not self._meta.read("files_mark"):  # by somebody else meanwhile
            self.mark_place()

    def require_place(self) -> None:
        """Raise StorageError if the folder of the contents was marked, and is away."""
        mark = self._meta.read("files_mark")
        if mark and self.contents.mark(_MARK_FILE) != mark:
            raise StorageError(
                f"{self.contents.path}: the contents of this replica's files are away: nothing is taken for lost. Put "
                "the folder back (is a disk not mounted?), or set aside what is damaged if it is gone for good"
            )

    def mark_place(self) -> None:
        """Mark the folder of the contents, whatever was there before."""
        mark = uuid4().hex.encode()
        self.contents.set_mark(_MARK_FILE, mark)
        self._meta.write(files_mark=mark)

    def has(self, sha256: bytes, size: int) -> bool:
        """Tell whether a content is here."""
        return self.contents.size(sha256) == size

    def has_other_size(self, sha256: bytes, size: int) -> bool:
        """Tell whether a content is here, undamaged, and of another size: then there is none of this one."""
        return self.contents.size(sha256) not in {None, size} and self._is_sound(sha256)

    def is_sound(self, sha256: bytes, size: int) -> bool:
        """Tell whether a content is here, of that size and undamaged."""
        return self.has(sha256, size) and self._is_sound(sha256)

    def _is_sound(self, sha256: bytes) -> bool:
        file = self.contents.open(sha256)
        if file is None:
            return False
        with file:
            return hashlib.file_digest(cast("BufferedReader", file), "sha256").digest() == sha256

    def check_references(self, attributes: Mapping[str, Any]) -> None:
        """Raise InvalidValue if an attribute refers to a content that is here, and says another size of it."""
        for attribute, reference in file_references(attributes):
            if self.has_other_size(reference.sha256, reference.size):
                raise InvalidValue(
                    f"attribute {attribute!r} says that the file {reference.name!r} has {reference.size} bytes: "
                    f"it has {self.contents.size(reference.sha256)}"
                )

    def open(self, reference: FileReference) -> BinaryIO | None:
        """Open the content of a file, or return None if it is not here."""
        return self.contents.open(reference.sha256) if self.has(reference.sha256, reference.size) else None

    def state(self, reference: FileReference) -> FileState:
        """Return how the content of a file stands."""
        if self.has(reference.sha256, reference.size):
            return FileState.AVAILABLE
        return FileState.PENDING if self.reason(reference.sha256) is None else FileState.FAILED

    def reason(self, sha256: bytes) -> str | None:
        """Return why a content could not be had, or None."""
        with self._environment.read() as transaction:
            value = transaction.get(sha256, db=self._states)
        return None if value is None else _unpacked_state(value)[2]

    def put_off(self) -> dict[bytes, str]:
        """Return the contents that are not to be asked for yet, because what came of them was damaged, and why."""
        now = self._clock() / 1e6
        found = {}
        with self._environment.read() as transaction:
            for sha256, value in transaction.cursor(self._states):
                count, at, reason = _unpacked_state(value)
                pause = min(DAMAGED_SECONDS_FIRST * 2.0 ** (count - 2), DAMAGED_SECONDS_MAX) if count > 1 else 0.0
                if at <= now < at + pause:
                    found[sha256] = reason
        return found

    def note_gone(self, sha256: bytes, folder: Path) -> Path:
        """
        Note that a content is not here, or damaged: then what is left of it is moved to the file returned.

        One that is sound stays: somebody said another size of it, or it has come again meanwhile.
        """
        target = folder / f"content-{sha256.hex()}"

        def move_out() -> None:
            if not self._is_sound(sha256):
                self.contents.move_out(sha256, target)

        self._uncollected(move_out)

        def work(transaction: LmdbTransaction) -> None:
            for user in scan_keys(transaction, self._users, sha256):
                key = user[SHA256_BYTES:]
                if not key.startswith(_OPERATION):
                    transaction.put(key, b"", db=self._marks)

        self._environment.write(work)
        return target

    def set_aside_damaged(self, folder: Path) -> dict[bytes, Path]:
        """
        Move damaged contents to a folder, and note which ones are not here, so that they are downloaded again.

        What is away is given up.
        """
        if self._meta.read("files_mark"):
            self._uncollected(self.mark_place)
        moved = {}
        for content in self.contents.contents():
            if not self._is_sound(content.sha256):
                moved[content.sha256] = self.note_gone(content.sha256, folder)
        self._note_vanished()
        return moved

    def _note_vanished(self) -> None:
        """Mark the objects that show a content which is not here any more, and of which that is not known."""
        after = b""
        while True:
            with self._environment.read() as transaction:
                keys = list(islice(scan_keys(transaction, self._files, after=after), LOOK_STEP_OBJECTS))
                shown = [(key, self._shown_here(transaction, key)) for key in keys]
            if not keys:
                return
            self._mark([(key, b"") for key, needed in shown if not all(self.has(*one) for one in needed)])
            after = keys[-1]

    def _mark(self, marks: list[tuple[bytes, bytes]]) -> None:
        if marks:
            self._environment.write(lambda transaction: put_many(transaction, self._marks, marks))

    def _shown_here(self, transaction: LmdbTransaction, key: bytes) -> list[Needed]:
        """Return the contents that an object shows and that are here, as far as is noted."""
        return [
            Needed(sha256, size)
            for sha256, (shown, size) in self.references(transaction, key).items()
            if shown and not self.is_missing(transaction, key, sha256, size)
        ]

    def _uncollected(self, work: Callable[[], T]) -> T:
        """
        Do something while no content is deleted, by whatever process; or delete some while nobody does that.

        So no content is deleted that was made young after its age was looked at. No context manager will do: an
        interrupt at its beginning may leave the lock taken.
        """
        lock = FileLock(self._environment.path / _LOCK_FILE, is_singleton=False)
        # Who waits for another process asks now and then; threads of this one would wait for each other like that.
        with self._moving:
            try:
                lock.acquire()
                return work()
            finally:
                try:
                    lock.release()
                finally:
                    lock.release()  # does nothing, unless an interrupt came in the way of the first

    # --- operations -----------------------------------------------------------

    def note_operations(self, transaction: LmdbTransaction, operations: Iterable[tuple[int, bytes]]) -> None:
        """Note what operations (seq, serialized) that are to be uploaded refer to."""
        for seq, data in operations:
            if may_refer_to_files(data):
                self._note_operation(transaction, seq, data)

    def _note_operation(self, transaction: LmdbTransaction, seq: int, data: bytes) -> None:
        needed = {one.sha256: (False, one.size) for one in set_references(data)}
        if needed:
            transaction.put(pack_position(seq), packed_references(needed), db=self._uploads)
            put_many(transaction, self._users, [(_used_by_operation(sha256, seq), b"") for sha256 in needed])

    def note_late(self, seq: int, data: bytes) -> None:
        """Note of an operation to be uploaded what was not noted with its commit: by an older version, say."""
        if not may_refer_to_files(data):
            return
        with self._environment.read() as transaction:
            if transaction.get(pack_position(seq), db=self._uploads) is not None:
                return

        def work(transaction: LmdbTransaction) -> None:
            self._note_operation(transaction, seq, data)
            transaction.put(pack_object_key(*decode_operation(data).key), b"", db=self._marks)

        self._environment.write(work)

    def any_uploads(self, transaction: LmdbTransaction) -> bool:
        """Tell whether an operation to be uploaded refers to contents."""
        return transaction.stat(self._uploads)["entries"] > 0

    def settle_operation(self, transaction: LmdbTransaction, seq: int, *, applied: bool) -> None:
        """Note that an operation is settled. One that failed keeps its contents while it is logged."""
        packed = transaction.pop(pack_position(seq), db=self._uploads)
        if packed is not None and applied:
            self._release(transaction, seq, _unpacked(packed))

    def forget_operation(self, transaction: LmdbTransaction, seq: int, data: bytes) -> None:
        """Note that a settled operation leaves the log."""
        if may_refer_to_files(data):
            self._release(transaction, seq, {one.sha256 for one in set_references(data)})

    def _release(self, transaction: LmdbTransaction, seq: int, contents: Iterable[bytes]) -> None:
        for sha256 in contents:
            self._drop_user(transaction, _used_by_operation(sha256, seq))

    def uploads(self, *, until: int) -> Iterator[tuple[int, list[Needed]]]:
        """Iterate over the operations up to a seq that refer to contents, with these, page by page."""
        start = b""
        last = pack_position(until)
        while True:
            with self._environment.read() as transaction:
                cursor = transaction.cursor(self._uploads)
                found = cursor.set_range(start) if start else cursor.first()
                page: list[tuple[bytes, bytes]] = []
                while found and len(page) < SCAN_PAGE_KEYS and cursor.key() <= last:
                    page.append(cursor.item())
                    found = cursor.next()
            for key, packed in page:
                needed = [Needed(sha256, size) for sha256, (_, size) in _unpacked(packed).items()]
                yield unpack_position(key), needed
            if len(page) < SCAN_PAGE_KEYS:
                return
            start = page[-1][0] + b"\0"

    # --- objects --------------------------------------------------------------

    def look_again(self) -> Iterator[ObjectKey]:
        """
        Work out what the marked objects refer to, some at a time.

        Yields the keys of those that refer to a content which is not here.
        """
        while True:
            with self._environment.read() as transaction:
                if not transaction.stat(self._marks)["entries"]:
                    return
            yield from map(unpack_object_key, self._environment.write(self._look_step))

    def _look_step(self, transaction: LmdbTransaction) -> list[bytes]:
        lacking = []
        cursor = transaction.cursor(self._marks)
        for _ in range(LOOK_STEP_OBJECTS):
            if not cursor.first():
                break
            key = cursor.key()
            cursor.delete()
            if self._look_at(transaction, key):
                lacking.append(key)
        return lacking

    def _look_at(self, transaction: LmdbTransaction, key: bytes) -> bool:
        """Write anew what one object refers to; tell whether it lacks something."""
        before = _unpacked(transaction.get(key, b"", db=self._files))
        after = references_of(self._view, transaction, key)
        for sha256 in before.keys() - after.keys():
            self._drop_user(transaction, sha256 + key)
        put_many(transaction, self._users, [(sha256 + key, b"") for sha256 in after.keys() - before.keys()])
        for sha256, (shown, size) in before.items():
            if shown and after.get(sha256) != (shown, size):
                transaction.delete(_missing_key(key, sha256, size), db=self._missing)
        lacks = [(sha256, size) for sha256, (shown, size) in after.items() if shown and not self.has(sha256, size)]
        put_many(transaction, self._missing, [(_missing_key(key, *one), b"") for one in lacks])
        for sha256, _ in lacks:
            why_not = transaction.get(sha256, db=self._states)
            if why_not is not None and not _unpacked_state(why_not)[0]:
                transaction.delete(sha256, db=self._states)  # the server may have it by now
        if after:
            transaction.put(key, packed_references(after), db=self._files)
        else:
            transaction.delete(key, db=self._files)
        return bool(lacks)

    def missing(self, entity: str) -> Iterator[Missing]:
        """Iterate over the contents of an entity that are not here, the smallest first, each page as it is then."""
        prefix = entity_prefix(entity)
        start = prefix
        while True:
            with self._environment.read() as transaction:
                cursor = transaction.cursor(self._missing)
                found = cursor.set_range(start)
                page: list[bytes] = []
                while found and len(page) < SCAN_PAGE_KEYS and cursor.key().startswith(prefix):
                    page.append(cursor.key())
                    found = cursor.next()
            for key in page:
                yield unpack_missing(key)
            if len(page) < SCAN_PAGE_KEYS:
                return
            start = page[-1] + b"\0"

    def missing_of(self, key: ObjectKey) -> list[Missing]:
        """Return the contents that one object refers to and that are not here."""
        packed = pack_object_key(*key)
        with self._environment.read() as transaction:
            known = _unpacked(transaction.get(packed, b"", db=self._files))
            return [
                Missing(size, sha256, key)
                for sha256, (shown, size) in known.items()
                if shown and transaction.get(_missing_key(packed, sha256, size), db=self._missing) is not None
            ]

    def holders(self, sha256: bytes, count_max: int) -> list[ObjectKey]:
        """Return some of the objects by which the server gives a content, as far as the replica knows."""
        found: list[ObjectKey] = []
        with self._environment.read() as transaction:
            for user in scan_keys(transaction, self._users, sha256):
                key = user[SHA256_BYTES:]
                if not key.startswith(_OPERATION) and sha256 in _server_references(self._view, transaction, key):
                    found.append(unpack_object_key(key))
                    if len(found) >= count_max:
                        break
        return found

    def failed_objects(self, count_max: int) -> list[ObjectKey]:
        """Return some of the objects that refer to contents which could not be had."""
        found: list[ObjectKey] = []
        with self._environment.read() as transaction:
            for sha256 in transaction.cursor(self._states).iternext(keys=True, values=False):
                for user in scan_keys(transaction, self._users, sha256):
                    if len(found) >= count_max:
                        return found
                    if not user[SHA256_BYTES:].startswith(_OPERATION):
                        found.append(unpack_object_key(user[SHA256_BYTES:]))
        return found

    def missing_entities(self) -> list[str]:
        """Return the entities that have objects which lack a content."""
        found = []
        with self._environment.read() as transaction:
            cursor = transaction.cursor(self._missing)
            more = cursor.first()
            while more:
                entity = cursor.key().partition(b"\0")[0]
                found.append(entity.decode())
                more = cursor.set_range(entity + b"\1")
        return found

    def note_arrived(self, arrived: Collection[Needed], failed: Mapping[bytes, Failed]) -> None:
        """Note which contents are here now, and why others could not be had."""
        if not arrived and not failed:
            return

        def work(transaction: LmdbTransaction) -> None:
            for one in arrived:
                for user in scan_keys(transaction, self._users, one.sha256):
                    key = user[SHA256_BYTES:]
                    if not key.startswith(_OPERATION):
                        transaction.delete(_missing_key(key, *one), db=self._missing)
                transaction.delete(one.sha256, db=self._states)
            for sha256, why in failed.items():
                value = why.reason.encode(errors="replace")
                if why.is_damaged:
                    count, _, _ = _unpacked_state(transaction.get(sha256, b"", db=self._states))
                    value = _DAMAGED.pack(min(count + 1, 1_000), max(0, self._clock() // 1_000_000)) + value
                transaction.put(sha256, value, db=self._states)

        self._environment.write(work)

    # --- what nobody needs ----------------------------------------------------

    def collect(self) -> int:
        """Delete contents whose last user has gone; return how many went."""
        count = 0
        start = b""
        while True:
            with self._environment.read() as transaction:
                # What was marked since may be a new user.
                if not transaction.stat(self._garbage)["entries"] or transaction.stat(self._marks)["entries"]:
                    return count
            step = partial(self._environment.write, partial(self._collect, start=start))
            deleted, start = self._uncollected(step)
            count += deleted
            if not start:
                return count

    def _collect(self, transaction: LmdbTransaction, *, start: bytes) -> tuple[int, bytes]:
        if transaction.stat(self._marks)["entries"]:
            return 0, b""
        count = 0
        old = self._clock() / 1e6 - GRACE_SECONDS
        cursor = transaction.cursor(self._garbage)
        found = cursor.set_range(start) if start else cursor.first()
        for _ in range(COLLECT_STEP_CONTENTS):
            if not found:
                return count, b""
            sha256 = cursor.key()
            if not self._is_used(transaction, sha256):
                content = self.contents.find(sha256)
                if content is not None and content.time > old:
                    found = cursor.next()  # its turn comes
                    continue
                self.contents.delete(sha256)
                self.contents.part(sha256.hex()).discard()
                with suppress(OSError):  # a system that keeps what is locked
                    turn_path(self.contents.part(sha256.hex())).unlink()
                transaction.delete(sha256, db=self._states)
                count += content is not None
            found = cursor.delete() and bool(cursor.key())
        return count, cursor.key() if found else b""

    def sweep(self) -> None:
        """
        Find contents that nobody ever referred to, and what broken off transfers left, for `collect`.

        And those that vanished, to be downloaded again. Raises StorageError if the contents are away.
        """
        self.check_place()
        self._note_vanished()
        stray: list[tuple[bytes, bytes]] = []
        old = self._clock() / 1e6 - GRACE_SECONDS
        is_any_ahead = False
        corrects = self._corrects_times()
        for content in self.contents.contents():
            if content.time > old + 2 * GRACE_SECONDS:
                is_any_ahead = True
                if corrects:
                    self.contents.renew(content.sha256, old + GRACE_SECONDS)
            if content.time <= old:
                with self._environment.read() as transaction:
                    if not self._is_used(transaction, content.sha256):
                        stray.append((content.sha256, b""))
            if len(stray) >= COLLECT_STEP_CONTENTS:
                self._note_garbage(stray)
                stray = []
        self._note_garbage(stray)
        if is_any_ahead != bool(self._meta.read("files_ahead")):
            self._meta.write(files_ahead=str(self._clock() / 1e6).encode() if is_any_ahead else b"")
        self.contents.delete_leftovers(LEFTOVER_SECONDS, self._clock() / 1e6)

    def _corrects_times(self) -> bool:
        """
        Tell whether contents of the future came under a clock that was ahead: else they would never go.

        Or the clock is behind just now, and they are young: that shows when one has looked twice, an hour apart.
        """
        noticed = float(self._meta.read("files_ahead") or 0)
        return 0 < noticed < self._clock() / 1e6 - GRACE_SECONDS

    def is_idle(self) -> bool:
        """Tell whether nothing is to be looked at again, uploaded, downloaded or deleted: there are no files, say."""
        tables = (self._marks, self._uploads, self._missing, self._garbage)
        with self._environment.read() as transaction:
            return not any(transaction.stat(table)["entries"] for table in tables)

    def any_contents(self) -> bool:
        """Tell whether there ever was a content."""
        return bool(self._meta.read("files_mark")) or self.contents.path.exists()

    def _note_garbage(self, found: list[tuple[bytes, bytes]]) -> None:
        if found:
            self._environment.write(lambda transaction: put_many(transaction, self._garbage, found))

    def _is_used(self, transaction: LmdbTransaction, sha256: bytes) -> bool:
        cursor = transaction.cursor(self._users)
        return cursor.set_range(sha256) and cursor.key().startswith(sha256)

    def _drop_user(self, transaction: LmdbTransaction, user: bytes) -> None:
        transaction.delete(user, db=self._users)
        sha256 = user[:SHA256_BYTES]
        if not self._is_used(transaction, sha256):
            transaction.put(sha256, b"", db=self._garbage)

    # --- what a verification looks at ------------------------------------------

    def referring(self, transaction: LmdbTransaction) -> Iterator[bytes]:
        """Iterate over the keys of the objects of which is noted what they refer to."""
        yield from scan_keys(transaction, self._files)

    def references(self, transaction: LmdbTransaction, key: bytes) -> References:
        """Return what is noted of an object."""
        return _unpacked(transaction.get(key, b"", db=self._files))

    def is_marked(self, transaction: LmdbTransaction, key: bytes) -> bool:
        """Tell whether what is noted of an object is to be worked out again."""
        return transaction.get(key, db=self._marks) is not None

    def objects(self, transaction: LmdbTransaction, sha256: bytes) -> Iterator[bytes]:
        """Iterate over the keys of the objects that refer to a content, or may: what they do is to be worked out."""
        for user in scan_keys(transaction, self._users, sha256):
            if not user[SHA256_BYTES:].startswith(_OPERATION):
                yield user[SHA256_BYTES:]
        yield from scan_keys(transaction, self._marks)

    def is_user(self, transaction: LmdbTransaction, sha256: bytes, user: bytes | int) -> bool:
        """Tell whether an object, or an operation, is noted as one that refers to a content."""
        entry = _used_by_operation(sha256, user) if isinstance(user, int) else sha256 + user
        return transaction.get(entry, db=self._users) is not None

    def is_missing(self, transaction: LmdbTransaction, key: bytes, sha256: bytes, size: int) -> bool:
        """Tell whether an object is noted as one that lacks a content."""
        return transaction.get(_missing_key(key, sha256, size), db=self._missing) is not None

    def all_users(self, transaction: LmdbTransaction) -> Iterator[tuple[bytes, bytes | int]]:
        """Iterate over (content, the key of an object or the seq of an operation that refers to it)."""
        for entry in scan_keys(transaction, self._users):
            sha256, user = entry[:SHA256_BYTES], entry[SHA256_BYTES:]
            yield sha256, unpack_position(user[1:]) if user.startswith(_OPERATION) else user

    def noted_uploads(self, transaction: LmdbTransaction) -> Iterator[tuple[int, References]]:
        """Iterate over the operations of which is noted what they refer to."""
        for key, packed in transaction.cursor(self._uploads):
            yield unpack_position(key), _unpacked(packed)


# The contents that an object refers to: SHA-256 to whether its view does, and the size.
References = dict[bytes, tuple[bool, int]]


def turn_path(part: Part) -> Path:
    """Return the file whose lock says who writes a part."""
    return Path(f"{part.path}.lock")


def set_references(data: bytes) -> list[FileReference]:
    """Return the file references that an operation sets."""
    return [reference for _, reference in file_references(decode_operation(data).decoded_patch().set)]


def references_of(view: View, transaction: LmdbTransaction, key: bytes) -> References:
    """Return what the view and the base of an object refer to."""
    found: References = {}
    for record, is_shown in ((view.base(transaction, key), False), (view.prepared(transaction, key), True)):
        if record is not None:
            for one in encoded_file_references(record.attributes).values():
                found[one.sha256] = (is_shown, one.size)
    return found


def _server_references(view: View, transaction: LmdbTransaction, key: bytes) -> set[bytes]:
    """Return the contents to which an object refers in the server's newest state that is known of it."""
    record = view.prepared(transaction, key)
    if record is None or record.dirty:
        record = view.base(transaction, key)
    return set() if record is None else {one.sha256 for one in encoded_file_references(record.attributes).values()}


def packed_references(references: References) -> bytes:
    """Return the bytes to remember them by."""
    return b"".join(
        _CONTENT.pack(_SHOWN if shown else 0, sha256, size) for sha256, (shown, size) in sorted(references.items())
    )


def _unpacked(packed: bytes) -> References:
    try:
        return {sha256: (bool(flags & _SHOWN), size) for flags, sha256, size in _CONTENT.iter_unpack(packed)}
    except struct.error as error:
        raise damaged("what is known of the files of an object or operation") from error


def _unpacked_state(value: bytes) -> tuple[int, int, str]:
    """Return how many times damaged bytes of a content came, when that was, and why it could not be had."""
    is_damaged = value.startswith(b"\0") and len(value) >= _DAMAGED.size
    count, at = _DAMAGED.unpack_from(value) if is_damaged else (0, 0)
    return count, at, value[_DAMAGED.size if is_damaged else 0 :].decode(errors="replace")


def _used_by_operation(sha256: bytes, seq: int) -> bytes:
    return sha256 + _OPERATION + pack_position(seq)


def _missing_key(key: bytes, sha256: bytes, size: int) -> bytes:
    entity, _, id_ = key.partition(b"\0")
    return entity + b"\0" + _SIZE.pack(size) + sha256 + id_


def unpack_missing(entry: bytes) -> Missing:
    """Return what a key of the table `file_missing` says."""
    entity, _, rest = entry.partition(b"\0")
    size, sha256, id_ = rest[: _SIZE.size], rest[_SIZE.size :][:SHA256_BYTES], rest[_SIZE.size + SHA256_BYTES :]
    return Missing(int.from_bytes(size, "big"), sha256, (entity.decode(), id_.decode()))

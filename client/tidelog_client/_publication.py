"""
Publication: downloaded pages on their way into the view.

    incoming     page number    -> downloaded page, as it came (mode all, until it is published)
    merging      page number    -> the same for the other modes
    seen         object key     -> (while a reconciliation is published) it was in the download
    ahead        object key     -> its state came without the cursor, and is newer or not of the projection

Nothing shows before all of a download does. What fits into one transaction is
published in one, with the cursor; more is published in steps, behind a curtain (see
`_curtain`), which are taken up again after a crash: how the publication ends is on disk
before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, NamedTuple, cast
from zlib import crc32

import msgpack
from google.protobuf.message import DecodeError

from tidelog._downloads import DownloadMode
from tidelog._environment import put_many, scan_keys
from tidelog._errors import MassRemoval, StorageError, damaged
from tidelog._keys import pack_object_key, pack_position, unpack_object_key, unpack_position
from tidelog._limits import PAGE_OBJECTS_MAX
from tidelog.v1 import sync_pb2
from tidelog_client._plans import Plans
from tidelog_client._report import PublishedCounts
from tidelog_client._view import StateLost, View

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbDatabase, LmdbTransaction
    from tidelog_client._lineage import Lineage
    from tidelog_client._meta import Meta

PUBLISH_OBJECTS_MAX: Final = 100_000
PUBLISH_BYTES_MAX: Final = 128 * 1024 * 1024
PUBLISH_STEP_PAGES: Final = 20
MERGE_STEP_PAGES: Final = PUBLISH_OBJECTS_MAX // PAGE_OBJECTS_MAX
END_STEP_OBJECTS: Final = 100_000

# More objects of an entity, and more than half of them, are not removed without a stated cause, or consent.
REMOVED_OBJECTS_UNASKED: Final = 20
# So many bits for each object tell whether a download has brought it before, for most; and so many, 16 MiB, in all.
GUARD_BITS_PER_OBJECT: Final = 64
GUARD_BITS_MAX: Final = 1 << 27
# Where that says too little, so many objects at a time are told apart, which is memory.
GUARD_OBJECTS_AT_ONCE: Final = 100_000

_NEWEST: Final = (1 << 63) - 1


class PageDamaged(StorageError):
    """A page on its way into the view cannot be read: all of it must be sent again."""


class Publication:
    """Keeps what is downloaded, and puts it into the view once it is complete."""

    def __init__(self, environment: Environment, view: View, meta: Meta, lineage: Lineage) -> None:
        self._environment = environment
        self._view = view
        self._meta = meta
        self._lineage = lineage
        self._incoming = environment.database("incoming")
        self._merging = environment.database("merging")
        self._seen = environment.database("seen")
        self._ahead = environment.database("ahead")

    def stage(self, pages: Sequence[bytes], object_count: int, resume_token: bytes) -> None:
        """Keep downloaded pages on disk, and where the download can go on."""
        self._environment.write(lambda transaction: self._stage(transaction, pages, object_count, resume_token))

    def _stage(
        self, transaction: LmdbTransaction, pages: Sequence[bytes], object_count: int, resume_token: bytes
    ) -> None:
        _append_pages(transaction, self._incoming, pages)
        count = object_count + unpack_position(self._meta.get(transaction, "staged_count"))
        size_bytes = sum(map(len, pages)) + unpack_position(self._meta.get(transaction, "staged_bytes"))
        self._meta.put(
            transaction,
            staged_count=pack_position(count),
            staged_bytes=pack_position(size_bytes),
            resume_token=resume_token,
        )

    def discard_staged(self) -> None:
        """Forget pages that were kept."""
        with self._environment.read() as transaction:
            if not transaction.stat(self._incoming)["entries"] and not self._meta.get(transaction, "resume_token"):
                return

        def work(transaction: LmdbTransaction) -> None:
            transaction.drop(self._incoming, delete=False)
            self._meta.put(transaction, staged_count=b"", staged_bytes=b"", resume_token=b"")

        self._environment.write(work)

    def publish(
        self,
        pages: Sequence[bytes],
        object_count: int,
        *,
        complete: sync_pb2.SessionComplete,
        plans: Plans,
        guards_removals: bool,
        removals_accepted: bool,
    ) -> PublishedCounts:
        """
        Put the staged pages, then *pages*, into the view, and the cursor with them.

        Up to 100,000 objects and 128 MiB change in one transaction. More are published
        in steps, which are taken up again after a crash by `finish`, and show with the last.

        Args:
            pages: The pages that were not staged.
            object_count: How many objects they bring.
            complete: Where the download ends.
            plans: What was downloaded of which entity, and what is reconciled.
            guards_removals: Whether much may be removed only for a cause that the server states, or with consent.
            removals_accepted: Whether there is that consent.

        Raises:
            StateLost: A confirmation has nothing to confirm. Nothing shows.
            PageDamaged: A page cannot be read. Nothing shows.
            MassRemoval: Much would be removed. Nothing was published.
        """
        if not pages and self._stands_at(complete.cursor, plans):
            return PublishedCounts()
        if not removals_accepted:
            self._check_removals(pages, plans, guards_removals=guards_removals)
        staged_count = unpack_position(self._meta.read("staged_count"))
        staged_bytes = unpack_position(self._meta.read("staged_bytes"))
        end = _PublishingEnd(
            complete.cursor,
            complete.version,
            complete.checkpoint,
            plans,
            track_seen=plans.reconcile_any and self._has_objects(),
            rebases=self._lineage.is_rebasing,
            asks_later=guards_removals and plans.is_unexplained,
        )
        if staged_count + object_count <= PUBLISH_OBJECTS_MAX and staged_bytes <= PUBLISH_BYTES_MAX:
            with suppress(_TooMuchAtOnce):
                return self._environment.write(lambda transaction: self._publish_at_once(transaction, pages, end))
        self._environment.write(partial(self._begin_steps, pages=pages, object_count=object_count, end=end))
        return self.finish()

    def is_under_way(self) -> bool:
        """Tell whether a publication was begun that did not come to its end."""
        return bool(self._meta.read("publishing") or self._meta.read("merge_end"))

    def finish(self) -> PublishedCounts:
        """Go on with a publication that was begun. Does nothing if there is none."""
        counts = PublishedCounts()
        while packed := self._meta.read("publishing"):
            end = _PublishingEnd.unpack(packed)
            counts = counts.plus(self._environment.write(partial(self._publish_step, end=end)))
        while packed := self._meta.read("merge_end"):
            merge_end = _MergeEnd.unpack(packed)
            counts = counts.plus(self._environment.write(partial(self._merge_step, end=merge_end)))
        return counts

    def _check_removals(self, pages: Sequence[bytes], plans: Plans, *, guards_removals: bool) -> None:
        """Raise MassRemoval if a reconciliation lacks more than half of an entity, and more than 20 objects."""
        with self._environment.read() as transaction:
            unexplained = self._unexplained(transaction)
            if not guards_removals and not unexplained:
                return
            known = {
                entity: self._view.server_known_count(transaction, entity)
                for entity in self._view.entities(transaction)
                if plans.reconciles(entity)
                and (entity in unexplained or (guards_removals and not plans.states_cause(entity)))
            }
            if not known:
                return
            # What is created anew as soon as the server takes it stays in the view until then.
            waiting = {key for seq, key in self._lineage.waiting(transaction) if self._view.creates(transaction, seq)}
            kept = partial(self._kept, transaction, pages, waiting, known)
            count = sum(known.values())
            lost = _lost(known, _mostly_distinct(kept(), count))
            if _is_much(lost, known):  # or it is not, and some objects passed for others
                lost = _lost(known, _distinct(kept, count))
        if _is_much(lost, known):
            raise MassRemoval(removed=lost, present=known)

    def _kept(
        self,
        transaction: LmdbTransaction,
        pages: Sequence[bytes],
        waiting: Collection[bytes],
        entities: Container[str],
    ) -> Iterator[bytes]:
        """Yield the known objects of some entities that a download brings, maybe more than once, and that wait."""
        brought = (
            pack_object_key(one.entity, one.id)
            for data in chain(_pages(transaction, self._incoming), pages)
            for one in _page(data).snapshots
            if one.entity in entities
        )
        for key in chain(brought, (key for key in waiting if unpack_object_key(key)[0] in entities)):
            if self._view.is_server_known(transaction, key):
                yield key

    def _unexplained(self, transaction: LmdbTransaction) -> set[str]:
        """Return the entities that were not downloaded when all was reconciled and the server did not say why."""
        data = self._meta.get(transaction, "unexplained")
        return set(msgpack.unpackb(data)) if data else set()

    def _note_unexplained(self, transaction: LmdbTransaction, end: _PublishingEnd) -> None:
        """
        Note whose objects are still as a history has them that the server may have lost.

        That the replica wants them again is then no cause for what goes with it.
        """
        known = self._unexplained(transaction)
        noted = {entity for entity in known if not end.plans.reconciles(entity)}
        if end.asks_later:
            noted.update(entity for entity in self._view.entities(transaction) if not end.plans.downloads(entity))
        if noted != known:
            self._meta.put(transaction, unexplained=cast("bytes", msgpack.packb(sorted(noted))))

    def stage_merge(self, pages: Sequence[bytes]) -> None:
        """Keep pages of a download without a cursor on disk until it is complete."""
        self._environment.write(lambda transaction: _append_pages(transaction, self._merging, pages))

    def discard_merge(self) -> None:
        """Forget pages that `stage_merge` kept for a download that was not completed."""
        with self._environment.read() as transaction:
            if not transaction.stat(self._merging)["entries"]:
                return
        self._environment.write(lambda transaction: transaction.drop(self._merging, delete=False))

    def merge(self, pages: Sequence[bytes], cursor: bytes = b"", checkpoint: bytes = b"") -> PublishedCounts:
        """
        Put the pages that `stage_merge` kept, then *pages*, into the view.

        Up to 100,000 objects and 128 MiB change in one transaction. More do in steps, which are
        taken up again after a crash by `finish`, and show with the last. The replica stands where
        it stood; *cursor*, unless it is empty, says less of that than the one it had.
        """
        end = _MergeEnd(cursor, checkpoint)
        if self._fits_a_merge(pages):
            return self._environment.write(lambda transaction: self._merge_at_once(transaction, pages, end))
        self._environment.write(partial(self._begin_merge, pages=pages, end=end))
        return self.finish()

    def _fits_a_merge(self, pages: Sequence[bytes]) -> bool:
        """Tell whether the pages that `stage_merge` kept, and *pages*, go into one transaction."""
        with self._environment.read() as transaction:
            count = transaction.stat(self._merging)["entries"] + len(pages)
            if count > MERGE_STEP_PAGES:
                return False
            return sum(len(page) for page in chain(_pages(transaction, self._merging), pages)) <= PUBLISH_BYTES_MAX

    def _merge_at_once(self, transaction: LmdbTransaction, pages: Sequence[bytes], end: _MergeEnd) -> PublishedCounts:
        counts = PublishedCounts()
        for page in chain(_pages(transaction, self._merging), pages):
            counts = counts.plus(self._merge(transaction, _page(page)))
        self._end_merge(transaction, end)
        return counts

    def _begin_merge(self, transaction: LmdbTransaction, pages: Sequence[bytes], end: _MergeEnd) -> None:
        _append_pages(transaction, self._merging, pages)
        self._meta.put(transaction, merge_end=end.pack())
        self._view.draw(transaction)

    def _merge_step(self, transaction: LmdbTransaction, end: _MergeEnd) -> PublishedCounts:
        counts = PublishedCounts()
        cursor = transaction.cursor(self._merging)
        room_bytes = PUBLISH_BYTES_MAX
        for _ in range(MERGE_STEP_PAGES):
            if not cursor.first():
                self._end_merge(transaction, end)
                self._view.unveil(transaction)
                break
            page = cursor.value()
            counts = counts.plus(self._merge(transaction, _page(page)))
            cursor.delete()
            room_bytes -= len(page)
            if room_bytes <= 0:
                break
        return counts

    def _end_merge(self, transaction: LmdbTransaction, end: _MergeEnd) -> None:
        transaction.drop(self._merging, delete=False)
        self._lineage.note_checkpoint(transaction, end.checkpoint)
        if end.cursor:
            self._meta.put(transaction, cursor=end.cursor)
        self._meta.put(transaction, merge_end=b"")

    def has_own_states(self) -> bool:
        """
        Tell whether the replica still has whatever its own operations led to, so that the server may confirm it.

        Without a cursor nothing says what part of its objects it was shown by sessions of other modes.
        """
        with self._environment.read() as transaction:
            if self._meta.get(transaction, "state_lost"):
                return False
            return bool(self._meta.get(transaction, "cursor")) or not transaction.stat(self._ahead)["entries"]

    def start_over(self) -> None:
        """
        Forget where the server's state is known up to, so that all of it is sent again.

        What is prepared of a publication does not show before that.
        """
        self._environment.write(self.forget_states)

    def forget_states(self, transaction: LmdbTransaction) -> None:
        """Do what `start_over` does, as a part of the caller's transaction."""
        for database in (self._incoming, self._merging, self._seen):
            transaction.drop(database, delete=False)
        self._meta.put(
            transaction,
            merge_end=b"",
            cursor=b"",
            state_lost=b"1",
            staged_count=b"",
            staged_bytes=b"",
            resume_token=b"",
            publishing=b"",
        )

    def _stands_at(self, cursor: bytes, plans: Plans) -> bool:
        """Tell whether a download that brought nothing and ends at *cursor* changes nothing at all."""
        with self._environment.read() as transaction:
            return (
                self._meta.get(transaction, "cursor") == cursor
                and not plans.reconcile_any
                and self._view.all_clean(transaction)
                and not any(transaction.stat(database)["entries"] for database in (self._incoming, self._ahead))
                and not any(
                    any(True for _ in self._view.keys(transaction, entity))
                    for entity in plans.in_mode(DownloadMode.NOTHING_CLEAR)
                )
            )

    def _has_objects(self) -> bool:
        with self._environment.read() as transaction:
            return not self._view.is_empty(transaction)

    def _merge(self, transaction: LmdbTransaction, page: sync_pb2.SnapshotPage) -> PublishedCounts:
        # The server tells of a deletion only what was there at the cursor. What this page brings from
        # beyond it, or from outside of what is downloaded, is remembered, for the next download to bring
        # again or to be removed after it.
        cursor_version = unpack_position(self._meta.get(transaction, "cursor_version"))
        newer = [
            pack_object_key(one.entity, one.id)
            for one in page.snapshots
            if one.version > cursor_version or one.outside_projection
        ]
        newer += [pack_object_key(one.entity, one.id) for one in page.confirmations if one.version > cursor_version]
        if not self._meta.get(transaction, "cursor"):
            # Nor does the server know then that it must not confirm them, if they are wanted again.
            newer += [pack_object_key(one.entity, one.id) for one in page.removals]
        publisher = self._publisher(transaction, _MERGE)
        counts = publisher.apply(page)
        publisher.check()
        if self._meta.get(transaction, "resume_token"):
            # An interrupted download would later put older states over these: it starts over.
            transaction.drop(self._incoming, delete=False)
            self._meta.put(transaction, staged_count=b"", staged_bytes=b"", resume_token=b"")
        put_many(transaction, self._ahead, [(key, b"") for key in newer])
        return counts

    def _publish_at_once(
        self, transaction: LmdbTransaction, pages: Sequence[bytes], end: _PublishingEnd
    ) -> PublishedCounts:
        publisher = self._publisher(transaction, end)
        counts = PublishedCounts()
        for page in chain(_pages(transaction, self._incoming), pages):
            counts = counts.plus(publisher.apply(_page(page)))
        publisher.check()
        transaction.drop(self._incoming, delete=False)
        removed, is_over = self._end_step(transaction, publisher, end)
        if not is_over:
            raise _TooMuchAtOnce
        return counts.plus(PublishedCounts(removed=removed))

    def _begin_steps(
        self, transaction: LmdbTransaction, pages: Sequence[bytes], object_count: int, end: _PublishingEnd
    ) -> None:
        self._stage(transaction, pages, object_count, b"")
        self._meta.put(transaction, publishing=end.pack())
        self._view.draw(transaction)

    def _publish_step(self, transaction: LmdbTransaction, end: _PublishingEnd) -> PublishedCounts:
        publisher = self._publisher(transaction, end)
        counts = PublishedCounts()
        cursor = transaction.cursor(self._incoming)
        for _ in range(PUBLISH_STEP_PAGES):
            if not cursor.first():
                removed, _ = self._end_step(transaction, publisher, end)
                return counts.plus(PublishedCounts(removed=removed))
            counts = counts.plus(publisher.apply(_page(cursor.value())))
            publisher.check()
            cursor.delete()
        return counts

    def _end_step(self, transaction: LmdbTransaction, publisher: _Publisher, end: _PublishingEnd) -> tuple[int, bool]:
        """
        End a publication whose pages are in the view, as far as that goes at once.

        Returns how many objects left the view, and whether it is over.
        """
        removed = 0
        for count, has_left in enumerate(publisher.end(), start=1):
            removed += has_left
            if count == END_STEP_OBJECTS:
                return removed, False
        self._view.unveil(transaction)
        transaction.drop(self._seen, delete=False)
        transaction.drop(self._ahead, delete=False)
        if self._meta.get(transaction, "state_lost"):
            self._lineage.take_in_state(transaction)
        self._meta.put(
            transaction,
            cursor=end.cursor,
            cursor_version=pack_position(end.version),
            staged_count=b"",
            staged_bytes=b"",
            resume_token=b"",
            publishing=b"",
            state_lost=b"",
        )
        self._note_unexplained(transaction, end)
        if end.rebases:
            self._lineage.adopt(transaction)
        self._lineage.note_checkpoint(transaction, end.checkpoint)
        return removed, True

    def _publisher(self, transaction: LmdbTransaction, end: _PublishingEnd) -> _Publisher:
        return _Publisher(self._view, self._lineage, self._seen, self._ahead, transaction, end)


class _PublishingEnd(NamedTuple):
    """
    How a publication ends.

    Attributes:
        cursor: What to remember as the cursor.
        version: The version it stands for.
        checkpoint: What to remember as the checkpoint.
        plans: What was downloaded of which entity, and what is reconciled.
        track_seen: Whether what a reconciliation lacks is removed. An empty replica has
            nothing to remove; decided before the first object is written.
        rebases: Whether the replica's state is of the server's new timeline from then on.
        asks_later: Whether what was not downloaded is removed later only with consent, if it is much.
    """

    cursor: bytes
    version: int
    checkpoint: bytes
    plans: Plans
    track_seen: bool
    rebases: bool
    asks_later: bool = False

    def covered(self, version: int) -> int:
        """Return up to where what was applied is in a state of *version*: all, if it was in an older timeline."""
        return _NEWEST if self.rebases else version

    def pack(self) -> bytes:
        return cast("bytes", msgpack.packb(self._replace(plans=self.plans.encode())))  # type: ignore[arg-type]

    @classmethod
    def unpack(cls, data: bytes) -> _PublishingEnd:
        try:
            end = cls(*msgpack.unpackb(data))
            return end._replace(plans=Plans.decode(end.plans))  # type: ignore[arg-type]
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise damaged("what is known of an unfinished publication") from error


class _MergeEnd(NamedTuple):
    """
    How a merge ends.

    Attributes:
        cursor: What to remember as the cursor, unless it is empty.
        checkpoint: What to remember as the checkpoint.
    """

    cursor: bytes
    checkpoint: bytes

    def pack(self) -> bytes:
        return cast("bytes", msgpack.packb(self))

    @classmethod
    def unpack(cls, data: bytes) -> _MergeEnd:
        try:
            return cls(*msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise damaged("what is known of an unfinished merge") from error


class _TooMuchAtOnce(Exception):
    """What ends a publication changes more objects than go into its transaction."""


def _pages(transaction: LmdbTransaction, database: LmdbDatabase) -> Iterator[bytes]:
    return (page for _, page in transaction.cursor(database))


def _page(data: bytes) -> sync_pb2.SnapshotPage:
    try:
        return sync_pb2.SnapshotPage.FromString(data)
    except DecodeError as error:
        raise PageDamaged(str(damaged("a page on its way into the view"))) from error


# A page that comes without a cursor ends nothing.
_MERGE: Final = _PublishingEnd(b"", 0, b"", Plans(), track_seen=False, rebases=False)


class _Publisher:
    """Puts pages into the view, in one transaction."""

    def __init__(  # noqa: PLR0917 - where what is put, then what
        self,
        view: View,
        lineage: Lineage,
        seen: LmdbDatabase,
        ahead: LmdbDatabase,
        transaction: LmdbTransaction,
        end: _PublishingEnd,
    ) -> None:
        self._view = view
        self._lineage = lineage
        self._seen = seen
        self._ahead = ahead
        self._transaction = transaction
        self._end = end
        self._lost: set[bytes] = set()
        self._any_ahead = transaction.stat(ahead)["entries"] > 0

    def apply(self, page: sync_pb2.SnapshotPage) -> PublishedCounts:
        """Put one page into the view."""
        view, transaction, plans = self._view, self._transaction, self._end.plans
        snapshots: dict[str, list[tuple[bytes, int, bytes]]] = {}
        for one in page.snapshots:
            entity = one.entity
            snapshots.setdefault(entity, []).append((pack_object_key(entity, one.id), one.version, one.attributes))
        confirmations = [(pack_object_key(one.entity, one.id), one.version) for one in page.confirmations]
        removals = [(one.entity, pack_object_key(one.entity, one.id), one.version) for one in page.removals]
        brought = [*(one[0] for one in chain.from_iterable(snapshots.values())), *(key for key, _ in confirmations)]
        gone = [key for _, key, _ in removals]
        if self._end.track_seen:
            put_many(transaction, self._seen, [(key, b"") for key in brought])
            for key in gone:  # sent by an earlier page, deleted since
                transaction.delete(key, db=self._seen)
        if self._any_ahead:
            for key in (*brought, *gone):
                transaction.delete(key, db=self._ahead)
        for entity, listed in snapshots.items():
            # What a reconciliation brings may be of another timeline, whose versions do not compare.
            force = plans.reconciles(entity)
            if view.is_clean(transaction, entity):
                view.put_clean_snapshots(transaction, listed, force=force)
            else:
                for key, version, attributes in listed:
                    covered = self._end.covered(version)
                    view.put_snapshot(transaction, key, version, attributes, covered=covered, force=force)
        for key, version in confirmations:
            try:
                view.confirm(transaction, key, version)
            except StateLost:
                self._lost.add(key)
        if self._lost:
            # A later page may tell that the object is gone, or bring it whole.
            self._lost.difference_update(gone)
            self._lost.difference_update(key for listed in snapshots.values() for key, _, _ in listed)
        removed = sum(
            view.remove(transaction, key, self._end.covered(version), force=plans.reconciles(entity))
            for entity, key, version in removals
        )
        return PublishedCounts(len(page.snapshots), len(confirmations), removed)

    def check(self) -> None:
        """Raise StateLost if a confirmation had nothing to confirm. Before the transaction is committed."""
        if self._lost:
            raise StateLost(next(iter(self._lost)))

    def end(self) -> Iterator[bool]:
        """
        Settle what a download of everything left open, and remove what it did not bring, one object a step.

        Yields whether the object left the view. May be broken off after a step, and begun
        again in another transaction: a step is not taken twice.
        """
        view, transaction, plans = self._view, self._transaction, self._end.plans
        version = self._end.covered(self._end.version)
        cleared = plans.in_mode(DownloadMode.NOTHING_CLEAR)
        yield from self._replay_waiting(version)
        for key in scan_keys(transaction, self._ahead):
            transaction.delete(key, db=self._ahead)
            if plans.downloads(unpack_object_key(key)[0]):
                yield view.remove(transaction, key, version, force=True)
        if self._end.track_seen:
            for entity in filter(plans.reconciles, view.entities(transaction)):
                for key in view.keys(transaction, entity):
                    if self._is_gone(key) and view.remove(transaction, key, version, force=True):
                        yield True
        for key in view.stale_keys(transaction, version):
            entity, _ = unpack_object_key(key)
            if plans.downloads(entity):
                view.drop_stale(transaction, key, version)
                yield False
                continue
            has_left = entity in cleared and view.clear(transaction, key)
            if not has_left:
                # No snapshot will ever take its place: what was applied becomes the state to stand on.
                view.fold(transaction, key, version)
            yield has_left
        for entity in cleared:
            for key in view.keys(transaction, entity):
                if view.clear(transaction, key):
                    yield True
        if self._end.rebases:
            for entity in view.entities(transaction):
                if not plans.downloads(entity):
                    for key in view.keys(transaction, entity):
                        if view.limit_version(transaction, key, plans.common_version):
                            yield False

    def _replay_waiting(self, version: int) -> Iterator[bool]:
        """Keep in view what the server lost and has not taken again yet, where it lost the object too."""
        view, transaction = self._view, self._transaction
        while keys := dict.fromkeys(key for _, key in islice(self._waiting(), END_STEP_OBJECTS)):
            left = {key for key in keys if self._is_gone(key) and view.remove(transaction, key, version, force=True)}
            self._replay(keys)
            yield from (key in left and view.prepared(transaction, key) is None for key in keys)

    def _replay(self, keys: Container[bytes]) -> None:
        """Replay what waits on some objects, all of it: none shows with a part."""
        for seq, key in self._waiting():
            if key in keys:
                self._view.replay_again(self._transaction, key, seq)

    def _waiting(self) -> Iterator[tuple[int, bytes]]:
        """Iterate over what waits to be offered again and is not in view. Of what is not downloaded it still is."""
        for seq, key in self._lineage.waiting(self._transaction):
            entity, _ = unpack_object_key(key)
            if self._end.plans.reconciles(entity) and not self._view.is_open(self._transaction, key, seq):
                yield seq, key

    def _is_gone(self, key: bytes) -> bool:
        """Tell whether a reconciliation lacks an object."""
        return self._end.track_seen and self._transaction.get(key, db=self._seen) is None


def _lost(known: Mapping[str, int], kept: Iterable[bytes]) -> dict[str, int]:
    """Return how many of the known objects are not kept, by entity."""
    lost = dict(known)
    for key in kept:
        lost[unpack_object_key(key)[0]] -= 1
    return lost


def _is_much(lost: Mapping[str, int], known: Mapping[str, int]) -> bool:
    """Tell whether more of an entity is lost than goes without being asked for."""
    return any(count > REMOVED_OBJECTS_UNASKED and 2 * count > known[entity] for entity, count in lost.items())


def _mostly_distinct(keys: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Yield each key once, or not at all: a few that are looked at once and pass for others are left out."""
    bits = max(min(count * GUARD_BITS_PER_OBJECT, GUARD_BITS_MAX), 1)
    seen = bytearray(bits // 8 + 1)
    for key in keys:
        place, bit = divmod(crc32(key) % bits, 8)
        if not seen[place] >> bit & 1:
            seen[place] |= 1 << bit
            yield key


def _distinct(keys: Callable[[], Iterator[bytes]], count: int) -> Iterator[bytes]:
    """Yield each key once, of which there are about so many; they are looked at as often as memory asks for."""
    part_count = count // GUARD_OBJECTS_AT_ONCE + 1
    for part in range(part_count):
        yield from {key for key in keys() if crc32(key) % part_count == part}


def _append_pages(transaction: LmdbTransaction, database: LmdbDatabase, pages: Sequence[bytes]) -> None:
    cursor = transaction.cursor(database)
    number = unpack_position(cursor.key()) + 1 if cursor.last() else 1
    for offset, page in enumerate(pages):
        transaction.put(pack_position(number + offset), page, db=database, append=True)

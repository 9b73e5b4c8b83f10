"""
The download: which snapshots and removals a replica needs, page by page.

What a replica may have of a tenant lies in a few *sources*: an entity's objects by
version, or those of them that have a value of an indexed attribute. Each object stands
in a source once, at its latest version. A delta is a scan of the sources from the
cursor's version: each object once, at a cost that follows the number of changed
objects among those that the replica sees.

The sources are scanned in rounds, each up to the head at which the round began. Pages
are read in a transaction of their own; the download ends in the one whose head is
where its round ends, and this head is the new cursor. So no change can slip in below
a cursor, whatever is written meanwhile.

Where single objects are asked for, what was changed while their pages were read comes
again at the end. So these downloads too bring what one moment had, and no part of a
commit group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeAlias, TypeVar

from google.protobuf.message import DecodeError

from tidelog._downloads import DownloadMode
from tidelog._errors import damaged
from tidelog._keys import ObjectKey, pack_position
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._values import Attributes
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server._errors import HistoryCollected, SessionSuperseded
from tidelog_server._history import changes_since, kept, undone_changes
from tidelog_server._indexes import complete_since, left_prefix, versions_of
from tidelog_server._projection import EntityProjection, Projection, Scope, Sight
from tidelog_server._records import NO_REPLICA, Change, Head, Identity, ObjectState
from tidelog_server._sealing import Sealer
from tidelog_server._store import Reader, Store

CATCH_UP_ROUNDS_MAX: Final = 3
# Objects that an index leads to are read so many at a time: what they hold is known only then.
INDEXED_OBJECTS_MAX: Final = 32
# About what an object takes in a page, besides its names and attributes.
FRAMING_BYTES: Final = 16
# In a cursor, the fingerprint of no projection.
NO_PLACE: Final = b"?"

_M = TypeVar("_M", splice_pb2.Cursor, splice_pb2.ResumeToken)

# Says how much the next page may hold, given what its first object takes. If that is more, the object has to wait.
PageBytes: TypeAlias = Callable[[int], int]


def full_pages(needed: int) -> int:
    """Let each page hold as much as any may."""
    return max(PAGE_BYTES_MAX, needed)


class Place(NamedTuple):
    """
    How far a download has come.

    Attributes:
        source: The source being scanned. Those before it stand at *round_head*, those
            behind it at *previous_round_head*.
        position: The version that its scan has reached.
        round_head: The newest version when this round began.
        previous_round_head: The same of the round before. 0: this is the first one.
        first_head: The same of the first round.
        round_commit_id: Id of the commit that ended at *round_head*: the store may be put back meanwhile.
    """

    source: bytes
    position: int
    round_head: int
    previous_round_head: int
    first_head: int
    round_commit_id: bytes

    def is_sound(self, reader: Reader) -> bool:
        """Tell whether a download can have come to this place in the history that there is now."""
        return (
            0 <= self.position <= self.round_head <= reader.head().version
            and 0 <= self.previous_round_head <= self.round_head
            and 0 <= self.first_head <= self.round_head
            and (reader.commit_id(self.round_head) or b"") == self.round_commit_id
        )


class Start(NamedTuple):
    """
    Where a download of mode all begins.

    Attributes:
        cursor: Where the replica's state stands; None: nowhere, so it is reconciled.
        changed: Entities whose projection is another one than the cursor's.
        reconciling: Entities that are reconciled although there is a cursor.
        place: Where an interrupted download goes on; None: it begins now.
        is_foreign: Whether the replica has a state of which nothing is known here.
        collected: Whether it is reconciled because what was done since its cursor is collected.
    """

    cursor: splice_pb2.Cursor | None = None
    changed: frozenset[str] = frozenset()
    reconciling: frozenset[str] = frozenset()
    place: Place | None = None
    is_foreign: bool = False
    collected: bool = False

    @property
    def reconcile(self) -> bool:
        """Whether everything visible is streamed."""
        return self.cursor is None

    @property
    def resumed(self) -> bool:
        """Whether the replica's resume token was taken up."""
        return self.place is not None

    @property
    def reconciled(self) -> frozenset[str] | None:
        """The entities that are reconciled; None: all."""
        return None if self.cursor is None else self.reconciling

    def version(self, entity: str) -> int | None:
        """Return the version that the replica's objects of an entity stand for; None: they are reconciled."""
        return None if self.cursor is None or entity in self.reconciling else self.cursor.version

    def confirms(self, entity: str) -> bool:
        """Tell whether the replica still has whatever its own operations led to."""
        return not self.is_foreign and entity not in self.changed and entity not in self.reconciling

    def without_changed(self) -> bytes:
        """
        Return the cursor without a place for the entities that have changed; empty if none has.

        A session of another mode than all brings what may be seen of them now. Should
        that go back to what it was at the cursor, nobody else would find out.
        """
        if self.cursor is None or not self.changed:
            return b""
        cursor = splice_pb2.Cursor()
        cursor.CopyFrom(self.cursor)
        for entity in self.changed:
            cursor.entities[entity] = NO_PLACE
        return cursor.SerializeToString()

    def is_at(self, head: Head) -> bool:
        """Tell whether the replica has everything up to *head*."""
        return self.cursor is not None and not self.reconciling and self.cursor.version == head.version


def cursor_at(identity: Identity, head: Head, scope: Scope) -> bytes:
    """Return the cursor that stands for everything up to *head*."""
    return splice_pb2.Cursor(
        epoch=identity.epoch,
        timeline=identity.timeline,
        version=head.version,
        commit_id=head.commit_id,
        scope=scope.default,
        entities=scope.entities,
    ).SerializeToString()


def check_timeline(found: Identity, told: Identity) -> None:
    """Raise SessionSuperseded if the store has begun another timeline: what a session was told holds no more."""
    if found != told:
        raise SessionSuperseded("the server has begun a new timeline")


class Download:
    """
    Reads the pages for one replica.

    A page that is empty says that the next object has to wait for room: it is read when the next page is asked for.
    No page is held here once it was given.

    Attributes:
        identity: The store, and the timeline that all pages are of.
        head: Where the history stood when the last page was read.

    Args:
        store: Where the data are.
        projection: What the replica has of them.
        replica: The replica's id in 16 bytes.
        page_bytes: Says how much the next page may hold.
    """

    def __init__(
        self,
        store: Store,
        projection: Projection,
        *,
        replica: bytes = NO_REPLICA,
        page_bytes: PageBytes = full_pages,
    ) -> None:
        self._store = store
        self._projection = projection
        self._tenant = projection.principal.tenant
        self._replica = replica
        self._confirmed: bytes | None = None
        self._page_bytes = page_bytes
        # A token tells where hidden objects stand, and by which values of hidden attributes they are found.
        self._sealer = Sealer(store, "resume")
        self.identity = store.identity
        self.head = Head(0, b"")

    def start_of(self, reader: Reader, cursor_bytes: bytes, resume_token: bytes, *, confirms: bool = False) -> Start:
        """
        Begin with what the replica says of its state. Whatever does not fit the store leads to a reconciliation.

        Args:
            reader: Reads the store as it is now. All pages are of its timeline.
            cursor_bytes: Where the replica stands.
            resume_token: How far an earlier download came.
            confirms: Whether it gets confirmations in place of what it wrote itself.
        """
        projection = self._projection
        self.identity = reader.identity()
        self._confirmed = self._replica if confirms else None
        cursor = _own_cursor(self.identity, cursor_bytes)
        collected = cursor is not None and cursor.version < reader.collected()
        if cursor is not None and (collected or not _is_of_commit(cursor, reader)):
            cursor = None
        indexed_since = complete_since(reader.index)
        changed = frozenset[str]() if cursor is None else _changed(reader, projection, cursor)
        reconciling = {name for name in changed if projection.entity(name).mode.downloads}
        if cursor is not None and cursor.version < indexed_since:
            reconciling.update(name for name in reader.entities() if projection.entity(name).index_prefixes)
        place = None
        token = _parsed(splice_pb2.ResumeToken, self._sealer.open(resume_token, self._tenant) or b"")
        if token is not None:
            place = Place(*(getattr(token, name) for name in Place._fields))
            # A download that began before the indexes were made anew may have passed over what reconciles now.
            is_sound = place.is_sound(reader) and indexed_since < place.first_head
            # What was sent before, and deleted since, must have left its tombstone.
            is_sound = is_sound and reader.collected() <= place.first_head
            if not is_sound or token != self._token(cursor, place):
                place = None
        is_foreign = cursor is None and bool(cursor_bytes)
        return Start(cursor, changed, frozenset(reconciling), place, is_foreign=is_foreign, collected=collected)

    def everything_since(self, start: Start) -> Iterator[sync_pb2.SnapshotPage]:
        """
        Yield what changed since *start*; afterwards `head` is where the replica then stands.

        A tenant that changes faster than this reads is caught up with in the end by
        reading the rest in one transaction.
        """
        scan = _Scan(self._projection, start, self._new_page)
        while not scan.is_over:
            pages = self._scanned(scan)
            while pages:
                yield self._with_token(start, pages.popleft())

    def _scanned(self, scan: _Scan) -> deque[_Page]:
        """Read on in a transaction: a page, or, after several rounds, all that is left."""
        pages: deque[_Page] = deque()
        with self._reading() as reader:
            for page in scan.pages(reader, self.head):
                may_wait = scan.round_count <= CATCH_UP_ROUNDS_MAX
                if not page.is_empty or (page.lacks_room and may_wait):
                    pages.append(page)
                if may_wait:
                    break
        return pages

    def _with_token(self, start: Start, page: _Page) -> sync_pb2.SnapshotPage:
        if not page.is_empty:
            token = self._token(start.cursor, page.end).SerializeToString()
            page.message.resume_token = self._sealer.seal(token, self._tenant)
        return page.message

    def _token(self, cursor: splice_pb2.Cursor | None, place: Place) -> splice_pb2.ResumeToken:
        """Return what a resume token holds. What another one holds besides the place is of another download."""
        identity, scope = self.identity, self._projection.scope
        return splice_pb2.ResumeToken(
            start=cursor,
            epoch=identity.epoch,
            timeline=identity.timeline,
            scope=scope.default,
            entities=scope.entities,
            **place._asdict(),
        )

    def changed_by_operations(
        self, start: Start, first_seq: int, first_version: int
    ) -> Iterator[sync_pb2.SnapshotPage]:
        """
        Yield each object that the replica's operations from *first_seq* on changed, hooks included; sets `head`.

        Their first change is at *first_version* or right before it. Entities that the
        replica never synchronizes are left out; of those that it does not download, it
        gets what it may read. Of what they did so long ago that it is collected nothing
        is told: the next session of mode all reconciles.
        """
        before = self._before_operation(first_version)
        first_head = self._present_version()

        def is_ours(change: Change) -> bool:
            return change.replica == self._replica and change.seq >= first_seq

        def concerns(key: ObjectKey) -> bool:
            return self._projection.entity(key[0]).mode is not DownloadMode.NEVER

        def add(page: _Page, reader: Reader, key: ObjectKey, state: ObjectState) -> bool:
            if not any(is_ours(change) for change in changes_since(before, state.version, reader.change)):
                return True
            if not page.takes(key, state):
                return False
            entity = self._projection.entity(key[0])
            sight = entity.shown if entity.mode.downloads else entity.readable
            seen = sight.encoded(state)
            if seen is not None:
                page.add(key, state, seen, confirms=sight.sees_whole_objects and start.confirms(key[0]))
                return True
            known = (start.version(key[0]) or 0) if entity.mode.downloads else 0
            if known < reader.collected():
                known = 0
            history = undone_changes(reader, state, min(known or before, before))
            if _was_seen(history, sight, first_head, is_ours, known):
                page.add_removal(key, state.version)
            return True

        yield from self._changed_since(before, concerns, add)

    def _before_operation(self, version: int) -> int:
        """
        Return the version before everything that the operation applied at *version* caused, hooks before it too.

        It is no lower than what is collected.
        """
        with self._reading() as reader:
            change = reader.change(version)
            before = version - 1
            while change is not None:
                earlier = reader.change(before)
                if earlier is None or (earlier.replica, earlier.seq) != (change.replica, change.seq):
                    break
                before -= 1
            return max(before, reader.collected())

    def selected(self, keys: Iterable[ObjectKey]) -> Iterator[sync_pb2.SnapshotPage]:
        """Yield the objects of these keys; those that are not there, or not to be read, as removals."""
        wanted = dict.fromkeys(keys)
        told: dict[ObjectKey, int] = {}  # at which version; 0: as gone

        def add(page: _Page, reader: Reader, key: ObjectKey, state: ObjectState | None) -> bool:
            if not page.takes(key, state):
                return False
            entity = self._projection.entity(key[0])
            seen = entity.readable.encoded(state) if state is not None else None
            version = state.version if state is not None and seen is not None else 0
            if told.get(key) == version:
                return True
            told[key] = version
            if state is not None and seen is not None:
                page.add(key, state, seen, confirms=False, outside=entity.shown.encoded(state) is None)
            else:
                # All alike: neither the version nor a repetition must tell what is hidden from what never was.
                page.add_removal(key, reader.head().version)
            return True

        def next_page() -> sync_pb2.SnapshotPage:
            page = _Page(self._page_bytes)
            with self._reading() as reader:
                states = _states(reader, list(remaining))
                while remaining and not page.is_full:
                    if not add(page, reader, remaining[0], next(states)):
                        break
                    remaining.popleft()
            return page.message

        first_head = self._present_version()
        remaining = deque(wanted)
        while remaining:
            yield next_page()
        yield from self._changed_since(first_head, wanted.__contains__, add)

    def _changed_since(
        self,
        version: int,
        concerns: Callable[[ObjectKey], bool],
        add: Callable[[_Page, Reader, ObjectKey, ObjectState], bool],
    ) -> Iterator[sync_pb2.SnapshotPage]:
        """
        Yield what was changed above a version: each object that *concerns* names, with what *add* has to say of it.

        *add* returns false for an object that the page has no room for. It goes by the
        newest change of each object, and ends in a transaction that it reads up to its
        head, which is `head` then. So all is told as of that moment, whatever was written
        while earlier pages were read.
        """
        position = round_head = version
        round_count = 0
        caught_up = False

        def next_pages() -> deque[sync_pb2.SnapshotPage]:
            nonlocal position, round_head, round_count, caught_up
            pages: list[_Page] = []
            with self._reading() as reader:
                if position >= round_head:
                    round_head, round_count = self.head.version, round_count + 1
                while position < self.head.version and (not pages or round_count > CATCH_UP_ROUNDS_MAX):
                    page = self._new_page(round_count)
                    pages.append(page)
                    changes = [(change, concerns(change.key)) for change in _changes(reader, position)]
                    states = _states(reader, [change.key for change, is_concerned in changes if is_concerned])
                    for change, is_concerned in changes:
                        if page.is_full:
                            break
                        if is_concerned:
                            state = next(states)
                            if state is None:
                                raise damaged(f"the object of the change at version {change.version}")
                            if state.version == change.version and not add(page, reader, change.key, state):
                                break
                        position = change.version
                caught_up = position >= self.head.version
            return deque(page.message for page in pages if not page.is_empty or page.lacks_room)

        while not caught_up:
            pages = next_pages()
            while pages:
                yield pages.popleft()

    def _new_page(self, round_count: int) -> _Page:
        # What is left after several rounds is read in one transaction, which cannot wait.
        page_bytes = self._page_bytes if round_count <= CATCH_UP_ROUNDS_MAX else self._page_bytes_at_once
        return _Page(page_bytes, self._confirmed)

    def _page_bytes_at_once(self, needed: int) -> int:
        return max(self._page_bytes(0), needed)

    def _present_version(self) -> int:
        with self._reading() as reader:
            return reader.head().version

    @contextmanager
    def _reading(self) -> Iterator[Reader]:
        """Read the store as it is now, from where `head` is then."""
        with self._store.read(self._tenant) as reader:
            check_timeline(reader.identity(), self.identity)
            self.head = reader.head()
            yield reader


class _Source(NamedTuple):
    """
    A part of the by-version index.

    Attributes:
        key: Its place in the order of sources.
        entity: The entity whose objects it holds.
        is_index: Whether it holds those only that have one value, or had it; the key is
            then where they are found in the table of indexes.
        is_left: Whether it holds those that had the value.
    """

    key: bytes
    entity: str
    is_index: bool = False
    is_left: bool = False

    def objects(
        self, reader: Reader, after: int, limit: int, bytes_max: int
    ) -> tuple[list[tuple[int, ObjectKey, ObjectState]], bool]:
        """Return (version of the entry, key, state) in version order above *after*, and whether more may follow."""
        if not self.is_index:
            objects, has_more = reader.latest_objects(self.entity, after, limit, bytes_max)
            return [(state.version, key, state) for key, state in objects], has_more
        limit = min(limit, INDEXED_OBJECTS_MAX)
        entries = reader.index_range(self.key, self.key + pack_position(after), limit)
        found = [(version, (self.entity, id_)) for version, id_ in versions_of(entries, self.key)]
        states = reader.objects(key for _, key in found)
        return [(version, key, states[key]) for version, key in found], len(entries) == limit


class _Scan:
    """
    Goes through the sources, round after round.

    Attributes:
        round_count: Number of the present round.
        is_over: Whether everything was scanned.
    """

    def __init__(self, projection: Projection, start: Start, new_page: Callable[[int], _Page]) -> None:
        self._projection = projection
        self._start = start
        self._new_page = new_page
        self._place = start.place
        self.round_count = 1
        self.is_over = False

    def pages(self, reader: Reader, head: Head) -> Iterator[_Page]:
        """
        Yield pages until everything up to *head* was scanned. The last one may be empty.

        Whoever stops before the end goes on with another reader.
        """
        if self._start.is_at(head):
            self.is_over = True
            return
        place = self._place or Place(b"", 0, head.version, 0, head.version, head.commit_id)
        cursor = self._start.cursor
        if reader.collected() > (place.first_head if cursor is None else cursor.version):
            # A tombstone that the replica needs to be told of may be among what went.
            raise HistoryCollected("what was changed since the download began is collected already: begin again")
        page = self._new_page(self.round_count)
        while True:
            for source in self._sources(reader, place.source):
                if source.key != place.source:
                    since = self._start.version(source.entity)
                    if since is None:
                        # What had left before the download began, nobody has.
                        since = place.first_head if source.is_left else 0
                    place = place._replace(source=source.key, position=max(place.previous_round_head, since))
                while place.position < place.round_head:
                    place = self._read(reader, source, place, page)
                    if page.is_full:
                        self._place = page.end = place
                        yield page
                        page = self._new_page(self.round_count)
            self._place = page.end = place
            if place.round_head == head.version:
                self.is_over = True
                yield page
                return
            self.round_count += 1
            place = Place(b"", 0, head.version, place.round_head, place.first_head, head.commit_id)

    def _sources(self, reader: Reader, first: bytes) -> list[_Source]:
        """Return the sources from one on, in order."""
        sources = []
        for name in reader.entities():
            prefixes = self._projection.entity(name).index_prefixes
            if prefixes is None:
                sources.append(_Source(name.encode(), name))
            else:
                sources += [_Source(prefix, name, is_index=True) for prefix in prefixes]
                sources += [_Source(left_prefix(prefix), name, is_index=True, is_left=True) for prefix in prefixes]
        return sorted(source for source in sources if source.key >= first)

    def _read(self, reader: Reader, source: _Source, place: Place, page: _Page) -> Place:
        """Put what a source has next into the page; return where the scan stands then."""
        entity = self._projection.entity(source.entity)
        objects, has_more = source.objects(reader, place.position, page.objects_left, page.bytes_left)
        # A replica that saw a part of an object once cannot make up the rest from its own operations.
        confirms = entity.shown.sees_whole_objects and self._start.confirms(source.entity)
        position = place.position
        for version, key, state in objects:
            if page.is_full:
                return place._replace(position=position)
            if version > place.round_head:
                return place._replace(position=place.round_head)
            if not page.takes(key, state):
                return place._replace(position=position)
            seen = entity.shown.encoded(state)
            if seen is not None:
                # What has lost a value and is seen nonetheless stands under another one, and comes from there.
                if not source.is_left:
                    page.add(key, state, seen, confirms=confirms)
            elif self._may_be_known(reader, entity, source, state, place):
                page.add_removal(key, state.version)
            position = version
        return place._replace(position=position if has_more else place.round_head)

    def _may_be_known(
        self, reader: Reader, entity: EntityProjection, source: _Source, state: ObjectState, place: Place
    ) -> bool:
        """
        Tell whether the replica may hold an object that it does not see any more, so that it must be told.

        It does if the object was in its projection at its cursor, or was sent by an
        earlier page of this download. Of any other object nothing is said: that would
        only give away its id.
        """
        cursor_version = self._start.version(source.entity)
        if cursor_version is not None and entity.shown.is_whole and state.created <= cursor_version:
            return True  # it was deleted; spares the history
        # No page can hold an older state than this.
        oldest = place.first_head if cursor_version is None else cursor_version
        if state.version <= oldest:
            return False
        for change, before in undone_changes(reader, state, oldest):
            is_oldest = change.previous <= oldest
            # What this round has sent and lost again stands above its head: the next one tells.
            was_sent = change.previous <= place.previous_round_head and change.version > place.first_head
            was_there = is_oldest and cursor_version is not None
            if (was_sent or was_there) and before is not None and entity.shown.of(before) is not None:
                return True
            if is_oldest:
                return False
        return False


class _Page:
    """
    A page being filled.

    It is full when enough was read for it, whatever came of that: so a transaction is
    short although nearly all that it reads may be hidden from the replica.

    Attributes:
        message: The page on the wire.
        end: Where the download stands after it.
        lacks_room: Whether it is empty because the first object for it has to wait.
    """

    end: Place

    def __init__(self, page_bytes: PageBytes, confirmed: bytes | None = None) -> None:
        self.message = sync_pb2.SnapshotPage()
        self.objects_left = PAGE_OBJECTS_MAX
        self.bytes_left = page_bytes(0)
        self.lacks_room = False
        self._page_bytes = page_bytes
        self._is_untouched = True
        self._is_over = False
        self._confirmed = confirmed
        self._keys: set[ObjectKey] = set()

    @property
    def is_empty(self) -> bool:
        return not self._keys

    @property
    def is_full(self) -> bool:
        return self.objects_left <= 0 or self.bytes_left <= 0 or self._is_over

    def takes(self, key: ObjectKey, state: ObjectState | None) -> bool:
        """Count what was read for this page, if there is room for it; else the page is full."""
        size = FRAMING_BYTES + len(key[0]) + len(key[1]) + (len(state.attributes) if state is not None else 0)
        if size > self.bytes_left:
            self.lacks_room = self._is_untouched and self._page_bytes(size) < size
            if self.lacks_room or not self._is_untouched:
                self._is_over = True
                return False
        self._is_untouched = False
        self.objects_left -= 1
        self.bytes_left -= size
        return True

    def add(
        self, key: ObjectKey, state: ObjectState, seen: bytes, *, confirms: bool = True, outside: bool = False
    ) -> None:
        """Add an object with what is seen of it; or confirm it, if the replica can have all of it by itself."""
        if key in self._keys:
            return
        self._keys.add(key)
        entity, id_ = key
        if confirms and state.sole_writer and state.creator == self._confirmed != NO_REPLICA:
            self.message.confirmations.add(entity=entity, id=id_, version=state.version)
        else:
            self.message.snapshots.add(
                entity=entity, id=id_, version=state.version, attributes=seen, outside_projection=outside
            )

    def add_removal(self, key: ObjectKey, version: int) -> None:
        """Add an object that is gone, for this replica at least."""
        if key not in self._keys:
            self._keys.add(key)
            self.message.removals.add(entity=key[0], id=key[1], version=version)


def _changes(reader: Reader, after: int) -> list[Change]:
    """Return the first changes above a version. Raises HistoryCollected if they are not kept."""
    changes = reader.changes(after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
    kept(changes[0] if changes and changes[0].version == after + 1 else None, after + 1)
    return changes


def _states(reader: Reader, keys: Sequence[ObjectKey]) -> Iterator[ObjectState | None]:
    """Yield the states of objects, None for those that are not there: some at a time, as far as they are wanted."""
    for first in range(0, len(keys), INDEXED_OBJECTS_MAX):
        part = keys[first : first + INDEXED_OBJECTS_MAX]
        found = reader.objects(part)
        yield from map(found.get, part)


def _was_seen(
    history: Iterable[tuple[Change, Attributes | None]],
    sight: Sight,
    first_head: int,
    is_ours: Callable[[Change], bool],
    known: int,
) -> bool:
    """
    Tell whether a replica may know of an object that it does not see.

    It does if the object is one of its own, was seen before the first of our changes
    in its *history*, was seen when earlier pages were read, from *first_head* on, or at
    the version up to which all is *known* to the replica (0: none).
    """
    seen = False
    for change, before in history:
        if is_ours(change) and not change.by_hook:
            return True  # whose id the replica gave, or was given
        was_sent = change.version > first_head or change.previous <= known < change.version
        if is_ours(change) or was_sent:
            is_seen = before is not None and sight.of(before) is not None
            if is_seen and was_sent:
                return True
            seen = is_seen if is_ours(change) else seen
    return seen


def _own_cursor(identity: Identity, data: bytes) -> splice_pb2.Cursor | None:
    """Return a cursor of this store and timeline, or None."""
    cursor = _parsed(splice_pb2.Cursor, data)
    if cursor is None or (cursor.epoch, cursor.timeline) != (identity.epoch, identity.timeline):
        return None
    return cursor if cursor.version >= 0 else None


def _is_of_commit(cursor: splice_pb2.Cursor, reader: Reader) -> bool:
    """Tell whether a cursor stands where a commit ended, and for what that led to."""
    return (reader.commit_id(cursor.version) if cursor.version else b"") == cursor.commit_id


def _changed(reader: Reader, projection: Projection, cursor: splice_pb2.Cursor) -> frozenset[str]:
    """Return the entities that have another projection than the cursor's."""
    scope, before = projection.scope, Scope(cursor.scope, cursor.entities)
    names = {*scope.entities, *before.entities}
    if scope.default != before.default:
        names.update(reader.entities())
    return frozenset(name for name in names if scope.of(name) != before.of(name))


def _parsed(kind: type[_M], data: bytes) -> _M | None:
    if not data:
        return None
    try:
        return kind.FromString(data)
    except DecodeError:
        return None

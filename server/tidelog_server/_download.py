"""
The download: which snapshots and removals a replica needs, page by page.

Every object has one entry in the by-version index, at its latest version. A delta
is a scan of that index from the cursor's version: each object once, at a cost that
follows the number of changed objects. Each page is read in a transaction of its
own; the scan ends in the page whose transaction has nothing above it, and the head
seen there is the new cursor. So no change can slip in below a cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._operation import OperationKind
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server._records import NO_REPLICA, Change, Head, Identity, ObjectState
from tidelog_server._store import Reader, Store

CATCH_UP_ROUNDS_MAX: Final = 3

# What the projection of a principal is made of. Everybody sees everything as yet.
_SCOPE: Final = b""

_M = TypeVar("_M", splice_pb2.Cursor, splice_pb2.ResumeToken)


class Start(NamedTuple):
    """
    Where a download of mode all begins.

    Attributes:
        cursor: Where the replica's state stands; None: nowhere, so it is reconciled.
        position: Everything whose latest version is up to here was sent already.
        resumed: Whether the replica's resume token was taken up.
        first_head: The newest version when the download began, 0 if it begins now.
    """

    cursor: splice_pb2.Cursor | None
    position: int
    resumed: bool
    first_head: int = 0

    @property
    def reconcile(self) -> bool:
        """Whether everything visible is streamed."""
        return self.cursor is None

    @property
    def version(self) -> int:
        """The version that the replica's state stands for. 0: none."""
        return self.cursor.version if self.cursor is not None else 0


def start_of(reader: Reader, identity: Identity, cursor_bytes: bytes, resume_token: bytes) -> Start:
    """Read what the replica says of its state. Whatever does not fit the store leads to a reconciliation."""
    cursor = _valid_cursor(reader, identity, cursor_bytes)
    token = _parsed(splice_pb2.ResumeToken, resume_token)
    if token is not None:
        token_start = token.start if token.HasField("start") else None
        fits = (token.epoch, token.timeline, token.scope) == (identity.epoch, identity.timeline, _SCOPE)
        if fits and token_start == cursor and 0 <= token.position <= reader.head().version:
            return Start(cursor, token.position, resumed=True, first_head=token.first_head)
    return Start(cursor, cursor.version if cursor is not None else 0, resumed=False)


def cursor_at(identity: Identity, head: Head) -> bytes:
    """Return the cursor that stands for everything up to *head*."""
    return _cursor(identity, head).SerializeToString()


class Download:
    """
    Reads the pages for one replica.

    Args:
        store: Where the data are.
        tenant: Whose data.
        replica: The replica's id in 16 bytes.
        confirms: Whether it gets confirmations in place of what it wrote itself.
    """

    def __init__(self, store: Store, tenant: str, *, replica: bytes = NO_REPLICA, confirms: bool = False) -> None:
        self._store = store
        self._tenant = tenant
        self._replica = replica
        self._confirmed = replica if confirms else NO_REPLICA
        self._identity = store.identity
        self.head = Head(0, b"")

    def everything_since(self, start: Start) -> Iterator[sync_pb2.SnapshotPage]:
        """
        Yield what changed since *start*; afterwards `head` is where the replica then stands.

        A tenant that changes faster than this reads is caught up with in the end by
        reading the rest in one transaction.
        """
        position = start.position
        round_end = 0
        rounds = 0
        caught_up = False
        while not caught_up:
            with self._store.read(self._tenant) as reader:
                self.head = reader.head()
                if not start.first_head:
                    start = start._replace(first_head=self.head.version)
                if position >= round_end:
                    rounds += 1
                    round_end = self.head.version
                pages = []
                while True:
                    page, position, caught_up = self._delta_page(reader, start, position)
                    pages.append(page)
                    if caught_up or rounds <= CATCH_UP_ROUNDS_MAX:
                        break
            for page in pages:
                if page.snapshots or page.removals or page.confirmations:
                    yield page

    def changed_by_operations(
        self, first_seq: int, first_version: int, last_version: int
    ) -> Iterator[sync_pb2.SnapshotPage]:
        """
        Yield each object that the replica's operations from *first_seq* on changed, as it is now.

        The changes, of hooks too, lie between the two versions.
        """

        def is_ours(change: Change | None) -> bool:
            return change is not None and change.replica == self._replica and change.seq >= first_seq

        position = self._before_operation(first_version)
        while position < last_version:
            with self._store.read(self._tenant) as reader:
                changes = reader.changes(position, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
                page = _Page(self._confirmed)
                for change in changes:
                    if page.is_full or change.version > last_version:
                        break
                    position = change.version
                    if not is_ours(change):
                        continue
                    state = reader.objects((change.key,))[change.key]
                    # Only the newest of our changes to an object sends it, so that it comes once.
                    newest = reader.change(state.version)
                    while newest is not None and not is_ours(newest):
                        newest = reader.change(newest.previous)
                    if newest is not None and newest.version == change.version:
                        page.add(change.key, state)
            if page.count:
                yield page.message
            if not changes:
                return

    def _before_operation(self, version: int) -> int:
        """Return the version before everything that the operation applied at *version* caused, hooks before it too."""
        with self._store.read(self._tenant) as reader:
            change = reader.change(version)
            before = version - 1
            while change is not None:
                earlier = reader.change(before)
                if earlier is None or (earlier.replica, earlier.seq) != (change.replica, change.seq):
                    break
                before -= 1
        return before

    def selected(self, keys: Sequence[ObjectKey]) -> Iterator[sync_pb2.SnapshotPage]:
        """Yield the objects of these keys as they are; those that are not there come as removals."""
        remaining = list(dict.fromkeys(keys))
        while remaining:
            page = _Page(NO_REPLICA)
            with self._store.read(self._tenant) as reader:
                head = reader.head()
                taken = 0
                for key in remaining[:PAGE_OBJECTS_MAX]:
                    if page.is_full:
                        break
                    taken += 1
                    state = reader.objects((key,)).get(key)
                    if state is None:
                        page.add_removal(key, head.version)
                    else:
                        page.add(key, state)
            remaining = remaining[taken:]
            yield page.message

    def _delta_page(self, reader: Reader, start: Start, position: int) -> tuple[sync_pb2.SnapshotPage, int, bool]:
        """Return a page, the position after it, and whether this transaction has nothing above."""
        objects, has_more = reader.latest_objects(position, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
        page = _Page(self._confirmed)
        for key, state in objects:
            if not state.deleted or _may_be_known(reader, state, start, position):
                page.add(key, state)
        if objects:
            position = objects[-1][1].version
        page.message.resume_token = splice_pb2.ResumeToken(
            start=start.cursor,
            position=position,
            epoch=self._identity.epoch,
            timeline=self._identity.timeline,
            scope=_SCOPE,
            first_head=start.first_head,
        ).SerializeToString()
        return page.message, position, not has_more


class _Page:
    """A page being filled."""

    def __init__(self, replica: bytes) -> None:
        self.message = sync_pb2.SnapshotPage()
        self.count = 0
        self._replica = replica
        self._size_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.count >= PAGE_OBJECTS_MAX or self._size_bytes >= PAGE_BYTES_MAX

    def add(self, key: ObjectKey, state: ObjectState) -> None:
        entity, id_ = key
        if state.deleted:
            self.add_removal(key, state.version)
            return
        if state.sole_writer and state.creator == self._replica:
            self.message.confirmations.add(entity=entity, id=id_, version=state.version)
        else:
            attributes = state.attributes
            # The page must fit a message whatever its last object is; see OBJECT_BYTES_MAX.
            self._size_bytes += len(attributes)
            self.message.snapshots.add(entity=entity, id=id_, version=state.version, attributes=attributes)
        self.count += 1

    def add_removal(self, key: ObjectKey, version: int) -> None:
        self.message.removals.add(entity=key[0], id=key[1], version=version)
        self.count += 1


def _may_be_known(reader: Reader, tombstone: ObjectState, start: Start, sent_up_to: int) -> bool:
    """
    Tell whether the replica may hold an object that is deleted, so that it must be told.

    It does if the object was there at the replica's cursor, or was sent by an earlier
    page of this download and deleted since. Of any other object that came and went
    nothing is said: that would only give away its id.
    """
    if tombstone.created <= start.version:
        return True
    change = reader.change(tombstone.version)
    deleted_meanwhile = tombstone.version > start.first_head
    while change is not None and change.version > start.version:
        if deleted_meanwhile and change.version <= sent_up_to and change.kind is not OperationKind.DELETE:
            return True
        change = reader.change(change.previous)
    return change is not None and change.kind is not OperationKind.DELETE


def _valid_cursor(reader: Reader, identity: Identity, data: bytes) -> splice_pb2.Cursor | None:
    cursor = _parsed(splice_pb2.Cursor, data)
    if cursor is None or cursor.version < 0:
        return None
    if (cursor.epoch, cursor.timeline, cursor.scope) != (identity.epoch, identity.timeline, _SCOPE):
        return None
    if cursor.version == 0:
        return cursor
    return cursor if reader.commit_id(cursor.version) == cursor.commit_id else None


def _cursor(identity: Identity, head: Head) -> splice_pb2.Cursor:
    return splice_pb2.Cursor(
        epoch=identity.epoch,
        timeline=identity.timeline,
        version=head.version,
        commit_id=head.commit_id,
        scope=_SCOPE,
    )


def _parsed(kind: type[_M], data: bytes) -> _M | None:
    if not data:
        return None
    try:
        return kind.FromString(data)
    except DecodeError:
        return None

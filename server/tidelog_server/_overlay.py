"""
The overlay: a store as it would be with what a batch has changed so far.

The engine works on it alone. Reads fall through to the store, which is asked once
for all objects that a batch names; writes stay in the overlay until the batch is
done and leave it as one `Writes`. A journal of what each write replaced takes the
overlay back to any mark, so a refused operation or commit group is undone without
a trace.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from tidelog._file_reference import may_refer_to_files
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._values import Attributes, decode_trusted
from tidelog_server._indexes import Written
from tidelog_server._records import Change, ObjectState
from tidelog_server._store import Reader

_SCAN_PAGE_OBJECTS = 500


# A moment that the overlay can go back to: length of the journal, how many changes, version, how many contents named.
Mark = tuple[int, int, int, int]


class Overlay:
    """
    A reader's data with changes on top.

    Attributes:
        version: The newest version.
        changes: What was changed, in order.
        named: Contents that authors named in what was applied, in order.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.version = reader.head().version
        self.changes: list[Change] = []
        self.named: list[bytes] = []
        self._states: dict[ObjectKey, ObjectState | None] = {}
        self._decoded: dict[ObjectKey, Attributes] = {}
        self._index: dict[bytes, bytes | None] = {}
        self._first_version = self.version + 1
        # What was written, with what the store has of it.
        self._written: dict[ObjectKey, ObjectState | None] = {}
        # Those of them that may refer to files, or did.
        self._referrers: set[ObjectKey] = set()
        self._journal: list[tuple[ObjectKey, ObjectState | None, Attributes | None, bool]] = []

    def prefetch(self, keys: Iterable[ObjectKey]) -> None:
        """Read the objects in one go; those that are not there are known as absent from then on."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._states]
        found = self._reader.objects(missing)
        for key in missing:
            self._states[key] = found.get(key)

    def state(self, key: ObjectKey) -> ObjectState | None:
        """Return the object's state or tombstone, or None if it never was there."""
        try:
            return self._states[key]
        except KeyError:
            self.prefetch((key,))
            return self._states[key]

    def exists(self, key: ObjectKey) -> bool:
        """Tell whether the object is there."""
        state = self.state(key)
        return state is not None and not state.deleted

    def attributes(self, key: ObjectKey) -> Attributes:
        """Return the attributes of an object that exists. Not to be changed."""
        attributes = self._decoded.get(key)
        if attributes is None:
            state = self.state(key)
            if state is None:
                raise KeyError(key)
            attributes = self._decoded[key] = decode_trusted(state.attributes)
        return attributes

    def passed_by(self, key: ObjectKey) -> Attributes | None:
        """
        Return the attributes of an object, or None if it does not exist. Not to be changed.

        What is only passed by is not kept, however many there are.
        """
        if key in self._states:
            return self.attributes(key) if self.exists(key) else None
        state = self._reader.objects((key,)).get(key)
        return None if state is None or state.deleted else decode_trusted(state.attributes)

    def is_written(self, key: ObjectKey) -> bool:
        """Tell whether an object is another one than in the store."""
        return key in self._written

    def change(self, version: int) -> Change | None:
        """Return the change of a version, or None if it is not kept."""
        if version >= self._first_version:
            return self.changes[version - self._first_version]
        return self._reader.change(version)

    def collected(self) -> int:
        """Return the highest version collected."""
        return self._reader.collected()

    def prefetch_index(self, keys: Iterable[bytes]) -> None:
        """
        Read in one go what is going to be looked up in the table of indexes, if it is far away.

        Else the keys are not even looked at: a generator costs nothing then.
        """
        if self._reader.is_remote:
            missing = [key for key in dict.fromkeys(keys) if key not in self._index]
            found = self._reader.indexes(missing)
            self._index.update((key, found.get(key)) for key in missing)

    def index(self, key: bytes) -> bytes | None:
        """Return a value of the table of indexes, as it is without this batch."""
        return self._index[key] if key in self._index else self._reader.index(key)

    def index_entries(self, prefix: bytes, page_entries: int = _SCAN_PAGE_OBJECTS) -> Iterator[bytes]:
        """Yield the keys of the table of indexes that start with *prefix*, as they are without this batch."""
        after = b""
        while page := self._reader.index_range(prefix, after, page_entries):
            for after, _value in page:
                yield after

    def entity_objects(self, entity: str) -> Iterator[tuple[ObjectKey, Attributes]]:
        """
        Iterate over the entity's objects that exist, in no particular order. Their attributes are not to be changed.

        What is only passed by is not kept, however many there are.
        """
        after_id = ""
        more = True
        while more:
            page, more = self._reader.entity_objects(entity, after_id, _SCAN_PAGE_OBJECTS, PAGE_BYTES_MAX)
            for key, state in page:
                after_id = key[1]
                if state.deleted:
                    continue  # created anew on top of the store or not: see below
                if key not in self._written:
                    yield key, decode_trusted(state.attributes)
                elif self.exists(key):
                    yield key, self.attributes(key)
        # What exists on top of the store only, created meanwhile by whoever iterates, too.
        written = [key for key in self._written if key[0] == entity]
        stored = self._reader.objects(written)
        for key in written:
            if self.exists(key) and (key not in stored or stored[key].deleted):
                yield key, self.attributes(key)

    def write(
        self, change: Change, state: ObjectState, attributes: Attributes | None, *, sets_files: bool = True
    ) -> None:
        """
        Take in a change and the state that it leads to.

        Args:
            change: The change. Its version must be the next one.
            state: What the object is then.
            attributes: Its attributes, if somebody has them decoded.
            sets_files: Whether the change may set references to files.
        """
        key = change.key
        before = self._states[key]
        first = key not in self._written
        self._journal.append((key, before, self._decoded.pop(key, None), first))
        if first:
            self._written[key] = before
        self._states[key] = state
        if sets_files or (before is not None and may_refer_to_files(before.attributes)):
            self._referrers.add(key)
        if attributes is not None:
            self._decoded[key] = attributes
        self.changes.append(change)
        self.version = change.version

    def mark(self) -> Mark:
        """Return the present moment."""
        return (len(self._journal), len(self.changes), self.version, len(self.named))

    def rollback(self, mark: Mark) -> None:
        """Undo what was written since *mark*."""
        journal_length, change_count, version, named_count = mark
        while len(self._journal) > journal_length:
            key, state, attributes, first = self._journal.pop()
            self._states[key] = state
            if attributes is None:
                self._decoded.pop(key, None)
            else:
                self._decoded[key] = attributes
            if first:
                del self._written[key]
        del self.changes[change_count:]
        del self.named[named_count:]
        self.version = version

    def written_objects(self) -> dict[ObjectKey, tuple[ObjectState, int]]:
        """Return the new states, each with the version of the stored state it replaces (0: none)."""
        result = {}
        for key, replaced in self._written.items():
            state = self._states[key]
            if state is not None:
                result[key] = (state, replaced.version if replaced is not None else 0)
        return result

    def written_referrers(self) -> Iterator[tuple[ObjectKey, bytes, bytes]]:
        """Yield objects that may refer to files, or did: key, encoded attributes in the store, and now."""
        for key in self._referrers:
            if key in self._written:
                replaced, state = self._written[key], self._states[key]
                yield key, replaced.attributes if replaced else b"", state.attributes if state else b""

    def written(self, entities: Container[str]) -> Iterator[Written]:
        """Yield what became of the objects of some entities."""
        for key, replaced in self._written.items():
            if key[0] in entities:
                state = self._states[key]
                if state is not None:
                    before = decode_trusted(replaced.attributes) if replaced and not replaced.deleted else None
                    yield Written(key, before, None if state.deleted else self.attributes(key), state.version)

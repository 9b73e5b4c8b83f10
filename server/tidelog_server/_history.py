"""History: what an object was before, rebuilt from the change log's before-images."""

from __future__ import annotations

from collections.abc import Iterator

from tidelog._errors import StorageError
from tidelog._operation import OperationKind
from tidelog._values import Attributes, decode_trusted
from tidelog_server._records import Change, ObjectState
from tidelog_server._store import Reader


def attributes_before(change: Change, after: Attributes | None) -> Attributes | None:
    """Return what an object held before a change (None: it was not there), given what it holds *after* it."""
    if change.kind is OperationKind.CREATE:
        return None
    before = decode_trusted(change.before)
    if change.kind is OperationKind.DELETE:
        return before  # type: ignore[no-any-return]
    present, absent = before
    kept = after.items() if after is not None else ()
    return {**{name: value for name, value in kept if name not in absent}, **present}


def undone_changes(reader: Reader, state: ObjectState) -> Iterator[tuple[Change, Attributes | None]]:
    """
    Yield the changes that led to a state, the newest first, each with what the object held before it.

    Raises:
        StorageError: The change log does not reach back as far as it is read.
    """
    attributes = None if state.deleted else decode_trusted(state.attributes)
    version = state.version
    while version:
        change = reader.change(version)
        if change is None:
            raise StorageError(f"the change log does not reach back to version {version}")
        attributes = attributes_before(change, attributes)
        yield change, attributes
        version = change.previous
